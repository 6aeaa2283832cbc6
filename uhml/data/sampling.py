"""Some of many, evenly chosen."""

import numpy as np
from numpy.typing import NDArray


def evenly(num_items: int, num_chosen: int) -> NDArray[np.int64]:
    """Return the places of at most so many items, the first and the last and evenly between, rising."""
    return np.unique(np.linspace(0, num_items - 1, min(num_items, num_chosen)).astype(np.int64))
