"""The files generated from the options are current, and every option has one definition."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from fat.experiment.config import RunConfig, option_table, to_config
from fat.experiment.options_page import MARK, SCHEMAS, markdown, yaml_block
from fat.utils.nested import leaves
from fat.utils.options import build, entries

ROOT = Path(__file__).parents[2]
STALE = "run: python -m fat.experiment.options_page"
TABLE = [entry for schema in SCHEMAS.values() for entry in option_table(schema)]


@pytest.mark.parametrize("name", SCHEMAS)
def test_conf_holds_every_option_with_its_default_and_meaning(name: str) -> None:
    content = (ROOT / "conf" / f"{name}.yaml").read_text(encoding="utf-8")
    assert content.partition(MARK)[2] == yaml_block(SCHEMAS[name]), STALE


def test_the_page_of_options_is_up_to_date() -> None:
    assert (ROOT / "docs" / "options.md").read_text(encoding="utf-8") == markdown(), STALE


def test_the_generated_yaml_is_the_defaults() -> None:
    values = yaml.safe_load(yaml_block(RunConfig))
    values["model"]["name"], values["data"]["source"] = "resnet18", "photos"
    given = {"model": {"name": "resnet18"}, "data": {"source": "photos"}}
    assert build(RunConfig, values) == build(RunConfig, given)
    assert to_config(build(RunConfig, values)) == values


@pytest.mark.parametrize("path", sorted((ROOT / "conf").glob("*/*.yaml")), ids=str)
def test_files_of_groups_say_only_what_differs(path: Path) -> None:
    group = path.parent.name
    if group in ("hydra", "sweep", "experiment"):
        pytest.skip("not a section of the options")
    defaults = {entry.key: entry.default for entry in option_table(RunConfig)}
    content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    for key, value in leaves({group: content}).items():
        assert key in defaults
        # A choice names itself, whatever the default is.
        if key.rpartition(".")[2] not in ("source", "target", "name", "accelerator"):
            assert value != defaults[key], key


@pytest.mark.parametrize("entry", TABLE, ids=lambda entry: f"{entry.owner.__name__}:{entry.key}")
def test_every_option_is_declared_in_full(entry: object) -> None:
    assert entry.meaning  # type: ignore[attr-defined]
    assert not entry.meaning.endswith(".")  # type: ignore[attr-defined]
    assert "\n" not in entry.meaning  # type: ignore[attr-defined]


def test_messages_name_the_key_of_the_command_line() -> None:
    """A class alone says the same key as the command line."""
    for entry in TABLE:
        own = {inner.path[-1]: inner for inner in entries(entry.owner)}[entry.path[-1]]
        prefix = entry.owner._prefix
        key = f"{prefix}.{own.key}".lstrip(".") if not own.key.startswith("init") else own.key
        assert entry.key == key or entry.key.startswith("init.weight")
