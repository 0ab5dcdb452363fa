"""Options: frozen dataclasses whose fields say once what they mean and what they allow.

:func:`option` declares a field: its default, its meaning in one line, the values it allows, its key
in conf/ if that differs from the field's name, and its earlier names and values. Everything else
follows from the declaration: the check when an object is made (:class:`Options`) and when a config
is read (:func:`build`), both with the same message, ``--help``, the comments of conf/train.yaml and
docs/options.md (:func:`entries`).

pydantic would check the types too, but neither maps keys to fields of several sections nor says
what to type, so that it would come on top of most of this file.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from functools import cache, partial
from numbers import Real
from types import NoneType, UnionType
from typing import (
    TYPE_CHECKING,
    Any,
    ClassVar,
    Literal,
    Self,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from fat.utils.errors import FatError, nearest, unknown_name

__all__ = [
    "Entry",
    "Options",
    "Rule",
    "as_text",
    "build",
    "current_overrides",
    "entries",
    "nested",
    "option",
    "suggest_key",
    "to_config",
]

S = TypeVar("S", bound="Options")

_BOOLEANS = dict.fromkeys(("true", "yes", "y", "on", "1"), True) | dict.fromkeys(
    ("false", "no", "n", "off", "0"), False
)
"""Words for true and false on the command line, as OmegaConf reads them."""


@dataclass(frozen=True)
class Rule:
    """The declaration of an option, see :func:`option`."""

    meaning: str
    allowed: tuple[str, ...] | Callable[[], Sequence[str]] | None = None
    at_least: float | None = None
    at_most: float | None = None
    above: float | None = None
    below: float | None = None
    around: float | None = None
    infinite: bool = False
    example: Any = None
    key: str | None = None
    earlier: tuple[str, ...] = ()
    renamed: Mapping[str, str] = field(default_factory=dict)
    only: tuple[str, tuple[str, ...]] | None = None
    unless: tuple[str, tuple[str, ...]] | None = None

    def names(self, kind: Any) -> tuple[str, ...] | None:
        """Return the allowed names; ``None`` for an option that is no choice of names."""
        if get_origin(kind) is Literal:
            return get_args(kind)
        if self.allowed is None:
            return None
        return tuple(self.allowed() if callable(self.allowed) else self.allowed)


def option(default: Any = MISSING, meaning: str = "", **rule: Any) -> Any:
    """Declare a field of an :class:`Options` class.

    Args:
        default: Its default; left out for an option that has to be given.
        meaning: What it is, in one line.
        **rule: ``allowed``, names or a function that returns them (a ``Literal`` type says so by
            itself); ``at_least``, ``at_most``, ``above`` and ``below``, bounds of a number or of
            both numbers of a pair; ``around``, a number that a pair has to include; ``infinite``,
            whether infinity is allowed; ``example``, for messages, where the default is none;
            ``key``, the key in conf/ where it is not the field's name, from the root with a leading
            slash; ``earlier``, keys or field names of earlier versions; ``renamed``, earlier values
            and what they are called now; ``only`` and ``unless``, the key of another option and
            those of its values with which this one has an effect, or has none.
    """
    return field(default=default, metadata={"rule": Rule(meaning, **rule)})


def nested(spec: type[Options], meaning: str = "", **rule: Any) -> Any:
    """Declare a field that holds the options of another class.

    Args:
        spec: The class.
        meaning: What they are, in one line.
        **rule: As for :func:`option`; ``defaults`` are the defaults that differ from the class's.
    """
    defaults = rule.pop("defaults", {})
    metadata = {"rule": Rule(meaning, **rule), "defaults": defaults}
    return field(default_factory=partial(spec, **defaults), metadata=metadata)


class _EarlierNames(type):
    """Lets a class be called with the field names of earlier versions."""

    def __call__(cls, *args: Any, **values: Any) -> Any:
        for earlier, name in _earlier_fields(cls).items():
            if earlier in values:  # dataclasses.replace() gives the current value too
                values[name] = values.pop(earlier)
        return super().__call__(*args, **values)

    @property
    def __signature__(cls) -> inspect.Signature:
        """That of ``__init__``, which ``__call__`` would hide from help and editors."""
        own = inspect.signature(vars(cls)["__init__"])
        return own.replace(parameters=list(own.parameters.values())[1:], return_annotation=cls)


@dataclass(frozen=True)
class Options(metaclass=_EarlierNames):
    """Base of frozen dataclasses of options: checks every field when an object is made.

    Subclasses give the key of their section in conf/, which messages name:
    ``class TrainSpec(Options, prefix="optim")``.

    Raises:
        FatError: If a value is not allowed; the message says what is.
    """

    _prefix: ClassVar[str] = ""

    def __init_subclass__(cls, prefix: str = "") -> None:
        cls._prefix = prefix
        lines = [
            f"    {name}: {value.metadata['rule'].meaning}"
            for name, value in vars(cls).items()
            if "rule" in getattr(value, "metadata", ())
        ]
        if lines:
            cls.__doc__ = "\n".join([cls.__doc__ or "", "", "Attributes:", *lines])

    def __post_init__(self) -> None:
        types = _types(type(self))
        for own in fields(self):
            rule, value = own.metadata.get("rule"), getattr(self, own.name)
            if rule is None:
                continue
            key = _key(self._prefix, own.name, rule)
            if _is_options(types[own.name]):
                if not isinstance(value, types[own.name]):
                    raise FatError(f"{key} is {value!r}; it must be {types[own.name].__name__}().")
            else:
                value = _checked(key, value, types[own.name], rule, own.default)
                object.__setattr__(self, own.name, value)

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        """Unpickle or copy; the state may be that of an earlier version."""
        current = _earlier_fields(type(self))
        values = {current.get(name, name): value for name, value in state.items()}
        for own in fields(self):
            default = own.default if own.default_factory is MISSING else own.default_factory()
            value, rule = values.get(own.name, default), own.metadata.get("rule")
            if rule is not None and isinstance(value, str):
                value = rule.renamed.get(value, value)
            object.__setattr__(self, own.name, value)

    if not TYPE_CHECKING:  # type checkers should know today's names only

        def __getattr__(self, name: str) -> Any:
            current = _earlier_fields(type(self)).get(name)
            if current is None:
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            return getattr(self, current)

    def to_dict(self) -> dict[str, Any]:
        """Return plain containers that JSON can hold; :meth:`from_dict` takes them back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build an object from what :meth:`to_dict` of this or an earlier version returned.

        Options that an earlier version did not have get their defaults.

        Raises:
            FatError: If an option is unknown, or its value is not allowed.
        """
        if not isinstance(values, Mapping):
            raise FatError(f"{cls.__name__} is {values!r}; allowed are options by name.")
        types, current = _types(cls), _earlier_fields(cls)
        given = {current.get(name, name): value for name, value in values.items()}
        names = [own.name for own in fields(cls)]
        for name, value in given.items():
            if name not in names:
                raise unknown_name(f"option of {cls.__name__}", name, names)
            if _is_options(types[name]):
                given[name] = types[name].from_dict(value)
        return cls(**given)


@dataclass(frozen=True)
class Entry:
    """One option of a schema.

    Attributes:
        key: Its key in conf/ and on the command line, such as ``"quant.weight.bits"``.
        path: Names of the fields that lead to it, such as ``("quant", "weight_bits")``.
        kind: Its type.
        default: Its default; ``dataclasses.MISSING`` if it has to be given.
        rule: Its declaration.
        owner: The class that declares it.
        effect: Keys of other options and those of their values with which it has an effect.
    """

    key: str
    path: tuple[str, ...]
    kind: Any
    default: Any
    rule: Rule
    owner: type[Options]
    effect: tuple[tuple[str, tuple[str, ...] | None, tuple[str, ...]], ...]

    @property
    def meaning(self) -> str:
        """Its description in one line."""
        return self.rule.meaning

    @property
    def allowed(self) -> str:
        """The allowed values, such as ``"whole numbers from 2 to 8, or null"``."""
        return _allowed(self.kind, self.rule)

    @property
    def folder(self) -> str:
        """The folder of conf/ with a file per name, for names of a registry; empty for others."""
        return f"conf/{self.key.partition('.')[0]}/" if callable(self.rule.allowed) else ""

    @property
    def hint(self) -> str:
        """The allowed values as an addition to :attr:`meaning`; empty if that names them.

        Registries are not imported for it, since help and completion do without torch.
        """
        if self.folder:
            return f"names in {self.folder}"
        names = self.rule.names(self.kind)
        return "" if names and all(name in self.meaning for name in names) else self.allowed

    @property
    def default_text(self) -> str:
        """The default as it is typed; empty if the option has to be given."""
        return "" if self.default is MISSING else as_text(self.default)

    @property
    def type_name(self) -> str:
        """``"int"``, ``"float"``, ``"bool"``, ``"str"``, ``"list"`` or ``"any"``."""
        kind = _without_none(self.kind)
        if self.rule.names(kind) is not None:
            return "str"
        if get_origin(kind) is tuple:
            return "list"
        return getattr(kind, "__name__", "any").lower()

    @property
    def effect_text(self) -> str:
        """When it has an effect, such as ``"data=folder, imagenet"``; empty for always."""
        return "; ".join(
            f"{'' if only else 'not '}{_choice(key)}={', '.join(only or unless)}"
            for key, only, unless in self.effect
        )


@cache
def entries(schema: type[Options]) -> tuple[Entry, ...]:
    """Return all options of a schema in their order, those of nested classes included."""
    return tuple(_entries(schema, "", (), (), {}))


def _entries(
    schema: type[Options],
    prefix: str,
    path: tuple[str, ...],
    effect: tuple[Any, ...],
    defaults: Mapping[str, Any],
) -> Iterator[Entry]:
    types = _types(schema)
    for own in sorted(fields(schema), key=lambda own: bool(own.kw_only)):
        rule = own.metadata.get("rule")
        if rule is None:
            continue
        key, where = _key(prefix, own.name, rule), (*path, own.name)
        condition = effect
        if rule.only or rule.unless:
            other, names = rule.only or rule.unless
            chosen = (None, names) if rule.only is None else (names, ())
            condition = (*effect, (_key(prefix, other, Rule("")), *chosen))
        if _is_options(types[own.name]):
            yield from _entries(
                types[own.name], key, where, condition, own.metadata.get("defaults", {})
            )
        else:
            default = defaults.get(own.name, own.default)
            yield Entry(key, where, types[own.name], default, rule, schema, condition)


def build(
    schema: type[S], values: Mapping[str, Any], *, composed: bool = True, typed: Container[str] = ()
) -> S:
    """Build an object from nested values as conf/ has them.

    If an option is given by its key and by an earlier one, the latter is from a file written for an
    earlier version, which was composed after conf/: it counts unless the option was typed.

    Args:
        schema: Its class.
        values: Nested by the parts of the keys. Options that are left out get their defaults.
        composed: Whether the values were composed for this command: then an option that has no
            effect beside the others is refused. A stored config may hold such ones.
        typed: Keys of the options that were typed on the command line.

    Raises:
        FatError: If a key is unknown, or a value missing, not allowed, or without effect.
    """
    known = {entry.key: entry for entry in entries(schema)}
    current = _earlier_keys(schema)
    found: dict[str, Any] = {}
    for given, value in _flat(values, known):
        key = current.get(given, given)
        if key not in known:
            raise FatError(suggest_key(given, schema))
        entry = known[key]
        checked = _checked(key, value, entry.kind, entry.rule, entry.default, convert=True)
        if key not in found or key in typed:
            found[key] = checked
    for key, entry in known.items():
        if key not in found and entry.default is MISSING:
            raise FatError(f"{key} is needed: type {key}=VALUE.")
    if composed:
        _check_effects(known, found)
    return _assemble(schema, {known[key].path: value for key, value in found.items()}, (), {})


def to_config(options: Options) -> dict[str, Any]:
    """Return the values nested by the parts of their keys, in plain containers: :func:`build`'s."""
    config: dict[str, Any] = {}
    for entry in entries(type(options)):
        value: Any = options
        for name in entry.path:
            value = getattr(value, name)
        *groups, leaf = entry.key.split(".")
        place = config
        for group in groups:
            place = place.setdefault(group, {})
        place[leaf] = list(value) if isinstance(value, tuple) else value
    return config


def current_overrides(words: Sequence[str], schema: type[Options]) -> list[str]:
    """Return a command line with the earlier keys and values in it replaced by today's.

    Hydra refuses keys that conf/ does not have, so this comes before Hydra.

    Examples:
        >>> from fat.experiment.config import RunConfig
        >>> current_overrides(["-m", "quant.granularity=vector,scalar"], RunConfig)
        ['-m', 'quant.granularity=per_channel,per_tensor']
        >>> current_overrides(["+init.weight.candidates=50", "~optim.pointwise_lr"], RunConfig)
        ['++init.weight.candidates=50', '~optim.weight_scale_lr']
    """
    known = {entry.key: entry for entry in entries(schema)}
    current = _earlier_keys(schema)

    def today(word: str) -> str:
        given, equals, value = word.partition("=")
        bare = given.lstrip("+~")
        key = current.get(bare, bare)
        prefix = given[: len(given) - len(bare)]
        if key not in known or not equals:
            return f"{prefix}{key}" if bare in current else word
        for earlier, name in known[key].rule.renamed.items():
            value = _replace_name(value, earlier, name)
        # conf/ of earlier versions left some options out, which only a + could set.
        return f"{'++' if prefix == '+' else prefix}{key}={value}"

    return [today(word) for word in words]


def suggest_key(given: str, schema: type[Options]) -> str:
    """Return the message about a key that the schema does not have, with the nearest ones.

    Examples:
        >>> from fat.experiment.config import RunConfig
        >>> suggest_key("quant.granularty", RunConfig)[:66]
        "Unknown key 'quant.granularty'. Did you mean 'quant.granularity'? "
    """
    known = [entry.key for entry in entries(schema)]
    if any(key.startswith(f"{given}.") for key in known):
        return f"'{given}' holds several options: type {given}.KEY=VALUE for one of them."
    same_leaf = [key for key in known if key.rpartition(".")[2] == given.rpartition(".")[2]]
    close = same_leaf[:3] or nearest(given, known, 1)
    hint = " Did you mean " + " or ".join(repr(key) for key in close) + "?" if close else ""
    return f"Unknown key '{given}'.{hint} All options: --cfg job, or docs/options.md."


def as_text(value: Any) -> str:
    """Return a value as it is typed on the command line.

    Examples:
        >>> as_text((0.5, 1.0)), as_text(None), as_text(True)
        ('[0.5,1.0]', 'null', 'true')
    """
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | list):
        return "[" + ",".join(map(as_text, value)) + "]"
    return str(value)


def _check_effects(known: Mapping[str, Entry], found: Mapping[str, Any]) -> None:
    for key, value in found.items():
        if value == known[key].default:
            continue
        for other, only, unless in known[key].effect:
            choice = found.get(other, known[other].default)
            if choice in unless or (only is not None and choice not in only):
                fits = f"; it is for {_choice(other)}={', '.join(only)}" if only else ""
                raise FatError(
                    f"{key}={as_text(value)} has no effect with {_choice(other)}={choice}{fits}. "
                    "Leave it out."
                )


def _choice(key: str) -> str:
    """Return what a user types for a key: ``data`` for ``data.source``, whose file chooses it."""
    group, _, leaf = key.partition(".")
    return group if leaf in ("source", "target", "name") else key


def _flat(values: Mapping[str, Any], known: Mapping[str, Entry], prefix: str = "") -> list[Any]:
    """Return (key, value) of all values, earlier keys first."""
    pairs: list[Any] = []
    for name, value in values.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and key not in known:
            pairs += _flat(value, known, f"{key}.")
        else:
            pairs.append((key, value))
    return sorted(pairs, key=lambda pair: pair[0] in known)


def _assemble(
    schema: type[S],
    found: Mapping[tuple[str, ...], Any],
    path: tuple[str, ...],
    defaults: Mapping[str, Any],
) -> S:
    types, arguments = _types(schema), dict(defaults)
    for own in fields(schema):
        where = (*path, own.name)
        if _is_options(types[own.name]):
            nested_defaults = own.metadata.get("defaults", {})
            arguments[own.name] = _assemble(types[own.name], found, where, nested_defaults)
        elif where in found:
            arguments[own.name] = found[where]
    return schema(**arguments)


def _checked(
    key: str, given: Any, kind: Any, rule: Rule, default: Any, *, convert: bool = False
) -> Any:
    """Return a value, pairs and lists as tuples; raise a FatError if it is not allowed."""
    optional, kind = NoneType in get_args(kind), _without_none(kind)
    if (given is None and optional) or kind is Any:
        return given
    value = _converted(given, kind, rule) if convert else given
    if kind is bool and not isinstance(value, str) and value in (0, 1):  # also NumPy's
        value = bool(value)
    value = rule.renamed.get(value, value) if isinstance(value, str) else value
    names = rule.names(kind)
    if names is not None:
        if value not in names:
            raise unknown_name(key, value, names, earlier=rule.renamed)
        return value
    if get_origin(kind) is tuple and isinstance(value, list):
        value = tuple(value)
    if not _fits(value, kind, rule):
        example = default if rule.example is None else rule.example
        hint = "" if example in (None, MISSING) else f", as in {key}={as_text(example)}"
        given = list(value) if isinstance(value, tuple) else given
        allowed = _allowed(kind | None if optional else kind, rule)
        raise FatError(f"{key} is {given!r}; allowed are {allowed}{hint}.")
    return value


def _fits(value: Any, kind: Any, rule: Rule) -> bool:
    if kind is bool or kind is str:
        return isinstance(value, kind)
    if kind is int:
        return isinstance(value, int) and _is_number(value, rule)
    if kind is float:
        return _is_number(value, rule)
    if get_args(kind)[-1] is Ellipsis:
        return isinstance(value, tuple) and all(isinstance(x, get_args(kind)[0]) for x in value)
    if not (isinstance(value, tuple) and len(value) == 2):
        return False
    low, high = value
    ordered = _is_number(low, rule) and _is_number(high, rule) and low <= high
    return bool(ordered and (rule.around is None or low <= rule.around <= high))


def _is_number(given: Any, rule: Rule) -> bool:
    if isinstance(given, bool) or not isinstance(given, Real):
        return False
    value: Any = given
    exact = isinstance(given, int)  # may be too large for a float
    if not exact and (math.isnan(given) or (math.isinf(given) and not rule.infinite)):
        return False
    return bool(
        (rule.at_least is None or value >= rule.at_least)
        and (rule.at_most is None or value <= rule.at_most)
        and (rule.above is None or value > rule.above)
        and (rule.below is None or value < rule.below)
    )


def _allowed(kind: Any, rule: Rule) -> str:
    null = ", or null" if NoneType in get_args(kind) else ""
    kind = _without_none(kind)
    names = rule.names(kind)
    if names is not None:
        return ", ".join(names) + null
    if kind is bool:
        return "true and false" + null
    if kind is str:
        return "text" + null
    if kind is Any:
        return "any value"
    if get_args(kind) and get_args(kind)[-1] is Ellipsis:
        return "lists of text" + null
    bounds = _bounds(rule)
    if kind is int:
        return f"whole numbers{bounds}{null}"
    if kind is float:
        return f"numbers{bounds}{', or inf' if rule.infinite else ''}{null}"
    start = "" if rule.around is None else f", with {rule.around:g} (where training starts) between"
    return f"two numbers{bounds}, the lower first{start}{null}"


def _bounds(rule: Rule) -> str:
    """Return the bounds of a number, such as ``" from 2 to 8"`` or ``" above 0 and below 1"``."""
    if rule.at_least is not None and rule.at_most is not None:
        return f" from {rule.at_least:.15g} to {rule.at_most:.15g}"
    words = {"from": rule.at_least, "above": rule.above, "up to": rule.at_most, "below": rule.below}
    parts = [f"{word} {value:.15g}" for word, value in words.items() if value is not None]
    return " " + " and ".join(parts) if parts else ""


def _converted(value: Any, kind: Any, rule: Rule) -> Any:
    """Return a value of YAML or the command line in its type, where it says the same as text."""
    if isinstance(value, list | tuple) and get_origin(kind) is tuple:
        return tuple(_converted(item, get_args(kind)[0], Rule("")) for item in value)
    if kind is bool and isinstance(value, int | str):
        return _BOOLEANS.get(str(value).lower(), value)
    if (kind is str or rule.names(kind)) and isinstance(value, int | float):
        return str(value)
    if (kind is int and isinstance(value, str)) or (
        kind is float and isinstance(value, int | str) and not isinstance(value, bool)
    ):
        try:
            return kind(value)
        except (ValueError, OverflowError):
            return value
    return value


def _replace_name(text: str, earlier: str, name: str) -> str:
    """Replace a whole name inside the value of an override, such as one choice of a sweep."""
    return re.sub(rf"(?<![\w.]){re.escape(earlier)}(?![\w.])", name, text)


def _key(prefix: str, name: str, rule: Rule) -> str:
    key = rule.key or name
    return key[1:] if key.startswith("/") else f"{prefix}.{key}".lstrip(".")


@cache
def _types(schema: type) -> dict[str, Any]:
    return get_type_hints(schema)


@cache
def _earlier_fields(schema: type) -> dict[str, str]:
    return {
        earlier: own.name
        for own in fields(schema)
        for earlier in getattr(own.metadata.get("rule"), "earlier", ())
    }


@cache
def _earlier_keys(schema: type[Options]) -> dict[str, str]:
    return {
        f"{entry.key.rpartition('.')[0]}.{earlier}".lstrip("."): entry.key
        for entry in entries(schema)
        for earlier in entry.rule.earlier
    }


def _is_options(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Options)


def _without_none(kind: Any) -> Any:
    if get_origin(kind) not in (Union, UnionType):
        return kind
    return next(part for part in get_args(kind) if part is not NoneType)
