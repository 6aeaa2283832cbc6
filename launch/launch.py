"""``uhml launch``: submit a run, or a sweep of runs."""

import argparse
import contextlib
import dataclasses
import fcntl
import logging
import math
import os
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

from launch import slurm, snapshot, submit
from launch.overview import look
from launch.record import FOLDER, SweepRecord, read_record, write_record
from launch.status import members
from launch.submit import Resources
from launch.sweep import combinations, folder_name
from uhml.cli import add_run_arguments, count, run_dir_of
from uhml.config import Config, load_config, refuse_changes
from uhml.errors import UserError

logger = logging.getLogger("uhml.launch")

EXAMPLES = """\
examples:
  uhml launch configs/sop.yaml data.root=/data/sop --nodes 2 --gpus-per-node 8 --partition gpu --time 24:00:00
  uhml launch configs/sop.yaml data.root=/data/sop --gpus-per-node 4 --sbatch account=vision --sbatch qos=high
  uhml launch configs/quickstart.yaml --gpus-per-node 1 --sweep train.seed=0,1,2 --sweep loss.omega=0.8,0.9
  uhml launch configs/quickstart.yaml --cluster local --tasks-per-node 2
  uhml status runs/RUN
  uhml cancel runs/RUN

A job that is preempted or reaches its time limit saves, is requeued, and goes on where it stopped, until the run is
finished. The run keeps to the code and the config of the moment of its launch.
"""

# What has an option of its own, by sbatch's names.
OWN = ("nodes", "gpus-per-node", "ntasks-per-node", "cpus-per-task", "mem", "time", "partition", "signal")
# What a launched run relies on.
FIXED = ("job-name", "array", "output", "error", "open-mode", "requeue", "no-requeue", "wrap")
LOCAL_MINUTES = 60 * 24 * 365


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``uhml launch``."""
    parser.epilog = EXAMPLES
    add_run_arguments(
        parser,
        config="a YAML file, as for uhml train",
        run_dir="folder of the run, on a file system that all nodes share",
    )
    parser.add_argument("--cluster", choices=("slurm", "local"), default="slurm", help="default: %(default)s")
    parser.add_argument("--dry-run", action="store_true", help="show what would be submitted, and change nothing")
    parser.add_argument(
        "--sweep", action="append", default=[], metavar="KEY=V,V", help="a run for each value; again for combinations"
    )
    needs = parser.add_argument_group("what the run needs")
    needs.add_argument("--nodes", type=count, default=1, metavar="N", help="default: %(default)s")
    needs.add_argument("--gpus-per-node", type=count, metavar="N", help="one process each (default: no GPU)")
    needs.add_argument("--tasks-per-node", type=count, metavar="N", help="processes on a node without GPUs")
    needs.add_argument(
        "--cpus-per-task",
        type=count,
        metavar="N",
        help="CPU cores of a process (default: of SLURM's nodes with GPUs, "
        "data.num_workers and two, or as many as there are for each GPU; else the cluster's)",
    )
    needs.add_argument("--mem", metavar="SIZE", help="memory of a node, as in 64G")
    needs.add_argument("--partition", metavar="NAME", help="SLURM's partition (default: the cluster's)")
    needs.add_argument("--time", type=_minutes, metavar="D-HH:MM:SS", help="of one slot (default: 24:00:00)")
    needs.add_argument(
        "--signal-delay",
        type=count,
        metavar="SECONDS",
        help="how long before the end of a slot the run is told to save (default: 300)",
    )
    needs.add_argument(
        "--sbatch", action="append", default=[], metavar="OPTION[=VALUE]", help="any other option of sbatch"
    )


def run(args: argparse.Namespace) -> None:
    """Check everything, submit, and say how to go on.

    Raises:
        UserError: an option, the config or the folder is not usable, or SLURM refuses.
    """
    run_dir = run_dir_of(args).resolve()
    snapshot.refuse_name(run_dir)
    with _one_launch_at_a_time(run_dir):
        _launch(args, run_dir)


@contextlib.contextmanager
def _one_launch_at_a_time(run_dir: Path) -> Iterator[None]:
    """Wait for other launches beside this one: of two in one folder the second is to see the first."""
    above = os.open(next(folder for folder in run_dir.parents if folder.is_dir()), os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # of a file system without locks
            fcntl.flock(above, fcntl.LOCK_EX)
        yield
    finally:
        os.close(above)


def _launch(args: argparse.Namespace, run_dir: Path) -> None:
    resources = _resources(args)
    sweep = combinations(args.sweep)
    if args.sweep:
        names = [folder_name(values) for values in sweep]
        typed = {override.partition("=")[0] for override in args.overrides}
        if twice := typed.intersection(sweep[0]):
            raise UserError(f"{twice.pop()} is given a value, and swept: leave out one of them.")
        if len(set(names)) < len(names):
            same = next(name for name in names if names.count(name) > 1)
            raise UserError(f"Two runs of the sweep would be called {same}: leave one out, or sweep it by itself.")
        _refuse_if_not_for_sweep(run_dir)
    else:
        names = ["."]
    runs = {}
    for name, values in zip(names, sweep, strict=True):
        overrides = args.overrides + [f"{key}={value}" for key, value in values.items()]
        runs[run_dir / name] = load_config(args.config, overrides, num_ranks=resources.num_ranks)
    if resources.cluster == "slurm" and resources.gpus_per_node and resources.cpus_per_task is None:
        resources = _with_cores(resources, max(config.data.num_workers for config in runs.values()))
    in_sweep = bool(args.sweep)
    finished = [own for own, config in runs.items() if _is_done(own, config, args.allow_change, in_sweep=in_sweep)]
    for own_dir in finished:
        logger.info("%s is finished.", own_dir.name)
        del runs[own_dir]
    if not runs:
        raise UserError(f"All runs of the sweep in {run_dir} are finished: uhml status shows them.")

    if args.dry_run:
        _show(resources, run_dir, list(runs))
        return
    records = submit.submit(resources, run_dir, runs, args.allow_change)
    if args.sweep:
        write_record(run_dir, _with_earlier(run_dir, SweepRecord(runs=names, values=sweep)))
    what = "process" if resources.cluster == "local" else "job"
    of = f" of {len(runs)} runs" if args.sweep else ""
    logger.info("Submitted %s %s%s in %s.", what, records[0].job_id.split("_")[0], of, run_dir)
    logger.info("uhml status %s says how it goes, uhml cancel ends it.", shlex.quote(str(args.run_dir or run_dir)))


def _with_cores(resources: Resources, num_workers: int) -> Resources:
    """Ask for cores by the number of GPUs. SLURM's own choice, often one, would have a GPU wait for its pictures."""
    there = slurm.cores_per_gpu(resources.gpus_per_node, resources.partition)
    if there is None:
        return resources
    cores = min(there, num_workers + 2)
    logger.info("Asking for %d cores for each GPU; --cpus-per-task says otherwise.", cores)
    return dataclasses.replace(resources, cpus_per_task=cores)


def _resources(args: argparse.Namespace) -> Resources:
    if args.gpus_per_node and args.tasks_per_node:
        raise UserError("A run has one process for each GPU: --tasks-per-node is for nodes without GPUs.")
    if args.cluster == "local":
        for option in ("nodes", "partition", "time", "signal_delay", "mem", "cpus_per_task", "sbatch", "sweep"):
            if getattr(args, option) not in (None, [], 1):
                raise UserError(f"--{option.replace('_', '-')} is for SLURM, not for --cluster local.")
    sbatch: dict[str, str | bool] = {}
    for option in args.sbatch:
        name, given, value = option.lstrip("-").partition("=")
        if name in OWN:
            raise UserError(f"--sbatch {option}: use the option of uhml launch for {name}.")
        if name in FIXED:
            raise UserError(f"--sbatch {option}: uhml launch sets {name} itself.")
        if not name:
            raise UserError(f"--sbatch {option!r} names no option.")
        sbatch[name] = value if given else True
    minutes = args.time or (LOCAL_MINUTES if args.cluster == "local" else 24 * 60)
    signal_delay = args.signal_delay or 300
    if args.cluster == "slurm" and signal_delay >= 60 * minutes:
        raise UserError(
            f"A slot of {minutes} min leaves no time to train when the run must save {signal_delay} s before its end: "
            "raise --time or lower --signal-delay."
        )
    return Resources(
        cluster=args.cluster,
        nodes=args.nodes,
        gpus_per_node=args.gpus_per_node or 0,
        tasks_per_node=args.gpus_per_node or args.tasks_per_node or 1,
        cpus_per_task=args.cpus_per_task,
        mem=args.mem,
        minutes=minutes,
        signal_delay=signal_delay,
        partition=args.partition,
        sbatch=sbatch,
    )


def _with_earlier(folder: Path, sweep: SweepRecord) -> SweepRecord:
    """Return the sweep with the runs that an earlier one of the same keys has left in its folder."""
    before = read_record(folder, SweepRecord)
    if before is None or before.values[0].keys() != sweep.values[0].keys():
        return sweep
    own = dict(zip(sweep.runs, sweep.values, strict=True))
    earlier = {run: values for run, values in zip(before.runs, before.values, strict=True) if run not in own}
    return SweepRecord(runs=[*earlier, *own], values=[*earlier.values(), *own.values()])


def _is_done(run_dir: Path, config: Config, allow_change: list[str], *, in_sweep: bool) -> bool:
    """Return whether a run of a sweep is finished; refuse a folder that no run is to begin or go on in.

    Raises:
        UserError: nothing is known of what the folder holds, or its run is under way, or was another one, or is
            finished and no run of a sweep.
    """
    if not run_dir.is_dir() or not any(run_dir.iterdir()):
        return False
    view = look(run_dir)
    if view is None:
        raise UserError(f"{run_dir} holds no run, but other files: name another folder by --run-dir.")
    if view.state == "finished" and not in_sweep:
        raise UserError(f"The run in {run_dir} is finished: name another folder by --run-dir.")
    if view.state == "stopping":
        raise UserError(f"The run in {run_dir} is stopping: wait until uhml status says that it has ended.")
    if view.is_under_way:
        raise UserError(f"The run in {run_dir} is {view.state} already: uhml cancel ends it, or name another folder.")
    if any((run_dir / "checkpoints").glob("step-*.pt")):
        refuse_changes(load_config(run_dir / "config.yaml", num_ranks=1), config, allow_change)
    return view.state == "finished"


def _refuse_if_not_for_sweep(folder: Path) -> None:
    """Refuse the folder of a run, and that of a sweep whose runs have yet to read the code and the list in it."""
    if look(folder) is not None:
        raise UserError(f"{folder} holds a run: name another folder for the sweep by --run-dir.")
    for own_dir in members(folder):
        view = look(own_dir)
        if view is not None and view.is_under_way:
            raise UserError(
                f"The sweep in {folder} goes on: {own_dir.name} is {view.state}. uhml cancel ends it, or name another "
                "folder by --run-dir."
            )


def _show(resources: Resources, run_dir: Path, runs: list[Path]) -> None:
    """Print what would be done."""
    if resources.cluster == "slurm":
        print(f"Would submit by sbatch:\n\n{submit.script(resources, run_dir, len(runs))}")
    else:
        print(f"Would start {resources.num_ranks} {'process' if resources.num_ranks == 1 else 'processes'} here.")
    for own_dir in runs:
        command = ["uhml", "train", str(own_dir / FOLDER / "config.yaml"), "--run-dir", str(own_dir)]
        ranks = "The rank" if resources.num_ranks == 1 else f"Each of {resources.num_ranks} ranks"
        print(f"{ranks}: {shlex.join(command)}")
    sys.stdout.flush()


def _minutes(text: str) -> int:
    """Understand a time as SLURM does: minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS."""
    found = re.fullmatch(r"(?:(\d+)-(?=\d))?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no time: write HH:MM:SS or D-HH:MM:SS")
    days, *rest = found.groups()
    parts = [int(part) for part in rest if part is not None]
    units = (60, 1, 1 / 60) if days is not None or len(parts) == 3 else (1, 1 / 60)
    total = math.ceil(int(days or 0) * 24 * 60 + sum(part * unit for part, unit in zip(parts, units, strict=False)))
    if total < 1:
        raise argparse.ArgumentTypeError("a slot takes a minute at least")
    return total
