"""The commands, files and links in the README, docs/ and CONTRIBUTING.md work."""

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
DOCS = {page.name: page.read_text(encoding="utf-8") for page in sorted(ROOT.glob("docs/*.md"))}
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
TEXT = "\n".join([README, CONTRIBUTING, *DOCS.values()])
START = r"(?:python (?:train|evaluate)\.py|fat (?:train|evaluate))"
OWN_CONF = "--config-dir my_conf"
COMMANDS = sorted(
    {
        line.partition("#")[0].strip()
        for block in re.findall(r"```bash\n(.*?)```", TEXT, re.S)
        for line in block.splitlines()
        if re.match(START, line) and OWN_CONF not in line
    }
    | set(re.findall(rf"`({START} [^`<]+)`", TEXT))
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


def test_the_blocks_of_the_library_page_run(
    tiny: nn.Module, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    batches = list(images.split(4))
    names = {
        "network": tiny,
        "example_images": images[:4],
        "images": batches,
        "validation": batches[:1],
        "held_out": batches[:2],
    }
    blocks = re.findall(r"```python\n(.*?)```", DOCS["library.md"], re.S)
    # A pretrained network and an extra are not part of the test environment.
    tried = [block for block in blocks if "DIR" not in block and "litert" not in block]
    assert len(tried) == len(blocks) - 2
    for block in tried:
        smaller = block.replace("steps=300", "steps=1").replace("budget_mb=2.9", "budget_mb=0.0018")
        exec(smaller, names)


def test_there_are_commands_to_check() -> None:
    assert len(COMMANDS) > 40


def of_first_job(word: str) -> str:
    override = OverridesParser.create().parse_override(word)
    if not override.is_sweep_override():
        return word
    return f"{override.get_key_element()}={next(override.sweep_string_iterator())}"


def composed(command: str, *extra: str) -> RunConfig | EvaluateConfig:
    _, script, *words = shlex.split(command)
    overrides = [of_first_job(word) for word in words if not word.startswith("-") and "=" in word]
    is_run = script.startswith("train")
    name, schema = ("train", RunConfig) if is_run else ("evaluate", EvaluateConfig)
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config: RunConfig | EvaluateConfig = parse(
            schema, compose(name, overrides=[*overrides, *extra])
        )
    return config


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_composes(command: str) -> None:
    composed(command)


def test_the_configuration_file_of_the_page_extends_conf(tmp_path: Path) -> None:
    page = DOCS["command_line.md"]
    (name, content) = re.findall(r"`my_conf/([\w/]+\.yaml)`:\n\n```yaml\n(.*?)```", page, re.S)[0]
    (tmp_path / name).parent.mkdir(parents=True)
    (tmp_path / name).write_text(content)
    (command,) = re.findall(rf"^fat train {OWN_CONF} .*$", page, re.M)
    config = composed(command.replace(OWN_CONF, ""), f"hydra.searchpath=[file://{tmp_path}]")
    assert isinstance(config, RunConfig)
    assert config.model.name == "mobilenetv2_100"
    assert (config.quant.bits, config.optim.epochs) == (6, 5)


def test_every_linked_file_exists() -> None:
    for text, folder in (
        (README, ROOT),
        (CONTRIBUTING, ROOT),
        *((x, ROOT / "docs") for x in DOCS.values()),
    ):
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
            assert (folder / target).exists(), target


def test_every_named_module_exists() -> None:
    for path in re.findall(
        r"`((?:fat/)?(?:quant|graph|models|data|training|export|report|experiment)/[\w/]+\.py)`",
        TEXT,
    ):
        assert (ROOT / "fat" / path.removeprefix("fat/")).is_file(), path


def test_the_claim_of_the_readme_is_true() -> None:
    """The highest SQNR in all settings, and the highest agreement within one image of 200."""
    page = DOCS["benchmarks.md"]
    rows = re.findall(r"^\| (efficientnet_lite\d, .*?) \|$", page, re.M)
    compared = [row.split(" | ") for row in rows if row.count("dB") == 3]
    assert len(compared) == 10
    for _, others, ours, in_their_time in compared:
        *_, best_db = re.findall(r"(-?[\d.]+) dB", others)
        best_agreement = max(map(float, re.findall(r"([\d.]+) %", others)))
        for own in (ours, in_their_time):
            agreement, db = re.findall(r"([\d.]+) %, (-?[\d.]+) dB", own)[0]
            assert float(db) > float(best_db)
            assert float(agreement) >= best_agreement - 0.5
    assert "FAT has the highest SQNR in all 10 settings and the highest agreement" in " ".join(
        README.split()
    )


def test_no_placeholder_is_left() -> None:
    assert "@" not in README.replace("@torch", "")


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 150
