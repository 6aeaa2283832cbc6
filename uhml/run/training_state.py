"""All that a run must keep to be the same run after an interruption."""

import dataclasses
import logging
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import uhml
from uhml import distributed
from uhml.config import Config, dump_config, parse_dump
from uhml.data.fingerprint import fingerprint, numbers
from uhml.data.pictures import Splits
from uhml.errors import UserError, known_everywhere
from uhml.metrics import Scores
from uhml.model import Embedder
from uhml.optim import build_optimizer, build_schedule
from uhml.run.bank import FeatureBank
from uhml.run.checkpoint import DamagedFile, read_file, save_checkpoint
from uhml.run.random_state import random_state, restore_random_state
from uhml.run.stepper import Stepper

logger = logging.getLogger(__name__)


class Pending(NamedTuple):
    """A clustering that is going on in the background: what it is of, from which it can be begun again.

    Attributes:
        step: at which the pictures were embedded.
        own: ``[len(share(n)), d]``, this rank's rows of the embedding.
    """

    step: int
    own: Tensor


CONTENTS: dict[str, Any] = {
    "step": int,
    "model": dict,
    "optimizer": dict,
    "schedule": dict,
    "levels": Tensor | None,
    "before": dict | None,
    "best": int | float,
    "recorded": dict,
    "seconds": int | float,
    "random_states": list,
    "pictures": list,
    "config": str,
    "versions": dict,
}
"""What a checkpoint holds, and of which type."""


class TrainingState:
    """The state of a run between two steps.

    Batches and augmentations are functions of seed and step, so the step is all there is to keep of them.

    Args:
        model: on this rank's device.
        splits: the pictures of the run.
        config: of the run.

    Attributes:
        optimizer: of the model's parameters.
        stepper: takes the optimizer's steps.
        schedule: of the optimizer's learning rate.
        step: steps taken.
        levels: ``[K, n]`` int32 on the model's device, what the steps learn from; None before the first clustering.
        pending: the clustering whose levels come next, while it is going on.
        features: the untrained backbone's, of this rank's share, for the first clustering; None after it, and where a
            run goes on before it, which makes them again.
        bank: the training pictures' features, see ``hierarchy.features``; None without, and before they are known.
        best: the greatest score on validation classes so far, see :func:`uhml.train.score_now`.
        before: scores before the first step; None until they are known, and where there is nothing to score.
        saved: the step of the newest checkpoint; None before the first.
    """

    def __init__(self, model: Embedder, splits: Splits, config: Config) -> None:
        self.model, self.config = model, config
        self.optimizer = build_optimizer(model, config.optim)
        self.stepper = Stepper(self.optimizer, model.device)
        self.schedule = build_schedule(self.optimizer, config.optim, config.train.num_steps)
        self.step = 0
        self.levels: Tensor | None = None
        self.pending: Pending | None = None
        self.features: Tensor | None = None
        self.bank: FeatureBank | None = None
        self.best = 0.0
        self.before: dict[str, Scores] | None = None
        self.saved: int | None = None
        self._started, self._seconds_before = time.monotonic(), 0.0
        self._pictures, self._num_pictures = fingerprint(splits), len(splits.train)

    @property
    def seconds(self) -> float:
        """How long the run has taken so far, over all its launches, without what was lost."""
        return self._seconds_before + time.monotonic() - self._started

    def save(self, run_dir: Path, settle: Callable[[], dict[str, int]]) -> None:
        """Write a checkpoint. A collective, which no signal interrupts.

        Args:
            run_dir: the folder of the run.
            settle: forces what is recorded to the disk and returns its files and their bytes; called on rank 0.

        Raises:
            UserError: the file cannot be written.
        """
        pending, bank = self.pending, self.bank
        of_ranks: dict[str, Any] = {
            "random_states": distributed.gather_objects(random_state()),
            "pending": None if pending is None else {"step": pending.step, "rows": self._all_rows(pending.own)},
            "bank": None if bank is None else self._all_rows(bank.own),
        }
        distributed.on_main(lambda: self._write(run_dir, settle(), of_ranks), interruptible=False)
        self.saved = self.step

    def _all_rows(self, own: Tensor) -> Tensor | None:
        return distributed.gather_shares_on_main(own, self._num_pictures)

    def _write(self, run_dir: Path, recorded: dict[str, int], of_ranks: dict[str, Any]) -> None:
        state = {
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "levels": self.levels,
            "before": None if self.before is None else {k: dataclasses.asdict(v) for k, v in self.before.items()},
            "best": self.best,
            "recorded": recorded,
            "seconds": self.seconds,
            **of_ranks,
            "pictures": self._pictures,
            "config": dump_config(self.config),
            "versions": _versions(),
        }
        save_checkpoint(run_dir / "checkpoints", self.step, state, self.config.train.keep_checkpoints)

    def load(self, saved: dict[str, Any]) -> None:
        """Take the state that :func:`read_state` read, and say what will not be bit for bit the same.

        Raises:
            UserError: it is of other pictures or of another network.
        """

        def refuse_other_pictures() -> None:
            if saved["pictures"] != self._pictures:
                raise UserError(
                    f"The run began with {numbers(saved['pictures'])} pictures, and there are "
                    f"{numbers(self._pictures)} now, or others: bring back the old ones, or begin anew with "
                    "--overwrite."
                )

        # Machines may see different ones.
        distributed.on_every_rank(refuse_other_pictures)
        hyperparameters = [{k: v for k, v in g.items() if k != "params"} for g in self.optimizer.param_groups]
        learning_rates = self.schedule.base_lrs
        try:
            self.model.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
        except (RuntimeError, ValueError) as e:
            reason = " ".join(str(e).split())[:300]
            raise known_everywhere(
                UserError(f"The run's checkpoint does not fit the model section of the config: {reason}")
            ) from e
        self.schedule.load_state_dict(saved["schedule"])
        # The file says where the run is; the config, which may have been changed, how it goes on from there.
        self.schedule.base_lrs = learning_rates
        for group, said, rate, factor in zip(
            self.optimizer.param_groups, hyperparameters, learning_rates, self.schedule.lr_lambdas, strict=True
        ):
            group.update(said, lr=rate * factor(self.schedule.last_epoch))

        self.step = self.saved = saved["step"]
        if parse_dump(saved["config"]).hierarchy == self.config.hierarchy and saved["levels"] is not None:
            self.levels = saved["levels"].to(self.model.device)
            if (pending := saved.get("pending")) is not None:
                self.pending = Pending(pending["step"], self._share(pending["rows"]))
        # Before the first step the bank is what the first clustering is of, rounded: it is made again instead.
        if self.step > 0 and saved.get("bank") is not None and self.config.hierarchy.features == "bank":
            self.bank = FeatureBank(self._share(saved["bank"]))
        self.best = saved["best"]
        if saved["before"] is not None:
            self.before = {name: Scores(**scores) for name, scores in saved["before"].items()}
            self._refuse_other_recall(self.before)
        self._started, self._seconds_before = time.monotonic(), saved["seconds"]
        if distributed.rank() < len(saved["random_states"]):
            restore_random_state(saved["random_states"][distributed.rank()])
        for difference in _differences(saved):
            logger.warning("%s, so from here on the run is no longer bit for bit the same.", difference)

    def _refuse_other_recall(self, before: dict[str, Scores]) -> None:
        """Refuse to end with scores that could not stand beside those before the first step."""
        known, now = [int(k) for k in next(iter(before.values())).recall_at_k], list(self.config.eval.recall_at)
        if known != now:
            raise known_everywhere(
                UserError(
                    f"eval.recall_at={now}: the run was scored at {known} before its first step, and goes on with that."
                    " Once it has finished, uhml evaluate scores it at any other."
                )
            )

    def _share(self, rows: Tensor) -> Tensor:
        return rows[torch.tensor(distributed.share(len(rows)), dtype=torch.long)].to(self.model.device)


def read_state(path: Path) -> dict[str, Any]:
    """Read a checkpoint on every rank. A collective.

    Raises:
        UserError: some rank cannot read it.
    """

    def read() -> dict[str, Any]:
        try:
            saved = read_file(path)
        except DamagedFile as e:
            raise UserError(f"{e}, though rank 0 can read it: is --run-dir a folder that all machines share?") from e
        odd = next((name for name, kind in CONTENTS.items() if not isinstance(saved.get(name, ...), kind)), None)
        if odd is not None:
            raise UserError(
                f"{path}: its {odd} is not what this version of uhml leaves there. Remove the file, and the run goes "
                "on from the checkpoint before; or begin anew with --overwrite."
            )
        return saved

    return distributed.on_every_rank(read)


def _versions() -> dict[str, str]:
    return {"uhml": uhml.__version__, "torch": str(torch.__version__), "python": platform.python_version()}


def _differences(saved: dict[str, Any]) -> Iterator[str]:
    before, now = len(saved["random_states"]), distributed.world_size()
    if before != now:
        yield f"{now} ranks go on where {before} stopped, and sum floating-point numbers in another order"
    for name, version in _versions().items():
        if saved["versions"][name] != version:
            yield f"{name} {version} goes on where {name} {saved['versions'][name]} stopped"
