"""``uhml reproduce``: the tables of the official data sets, from whichever of them are there, in one command."""

import argparse
import dataclasses
import logging
import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.markdown import Markdown

from uhml import interruption
from uhml.cli import count
from uhml.commands.check_data import refuse
from uhml.commands.compare import title, with_deviation
from uhml.config import Config, check_batch_fits, load_config, quoted, refuse_changes
from uhml.console import console
from uhml.data.check import check
from uhml.data.datasets import load_splits
from uhml.data.official import OFFICIAL
from uhml.data.reading import NoDataSet, missing_noted
from uhml.environment import place
from uhml.errors import RunsFailed, UserError, did_you_mean
from uhml.files import expanded, write_whole
from uhml.interruption import Preempted
from uhml.logs import last_error
from uhml.progress import progress
from uhml.reporting.runs import Embedding, RunRecord, read_run, spread
from uhml.run.status import read_status

logger = logging.getLogger(__name__)

EXAMPLES = """\
  uhml reproduce data --out results --dry-run
  uhml reproduce data --out results --nproc-per-node 8
  uhml reproduce data/CUB_200_2011 --out results/short --settings ours,flat train.num_steps=500

The same command again goes on where it stopped. Run it from the top of the repository, where configs/ is.
"""

TABLE = "table.md"
SECONDS_BETWEEN_LOOKS = 0.5
TORCHRUN = ["torchrun", "--standalone", "--signals-to-handle=SIGTERM,SIGINT,SIGUSR2"]
SHUTDOWN_TIMEOUT = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "300"}
"""The seconds that torchrun gives its processes to save. Torch 2.11, which has no option for that either, gives 30."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """A way to train: what to call it, where its config is for a data set, and what it changes there."""

    name: str
    config: str
    changes: tuple[str, ...] = ()


SETTINGS = {
    "ours": Setting("ours", "configs/{}.yaml"),
    "flat": Setting("ours, Euclidean: c = 0", "configs/{}.yaml", ("model.curvature=0",)),
    "paper": Setting("the article's setting", "configs/paper/{}.yaml"),
}

OURS_TO_SAY = {"data.root": "DATA", "data.dataset": "DATA", "train.seed": "--seeds"}
"""Keys that are no overrides here, and what says them instead."""


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of the table: a data set, a setting and a seed, with the command line that makes it."""

    dataset: str
    setting: str
    seed: str
    folder: Path
    overrides: tuple[str, ...]
    num_processes: int | None

    def __str__(self) -> str:
        """Return what to call it."""
        return f"{self.dataset}, {self.setting}, seed {self.seed}"

    @property
    def typed(self) -> list[str]:
        """The command line, as a user would type it."""
        launcher = ["python"] if self.num_processes is None else [*TORCHRUN, f"--nproc-per-node={self.num_processes}"]
        config = SETTINGS[self.setting].config.format(self.dataset)
        return [*launcher, "-m", "uhml", "train", config, *self.overrides, "--run-dir", str(self.folder)]

    @property
    def started(self) -> list[str]:
        """The same by this very Python."""
        launcher = [] if self.num_processes is None else ["-m", "torch.distributed.run"]
        return [sys.executable, *launcher, *self.typed[1:]]

    @property
    def num_ranks(self) -> int:
        """How many train."""
        return self.num_processes or 1

    @property
    def log(self) -> Path:
        """Where its output goes: beside its folder, which is there only if the run gets that far."""
        return self.folder.with_name(f"{self.folder.name}.log")

    @property
    def is_finished(self) -> bool:
        """Whether it has left its result."""
        return (self.folder / "result.json").exists()

    def config(self) -> Config:
        """Return its config, or raise the UserError that the run would end with."""
        path = SETTINGS[self.setting].config.format(self.dataset)
        return load_config(path, self.overrides, num_ranks=self.num_ranks)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``uhml reproduce``."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = (
        f"DATA is searched for {_looked_for()}. exit status: 0 if all runs are done, 1 if one failed\n\n"
        "examples:\n" + EXAMPLES
    )
    parser.add_argument("root", metavar="DATA", help="folder of a data set, or the folder that data sets lie in")
    parser.add_argument("overrides", metavar="key=value", nargs="*", default=[], help="overrides for all runs")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help=f"gets {TABLE}, and DATASET/SETTING/seed-S for each run"
    )
    parser.add_argument(
        "--settings",
        default=",".join(SETTINGS),
        help="which of: ours (configs/), flat (ours with model.curvature=0), paper (configs/paper/, whose networks "
        "need weights from a hub); default: all",
    )
    parser.add_argument("--seeds", default="0,1,2", help="train.seed of the runs of each setting; default: 0,1,2")
    parser.add_argument(
        "--nproc-per-node", type=count, metavar="N", help="run each by torchrun on so many processes of this machine"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the runs' command lines, and start nothing")


def run(args: argparse.Namespace) -> None:
    """Check the data sets below ``args.root``, do the runs that are not done, and write the table after each.

    Raises:
        UserError: there is no data set, training would refuse one, or ``args.out`` holds runs of other configs.
        RunsFailed: some did; the others are done.
        Preempted: by a signal, once the run that was going has saved and ended.
    """
    if place().launcher != "single":
        raise UserError("uhml reproduce starts its processes itself: start it once, with --nproc-per-node N.")
    runs = _plan(args)
    configs = [run.config() for run in runs]
    if args.dry_run:
        for run in runs:
            print(f"# {run}{': is done' if run.is_finished else ''}\n{shlex.join(run.typed)}")
        return
    for run, config in zip(runs, configs, strict=True):
        if run.is_finished:
            _refuse_other(run, config)
    _check_data(runs, configs)
    args.out.mkdir(parents=True, exist_ok=True)
    left, failed = [run for run in runs if not run.is_finished], {}
    with interruption.handled():
        for number, run in enumerate(left, start=1):
            logger.info("Run %d of %d: %s; its log is %s", number, len(left), run, run.log)
            why = _do(run, run.config().train.num_steps)
            if why is not None:
                failed[run] = why
                logger.error("%s failed: %s; see %s", run, why, run.log)
            write_whole(args.out / TABLE, table(runs, failed))
    text = table(runs, failed)
    write_whole(args.out / TABLE, text)
    console().print(Markdown(text))
    if failed:
        raise RunsFailed(f"{len(failed)} of {len(runs)} runs failed: the same command tries them again.")


def _plan(args: argparse.Namespace) -> list[Run]:
    settings, seeds = args.settings.split(","), args.seeds.split(",")
    for setting in settings:
        if setting not in SETTINGS:
            meant = did_you_mean(setting, SETTINGS)
            raise UserError(f"--settings {args.settings}: {setting!r} is none of {', '.join(SETTINGS)}.{meant}")
    for option, words in (("--settings", settings), ("--seeds", seeds)):
        if len(set(words)) < len(words):
            raise UserError(f"{option} {','.join(words)} names one twice.")
    if not all(seed.isdecimal() for seed in seeds):
        raise UserError(f"--seeds {args.seeds} must be whole numbers with commas between them, as in 0,1,2.")
    for key in (override.partition("=")[0] for override in args.overrides):
        if key in OURS_TO_SAY:
            raise UserError(f"{key} is no override here: {OURS_TO_SAY[key]} says it.")
    if not Path("configs").is_dir():
        raise UserError("There is no folder configs here: start uhml reproduce at the top of the repository.")
    root = f"data.root={quoted(args.root)}"
    datasets = _data_sets(args.root)
    runs = [
        Run(
            dataset,
            setting,
            seed,
            args.out / dataset / setting / f"seed-{seed}",
            # The last of two overrides of a key holds: the control stays flat.
            (*args.overrides, *SETTINGS[setting].changes, root, f"train.seed={seed}"),
            args.nproc_per_node,
        )
        for dataset in datasets
        for seed in seeds
        for setting in settings
        if setting != "paper" or Path(SETTINGS[setting].config.format(dataset)).exists()
    ]
    if not runs:
        raise UserError(f"The article has no setting for {', '.join(datasets)}: name others in --settings.")
    return runs


def _data_sets(root: str) -> list[str]:
    """Return the names of the official data sets that are in a folder, complete or not."""
    found = []
    for name in OFFICIAL:
        try:
            with missing_noted() as missing:
                load_splits(name, expanded(root))
        except NoDataSet:
            continue
        found.append(name)
        if missing:
            logger.warning(
                "%s: of the pictures that it lists %s are missing, first %s.", name, f"{len(missing):,}", missing[0]
            )
    if not found:
        raise UserError(f"{root} holds none of {_looked_for()}: uhml prepare cub200 --root DIR puts one there.")
    return found


def _looked_for() -> str:
    return ", ".join(f"{official.folder} ({name})" for name, official in OFFICIAL.items())


def _refuse_other(run: Run, config: Config) -> None:
    """Refuse a run that is done by another config: its scores do not belong in the same table."""
    try:
        refuse_changes(load_config(run.folder / "config.yaml", num_ranks=1), config, [])
    except UserError as e:
        raise UserError(f"{run.folder} is done, but not by what is asked for now: name another --out. {e}") from e


def _check_data(runs: Sequence[Run], configs: Sequence[Config]) -> None:
    """Refuse what any of the runs to come would refuse, before the first of them takes its hours."""
    to_come = [(run, config) for run, config in zip(runs, configs, strict=True) if not run.is_finished]
    for dataset in dict.fromkeys(run.dataset for run, _ in to_come):
        its_runs = [(run, config) for run, config in to_come if run.dataset == dataset]
        data = its_runs[0][1].data
        report = check(data)
        refuse(report, data)
        found = {finding.name: finding.items for finding in report.findings}
        skipped = [f"{len(found['unreadable']):,} unreadable pictures, skipped"] if found["unreadable"] else []
        odd = "; ".join([*map(str, found["counts"]), *skipped])
        logger.info("%s: %s", dataset, odd or "complete, and every picture is readable")
        for run, config in its_runs:
            check_batch_fits(report.num_to_train, config, run.num_ranks)


def _do(run: Run, num_steps: int) -> str | None:
    """Do a run, or go on with it. Return why it failed, if it did.

    Raises:
        Preempted: a signal came; the run has got it too, and has ended.
    """
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    with run.log.open("ab") as log:
        begin = log.tell()
        # In a session of its own, so that a Ctrl-C of the terminal's reaches it once: from here.
        child = subprocess.Popen(
            run.started,
            env=os.environ | SHUTDOWN_TIMEOUT,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            with interruption.at_once():
                before = read_status(run.folder)
                done = 0 if before is None else before.step
                for _ in progress(_steps(child, run, done), str(run), total=num_steps, done=done, unit="step"):
                    pass
        except Preempted as e:
            logger.info("%s: waiting until the run has saved", run)
            child.send_signal(e.signal)
            child.wait()
            raise Preempted(e.signal, f"in {run}, which goes on from its last checkpoint") from e
        finally:
            if child.poll() is None:  # the user does not want to wait
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
    if child.returncode == 0:
        return None
    said = run.log.read_bytes()[begin:].decode(errors="replace")
    return last_error(said) or f"it ended with status {child.returncode}"


def _steps(child: subprocess.Popen[bytes], run: Run, taken: int) -> Iterator[int]:
    """Yield each step once it is taken, until the run ends."""
    while child.poll() is None:
        status = read_status(run.folder)
        while status is not None and taken < status.step:
            taken += 1
            yield taken
        time.sleep(SECONDS_BETWEEN_LOOKS)


def table(runs: Sequence[Run], failed: dict[Run, str]) -> str:
    """Return the runs that are finished as Markdown: scores with their spread over seeds, and how to get each row."""
    text = "# Unseen classes, per cent, after the last step\n\n± is the standard deviation over seeds.\n"
    for dataset in dict.fromkeys(run.dataset for run in runs):
        of_setting: dict[str, list[Run]] = {}
        for run in runs:
            if run.dataset == dataset:
                of_setting.setdefault(run.setting, []).append(run)
        text += f"\n## {dataset}\n\n" + "\n".join(_rows(of_setting)) + "\n\n"
        for setting, its_runs in of_setting.items():
            first = its_runs[0]
            any_seed = dataclasses.replace(
                first,
                folder=first.folder.with_name("seed-S"),
                overrides=(*first.overrides[:-1], "train.seed=S"),
            )
            text += f"* {SETTINGS[setting].name}: `{shlex.join(any_seed.typed)}`\n"
            text += "".join(f"* **{run} failed**: {failed[run]} See {run.log}\n" for run in its_runs if run in failed)
    return text


def _rows(of_setting: dict[str, list[Run]]) -> Iterator[str]:
    records = {setting: [read_run(r.folder) for r in runs if r.is_finished] for setting, runs in of_setting.items()}
    named = dict.fromkeys(score for found in records.values() for record in found for score in record.trained)
    scores = sorted(named, key=lambda score: not score.startswith("recall_at_"))

    def row(what: str, found: Sequence[RunRecord], seeds: str, kind: Embedding, seconds: str = "") -> str:
        return f"| {' | '.join([what, seeds, *(with_deviation(spread(found, s, kind)) for s in scores), seconds])} |"

    yield f"| {' | '.join(['', 'seeds', *map(title, scores), 'seconds'])} |"
    yield "|" + "---|" * (len(scores) + 3)
    backbones = set()
    for setting, found in records.items():
        backbone = found[0].settings["model.backbone"] if found else None
        # Settings on one backbone start from the same scores, but for the distance in the control.
        if backbone is not None and backbone not in backbones:
            backbones.add(backbone)
            yield row(f"frozen {backbone}, cosine", found, str(len(found)), "frozen")
            yield row(f"untrained head on {backbone}, ball", found, str(len(found)), "start")
        seconds = f"{statistics.fmean(r.seconds for r in found if r.seconds is not None):,.0f}" if found else ""
        seeds = (
            f"{len(found)}" if len(found) == len(of_setting[setting]) else f"{len(found)} of {len(of_setting[setting])}"
        )
        yield row(f"**{SETTINGS[setting].name}**", found, seeds, "trained", seconds)
