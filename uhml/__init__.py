"""uhml: unsupervised hyperbolic metric learning, from a pile of pictures to an embedding and a hierarchy."""

import os

# A thread that waits for the others of a parallel loop shall sleep, not spin. Where loader processes, other ranks or
# other users share the cores, spinning made training steps seven times slower. Read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__version__ = "0.1.0"
