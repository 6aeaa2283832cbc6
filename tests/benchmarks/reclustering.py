"""What re-clustering costs and brings: fresh features or the bank, waiting or overlapped, on one config.

    python tests/benchmarks/reclustering.py --out results/reclustering configs/quickstart.yaml
    python tests/benchmarks/reclustering.py --out results/cars --seeds 0 configs/cars196-small.yaml \\
        data.root=cars196 data.score_on=validation

Writes ``reclustering.json`` and prints a table. For each seed the four variants run in turn, each from scratch, in one
process. A run's loop lasts from the beginning of its first step to the end of its last one: what is before, the first
clustering, and after, the last one and the scores, is the same in all variants. The share is of this loop's time,
of what is in none of its steps. Some of that every step has, to fetch its batch; a run that never clusters again has
it, too: the median over steps. The rest are the seconds of a re-clustering, from which the share at another
``hierarchy.recluster_every`` follows. Overlapped runs also take longer steps where the cores are shared, which the
seconds of a step and of the loop tell.
"""

import argparse
import dataclasses
import itertools
import json
import shutil
import statistics
import sys
import time
from pathlib import Path

import uhml.train
from uhml.config import load_config
from uhml.reporting.runs import Spread

PARTS = ("embed_to_cluster", "cluster_in_background", "average_linkage_over_ranks", "take_hierarchy", "swap_hierarchy")


def timed(spans, name):
    """Have a function of the trainer's leave begin and end of each call in ``spans``; return the function itself."""
    original = getattr(uhml.train, name)

    def call(*args, **options):
        began = time.perf_counter()
        try:
            return original(*args, **options)
        finally:
            spans.setdefault(name, []).append((began, time.perf_counter()))

    setattr(uhml.train, name, call)
    return original


def one(config, run_dir):
    """Run once; return the seconds of the loop and its parts, and the scores."""
    spans = {}
    originals = {name: timed(spans, name) for name in ("train_step", "save", *PARTS)}
    originals["project"] = uhml.train.project
    uhml.train.project = lambda *_: None  # thumbnails for TensorBoard: nobody waits for them here
    try:
        result = uhml.train.train(config, run_dir, overwrite=True)
    finally:
        for name, function in originals.items():
            setattr(uhml.train, name, function)
    steps = spans["train_step"]
    began, ended = steps[0][0], steps[-1][1]
    num_reclusterings = len([span for span in spans["embed_to_cluster"] if began < span[0] < ended])

    def within(name):
        return sum(b - a for a, b in spans.get(name, []) if began < a < ended)

    in_steps = sum(b - a for a, b in steps)
    between = [after[0] - before[1] for before, after in itertools.pairwise(steps)]
    fetching = statistics.median(between) * len(between)
    return {
        "loop_seconds": ended - began,
        "step_seconds": statistics.median(b - a for a, b in steps),
        "share_not_in_steps": 1 - in_steps / (ended - began),
        "share_fetching": fetching / (ended - began),
        "seconds_of_a_reclustering": (sum(between) - fetching) / max(1, num_reclusterings),
        "num_reclusterings": num_reclusterings,
        "parts": {name: within(name) for name in ("save", *PARTS)},
        "run_seconds": result["seconds"],
        "recall_at_1": result["trained"]["recall_at_k"]["1"],
        "map_at_r": result["trained"]["map_at_r"],
        "untrained_recall_at_1": result["start"]["recall_at_k"]["1"],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a config file")
    parser.add_argument("overrides", nargs="*", help="keys of it")
    parser.add_argument("--out", type=Path, required=True, help="a folder")
    parser.add_argument("--seeds", default="0,1,2", help="of the runs of each variant")
    parser.add_argument("--features", default="fresh,bank", help="to compare (default: %(default)s)")
    parser.add_argument("--overlap-steps", type=int, help="of the overlapped runs; by default half of the interval")
    args = parser.parse_intermixed_args()
    args.out.mkdir(parents=True, exist_ok=True)
    base = load_config(args.config, args.overrides)
    overlap = args.overlap_steps or base.hierarchy.recluster_every // 2
    variants = [(features, steps) for features in args.features.split(",") for steps in (0, overlap)]
    found = {f"{features}, {f'overlap {steps}' if steps else 'waiting'}": [] for features, steps in variants}
    for seed in map(int, args.seeds.split(",")):
        for name, (features, steps) in zip(found, variants, strict=True):
            hierarchy = dataclasses.replace(base.hierarchy, features=features, overlap_steps=steps)
            config = dataclasses.replace(base, hierarchy=hierarchy, train=dataclasses.replace(base.train, seed=seed))
            found[name].append({"seed": seed, **one(config, args.out / "run")})
            said = {"command": sys.argv, "runs": found}
            (args.out / "reclustering.json").write_text(json.dumps(said, indent=2) + "\n")
            print(name, found[name][-1], flush=True)
    shutil.rmtree(args.out / "run")

    def spread(runs, key, factor=100):
        return Spread.of([run[key] for run in runs]).text(factor)

    print("| | not in steps, % | fetching, % | s a re-clustering | s a step | s of the loop | R@1 | MAP@R |")
    print("|---|---|---|---|---|---|---|---|")
    for name, runs in found.items():
        times = [
            spread(runs, "share_not_in_steps"),
            spread(runs, "share_fetching"),
            *(spread(runs, key, 1) for key in ("seconds_of_a_reclustering", "step_seconds", "loop_seconds")),
        ]
        print("|", " | ".join([name, *times, spread(runs, "recall_at_1"), spread(runs, "map_at_r")]), "|")


if __name__ == "__main__":
    main()
