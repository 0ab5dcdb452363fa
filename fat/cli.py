"""What both entry points share: errors without a traceback, and run directories."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException, HydraException
from hydra.types import RunMode
from omegaconf.errors import OmegaConfBaseException

from fat.config import suggest_key
from fat.errors import FatError, nearest

__all__ = ["explain", "guarded", "run_directory", "sweep_group"]

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells expect it."""


def guarded(main: Callable[[], Any], schema: type) -> None:
    """Call a Hydra main; print what the user can mend as one text, without a traceback.

    Args:
        main: The function under ``hydra.main``.
        schema: The dataclass of its config, for suggestions.
    """
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # exceptions come here instead of being printed
    try:
        main()
    except FatError as error:
        print(f"\nError: {error}", file=sys.stderr)
        sys.exit(2)
    except (HydraException, ConfigCompositionException, OmegaConfBaseException) as error:
        print(f"\nError: {explain(error, schema)}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.filename is None:
            raise
        print(
            f"\nError: {error.filename}: {error.strerror}. Choose another place.", file=sys.stderr
        )
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        sys.exit(INTERRUPTED)


def explain(error: Exception, schema: type) -> str:
    """Hydra's message in short, with the nearest names where one was mistyped."""
    chain: list[BaseException] = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    text = "\n".join(dict.fromkeys(str(link).strip() for link in chain))
    unknown = re.search(r"Could not (?:override|append) '([^']+)'", text)
    if unknown:
        return suggest_key(unknown[1].split("@")[0], schema)
    missing = re.search(r"Could not (?:find|load) '([^']+)'", text)
    options = re.search(r"Available options in '[^']*':\n((?:\s+\S+\n?)+)", text)
    if missing and options:
        group, _, given = missing[1].rpartition("/")
        names = options[1].split()
        close = nearest(given, names)
        hint = f" Did you mean {' or '.join(repr(name) for name in close)}?" if close else ""
        more = ""
        if group == "model":
            more = " Any other timm network: model.name=NAME."
        return f"Unknown choice {group}={given}.{hint} Allowed: {', '.join(names)}.{more}"
    if "Missing mandatory value" in text:
        key = re.search(r"Missing mandatory value: (\S+)", text)
        return f"{key[1] if key else 'A value'} is needed: type {key[1] if key else 'KEY'}=VALUE."
    return text.splitlines()[0]


def run_directory() -> Path:
    """Hydra's output directory of this job."""
    return Path(HydraConfig.get().runtime.output_dir)


def sweep_group() -> str | None:
    """A name that all jobs of a multirun share, ``None`` for a single run."""
    hydra = HydraConfig.get()
    return Path(hydra.sweep.dir).as_posix() if hydra.mode == RunMode.MULTIRUN else None
