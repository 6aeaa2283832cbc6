"""``uhml plan``: what a run will cost, before it is started."""

import argparse
import contextlib
import dataclasses
import json
import logging
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from uhml import distributed
from uhml.cli import count
from uhml.config import Config, DataConfig, check_batch_fits, load_config
from uhml.console import console
from uhml.data.cache import cache_pictures
from uhml.data.pictures import Pictures
from uhml.data.sampling import evenly
from uhml.data.verify import list_pictures
from uhml.errors import UserError
from uhml.hierarchy.memory import available
from uhml.planning import hardware
from uhml.planning.calibration import calibrate, stand_ins
from uhml.planning.costs import Ranks, Sizes
from uhml.planning.plan import Machine, Plan, make_plan, refuse_what_cannot_fit
from uhml.planning.table import tables

logger = logging.getLogger(__name__)

EXAMPLES = """\
examples:
  uhml plan configs/quickstart.yaml
  uhml plan configs/sop.yaml data.root=/data/sop --nodes 2 --gpus-per-node 8 --gpu h100
  uhml plan configs/sop.yaml --pictures 100000000 --nodes 8 --gpus-per-node 8 --gpu h200 --json

Where the pictures are not here, leave out data.root and give their number; others of 500 x 375 pixels are read instead.
"""

# Pictures to calibrate with, if a batch does not take more.
SAMPLE = 512


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``uhml plan``."""
    parser.epilog = EXAMPLES
    parser.add_argument("config", metavar="CONFIG", help="a YAML file, as for uhml train")
    parser.add_argument("overrides", metavar="key=value", nargs="*", default=[], help="overrides of single keys")
    parser.add_argument("--nodes", type=count, default=1, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--gpus-per-node",
        type=count,
        default=1,
        metavar="N",
        help="processes on a node, with a GPU each if there are any (default: %(default)s)",
    )
    parser.add_argument(
        "--gpu",
        choices=(*hardware.GPUS, "cpu"),
        help="GPU to plan for, or cpu for nodes like this one without (default: as train.device is here)",
    )
    parser.add_argument("--pictures", type=count, metavar="N", help="training pictures (default: those there are)")
    parser.add_argument("--json", action="store_true", help="print an object for scripts instead of tables")


def run(args: argparse.Namespace) -> None:
    """Measure for half a minute, tell what the run takes, and refuse it if it cannot fit.

    Raises:
        UserError: the config is not usable, or what it asks for cannot fit.
    """
    ranks = Ranks(nodes=args.nodes, per_node=args.gpus_per_node)
    config = load_config(args.config, args.overrides, num_ranks=ranks.world_size, needs_root=False)
    with (
        contextlib.ExitStack() as stack,
        distributed.process_group(config.train.device if args.gpu is None else "cpu") as device,
        torch.jit.optimized_execution(False),
    ):
        sizes, sample = _pictures(config, args.pictures, stack)
        check_batch_fits(sizes.train, config, ranks.world_size)
        if config.data.cache is not None:
            sample = _cached(sample, config.data, Path(stack.enter_context(tempfile.TemporaryDirectory())))
        machine = _machine(args.gpu, ranks, device)
        logger.info("Measuring on %s for about half a minute.", device)
        with _quiet():
            measured = calibrate(config, sample, sizes.train, device, computes=machine.gpu is None)
        plan = make_plan(config, sizes, ranks, machine, measured)
        if args.json:
            print(json.dumps(_plain(plan), indent=2))
        else:
            for table in tables(plan):
                console().print(table)
            for line in (*plan.limits, *plan.assumptions):
                logger.info("%s", line)
        refuse_what_cannot_fit(plan, machine, measured)


def _pictures(config: Config, num_pictures: int | None, stack: contextlib.ExitStack) -> tuple[Sizes, Pictures]:
    """Return how many pictures the run has, and some of them, or others where they are not here."""
    taken = max(SAMPLE, config.clusters_per_batch * config.mining.pictures_per_cluster)
    try:
        splits = list_pictures(config.data)
    except UserError as e:
        if num_pictures is None:
            raise UserError(f"{e} To plan for pictures that are elsewhere, give their number with --pictures.") from e
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        logger.info("The pictures are not here: others, of 500 x 375 pixels, are read instead.")
        pictures = stand_ins(Path(folder))
        return Sizes(train=num_pictures), pictures.select(np.arange(min(taken, num_pictures)) % len(pictures))
    n = len(splits.train)
    sizes = Sizes(
        train=num_pictures or n,
        test=len(splits.test) if splits.test else 0,
        gallery=len(splits.gallery) if splits.gallery else 0,
    )
    return sizes, splits.train.select(evenly(n, taken))


def _cached(pictures: Pictures, config: DataConfig, folder: Path) -> Pictures:
    """Keep some pictures as the run would, but where they are gone afterwards."""
    with _quiet():
        (cached,) = cache_pictures([pictures.paths], dataclasses.replace(config, cache=str(folder)))  # type: ignore[type-var]
    return dataclasses.replace(pictures, cached=cached)


def _machine(gpu: str | None, ranks: Ranks, device: torch.device) -> Machine:
    if gpu is not None and gpu != "cpu":
        sheet = hardware.GPUS[gpu]
        name = f"{ranks.world_size} {gpu}"
        share = sheet.memory * hardware.MEMORY_SHARE
        return Machine(name=name, gpu=sheet, on_gpu=True, memory_of_rank=share, memory_of_node=None, disk=None)
    host = float(available(torch.device("cpu")))
    on_gpu = device.type == "cuda"
    of = torch.cuda.get_device_name(device) if on_gpu else "CPU"
    return Machine(
        name=f"{ranks.world_size} x {of} as here" if ranks.world_size > 1 else f"this machine's {of}",
        gpu=None,
        on_gpu=on_gpu,
        memory_of_rank=float(available(device)) if on_gpu else host / ranks.per_node,
        memory_of_node=host,
        disk=float(shutil.disk_usage(".").free),
    )


def _plain(plan: Plan) -> dict[str, Any]:
    plain = dataclasses.asdict(plan)
    del plain["config"]
    plain["seconds"]["total"] = plan.seconds.total
    for name in ("memory_main", "memory_others"):
        plain[name]["peak"] = getattr(plan, name).peak
    return plain | {"checkpoints": plan.checkpoints, "hierarchies": plan.hierarchies}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Within it nothing is told of the small run that measures."""
    ours = logging.getLogger("uhml")
    before = ours.level
    ours.setLevel(logging.ERROR)
    try:
        yield
    finally:
        ours.setLevel(before)
