"""A trained network, taken out of its run to be used: loaded, put into files of vectors, exported."""

from uhml.trained.network import Trained, load_trained

__all__ = ["Trained", "load_trained"]
