"""The door of run and sweep directories: report, evaluate, resume, quant.mixed, sweep.resume."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from doors.damage import JUNK, damaged, evils, json_damaged
from doors.lab import TINY, Lab
from doors.trial import MUST_REFUSE, MUST_WORK, Case, Refused, Result, results_of
from hydra import compose, initialize_config_dir

from fat.evaluation.sensitivity_file import read_sensitivity
from fat.experiment.config import EvaluateConfig, parse
from fat.experiment.evaluate import evaluate_run
from fat.experiment.runner import _with_mixed_bits
from fat.quant.config import QuantSpec
from fat.report.__main__ import report

__all__ = ["runs"]

FILES = (
    "metrics.json",
    "config.yaml",
    "images.csv",
    "history.csv",
    "thresholds.csv",
    "layers.csv",
    "details.json",
    "failure.json",
    "sensitivity.json",
    ".hydra/overrides.yaml",
)
"""What pages are made of."""
ROOT = Path(__file__).parents[2]


def runs(lab: Lab) -> list[Result]:
    """Damaged files of runs and sweeps, by the command that reads them."""
    return lab.run(
        [
            *_reports(lab),
            *_sweeps(lab),
            *_evaluations(lab),
            *_mixed(lab),
            *_resumed(lab),
            *_continued(lab),
        ]
    )


# --------------------------------------------------------------------------------------- reports


def _texts(content: bytes, name: str, lab: Lab, count: int) -> Iterator[tuple[str, bytes]]:
    """Damaged copies of a text file, by what is wrong: bytes, and values of JSON and YAML."""
    rng = lab.random(name)
    for kind, where, broken in damaged(content, rng, cuts=2, flips=4, head=200):
        yield f"{kind}, {where}", broken
    if name.endswith((".json", ".yaml")):
        read: Callable[[str], Any] = json.loads if name.endswith(".json") else yaml.safe_load
        write: Callable[[Any], str] = json.dumps if name.endswith(".json") else yaml.safe_dump
        value = read(content.decode())
        for what, changed in json_damaged(value, rng, count):
            yield what, write(changed).encode()
        for junk in JUNK:
            yield f"all of it is {junk!r}", write(junk).encode()
    if name.endswith(".json"):
        yield "NaN and Infinity", b'{"status": NaN, "float": {"top1": Infinity}}'
        yield "nested 100,000 deep", b'{"a":' * 100_000
    if name.endswith(".csv"):
        lines = content.splitlines(keepends=True)
        yield "no head", b"".join(lines[1:])
        yield "half of the columns", b"".join(line[: len(line) // 2] + b"\n" for line in lines)
        yield "cells of text", content.replace(b"0", b"x")
        yield "cells of nan", content.replace(b"1", b"nan")
        yield "numbers of 400 digits", content.replace(b"1", b"9" * 400)
        yield "a cell of a megabyte", content + b"x" * 1_000_000
        yield "a NUL", content[:40] + b"\0" + content[40:]
    if name.endswith(".yaml"):
        for what, evil in _yaml_code(lab.canary):
            yield what, evil


def _yaml_code(canary: Path) -> Iterator[tuple[str, bytes]]:
    command = f"touch '{canary}'"
    yield (
        "!!python/object/apply:os.system",
        f'!!python/object/apply:os.system ["{command}"]'.encode(),
    )
    yield (
        "!!python/object/new:subprocess.Popen",
        f"a: !!python/object/new:subprocess.Popen [[touch, '{canary}']]".encode(),
    )
    yield "!!python/name:os.system", b"a: !!python/name:os.system"
    yield (
        "_target_: os.system",
        yaml.safe_dump({"model": {"_target_": "os.system", "command": command}}).encode(),
    )
    laughs = ["a0: &a0 [lol, lol, lol, lol, lol, lol, lol, lol, lol]"]
    laughs += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    yield "a billion laughs", "\n".join(laughs).encode()
    yield "a mapping in itself", b"&a {a: *a}"


def _reports(lab: Lab) -> Iterator[Case]:
    whole = lab.measured
    yield Case(
        "`fat.report` of a run, as it was", "", functools.partial(_report, whole), MUST_WORK, whole
    )
    for name in FILES:
        path = whole / name
        content = path.read_bytes() if path.is_file() else b'{"error": "x", "message": "y"}'
        for what, broken in _texts(content, name, lab, 20):
            yield _damaged_run(lab, whole, name, what, broken, "`fat.report` of a run", _report)
    for what, place in (
        ("a file", whole / "metrics.json"),
        ("nothing", whole / "nowhere"),
        ("/dev/null", Path("/dev/null")),
        ("an empty folder", lab.new("empty")),
    ):
        if what == "an empty folder":
            place.mkdir()
        call = functools.partial(_report, place)
        yield Case("`fat.report` of what is no run", what, call, MUST_REFUSE)
    words = (
        (),
        ("--out", "x.html", str(whole)),
        ("--out", "x.txt", str(whole), str(lab.finished)),
        ("--nonsense",),
        ("",),
        ("a" * 5000,),
        ("--out", "/dev/null/x.html", str(whole), str(lab.finished)),
    )
    for asked in words:
        call = functools.partial(lab.command, "fat.report", *asked)
        yield Case("`python -m fat.report`, its words", " ".join(asked[:2]), call, MUST_REFUSE)


def _damaged_run(
    lab: Lab, whole: Path, name: str, what: str, broken: bytes, row: str, act: Callable[[Path], str]
) -> Case:
    """A case on a copy of a run that shares the other files, which nobody may change."""

    def call() -> str:
        place = lab.new("run")
        shutil.copytree(whole, place, copy_function=os.link)
        target = place / name
        target.unlink(missing_ok=True)
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(broken)
        before = results_of(place)
        try:
            return act(place)
        finally:
            assert results_of(place) == before, "results of the run were changed"
            shutil.rmtree(place)

    return Case(f"{row}, `{name}`", what, call, guard=whole)


def _report(place: Path) -> str:
    pages = report([place])
    assert pages, "no page was written"
    text = pages[-1].read_text(encoding="utf-8", errors="replace") if pages else ""
    assert pages[-1].suffix == ".csv" or "</html>" in text, "the page has no end"
    return f"{len(pages)} page(s)"


def _sweeps(lab: Lab) -> Iterator[Case]:
    whole = lab.sweep
    yield Case(
        "`fat.report` of a sweep, as it was",
        "",
        functools.partial(_report, whole),
        MUST_WORK,
        whole,
    )
    for name in ("sweep.json", "multirun.yaml", "0-a/metrics.json", "0-a/failure.json"):
        path = whole / name
        content = path.read_bytes() if path.is_file() else b'{"error": "x", "message": "y"}'
        for what, broken in _texts(content, name, lab, 10):
            yield _damaged_run(lab, whole, name, what, broken, "`fat.report` of a sweep", _report)


# ------------------------------------------------------------------------------------ evaluations


def _evaluations(lab: Lab) -> Iterator[Case]:
    whole = lab.finished
    act = functools.partial(_evaluate, _evaluate_config())
    for name, count in (("config.yaml", 40), ("student.safetensors", 0), ("images.csv", 0)):
        content = (lab.indexed if name == "images.csv" else whole) / name
        run = content.parent
        for what, broken in _texts(content.read_bytes(), name, lab, count):
            yield _damaged_run(lab, run, name, what, broken, "`evaluate.py run=`", act)
    for what, broken in _texts((whole / "metrics.json").read_bytes(), "metrics.json", lab, 6):
        if lab.random(what).random() < 0.2:
            export = functools.partial(_export, lab)
            yield _damaged_run(
                lab, whole, "metrics.json", what, broken, "`evaluate.py export=onnx`", export
            )
    for place in (
        str(whole / "metrics.json"),
        str(whole / "nowhere"),
        "a" * 5000,
        "/dev/null",
        "''",
    ):
        call = functools.partial(lab.command, "evaluate.py", f"run={place}")
        yield Case("`evaluate.py run=` what is no run", lab.said(place), call, MUST_REFUSE)


@functools.cache
def _evaluate_config() -> EvaluateConfig:
    words = ["run=x", "data.batch_size=8", "data.workers=0", "trainer.progress=false"]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return parse(EvaluateConfig, compose("evaluate", overrides=words))


def _evaluate(config: EvaluateConfig, place: Path) -> str:
    config.run = str(place)
    figures = evaluate_run(config)
    assert figures["images"] > 0
    return f"judged on {figures['images']} images"


def _export(lab: Lab, place: Path) -> str:
    stored = (place / "metrics.json").read_bytes()
    lab.command(
        "evaluate.py", f"run={place}", "export=onnx", "data.workers=0", "trainer.progress=false"
    )
    after = json.loads((place / "metrics.json").read_text())
    before = json.loads(stored)
    (place / "metrics.json").write_bytes(stored)  # the export's own figures aside
    for key in ("float", "calibrated", "trained", "training", "seconds", "status"):
        assert after[key] == before[key], f"{key} was changed"
    return "the other figures stayed"


# ------------------------------------------------------------------------------- bits per layer


def _mixed(lab: Lab) -> Iterator[Case]:
    content = (lab.measured / "sensitivity.json").read_bytes()
    folder = lab.new("mixed")
    folder.mkdir()
    for number, (what, broken) in enumerate(_texts(content, "sensitivity.json", lab, 150)):
        path = folder / f"{number}.json"
        path.write_bytes(broken)
        yield Case("`quant.mixed=`", what, functools.partial(_choose, path))
    for place in (folder, Path("a" * 5000), Path("/dev/null"), Path("/dev/zero")):
        yield Case(
            "`quant.mixed=`", lab.said(place), functools.partial(_choose, place), MUST_REFUSE
        )


def _choose(path: Path) -> str:
    spec = _with_mixed_bits(QuantSpec(), read_sensitivity(path), 0.06)
    return f"bits of {len(spec.layer_bits)} layers"


# -------------------------------------------------------------------------------- going on


def _resumed(lab: Lab) -> Iterator[Case]:
    whole = lab.cut_off
    wanted = lab.resumed
    kept = [path.relative_to(whole).as_posix() for path in (whole / "checkpoints").iterdir()]
    assert {"checkpoints/last.ckpt", "checkpoints/start.pt"} <= {*kept}, kept

    def case(name: str, what: str, broken: bytes | None, must: str = "either") -> Case:
        return Case(
            f"`resume=`, `{name}`",
            what,
            functools.partial(_go_on, lab, whole, name, broken, wanted),
            must,
        )

    yield case("config.yaml", "as it was", (whole / "config.yaml").read_bytes(), MUST_WORK)
    for name in ("checkpoints/last.ckpt", "checkpoints/start.pt"):
        content = (whole / name).read_bytes()
        for number, (kind, where, broken) in enumerate(
            damaged(content, lab.random(name), cuts=0, flips=2)
        ):
            if number % 5 == 0:
                yield case(name, f"{kind}, {where}", broken)
        yield from (
            case(name, what, broken, must) for what, broken, must in _states(content, name, lab)
        )
    for name in ("metrics.json", "config.yaml", "history.csv"):
        content = (whole / name).read_bytes()
        some = [*_texts(content, name, lab, 12)]
        for what, broken in lab.random(f"resume {name}").sample(some, 4):
            yield case(name, what, broken)
    for what, broken in _yaml_code(lab.canary):
        yield case("config.yaml", what, broken, MUST_REFUSE)
    yield case("student.safetensors", "empty", b"")
    yield case("student.safetensors", "gone", None)
    for place in (str(whole / "metrics.json"), "nowhere", "a" * 5000, "/dev/null", "''", "${x}"):
        call = functools.partial(lab.command, "train.py", f"resume={place}")
        yield Case("`resume=` what is no run", lab.said(place), call, MUST_REFUSE)


def _states(content: bytes, name: str, lab: Lab) -> Iterator[tuple[str, bytes, str]]:
    """States of a training with other contents."""
    state = torch.load(io.BytesIO(content), weights_only=True)

    def saved(changed: object) -> bytes:
        stream = io.BytesIO()
        torch.save(changed, stream)
        return stream.getvalue()

    for key in state:
        if key in ("state_dict", "optimizer_states", "loops", "fat", "whose", "content"):
            yield f"without {key}", saved({k: v for k, v in state.items() if k != key}), "either"
    yield "a list", saved([1, 2]), MUST_REFUSE
    yield "an empty dict", saved({}), MUST_REFUSE
    inner = "content" if "content" in state else "state_dict"
    for key in list(state[inner])[:1]:
        less = {k: v for k, v in state[inner].items() if k != key}
        yield f"without {inner}.{key}", saved({**state, inner: less}), "either"
        yield (
            f"{inner}.{key} is a text",
            saved({**state, inner: {**state[inner], key: "x"}}),
            "either",
        )
    for function in ("os.system",):
        evil = evils(lab.canary)[function]
        yield f"code, {function}", saved({**state, "callbacks": evil}), MUST_REFUSE


def _go_on(lab: Lab, whole: Path, name: str, broken: bytes | None, wanted: str) -> str:
    place = lab.copy(whole)
    if broken is None:
        (place / name).unlink()
    else:
        (place / name).write_bytes(broken)
    before = results_of(place)
    try:
        lab.command("train.py", f"resume={place}", "trainer.progress=false")
    except Refused:
        assert results_of(place) == before, "a refused run lost results"
        raise
    digest = hashlib.sha256((place / "student.safetensors").read_bytes()).hexdigest()
    if digest == wanted:
        return "the student of a training that was never damaged"
    return "another student"


def _continued(lab: Lab) -> Iterator[Case]:
    """sweep.resume= and fat.search --resume on damaged notes."""
    assert lab.small_sweep  # made now, and not by each child
    for name, broken in (
        ("sweep.json", b""),
        ("sweep.json", b"[]"),
        ("sweep.json", b'{"command": 3, "total": "x"}'),
        ("0-test_efficientnet/metrics.json", b"{"),
        ("0-test_efficientnet/metrics.json", b"[]"),
        ("0-test_efficientnet/metrics.json", b'{"status": "finished"}'),
        ("0-test_efficientnet/config.yaml", b"!!python/object/apply:os.system [touch executed]"),
        ("0-test_efficientnet/student.safetensors", b""),
    ):
        yield Case(
            f"`sweep.resume=`, `{Path(name).name}`",
            repr(broken)[2:40],
            functools.partial(_sweep_on, lab, name, broken),
        )
    for place in ("nowhere", "a" * 5000, "/dev/null", ""):
        call = functools.partial(lab.command, "train.py", "-m", "seed=0,1", f"sweep.resume={place}")
        yield Case("`sweep.resume=` what is no sweep", place[:20], call, MUST_REFUSE)
    for number, junk in enumerate(
        (
            b"",
            b"[]",
            b"{}",
            b'{"words": 3, "seed": 0, "trials": 1}',
            b'{"words": [1], "seed": 0, "trials": 1}',
            b'{"words": ["seed=0"], "seed": "x", "trials": 1}',
            b'{"words": ["x=choice(1,2)"], "seed": 0, "trials": -1}',
            b'{"words": ["x=choice(1,2)"], "seed": 0, "trials": 1e400}',
        )
    ):
        folder = lab.new("search")
        folder.mkdir()
        (folder / "search.json").write_bytes(junk)
        call = functools.partial(
            lab.command,
            "fat.experiment.recipe_search",
            "--resume",
            str(folder),
            "--conf",
            str(ROOT / "conf"),
        )
        yield Case("`python -m fat.search --resume`", f"{number}: {junk[:40]!r}", call, MUST_REFUSE)
    for words in (
        ("optim.lr=3",),
        ("optim.lr=interval(1,0)",),
        ("nothing=choice(1,2)",),
        ("((",),
        ("optim.lr=interval(0,inf)",),
        ("--trials", "0", "optim.lr=interval(1e-4,1e-3)"),
        ("optim.lr=choice(text,'')",),
        ("hydra.run.dir=choice(a,b)",),
        ("optim.lr=range(0,1,0)",),
    ):
        call = functools.partial(
            lab.command,
            "fat.experiment.recipe_search",
            *words,
            "--conf",
            str(ROOT / "conf"),
            "--directory",
            str(lab.new("search")),
        )
        yield Case("`python -m fat.search`, its words", words[-1], call, MUST_REFUSE)
    for words in (
        (),
        ("x",),
        ("a/b/c",),
        ("a/b", "--sweep", "x' or 1"),
        ("a/b", "--nonsense"),
        ("../..",),
        ("a" * 5000,),
        ("a/b",),
    ):
        call = functools.partial(lab.command, "fat.report.wandb_dashboard", *words)
        yield Case("`python -m fat.dashboard`", " ".join(words)[:40], call, MUST_REFUSE)


def _sweep_on(lab: Lab, name: str, broken: bytes) -> str:
    place = lab.copy(lab.small_sweep)
    untouched = results_of(place / "1-test_efficientnet")
    (place / name).write_bytes(broken)
    before = results_of(place / "0-test_efficientnet")
    try:
        lab.command("train.py", "-m", *TINY, "optim.epochs=0", "seed=0,1", f"sweep.resume={place}")
    except Refused:
        assert results_of(place / "0-test_efficientnet") == before, "a refused sweep lost results"
        raise
    finally:
        assert results_of(place / "1-test_efficientnet") == untouched, "another job lost results"
    return "went on"
