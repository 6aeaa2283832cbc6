"""``uhml check-data``: what is wrong with a data set, by name, before a run stumbles over it."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from uhml.commands.options import overridden
from uhml.config import Config, DataConfig, check_batch_fits, load_config, quoted
from uhml.console import cell, console
from uhml.data.check import Report, as_json, check, relative
from uhml.data.datasets import DATASETS
from uhml.environment import place
from uhml.errors import UserError, did_you_mean

NAMED = 10
"""Cases of a finding that the terminal names; --json names all."""

COUNTED_ONLY = ("grey", "cmyk", "large", "tiny")
"""Findings that are no fault, and may well be of every picture."""

EXAMPLES = """\
  uhml check-data configs/folder.yaml data.root=my/pictures
  uhml check-data folder --root my/pictures --json
  uhml check-data cub200 --root data
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``uhml check-data``."""
    parser.epilog = (
        "exit status: 0 if uhml train would take the pictures, whatever is odd about them; 2 if not\n\n"
        "examples:\n" + EXAMPLES
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "source", metavar="CONFIG_OR_DATASET", help=f"a YAML file as for uhml train, or one of {', '.join(DATASETS)}"
    )
    parser.add_argument("overrides", metavar="key=value", nargs="*", default=[], help="overrides of single keys")
    parser.add_argument("--root", metavar="DIR", help="the same as data.root=DIR")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def run(args: argparse.Namespace) -> None:
    """Check the data set of ``args.source`` and print what is odd.

    Raises:
        UserError: training would refuse it.
    """
    config = _config(args.source, args.root, args.overrides)
    report = check(config.data)
    if args.json:
        print(json.dumps(as_json(report)))
    else:
        _print(report)
    refuse(report, config.data)
    if args.source not in DATASETS:
        # A data set alone says nothing of batches.
        check_batch_fits(report.num_to_train, config, place().world_size)


def refuse(report: Report, config: DataConfig) -> None:
    """Refuse a data set that training would refuse.

    Raises:
        UserError: with what is wrong, and what to do.
    """
    refused = {finding.name: f"{len(finding.items):,} {finding.what}" for finding in report.findings if finding.refused}
    if refused:
        can_skip = refused.keys() == {"unreadable"} and not config.skip_corrupt
        cure = ", or add data.skip_corrupt=true to go on without them" if can_skip else ""
        raise UserError(
            f"Training would refuse {config.dataset} in {report.base}: {', '.join(refused.values())}. Mend it{cure}."
        )


def _config(source: str, root: str | None, overrides: Sequence[str]) -> Config:
    overrides = [*([f"data.root={quoted(root)}"] if root else []), *overrides]
    if source in DATASETS:
        for override in overrides:
            if not override.startswith("data."):
                raise UserError(f"{override} says nothing of the pictures of {source}: only data.* does.")
        return overridden(Config(), [f"data.dataset={source}", *overrides])
    if not Path(source).exists() and not Path(source).suffix:
        raise UserError(
            f"{source} is neither a config file nor one of {', '.join(DATASETS)}.{did_you_mean(source, DATASETS)}"
        )
    return load_config(source, overrides)


def _print(report: Report) -> None:
    said, found = console(), as_json(report)
    table = Table(title=cell(report.base))
    table.add_column("")
    table.add_column("how many", justify="right")
    for part, count in found["pictures"].items():
        num_classes = found["classes"].get(part, 0)
        classes = f" of {num_classes:,} {'class' if num_classes == 1 else 'classes'}" if num_classes else ""
        table.add_row(f"{part} pictures{classes}", f"{count:,}")
    table.add_section()
    for finding in report.findings:
        style = "bold red" if finding.refused else "" if finding.items else "dim"
        table.add_row(finding.what, f"{len(finding.items):,}", style=style)
    said.print(table)
    for finding in report.findings:
        if not finding.items or finding.name in COUNTED_ONLY:
            continue
        said.print(f"\n{finding.what}:", style="bold")
        for item in finding.items[:NAMED]:
            between = ": " if finding.name == "unreadable" else " = "
            said.print("  " + between.join(relative(item, report.base)), markup=False, highlight=False, soft_wrap=True)
        if len(finding.items) > NAMED:
            said.print(f"  and {len(finding.items) - NAMED:,} more; --json names all")
