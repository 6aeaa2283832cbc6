"""What the present machine takes for each part of a run, measured in half a minute on a few pictures."""

import contextlib
import dataclasses
import itertools
import logging
import resource
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import sklearn.cluster  # noqa: F401  what a run that scores comes to hold, and no part of k-means' time
import torch
from PIL import Image
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from uhml import poincare
from uhml.config import Config
from uhml.data.cache import bytes_per_picture
from uhml.data.pictures import Pictures, Splits
from uhml.data.transforms import plain_transform, training_transform
from uhml.embedding import embed_rounds
from uhml.hierarchy import Dendrogram, average_linkage
from uhml.hierarchy.geometry import Geometry
from uhml.hierarchy.graph import graph_linkage
from uhml.hierarchy.knn import nearest_neighbors
from uhml.loss import HierarchicalLoss
from uhml.metrics import Embedded, kmeans_clusters, retrieval
from uhml.model import Embedder, build_embedder
from uhml.planning.costs import LINKAGE_GROWTH, Growth, Network
from uhml.reporting.figures import thumbnails
from uhml.reporting.hierarchy import show_hierarchy
from uhml.reporting.report import Reporter
from uhml.run.training_state import TrainingState
from uhml.train import batches_left, train_step

logger = logging.getLogger(__name__)

SECONDS_OF_STEPS = 8.0
SECONDS_OF_EMBEDDING = 5.0
MOST_STEPS = 6
FEW = 8
POINTS, POINTS_ON_GPU = 12_000, 100_000
SCORED = 2_000
READ = 48
STAND_INS = 64
STAND_IN_SIZE = (500, 375)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pace:
    """How fast this machine computes.

    Attributes:
        view: seconds of a training step for one view, read, augmented and learned from, with all cores.
        picture: of embedding one picture, likewise.
        start: until the first batch of a loader, besides.
        views: in the steps that were measured.
    """

    view: float
    picture: float
    start: float
    views: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibration:
    """Seconds on this machine, and the network in numbers.

    Attributes:
        network: of the config.
        pace: of computing; None where another machine computes.
        read_view: of reading and augmenting one view, in one process.
        read_picture: of reading one picture to be embedded, likewise.
        decode: of decoding one picture, likewise.
        picture_bytes: of one picture in the cache, where there is one.
        search: see :class:`uhml.planning.costs.Speed`, and so are the next five.
        linkage: see there.
        retrieval: see there.
        kmeans: see there.
        record: see there.
        shown: see there.
        libraries: bytes of host memory that a process holds before it has a network.
    """

    network: Network
    pace: Pace | None
    read_view: float
    read_picture: float
    decode: float
    picture_bytes: float
    search: Growth
    linkage: Growth
    retrieval: Growth
    kmeans: Growth
    record: float
    shown: float
    libraries: int


def calibrate(
    config: Config, pictures: Pictures, num_points: int, device: torch.device, *, computes: bool
) -> Calibration:
    """Measure. Takes about half a minute whatever the network.

    Args:
        config: of the run.
        pictures: some to train on, as those of the run.
        num_points: pictures that the run clusters.
        device: where to compute.
        computes: whether this machine's network is of interest, and not only what is beside it.

    Raises:
        UserError: there is no such network, or a picture cannot be read.
    """
    libraries = resident()
    options = dataclasses.replace(config.model, weights="random")  # type: ignore[type-var]
    model = build_embedder(options, config.data.image_size)
    network = measure_network(model, config)
    model.to(device)
    mean, std = model.backbone.mean, model.backbone.std
    chosen = pictures.select(range(min(READ, len(pictures))))
    read_view = _seconds_each(training_transform(config.data, mean, std), chosen)
    read_picture = _seconds_each(plain_transform(config.data, mean, std), chosen)
    decode = _seconds_each(lambda image: image, dataclasses.replace(chosen, cached=None))
    pace = None
    with tempfile.TemporaryDirectory() as folder:
        if computes:
            picture, start = _embedding(model, config, pictures)
            view, views = _training(model, config, pictures, Path(folder))
            pace = Pace(view=view, picture=picture, start=start, views=views)
        record, shown = _recording(model, config, pictures, Path(folder))
    search, linkage = _clustering(config, num_points, device)
    scoring = _scoring(config, device)
    return Calibration(
        network=network,
        pace=pace,
        read_view=read_view,
        read_picture=read_picture,
        decode=decode,
        picture_bytes=bytes_per_picture(pictures.paths, config.data.reduce_to) if config.data.cache else 0.0,
        search=search,
        linkage=linkage,
        retrieval=scoring[0],
        kmeans=scoring[1],
        record=record,
        shown=shown,
        libraries=libraries,
    )


def measure_network(model: Embedder, config: Config) -> Network:
    """Count a network's bytes and operations; on the CPU, where it must be."""
    size = config.data.image_size
    parameters = [p for p in model.parameters() if p.requires_grad]
    images = torch.zeros(2, 3, size, size)
    model.eval()
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model(images)
    return Network(
        weights=_bytes(model.state_dict().values()),
        learned=_bytes(parameters),
        num_features=model.backbone.num_features,
        flops=counter.get_total_flops() / len(images),
        saved=_saved_for_backward(model, images) // len(images),
        widest=_widest(model, images) // len(images),
    )


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _saved_for_backward(model: Embedder, images: Tensor) -> int:
    """Return the bytes that autograd keeps, each storage once, beyond the parameters and the pictures."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers(), images)}
    # The tensors themselves, too, or a freed storage's address would be another's.
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(images)
    model.eval()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def _widest(model: Embedder, images: Tensor) -> int:
    """Return the bytes of the two largest outputs of a layer one after the other."""
    outputs: list[int] = []

    def note(_: Any, __: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            outputs.append(_bytes([output]))

    hooks = [module.register_forward_hook(note) for module in model.modules() if not list(module.children())]
    with torch.inference_mode():
        model(images)
    for hook in hooks:
        hook.remove()
    return max(map(sum, itertools.pairwise(outputs)))


def _seconds_each(transform: Callable[[Image.Image], Any], pictures: Pictures) -> float:
    start = time.perf_counter()
    for i in range(len(pictures)):
        transform(pictures.load(i))
    return (time.perf_counter() - start) / len(pictures)


def _embedding(model: Embedder, config: Config, pictures: Pictures) -> tuple[float, float]:
    """Return the seconds for a picture, and those until there is a first batch besides."""
    size = config.data.image_size
    few = torch.zeros(FEW, 3, size, size, device=model.device)
    with torch.inference_mode():
        model.features(few)
        seconds, _ = _timed(lambda: model.features(few), model.device)
    time_for = int(SECONDS_OF_EMBEDDING / 4 / seconds * FEW)
    batch = min(config.eval.batch_size, len(pictures), max(FEW, time_for))
    small = dataclasses.replace(config, eval=dataclasses.replace(config.eval, batch_size=batch))  # type: ignore[type-var]
    # Often enough the same ones: they are read anew each time.
    many = pictures.select(np.arange(40 * batch) % len(pictures))
    began = time.perf_counter()
    times: list[float] = []
    with contextlib.closing(embed_rounds(model, many, small, "calibrate", features=True)) as rounds:
        for _ in rounds:
            _finish(model.device)
            times.append(time.perf_counter() - began)
            if (len(times) > 3 and times[-1] > SECONDS_OF_EMBEDDING) or times[-1] > 2 * SECONDS_OF_EMBEDDING:
                break
    if len(times) == 1:
        return times[0] / batch, 0.0
    each = (times[-1] - times[0]) / (len(times) - 1)
    return each / batch, max(0.0, times[0] - each)


def _training(model: Embedder, config: Config, pictures: Pictures, folder: Path) -> tuple[float, int]:
    """Return the seconds of a step for a view, and the views in it: as many as there is time for."""
    views_of_cluster = config.mining.pictures_per_cluster * config.mining.num_views
    seconds = _steps(model, config, pictures, folder, 2 * views_of_cluster, 2)
    most = min(config.clusters_per_batch, len(pictures) // config.mining.pictures_per_cluster)
    clusters = min(most, int(SECONDS_OF_STEPS / 3 / seconds) // views_of_cluster)
    if clusters <= 2:
        return seconds, 2 * views_of_cluster
    views = clusters * views_of_cluster
    return _steps(model, config, pictures, folder, views, MOST_STEPS), views


def _steps(model: Embedder, config: Config, pictures: Pictures, folder: Path, views: int, num_steps: int) -> float:
    """Take some steps of so many views, and return the seconds for a view."""
    options = dataclasses.replace(config.train, global_batch_size=views, num_steps=10**6)  # type: ignore[type-var]
    small = dataclasses.replace(config, train=options)  # type: ignore[type-var]
    num_levels = len(config.hierarchy.cuts)
    state = TrainingState(model, Splits(train=pictures), small)
    state.levels = nested_levels(len(pictures), num_levels).to(model.device)
    loss = HierarchicalLoss(config.loss, num_levels, config.mining.num_views)
    times = []
    with contextlib.closing(batches_left(state, pictures)) as batches:
        for images, rows in itertools.islice(batches, num_steps):
            train_step(model, images, rows, state, loss, folder)
            _finish(model.device)
            times.append(time.perf_counter())
            if len(times) > 2 and times[-1] - times[0] > SECONDS_OF_STEPS:
                break
    # Without the first, for which the loader had to start.
    return (times[-1] - times[0]) / (len(times) - 1) / views


def _recording(model: Embedder, config: Config, pictures: Pictures, folder: Path) -> tuple[float, float]:
    """Return the seconds of drawing a hierarchy with a checkpoint, and of showing one picture."""
    levels = nested_levels(len(pictures), len(config.hierarchy.cuts))
    batch = np.arange(config.mining.pictures_per_cluster * 2).reshape(2, -1) % len(pictures)
    state = TrainingState(model, Splits(train=pictures), config)
    tree = average_linkage(clustered_points(len(pictures), 8, 0.0), geometry="cosine")
    (folder / "checkpoints").mkdir()
    began = time.perf_counter()
    with Reporter(folder, config) as report:
        report.hierarchy(0, show_hierarchy(0, tree, levels.numpy(), pictures, batch))
        state.save(folder, report.settle)
        record = time.perf_counter() - began
        shown, _ = _timed(lambda: _show(report, pictures), torch.device("cpu"))
    return record, shown / len(pictures)


def _show(report: Reporter, pictures: Pictures) -> None:
    images = torch.stack(thumbnails(pictures))
    report.embedding(0, torch.zeros(len(images), 2), ["picture"], [["x"]] * len(images), images)


def nested_levels(n: int, num_levels: int) -> Tensor:
    """Return levels ``[K, n]`` of clusters of 8, 32, 128, ... points."""
    return torch.stack([torch.arange(n) // (8 * 4**k) for k in range(num_levels)]).int()


def clustered_points(n: int, d: int, curvature: float) -> Tensor:
    """Return points of the ball ``[n, d]`` about as a trained network's: in clusters, and clusters of clusters."""
    generator = torch.Generator().manual_seed(n)
    few = torch.randn(max(2, n // 400), d, generator=generator)
    middle = few[torch.arange(max(2, n // 20)) % len(few)]
    middle = middle + 0.7 * torch.randn(middle.shape, generator=generator)
    rows = middle[torch.arange(n) % len(middle)]
    rows = rows + 0.5 * torch.randn(rows.shape, generator=generator)
    return poincare.exponential_map(2 * rows / rows.norm(dim=1, keepdim=True).mean(), curvature)


def _clustering(config: Config, num_points: int, device: torch.device) -> tuple[Growth, Growth]:
    """Return the growth of the search over the points, and of linkage over edges or points."""
    options = config.hierarchy
    space = Geometry(options.geometry, config.model.curvature)
    found: list[tuple[int, float]] = []
    linked: list[tuple[int, float]] = []
    # Few are nothing to a GPU, whose time would seem not to grow with them.
    many = max(8, min(num_points, POINTS_ON_GPU if device.type == "cuda" and options.mode == "graph" else POINTS))
    for n in (many // 4, many):
        points = space.points(clustered_points(n, config.model.embedding_dim, config.model.curvature).to(device))
        ids, k = torch.arange(n, device=device), min(options.num_neighbors, n - 1)
        if options.mode == "graph":
            seconds, neighbors = _timed(lambda: nearest_neighbors(points, ids, points, ids, k, space), device)  # noqa: B023
            found.append((n, seconds))
            seconds, _ = _timed(lambda: graph_linkage(*neighbors).join(), device)  # noqa: B023
            linked.append((round((n * options.num_neighbors) ** LINKAGE_GROWTH), seconds))
        else:
            seconds, _ = _timed(lambda: _of_all_pairs(points, config), device)  # noqa: B023
            linked.append((n, seconds))
    if options.mode == "graph":
        edges, seconds = linked[-1]
        return Growth.through(*found), Growth(seconds / edges, 0.0)
    return Growth(0.0, 0.0), Growth.through(*linked)


def _of_all_pairs(points: Tensor, config: Config) -> Dendrogram:
    options = config.hierarchy
    return average_linkage(points, mode=options.mode, geometry=options.geometry, curvature=config.model.curvature)


def _scoring(config: Config, device: torch.device) -> tuple[Growth, Growth]:
    """Return the growth of ranking and of k-means over the test pictures, for 1,000 coordinates.

    Both grow by the square: there are more classes where there are more pictures.
    """
    generator = torch.Generator().manual_seed(0)
    labels = np.arange(SCORED) // 12
    # Classes that overlap, as real ones do: k-means takes most of its rounds for them, and three for mere noise.
    centers = torch.randn(labels[-1] + 1, 250, generator=generator)
    rows = centers[torch.from_numpy(labels)] + 1.5 * torch.randn(SCORED, 250, generator=generator)
    embedded = Embedded(rows.to(device), labels)
    space = Geometry("cosine")
    ranking, _ = _timed(lambda: retrieval(embedded, None, space, config.eval.recall_at), device)
    kmeans, _ = _timed(lambda: kmeans_clusters(embedded, space, 0), device)
    return Growth(0.0, 4 * ranking / SCORED**2), Growth(0.0, 4 * kmeans / SCORED**2)


def _timed(work: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    if device.type == "cuda":
        work()  # the first time much is made that stays
        _finish(device)
    start = time.perf_counter()
    result = work()
    _finish(device)
    return time.perf_counter() - start, result


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def resident() -> int:
    """Return the bytes of host memory that this process holds."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except FileNotFoundError:  # on a Mac, which tells the most that there was
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def stand_ins(folder: Path) -> Pictures:
    """Write pictures that take about as long to read as photographs, where those of the run are not here."""
    random = np.random.default_rng(0)
    paths = []
    for i in range(STAND_INS):
        coarse = Image.fromarray(random.integers(0, 256, (24, 32, 3), dtype=np.uint8)).resize(STAND_IN_SIZE)
        path = folder / f"{i}.jpg"
        coarse.save(path, quality=90)
        paths.append(str(path))
    return Pictures(paths=tuple(paths))
