import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from uhml.errors import UserError
from uhml.mining import ClusterBatches


@st.composite
def problems(draw):
    """Nested levels of some pictures, and a batch that they can fill."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n = draw(st.integers(1, 40))
    sizes = [draw(st.integers(1, n)) for _ in range(draw(st.integers(1, 4)))]
    levels = nested(n, sizes, random)
    pictures_per_cluster = draw(st.integers(1, min(n, 6)))
    num_clusters = draw(st.integers(1, n // pictures_per_cluster))
    seed, step, together = (draw(st.integers(1, most)) for most in (1000, 1000, 4))
    return levels, num_clusters, pictures_per_cluster, seed, step, together


def nested(n, sizes, random):
    """``[len(sizes), n]`` int32: nested clusters, finest first, of random names, in no order of the pictures."""
    levels, cluster = [], np.arange(n)
    for size in sizes:
        # Cauchy weights: a few big clusters and many small ones, as average linkage makes.
        weights = np.abs(random.standard_cauchy(size)) + 0.01
        above = random.choice(size, cluster.max() + 1, p=weights / weights.sum())
        cluster = np.unique(above[cluster], return_inverse=True)[1]
        levels.append(random.permutation(cluster.max() + 1)[cluster])
    return np.stack(levels).astype(np.int32)


def enclosing(levels, picture):
    """The sets of pictures around one, nearest first: its cluster on each level, at last all."""
    return [set(np.flatnonzero(level == level[picture]).tolist()) for level in levels] + [set(range(levels.shape[1]))]


@settings(max_examples=150, deadline=None)
@given(problems())
def test_a_batch_is_p_times_m_different_pictures(problem):
    levels, p, m, seed, step, together = problem
    batch = ClusterBatches(levels, p, m, seed, together)(step)
    assert batch.shape == (p * m,)
    assert len(set(batch.tolist())) == p * m
    assert set(batch.tolist()) <= set(range(levels.shape[1]))


@settings(max_examples=150, deadline=None)
@given(problems())
def test_each_cluster_is_filled_from_its_nearest_relatives(problem):
    levels, p, m, seed, step, together = problem
    batch = ClusterBatches(levels, p, m, seed, together)(step).tolist()
    finest = [set(np.flatnonzero(levels[0] == name).tolist()) for name in np.unique(levels[0])]

    def explains(cluster, part, taken):
        """Could the pictures of ``part`` have been drawn for ``cluster``, nearest relatives first?"""
        at = 0
        for around in enclosing(levels, next(iter(cluster))):
            free = around - taken - set(part[:at])
            from_here = min(len(free), len(part) - at)
            if not set(part[at : at + from_here]) <= free:
                return False
            at += from_here
        return at == len(part)

    taken = set()
    for start in range(0, p * m, m):
        part = batch[start : start + m]
        assert any(explains(cluster, part, taken) for cluster in finest)
        taken |= set(part)


@settings(max_examples=50, deadline=None)
@given(problems())
def test_a_batch_is_a_pure_function_of_seed_and_step(problem):
    levels, p, m, seed, step, together = problem
    batches = ClusterBatches(levels, p, m, seed, together)
    batches(step + 1), batches(step + 2)
    np.random.seed(3)
    np.testing.assert_array_equal(batches(step), ClusterBatches(levels.copy(), p, m, seed, together)(step))


def test_seed_and_step_each_make_another_batch():
    levels = nested(500, [60, 10], np.random.default_rng(0))
    batches = [tuple(ClusterBatches(levels, 8, 4, seed)(step)) for seed in range(5) for step in range(5)]
    assert len(set(batches)) == 25


def test_big_clusters_fill_their_part_alone_and_come_once():
    levels = np.repeat(np.arange(10), 20)[None].astype(np.int32)
    for step in range(50):
        clusters = levels[0][ClusterBatches(levels, 6, 5, 0)(step)].reshape(6, 5)
        assert (clusters == clusters[:, :1]).all()
        assert len(set(clusters[:, 0].tolist())) == 6


def test_singletons_are_no_seeds_while_there_are_pairs_enough():
    levels = np.r_[np.repeat(np.arange(8), 4), np.arange(8, 40)][None].astype(np.int32)
    for step in range(50):
        assert levels[0][ClusterBatches(levels, 8, 4, 0)(step)].max() < 8


def test_a_singleton_takes_its_siblings_of_the_next_level():
    # The finest level is all singletons, the next has four pairs of pairs.
    levels = np.stack([np.arange(16), np.arange(16) // 4]).astype(np.int32)
    for step in range(50):
        quads = (ClusterBatches(levels, 2, 3, 0)(step).reshape(2, 3) // 4).tolist()
        if quads[0][0] != quads[1][0]:
            assert quads == [[quad[0]] * 3 for quad in quads]


@pytest.mark.parametrize("finest", [np.zeros(12), np.repeat([0, 1], 6), np.arange(12)])
def test_all_pictures_can_be_one_batch(finest):
    batch = ClusterBatches(finest[None].astype(np.int32), 4, 3, 0)(0)
    assert sorted(batch) == list(range(12))


def test_pictures_come_about_equally_often_whatever_the_size_of_their_cluster():
    sizes = np.array([2, 3, 4, 6, 10, 15, 20, 40] * 5)
    levels = np.repeat(np.arange(len(sizes)), sizes)[None].astype(np.int32)
    batches = ClusterBatches(levels, 4, 2, 0)
    drawn = np.bincount(np.concatenate([batches(step) for step in range(4000)]), minlength=sizes.sum())
    by_size = {size: drawn[sizes[levels[0]] == size].mean() for size in np.unique(sizes)}
    # Four different clusters of forty at once: the largest cannot come quite as often as their size asks.
    np.testing.assert_allclose(list(by_size.values()), 4000 * 8 / sizes.sum(), rtol=0.2)
    # Within a cluster no place is special.
    largest = drawn[levels[0] == sizes.argmax()]
    np.testing.assert_allclose(largest, largest.mean(), rtol=0.5)


def test_clusters_of_a_batch_come_with_relatives_as_far_as_there_are_any():
    # Coarse clusters of 1, 2, 3, ... 12 fine ones, of two pictures each but for one of one picture.
    coarse = np.repeat(np.arange(12), np.arange(1, 13))
    finest = np.repeat(np.arange(len(coarse)), 2)[1:]
    levels = np.stack([finest, coarse[finest]]).astype(np.int32)
    drawn = np.zeros(len(coarse))
    for step in range(3000):
        batch = ClusterBatches(levels, 24, 2, 0, 4)(step)
        clusters = levels[0][batch].reshape(24, 2)
        assert (clusters == clusters[:, :1]).all()
        clusters = clusters[:, 0]
        assert len(set(clusters.tolist())) == 24
        # A coarse cluster brings four, or all that it has, but for the last.
        families, counts = np.unique(coarse[clusters], return_counts=True)
        whole = families != coarse[clusters[-1]]
        assert (counts >= np.minimum(4, families + 1))[whole].all()
        drawn[clusters] += 1
    assert drawn[0] == 0
    # About equally often, with relatives or without; 24 of 77 at once even out what is left.
    np.testing.assert_allclose(drawn[1:], 3000 * 24 / (len(coarse) - 1), rtol=0.35)


def test_just_so_many_come_together():
    # Fifty coarse clusters of eight fine ones.
    finest = np.repeat(np.arange(400), 2)
    levels = np.stack([finest, finest // 8]).astype(np.int32)
    for step in range(50):
        families = levels[1][ClusterBatches(levels, 8, 2, 0, 4)(step)].reshape(8, 2)[:, 0]
        # Two draws, unless the second is one of the same coarse cluster.
        assert len(set(families[:4])) == 1
        assert len(set(families[4:])) == 1
    assert families[0] != families[4]


def test_relatives_are_drawn_by_their_size():
    # One coarse cluster, of ten fine ones of two pictures and ten of forty.
    sizes = np.repeat([2, 40], 10)
    finest = np.repeat(np.arange(20), sizes)
    levels = np.stack([finest, np.zeros_like(finest)]).astype(np.int32)
    drawn = np.bincount(
        np.concatenate([levels[0][ClusterBatches(levels, 4, 2, 0, 4)(step)][::2] for step in range(500)]), minlength=20
    )
    assert drawn[10:].sum() > 10 * drawn[:10].sum()


def test_clusters_that_are_drawn_by_themselves_hardly_share_a_level():
    levels = nested(4000, [1500, 200], np.random.default_rng(0))

    def pairs_between(together):
        pairs = 0
        for step in range(20):
            finest, coarse = levels[:, ClusterBatches(levels, 24, 2, 0, together)(step)]
            pairs += ((coarse[:, None] == coarse) & (finest[:, None] != finest)).sum()
        return pairs

    assert pairs_between(4) > 2 * pairs_between(1)


def test_single_pictures_fill_up_what_too_few_larger_clusters_leave():
    # Two pairs and six single pictures, of which a batch takes four clusters.
    levels = np.array([[0, 0, 1, 1, 2, 3, 4, 5, 6, 7]], np.int32)
    for step in range(20):
        clusters = levels[0][ClusterBatches(levels, 4, 1, 0)(step)]
        assert len(set(clusters.tolist())) == 4


def test_relatives_are_of_the_coarsest_level():
    # Two coarse clusters, each of sixteen finest ones; in between every finest cluster is by itself.
    finest = np.repeat(np.arange(32), 2)
    levels = np.stack([finest, finest, finest // 16]).astype(np.int32)
    for step in range(20):
        coarse = levels[2][ClusterBatches(levels, 4, 2, 0, 4)(step)]
        assert len(set(coarse.tolist())) == 1


def test_too_few_pictures_are_refused():
    levels = np.zeros((1, 7), np.int32)
    with pytest.raises(UserError, match=r"2 clusters x 4 pictures and there are only 7 training pictures: lower train"):
        ClusterBatches(levels, 2, 4, 0)
