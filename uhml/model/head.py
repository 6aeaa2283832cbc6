"""The hyperbolic head: linear layer, feature clip, exponential map into the Poincaré ball."""

import dataclasses
import logging
from collections.abc import Callable

import scipy.linalg
import torch
from torch import Tensor, nn

from uhml import distributed, poincare
from uhml.environment import one_thread_of_openblas
from uhml.errors import UserError, known_everywhere

logger = logging.getLogger(__name__)

ROWS_AT_ONCE = 2**13
"""Of a whole data set's features, so many are worked on at a time: what that takes besides does not grow with it."""
COLUMNS_AT_ONCE = 256
"""Of the products of all pairs of columns, so many rows at a time: fewer would be less work, but slower."""


@dataclasses.dataclass(frozen=True)
class FeatureMoments:
    """Mean and covariance of the training pictures' features, over all ranks.

    Attributes:
        mean: ``[num_features]``, float64.
        covariance: ``[num_features, num_features]``, float64.
        num_pictures: pictures they were taken over.
    """

    mean: Tensor
    covariance: Tensor
    num_pictures: int

    @classmethod
    def over_ranks(cls, own_features: Tensor, layer: Callable[[Tensor], Tensor] | None = None) -> "FeatureMoments":
        """Take the moments over every rank's ``[n, num_features]``. A collective: sums travel, not features.

        Args:
            own_features: this rank's.
            layer: take those of what it makes of them, row by row.

        Raises:
            UserError: a feature is not finite.
        """
        count = distributed.all_reduce_sum(torch.tensor(float(len(own_features)), device=own_features.device))
        through = layer or torch.nn.Identity()
        mean = distributed.all_reduce_sum(_added_up(own_features, lambda rows: through(rows).double().sum(0))) / count

        def products(rows: Tensor) -> Tensor:
            return _gram(through(rows).double() - mean)

        covariance = distributed.all_reduce_sum(_added_up(own_features, products)) / count
        if not (mean.isfinite().all() and covariance.isfinite().all()):
            raise known_everywhere(
                UserError(
                    "The backbone's features hold NaN or infinity: look for the fault in its weights, "
                    "or lower optim.learning_rate if training made them so."
                )
            )
        return cls(mean, covariance, int(count))


def _gram(rows: Tensor) -> Tensor:
    """Return ``rowsᵀ rows``, symmetric, of which what lies below the diagonal's blocks is not multiplied again."""
    gram = rows.new_empty(rows.shape[1], rows.shape[1])
    for start in range(0, len(gram), COLUMNS_AT_ONCE):
        block = slice(start, start + COLUMNS_AT_ONCE)
        products = rows[:, block].T @ rows[:, start:]
        gram[block, start:], gram[start:, block] = products, products.T
    return gram


def _added_up(features: Tensor, work: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the sum of what ``work`` makes of blocks of rows."""
    first, *others = features.split(ROWS_AT_ONCE)
    total = work(first)
    for block in others:
        total += work(block)
    return total


class HyperbolicHead(nn.Module):
    """``z = exp_0( clip_r( scale · (W (f - mean) + b) ) )``, in float32 whatever the backbone computes in.

    The clip ``v · r tanh(|v|/r) / |v|`` is a smooth form of Guo et al.'s ``v · min(1, r/|v|)`` (CVPR 2022), which all
    points soon lie on, equally long and with no gradient back. ``mean`` and ``scale`` are constants beside the weights,
    fitted with them: what all pictures' features have in common would otherwise turn Adam's first small steps into one
    large step of the whole cloud, and weights that carry the scale would be lost in them.

    Args:
        num_features: of the backbone.
        embedding_dim: dimensions of the ball.
        curvature: c >= 0; with 0 the exponential map is the identity.
        clip_radius: r > 0.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, num_features: int, embedding_dim: int, curvature: float, clip_radius: float) -> None:
        super().__init__()
        self.linear = nn.Linear(num_features, embedding_dim)
        nn.init.zeros_(self.linear.bias)
        self.register_buffer("mean", torch.zeros(num_features))
        self.register_buffer("scale", torch.ones(()))
        self.curvature, self.clip_radius = curvature, clip_radius
        self._axes_told = embedding_dim

    def forward(self, features: Tensor) -> Tensor:
        """Map features ``[b, num_features]`` to points of the ball ``[b, embedding_dim]``, float32."""
        if len(features) > ROWS_AT_ONCE:
            return torch.cat([self(rows) for rows in features.split(ROWS_AT_ONCE)])
        with torch.autocast(features.device.type, enabled=False):
            return poincare.exponential_map(self.clip(self.tangent(features)), self.curvature)

    def tangent(self, features: Tensor) -> Tensor:
        """Return the tangent vectors at the origin before the clip, ``[b, embedding_dim]``."""
        return self.scale * self.linear(features.float() - self.mean)

    def clip(self, tangent: Tensor) -> Tensor:
        """Shorten vectors so that none is longer than the clip radius; short ones stay about as they are."""
        in_radii = (tangent.norm(dim=-1, keepdim=True) / self.clip_radius).clamp_min(1e-6)
        return tangent * (in_radii.tanh() / in_radii)

    @torch.no_grad()
    def fit(
        self, init: str, moments: FeatureMoments, start_norm: float, whitening: float, ball: str = "the ball"
    ) -> None:
        """Set the layer's weights, and the mean and scale that go with them. A collective.

        Args:
            init: "whitened_pca", "orthogonal" or "random", see ``model.head_init``.
            moments: of the training pictures' features.
            start_norm: root mean square norm of the tangent vectors, in units of the clip radius.
            whitening: see ``model.whitening``; for "whitened_pca".
            ball: what to call its ball in a warning.

        Raises:
            UserError: whitening into more dimensions than the features have.
        """
        weight = self.linear.weight
        if init == "whitened_pca":
            # One rank's, so that a machine whose LAPACK rounds otherwise has no head of its own.
            fitted = distributed.on_main(lambda: _whitening(moments, self.linear.out_features, whitening))
            if fitted is not None:
                self._tell_of_few_axes(fitted[1], moments.num_pictures, ball)
            weight.copy_(distributed.broadcast_from_main(fitted and fitted[0], weight.device))
        elif init == "orthogonal":
            # One rank's, as each draws others.
            nn.init.orthogonal_(weight)
            weight.copy_(distributed.broadcast_from_main(weight, weight.device))
        self.mean.copy_(moments.mean)
        covariance = moments.covariance.to(weight.device)
        mean_square = torch.einsum("ij,jk,ik->", weight.double(), covariance, weight.double())
        self.scale.copy_(start_norm * self.clip_radius / mean_square.sqrt().clamp_min(1e-12))

    def _tell_of_few_axes(self, num_axes: int, num_pictures: int, ball: str) -> None:
        """Warn of fewer axes than dimensions; a head that is fitted again, only of fewer than it has told of."""
        if num_axes < self._axes_told:
            few = num_pictures <= self.linear.out_features
            logger.warning(
                "The %d training pictures differ along %d axes only, and %s has %d: the others are drawn at random, "
                "for pictures to come.%s",
                num_pictures,
                num_axes,
                ball,
                self.linear.out_features,
                " So few are all about equally far from each other: go by the order of distances." if few else "",
            )
            self._axes_told = num_axes


def _whitening(moments: FeatureMoments, num_axes: int, power: float) -> tuple[Tensor, int]:
    """Principal axes, each divided by a power of its standard deviation: ``[num_axes, num_features]``.

    Also returned is along how many of them the pictures differ at all. Fewer pictures than axes leave some along which
    none does, which would lose what tells pictures to come apart: these axes are any, at right angles to the others.
    What the variance along them is, unseen, is estimated by shrinkage, and no less than the least that was seen.
    """
    num_features = len(moments.mean)
    if num_axes > num_features:
        raise UserError(
            f"model.embedding_dim={num_axes} is more than the backbone's {num_features} features; "
            "model.head_init=whitened_pca needs at most as many."
        )
    # Not torch's: its LAPACK routine gives up on some covariances of few pictures, most of whose axes are of no length.
    with one_thread_of_openblas():
        found = scipy.linalg.eigh(moments.covariance.cpu(), subset_by_index=(num_features - num_axes, num_features - 1))
    variances, axes = (torch.from_numpy(array).flip(-1) for array in found)
    # eigh leaves each axis' sign open; fix it, so that every machine starts from the same head.
    signs = axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
    # What is less is rounding: divided by it, such axes would be the loudest of all.
    differ = variances > 1e-6 * variances[0]
    weights = torch.where(differ, (variances / variances[0]).pow(-power / 2), 0.0)
    fitted = (axes * signs * weights).T
    num_differ = int(differ.count_nonzero())
    if 0 < num_differ < num_axes:
        unseen = max(_shrunk_variance(moments), float(variances[num_differ - 1]))
        others = _at_right_angles(axes[:, :num_differ], num_axes - num_differ)
        fitted[num_differ:] = others * (unseen / float(variances[0])) ** (-power / 2)
    # To the steps in which float32 tells numbers like the largest apart: what is finer, as all there is of a feature
    # that never varies, is LAPACK's rounding, and another with another number of threads.
    grid = 2.0 ** (torch.frexp(fitted.abs().max()).exponent.double() - 24)
    return (fitted / grid).round() * grid, num_differ


def _shrunk_variance(moments: FeatureMoments) -> float:
    """Return the variance along axes on which no picture was seen to differ.

    It is that of the oracle approximating shrinkage (OAS) of the covariance: Chen et al., IEEE Transactions on Signal
    Processing 2010, equation 23, without the terms 2 / p, as scikit-learn has it.
    """
    covariance = moments.covariance
    mean_variance = covariance.trace() / len(covariance)
    square = covariance.square().mean()
    apart = (moments.num_pictures + 1) * (square - mean_variance.square() / len(covariance))
    shrinkage = ((square + mean_variance.square()) / apart.clamp_min(torch.finfo(apart.dtype).tiny)).clamp(max=1)
    return float(shrinkage * mean_variance)


def _at_right_angles(axes: Tensor, num_others: int) -> Tensor:
    """Return ``[num_others, num_features]`` orthonormal directions orthogonal to the axes ``[num_features, k]``."""
    generator = torch.Generator().manual_seed(0)
    others = torch.randn(len(axes), num_others, generator=generator, dtype=torch.float64).numpy()
    known = axes.numpy()
    with one_thread_of_openblas():
        for _ in range(2):  # once leaves the rounding of what was large
            others -= known @ (known.T @ others)
        return torch.from_numpy(scipy.linalg.qr(others, mode="economic")[0]).T
