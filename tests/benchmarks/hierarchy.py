"""How fast the hierarchy engine is, how much memory it takes, and how its peers do, in one run.

    python tests/benchmarks/hierarchy.py --out results/ graph with_knn exact million growth

Every measurement is a process of its own, so that its peak of memory is its own; ours and the peers' take turns, and
the median of the repeats is reported; a second call with the same --out adds to its results. On a busy machine
compare cpu_seconds, with --threads 1. Times leave out imports, the making of the data, and for "graph" the neighbour
search. Memory is the peak above what the process held before the work (imports and its input). The points are a
mixture of Gaussians in 24 dimensions seen through a random two-layer network, in 128 dimensions with a little noise:
like features of a network, they have few true dimensions.
Writes ``hierarchy.json`` and, for "growth", ``growth.png``.
"""

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

CURVATURE = 0.1


def features(n, d=128):
    """[n, d] float32 points of the ball."""
    generator = torch.Generator().manual_seed(n)
    means = torch.randn(max(10, n // 100), 24, generator=generator)
    z = means[torch.randint(len(means), (n,), generator=generator)]
    z = z + 0.6 * torch.randn(n, 24, generator=generator)
    first, second = torch.randn(24, 256, generator=generator) / 24**0.5, torch.randn(256, d, generator=generator) / 16
    x = torch.empty(n, d)
    for start in range(0, n, 65536):
        part = torch.relu(z[start : start + 65536] @ first) @ second
        x[start : start + 65536] = part + 0.05 * torch.randn(part.shape, generator=generator)
    x -= x.mean(0)
    x *= 1.5 / x.norm(dim=1).mean()
    norm = x.norm(dim=1, keepdim=True)
    clipped = norm.clamp(max=2.3)
    return x * (torch.tanh(CURVATURE**0.5 * clipped) / (CURVATURE**0.5 * norm))


class Stopwatch:
    """Times what happens within, and notes by how much memory peaked above what was held before."""

    def __enter__(self):
        self._before = _resident()
        self._start, self._cpu_start = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_):
        self.seconds = time.perf_counter() - self._start
        self.cpu_seconds = time.process_time() - self._cpu_start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        self.memory_gib = max(0, peak - self._before) / 2**30
        self.peak_gib = peak / 2**30

    def results(self, **more):
        figures = {"seconds": self.seconds, "cpu_seconds": self.cpu_seconds, "memory_gib": self.memory_gib}
        return {**figures, "peak_gib": self.peak_gib, **more}


def _resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _neighbors(n, k, min_recall=1.0):
    from uhml.hierarchy.geometry import Geometry
    from uhml.hierarchy.knn import nearest_neighbors

    space = Geometry("poincare", CURVATURE)
    points, ids = space.points(features(n)), torch.arange(n)
    return nearest_neighbors(points, ids, points, ids, k, space, min_recall=min_recall)


def _saved_neighbors(n, k, folder):
    path = Path(folder) / f"neighbors-{n}-{k}.pt"
    if not path.exists():
        torch.save(_neighbors(n, k), path)
    return torch.load(path)


def _sparse(neighbors, values):
    from scipy.sparse import csr_matrix

    n, k = neighbors.shape
    matrix = csr_matrix((values.flatten().numpy(), neighbors.flatten().numpy(), np.arange(0, n * k + 1, k)), (n, n))
    return matrix.maximum(matrix.T).tocsr()


def prepare(n, k, folder, geometry):
    """Find the neighbours that "graph" starts from."""
    _saved_neighbors(n, k, folder)
    return {}


def graph_ours(n, k, folder, geometry):
    """Graph mode, the neighbour search apart."""
    from uhml.hierarchy.graph import graph_linkage

    neighbors, distances = _saved_neighbors(n, k, folder)
    with Stopwatch() as watch:
        graph_linkage(neighbors, distances).join()
    return watch.results()


def graph_paris(n, k, folder, geometry):
    """scikit-network on the same graph."""
    from sknetwork.hierarchy import Paris

    neighbors, distances = _saved_neighbors(n, k, folder)
    graph = _sparse(neighbors, 1 - distances / distances.max() + 1e-12)
    with Stopwatch() as watch:
        Paris(weights="uniform").fit_predict(graph)
    return watch.results()


def graph_connectivity(n, k, folder, geometry):
    """scikit-learn on the same graph (another linkage: the mean over the edges that exist)."""
    import warnings

    from sklearn.cluster import AgglomerativeClustering

    warnings.simplefilter("ignore")
    neighbors, distances = _saved_neighbors(n, k, folder)
    graph = _sparse(neighbors, distances)
    x = features(n).numpy()
    model = AgglomerativeClustering(1, linkage="average", connectivity=graph, compute_full_tree=True)
    with Stopwatch() as watch:
        model.fit(x)
    return watch.results()


def with_knn_ours(n, k, folder, geometry):
    """Graph mode, exact neighbours and all."""
    from uhml.hierarchy import average_linkage

    x = features(n)
    with Stopwatch() as watch:
        average_linkage(x, mode="graph", geometry=geometry, curvature=CURVATURE, num_neighbors=k, exact_search_up_to=n)
    return watch.results()


def exact_ours(n, k, folder, geometry):
    """Exact mode."""
    from uhml.hierarchy import average_linkage

    x = features(n)
    with Stopwatch() as watch:
        tree = average_linkage(x, mode="exact", geometry=geometry, curvature=CURVATURE)
    np.save(Path(folder) / f"ours-{n}-{geometry}.npy", tree.heights)
    return watch.results()


def fastcluster_all_pairs(n, k, folder, geometry):
    """fastcluster on all pairs of the same dissimilarity, in place; its distances are made by matrix products."""
    import fastcluster

    # Its first line copies the distances, preserve_input or not; spared that, 60,000 points take 14 GiB, not 28.
    fastcluster.array = lambda x, **_: x
    x = features(n).double()
    with Stopwatch() as watch:
        if geometry == "cosine":
            unit = x / x.norm(dim=1, keepdim=True)
            left, right, offset = -unit, unit, 1.0
        else:
            r = CURVATURE * x.square().sum(1, keepdim=True)
            time_like, space_like = (1 + r) / (1 - r), 2 * CURVATURE**0.5 * x / (1 - r)
            left, right, offset = torch.cat([time_like, -space_like], 1), torch.cat([time_like, space_like], 1), 0.0
        condensed = np.empty(n * (n - 1) // 2)
        start = 0
        for i in range(0, n, 256):
            block = (left[i : i + 256] @ right[i:].T + offset).numpy()
            for j, row in enumerate(block):
                length = n - 1 - i - j
                condensed[start : start + length] = row[j + 1 :]
                start += length
        seconds = time.perf_counter()
        heights = fastcluster.linkage(condensed, "average", preserve_input=False)[:, 2]
        seconds = time.perf_counter() - seconds
    np.save(Path(folder) / f"fastcluster-{n}-{geometry}.npy", heights)
    return watch.results(linkage_seconds=seconds)


def million(n, k, folder, geometry):
    """Everything at a million points, in parts; recall is measured apart, on points of its own choice."""
    from uhml.hierarchy.geometry import Geometry
    from uhml.hierarchy.graph import graph_linkage
    from uhml.hierarchy.knn import nearest_neighbors

    space = Geometry(geometry, CURVATURE)
    x = features(n)
    ids = torch.arange(n)
    with Stopwatch() as watch:
        points = space.points(x)
        start = time.perf_counter()
        neighbors, distances = nearest_neighbors(points, ids, points, ids, k, space, min_recall=0.9)
        middle = time.perf_counter()
        graph_linkage(neighbors, distances).join()
        end = time.perf_counter()
    asked = torch.randperm(n, generator=torch.Generator().manual_seed(7))[:500]
    true, _ = nearest_neighbors(points[asked], asked, points, ids, k, space)
    recall = float((neighbors[asked][:, :, None] == true[:, None]).any(2).double().mean())
    return watch.results(knn_seconds=middle - start, linkage_seconds=end - middle, recall=recall)


def growth_graph(n, k, folder, geometry):
    """Graph mode as a user calls it."""
    from uhml.hierarchy import average_linkage

    x = features(n)
    with Stopwatch() as watch:
        average_linkage(x, mode="graph", geometry=geometry, curvature=CURVATURE, num_neighbors=k)
    return watch.results()


TASKS = {
    task.__name__: task
    for task in (
        *(prepare, graph_ours, graph_paris, graph_connectivity, with_knn_ours, exact_ours),
        *(fastcluster_all_pairs, million, growth_graph),
    )
}


class Bench:
    """Runs tasks in processes of their own and keeps what they say."""

    def __init__(self, args, folder):
        self._args, self._folder = args, folder
        self.results = {}

    def measure(self, names, n, k=20, geometry="poincare"):
        """Run tasks by turns; keep the median of each figure. Returns them by task."""
        runs = {name: [] for name in names}
        for _ in range(self._args.repeats):
            for name in names:
                runs[name].append(self._run(name, n, k, geometry))
        medians = {}
        for name, each in runs.items():
            done = [run for run in each if run is not None]
            medians[name] = {key: statistics.median(run[key] for run in done) for key in done[0]} if done else None
            if done:
                medians[name]["repeats"] = len(done)
            print(f"{name}, n={n}, k={k}, {geometry}: {_said(medians[name])}", flush=True)
        return medians

    def _run(self, name, n, k, geometry):
        command = [sys.executable, __file__, "--task", name, "--threads", str(self._args.threads)]
        command += ["--n", str(n), "--k", str(k), "--geometry", geometry, "--folder", self._folder]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None


def _said(figures):
    return ", ".join(f"{key} {value:.3g}" for key, value in figures.items()) if figures else "failed"


def run_graph(bench, n):
    """Graph mode against its peers, the neighbour search apart."""
    bench._run("prepare", n, 20, "poincare")
    return bench.measure(["graph_ours", "graph_paris", "graph_connectivity"], n)


def run_with_knn(bench, n):
    """Graph mode with its search against all pairs."""
    return bench.measure(["with_knn_ours", "fastcluster_all_pairs"], n)


def run_exact(bench, n):
    """Exact mode against all pairs, with the greatest difference of heights."""
    results = {}
    for geometry in ("cosine", "poincare"):
        results[geometry] = bench.measure(["exact_ours", "fastcluster_all_pairs"], n, geometry=geometry)
        ours, theirs = (Path(bench._folder) / f"{who}-{n}-{geometry}.npy" for who in ("ours", "fastcluster"))
        if ours.exists() and theirs.exists():
            results[geometry]["height_difference"] = float(np.abs(np.load(ours) - np.load(theirs)).max())
            print(f"greatest difference of heights: {results[geometry]['height_difference']:.2g}")
    return results


def run_million(bench, n):
    """A million points."""
    return bench.measure(["million"], n, k=16)


def run_growth(bench, sizes):
    """Time and memory over n, both modes; exact mode up to 200,000 points."""
    results = {"graph": {}, "exact": {}}
    for n in sizes:
        results["graph"][str(n)] = bench.measure(["growth_graph"], n, k=16)["growth_graph"]
        if n <= 200_000:
            results["exact"][str(n)] = bench.measure(["exact_ours"], n)["exact_ours"]
    return results


def plot_growth(results, path):
    """Draw time and memory over n, with the slope of each line: n to which power."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for axes, key, label in zip(panels, ("seconds", "memory_gib"), ("seconds", "GiB above input"), strict=True):
        for mode, by_n in results.items():
            n = np.array(sorted(int(n) for n, figures in by_n.items() if figures))
            y = np.array([by_n[str(points)][key] for points in n])
            slope = np.polyfit(np.log(n), np.log(y), 1)[0] if len(n) > 1 else float("nan")
            axes.loglog(n, y, "o-", label=f"{mode}, slope {slope:.2f}")
        axes.set(xlabel="points", ylabel=label)
        axes.grid(alpha=0.3, which="both")
        axes.legend()
    figure.savefig(path, dpi=120)


def main():
    """Run what is named, or one task for a parent process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", choices=["graph", "with_knn", "exact", "million", "growth", []])
    parser.add_argument("--out", type=Path, default=Path(), help="folder for hierarchy.json and growth.png")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--n", type=int, default=60_000, help="points for graph, with_knn and exact")
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[10_000, 30_000, 100_000, 200_000, 300_000, 1_000_000, 2_000_000]
    )
    parser.add_argument("--task", choices=TASKS, help=argparse.SUPPRESS)
    parser.add_argument("--k", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--geometry", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.task:
        print(json.dumps(TASKS[args.task](args.n, args.k, args.folder, args.geometry)))
        return
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args, folder)
        path = args.out / "hierarchy.json"
        results = json.loads(path.read_text()) if path.exists() else {}
        results["machine"] = {"threads": args.threads, "processor": _processor()}
        for what in args.what:
            if what == "growth":
                for mode, by_n in run_growth(bench, args.sizes).items():
                    results.setdefault(what, {}).setdefault(mode, {}).update(by_n)
                plot_growth(results[what], args.out / "growth.png")
            elif what == "million":
                results[what] = run_million(bench, 1_000_000)
            else:
                run = {"graph": run_graph, "with_knn": run_with_knn, "exact": run_exact}[what]
                results.setdefault(what, {})[str(args.n)] = run(bench, args.n)
            path.write_text(json.dumps(results, indent=1) + "\n")


def _processor():
    models = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return f"{models[0] if models else platform.processor()}, torch {torch.__version__}"


if __name__ == "__main__":
    main()
