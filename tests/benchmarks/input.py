"""Does the input keep up with the step? Views a second of loader, step and both, from files and from the cache.

    python tests/benchmarks/input.py --out results/input configs/cars196-small.yaml data.root=cars196

Writes ``input.json`` and ``input.png``, and prints two tables. Repeats of all take turns, and medians are shown.

* Views a second, of the loader alone, of the step alone, and of both together: from the pictures' files; from
  ``data.cache``; and from a cache of pictures that ``data.reduce_to`` has reduced to twice ``data.image_size``. All
  read from memory that is warm: what is compared is decoding, not disks.
* Milliseconds of the processor for the augmentation of one decoded picture: by Pillow, as uhml does it; by
  torchvision's transforms on uint8 tensors, picture by picture; and on batches of the same pictures, where all of a
  batch are cropped, mirrored and coloured alike, as these transforms draw once for what they are given: what is least
  to be had, not what could be trained with.
"""

import uhml  # noqa: F401 (before torch, which reads then how its threads are to wait)

# isort: split
import argparse
import contextlib
import dataclasses
import json
import statistics
import tempfile
import time
from pathlib import Path

import matplotlib
import torch
from torchvision.transforms import v2

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from uhml import train
from uhml.config import load_config
from uhml.data.cache import cache_pictures
from uhml.data.pictures import Splits
from uhml.data.sampling import evenly
from uhml.data.transforms import BICUBIC, training_transform
from uhml.data.verify import list_pictures
from uhml.distributed import process_group
from uhml.loss import HierarchicalLoss
from uhml.planning.calibration import nested_levels
from uhml.run.training_state import TrainingState

AUGMENTED, BATCH = 64, 16
WARM_UP = 2


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pictures", type=int, default=1024, help="training pictures to use (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=6, help="steps of each repeat (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_intermixed_args()
    args.out.mkdir(parents=True, exist_ok=True)
    config = without_end(load_config(args.config, args.overrides))
    everything = list_pictures(config.data).train
    rows = evenly(len(everything), args.pictures)
    files = dataclasses.replace(everything.select(rows), cached=None)
    with process_group(config.train.device) as device, tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        ways = {"files": (files, None)}
        caches = {}
        for name, side in (("cache", config.data.reduce_to), ("reduced cache", 2 * config.data.image_size)):
            data = dataclasses.replace(config.data, cache=str(folder / name), reduce_to=side)
            began = time.perf_counter()
            (cached,) = cache_pictures([files.paths], data)
            seconds = (time.perf_counter() - began) / len(files)
            size = sum(path.stat().st_size for path in (folder / name).iterdir()) / len(files)
            caches[name] = {"bytes_per_picture": size, "seconds_per_picture": seconds, "reduce_to": side}
            ways[name] = (dataclasses.replace(files, cached=cached), side)
        seconds = measure(config, ways, args.steps, args.repeats, folder, device)
        augmented = augment(config, ways["cache"][0], args.repeats)
    views = args.steps * config.train.global_batch_size
    rates = {
        what: {way: views / statistics.median(times) for way, times in found.items()} for what, found in seconds.items()
    }
    milliseconds = {name: 1000 * statistics.median(times) for name, times in augmented.items()}
    said = {
        "device": str(device),
        "threads": torch.get_num_threads(),
        "num_workers": config.data.num_workers,
        "image_size": config.data.image_size,
        "pictures": len(files),
        "caches": caches,
        "views_per_second": rates,
        "augment_milliseconds": milliseconds,
        "seconds": seconds,
    }
    (args.out / "input.json").write_text(json.dumps(said, indent=2) + "\n")
    draw(rates, milliseconds, args.out / "input.png")
    print("| views/s | loader alone | step alone | both | both / step |\n|---|---|---|---|---|")
    for way in ways:
        load, both, step = rates["load"][way], rates["both"][way], rates["step"]["memory"]
        print(f"| {way} | {load:.0f} | {step:.0f} | {both:.0f} | {both / step:.2f} |")
    print("\n| augmentation of a picture | ms |\n|---|---|")
    for name, value in milliseconds.items():
        print(f"| {name} | {value:.2f} |")


def without_end(config):
    """Return the config of a run whose batches come in one go, with no clustering to wait for."""
    hierarchy = dataclasses.replace(config.hierarchy, recluster_every=10**6)
    return dataclasses.replace(config, hierarchy=hierarchy, train=dataclasses.replace(config.train, num_steps=10**6))


def measure(config, ways, num_steps, repeats, folder, device):
    """Return the seconds of ``num_steps`` steps, of each repeat, by what is done and where the pictures are from."""
    num_levels = len(config.hierarchy.cuts)
    files = ways["files"][0]
    model = train.build_model(config, False).to(device)
    state = TrainingState(model, Splits(train=files), config)
    state.levels = nested_levels(len(files), num_levels).to(device)
    loss = HierarchicalLoss(config.loss, num_levels, config.mining.num_views)

    def learn(batch):
        train.train_step(state.model, *batch, state, loss, folder)

    def run(way, *, learns):
        pictures, side = ways[way]
        state.config = dataclasses.replace(config, data=dataclasses.replace(config.data, reduce_to=side))
        # Some before the clock starts, for the start of the workers.
        with contextlib.closing(train.batches_left(state, pictures)) as batches:
            for i in range(WARM_UP + num_steps):
                if i == WARM_UP:
                    began = time.perf_counter()
                batch = next(batches)
                if learns:
                    learn(batch)
            finish(device)
            return time.perf_counter() - began

    state.config = dataclasses.replace(config, data=dataclasses.replace(config.data, num_workers=0))
    held = next(train.batches_left(state, files))

    def step_alone():
        began = time.perf_counter()
        for _ in range(num_steps):
            learn(held)
        finish(device)
        return time.perf_counter() - began

    learn(held)
    seconds = {"load": {way: [] for way in ways}, "step": {"memory": []}, "both": {way: [] for way in ways}}
    for _ in range(repeats):
        for way in ways:
            seconds["load"][way].append(run(way, learns=False))
            seconds["both"][way].append(run(way, learns=True))
        seconds["step"]["memory"].append(step_alone())
    return seconds


def finish(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def augment(config, pictures, repeats):
    """Return the processor's seconds for one view, by Pillow and on tensors."""
    pillow = training_transform(config.data, (0.5,) * 3, (0.5,) * 3)
    crop = v2.RandomResizedCrop(
        config.data.image_size, config.data.augment_scale, config.data.augment_ratio, interpolation=BICUBIC
    )
    # The same steps, but for the crop, whose shape by data.fit takes no time.
    on_tensors = v2.Compose([crop, *pillow.transforms[2:]])
    images = [pictures.load(i) for i in range(min(AUGMENTED, len(pictures)))]
    tensors = [v2.functional.pil_to_tensor(image) for image in images]
    # Of one shape, as a batch must be.
    batches = [tensor.expand(BATCH, -1, -1, -1).contiguous() for tensor in tensors[: len(tensors) // 4]]
    ways = {
        "Pillow": (pillow, images, 1),
        "tensors": (on_tensors, tensors, 1),
        f"tensors, {BATCH} at once": (on_tensors, batches, BATCH),
    }
    seconds = {name: [] for name in ways}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a worker
    for _ in range(repeats + 1):
        for name, (transform, inputs, size) in ways.items():
            torch.manual_seed(0)
            began = time.process_time()
            for one in inputs:
                transform(one)
            seconds[name].append((time.process_time() - began) / len(inputs) / size)
    torch.set_num_threads(threads)
    return {name: times[1:] for name, times in seconds.items()}


def draw(rates, milliseconds, path):
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.2), layout="constrained", width_ratios=(3, 2))
    ways = list(rates["load"])
    for i, (what, label) in enumerate((("load", "loader alone"), ("both", "loader and step"))):
        places = [place + 0.38 * i for place in range(len(ways))]
        bars = axes[0].bar(places, [rates[what][way] for way in ways], 0.36, label=label)
        axes[0].bar_label(bars, fmt="%.0f")
    axes[0].axhline(rates["step"]["memory"], color="0.3", linestyle="--", label="step alone")
    axes[0].set_xticks([place + 0.19 for place in range(len(ways))], ways)
    axes[0].set_ylabel("views a second")
    axes[0].margins(y=0.25)
    axes[0].legend(ncols=3, fontsize=8, loc="upper left")
    bars = axes[1].barh(list(milliseconds)[::-1], list(milliseconds.values())[::-1])
    axes[1].bar_label(bars, fmt="%.2f", padding=3)
    axes[1].margins(x=0.16)
    axes[1].set_xlabel("milliseconds to augment a picture")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
