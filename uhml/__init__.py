"""uhml: unsupervised hyperbolic metric learning, from a pile of pictures to an embedding and a hierarchy."""

import os

# A thread that waits for the others of a parallel loop shall soon sleep, not spin. Where loader processes, other ranks
# or other users share the cores, spinning made training steps seven times slower, and embedding fifty times. GNU's
# OpenMP may spin for some microseconds first: runs are 5 % faster than without. Read when torch is imported.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

__version__ = "0.1.0"
