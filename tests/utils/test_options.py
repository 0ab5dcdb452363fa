from __future__ import annotations

import json
import math
import pickle
from dataclasses import FrozenInstanceError, dataclass, replace
from typing import Any, Literal

import numpy as np
import pytest

from fat.utils.errors import FatError
from fat.utils.options import (
    Options,
    as_text,
    build,
    current_overrides,
    entries,
    nested,
    option,
    suggest_key,
    to_config,
)


@dataclass(frozen=True)
class Oven(Options, prefix="kitchen.oven"):
    """An oven."""

    degrees: float = option(180.0, "temperature", above=0, at_most=300, earlier=("heat",))
    fan: bool = option(False, "whether air is moved", only=("mode", ("bake",)))
    mode: Literal["bake", "grill"] = option("bake", "heating", renamed={"broil": "grill"})


@dataclass(frozen=True)
class Kitchen(Options, prefix="kitchen"):
    """A kitchen."""

    cooks: int = option(meaning="number of cooks", at_least=1, at_most=9, example=2)
    name: str | None = option(None, "its name")
    tables: tuple[float, float] = option((0.5, 2.0), "smallest and largest", around=1, above=0)
    tags: tuple[str, ...] = option((), "words")
    timeout: float = option(math.inf, "seconds", at_least=0, infinite=True)
    oven: Oven = nested(Oven, "the oven", defaults={"degrees": 200.0})
    spare: Oven = nested(Oven, "another", key="/cellar.oven")
    window_size: int = option(3, "panes", key="window.size", below=5)
    note: Any = option(None, "anything")
    private: int = 0


@dataclass(frozen=True)
class House(Options):
    """A house."""

    kitchen: Kitchen = option(meaning="the kitchen")
    seed: int = option(0, "seed", at_least=0)


def test_an_object_has_its_defaults() -> None:
    kitchen = Kitchen(2)
    assert kitchen == Kitchen(cooks=2)
    assert (kitchen.oven.degrees, kitchen.spare.degrees) == (200.0, 180.0)
    assert kitchen == pickle.loads(pickle.dumps(kitchen))
    assert hash(kitchen) == hash(Kitchen(2))
    with pytest.raises(FrozenInstanceError):
        kitchen.cooks = 3  # type: ignore[misc]
    with pytest.raises(TypeError, match="cooks"):
        Kitchen()
    with pytest.raises(TypeError, match="chefs"):
        Kitchen(2, chefs=2)  # type: ignore[call-arg]


def test_lists_become_tuples_and_numbers_stay_as_they_are() -> None:
    kitchen = Kitchen(2, tables=[1, 2], tags=["a"], timeout=np.float32(2.0))  # type: ignore[arg-type]
    assert (kitchen.tables, kitchen.tags, kitchen.timeout) == ((1, 2), ("a",), 2.0)
    assert isinstance(kitchen.tables[0], int)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"cooks": 0},
            "kitchen.cooks is 0; allowed are whole numbers from 1 to 9, as in kitchen.cooks=2.",
        ),
        ({"cooks": True}, "kitchen.cooks is True; allowed are whole numbers from 1 to 9"),
        ({"cooks": 2.0}, "kitchen.cooks is 2.0; allowed are whole numbers"),
        ({"cooks": None}, "kitchen.cooks is None; allowed are whole numbers from 1 to 9, as"),
        ({"name": 3}, "kitchen.name is 3; allowed are text, or null."),
        (
            {"tables": (1.5, 2.0)},
            "with 1 (where training starts) between, as in kitchen.tables=[0.5,2.0].",
        ),
        (
            {"tables": (2.0, 0.5)},
            "kitchen.tables is [2.0, 0.5]; allowed are two numbers above 0, the lower first",
        ),
        ({"tables": (0.5, "2")}, "kitchen.tables is [0.5, '2']"),
        ({"tables": "wide"}, "kitchen.tables is 'wide'"),
        ({"tags": ("a", 1)}, "kitchen.tags is ['a', 1]; allowed are lists of text"),
        ({"timeout": math.nan}, "kitchen.timeout is nan; allowed are numbers from 0, or inf"),
        ({"timeout": -math.inf}, "kitchen.timeout is -inf"),
        (
            {"window_size": 5},
            "kitchen.window.size is 5; allowed are whole numbers below 5, as in "
            "kitchen.window.size=3.",
        ),
        ({"oven": {"degrees": 3}}, "kitchen.oven is {'degrees': 3}; it must be Oven()."),
    ],
)
def test_what_is_not_allowed_is_said(options: dict[str, Any], message: str) -> None:
    with pytest.raises(FatError) as caught:
        Kitchen(**{"cooks": 2, **options})
    assert message in str(caught.value)


@pytest.mark.parametrize("value", [0.0, 300.1, math.inf, math.nan, 10**400, "hot", None, True])
def test_numbers_out_of_bounds(value: Any) -> None:
    with pytest.raises(FatError, match=r"oven.degrees is .*; allowed are numbers above 0 and"):
        Oven(degrees=value)


def test_the_command_line_has_the_same_sentence() -> None:
    with pytest.raises(FatError) as library:
        Oven(degrees=500.0)
    with pytest.raises(FatError) as command:
        build(House, {"kitchen": {"cooks": 1, "oven": {"degrees": 500}}})
    sentence = "allowed are numbers above 0 and up to 300, as in kitchen.oven.degrees="
    assert f"kitchen.oven.degrees is 500.0; {sentence}180.0." == str(library.value)
    # Here the default is another.
    assert f"kitchen.oven.degrees is 500; {sentence}200.0." == str(command.value)


def test_names_of_earlier_versions() -> None:
    assert Oven(heat=50.0, mode="broil") == Oven(50.0, mode="grill")  # type: ignore[call-arg,arg-type]
    assert replace(Oven(), heat=50.0) == Oven(50.0)
    assert Oven.from_dict({"heat": 50.0, "mode": "broil"}) == Oven(50.0, mode="grill")
    with pytest.raises(FatError, match=r"Unknown kitchen.oven.mode 'brol'. Did you mean 'grill'"):
        Oven(mode="brol")  # type: ignore[arg-type]
    found = build(House, {"kitchen": {"cooks": 1, "oven": {"heat": 50, "mode": "broil"}}})
    assert found.kitchen.oven == Oven(50.0, mode="grill")
    # What was composed under today's key is a default beside it.
    both = {"kitchen": {"cooks": 1, "oven": {"degrees": 90, "heat": 50}}}
    assert build(House, both).kitchen.oven.degrees == 50.0


def test_a_dictionary_and_back() -> None:
    kitchen = Kitchen(2, tags=("a",), oven=Oven(20.0), private=7)
    loaded = Kitchen.from_dict(json.loads(json.dumps(kitchen.to_dict())))
    assert loaded == kitchen
    assert hash(loaded) == hash(kitchen)
    with pytest.raises(FatError, match=r"Unknown option of Kitchen 'coks'. Did you mean 'cooks'"):
        Kitchen.from_dict({"coks": 2})
    with pytest.raises(FatError, match=r"Oven is 3; allowed are options by name"):
        Kitchen.from_dict({"cooks": 2, "oven": 3})


def test_a_config_and_back() -> None:
    house = House(Kitchen(2, tables=(0.5, 1.0), spare=Oven(20.0), window_size=1), seed=4)
    config = to_config(house)
    assert config["kitchen"]["window"] == {"size": 1}
    assert config["kitchen"]["tables"] == [0.5, 1.0]
    assert config["cellar"] == {"oven": {"degrees": 20.0, "fan": False, "mode": "bake"}}
    assert "private" not in config["kitchen"]
    assert build(House, config) == house


def test_text_of_yaml_becomes_numbers() -> None:
    values = {"kitchen": {"cooks": "2", "name": 5, "oven": {"degrees": "1e2", "fan": "true"}}}
    kitchen = build(House, values).kitchen
    assert (kitchen.cooks, kitchen.name, kitchen.oven) == (2, "5", Oven(100.0, fan=True))
    assert isinstance(build(House, {"kitchen": {"cooks": 2, "timeout": 3}}).kitchen.timeout, float)


@pytest.mark.parametrize("word", [True, "true", "Yes", "on", "1", 1])
def test_words_for_true(word: object) -> None:
    values = {"kitchen": {"cooks": 2, "oven": {"fan": word}}}
    assert build(House, values).kitchen.oven.fan is True
    with pytest.raises(FatError, match=r"kitchen.oven.fan is 2; allowed are true and false"):
        build(House, {"kitchen": {"cooks": 2, "oven": {"fan": 2}}})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "kitchen.cooks is needed: type kitchen.cooks=VALUE."),
        ({"kitchen": {"coks": 2}}, "Unknown key 'kitchen.coks'. Did you mean 'kitchen.cooks'?"),
        (
            {"kitchen": 3},
            "'kitchen' holds several options: type kitchen.KEY=VALUE for one of them.",
        ),
        ({"kitchen": {"cooks": {"a": 1}}}, "kitchen.cooks is {'a': 1}; allowed are whole numbers"),
        ({"kitchen": {"cooks": "two"}}, "kitchen.cooks is 'two'; allowed are whole numbers"),
        (
            {"kitchen": {"cooks": 1, "oven": {"fan": True, "mode": "grill"}}},
            "kitchen.oven.fan=true has no effect with kitchen.oven.mode=grill; it is for "
            "kitchen.oven.mode=bake. Leave it out.",
        ),
    ],
)
def test_a_config_that_cannot_be_used(values: dict[str, Any], message: str) -> None:
    with pytest.raises(FatError) as caught:
        build(House, values)
    assert message in str(caught.value)


def test_a_stored_config_may_hold_options_without_effect() -> None:
    values = {"kitchen": {"cooks": 1, "oven": {"fan": True, "mode": "grill"}}}
    assert build(House, values, composed=False).kitchen.oven.fan


def test_the_table_of_options() -> None:
    table = {entry.key: entry for entry in entries(House)}
    assert list(table)[:3] == ["kitchen.cooks", "kitchen.name", "kitchen.tables"]
    rows = {
        key: (table[key].type_name, table[key].default_text, table[key].allowed)
        for key in ("kitchen.cooks", "kitchen.tags", "kitchen.oven.mode", "cellar.oven.fan")
    }
    assert rows == {
        "kitchen.cooks": ("int", "", "whole numbers from 1 to 9"),
        "kitchen.tags": ("list", "[]", "lists of text"),
        "kitchen.oven.mode": ("str", "bake", "bake, grill"),
        "cellar.oven.fan": ("bool", "false", "true and false"),
    }
    assert table["cellar.oven.fan"].path == ("kitchen", "spare", "fan")
    assert table["cellar.oven.fan"].effect_text == "cellar.oven.mode=bake"
    assert "Attributes:\n    degrees: temperature\n" in (Oven.__doc__ or "")


def test_earlier_words_of_a_command_line() -> None:
    words = ["-m", "kitchen.oven.heat=1,2", "++cellar.oven.mode=bake,broil", "name=broil", "broil"]
    assert current_overrides(words, House) == [
        "-m",
        "kitchen.oven.degrees=1,2",
        "++cellar.oven.mode=bake,grill",
        "name=broil",
        "broil",
    ]


def test_keys_that_are_close() -> None:
    assert "'kitchen.oven.mode' or 'cellar.oven.mode'" in suggest_key("mode", House)
    assert (
        suggest_key("xyzzy", House)
        == "Unknown key 'xyzzy'. All options: --cfg job, or docs/options.md."
    )


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "null"), (False, "false"), (1e-4, "0.0001"), ("a", "a"), (((1,),), "[[1]]")],
)
def test_values_as_they_are_typed(value: Any, text: str) -> None:
    assert as_text(value) == text
