"""``uhml compare``: runs side by side, in a table and a plot."""

import argparse
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from rich.table import Table

from uhml.console import cell, console
from uhml.errors import UserError
from uhml.files import PLOT_SUFFIXES, check_out
from uhml.reporting.runs import (
    SEED,
    RunRecord,
    Spread,
    differing_settings,
    each_run,
    groups_of_seeds,
    read_run,
    spread,
)

logger = logging.getLogger(__name__)

EXAMPLES = """\
  uhml compare runs/a runs/b --out compare.png
  uhml compare runs/sweep/* --json
"""

# Of the loss: it is shown as the mean of so many lines of metrics.jsonl at most, or a tenth of the run.
SMOOTHED = 25


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``uhml compare``."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "examples:\n" + EXAMPLES
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a run, finished or not")
    parser.add_argument("--out", type=Path, metavar="PLOT.png", help="where to draw Recall@1 and loss over the steps")
    parser.add_argument("--json", action="store_true", help="print an object for scripts instead of a table")
    parser.add_argument("--overwrite", action="store_true", help="replace PLOT.png if it is there already")


def run(args: argparse.Namespace) -> None:
    """Show the runs with the settings in which they differ, and the mean of those that differ only in their seed.

    Raises:
        UserError: no folder holds a run, there is no such folder, or the plot cannot be written.
    """
    if args.out is not None:
        check_out(args.out, "--out", PLOT_SUFFIXES, args.overwrite)
    folders = [Path(os.path.normpath(folder)) for folder in args.runs]
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UserError("A run is named twice: name each once.")
    runs = each_run(folders, read_run)
    if args.json:
        print(json.dumps(_plain(runs), indent=2))
    else:
        console().print(table(runs))
    if args.out is not None:
        draw(args.out, runs)
        logger.info("The plot is in %s.", args.out)


def table(runs: Sequence[RunRecord]) -> Table:
    """Return a row for each run, and one for each group of several seeds."""
    keys, recall = differing_settings(runs), _first_recall(runs)
    scores = [recall, "map_at_r", "nmi"] if recall else []
    shown = Table(title="Unseen classes, per cent" if recall else None)
    shown.add_column("run", overflow="fold")
    if keys:
        shown.add_column("settings that differ", overflow="fold")
    if any(run.state != "finished" for run in runs):
        shown.add_column("state", overflow="fold")
    for heading in ("steps", "seconds", *([f"{title(recall)} frozen"] if recall else []), *map(title, scores)):
        shown.add_column(heading, justify="right", overflow="fold")
    for run, name in zip(runs, _names(runs), strict=True):
        settings = [_settings(run, keys)] if keys else []
        state = [run.state] if any(other.state != "finished" for other in runs) else []
        planned = run.settings.get("train.num_steps")
        steps = f"{run.step:,}" if run.state == "finished" else f"{run.step:,} / {planned:,}"
        seconds = "" if run.seconds is None else f"{run.seconds:,.0f}"
        figures = [run.frozen.get(recall), *(run.trained.get(score) for score in scores)] if recall else []
        shown.add_row(*map(cell, (name, *settings, *state)), steps, seconds, *map(_per_cent, figures))
    shown.add_section()
    groups = [[run for run in group if run.state == "finished"] for group in groups_of_seeds(runs)]
    groups = [group for group in groups if len(group) > 1 and scores]
    others = [key for key in keys if key != SEED]
    of_groups = [_settings(group[0], others) for group in groups]
    for group, said, again in zip(groups, of_groups, _beginnings(of_groups, runs, groups), strict=True):
        settings = [cell(said)] if keys else []
        means = [with_deviation(spread(group, score)) for score in scores]
        shown.caption = "± is the standard deviation over seeds"
        empty = [""] * (len(shown.columns) - 1 - len(settings) - len(means))
        shown.add_row(f"mean of {len(group)}{cell(again)}", *settings, *empty, *means, style="bold")
    return shown


def draw(path: Path, runs: Sequence[RunRecord]) -> None:
    """Plot the first Recall@K and the loss over the steps; seeds of one setting share a colour."""
    figure = Figure(figsize=(12, 5.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    groups = groups_of_seeds(runs)
    colours = matplotlib.colormaps["tab10" if len(groups) <= 10 else "tab20"]
    recall = _first_recall(runs)
    for number, (group, label) in enumerate(zip(groups, _labels(runs, groups), strict=True)):
        colour = colours(number % colours.N)
        for run in group:
            left.plot(run.recall.steps, 100 * np.array(run.recall.values), "o-", color=colour, markersize=4)
            if recall in run.frozen:
                left.axhline(100 * run.frozen[recall], color=colour, linestyle=":", linewidth=1)
            if run.loss.values:
                right.plot(run.loss.steps, run.loss.values, color=colour, alpha=0.2, linewidth=1)
                right.plot(*_smooth(run), color=colour)
        # What begins with a line below, matplotlib leaves out of its legends.
        left.plot([], [], "o-", color=colour, label=f" {label}" if label.startswith("_") else label)
    left.plot([], [], ":", color="black", linewidth=1, label="frozen backbone")
    left.set(title=f"{title(recall) if recall else 'Recall'} of unseen classes, per cent", xlabel="step")
    right.set(title="Loss", xlabel="step")
    if not recall:
        left.text(0.5, 0.5, "no classes are known", transform=left.transAxes, ha="center", color="#656d76")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#d1d9e0", linewidth=0.5)
        axes.set_axisbelow(True)
        axes.xaxis.get_major_locator().set_params(integer=True)
    legend = figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    for text in legend.get_texts():
        text.set_parse_math(False)
    figure.savefig(path, dpi=120)


def _smooth(run: RunRecord) -> tuple[Any, Any]:
    """Return the mean over a window that ends at each step."""
    width = max(1, min(SMOOTHED, len(run.loss.values) // 10))
    sums = np.cumsum([0.0, *run.loss.values])
    return run.loss.steps[width - 1 :], (sums[width:] - sums[:-width]) / width


def _names(runs: Sequence[RunRecord]) -> list[str]:
    """Return the names of the runs' folders, with the folders above them where they are not different without."""
    short = [Path(run.name).name for run in runs]
    return short if len(set(short)) == len(short) else [run.name for run in runs]


def _labels(runs: Sequence[RunRecord], groups: Sequence[Sequence[RunRecord]]) -> list[str]:
    """Return what to call each group: what sets it apart, or the name of its only run."""
    keys = [key for key in differing_settings(runs) if key != SEED]
    name_of = dict(zip([run.name for run in runs], _names(runs), strict=True))
    labels = []
    for group in groups:
        said = _settings(group[0], keys).replace("\n", ", ")
        several = f"{len(group)} seeds" if len(group) > 1 else ""
        name = name_of[group[0].name] if not several or len(said) > 60 else said
        labels.append(", ".join(filter(None, (name, several))))
    return [label + again for label, again in zip(labels, _beginnings(labels, runs, groups), strict=True)]


def _beginnings(said: Sequence[str], runs: Sequence[RunRecord], groups: Sequence[Sequence[RunRecord]]) -> list[str]:
    """Return what tells groups apart of which the same is said, as when a seed comes twice: the first run of each."""
    name_of = dict(zip([run.name for run in runs], _names(runs), strict=True))
    return [
        f", from {name_of[group[0].name]}" if said.count(text) > 1 else ""
        for text, group in zip(said, groups, strict=True)
    ]


def _plain(runs: Sequence[RunRecord]) -> dict[str, Any]:
    keys = differing_settings(runs)
    return {
        "runs": [
            {
                "run": run.name,
                "state": run.state,
                "step": run.step,
                "seconds": run.seconds,
                "settings": {key: run.settings.get(key) for key in keys},
                "frozen": run.frozen,
                "trained": run.trained,
            }
            for run in runs
        ],
        "groups": [
            {
                "runs": [run.name for run in group],
                "settings": {key: group[0].settings.get(key) for key in keys if key != SEED},
                "trained": {
                    score: found._asdict() for score in group[0].trained if (found := spread(group, score)) is not None
                },
            }
            for group in groups_of_seeds(runs)
        ],
    }


def _first_recall(runs: Sequence[RunRecord]) -> str:
    """Return the name of the first Recall@K, "recall_at_1"; an empty text where nothing is scored."""
    return next((next(iter(run.trained)) for run in runs if run.trained), "")


def title(score: str) -> str:
    """Return what to call a score of ``metrics.jsonl`` in a heading: "R@1"."""
    return {"map_at_r": "MAP@R", "nmi": "NMI"}.get(score) or score.replace("recall_at_", "R@")


def _settings(run: RunRecord, keys: Sequence[str]) -> str:
    return "\n".join(f"{key}={_said(run.settings.get(key))}" for key in keys)


def _said(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _per_cent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"


def with_deviation(found: Spread | None) -> str:
    """Return a spread in per cent, "70.0 ± 1.2"; an empty text for None."""
    return "" if found is None else found.text()
