"""The state of every generator of random numbers of this process.

uhml itself draws from none of them while it trains: batches and augmentations are functions of the seed. A backbone
may, with dropout.
"""

import random
from typing import Any

import numpy as np
import torch


def seed_generators(seed: int, rank: int) -> None:
    """Give each rank numbers of its own, the same in every run of this seed."""
    torch_seed, numpy_seed, python_seed = np.random.SeedSequence((seed, rank)).generate_state(3)
    torch.manual_seed(int(torch_seed))
    np.random.seed(int(numpy_seed))
    random.seed(int(python_seed))


def random_state() -> dict[str, Any]:
    """Return the state of Python's, NumPy's and torch's generators, on the CPU and this rank's GPU, as plain values."""
    kind, keys, *position = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (kind, keys.tolist(), *position),  # type: ignore[union-attr]
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Go back to what :func:`random_state` returned."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(state["cuda"])
