"""What `uhml plan` predicts against what runs take.

    python tests/benchmarks/plan_check.py CONFIG [key=value ...] --out results/

Plans and runs take turns, so that both meet the machine equally busy; the medians of the repeats are compared. The
parts of a run and the memory of its process are looked up ten times a second, in ``status.json`` and in /proc.
Writes ``plan_check.json``.
"""

import argparse
import collections
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

UHML = [sys.executable, "-m", "uhml"]
GIB = 2**30


def plan(words):
    """What is predicted: seconds by part, and GiB."""
    start = time.perf_counter()
    done = subprocess.run([*UHML, "plan", *words, "--json"], stdout=subprocess.PIPE, check=True)
    found = json.loads(done.stdout)
    seconds, memory = found["seconds"], found["memory_main"]
    return {
        "steps": seconds["steps"],
        "clustering": sum(seconds[part] for part in ("embedding", "search", "linkage", "recording")),
        "evaluation": seconds["evaluation"],
        "all": seconds["total"],
        "GiB": memory["peak"] / GIB,
        "planning": time.perf_counter() - start,
    }


def train(words):
    """What a run takes: the same, by its phases."""
    phases = {"train": "steps", "embed": "clustering", "cluster": "clustering", "evaluate": "evaluation"}
    found = collections.Counter()
    peaks = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        run = subprocess.Popen([*UHML, "train", *words, "--run-dir", folder, "--overwrite"], stdout=subprocess.DEVNULL)
        last = time.perf_counter()
        while run.poll() is None:
            time.sleep(0.1)
            now = time.perf_counter()
            try:
                status = json.loads((Path(folder) / "status.json").read_text())
                # What a process takes to end is no part of the run that is planned.
                phase = status["phase"] if status["state"] == "running" else None
                held = int(Path(f"/proc/{run.pid}/statm").read_text().split()[1]) * 4096 / GIB
            except (OSError, ValueError, IndexError):
                phase = None
            if phase is not None:
                found[phases[phase]] += now - last
                peaks[phase] = max(peaks[phase], held)
            last = now
        assert run.returncode == 0
        result = json.loads((Path(folder) / "result.json").read_text())
    return {**found, "all": result["seconds"], "GiB": max(peaks.values()), **{f"GiB {k}": v for k, v in peaks.items()}}


def main():
    """Plan and run by turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="+", metavar="CONFIG [key=value ...]")
    parser.add_argument("--out", type=Path, default=Path(), help="folder for plan_check.json")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    runs = []
    for _ in range(args.repeats):
        runs.append({"predicted": plan(args.words), "measured": train(args.words)})
        print(json.dumps(runs[-1], indent=1), flush=True)
    medians = {}
    for part in ("steps", "clustering", "evaluation", "all", "GiB"):
        predicted, measured = (statistics.median(run[who][part] for run in runs) for who in ("predicted", "measured"))
        medians[part] = {"predicted": predicted, "measured": measured, "ratio": predicted / measured}
        print(f"{part:12} predicted {predicted:8.2f}  measured {measured:8.2f}  ratio {predicted / measured:.2f}")
    (args.out / "plan_check.json").write_text(
        json.dumps({"words": args.words, "medians": medians, "runs": runs}, indent=1)
    )


if __name__ == "__main__":
    main()
