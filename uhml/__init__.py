"""uhml: unsupervised hyperbolic metric learning, from a pile of pictures to an embedding and a hierarchy."""

__version__ = "0.1.0"
