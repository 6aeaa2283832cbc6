"""The engine over several ranks."""

import pickle

import numpy as np
import pytest
import torch
from ranks import run_ranks
from reference import mixture

from uhml import distributed
from uhml.errors import UserError
from uhml.hierarchy import average_linkage, average_linkage_over_ranks, linkage, merging_over_ranks

pytestmark = pytest.mark.ddp

CASES = [
    {"mode": "graph", "geometry": "poincare"},
    {"mode": "graph", "geometry": "cosine", "gather_up_to": 0},
    {"mode": "graph", "geometry": "euclidean", "exact_search_up_to": 100, "min_recall": 0.95},
    {"mode": "graph", "geometry": "poincare", "num_neighbors": 2},
    {"mode": "graph", "geometry": "cosine", "num_neighbors": 2, "gather_up_to": 0},
    {"mode": "exact", "geometry": "poincare"},
    {"mode": "dense", "geometry": "cosine"},
]


def points(n):
    x = mixture(0, n)[0]
    x[100:150] = x[3]  # equal points, on all ranks
    return x


def trees_over_ranks(n):
    own = points(n)[distributed.rank() :: distributed.world_size()]
    trees = [average_linkage_over_ranks(own, n, **case) for case in CASES]
    merging = [merging_over_ranks(own, n, **case) for case in CASES]
    trees += [work and pickle.loads(pickle.dumps(work))() for work in merging]
    return [tree.to_scipy() if tree is not None else None for tree in trees]


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_tree_of_one_process(world_size):
    by_rank = run_ranks(trees_over_ranks, world_size, 601)
    for case, tree in zip(CASES + CASES, by_rank[0], strict=True):
        one = {key: value for key, value in case.items() if key != "gather_up_to"}
        assert np.array_equal(tree, average_linkage(points(601), **one).to_scipy()), case
    assert all(tree is None for trees in by_rank[1:] for tree in trees)


def more_ranks_than_points():
    own = points(601)[:3][distributed.rank() :: distributed.world_size()]
    tree = average_linkage_over_ranks(own, 3)
    ring = average_linkage_over_ranks(own, 3, gather_up_to=0)
    return tree is None or np.array_equal(tree.to_scipy(), ring.to_scipy())


def test_more_ranks_than_points():
    assert run_ranks(more_ranks_than_points, 4) == [True] * 4


def failures(cause):
    own = points(601)[distributed.rank() :: distributed.world_size()].clone()
    options = {}
    if cause == "row" and distributed.rank() == 1:
        own[7, 2] = torch.nan
    if cause.startswith("search") and distributed.rank() == 1:
        linkage.nearest_neighbors = lambda *_, **__: 1 / 0
    if cause == "search in a ring":
        options["gather_up_to"] = 0
    if cause == "merging":
        linkage.graph_linkage = lambda *_: 1 / 0
    try:
        average_linkage_over_ranks(own, 601, **options)
    except (UserError, ZeroDivisionError, RuntimeError) as e:
        return f"{type(e).__name__}: {e}"
    return "nothing"


@pytest.mark.parametrize(
    ("cause", "message"),
    [
        ("row", "Row 15 of the embeddings holds NaN"),
        ("search", "division by zero"),
        ("search in a ring", "division by zero"),
        ("merging", "division by zero"),
    ],
)
def test_a_failure_on_one_rank_ends_all(cause, message):
    assert all(message in said for said in run_ranks(failures, 2, cause))


def shares_that_pass(n):
    rows = torch.arange(n * 2).reshape(n, 2)
    seen = torch.full((n, 2), -1)
    owners = []
    for part, which in distributed.shares_in_turn(rows[distributed.rank() :: distributed.world_size()], n):
        seen[list(which)] = part
        owners.append(which.start)
    return torch.equal(seen, rows) and owners[0] == distributed.rank() and len(set(owners)) == distributed.world_size()


@pytest.mark.parametrize("world_size", [2, 3])
def test_every_share_passes_every_rank(world_size):
    assert run_ranks(shares_that_pass, world_size, 10) == [True] * world_size


def test_one_process_has_one_share():
    rows = torch.arange(4)
    assert [(part.tolist(), which) for part, which in distributed.shares_in_turn(rows, 4)] == [([0, 1, 2, 3], range(4))]
