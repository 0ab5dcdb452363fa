"""Several processes on the command line: the result of one, and files written once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.integration.running import ROOT, command, command_from_cold
from tests.integration.test_commands import TINY
from tests.integration.warm import environment

# At larger rates a network of random weights makes roundings larger from step to step.
RUN = [
    *TINY,
    "data.train_images=32",
    "data.test_images=20",
    "data.workers=1",  # else the cores are divided among the processes
    "optim.epochs=2",
    "optim.lr=1e-5",
    "optim.bias_lr=1e-5",
    "optim.weight_scale_lr=1e-5",
    "trainer.progress=false",
    "logger=csv",
]
DDP = [*RUN, "trainer=ddp", "trainer.devices=2", "trainer.threads=1", "trainer.progress=false"]


def files(folder: Path) -> set[str]:
    """What a run left, but for the name of the best checkpoint, which tells the step."""
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*"))
    return {"checkpoints/best" if "/step=" in name else name for name in found}


def state(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = torch.load(
        folder / "checkpoints" / "last.ckpt", weights_only=True, map_location="cpu"
    )["state_dict"]
    return found


def metrics(folder: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((folder / "metrics.json").read_text())
    return found


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes") / "one"
    result = command("train.py", *RUN, f"hydra.run.dir={folder}")
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes") / "two"
    result = command_from_cold("train.py", *DDP, f"hydra.run.dir={folder}")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("Run directory:") == 1
    return folder


def assert_same(one: Path, other: Path) -> None:
    wanted, got = state(one), state(other)
    assert wanted.keys() == got.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-5, msg=name)
    first, second = metrics(one), metrics(other)
    for key in ("float", "bits", "size_mb", "status"):
        assert first[key] == second[key], key
    data = [{**figures["data"], "workers": None} for figures in (first, second)]  # type: ignore[dict-item]
    assert data[0] == data[1]  # the processes divide the cores, and so the workers
    for key in ("agreement", "sqnr_db", "rmse"):
        figures = first["calibrated"][key], second["calibrated"][key]  # type: ignore[index]
        assert figures[0] == pytest.approx(figures[1], rel=1e-6), key
    for key in ("steps", "bias_correction", "reconstruction", "restored", "interrupted"):
        assert first["training"][key] == second["training"][key], key  # type: ignore[index]
    for key in ("calibrated_loss", "best_loss"):
        losses = first["training"][key], second["training"][key]  # type: ignore[index]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4), key
    drift = [figures["trained"]["sqnr_db"] for figures in (first, second)]  # type: ignore[index]
    assert drift[0] == pytest.approx(drift[1], abs=0.05)


def test_two_processes_give_what_one_gives(one: Path, two: Path) -> None:
    calibrated = state(one)
    assert any("thresholds" in name for name in calibrated)
    assert_same(one, two)


def test_files_are_written_once_and_by_the_first(one: Path, two: Path) -> None:
    assert files(one) == files(two)
    assert sorted(os.listdir(two.parent)) == ["two"]
    rows = (two / "history.csv").read_text().splitlines()
    assert len(rows) == len(set(rows))
    assert len(rows) == len((one / "history.csv").read_text().splitlines())


def test_blocks_are_reconstructed_together_and_one_process_has_no_validation_batch(
    tmp_path: Path,
) -> None:
    recipe = [
        "data.validation_images=8",
        "optim.feature_weight=0.1",
        "optim.epochs=1",
        "optim.reconstruction.steps=4",
        "optim.reconstruction.batch_size=6",
        "optim.reconstruction.images=20",
        "quant.weights=adaround",
    ]
    for name, options in {"one": RUN, "two": DDP}.items():
        result = command("train.py", *options, *recipe, f"hydra.run.dir={tmp_path / name}")
        assert result.returncode == 0, result.stderr
    assert metrics(tmp_path / "one")["training"]["reconstruction"] == "kept"  # type: ignore[index]
    assert_same(tmp_path / "one", tmp_path / "two")


def test_torchrun_starts_them_too(one: Path, tmp_path: Path) -> None:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc-per-node",
            "2",
            "--master-port",
            "29517",
            "train.py",
            *DDP,
            f"hydra.run.dir={tmp_path / 'run'}",
        ],
        cwd=ROOT,
        env=clean,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert_same(one, tmp_path / "run")
    assert files(tmp_path / "run") == files(one)
    assert sorted(os.listdir(tmp_path)) == ["run"]


SRUN = """#!/bin/bash
# Runs a command once for each node, all on this machine.
while [[ "$1" == --* ]]; do echo "srun $1" >> "$SRUN_LOG"; shift; done
pids=()
for ((node = 0; node < SLURM_NNODES; node++)); do "$@" & pids+=($!); done
for pid in "${pids[@]}"; do wait "$pid" || exit 1; done
"""


def test_the_slurm_job_trains_on_all_nodes_and_resumes_when_requeued(
    one: Path, tmp_path: Path
) -> None:
    tools, log = tmp_path / "bin", tmp_path / "srun.log"
    tools.mkdir()
    for name, text in {"srun": SRUN, "scontrol": "#!/bin/bash\nyes localhost | head -2\n"}.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    job = {
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_NNODES": "2",
        "SLURM_GPUS_ON_NODE": "1",  # one process of the CPU for each node
        "SLURM_CPUS_PER_TASK": "1",
        "SRUN_LOG": str(log),
        "PATH": os.pathsep.join([str(tools), str(Path(sys.executable).parent), os.environ["PATH"]]),
    }
    folder = tmp_path / "run"
    script = ["bash", str(ROOT / "examples" / "train.sbatch")]
    options = [word for word in DDP if not word.startswith(("trainer.devices", "trainer=ddp"))]
    outputs = []
    for _ in range(2):
        result = subprocess.run(
            [*script, *options, f"hydra.run.dir={folder}"],
            cwd=ROOT,
            env=environment(job),
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        outputs.append(result.stdout + result.stderr)
    assert_same(one, folder)
    assert "is finished already" in outputs[1]
    assert "is finished already" not in outputs[0]
    assert log.read_text().splitlines()[:3] == [
        "srun --ntasks-per-node=1",
        "srun --cpus-per-task=1",
        "srun --kill-on-bad-exit=1",
    ]


def test_the_slurm_job_outside_of_slurm_says_how_to_submit_it() -> None:
    result = subprocess.run(
        ["bash", str(ROOT / "examples" / "train.sbatch")],
        env={k: v for k, v in os.environ.items() if not k.startswith("SLURM")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode != 0
    assert "submit this script with sbatch" in result.stderr


def test_the_documented_slurm_job_is_the_script() -> None:
    page = (ROOT / "docs" / "scaling.md").read_text()
    script = (ROOT / "examples" / "train.sbatch").read_text()
    assert f"```bash\n{script}```" in page


def test_a_run_of_two_processes_that_was_killed_goes_on(two: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    clean = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
    process = subprocess.Popen(
        [sys.executable, "train.py", *DDP, "trainer.checkpoint_every=0", f"hydra.run.dir={folder}"],
        cwd=ROOT,
        env=clean,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 200
    while not (folder / "checkpoints" / "last.ckpt").is_file():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert metrics(folder)["status"] == "calibrated"
    result = command_from_cold("train.py", f"resume={folder}")
    assert result.returncode == 0, result.stderr
    wanted, got = (load_file(place / "student.safetensors") for place in (two, folder))
    for name, value in wanted.items():
        assert torch.equal(value, got[name]), name
    assert (folder / "history.csv").read_text() == (two / "history.csv").read_text()


def test_a_sigterm_to_one_process_ends_both_with_a_checkpoint_of_that_step(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    words = ["optim.epochs=200", "trainer.checkpoint_every=1e9", f"hydra.run.dir={folder}"]
    process = subprocess.Popen(
        [sys.executable, "train.py", *DDP, *words],
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if not k.startswith("WANDB")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    history = folder / "history.csv"

    def steps() -> int:
        rows = history.read_text().splitlines()[1:] if history.is_file() else []
        return int(rows[-1].partition(",")[0]) if rows else 0

    deadline = time.monotonic() + 200
    while steps() < 10:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    trainings = [
        int(pid) for pid in children if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()
    ]
    assert len(trainings) == 2
    os.kill(max(trainings), signal.SIGTERM)  # not the one that writes
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "Interrupted after" in output
    last = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] == steps() < 800
