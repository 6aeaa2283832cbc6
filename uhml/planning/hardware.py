"""Machines to plan for: what their makers state, and which share of it is assumed to be had."""

import dataclasses

GB = 10**9
TERA = 10**12


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A GPU by its data sheet: dense arithmetic, without sparsity.

    Attributes:
        bfloat16: operations per second.
        float32: likewise, on the ordinary units (not TF32).
        float64: likewise.
        memory: bytes.
        bandwidth: bytes per second of its memory.
        link: bytes per second to each other GPU of its node.
    """

    bfloat16: float
    float32: float
    float64: float
    memory: float
    bandwidth: float
    link: float


GPUS = {
    "b200": Gpu(2250 * TERA, 75 * TERA, 37 * TERA, 180 * GB, 8.0 * TERA, 900 * GB),
    "h200": Gpu(989 * TERA, 67 * TERA, 34 * TERA, 141 * GB, 4.8 * TERA, 450 * GB),
    "h100": Gpu(989 * TERA, 67 * TERA, 34 * TERA, 80 * GB, 3.35 * TERA, 450 * GB),
    "a100": Gpu(312 * TERA, 19.5 * TERA, 9.7 * TERA, 80 * GB, 2.0 * TERA, 300 * GB),
    "l40s": Gpu(362 * TERA, 91.6 * TERA, 1.4 * TERA, 48 * GB, 0.864 * TERA, 32 * GB),
    "a10": Gpu(125 * TERA, 31.2 * TERA, 0.5 * TERA, 24 * GB, 0.6 * TERA, 32 * GB),
    "l4": Gpu(121 * TERA, 30.3 * TERA, 0.5 * TERA, 24 * GB, 0.3 * TERA, 32 * GB),
}
"""SXM modules where there are such."""

ARITHMETIC_SHARE = 0.35
"""Of the stated operations per second, what a backbone's convolutions and products are assumed to reach."""
BANDWIDTH_SHARE = 0.6
"""Of the stated bandwidth, likewise."""
NODE_NETWORK = 25 * GB
"""Bytes per second between two nodes, for all ranks of a node together: 200 Gbit/s."""
MEMORY_SHARE = 0.92
"""Of a GPU's memory, what is left for a run beside the driver and the allocator's gaps."""
TRAFFIC = 6
"""How often a byte that is kept for the backward pass is moved: written and read forwards, read backwards, and its
gradient written and read, with something in between. Networks of thin layers are bound by this, not by arithmetic."""
GLOO = 2 * GB
"""Bytes per second between two processes of one node without GPUs."""
WORKER = 150 * 10**6
"""Bytes of its own that a process has which reads pictures."""
CUDA_HOST = 2 * GB
"""Bytes of host memory that CUDA and its libraries take in each process."""
DISK = GB / 2
"""Bytes per second that are written to the folder of the run."""
LOADER_START = 1.0
"""Seconds until the processes that read pictures have a first batch."""
