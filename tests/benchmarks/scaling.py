"""How a training step scales over ranks: in time, in bytes on the wire, and in memory.

    python tests/benchmarks/scaling.py --out results/scaling configs/cars196-small.yaml data.root=.

Launches ranks by torchrun, with gloo, and has them take the trainer's steps on made pictures. Writes ``scaling.json``
and ``scaling.png``, and prints the tables.

* Time over 1, 2 and 4 ranks, one thread and one core each: weak, with ``train.global_batch_size`` views on every rank,
  and strong, with that many on all together. Ranks beyond the cores of the machine share them; the ideal allows for it.
  Launches are repeated in turn; medians. Beside it stands the processor time of all ranks together, for each view as a
  multiple of one rank's: what comes of more ranks alone, however busy the machine is with other things.
* Wire and memory over 1, 2, 4 and 8 ranks, of a network so small that what is ours shows: bytes that a rank sends in a
  step, which the system counts on each of its TCP connections, beside the least possible and ``uhml plan``'s figure;
  those and the time of agreeing to go on before each step; and the peak of a rank's memory, as the system counts it.
"""

import argparse
import json
import os
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import matplotlib
import torch

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from uhml import distributed
from uhml.config import load_config
from uhml.data.pictures import Pictures, Splits
from uhml.data.workers import next_together
from uhml.loss import HierarchicalLoss
from uhml.planning import costs
from uhml.planning.calibration import measure_network, nested_levels
from uhml.run.training_state import TrainingState
from uhml.train import build_model, train_step

WARM_UP, STEPS, AGREEMENTS, NUM_PICTURES = 3, 8, 100, 4096
TINY = ["model.backbone=test_efficientnet.r160_in1k", "model.weights=random", "data.image_size=32"]
TINY_BATCH = 64
PARTS = ("time", "wire")
# In the kernel's struct tcp_info.
BYTES_ACKED = 120


def bytes_sent():
    """Return the bytes that this process has sent over TCP, and that have arrived."""
    total = 0
    for number in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{number}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(number))) as connection:
                about = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
        except OSError:  # another kind of socket, or the folder that is listed
            continue
        total += struct.unpack_from("Q", about, BYTES_ACKED)[0]
    return total


def peak_memory():
    """Return the bytes that this process held at most."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(fields["VmHWM"].split()[0])


def rank(config, out):
    """Take steps, and write what they took."""
    with distributed.process_group("cpu"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[distributed.rank() % len(cores)]})
        torch.set_num_threads(1)
        world = distributed.world_size()
        model = build_model(config, True)
        network = measure_network(model, config)
        state = TrainingState(model, Splits(train=Pictures(paths=("a", "b"))), config)
        state.levels = nested_levels(NUM_PICTURES, len(config.hierarchy.cuts))
        loss = HierarchicalLoss(config.loss, len(config.hierarchy.cuts), config.mining.num_views)
        parallel = distributed.data_parallel(model)
        own = config.train.global_batch_size // world
        images = torch.randn(own, 3, config.data.image_size, config.data.image_size)
        rows = (torch.arange(own) + own * distributed.rank()) // config.mining.num_views
        batches = iter([(images, rows)] * (WARM_UP + STEPS))
        seconds = []
        for step in range(WARM_UP + STEPS):
            if step == WARM_UP:
                distributed.all_reduce_max(0)
                before, busy = bytes_sent(), time.process_time()
            started = time.perf_counter()
            train_step(parallel, *next_together(batches), state, loss, out)
            seconds.append(time.perf_counter() - started)
        busy = (time.process_time() - busy) / STEPS
        distributed.all_reduce_max(0)
        sent = (bytes_sent() - before) / STEPS
        before, started = bytes_sent(), time.perf_counter()
        for _ in range(AGREEMENTS):
            distributed.on_every_rank(lambda: None)
        found = {
            "seconds": statistics.median(seconds[WARM_UP:]),
            "busy": busy,
            "sent": sent,
            "agreement_seconds": (time.perf_counter() - started) / AGREEMENTS,
            "agreement_sent": (bytes_sent() - before) / AGREEMENTS,
            "memory": peak_memory(),
        }
        found["planned"], found["least"] = costs.wire_per_step(config, costs.Ranks(nodes=1, per_node=world), network)
        (out / f"{distributed.rank()}.json").write_text(json.dumps(found))


def launch(words, world, batch):
    """Return what the ranks found: the means over them, and the greatest memory."""
    with tempfile.TemporaryDirectory() as out:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
        own = [__file__, "--rank", "--out", out, *words, f"train.global_batch_size={batch}", "train.device=cpu"]
        done = subprocess.run([*torchrun, *own], stderr=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr)
        ranks = [json.loads(path.read_text()) for path in Path(out).glob("*.json")]
    assert len(ranks) == world
    found = {key: statistics.mean(rank[key] for rank in ranks) for key in ranks[0]}
    return {**found, "memory": max(rank["memory"] for rank in ranks), "ranks": world, "batch": batch}


def measure_time(words, repeats):
    batch = load_config(words[0], words[1:]).train.global_batch_size
    runs = []
    for _ in range(repeats):
        for world in (1, 2, 4):
            runs.append({"kind": "strong", **launch(words, world, batch)})
            if world > 1:
                runs.append({"kind": "weak", **launch(words, world, world * batch)})
    cores = len(os.sched_getaffinity(0))
    print(f"\n{cores} cores\n\n| ranks | strong: s a step | speed-up | ideal | processor time | ", end="")
    print("weak: s a step | efficiency | ideal | processor time |\n" + "|---" * 9 + "|")
    table = []
    for world in (1, 2, 4):
        row = {"ranks": world, "ideal_speed_up": min(world, cores), "ideal_efficiency": min(world, cores) / world}
        for kind in ("strong", "weak"):
            chosen = [run for run in runs if run["ranks"] == world and (run["kind"] == kind or world == 1)]
            row[kind] = statistics.median(run["seconds"] for run in chosen)
            row[f"{kind}_busy"] = statistics.median(world * run["busy"] / run["batch"] for run in chosen)
        table.append(row)
        row["speed_up"], row["efficiency"] = table[0]["strong"] / row["strong"], table[0]["weak"] / row["weak"]
        row["busy_strong"], row["busy_weak"] = (row[f"{k}_busy"] / table[0][f"{k}_busy"] for k in ("strong", "weak"))
        print(
            f"| {world} | {row['strong']:.3f} | {row['speed_up']:.2f} | {row['ideal_speed_up']} | "
            f"{row['busy_strong']:.2f} | {row['weak']:.3f} | {row['efficiency']:.2f} | {row['ideal_efficiency']:.2f} | "
            f"{row['busy_weak']:.2f} |",
            flush=True,
        )
    return {"cores": cores, "table": table, "runs": runs}


def measure_wire(words):
    runs = []
    print("\n| ranks | views | sent by a rank, kB | of the plan's | of the least | agreeing: bytes | ms | MiB a rank |")
    print("|---" * 8 + "|")
    for kind in ("strong", "weak"):
        for world in (1, 2, 4, 8):
            batch = TINY_BATCH if kind == "strong" else world * TINY_BATCH // 4
            run = {"kind": kind, **launch([*words, *TINY], world, batch)}
            runs.append(run)
            shares = [f"{run['sent'] / run[of]:.3f}" if run[of] else "" for of in ("planned", "least")]
            agreeing = f"{run['agreement_sent']:.0f} | {1000 * run['agreement_seconds']:.2f}"
            print(
                f"| {world} | {batch} | {run['sent'] / 1000:.1f} | {' | '.join(shares)} | {agreeing} | "
                f"{run['memory'] / 2**20:.0f} |",
                flush=True,
            )
    return {"runs": runs}


def draw(found, path):
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    if "time" in found:
        table = found["time"]["table"]
        ranks = [row["ranks"] for row in table]
        for key, label in (("speed_up", "strong: speed-up"), ("efficiency", "weak: efficiency")):
            (line,) = axes[0].plot(ranks, [row[key] for row in table], "o-", label=label)
            ideal = [row[f"ideal_{key}"] for row in table]
            axes[0].plot(ranks, ideal, "--", color=line.get_color(), label=f"ideal on {found['time']['cores']} cores")
        axes[0].set(xlabel="ranks", xticks=ranks)
    if "wire" in found:
        for kind, label in (("strong", f"{TINY_BATCH} views in all"), ("weak", f"{TINY_BATCH // 4} views a rank")):
            runs = [run for run in found["wire"]["runs"] if run["kind"] == kind]
            ranks = [run["ranks"] for run in runs]
            (line,) = axes[1].plot(ranks, [run["sent"] / 1e6 for run in runs], "o-", label=label)
            least = [run["least"] / 1e6 for run in runs]
            axes[1].plot(ranks, least, "--", color=line.get_color(), label="the least possible")
            axes[2].plot(ranks, [run["memory"] / 2**20 for run in runs], "o-", label=label)
        axes[1].set(xlabel="ranks", ylabel="MB sent a step and rank", xticks=ranks, ylim=(0, None))
        most = max(run["memory"] for run in found["wire"]["runs"]) / 2**20
        axes[2].set(xlabel="ranks", ylabel="peak memory of a rank, MiB", xticks=ranks, ylim=(0, 1.1 * most))
    for axis in axes:
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="+", metavar="CONFIG [key=value ...]")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--part", choices=PARTS, help="only this one, the other as it is in --out")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_intermixed_args()
    if args.rank:
        rank(load_config(args.words[0], args.words[1:]), args.out)
        return
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "scaling.json"
    found = json.loads(file.read_text()) if args.part and file.exists() else {}
    for part in [args.part] if args.part else PARTS:
        found[part] = measure_time(args.words, args.repeats) if part == "time" else measure_wire(args.words)
        file.write_text(json.dumps({"words": args.words, **found}, indent=2))
    draw(found, args.out / "scaling.png")


if __name__ == "__main__":
    main()
