"""The whole loop over the number of pictures: what grows with it, in time and in memory, and how.

    python tests/benchmarks/million.py --out results/million --pictures 10000,100000,1000000

Makes tiny pictures in folders of 20 below ``--data`` (once; 4 KB of disk each), and trains on the first n of them, as a
user would: list, cache, embed, cluster, some steps, cluster again, and evaluation on n / 100 pictures of other classes.
Scoring looks at all pairs, so it is not given n. The parts of a run are read ten times a second from ``status.json``,
and the memory of its process and of those that read pictures from /proc: of these what is theirs alone. Then
the command is started once more, in another folder, until it begins to embed: together with the time from the first
clusters to the first step that is the start-up, which finds all pictures in the cache.

Writes ``million.json`` and ``million.png``, and prints a table.
"""

import argparse
import collections
import functools
import json
import multiprocessing
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from uhml.data.folder import folder

PER_CLASS, CLASSES_PER_FOLDER, SIDE = 20, 500, 32
PHASES = ("list and cache", "embed", "cluster", "train", "evaluate")
CONFIG = {
    "data.image_size": SIDE,
    "model.backbone": "test_efficientnet.r160_in1k",
    "model.weights": "random",
    "model.embedding_dim": 32,
    "train.num_steps": 20,
    "hierarchy.recluster_every": 20,
    "eval.batch_size": 512,
    "train.device": "cpu",
}


def name_of(number):
    """Return the file of a picture, below the folder of all."""
    label = number // PER_CLASS
    return f"{label // CLASSES_PER_FOLDER:04d}/{label:06d}/{number:08d}.jpg"


def make(root, label):
    """Write the pictures of a class: a few coarse patches, in the manner of its class and of its class of classes."""
    target = root / Path(name_of(label * PER_CLASS)).parent
    if len(list(target.glob("*.jpg"))) == PER_CLASS:
        return
    target.mkdir(parents=True, exist_ok=True)
    patches = 128.0 + np.zeros((4, 4, 3))
    for seed, spread in ((label // 100, 60), (label, 40)):
        patches += np.random.default_rng((seed, spread)).normal(0, spread, patches.shape)
    random = np.random.default_rng(label)
    for number in range(label * PER_CLASS, (label + 1) * PER_CLASS):
        own = patches + random.normal(0, 25, patches.shape)
        image = Image.fromarray(own.clip(0, 255).astype(np.uint8)).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
        image.save(root / name_of(number), quality=75)


def make_all(root, num_pictures):
    """Write so many pictures, but those that are there; return the seconds."""
    started = time.perf_counter()
    with multiprocessing.Pool() as pool:
        for _ in pool.imap_unordered(functools.partial(make, root), range(-(-num_pictures // PER_CLASS)), 64):
            pass
    return time.perf_counter() - started


def num_test(n):
    return max(200, n // 100)


def write_list(path, root, n):
    """List n pictures to train on, and others to score on."""
    rows = (f"{root / name_of(i)},c{i // PER_CLASS},{'train' if i < n else 'test'}\n" for i in range(n + num_test(n)))
    with path.open("w") as file:
        file.write("path,label,split\n")
        file.writelines(rows)


def children(pid):
    """Return the processes below one."""
    own = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return own + [below for child in own for below in children(child)]


def memory(pid):
    """Return the bytes that a process holds, and those that it has written and shares with no other."""
    fields = dict(line.split(":") for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])
    kib = {name: int(value.split()[0]) for name, value in fields.items()}
    # Of files that are mapped, such as the cache's, the system may take what it likes.
    return 1024 * kib["Rss"], 1024 * kib["Private_Dirty"]


def phase_of(run_dir):
    """Return the phase of a run, and its step."""
    try:
        status = json.loads((run_dir / "status.json").read_text())
        return PHASES[0] if status["state"] == "starting" else status["phase"], status["step"]
    except (OSError, ValueError, KeyError):
        return PHASES[0], 0


def watch(command, run_dir, until=None):
    """Run to the end, or until a phase begins; return seconds by phase, and peaks of memory."""
    seconds, main, workers = collections.Counter(), collections.Counter(), collections.Counter()
    first_step = None
    run = subprocess.Popen([*command, "--run-dir", str(run_dir)], stdout=subprocess.DEVNULL)
    started = last = time.perf_counter()
    looked = 0.0
    while run.poll() is None:
        time.sleep(0.1)
        phase, step = phase_of(run_dir)
        if phase == until:
            run.kill()
            run.wait()
            return {"seconds": {phase: time.perf_counter() - started}}
        now = time.perf_counter()
        seconds[phase] += now - last
        if step > 0 and first_step is None:
            # Of the phase that has lasted since the clusters were there.
            first_step = seconds["train"]
        last = now
        # A look at the memory of a large process takes a while.
        if now - looked > 0.5:
            looked = now
            try:
                main[phase] = max(main[phase], memory(run.pid)[0])
                for child in children(run.pid):
                    workers[phase] = max(workers[phase], memory(child)[1])
            except (OSError, ValueError, KeyError):
                pass
    if run.returncode:
        raise SystemExit(f"the run ended with status {run.returncode}")
    return {"seconds": seconds, "main": main, "worker": workers, "first_step": first_step}


def measure(n, root, folder_of_runs, overrides):
    """Return what n pictures take."""
    listed = folder_of_runs / "list.csv"
    write_list(listed, root, n)
    config = folder_of_runs / "million.yaml"
    config.write_text("{}\n")
    keys = CONFIG | {"data.dataset": "list", "data.root": listed, "data.cache": folder_of_runs / "cache"}
    keys |= dict(override.split("=", 1) for override in overrides)
    words = [f"{key}={value}" for key, value in keys.items()]
    command = [sys.executable, "-m", "uhml", "train", str(config), *words]
    found = watch(command, folder_of_runs / "run")
    again = watch(command, folder_of_runs / "again", until="embed")
    found["start_up"] = again["seconds"]["embed"] + found["first_step"]
    sizes = {path.name: path.stat().st_size for path in sorted((folder_of_runs / "run" / "checkpoints").iterdir())}
    found["checkpoint"] = max(sizes.values())
    return {"pictures": n, "test": num_test(n), **found}


def measure_listing(root):
    """Return the seconds of listing the folder, and its pictures."""
    started = time.perf_counter()
    splits = folder(root)
    return {"pictures": len(splits.train) + len(splits.test), "seconds": time.perf_counter() - started}


def draw(runs, path):
    runs = sorted(runs, key=lambda run: run["pictures"])
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    n = [run["pictures"] for run in runs]
    for phase in PHASES:
        axes[0].loglog(n, [run["seconds"].get(phase, np.nan) for run in runs], "o-", label=phase)
    axes[0].loglog(n, [run["start_up"] for run in runs], "k.--", label="start-up, pictures in the cache")
    for who, style in (("main", "o-"), ("worker", "s--")):
        axes[1].loglog(n, [max(run[who].values()) / 2**30 for run in runs], style, label=f"{who} process")
    for axis, unit in zip(axes, ("seconds", "GiB"), strict=True):
        axis.set(xlabel="training pictures", ylabel=unit)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the runs' config")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pictures", default="10000,100000,1000000")
    parser.add_argument("--data", type=Path, default=Path(tempfile.gettempdir()) / "uhml-million")
    args = parser.parse_intermixed_args()
    counts = [int(n) for n in args.pictures.split(",")]
    args.out.mkdir(parents=True, exist_ok=True)
    root = args.data.absolute()
    making = make_all(root, max(counts) + num_test(max(counts)))
    print(f"making pictures: {making:.0f} s", flush=True)
    listing = measure_listing(root)
    print(f"listing a folder of {listing['pictures']:,} pictures: {listing['seconds']:.1f} s", flush=True)
    print(f"\n| pictures | {' | '.join(f'{phase}, s' for phase in PHASES)} | start-up, s | ", end="")
    print(f"{' | '.join(f'GiB in {phase}' for phase in PHASES)} | a worker's own, MiB |")
    print("|---" * (3 + 2 * len(PHASES)) + "|")
    runs = []
    for n in counts:
        with tempfile.TemporaryDirectory(dir=args.data.parent) as scratch:
            run = measure(n, root, Path(scratch), args.overrides)
        runs.append(run)
        seconds = [f"{run['seconds'].get(phase, 0):.0f}" for phase in PHASES]
        gib = [f"{run['main'].get(phase, 0) / 2**30:.2f}" for phase in PHASES]
        worker = f"{max(run['worker'].values()) / 2**20:.0f}"
        print(f"| {n:,} | {' | '.join([*seconds, format(run['start_up'], '.1f'), *gib, worker])} |", flush=True)
        (args.out / "million.json").write_text(
            json.dumps({"making": making, "listing": listing, "runs": runs}, indent=2)
        )
    draw(runs, args.out / "million.png")


if __name__ == "__main__":
    main()
