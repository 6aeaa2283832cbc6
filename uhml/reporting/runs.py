"""What runs have left about themselves, read back to be put side by side."""

import collections
import dataclasses
import itertools
import json
import logging
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

from omegaconf import OmegaConf
from pydantic import Field, TypeAdapter, ValidationError

from uhml.config import FREE_TO_CHANGE, unescaped
from uhml.errors import UserError, did_you_mean
from uhml.plain import Damaged, parse_yaml, read_json
from uhml.run.status import read_status

logger = logging.getLogger(__name__)

T = TypeVar("T")

SEED = "train.seed"
# Free to change, for a data set may be moved while a run is interrupted; in two runs it is likely another data set.
ROOT = "data.root"

Embedding = Literal["frozen", "start", "trained"]
"""What of a run has scores: see :class:`RunRecord`."""


class Curve(NamedTuple):
    """One figure over the steps."""

    steps: list[int]
    values: list[float]


@dataclasses.dataclass(frozen=True)
class Scored:
    """What a result says of one embedding, see :class:`uhml.metrics.Scores`."""

    recall_at_k: Annotated[dict[str, float], Field(min_length=1)]
    map_at_r: float
    nmi: float


@dataclasses.dataclass(frozen=True)
class Result:
    """What a finished run leaves in ``result.json``; no scores where no classes were known."""

    frozen: Scored | None = None
    start: Scored | None = None
    trained: Scored | None = None
    steps: int | None = None
    seconds: float | None = None


LINE = TypeAdapter(dict[str, str | int | float])


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """A run.

    Attributes:
        name: what the user calls it.
        settings: all keys of its config that matter, ``{"train.seed": 0}``.
        state: as in ``status.json``; "unfinished" where a run says nothing.
        step: steps taken.
        seconds: it took; None before it ended.
        frozen: scores of the frozen backbone by their names in ``metrics.jsonl``, "recall_at_1" first or another
            Recall@K; empty without labels.
        start: scores of the untrained embedding, by the ball's distance.
        trained: scores of the embedding, by the ball's distance, at the last step that was scored.
        recall: the first Recall@K of the embedding over the steps.
        loss: over the steps.
    """

    name: str
    settings: dict[str, Any]
    state: str
    step: int
    seconds: float | None
    frozen: dict[str, float]
    start: dict[str, float]
    trained: dict[str, float]
    recall: Curve
    loss: Curve


class NoRun(UserError):
    """There is something of the name that was given, but no run."""


def each_run(folders: Sequence[Path], read: Callable[[Path], T]) -> list[T]:
    """Read the runs in some folders. What holds none, or a damaged one, is passed over where there are others.

    So that ``runs/*`` may name it, too; it is told of.

    Raises:
        UserError: none of the folders holds a run that can be read, or one is not there.
    """
    found, error = [], None
    for folder in folders:
        try:
            found.append(read(folder))
        except (NoRun, Damaged) as e:
            error = e
            if len(folders) > 1:
                logger.warning("%s", e)
    if error is not None and not found:
        raise error
    return found


def no_such_run(folder: Path) -> UserError:
    """Return the error of a folder that is not there, with the one that may be meant."""
    siblings = [path.name for path in folder.absolute().parent.glob("*") if path.is_dir()]
    return UserError(f"There is no run {folder}.{did_you_mean(folder.name, siblings)}")


def read_run(folder: Path) -> RunRecord:
    """Read what a run has left so far.

    Raises:
        UserError: there is no run in the folder, or a file of it is damaged.
    """
    if not folder.exists():
        raise no_such_run(folder)
    if not (folder / "config.yaml").is_file() or not (folder / "metrics.jsonl").is_file():
        raise NoRun(f"{folder} holds no run: config.yaml or metrics.jsonl is missing.")
    records = _read_metrics(folder / "metrics.jsonl")
    status, result = read_status(folder), read_result(folder)
    scored = {kind: [r for r in records if r["kind"] == f"unseen_{kind}"] for kind in ("backbone", "ball")}
    trained = [record for record in records if record["kind"] == "train"]
    first_recall = next((key for record in scored["ball"] for key in record if key.startswith("recall_at_")), "")
    return RunRecord(
        name=str(folder),
        settings=_read_settings(folder / "config.yaml"),
        state="finished" if result is not None else "unfinished" if status is None else status.state,
        step=records[-1]["step"] if records else 0,
        seconds=None if result is None else result.seconds,
        frozen=_scores(scored["backbone"][:1]),
        start=_scores(scored["ball"][:1]),
        trained=_scores(scored["ball"][-1:]),
        recall=Curve([r["step"] for r in scored["ball"]], [r[first_recall] for r in scored["ball"]]),
        loss=Curve([r["step"] for r in trained], [r["loss"] for r in trained]),
    )


def differing_settings(runs: Sequence[RunRecord]) -> list[str]:
    """Return the keys that the runs do not agree on, but for those that change nothing of what is learned."""
    keys = dict.fromkeys(itertools.chain.from_iterable(run.settings for run in runs))
    return [key for key in keys if any(run.settings.get(key) != runs[0].settings.get(key) for run in runs[1:])]


def groups_of_seeds(runs: Sequence[RunRecord]) -> list[list[RunRecord]]:
    """Put together the runs that differ in ``train.seed`` and nothing else, in the order of the first of each.

    The same seed once more tells nothing of the spread over seeds: it begins a group of its own.
    """
    groups: dict[tuple[str, int], list[RunRecord]] = {}
    times: collections.Counter[str] = collections.Counter()
    for run in runs:
        others = {key: value for key, value in run.settings.items() if key != SEED}
        settings = json.dumps(run.settings, sort_keys=True)
        groups.setdefault((json.dumps(others, sort_keys=True), times[settings]), []).append(run)
        times[settings] += 1
    return list(groups.values())


class Spread(NamedTuple):
    """Mean and standard deviation over runs; the latter None for a single one."""

    mean: float
    deviation: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Return the spread of one value or more."""
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)

    def text(self, factor: float = 100) -> str:
        """Return "70.0 ± 1.2", by default in per cent."""
        mean = f"{factor * self.mean:.1f}"
        return mean if self.deviation is None else f"{mean} ± {factor * self.deviation:.1f}"


def spread(group: Sequence[RunRecord], score: str, kind: Embedding = "trained") -> Spread | None:
    """Return the spread of a score over the finished runs; None where none has it."""
    scores = [getattr(run, kind) for run in group if run.state == "finished"]
    values = [found[score] for found in scores if score in found]
    return Spread.of(values) if values else None


def _read_settings(path: Path) -> dict[str, Any]:
    # Not as strictly as a config that is to be used: an older run may have had other keys.
    try:
        sections = unescaped(OmegaConf.to_container(parse_yaml(path.read_text(encoding="utf-8"), str(path))))
    except (UserError, ValueError, OSError) as e:
        raise Damaged(f"{path} is damaged: {e}") from e
    if not isinstance(sections, dict) or not all(isinstance(keys, dict) for keys in sections.values()):
        raise Damaged(f"{path} is no config of a run.")
    settings = {f"{section!s}.{key}": value for section, keys in sections.items() for key, value in keys.items()}
    return {key: value for key, value in settings.items() if key not in FREE_TO_CHANGE - {ROOT}}


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    # What follows the last end of a line is being written just now.
    try:
        lines = [LINE.validate_json(line) for line in path.read_bytes().split(b"\n")[:-1]]
    except (ValidationError, OSError) as e:
        raise Damaged(f"{path} is damaged: a line of it is no record in JSON.") from e
    for line in lines:
        numbers = [value for key, value in line.items() if key != "kind"]
        if (
            not isinstance(line.get("kind"), str)
            or "step" not in line
            or any(isinstance(value, str) for value in numbers)
        ):
            raise Damaged(f"{path} is damaged: a line of it is no record of numbers.")
    return lines


def read_result(run_dir: Path) -> Result | None:
    """Return what a finished run has left in ``result.json``; None where it has not.

    Raises:
        Damaged: the file is not as it was written.
    """
    return read_json(run_dir / "result.json", Result)


def _scores(records: Sequence[dict[str, Any]]) -> dict[str, float]:
    return {key: value for record in records for key, value in record.items() if key not in ("kind", "step")}
