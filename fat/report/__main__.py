"""``python -m fat.report DIR…``: write the pages of runs and sweeps from their files."""

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
Write report.html for runs and sweeps from the files in their directories.

The page of a run is written into its directory. A sweep gets report.html and sweep.csv, and each of
its runs gets a page. With two or more directories there is also a page that compares all runs, and
a table of them as CSV beside it.
"""
EXAMPLES = """\
examples:
  {report} outputs/DAY/TIME-NETWORK
  {report} multirun/DAY/TIME
  {report} outputs/DAY/* --out comparisons/day.html
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the requested pages and print their paths.

    Args:
        arguments: Arguments of the command; those of this process when ``None``.

    Returns:
        Exit status: 0, or 2 after an error that the user can fix, which is printed.
    """
    parser = argparse.ArgumentParser(
        prog=command_line("report"),
        description=ABOUT,
        epilog=EXAMPLES.format(report=command_line("report")),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "directories", nargs="+", metavar="DIR", type=Path, help="directory of a run or a sweep"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help=f"page that compares several directories (default: {COMPARISON} in the current "
        "directory); its table is written beside it with the suffix .csv",
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
    """Write the pages of runs and sweeps, and a page that compares several of them.

    Args:
        directories: Directories of runs and sweeps.
        out: Page of the comparison; ``comparison.html`` in the current directory when ``None``.

    Returns:
        The files that were written.

    Raises:
        FatError: If a directory is neither a run nor a sweep, or a file cannot be written.
    """
    places = list({place.resolve(): place for place in directories}.values())
    if out is not None and len(places) < 2:
        raise FatError(
            f"--out={out} is the page of a comparison, but only one directory was given. Give "
            "more directories, or omit --out: then the page is written into the directory."
        )
    if out is not None and out.suffix != ".html":
        raise FatError(f"--out={out} must have the suffix .html, as in {COMPARISON}.")
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
            f"There is no directory {place}. By default, runs are under outputs/ and sweeps under "
            "multirun/."
        )
    below = find_runs(place)
    if not below:
        raise FatError(
            f"{place} is neither a run nor a sweep and contains none: a run has a config.yaml or a "
            "metrics.json, a sweep a multirun.yaml. A run prints its directory when it ends."
        )
    sweeps = (  # which stand for their runs
        next((up for up in run.parents if up != place and is_sweep(up)), run) for run in below
    )
    names = [str(name) for name in dict.fromkeys(sweeps)]
    more = " …" if len(names) > 3 else ""
    raise FatError(
        f"{place} is neither a run nor a sweep but contains {len(names)} of them. Give those to "
        f"show: {command_line('report', *names[:3])}{more}. Two or more are compared on one page."
    )


if __name__ == "__main__":
    sys.exit(main())
