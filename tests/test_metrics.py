import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from ranks import run_ranks
from sklearn.cluster import KMeans
from sklearn.metrics import normalized_mutual_info_score

from uhml import metrics
from uhml.hierarchy.geometry import Geometry
from uhml.metrics import Embedded, kmeans_clusters, retrieval, score

pytestmark = pytest.mark.usefixtures("one_thread")
RECALL_AT = (1, 2, 4, 8)
COSINE = Geometry("cosine")
BALL = Geometry("poincare", 0.1)
geometries = pytest.mark.parametrize("geometry", [COSINE, BALL, Geometry("poincare", 0.0)], ids=["cos", "ball", "flat"])


def pictures(n, num_classes, seed, dim=5, duplicates=0.3):
    """Points around class centres, float32; some are exact copies of others, of any class."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, num_classes, n)
    rows = random.normal(size=(num_classes, dim))[labels] + random.normal(size=(n, dim))
    copies = np.flatnonzero(random.random(n) < duplicates)
    rows[copies] = rows[random.integers(0, n, len(copies))]
    rows *= 0.9 / np.linalg.norm(rows, axis=1).max()
    return Embedded(torch.from_numpy(rows).float(), labels.astype(np.int64))


def distances(x, y, geometry):
    """All distances by the textbook, in float64."""
    x, y = x.numpy().astype(np.float64), y.numpy().astype(np.float64)
    if geometry.name == "cosine":
        return 1 - (x / np.linalg.norm(x, axis=1, keepdims=True)) @ (y / np.linalg.norm(y, axis=1, keepdims=True)).T
    squares = ((x[:, None] - y[None]) ** 2).sum(2)
    if geometry.curvature == 0:
        return 2 * np.sqrt(squares)
    c = geometry.curvature
    room_x, room_y = 1 - c * (x**2).sum(1), 1 - c * (y**2).sum(1)
    return np.arccosh(1 + 2 * c * squares / (room_x[:, None] * room_y[None])) / math.sqrt(c)


@pytest.mark.parametrize("curvature", [0.0, 0.1])
@pytest.mark.parametrize(("scale", "offset"), [(1.0, 0.0), (1e-6, 0.0), (1e-9, 0.0), (1.0, 1e3)])
def test_small_and_far_rows_are_told_apart(curvature, scale, offset):
    if offset and curvature:
        return  # outside the ball
    embedded = pictures(200, 8, 0, duplicates=0)
    geometry = Geometry("poincare", curvature)
    there = Embedded(embedded.rows.double() * scale + offset, embedded.labels)
    expected = retrieval(embedded, None, Geometry("poincare", 0.0), RECALL_AT)[0]
    agrees = retrieval(there, None, geometry, RECALL_AT)[0] == expected
    # The ball's distances are those of flat space only where it is small.
    assert agrees.double().mean() > (0.9 if scale == 1 and curvature else 0.999)


def brute_force(queries, gallery, geometry):
    """Hits at each K, and average precision at R, query by query, by sorting; equal distances in order of index."""
    references = gallery or queries
    # Rounding apart: what is equal on paper must not be ordered by its last bit.
    all_distances = np.round(distances(queries.rows, references.rows, geometry), 9)
    hits_at, precisions = [], []
    for q, label in enumerate(queries.labels):
        order = [int(j) for j in np.argsort(all_distances[q], kind="stable") if gallery is not None or j != q]
        same = [bool(references.labels[j] == label) for j in order]
        hits_at.append([any(same[:k]) for k in RECALL_AT])
        r = sum(same)
        precisions.append(sum(same[i] * sum(same[: i + 1]) / (i + 1) for i in range(r)) / r if r else math.nan)
    return np.array(hits_at), np.array(precisions)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(2, 40),
    st.integers(1, 12),
    st.sampled_from([COSINE, BALL, Geometry("poincare", 1.0), Geometry("poincare", 0.0)]),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)
def test_retrieval_is_brute_force_with_duplicates_and_classes_of_one(n, num_classes, geometry, has_gallery, seed):
    queries = pictures(n, num_classes, seed)
    gallery = pictures(n + 3, num_classes, seed + 1) if has_gallery else None
    if gallery is not None:
        gallery.rows[: n // 2] = queries.rows[: n // 2]
    recall, precision = retrieval(queries, gallery, geometry, RECALL_AT)
    expected_recall, expected_precision = brute_force(queries, gallery, geometry)
    np.testing.assert_array_equal(recall.numpy(), expected_recall)
    np.testing.assert_allclose(precision.numpy(), expected_precision, rtol=1e-12)


@pytest.mark.parametrize("has_gallery", [True, False])
@pytest.mark.parametrize("zeros", [0, 1, 9])
def test_rows_of_zeros_are_equal_to_each_other_and_orthogonal_to_all_else(zeros, has_gallery):
    queries, gallery = pictures(30, 4, 0), pictures(40, 4, 1) if has_gallery else None
    padded = [
        None if p is None else Embedded(torch.nn.functional.pad(p.rows, (0, 1)), p.labels) for p in (queries, gallery)
    ]
    for plain, longer in zip((queries, gallery), padded, strict=True):
        if plain is not None:
            # Of the queries alone, too: the gallery has no such row.
            chosen = slice(0, zeros if plain is queries else zeros // 2)
            plain.rows[chosen] = longer.rows[chosen] = 0
            longer.rows[chosen, -1] = 3
    recall, precision = retrieval(queries, gallery, COSINE, RECALL_AT)
    expected_recall, expected_precision = brute_force(*padded, COSINE)
    np.testing.assert_array_equal(recall.numpy(), expected_recall)
    np.testing.assert_allclose(precision.numpy(), expected_precision, rtol=1e-12)
    assert score(queries, gallery, COSINE, RECALL_AT, seed=0).nmi == score(*padded, COSINE, RECALL_AT, seed=0).nmi


@geometries
def test_blocks_of_the_distance_matrix_do_not_show(geometry, monkeypatch):
    queries = pictures(67, 9, 0)
    whole = retrieval(queries, None, geometry, RECALL_AT)
    monkeypatch.setattr(metrics, "BLOCK_BYTES", 8 * 67 * 5)
    parts = retrieval(queries, None, geometry, RECALL_AT)
    assert all(torch.equal(torch.nan_to_num(a, -1), torch.nan_to_num(b, -1)) for a, b in zip(whole, parts, strict=True))


@geometries
def test_scores_are_means_over_queries(geometry):
    queries = pictures(50, 20, 3)  # some of the 20 classes have one picture
    scores = score(queries, None, geometry, RECALL_AT, seed=0)
    recall, precision = brute_force(queries, None, geometry)
    assert np.isnan(precision).any()
    assert scores.recall_at_k == pytest.approx(dict(zip(map(str, RECALL_AT), recall.mean(0), strict=True)), rel=1e-12)
    assert scores.map_at_r == pytest.approx(np.nanmean(precision), rel=1e-12)


@pytest.mark.parametrize("has_gallery", [False, True])
def test_scores_are_pytorch_metric_learnings(has_gallery):
    pytest.importorskip("faiss", reason="the calculator searches by faiss")
    # Without duplicates, whose order it leaves open, and without classes of one, which it leaves out of precision@1.
    queries, gallery = pictures(60, 6, 1, duplicates=0), pictures(80, 6, 2, duplicates=0)
    assert min(np.bincount(queries.labels)) > 1
    scores = score(queries, gallery if has_gallery else None, COSINE, RECALL_AT, seed=0)
    unit = torch.nn.functional.normalize
    more = (unit(gallery.rows), torch.from_numpy(gallery.labels)) if has_gallery else ()
    calculator = AccuracyCalculator(("precision_at_1", "mean_average_precision_at_r"), k="max_bin_count")
    theirs = calculator.get_accuracy(unit(queries.rows), torch.from_numpy(queries.labels), *more)
    assert scores.recall_at_k["1"] == pytest.approx(theirs["precision_at_1"])
    assert scores.map_at_r == pytest.approx(theirs["mean_average_precision_at_r"])


@pytest.mark.parametrize("geometry", [COSINE, BALL, Geometry("poincare", 1.0)], ids=["cos", "ball", "unit ball"])
@pytest.mark.parametrize("dim", [3, 64, 512])
def test_equal_distances_are_ranked_by_index(geometry, dim):
    # Many copies of few points: their gaps are 0 or equal on paper, and rounding of either sign in the computation.
    random = np.random.default_rng(dim)
    rows = random.normal(size=(4, dim))
    # Near the edge of the ball, where rounding is largest.
    rows *= 0.98 / math.sqrt(geometry.curvature) / np.linalg.norm(rows, axis=1, keepdims=True)
    which = random.permutation(np.repeat(np.arange(4), 37))
    labels = random.integers(0, 3, len(which))
    queries = Embedded(torch.from_numpy(rows[which]).float(), labels)
    recall, precision = retrieval(queries, None, geometry, RECALL_AT)
    expected_recall, expected_precision = brute_force(queries, None, geometry)
    np.testing.assert_array_equal(recall.numpy(), expected_recall)
    np.testing.assert_allclose(precision.numpy(), expected_precision, rtol=1e-12)


def test_a_gap_that_rounding_made_negative_is_no_nearer_than_zero():
    gaps = torch.tensor([[0.5, 0.0, -1e-11, 1e-17, -0.0, 0.25]], dtype=torch.float64)
    assert metrics._smallest(gaps, torch.tensor([[1e-12]]), 6).tolist() == [[1, 2, 3, 4, 5, 0]]


def test_a_query_is_left_out_by_index_and_not_by_being_nearest():
    # The first picture's twin is nearest, at distance 0, and is a legitimate hit; the second's twin is of a class of
    # its own.
    rows = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    recall, precision = retrieval(Embedded(rows, np.array([0, 0, 1, 2])), None, COSINE, (1,))
    assert recall[:, 0].tolist() == [True, True, False, False]
    np.testing.assert_array_equal(precision, [1, 1, math.nan, math.nan])


def test_a_class_without_pictures_in_the_gallery_counts_as_missed():
    queries = Embedded(torch.eye(2), np.array([0, 5]))
    gallery = Embedded(torch.eye(2), np.array([0, 1]))
    scores = score(queries, gallery, COSINE, (1,), seed=0)
    assert (scores.recall_at_k, scores.map_at_r) == ({"1": 0.5}, 1.0)


def test_clusters_that_are_the_classes_have_nmi_1_in_the_geometry_at_hand():
    labels = np.repeat(np.arange(3), 20)
    angle = labels * 2 + np.random.default_rng(0).normal(scale=0.01, size=60)
    rows = torch.from_numpy(np.stack([np.cos(angle), np.sin(angle)], 1))
    # By angle the classes are apart; lengths that have nothing to do with them do not matter to cosine.
    lengths = torch.from_numpy(np.random.default_rng(1).uniform(0.1, 3, (60, 1)))
    best = max(score(Embedded(rows * lengths, labels), None, COSINE, (1,), seed).nmi for seed in range(3))
    assert best == pytest.approx(1)
    # In the ball, distance to the origin does: classes are rings here, and angles say nothing.
    rings = torch.from_numpy(np.array([0.1, 0.6, 0.99])[labels]) / math.sqrt(0.1)
    line = torch.stack([rings, torch.zeros(60)], 1) + torch.from_numpy(
        np.random.default_rng(2).normal(0, 1e-3, (60, 2))
    )
    best = max(score(Embedded(line, labels), None, BALL, (1,), seed).nmi for seed in range(3))
    assert best == pytest.approx(1)


def test_k_means_of_the_ball_is_in_the_tangent_space(monkeypatch):
    seen = []
    fit_predict = KMeans.fit_predict
    monkeypatch.setattr(KMeans, "fit_predict", lambda self, rows: (seen.append(rows), fit_predict(self, rows))[1])
    rows = torch.tensor([[0.1, 0.2], [3.0, 0.0], [0.0, -3.1], [1.0, 1.0]], dtype=torch.float64)
    kmeans_clusters(Embedded(rows, np.array([0, 0, 1, 1])), BALL, 0)
    radius = rows.norm(dim=1, keepdim=True) * math.sqrt(0.1)
    torch.testing.assert_close(torch.from_numpy(seen[0]).double(), rows * radius.atanh() / radius, rtol=1e-6, atol=0)


def test_clusters_are_those_of_twenty_rounds_from_one_random_start():
    queries = pictures(300, 12, 5)
    rows = torch.nn.functional.normalize(queries.rows.double()).float().numpy()
    expected = KMeans(12, init="random", n_init=1, max_iter=20, random_state=3).fit_predict(rows)
    assert normalized_mutual_info_score(kmeans_clusters(queries, COSINE, 3), expected) == pytest.approx(1)


def test_nmi_is_scikit_learns_of_clusters_against_classes(monkeypatch):
    queries = pictures(40, 4, 5)
    found = np.random.default_rng(0).integers(0, 4, 40)
    monkeypatch.setattr(KMeans, "fit_predict", lambda self, rows: found)
    expected = normalized_mutual_info_score(queries.labels, found)
    assert score(queries, None, BALL, (1,), seed=0).nmi == pytest.approx(expected)


def _scores(geometry, n, has_gallery):
    queries, gallery = pictures(n, max(1, n // 4), 7), pictures(n + 1, max(1, n // 4), 8)
    scores = score(queries, gallery if has_gallery else None, geometry, RECALL_AT, seed=0)
    return json.dumps([scores.recall_at_k, scores.map_at_r, scores.nmi])


def _all_scores(cases):
    return [_scores(*case) for case in cases]


@pytest.mark.ddp
def test_any_number_of_ranks_gives_the_same_scores_to_the_last_bit():
    # 1 and 3 pictures: fewer than ranks; 101: not divisible by them.
    cases = [(geometry, n, gallery) for geometry in (COSINE, BALL) for n in (1, 3, 101) for gallery in (False, True)]
    alone = _all_scores(cases)
    assert len(set(alone)) > 5
    for world_size in (1, 2, 4):
        assert run_ranks(_all_scores, world_size, cases) == [alone] * world_size
