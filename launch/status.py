"""``uhml status``: how runs stand, as a table or as JSON; of a sweep, with its results side by side."""

import argparse
import dataclasses
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from rich.table import Table

from launch.overview import View, look, readable
from launch.record import FOLDER, SweepRecord, read_record
from uhml.console import cell, console
from uhml.reporting.runs import SEED, NoRun, Spread, each_run, no_such_run
from uhml.run.status import FILE as STATUS

EXAMPLES = """\
examples:
  uhml status runs/mine
  uhml status runs/* --json
"""

STYLES = {"finished": "green", "running": "bold", "failed": "red", "lost": "red", "cancelled": "yellow"}
EMBEDDINGS = ("frozen", "untrained", "trained")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``uhml status``."""
    parser.epilog = EXAMPLES
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a run or of a sweep")
    parser.add_argument("--json", action="store_true", help="print a list of objects for scripts")


def run(args: argparse.Namespace) -> None:
    """Show the runs, and the results of sweeps.

    Raises:
        UserError: no folder holds a run, there is no such folder, or SLURM does not answer.
    """
    named = each_run(args.runs, _views)
    views = [view for _, found in named for view in found]
    if args.json:
        print(json.dumps([dataclasses.asdict(view) for view in views], indent=2))
        return
    wide = console(160)
    wide.print(_table(views))
    for folder, found in named:
        sweep = read_record(folder, SweepRecord)
        if sweep is not None and any(view.recall for view in found):
            wide.print(_results(folder, sweep, found))


def _views(folder: Path) -> tuple[Path, list[View]]:
    """Return the folder, and how the run in it stands, or the runs of a sweep."""
    return folder, [existing_run(own) for own in members(folder)]


def members(folder: Path) -> list[Path]:
    """Return the folders of the runs of a sweep, or the folder itself where it is no sweep."""
    sweep = read_record(folder, SweepRecord)
    return [folder] if sweep is None else [folder / name for name in sweep.runs]


def existing_run(folder: Path) -> View:
    """Return how the run in a folder stands.

    Raises:
        UserError: there is none, or SLURM does not answer.
    """
    view = look(folder)
    if view is not None:
        return view
    if folder.exists():
        inside = any(next(folder.glob(f"*/{file}"), None) for file in (STATUS, f"{FOLDER}/job.json"))
        hint = f" Those in it are shown by uhml status {shlex.quote(str(folder))}/*" if inside else ""
        raise NoRun(f"{folder} holds no run.{hint}")
    raise no_such_run(folder)


def _table(views: Sequence[View]) -> Table:
    table = Table()
    for heading in ("run", "state", "step", "left", "restarts", "job", "note"):
        justify: Literal["left", "right"] = "right" if heading in ("step", "left", "restarts") else "left"
        # Folded where a terminal is narrow: half a number would be another.
        table.add_column(heading, justify=justify, overflow="fold")
    for view in views:
        doing = f"{view.state}, {view.phase}" if view.state == "running" and view.phase != "train" else view.state
        table.add_row(
            cell(Path(view.run).name or view.run),
            f"[{STYLES.get(view.state, 'default')}]{doing}[/]",
            "" if view.step is None else f"{view.step:,} / {view.num_steps:,}",
            "" if view.seconds_left is None else readable(view.seconds_left),
            str(view.restarts),
            cell(view.job_id or ""),
            cell(view.note),
        )
    return table


def _results(folder: Path, sweep: SweepRecord, views: Sequence[View]) -> Table:
    """Return the scores of the finished runs; where several seeds have finished, also their mean and spread."""
    keys = list(sweep.values[0])
    k = next(view.recall_at for view in views if view.recall)
    table = Table(
        title=f"{cell(folder.name)}: R@{k} of unseen classes, per cent", caption="± is the standard deviation"
    )
    for key in keys:
        table.add_column(cell(key), overflow="fold")
    for name in EMBEDDINGS:
        table.add_column(name, justify="right", style="bold" if name == "trained" else None, overflow="fold")
    groups: dict[tuple[str, ...], list[dict[str, float]]] = {}
    for values, view in zip(sweep.values, views, strict=True):
        row = [100 * view.recall[name] for name in EMBEDDINGS] if view.recall else None
        table.add_row(
            *map(cell, values.values()), *([f"{score:.1f}" for score in row] if row else [view.state, "", ""])
        )
        if view.recall:
            groups.setdefault(tuple(value for key, value in values.items() if key != SEED), []).append(view.recall)
    if SEED in keys and any(len(group) > 1 for group in groups.values()):
        table.add_section()
        for others, group in groups.items():
            named = iter(others)
            shown = [f"{len(group)} seeds" if key == SEED else next(named) for key in keys]
            table.add_row(*map(cell, shown), *[Spread.of([run[name] for run in group]).text() for name in EMBEDDINGS])
    return table
