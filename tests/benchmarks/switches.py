"""What each switch of computing brings and costs on this machine.

    python tests/benchmarks/switches.py --out results/switches configs/cars196-small.yaml data.root=cars196

Writes ``switches.json`` and ``switches.png``, and prints the table. Each row is a process of its own, with one thread
on a CPU, and takes turns with the plain one: float32, uncompiled, all at once, fused AdamW, channels last. The columns:

* images/s, and how many times the plain one's: of embedding a batch, and of the trainer's own step with all but the
  reading of pictures. Medians, of processor time on a CPU.
* GiB: most memory of the process while it does that; on a GPU, most that is allocated.
* Deviation from the plain one: of the points, the greatest of a picture, by the point's norm; of the gradient, the
  greatest of a weight tensor, by the norm of that tensor's gradient; and of all gradients together.
* Start: seconds of the first forward pass and the first step. torch keeps what it has compiled, so that compiled code
  starts sooner the second time.
"""

import argparse
import dataclasses
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import matplotlib
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from uhml import train
from uhml.config import load_config
from uhml.data.sampling import evenly
from uhml.data.verify import list_pictures
from uhml.environment import keep_freed_memory
from uhml.loss import HierarchicalLoss
from uhml.model import Backbone
from uhml.optim import build_optimizer
from uhml.planning.calibration import nested_levels
from uhml.run.training_state import TrainingState

PLAIN = "plain"
BFLOAT16 = ["model.precision=bfloat16", "model.inference_precision=bfloat16"]
KINDS = {
    PLAIN: [],
    "channels first": [],
    "bfloat16": BFLOAT16,
    "micro-batches of a quarter": [],
    "AdamW foreach": [],
    "AdamW loop": [],
    "freed memory given back": [],
    "compiled": ["train.compile=true"],
    "compiled, bfloat16": ["train.compile=true", *BFLOAT16],
}
"""Rows, and what each adds to the plain config; those that add nothing are no switches, see :func:`child`."""

FITTED = 640
"""Pictures that the head is fitted to."""


def plain(args):
    none = ["train.compile=false", "train.micro_batch_size=null", "model.init_from=null"]
    float32 = [setting.replace("bfloat16", "float32") for setting in BFLOAT16]
    return load_config(args.config, [*args.overrides, *float32, *none, *KINDS[args.child or PLAIN]])


def some_pictures(config):
    pictures = list_pictures(config.data).train
    return pictures.select(evenly(len(pictures), FITTED))


def device_of(config):
    return torch.device("cuda" if torch.cuda.is_available() and config.train.device != "cpu" else "cpu")


def prepare(args, folder):
    """Write what all rows start from: the network's weights, and a batch of pictures."""
    config = plain(args)
    pictures = some_pictures(config)
    model = train.build_model(config, True).to(device_of(config)).eval()
    train.start_head(model, pictures, config)
    state = TrainingState(model, train.Splits(train=pictures), config)
    state.levels = nested_levels(len(pictures), len(config.hierarchy.cuts)).to(model.device)
    images, rows = next(train.batches_left(state, pictures))
    torch.save({"model": model.state_dict(), "images": images, "rows": rows}, folder / "start.pt")


def child(args):
    """Measure what is asked for, line by line, and answer likewise."""
    kind, folder = args.child, args.out
    torch.set_num_threads(1)
    if kind != "freed memory given back":
        keep_freed_memory()
    if kind == "channels first":
        Backbone.forward = lambda self, images: self.network(images)
    config = plain(args)
    device, start = device_of(config), torch.load(folder / "start.pt", weights_only=True)
    if kind == "micro-batches of a quarter":
        options = dataclasses.replace(config.train, micro_batch_size=-(-len(start["images"]) // 4))
        config = dataclasses.replace(config, train=options)
    model = train.build_model(config, False).to(device).eval()
    model.load_state_dict(start["model"])
    if kind == "channels first":
        model.backbone.to(memory_format=torch.contiguous_format)
    optimizers = {"AdamW foreach": {"foreach": True}, "AdamW loop": {"foreach": False}}
    with mock.patch("uhml.run.training_state.build_optimizer", other_adamw(**optimizers.get(kind, {"fused": True}))):
        pictures = some_pictures(config)
        state = TrainingState(model, train.Splits(train=pictures), config)
    if kind in optimizers:
        state.optimizer.found_inf = None  # by which a fused one leaves a step out; others know nothing of it
    state.levels = nested_levels(len(pictures), len(config.hierarchy.cuts)).to(device)
    loss_function = HierarchicalLoss(config.loss, len(state.levels), config.mining.num_views)
    images = start["images"].to(device)

    def forward():
        with torch.inference_mode():
            return model.eval()(images)

    def step():
        return train.train_step(model, images, start["rows"], state, loss_function, folder)[1]

    def timed(work):
        clock = time.process_time if device.type == "cpu" else time.perf_counter
        began = clock()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return clock() - began

    began = time.perf_counter()
    if config.train.compile:
        model.backbone.compile_network(len(images))
    points = forward()
    step()
    first = time.perf_counter() - began
    found = {"points": points.cpu(), "gradients": [p.grad.cpu() for p in model.parameters() if p.grad is not None]}
    torch.save(found, folder / f"{slug(kind)}.pt")
    timed(step)
    forget_peak(device)
    tell(first)
    for line in sys.stdin:
        tell(
            {"forward": lambda: timed(forward), "step": lambda: timed(step), "peak": lambda: peak(device)}[
                line.strip()
            ]()
        )


def other_adamw(**how):
    def build(model, options):
        groups = build_optimizer(model, options).param_groups
        return torch.optim.AdamW(
            [{key: group[key] for key in ("params", "lr", "weight_decay")} for group in groups], **how
        )

    return build


def forget_peak(device):
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak(device):
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def tell(value):
    # Whatever else writes to stdout, libraries' remarks included, is not an answer.
    print(f"ANSWER {json.dumps(value)}", flush=True)


def slug(kind):
    return kind.replace(" ", "-").replace(",", "")


class Child:
    """A row's process."""

    def __init__(self, kind, args, folder):
        arguments = [args.config, *args.overrides, "--out", str(folder), "--child", kind]
        self.process = subprocess.Popen(
            [sys.executable, __file__, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        self.first = self.answer()

    def answer(self):
        for line in self.process.stdout:
            if line.startswith("ANSWER "):
                return json.loads(line.removeprefix("ANSWER "))
        raise SystemExit(f"A row's process ended with status {self.process.wait()}.")

    def ask(self, what):
        self.process.stdin.write(f"{what}\n")
        self.process.stdin.flush()
        return self.answer()

    def end(self):
        self.process.stdin.close()
        self.process.wait()


def deviation(folder, kind):
    plain, other = (torch.load(folder / f"{slug(name)}.pt", weights_only=True) for name in (PLAIN, kind))
    points = (other["points"] - plain["points"]).norm(dim=1) / plain["points"].norm(dim=1)
    pairs = list(zip(other["gradients"], plain["gradients"], strict=True))
    each = [float((a - b).norm() / b.norm()) for a, b in pairs if b.norm() > 0]
    norms = torch.tensor([[(a - b).norm(), b.norm()] for a, b in pairs]).norm(dim=0)
    return {"points": float(points.max()), "gradient": max(each), "all gradients": float(norms[0] / norms[1])}


def draw(rows, path):
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained", sharey=True)
    names = [row["kind"] for row in rows][::-1]
    for axis, key, title in zip(
        axes,
        ("forward_times", "step_times", "bytes"),
        ("embedding, times the plain one", "training step, times the plain one", "memory, GiB"),
        strict=True,
    ):
        values = [row[key] / (2**30 if key == "bytes" else 1) for row in rows][::-1]
        bars = axis.barh(names, values, color=["0.6" if name == PLAIN else "C0" for name in names])
        axis.bar_label(bars, fmt="%.2f", padding=3)
        axis.margins(x=0.16)
        axis.set_title(title, fontsize=10)
        axis.axvline(values[-1], color="0.4", linewidth=0.8, linestyle=":")
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--kinds", default="", help="rows, separated by ';' (default: all)")
    parser.add_argument("--child", choices=KINDS, help=argparse.SUPPRESS)
    args = parser.parse_intermixed_args()
    if args.child:
        child(args)
        return
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    config, rows = plain(args), []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prepare(args, folder)
        batch = len(torch.load(folder / "start.pt", weights_only=True)["images"])
        reference = Child(PLAIN, args, folder)
        for kind in [name for name in args.kinds.split(";") if name] or KINDS:
            other = reference if kind == PLAIN else Child(kind, args, folder)
            seconds = {"forward": [], "step": []}
            for _ in range(args.repeats):
                for what, pairs in seconds.items():
                    pairs.append((other.ask(what), reference.ask(what)))
            row = {"kind": kind, "start_seconds": other.first, "bytes": other.ask("peak"), "seconds": seconds}
            for what, pairs in seconds.items():
                row[what] = batch / statistics.median(own for own, _ in pairs)
                row[f"{what}_times"] = 1.0 if kind == PLAIN else statistics.median(b / a for a, b in pairs)
            rows.append(row | {"deviation": deviation(folder, kind)})
            # At once: what compiles may take long.
            said = {"device": str(device_of(config)), "torch": torch.__version__, "batch": batch, "rows": rows}
            (args.out / "switches.json").write_text(json.dumps(said, indent=2) + "\n")
            draw(rows, args.out / "switches.png")
            if other is not reference:
                other.end()
            print(f"{kind}: {row['start_seconds']:.1f} s to start", file=sys.stderr, flush=True)
        reference.end()
    print("| | embedding, images/s | training step, images/s | GiB | deviation of points | of a gradient | of all |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        rates = " | ".join(f"{row[what]:.0f} ({row[f'{what}_times']:.2f} x)" for what in ("forward", "step"))
        deviations = " | ".join(f"{value:.1e}" for value in row["deviation"].values())
        print(f"| {row['kind']} | {rates} | {row['bytes'] / 2**30:.2f} | {deviations} |")


if __name__ == "__main__":
    main()
