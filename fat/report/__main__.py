"""``python -m fat.report DIR…``: write the pages of runs and sweeps again, from their files."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fat.report.records import Run, find_runs, is_run, is_sweep, read_run, read_sweep
from fat.report.run_page import write_run
from fat.report.sweep_page import write_comparison, write_sweep
from fat.utils.commands import command_line
from fat.utils.errors import FatError, first_line

__all__ = ["main"]

COMPARISON = "comparison.html"
ABOUT = """\
Write report.html of runs and sweeps again, from the files they left.

A run's page goes into its own directory. A sweep gets report.html and sweep.csv, and each of its
runs gets its page. With two or more directories there is also a page that compares all of their
runs, and its table as CSV beside it.
"""
EXAMPLES = """\
examples:
  {report} outputs/DAY/TIME-NETWORK
  {report} multirun/DAY/TIME
  {report} outputs/DAY/* --out comparisons/day.html
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the pages that the arguments ask for and print where they are.

    Args:
        arguments: Words of the command line; those of this process when ``None``.

    Returns:
        Exit status: 0, or 2 after an error that the user can mend, which is printed.
    """
    parser = argparse.ArgumentParser(
        prog=command_line("report"),
        description=ABOUT,
        epilog=EXAMPLES.format(report=command_line("report")),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("directories", nargs="+", metavar="DIR", type=Path, help="a run or a sweep")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help=f"where the comparison of several directories goes (default: {COMPARISON} in the "
        "current directory); its table lies beside it, with the ending .csv",
    )
    asked = parser.parse_args(arguments)
    try:
        for page in report([place.expanduser() for place in asked.directories], asked.out):
            print(page)
    except FatError as error:
        print(f"\nError: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a name that is too long, a folder that may not be read
        print(f"\nError: {first_line(error)}. Give the directory of a run.", file=sys.stderr)
        return 2
    return 0


def report(directories: Sequence[Path], out: Path | None = None) -> list[Path]:
    """Write the pages of runs and sweeps, and of several one that compares them.

    Args:
        directories: Of runs and sweeps.
        out: Where the comparison goes; ``comparison.html`` in the current directory when ``None``.

    Returns:
        The files that were written.

    Raises:
        FatError: If a directory is neither a run's nor a sweep's, or a file cannot be written.
    """
    places = list({place.resolve(): place for place in directories}.values())
    if out is not None and len(places) < 2:
        raise FatError(
            f"--out={out} is where a comparison goes, and one directory is nothing to compare. "
            "Leave it out: the page goes into the directory; or give more directories."
        )
    if out is not None and out.suffix != ".html":
        raise FatError(f"--out={out} is a page: give it the ending .html, as in {COMPARISON}.")
    for place in places:
        _check(place)  # all of them before anything is written
    written: list[Path] = []
    runs: list[Run] = []
    for place in places:
        if not is_sweep(place):
            written.append(write_run(place))
            runs.append(read_run(place))
            continue
        inside = read_sweep(place).runs
        written += [write_run(run.directory) for run in inside if is_run(run.directory)]
        written += write_sweep(place)  # after its runs' pages, which it links to
        runs += inside
    if len(places) > 1:
        written += write_comparison(out if out is not None else Path(COMPARISON), runs)
    return written


def _check(place: Path) -> None:
    if is_sweep(place) or is_run(place):
        return
    if not place.is_dir():
        raise FatError(
            f"There is no directory {place}. Runs lie under outputs/, sweeps under multirun/, "
            "unless another place was asked for."
        )
    below = find_runs(place)
    if not below:
        raise FatError(
            f"{place} is no run and no sweep, and holds none: a run has a config.yaml or a "
            "metrics.json, a sweep a multirun.yaml. train.py prints its directory at the end."
        )
    # Runs of a sweep are named by their sweep.
    names = dict.fromkeys(
        next((up for up in found.parents if up != place and is_sweep(up)), found) for found in below
    )
    shown = command_line("report", *map(str, list(names)[:3]))
    more = " …" if len(names) > 3 else ""
    raise FatError(
        f"{place} is no run and no sweep, but holds {len(names)} of them. Name those you mean: "
        f"{shown}{more}. Two or more are compared on one page."
    )


if __name__ == "__main__":
    sys.exit(main())
