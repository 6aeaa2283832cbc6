"""What the commands that use a trained network share: their options, and the checks on them."""

import argparse
import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from omegaconf import OmegaConf

from uhml import distributed, interruption
from uhml.config import Config, dump_config, escaped, parse_config, unescaped
from uhml.errors import UserError, did_you_mean, known_everywhere
from uhml.plain import NO_YAML
from uhml.trained import Trained, load_trained

# What may differ from the run: which pictures, and how the machine is used.
FREE = ("data.", "eval.", "train.device")


def add_network_arguments(parser: argparse.ArgumentParser, examples: str) -> None:
    """Declare which network is meant, and the overrides of its run's config.

    Args:
        parser: of the command.
        examples: command lines to show, each indented by two spaces.
    """
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "examples:\n" + examples
    parser.add_argument(
        "run_folder", metavar="RUN", help="folder of a run, whose newest checkpoint is taken, or a checkpoint"
    )
    parser.add_argument(
        "overrides",
        metavar="key=value",
        nargs="*",
        default=[],
        help="overrides of the run's config: data.*, eval.* and train.device; with another data.dataset, the run's "
        "data.root and data.num_classes no longer hold",
    )


@contextlib.contextmanager
def opened(source: str, overrides: Sequence[str]) -> Iterator[Trained]:
    """Join the process group, if there is one, with the network of a run on this rank's device.

    Args:
        source: as for :func:`uhml.trained.load_trained`.
        overrides: of the run's config, as typed.

    Raises:
        UserError: no network there, or an override that is none or not free.
    """
    try:
        trained = load_trained(source)
        config = overridden(trained.config, overrides)
    except UserError as e:
        known_everywhere(e)  # as every rank looks at the same files
        raise
    with (
        interruption.handled(),
        distributed.process_group(config.train.device) as device,
        # As in training: otherwise the last digits of a picture depend on how many were embedded before it.
        torch.jit.optimized_execution(False),
        distributed.lost_ranks_told(),
    ):
        yield dataclasses.replace(trained, model=trained.model.to(device), config=config)


def overridden(config: Config, overrides: Sequence[str]) -> Config:
    """Return a run's config with other pictures or another device.

    Raises:
        UserError: an override is none, or of what belongs to the trained network.
    """
    for override in overrides:
        if "=" not in override:
            raise UserError(f"{override!r} is no override: write section.key=value, as in data.root=my/pictures.")
        if not override.startswith(FREE):
            raise UserError(
                f"{override}: the network is trained, and only data.*, eval.* and train.device can differ from its run."
                f"{did_you_mean(override.partition('=')[0], ('train.device', 'data.root', 'data.dataset'))}"
            )
    merged = OmegaConf.create(dump_config(config))
    try:
        # Of the user's words alone: a stranger's checkpoint is not to read this environment.
        typed = OmegaConf.to_container(OmegaConf.from_dotlist(list(overrides)), resolve=True)
        changes: Any = OmegaConf.create(escaped(typed))
        if OmegaConf.select(changes, "data.dataset", default=config.data.dataset) != config.data.dataset:
            merged.data.root, merged.data.num_classes = None, None
        raw = unescaped(OmegaConf.to_container(OmegaConf.merge(merged, changes)))
    except NO_YAML as e:
        raise UserError(f"The overrides are no valid YAML: {' '.join(str(e).split())}") from e
    return parse_config(cast(dict[Any, Any], raw), "the run's config")
