"""What a run costs, as plain arithmetic on counts, sizes and speeds. Bytes, seconds and numbers, nothing measured here.

``n`` pictures are trained on by ``R`` ranks; a global batch has ``B`` views, ``b = B / R`` of them on each rank.
"""

import dataclasses
import math

from uhml.config import Config
from uhml.data.loading import PREFETCHED
from uhml.hierarchy.dense import dense_memory
from uhml.hierarchy.exact import exact_memory
from uhml.hierarchy.graph import graph_memory
from uhml.hierarchy.knn import search_memory
from uhml.hierarchy.linkage import GATHER_UP_TO, left_whole
from uhml.loss import PAIRS_AT_ONCE
from uhml.metrics import BLOCK_BYTES
from uhml.model import projected_dim
from uhml.model.head import ROWS_AT_ONCE
from uhml.reporting.figures import THUMBNAIL
from uhml.reporting.projector import MOST
from uhml.run.reclustering import reclusters_at

HALF, FLOAT, DOUBLE, INT = 2, 4, 8, 8
# Copies of all thumbnails as floats that torch makes of them on the way to one image.
SPRITES = 7
# Bytes of a picture's path as a Python string of some 70 letters, and of what points to it.
NAME = 130
# Approximate search against exact search of a million points, and how it grows: tests/benchmarks/hierarchy.py.
APPROXIMATE_GAIN_AT_MILLION = 37
APPROXIMATE_GROWTH = 1.5
# Of approximate search, the part that every rank does for all points: the cells.
APPROXIMATE_BUILD = 0.1
# Of linkage on a graph, over the number of its edges: rounds become more, caches fail.
LINKAGE_GROWTH = 1.25


@dataclasses.dataclass(frozen=True, kw_only=True)
class Network:
    """A network in numbers.

    Attributes:
        weights: bytes of all parameters and buffers.
        learned: bytes of the parameters that get a gradient.
        num_features: of the backbone.
        flops: operations of one picture's forward pass.
        saved: bytes that a forward pass in training keeps of one picture for the backward pass.
        widest: bytes of one picture's two largest tensors in a row, of which a forward pass without gradient has no
            more at a time.
    """

    weights: int
    learned: int
    num_features: int
    flops: float
    saved: int
    widest: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """How many pictures there are: n to train on, and those to score on, 0 where no classes are known."""

    train: int
    test: int = 0
    gallery: int = 0

    @property
    def scored(self) -> int:
        """Pictures that an evaluation embeds."""
        return self.test + self.gallery


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ranks:
    """How the run is spread."""

    nodes: int
    per_node: int

    @property
    def world_size(self) -> int:
        """R."""
        return self.nodes * self.per_node


@dataclasses.dataclass(frozen=True)
class Growth:
    """Seconds of some work on n points: ``linear n + square n²``."""

    linear: float
    square: float

    def __call__(self, n: float) -> float:
        """Return the seconds."""
        return self.linear * n + self.square * n * n

    @classmethod
    def through(cls, few: tuple[int, float], many: tuple[int, float]) -> "Growth":
        """Return the growth that two measurements, points and seconds, lie on; none of its terms is negative."""
        (a, s), (b, t) = few, many
        square = min(max(0.0, (t / b - s / a) / (b - a)), t / b**2) if b > a else t / b**2
        return cls(t / b - square * b, square)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Speed:
    """Seconds on the machine that is planned for.

    Attributes:
        view: of a training step, for one view, on a whole node with all that reads its pictures.
        picture: of embedding one picture, likewise.
        checked: of decoding one picture once, likewise.
        start: until the first batch of a loader is there, besides.
        exchange: of a training step, what its exchange of gradients adds.
        search: exact search of n queries among n points, on one rank.
        linkage: of the graph's edges, or of the points in another mode, on rank 0.
        retrieval: of n test pictures, for 1,000 coordinates, on one rank.
        kmeans: of n test pictures, for 1,000 coordinates, on rank 0.
        disk: bytes per second that it writes, and not a time.
        record: drawing a hierarchy for TensorBoard, and a small checkpoint.
        shown: showing one picture in TensorBoard's projector.
    """

    view: float
    picture: float
    checked: float
    start: float
    exchange: float
    search: Growth
    linkage: Growth
    retrieval: Growth
    kmeans: Growth
    disk: float
    record: float
    shown: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seconds:
    """Of a whole run, part by part."""

    reading: float
    steps: float
    embedding: float
    search: float
    linkage: float
    recording: float
    evaluation: float

    @property
    def total(self) -> float:
        """Of all parts."""
        return sum(dataclasses.astuple(self))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one rank: what stays, and what each phase of the run takes besides.

    Attributes:
        reused: whether a phase works with what another has given back, as GPUs' allocator has it. On the host the C
            library keeps what the many tensors of a step took, and takes more for the few large ones of other phases.
    """

    network: int
    step: int
    embedding: int
    clustering: int
    evaluation: int
    reused: bool

    @property
    def greatest(self) -> str:
        """Name of the phase that takes most besides what stays."""
        return max(("step", "embedding", "clustering", "evaluation"), key=lambda name: getattr(self, name))

    @property
    def peak(self) -> int:
        """At the worst moment."""
        others = max(self.embedding, self.clustering, self.evaluation)
        return self.network + (max(self.step, others) if self.reused else self.step + others)


def num_hierarchies(config: Config) -> int:
    """Return how often the pictures are clustered: at every so many steps, if any step learns of it, and at the end."""
    steps = range(0, config.train.num_steps, config.hierarchy.recluster_every)
    return sum(step == 0 or reclusters_at(step, config) for step in steps) + 1


def num_overlapped(config: Config) -> int:
    """Return how many of the clusterings go on while steps are taken: not the first, and not the last."""
    return max(0, num_hierarchies(config) - 2) if config.hierarchy.overlap_steps else 0


def num_passes(config: Config) -> int:
    """Return how often the training pictures go through the network: for the first and last clustering, or for each."""
    return min(2, num_hierarchies(config)) if config.hierarchy.features == "bank" else num_hierarchies(config)


def num_evaluations(config: Config) -> int:
    """Return how often the network is scored: before the first step, after the last, and in between if asked for."""
    between = max(0, num_hierarchies(config) - 2) if config.eval.at_reclustering else 0
    return 2 + between


def num_checkpoints(config: Config) -> int:
    """Return how often a checkpoint is written, at most: for each clustering, and every so many steps."""
    # With a projector once more after each pass, with the head that is fitted anew.
    refitted = num_passes(config) if config.model.projector else 0
    return num_hierarchies(config) + refitted + config.train.num_steps // config.train.checkpoint_every + 2


def seconds_of_search(config: Config, n: int, ranks: Ranks, exact: Growth) -> float:
    """Return the seconds of finding the neighbours of all points: exactly, or in cells where there are many."""
    world = ranks.world_size
    if config.hierarchy.mode != "graph":
        return 0.0
    if n <= config.hierarchy.exact_search_up_to:
        return exact(n) / world
    at_million = exact(10**6) / APPROXIMATE_GAIN_AT_MILLION
    if gathers(config, n):
        return at_million * (n / 10**6) ** APPROXIMATE_GROWTH * (APPROXIMATE_BUILD + (1 - APPROXIMATE_BUILD) / world)
    # Every rank's share is searched by all ranks in turn.
    return world * at_million * (n / world / 10**6) ** APPROXIMATE_GROWTH


def gathers(config: Config, n: int) -> bool:
    """Return whether every rank holds all points in the search, instead of passing shares round."""
    return n * config.model.embedding_dim * FLOAT <= GATHER_UP_TO


def seconds(config: Config, sizes: Sizes, ranks: Ranks, network: Network, speed: Speed) -> Seconds:
    """Return what a run takes."""
    n, options = sizes.train, config.hierarchy
    hierarchies, evaluations = num_hierarchies(config), num_evaluations(config) if sizes.test else 0
    embedding = num_passes(config) * (n / ranks.nodes * speed.picture + speed.start)
    checkpoint, tree = disk(config, sizes, network)
    written = num_checkpoints(config) * checkpoint + hierarchies * tree
    linked = n
    if options.mode == "graph":
        linked = round((n * options.num_neighbors) ** LINKAGE_GROWTH)
    step, overlapped = seconds_of_step(config, ranks, speed), num_overlapped(config)
    # What goes on beside the steps is waited for only where it takes longer than they do.
    waited = max(0.0, speed.linkage(linked) - options.overlap_steps * step)
    coordinates = (network.num_features + 2 * config.model.embedding_dim) / 1000
    scoring = speed.retrieval(sizes.test) / ranks.world_size + speed.kmeans(sizes.test)
    parts = 1 + (sizes.gallery > 0)
    evaluation = sizes.scored / ranks.nodes * speed.picture + parts * speed.start + coordinates * scoring
    return Seconds(
        reading=(n + sizes.scored) / ranks.nodes * speed.checked,
        steps=config.train.num_steps * step + (hierarchies - 1) * speed.start,
        embedding=embedding,
        # On one rank without a GPU it goes on beside the steps, too, but takes their cores.
        search=hierarchies * seconds_of_search(config, n, ranks, speed.search),
        linkage=(hierarchies - overlapped) * speed.linkage(linked) + overlapped * waited,
        recording=(hierarchies - overlapped) * speed.record + written / speed.disk,
        evaluation=evaluations * evaluation
        + speed.start
        + min(MOST, sizes.test or n) * (speed.picture / ranks.nodes + speed.shown),
    )


def seconds_of_step(config: Config, ranks: Ranks, speed: Speed) -> float:
    """Return the seconds of one training step."""
    return config.train.global_batch_size / ranks.nodes * speed.view + speed.exchange


def memory(config: Config, sizes: Sizes, ranks: Ranks, network: Network, *, rank: int, on_gpu: bool) -> Memory:
    """Return the bytes that a rank takes on the device it computes on, beyond its libraries."""
    world, options = ranks.world_size, config.hierarchy
    n, own = sizes.train, math.ceil(sizes.train / world)
    width, d = network.num_features, config.model.embedding_dim
    batch, global_batch = config.train.global_batch_size // world, config.train.global_batch_size
    picture = 3 * config.data.image_size**2 * FLOAT
    num_levels = len(options.cuts) + 1
    # AdamW keeps two moments of each parameter; data parallelism a copy of the gradients in buckets.
    kept = network.weights + 3 * network.learned + (network.learned if world > 1 else 0) + len(options.cuts) * n * FLOAT
    if options.features == "bank":
        kept += (own + 1) * width * HALF
    if options.overlap_steps:
        kept += own * d * FLOAT
    micro_batch = min(batch, config.train.micro_batch_size or batch)
    pairs = min(batch, max(1, PAIRS_AT_ONCE // global_batch)) * global_batch
    # Pictures, what one pass of the network keeps of them, and the loss of the pairs that are compared at once.
    step = batch * picture + micro_batch * (network.saved + network.widest) + (4 * num_levels + 20) * pairs * FLOAT
    forward = config.eval.batch_size * (network.widest + picture)
    # Rows, and some of them in float64 for the head.
    features = own * width * FLOAT + min(own, ROWS_AT_ONCE) * width * 3 * DOUBLE
    embedding = own * width * FLOAT + forward
    clustering = max(features, own * width * FLOAT + own * d * FLOAT + _clustering(config, n, own, rank))
    scored = sizes.scored * width
    # The first one holds the training pictures' features as well, for the first clustering.
    held = own * width * FLOAT if config.model.init_from is None else 0
    evaluation = held + max(
        sizes.test * width * FLOAT + forward,
        # Rows, their points and their lift in float64; then a block of gaps with its keys, sorted and not.
        scored * (FLOAT + 3 * DOUBLE) + 6 * min(BLOCK_BYTES, sizes.test * (sizes.gallery or sizes.test) * DOUBLE),
    )
    if rank == 0 and not on_gpu:
        evaluation = max(evaluation, projected(sizes))
    return Memory(
        network=kept, step=step, embedding=embedding, clustering=clustering, evaluation=evaluation, reused=on_gpu
    )


def listed(config: Config, sizes: Sizes) -> int:
    """Return the bytes of every rank's host memory for the pictures' names, and for their order in clusters."""
    return (sizes.train + sizes.scored) * NAME + sizes.train * (INT + 4 * len(config.hierarchy.cuts))


def projected(sizes: Sizes) -> int:
    """Return the bytes that TensorBoard's projector takes on rank 0's host.

    Thumbnails come and are put together as bytes; divided, made floats and laid out as one image, some times over.
    """
    return min(MOST, sizes.test or sizes.train) * 3 * THUMBNAIL**2 * (2 + SPRITES * FLOAT)


def _clustering(config: Config, n: int, own: int, rank: int) -> int:
    options, d = config.hierarchy, config.model.embedding_dim
    if options.mode == "graph":
        searched = n if gathers(config, n) else 2 * own
        search = search_memory(own, searched, d, options.num_neighbors, FLOAT)
        edges = graph_memory(n, options.num_neighbors) if rank == 0 else 12 * n * options.num_neighbors
        return searched * d * FLOAT + search + edges
    if rank > 0:
        return 0
    return n * d * DOUBLE + (exact_memory(n, d) if options.mode == "exact" else dense_memory(n))


def background(config: Config, n: int, ranks: Ranks, *, on_gpu: bool) -> int:
    """Return the bytes that the process beside rank 0 takes of the host, beyond its libraries; 0 if there is none."""
    options, d = config.hierarchy, config.model.embedding_dim
    if not options.overlap_steps:
        return 0
    if options.mode == "graph":
        whole = left_whole(ranks.world_size, "cuda" if on_gpu else "cpu")
        search = search_memory(n, n, d, options.num_neighbors, FLOAT) if whole else 0
        return n * d * FLOAT + search + graph_memory(n, options.num_neighbors)
    return n * d * DOUBLE + (exact_memory(n, d) if options.mode == "exact" else dense_memory(n))


def batches_in_flight(config: Config, ranks: Ranks) -> int:
    """Return the bytes of shared memory that the loaders of one node hold ready."""
    batch = config.train.global_batch_size // ranks.world_size
    picture = 3 * config.data.image_size**2 * FLOAT
    return ranks.per_node * config.data.num_workers * PREFETCHED * batch * picture


def wire_per_step(config: Config, ranks: Ranks, network: Network) -> tuple[int, int]:
    """Return the bytes that a rank sends in one step, and the least possible.

    All goes round in rings: of R parts of a sum each is sent on 2 (R - 1) times, of R parts that are gathered R - 1
    times. The least is the gradients and, of each of B views, d coordinates and a number.
    """
    world, views = ranks.world_size, config.train.global_batch_size
    d = projected_dim(network.num_features) if config.model.projector else config.model.embedding_dim
    gathered = views * (d + 1) * FLOAT
    # Besides the gradients, those of the points; then two sums and a word whether all are well.
    summed = network.learned + views * d * FLOAT + 2 * FLOAT + INT
    features = views * network.num_features * HALF if config.hierarchy.features == "bank" else 0

    def sent(summed: int, gathered: int) -> int:
        return (2 * summed + gathered) * (world - 1) // world

    return sent(summed, gathered + features), sent(network.learned, gathered)


def seconds_of_exchange(bytes_of_rank: int, ranks: Ranks, link: float, node_network: float) -> float:
    """Return the seconds of an all-reduce in a ring, at the slower of the links in a node and between nodes."""
    world = ranks.world_size
    if world == 1:
        return 0.0
    slowest = min(link, node_network) if ranks.nodes > 1 else link
    return 2 * (world - 1) / world * bytes_of_rank / slowest


def disk(config: Config, sizes: Sizes, network: Network) -> tuple[int, int]:
    """Return the bytes of one checkpoint and of one hierarchy. Trees have four numbers of eight bytes for a merge.

    Of the checkpoint with most in it: while a clustering goes on, what it is of belongs to it.
    """
    n, options = sizes.train, config.hierarchy
    tree = (n - 1) * 4 * DOUBLE
    levels = len(options.cuts) * n * 4
    bank = n * network.num_features * HALF if options.features == "bank" else 0
    pending = n * config.model.embedding_dim * FLOAT if options.overlap_steps else 0
    return network.weights + 2 * network.learned + levels + bank + pending, tree


def num_kept(config: Config) -> int:
    """Return how many checkpoints lie on the disk at once: those kept, one being written, and the best."""
    best = int(config.data.score_on == "validation")
    return min(config.train.keep_checkpoints, num_checkpoints(config)) + 1 + best
