"""The geometries of the hierarchy engine, all from one bilinear quantity.

For two points of the Poincaré ball of curvature ``-c`` the *gap* is

    gap(x, y) = |x - y|^2 w(x) w(y),    w(x) = 1 / (1 - c |x|^2),

and ``cosh(sqrt(c) d(x, y)) = 1 + 2 c gap(x, y)``: it is the Lorentz product of the points lifted to the hyperboloid,
less its constant. Expanding the square shows that it is bilinear in the *lift* ``(w, w |x|^2, w x)``: these are
light-cone coordinates of the usual lift ``x0 = (1 + c|x|^2) w, xs = 2 sqrt(c) w x``, better conditioned because
nothing cancels against the constant 1. Two things follow. The nearest neighbours of a point are the largest inner
products of lifted vectors, and the mean gap over all pairs of two clusters is the gap of their mean lifts.

With ``c = 0`` the gap is the squared Euclidean distance, and half of that, for unit vectors, is ``1 - cosine``; so
one code serves every geometry.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from uhml.errors import UserError, did_you_mean

GEOMETRIES = ("poincare", "cosine", "euclidean")

# Points nearer to the ball's edge than this are pulled back to it, as geoopt does for float64. There
# x0 = (1 + r^2) / (1 - r^2) is 1e5, so Lorentz products keep six digits after the point in float64.
EDGE = 1e-5
# Further outside than rounding can carry a point, it is no point of the ball.
OUTSIDE = 1e-3
# Of the square root of the greatest number there is: the squares of longer rows, or the sums of many, would be none.
LONGEST = 1e-3
# Rows that are float64 at a time.
ROWS_PER_BLOCK = 65536


@dataclass(frozen=True)
class Geometry:
    """How far apart two points are, as functions of their gap.

    Attributes:
        name: "poincare", "cosine" or "euclidean".
        curvature: c >= 0 of the ball of sectional curvature -c; used by "poincare" only, where 0 is its limit,
            twice the Euclidean distance.

    Raises:
        UserError: the name or the curvature is not one of these.
    """

    name: str
    curvature: float = 0.1

    def __post_init__(self) -> None:
        if self.name not in GEOMETRIES:
            raise UserError(
                f"geometry={self.name!r} is not one of {', '.join(GEOMETRIES)}.{did_you_mean(self.name, GEOMETRIES)}"
            )
        if not (math.isfinite(self.curvature) and self.curvature >= 0):
            raise UserError(f"curvature={self.curvature} must be a finite number, 0 or more (the ball curves by -c).")

    @property
    def c(self) -> float:
        """The c of the gap: the curvature in the ball, 0 in flat geometries."""
        return self.curvature if self.name == "poincare" else 0.0

    def distance(self, gap: Tensor) -> Tensor:
        """Return the distance at each gap: hyperbolic, ``1 - cosine`` or Euclidean."""
        if self.name == "cosine":
            return gap / 2
        if self.name == "euclidean":
            return gap.sqrt()
        if self.c == 0:
            return 2 * gap.sqrt()
        # arsinh is the best conditioned form: Möbius addition and artanh break first.
        return 2 / math.sqrt(self.c) * torch.asinh((self.c * gap).sqrt())

    @property
    def measure(self) -> str:
        """What the gap is, but for a factor, in the terms of the distance d."""
        if self.name == "cosine":
            return "1 - cosine"
        return "d²" if self.c == 0 else "cosh(√c d) - 1"

    def mean_dissimilarity(self, mean_gap: Tensor) -> Tensor:
        """Return the mean over pairs of what cluster sums can average, from the mean gap of the pairs.

        That is ``1 - cosine``, the squared Euclidean distance, or ``cosh(sqrt(c) d)``.
        """
        if self.name == "cosine":
            return mean_gap / 2
        if self.name == "euclidean":
            return mean_gap
        return 1 + 2 * self.c * mean_gap if self.c > 0 else 4 * mean_gap

    def points(self, embeddings: Tensor, row_numbers: range | None = None) -> Tensor:
        """Check embeddings and return them as this geometry's points.

        Args:
            embeddings: ``[n, d]`` of any floating type; for "poincare", points of the ball ``c|x|^2 < 1``.
            row_numbers: the rows' numbers as the user knows them, for messages; ``0 ... n - 1`` by default.

        Returns:
            ``[n, d]``, float64 if the embeddings are, else float32: unit vectors for "cosine", points pulled
            off the ball's edge (see EDGE) for "poincare".

        Raises:
            UserError: not a matrix of floats, or a row is not finite, too long to be squared, zero (cosine) or outside
                the ball.
        """
        if embeddings.ndim != 2 or embeddings.shape[1] == 0 or not embeddings.is_floating_point():
            raise UserError(
                f"Embeddings must be a matrix of floats, one row for each point; this is {embeddings.dtype} of "
                f"shape {tuple(embeddings.shape)}."
            )
        rows = embeddings.detach()
        if rows.dtype != torch.float64:
            rows = rows.float()

        def refuse(bad: Tensor, complaint: str) -> None:
            if bad.any():
                first = int(bad.nonzero()[0])
                number = first if row_numbers is None else row_numbers[first]
                raise UserError(f"Row {number} of the embeddings {complaint} ({int(bad.sum())} such rows in all).")

        # A sum is finite only if every term is, unless finite terms overflow: look twice only then.
        suspect = ~rows.sum(1, dtype=torch.float64).isfinite()
        if suspect.any():
            suspect[suspect.clone()] = ~rows[suspect].isfinite().all(1)
            refuse(suspect, "holds NaN or infinity: drop it or look for the fault that made it")
        norms = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
        is_flat = self.name == "euclidean" or (self.name == "poincare" and self.c == 0)
        # Of unit vectors the norms alone are squared, in float64.
        longest = LONGEST * math.sqrt(torch.finfo(rows.dtype if is_flat else norms.dtype).max)
        refuse(norms > longest, f"is longer than {longest:.1g}, so that squares of distances overflow: scale all rows")
        if is_flat:
            return rows
        if self.name == "cosine":
            refuse(norms == 0, "is zero and has no cosine with anything: drop it or use another geometry")
            # First by a power of two, which changes no digit: the norm of the longest rows is no float32.
            power = torch.exp2(-norms.log2().floor().clamp(-126, 126))[:, None]
            return rows * power.to(rows.dtype) / (norms[:, None] * power).to(rows.dtype)
        radius = math.sqrt(self.c) * norms
        refuse(
            radius > 1 + OUTSIDE,
            f"lies outside the ball of curvature -{self.c}, whose radius is {self.c**-0.5:.4g}: give points of the "
            "ball (not tangent vectors), or the curvature they were made with; for the features of any other network "
            "take the geometry cosine",
        )
        return rows * ((1 - EDGE) / radius).clamp(max=1)[:, None].to(rows.dtype)

    def weights(self, points: Tensor) -> Tensor:
        """Return ``w(x) = 1 / (1 - c|x|^2)`` of each point, ``[n]`` float64."""
        return torch.cat([1 / (1 - self.c * block.double().square().sum(1)) for block in points.split(ROWS_PER_BLOCK)])

    def gap(self, x: Tensor, y: Tensor, weights_x: Tensor, weights_y: Tensor) -> Tensor:
        """Return the gap of points, elementwise over the leading dimensions, in float64.

        Symmetric to the last bit and independent of how the points are blocked: what a tree is built on comes from
        here, never from a matrix product.
        """
        return (x.double() - y.double()).square().sum(-1) * (weights_x * weights_y)

    def lift(self, points: Tensor) -> Tensor:
        """Return ``[n, d + 2]`` lifted points ``(w, w|x|^2, w x)``, computed in float64, of the points' type."""
        lifted = points.new_empty(len(points), points.shape[1] + 2)
        for block, out in zip(points.split(ROWS_PER_BLOCK), lifted.split(ROWS_PER_BLOCK), strict=True):
            rows, weights = block.double(), self.weights(block)
            out[:, 0] = weights
            out[:, 1] = weights * rows.square().sum(1)
            out[:, 2:] = weights[:, None] * rows
        return lifted


def polar(lifted: Tensor) -> Tensor:
    """Return ``[n, d + 2]`` what to multiply lifted vectors with: ``polar(x) @ y.T`` are the gaps of x and y."""
    return torch.cat([lifted[:, 1:2], lifted[:, :1], -2 * lifted[:, 2:]], 1)
