"""The Poincaré ball of curvature -c: { x : c |x|² < 1 }. Flat space is the limit c = 0, and allowed everywhere.

The distance between all pairs is our own: geoopt's goes by Möbius addition and artanh, which loses float32 digits first
where points lie close together or near the edge; the arsinh form keeps them. So is the exponential map at the origin:
geoopt looks at the curvature on the device to choose a formula, for which each training step would wait for its GPU.
"""

import math
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    import geoopt


def ball(curvature: float) -> "geoopt.PoincareBall":
    """Return geoopt's ball of sectional curvature ``-curvature``, without weights."""
    with warnings.catch_warnings():
        # Its functions are torch's scripts, which torch deprecates. With what it brings it takes a second to import.
        warnings.filterwarnings("ignore", message=".*torch.jit.script.* is deprecated")
        import geoopt
    # In float64, for geoopt keeps log(exp(c) - 1), where float32 loses a small c: 1e-6 would be 5 % off.
    fixed = geoopt.PoincareBall(c=torch.tensor(curvature, dtype=torch.float64))
    # And it keeps it as a parameter. In a network's weights it would come along with model.init_from, and
    # the exponential map would be another ball's than the distances.
    for name, value in list(fixed.named_parameters()):
        delattr(fixed, name)
        fixed.register_buffer(name, value.detach().float(), persistent=False)
    return fixed


def exponential_map(tangent: Tensor, curvature: float) -> Tensor:
    """Map tangent vectors at the origin ``[n, d]`` to points of the ball: ``v tanh(sqrt(c) |v|) / (sqrt(c) |v|)``.

    Vectors must not be so long that floats reach the edge; those of the head are clipped.
    """
    if curvature == 0:
        return tangent
    length = math.sqrt(curvature) * tangent.norm(dim=-1, keepdim=True).clamp_min(1e-15)
    return tangent * (length.tanh() / length)


class _EuclideanDistances(torch.autograd.Function):
    """``|x_i - y_j|`` with a gradient by two matrix products: torch's own makes a tensor ``[n, m, d]`` on GPUs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        # Not by the matrix product |x|² + |y|² - 2xy, which cancels for close points, the very pairs that matter.
        distances = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
        ctx.save_for_backward(x, y, distances)
        return distances

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, y, distances = ctx.saved_tensors
        weights = torch.where(distances > 0, gradient / distances, 0)
        return (
            x * weights.sum(1)[:, None] - weights @ y,
            y * weights.sum(0)[:, None] - weights.T @ x,
        )


def distance_matrix(x: Tensor, y: Tensor, curvature: float) -> Tensor:
    """Distances in the ball between all points of two sets, differentiable, with gradient 0 where points coincide.

    ``d(x, y) = 2/sqrt(c) arsinh( sqrt(c) |x-y| / sqrt((1 - c|x|²)(1 - c|y|²)) )``, and ``2 |x-y|`` for c = 0.

    Args:
        x: ``[n, d]``, points of the ball.
        y: ``[m, d]``, points of the ball.
        curvature: c >= 0.

    Returns:
        ``[n, m]``, in units of length of the ball.
    """
    euclidean = _EuclideanDistances.apply(x, y)
    if curvature == 0:
        return 2 * euclidean
    root = math.sqrt(curvature)
    shrink_x = (1 - curvature * x.square().sum(-1)).sqrt()
    shrink_y = (1 - curvature * y.square().sum(-1)).sqrt()
    return 2 / root * torch.asinh(root * euclidean / (shrink_x[:, None] * shrink_y[None, :]))


def tangent_norm(points: Tensor, curvature: float) -> Tensor:
    """Return ``|v|`` of the tangent vectors at the origin that the points ``[n, d]`` are the exponentials of, ``[n]``.

    It is half of the distance to the origin.
    """
    norm = points.norm(dim=-1)
    root = math.sqrt(curvature)
    return torch.atanh((root * norm).clamp_max(1 - 1e-7)) / root if curvature > 0 else norm
