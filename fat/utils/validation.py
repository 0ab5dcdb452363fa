"""Checks of option values, with messages that say what is allowed."""

from __future__ import annotations

from fat.utils.errors import FatError, unknown_name

__all__ = []


def _one_of(what: str, given: object, allowed: tuple[str, ...]) -> None:
    if given not in allowed:
        raise unknown_name(what, given, allowed)


def _whole(what: str, given: object, least: int) -> None:
    if not isinstance(given, int) or given < least:
        raise FatError(f"{what} is {given}; it must be a whole number, at least {least}.")


def _range(what: str, given: tuple[float, float], *, inside: float) -> None:
    if len(given) != 2 or not given[0] <= inside <= given[1]:
        raise FatError(
            f"{what} is {list(given)}; it must be two numbers, the lower first, with {inside:g} "
            f"(where training starts) between them, as in {what}=[0.5,1.0]."
        )
