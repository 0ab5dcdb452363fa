"""The door of options: values of the config, through the entry points that take them."""

from __future__ import annotations

import dataclasses
import functools
import string
import typing
from collections.abc import Iterator
from typing import Any

from doors.lab import TINY, Lab
from doors.trial import ROOT, Case, Refused, Result
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fat.experiment.cli import explain
from fat.experiment.config import EvaluateConfig, RunConfig, parse
from fat.utils.errors import FatError

__all__ = ["options"]

BASES = {
    "train": (
        (),
        ("data=folder",),
        ("data=imagenet",),
        ("data=distilled",),
        ("teacher=finetune",),
        ("export=onnx",),
        ("export=litert",),
        ("init=lp",),
        ("init=mse",),
    ),
    "evaluate": ((), ("data=folder",), ("export=onnx",)),
}
"""Choices that together have every option."""
VALUES = (
    "text",
    "true",
    "3",
    "3.7",
    "-1",
    "0",
    "nan",
    "inf",
    "-inf",
    "1e308",
    "1e-308",
    "1e400",
    "1000000000",
    "99999999999999999999",
    "null",
    "''",
    "[]",
    "[1,2]",
    "[2,1]",
    "[1,x]",
    "[nan,inf]",
    "{}",
    "{a:1}",
    "???",
    "'ünïcödé 日本 😀'",
    "'a\nb'",
    "'; touch x'",
    "'<script>%s{}$1'",
    "'" + "a" * 5000 + "'",
    "'../../../../etc/passwd'",
    "/dev/null/x",
    "${oc.env:HOME}",
    "${nothing}",
    "${oc.env:NO_SUCH_VARIABLE}",
    "${model.name}",
    "${oc.decode:'[1'}",
    "{_target_:os.system,command:'touch executed'}",
)
RANDOM = 3
"""So many random texts for each option."""
ENDLESS = (
    "optim.epochs",
    "optim.reconstruction.steps",
    "optim.reconstruction.images",
    "teacher.epochs",
    "quant.equalize.iterations",
    "data.distill.images",
    "data.distill.steps",
    "data.distill.coarse_steps",
    "data.distill.batch_size",
    "data.train_images",
    "data.calibration_images",
    "data.validation_images",
    "data.test_images",
    "trainer.devices",
    "data.workers",
    "trainer.threads",
    "model.num_classes",
)
"""Options whose large values are a matter of patience and memory: they are parsed, not run."""
HEAVY = 1000
"""From here on a value of these is large."""
MEANS = {
    "data=folder": ("data.root=IMAGES",),
    "data=imagenet": ("data.root=IMAGES",),
    "data=distilled": (
        "data.distill.images=8",
        "data.distill.steps=1",
        "data.distill.coarse_steps=1",
    ),
    "teacher=finetune": ("teacher.epochs=1",),
}
"""What else a choice needs for a run of seconds."""


@dataclasses.dataclass(frozen=True)
class Option:
    """One option of the config tree.

    Attributes:
        program: ``train`` or ``evaluate``.
        base: The choices that bring it.
        key: Its dotted name.
    """

    program: str
    base: tuple[str, ...]
    key: str

    @property
    def row(self) -> str:
        """The row of the page: the program and the option's group."""
        group = self.key.partition(".")[0] if "." in self.key else "top level"
        return f"`{self.program}.py`, {group}"


class Tree:
    """A composed config, in which single values can be replaced and judged quickly.

    A whole config takes a tenth of a second to parse. The section of an option alone takes a
    hundredth; the rest is as it was. That both give the same is seen from the sample that goes
    through the real commands.
    """

    def __init__(self, program: str, base: tuple[str, ...]) -> None:
        self.schema = RunConfig if program == "train" else EvaluateConfig
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            self.composed = compose(program, overrides=list(base))
        self.parser = OverridesParser.create()

    def keys(self) -> list[str]:
        """Dotted names of all options."""
        return list(_leaves(self.composed))

    @functools.cached_property
    def parsed(self) -> Any:
        """The dataclasses of the config as it is."""
        return parse(self.schema, self.composed)

    def judge(self, key: str, word: str) -> object:
        """The option's value as the run would have it.

        Raises:
            Refused: If it is not accepted, with what train.py would print.
            FatError: Likewise.
        """
        section, _, leaf = key.rpartition(".")
        try:
            override = self.parser.parse_override(f"{key}={word}")
            changed = self.composed.copy()
            OmegaConf.update(changed, key, override.value())
            if not section:
                config: Any = parse(self.schema, changed)
                value = getattr(config, leaf)
            else:
                node = OmegaConf.select(changed, section)
                kind = _kind(self.schema, section)
                try:
                    value = getattr(parse(kind, node), leaf)
                except FatError as error:  # a section alone does not know its own name
                    text = str(error).replace(f"{leaf}: ", f"{key}: ", 1)
                    raise FatError(text.replace(f" {leaf}=", f" {key}=")) from error
                config = dataclasses.replace(self.parsed)
                config = _replaced(config, key.split("."), value)
        except (HydraException, OmegaConfBaseException) as error:
            raise Refused(explain(error, self.schema)) from error
        config.check()
        if isinstance(config, RunConfig):
            config.quant_spec(), config.train_spec(), config.finetune_spec()
        return value


def _leaves(node: DictConfig, prefix: str = "") -> Iterator[str]:
    for key in node:
        below = node._get_node(key)
        if OmegaConf.is_dict(below):
            yield from _leaves(typing.cast(DictConfig, below), f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def _kind(schema: type, section: str) -> type:
    for part in section.split("."):
        schema = typing.get_type_hints(schema)[part]
    return schema


def _replaced(config: Any, path: list[str], value: object) -> Any:
    first, *rest = path
    inner = _replaced(getattr(config, first), rest, value) if rest else value
    return dataclasses.replace(config, **{first: inner})


def options(lab: Lab, runs: int = 30) -> list[Result]:
    """Every value for every option, then runs with a sample of those that were accepted.

    Args:
        lab: Does the cases.
        runs: How many are run.
    """
    trees = {(program, base): Tree(program, base) for program in BASES for base in BASES[program]}
    known: dict[tuple[str, str], Option] = {}
    for (program, base), tree in trees.items():
        for key in tree.keys():  # noqa: SIM118
            known.setdefault((program, key), Option(program, base, key))
    cases: list[Case] = []
    tried: dict[tuple[str, str], tuple[Option, str]] = {}
    for option in known.values():
        rng = lab.random(f"{option.program} {option.key}")
        noise = ["".join(rng.choices(string.printable[:95], k=12)) for _ in range(RANDOM)]
        tree = trees[option.program, option.base]
        for word in (*VALUES, *noise):
            what = f"{option.key}={word}"
            call = functools.partial(_judge, tree, option, word)
            cases.append(Case(option.row, what, call))
            tried[option.row, what] = option, word
    results = lab.run(cases)
    return [*results, *lab.run(_runs(lab, results, tried, runs))]


def _judge(tree: Tree, option: Option, word: str) -> str:
    return f"accepted as {tree.judge(option.key, word)!r}"


def _runs(
    lab: Lab, results: list[Result], tried: dict[tuple[str, str], tuple[Option, str]], count: int
) -> list[Case]:
    """Real commands: with values that were accepted, each once, and with some that were not."""
    accepted: dict[tuple[str, str, str], Case] = {}
    refused: list[Case] = []
    for result in results:
        option, word = tried[result.case.row, result.case.what]
        case = Case("", result.case.what, functools.partial(_command, lab, option, word))
        if result.came == "refused":
            row = "real commands with values that were refused"
            refused.append(dataclasses.replace(case, row=row, wanted="refused"))
        elif result.came == "worked" and not _endless(option, word):
            row = "real commands with values that were accepted"
            accepted[option.program, option.key, result.text] = dataclasses.replace(case, row=row)
    assert lab.finished, lab.images  # made now, and not by each child
    rng = lab.random("runs")
    chosen = list(accepted.values())
    rng.shuffle(chosen)
    rng.shuffle(refused)
    return [*chosen[:count], *refused[: count // 2]]


def _endless(option: Option, word: str) -> bool:
    try:
        return option.key in ENDLESS and float(word) >= HEAVY
    except ValueError:
        return False


def _command(lab: Lab, option: Option, word: str) -> str:
    more = [text for choice in option.base for text in (choice, *MEANS.get(choice, ()))]
    more = [text.replace("IMAGES", str(lab.images)) for text in more]
    if option.program == "evaluate":
        run = lab.copy(lab.finished) if "export=onnx" in option.base else lab.finished
        text = lab.command(
            "evaluate.py",
            f"run={run}",
            "data.batch_size=8",
            "data.workers=0",
            "trainer.threads=1",
            "trainer.progress=false",
            *more,
            f"{option.key}={word}",
        )
    else:
        groups = {text.partition("=")[0] for text in option.base}
        tiny = [text for text in TINY if text.partition("=")[0] not in groups]
        text = lab.command(
            "train.py",
            *tiny,
            "optim.epochs=1",
            f"hydra.run.dir={lab.new('run')}",
            *more,
            f"{option.key}={word}",
        )
    return "ran to its end" if text else "said nothing"
