"""The model card of an exported network: how to use it, what it is from, how good it is, and whose it is."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import timm

import uhml
from uhml.config import WEIGHT_PACKAGES, Config, ModelConfig, dump_config
from uhml.model.backbone import TORCHVISION
from uhml.reporting.runs import Result
from uhml.run.checkpoint import EXPORTED
from uhml.trained import Trained
from uhml.trained.export import preprocessing

DATASETS = {
    "glyphs": "characters drawn from the fonts of matplotlib",
    "cub200": "Caltech-UCSD Birds 200-2011 (Wah et al., 2011)",
    "cars196": "Cars196 (Krause et al., 2013)",
    "sop": "Stanford Online Products (Song et al., CVPR 2016), or pictures in its layout",
    "inshop": "In-shop Clothes Retrieval of DeepFashion (Liu et al., CVPR 2016)",
    "folder": "a folder of pictures",
    "list": "a list of pictures",
    "shards": "tar files of pictures",
}

NETWORKS = {
    "frozen": "frozen backbone, cosine",
    "start": "untrained embedding, ball",
    "trained": "**trained embedding, ball**",
}
"""The parts of result.json, and what they are scores of."""

UHML_CODE = """\
from uhml.trained import load_trained

network = load_trained("model.safetensors")
points = network.embed(["a.jpg", "b.jpg"])
"""

ONNX_CODE = """\
import numpy as np, onnxruntime
from PIL import Image, ImageOps

def read(path):
    picture = ImageOps.exif_transpose(Image.open(path))
    if picture.mode.startswith("I"):  # of 16 bits, which Pillow would cut off at 255
        picture = Image.fromarray((np.asarray(picture) // 257).astype(np.uint8))
    picture = picture.convert("RGB")
{fit}
    return ((np.asarray(picture) / 255 - {mean}) / {std}).transpose(2, 0, 1)

session = onnxruntime.InferenceSession("model.onnx")
images = np.stack([read("a.jpg"), read("b.jpg")]).astype(np.float32)
(points,) = session.run(["points"], {{"images": images}})
"""

REDUCE_CODE = """\
    if min(picture.size) > {reduce_shorter_side_to}:
        smaller = ({reduce_shorter_side_to} * side // min(picture.size) for side in picture.size)
        picture = picture.resize(tuple(smaller), Image.Resampling.BICUBIC)
"""

CROP_CODE = """\
    width, height = ({resize_shorter_side} * side // min(picture.size) for side in picture.size)
    left, top = round((width - {size}) / 2), round((height - {size}) / 2)
    picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    picture = picture.crop((left, top, left + {size}, top + {size}))"""

SQUASH_CODE = """\
    picture = picture.resize(({size}, {size}), Image.Resampling.BICUBIC)"""


def model_card(trained: Trained, file: str, result: Result | None, difference: float | None) -> str:
    """Return the text of README.md, in which names that come from the user are escaped.

    Args:
        trained: the network.
        file: the name of the exported file, "model.safetensors" or "model.onnx".
        result: what ``result.json`` of its run holds, if that is about this network.
        difference: what :func:`uhml.trained.export.write_onnx` returned.
    """
    config = _without_folders(trained.config)
    model, data = config.model, config.data
    licence = licence_of_weights(model)
    named = f", `data.root` named {escape(data.root)}" if data.root else ""
    curvature = f"{model.curvature:g}"
    distance = (
        f"`d(x, y) = 2/√c · arsinh( √c |x-y| / √((1 - c|x|²)(1 - c|y|²)) )` with c = {curvature}"
        if model.curvature
        else "`2 |x-y|`, as curvature 0 is flat space"
    )
    sections = [
        # What model hubs read.
        f"---\nlibrary_name: uhml\nlicense: {licence or 'unknown'}\npipeline_tag: image-feature-extraction\n---",
        f"# {escape(model.backbone)} in the Poincaré ball",
        f"Maps a picture to a point of the ball of {model.embedding_dim} dimensions and curvature -{curvature}, where "
        f"pictures that look alike lie near each other. Trained without labels by uhml {uhml.__version__}, for "
        f"{trained.step} steps.",
        "## Use",
        _use(trained, file, difference),
        f"The distance of two points is {distance}.",
        "## Pre-processing",
        f"```json\n{json.dumps(preprocessing(trained), ensure_ascii=False)}\n```",
        "The same is in the file's metadata, as `preprocessing`. uhml also puts transparent pictures on white.",
        "## Data",
        f"`data.dataset={data.dataset}`: {DATASETS[data.dataset]}{named}. Its terms may bind the weights, too: look "
        "them up.",
        "## Scores",
        _scores(result) if result else "None known of this step.",
        "## Licence of the weights",
        f"Training started from {_start_of(model)}. Their licence: {licence or 'unknown: look it up'}.",
        "## Recipe",
        f"```yaml\n{dump_config(config).strip()}\n```",
    ]
    return "\n\n".join(sections) + "\n"


def licence_of_weights(model: ModelConfig) -> str | None:
    """Return the licence of the weights that training started from, as far as it is known."""
    if model.init_from is not None:
        return None
    if model.weights == "package":
        return "apache-2.0"
    if model.weights == "hub" and not model.backbone.startswith(TORCHVISION):
        pretrained = timm.get_pretrained_cfg(model.backbone)
        return pretrained.license if pretrained is not None else None
    return None


def escape(name: str) -> str:
    """Return text that Markdown and HTML show as it is, on one line."""
    one_line = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in name)
    return re.sub(r"([!-/:-@\[-`{-~])", r"\\\1", one_line)


def _start_of(model: ModelConfig) -> str:
    if model.init_from is not None:
        return f"the weights of another run, {escape(model.init_from)}"
    known = {
        "package": f"the ImageNet weights of the package {WEIGHT_PACKAGES.get(model.backbone)}",
        "hub": f"the weights that the hub has for {escape(model.backbone)}",
        "random": "random weights",
    }
    return known.get(model.weights, f"the weights in {escape(model.weights)}")


def _use(trained: Trained, file: str, difference: float | None) -> str:
    shape = preprocessing(trained)
    if file == EXPORTED:
        return (
            f"`{file}` holds the weights and, as metadata, all that uhml needs to build the network. The folder is as "
            "good as a run's for `uhml evaluate`, `embed` and `search`, and `model.init_from` takes it, too. In "
            f"Python:\n\n```python\n{UHML_CODE}```"
        )
    side = shape["size"]
    compared = (
        "Nothing was compared at export, for want of onnxruntime."
        if difference is None
        else f"onnxruntime's points were within {max(difference, 1e-9):.1e} of the network's own at export."
    )
    if trained.config.model.inference_precision != "float32":
        compared += (
            f" They are computed in float32; uhml itself does so in {trained.config.model.inference_precision}, as the "
            "recipe says, and differs by that."
        )
    reduce = REDUCE_CODE if "reduce_shorter_side_to" in shape else ""
    fit = (reduce + (CROP_CODE if shape["fit"] == "crop" else SQUASH_CODE)).format_map(shape)
    code = ONNX_CODE.format(fit=fit, mean=shape["mean"], std=shape["std"])
    return (
        f"`{file}` maps `images` [batch, 3, {side}, {side}] float32 to `points` "
        f"[batch, {trained.config.model.embedding_dim}]. {compared}\n\n```python\n{code}```"
    )


def _scores(result: Result) -> str:
    found = {name: scores for part, name in NETWORKS.items() if (scores := getattr(result, part)) is not None}
    if not found:
        return "None: there were no classes to score on."
    ranks = list(next(iter(found.values())).recall_at_k)
    rows = [["", *(f"R@{k}" for k in ranks), "MAP@R", "NMI"], ["---"] * (len(ranks) + 3)]
    for name, scores in found.items():
        values = [*scores.recall_at_k.values(), scores.map_at_r, scores.nmi]
        rows.append([name, *(f"{100 * value:.1f}" for value in values)])
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"On classes that were not trained on, per cent:\n\n{table}"


def _without_folders(config: Config) -> Config:
    """Leave of every path its last name: where files lay on one machine is nobody else's business, nor of use."""
    data, model = config.data, config.model
    replace: Any = dataclasses.replace  # mypy does not see that pydantic's dataclasses are such
    return replace(
        config,
        data=replace(data, root=data.root and Path(data.root).name, cache=None),
        model=replace(
            model, weights=Path(model.weights).name, init_from=model.init_from and Path(model.init_from).name
        ),
    )
