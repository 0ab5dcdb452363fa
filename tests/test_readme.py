"""What the README and the pages of docs/ show works as it stands there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from torch import Tensor, nn

from fat.experiment.config import EvaluateConfig, RunConfig, parse

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = [page.read_text(encoding="utf-8") for page in sorted(ROOT.glob("docs/*.md"))]
TEXT = "\n".join([README, *DOCS])
COMMANDS = sorted(
    {
        line.partition("#")[0].strip()
        for block in re.findall(r"```bash\n(.*?)```", TEXT, re.S)
        for line in block.splitlines()
        if re.match(r"python (train|evaluate)\.py", line)
    }
    | set(re.findall(r"`(python train\.py [^`]+)`", TEXT))
)


def test_the_library_block_runs(
    tiny: nn.Module, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (block,) = re.findall(
        r"<!-- the test suite runs this block -->\n```python\n(.*?)```", README, re.S
    )
    monkeypatch.chdir(tmp_path)
    batches = list(images.split(4))
    names = {
        "network": tiny,
        "example_images": images[:4],
        "images": batches,
        "held_out": [(images[:8], torch.zeros(8, dtype=torch.int64))],
    }
    exec(block, names)
    student = names["student"]
    assert isinstance(student, nn.Module)
    assert (tmp_path / "student.safetensors").is_file()
    assert student(images).shape == (16, 10)


def test_there_are_commands_to_check() -> None:
    assert len(COMMANDS) > 8


def of_first_job(word: str) -> str:
    override = OverridesParser.create().parse_override(word)
    if not override.is_sweep_override():
        return word
    return f"{override.get_key_element()}={next(override.sweep_string_iterator())}"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_composes(command: str) -> None:
    _, script, *words = shlex.split(command)
    overrides = [of_first_job(word) for word in words if not word.startswith("-") and "=" in word]
    name, schema = ("train", RunConfig) if script == "train.py" else ("evaluate", EvaluateConfig)
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = parse(schema, compose(name, overrides=overrides))
    if isinstance(config, RunConfig):
        config.quant_spec()
        config.train_spec()


def test_every_picture_and_page_exists() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).is_file(), target


def test_the_comparison_is_the_one_of_its_page() -> None:
    page = (ROOT / "docs/benchmarks.md").read_text(encoding="utf-8")
    (table,) = re.findall(r"## In short\n\n(.*?)\n\n## ", page, re.S)
    assert table in README


def test_no_placeholder_is_left() -> None:
    assert "@" not in README.replace("@torch", "")
