"""A trained network, taken out of its run to be used: loaded, put into files of vectors, exported.

In a script::

    from uhml import poincare
    from uhml.trained import load_trained

    network = load_trained("runs/mine")
    points = network.embed(["a.jpg", "b.jpg"])  # [2, d], in the ball
    distances = poincare.distance_matrix(points, points, network.config.model.curvature)
"""

from uhml.trained.network import Trained, load_trained

__all__ = ["Trained", "load_trained"]
