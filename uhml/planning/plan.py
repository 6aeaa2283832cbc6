"""A run's costs on one machine, put together; what limits it, and whether it fits at all."""

import dataclasses
import logging
import math
from collections.abc import Callable

import torch

from uhml.config import Config
from uhml.environment import cores
from uhml.errors import UserError
from uhml.hierarchy.dense import MAX_POINTS
from uhml.hierarchy.memory import GIB
from uhml.planning import costs, hardware
from uhml.planning.calibration import Calibration
from uhml.planning.costs import FLOAT, Growth, Memory, Network, Ranks, Seconds, Sizes, Speed
from uhml.planning.hardware import ARITHMETIC_SHARE, BANDWIDTH_SHARE, Gpu

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
    """What is planned for.

    Attributes:
        name: for people.
        gpu: its GPU by the data sheet; None for a machine like the present one.
        on_gpu: whether a rank computes on a GPU.
        memory_of_rank: bytes that a rank may take where it computes.
        memory_of_node: bytes that all ranks of a node may take on the host; None where that is not known.
        disk: bytes that are free for the run; None where that is not known.
    """

    name: str
    gpu: Gpu | None
    on_gpu: bool
    memory_of_rank: float
    memory_of_node: float | None
    disk: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run takes: seconds, bytes and numbers; see the functions of :mod:`uhml.planning.costs`."""

    config: Config
    machine: str
    on_gpu: bool
    sizes: Sizes
    ranks: Ranks
    network: Network
    seconds: Seconds
    seconds_per_step: float
    images_per_second: float
    memory_main: Memory
    memory_others: Memory
    memory_of_rank: float
    host_of_node: float
    memory_of_node: float | None
    wire: int
    least_wire: int
    checkpoint: int
    num_kept: int
    hierarchy: int
    num_hierarchies: int
    cache: int
    num_evaluations: int
    limits: tuple[str, ...]
    assumptions: tuple[str, ...]

    @property
    def checkpoints(self) -> int:
        """Bytes of all checkpoints that lie on the disk at once."""
        return self.num_kept * self.checkpoint

    @property
    def hierarchies(self) -> int:
        """Bytes of all hierarchies, which stay."""
        return self.num_hierarchies * self.hierarchy


def make_plan(config: Config, sizes: Sizes, ranks: Ranks, machine: Machine, measured: Calibration) -> Plan:
    """Put the costs together. Says nothing of whether they can be met: :func:`refuse_what_cannot_fit` does."""
    network = measured.network
    speed = (
        _speed_here(config, ranks, machine, measured)
        if machine.gpu is None
        else _speed_of_gpu(config, ranks, machine.gpu, measured)
    )
    main, others = (_memory(config, sizes, ranks, machine, measured, rank) for rank in (0, 1))
    wire, least_wire = costs.wire_per_step(config, ranks, network)
    checkpoint, hierarchy = costs.disk(config, sizes, network)
    per_step = costs.seconds_of_step(config, ranks, speed)
    return Plan(
        config=config,
        machine=machine.name,
        on_gpu=machine.on_gpu,
        sizes=sizes,
        ranks=ranks,
        network=network,
        seconds=costs.seconds(config, sizes, ranks, network, speed),
        seconds_per_step=per_step,
        images_per_second=config.train.global_batch_size / per_step,
        memory_main=main,
        memory_others=others,
        memory_of_rank=machine.memory_of_rank,
        host_of_node=_host_of_node(config, sizes, ranks, machine, measured, main, others),
        memory_of_node=machine.memory_of_node,
        wire=wire,
        least_wire=least_wire,
        checkpoint=checkpoint,
        num_kept=costs.num_kept(config),
        hierarchy=hierarchy,
        num_hierarchies=costs.num_hierarchies(config),
        cache=round(measured.picture_bytes * (sizes.train + sizes.test + sizes.gallery)),
        num_evaluations=costs.num_evaluations(config) if sizes.test else 0,
        limits=tuple(_limits(config, sizes, ranks, machine, measured)),
        assumptions=tuple(_assumptions(config, machine, measured)),
    )


def refuse_what_cannot_fit(plan: Plan, machine: Machine, measured: Calibration) -> None:
    """Look whether the machine can do it.

    Raises:
        UserError: it cannot; the message names the option to change.
    """
    config, sizes, ranks = plan.config, plan.sizes, plan.ranks
    if config.hierarchy.mode == "dense" and sizes.train > MAX_POINTS:
        raise UserError(
            f"hierarchy.mode=dense keeps all distances and stops at {MAX_POINTS:,} pictures, and there are "
            f"{sizes.train:,}: take hierarchy.mode=graph."
        )
    if plan.memory_main.peak > machine.memory_of_rank:
        raise UserError(_why_memory(plan, machine, measured))
    if plan.memory_of_node is not None and plan.host_of_node > plan.memory_of_node:
        raise UserError(
            f"The {ranks.per_node} ranks of a node, with data.num_workers={config.data.num_workers} processes each, "
            f"need {plan.host_of_node / GIB:.1f} GiB of memory, and {plan.memory_of_node / GIB:.1f} GiB are free: "
            "lower data.num_workers, or --gpus-per-node."
        )
    if machine.disk is not None and plan.checkpoints + plan.hierarchies > machine.disk:
        raise UserError(
            f"{plan.num_kept} checkpoints and {plan.num_hierarchies} hierarchies need "
            f"{(plan.checkpoints + plan.hierarchies) / GIB:.1f} GiB of disk, and {machine.disk / GIB:.1f} GiB are free "
            "here: lower train.keep_checkpoints, raise hierarchy.recluster_every, or take another --run-dir."
        )


def _why_memory(plan: Plan, machine: Machine, measured: Calibration) -> str:
    config, memory = plan.config, plan.memory_main

    def most(section: str, key: str, step: int = 1) -> int:
        """Return the greatest multiple of ``step`` at which rank 0 fits, if only this key is changed."""
        now = getattr(getattr(config, section), key)

        def fits(value: int) -> bool:
            options = dataclasses.replace(getattr(config, section), **{key: value})
            changed = dataclasses.replace(config, **{section: options})  # type: ignore[type-var]
            found = _memory(changed, plan.sizes, plan.ranks, machine, measured, 0)
            return found.peak <= machine.memory_of_rank

        return step * greatest(lambda i: fits(i * step), now // step)

    phase = memory.greatest
    options = config.hierarchy
    if phase == "step":
        cluster = config.mining.pictures_per_cluster * config.mining.num_views
        section, key, step = "train", "global_batch_size", math.lcm(cluster, plan.ranks.world_size)
        work = f"A training step of {config.train.global_batch_size // plan.ranks.world_size:,} views a rank"
        other = "or plan for more ranks with --nodes"
    elif phase == "embedding":
        section, key, step = "eval", "batch_size", 1
        work = f"Embedding {config.eval.batch_size:,} pictures at once, of {plan.sizes.train:,} in all,"
        other = "or plan for more ranks with --nodes"
    elif phase == "clustering" and options.mode == "graph":
        section, key, step = "hierarchy", "num_neighbors", 1
        work = f"Clustering {plan.sizes.train:,} pictures on rank 0"
        fewer = most_pictures(config, plan.sizes, plan.ranks, machine, measured)
        other = f"or train on {fewer:,} pictures at most" if fewer else "or train on fewer pictures"
    elif phase == "clustering":
        return (
            _need(f"hierarchy.mode={options.mode} on {plan.sizes.train:,} pictures", memory.peak, machine)
            + " so take hierarchy.mode=graph."
        )
    else:
        return (
            _need(f"Scoring {plan.sizes.scored:,} pictures", memory.peak, machine)
            + " so take fewer classes with data.num_classes."
        )
    now, best = getattr(getattr(config, section), key), most(section, key, step)
    cure = f"{section}.{key}={best} is the most that fits" if best else f"no {section}.{key} is small enough"
    return f"{_need(work, memory.peak, machine)} with {section}.{key}={now}: {cure}, {other}."


def _need(work: str, num_bytes: float, machine: Machine) -> str:
    where = "of a GPU's memory" if machine.on_gpu else "of memory"
    return f"{work} needs {num_bytes / GIB:.1f} GiB {where}, and {machine.memory_of_rank / GIB:.1f} can be had,"


def greatest(fits: Callable[[int], bool], below: int) -> int:
    """Return the greatest number under ``below`` that fits, as all smaller ones do then; 0 if none fits."""
    low, high = 0, below
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def most_pictures(config: Config, sizes: Sizes, ranks: Ranks, machine: Machine, measured: Calibration) -> int:
    """Return how many training pictures rank 0 has the memory for."""

    def fits(n: int) -> bool:
        changed = dataclasses.replace(sizes, train=n)
        return _memory(config, changed, ranks, machine, measured, 0).peak <= machine.memory_of_rank

    return greatest(fits, 2**31)


def _memory(config: Config, sizes: Sizes, ranks: Ranks, machine: Machine, measured: Calibration, rank: int) -> Memory:
    found = costs.memory(config, sizes, ranks, measured.network, rank=rank, on_gpu=machine.on_gpu)
    if machine.on_gpu:
        return found
    # On the host the libraries count too, and the names of the pictures.
    return dataclasses.replace(found, network=found.network + measured.libraries + costs.listed(config, sizes))


def _host_of_node(
    config: Config, sizes: Sizes, ranks: Ranks, machine: Machine, measured: Calibration, main: Memory, others: Memory
) -> float:
    readers = ranks.per_node * config.data.num_workers * hardware.WORKER + costs.batches_in_flight(config, ranks)
    if beside := costs.background(config, sizes.train, ranks, on_gpu=machine.on_gpu):
        readers += measured.libraries + costs.listed(config, sizes) + beside
    if machine.on_gpu:
        own = measured.libraries + hardware.CUDA_HOST + costs.listed(config, sizes)
        return readers + ranks.per_node * own + costs.projected(sizes)
    return readers + main.peak + (ranks.per_node - 1) * others.peak


def _speed_here(config: Config, ranks: Ranks, machine: Machine, measured: Calibration) -> Speed:
    """Ranks without GPUs share the cores of their node; those with one have it to themselves."""
    assert measured.pace is not None, "where no data sheet is planned for, this machine has computed"
    sharing = 1 if machine.on_gpu else ranks.per_node
    per_node = ranks.per_node if machine.on_gpu else 1
    readers = max(1, min(config.data.num_workers * ranks.per_node, cores()))
    exchange = costs.seconds_of_exchange(measured.network.learned, ranks, hardware.GLOO, hardware.NODE_NETWORK)
    return Speed(
        view=measured.pace.view / per_node,
        picture=measured.pace.picture / per_node,
        checked=measured.decode / readers,
        start=measured.pace.start,
        exchange=exchange,
        search=_times(measured.search, sharing),
        linkage=measured.linkage,
        retrieval=_times(measured.retrieval, sharing),
        kmeans=measured.kmeans,
        disk=hardware.DISK,
        record=measured.record,
        shown=measured.shown,
    )


def _times(growth: Growth, factor: float) -> Growth:
    return Growth(factor * growth.linear, factor * growth.square)


def _speed_of_gpu(config: Config, ranks: Ranks, gpu: Gpu, measured: Calibration) -> Speed:
    bandwidth = gpu.bandwidth * BANDWIDTH_SHARE
    d, workers = config.model.embedding_dim, config.data.num_workers
    view, picture = _seconds_of_gpu(config, gpu, measured.network)
    exchange = costs.seconds_of_exchange(measured.network.learned, ranks, gpu.link, hardware.NODE_NETWORK)
    # The gradients travel while the backward pass, two thirds of a step, makes more of them.
    backward = 2 / 3 * view * config.train.global_batch_size / ranks.world_size
    return Speed(
        view=_with_reading(view, measured.read_view, workers) / ranks.per_node,
        picture=_with_reading(picture, measured.read_picture, workers) / ranks.per_node,
        checked=measured.decode / max(1, workers) / ranks.per_node,
        start=hardware.LOADER_START,
        exchange=max(0.0, exchange - backward),
        # A product, written, and read twice to select the least.
        search=Growth(0.0, 2 * (d + 2) / (gpu.float32 * ARITHMETIC_SHARE) + 3 * FLOAT / bandwidth),
        linkage=measured.linkage,
        # Gaps, keys and their selection, in eight bytes each.
        retrieval=Growth(0.0, 2 * 1000 / (gpu.float64 * ARITHMETIC_SHARE) + 8 * 8 / bandwidth),
        kmeans=measured.kmeans,
        disk=hardware.DISK,
        record=measured.record,
        shown=measured.shown,
    )


def _seconds_of_gpu(config: Config, gpu: Gpu, network: Network) -> tuple[float, float]:
    """Return the seconds of one view's training and of embedding one picture: bound by arithmetic or by memory."""
    bandwidth = gpu.bandwidth * BANDWIDTH_SHARE
    training, inference = (
        ARITHMETIC_SHARE * (gpu.bfloat16 if precision == "bfloat16" else gpu.float32)
        for precision in (config.model.precision, config.model.inference_precision)
    )
    # A backward pass is two products for each of the forward pass.
    view = max(3 * network.flops / training, hardware.TRAFFIC * network.saved / bandwidth)
    picture = max(network.flops / inference, 2 * network.saved / bandwidth)
    return view, picture


def _with_reading(computing: float, reading: float, num_workers: int) -> float:
    return max(computing, reading / num_workers) if num_workers else computing + reading


def _limits(config: Config, sizes: Sizes, ranks: Ranks, machine: Machine, measured: Calibration) -> list[str]:
    found = []
    if machine.gpu is not None:
        view, _ = _seconds_of_gpu(config, machine.gpu, measured.network)
        enough = math.ceil(measured.read_view / view)
        if enough > config.data.num_workers:
            found.append(
                f"Reading limits the steps: a GPU learns from {1 / view:,.0f} views a second, and "
                f"data.num_workers={config.data.num_workers} read "
                f"{max(1, config.data.num_workers) / measured.read_view:,.0f}; "
                f"{enough} processes a GPU would keep up."
            )
    most = most_pictures(config, sizes, ranks, machine, measured)
    memory = costs.memory(
        config, dataclasses.replace(sizes, train=most), ranks, measured.network, rank=0, on_gpu=machine.on_gpu
    )
    if most:
        limit = memory.greatest
        found.append(f"Rank 0 has the memory for {most:,} training pictures; what limits them is its {limit}.")
    return found


def _assumptions(config: Config, machine: Machine, measured: Calibration) -> list[str]:
    if machine.gpu is None:
        assert measured.pace is not None
        said = [
            f"Measured here, on {torch.get_num_threads()} cores, with steps of {measured.pace.views} views; the "
            "machine is taken to be as busy during the run as it was now."
        ]
    else:
        gpu = machine.gpu
        said = [
            f"{machine.name}, by its data sheet: {gpu.bfloat16 / 1e12:.0f} TFLOP/s in bfloat16, "
            f"{gpu.float32 / 1e12:.0f} in float32, {gpu.bandwidth / 1e12:.1f} TB/s; assumed to be had of it: "
            f"{100 * ARITHMETIC_SHARE:.0f} % of the arithmetic and {100 * BANDWIDTH_SHARE:.0f} % of the bandwidth, "
            f"and {hardware.NODE_NETWORK / 1e9:.0f} GB/s between nodes.",
            "Cores that read pictures, and rank 0's linkage, k-means and drawing, are taken to be as fast as here.",
        ]
    if config.hierarchy.mode == "graph":
        said.append("Linkage, and the search in cells, grow as tests/benchmarks/hierarchy.py found.")
    return said
