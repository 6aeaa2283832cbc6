"""A trained network as one file that needs no run beside it: safetensors for uhml, ONNX for any other program.

Both files carry the same description as metadata, each value a text: ``config`` (YAML), ``step``, ``preprocessing``
(JSON, see :func:`preprocessing`), ``curvature`` and the ``uhml`` version.
:func:`uhml.run.checkpoint.find_checkpoint` reads the safetensors file back.
"""

import copy
import importlib.util
import json
import warnings
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

import uhml
from uhml import poincare
from uhml.config import dump_config
from uhml.errors import UserError
from uhml.files import opened_aside
from uhml.model import Embedder
from uhml.trained import Trained

TOLERANCE = 1e-5
"""Greatest difference of any coordinate between the points that an ONNX graph gives and the network's own."""

MAX_ONNX_BYTES = 2**31 - 2**20
"""An ONNX file is one protobuf message, which ends at 2 GiB; the graph takes little beside the weights."""


def preprocessing(trained: Trained) -> dict[str, Any]:
    """Return how a picture becomes the network's input: what :func:`uhml.data.transforms.plain_transform` does."""
    data, backbone = trained.config.data, trained.model.backbone
    crop = {"resize_shorter_side": round(data.image_size / data.center_crop)} if data.fit == "crop" else {}
    return {
        "size": data.image_size,
        **({} if data.reduce_to is None else {"reduce_shorter_side_to": data.reduce_to}),
        "fit": data.fit,
        **crop,
        "interpolation": "bicubic",
        "antialias": True,
        "channels": "RGB",
        "scale": 1 / 255,
        "mean": list(backbone.mean),
        "std": list(backbone.std),
    }


def describe(trained: Trained) -> dict[str, str]:
    """Return the metadata of an exported file."""
    return {
        "uhml": uhml.__version__,
        "config": dump_config(trained.config),
        "step": str(trained.step),
        "preprocessing": json.dumps(preprocessing(trained)),
        "curvature": str(trained.config.model.curvature),
    }


def write_safetensors(trained: Trained, path: Path) -> None:
    """Write weights and description.

    Raises:
        OSError: the file cannot be written; what was there before is untouched.
    """
    # As the format wants them; convolutions keep theirs with the channels last.
    weights = {name: tensor.contiguous() for name, tensor in trained.model.state_dict().items()}
    with opened_aside(path) as file:
        file.write(safetensors.torch.save(weights, {"format": "pt", **describe(trained)}))


def write_onnx(trained: Trained, path: Path) -> float | None:
    """Write one graph, from ``images`` ``[batch, 3, size, size]`` float32 to ``points`` ``[batch, embedding_dim]``.

    It computes in float32, whatever ``model.inference_precision`` says, and takes any number of pictures.

    Returns:
        The greatest difference of a coordinate, over a few pictures, between onnxruntime's points and the network's
        own; None where onnxruntime is not installed, and nothing was compared.

    Raises:
        UserError: a package is missing, the network cannot be expressed in ONNX, is too large, or the points differ by
            more than ``TOLERANCE``; what was there before is untouched.
        OSError: the file cannot be written; likewise.
    """
    if missing := [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]:
        raise UserError(f"--format onnx needs {' and '.join(missing)}: pip install 'uhml[onnx]'.")
    if sum(tensor.nbytes for tensor in trained.model.state_dict().values()) > MAX_ONNX_BYTES:
        raise UserError("An ONNX file ends at 2 GiB, and the weights are more: take --format safetensors.")
    backbone = trained.config.model.backbone
    model = copy.deepcopy(trained.model).cpu()
    model.inference_precision = "float32"
    images = _noise(trained, 2)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch and onnxscript to their own developers
            program = torch.onnx.export(
                _Graph(model).eval(),
                (images,),
                dynamo=True,
                input_names=["images"],
                output_names=["points"],
                dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
                verbose=False,
            )
    except Exception as e:  # the exporter raises nearly anything at what it does not know
        reason = " ".join(str(e.__cause__ or e).split())[:300]
        raise UserError(f"torch cannot express model.backbone={backbone} in ONNX: {reason}") from e
    assert program is not None
    program.model.metadata_props.update(describe(trained))
    with opened_aside(path) as file:
        # Into the open file, by its name: the exporter writes nowhere else.
        program.save(file.name, external_data=False)
        difference = _difference(file.name, model, trained)
        # Written so that a difference that is no number is refused, too.
        if difference is not None and not difference <= TOLERANCE:
            raise UserError(
                f"onnxruntime's points are up to {difference:.1e} from the network's own, more than {TOLERANCE:.0e}: "
                f"model.backbone={backbone} is not written, take --format safetensors."
            )
    return difference


class _Graph(nn.Module):
    """The network without what no exporter follows: autocast."""

    def __init__(self, model: Embedder) -> None:
        super().__init__()
        self.network, self.head = model.backbone.network, model.head

    def forward(self, images: Tensor) -> Tensor:
        tangent = self.head.clip(self.head.tangent(self.network(images)))
        return poincare.exponential_map(tangent, self.head.curvature)


def _difference(file: str, model: Embedder, trained: Trained) -> float | None:
    """Compare onnxruntime with the network itself, on batches of other sizes than the graph was made with."""
    if importlib.util.find_spec("onnxruntime") is None:
        return None
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    differences = []
    for batch_size in (1, 5):
        images = _noise(trained, batch_size)
        with torch.inference_mode():
            ours = model(images)
        (theirs,) = session.run(["points"], {"images": images.numpy()})
        differences.append((ours - torch.from_numpy(theirs)).abs().max())
    return float(torch.stack(differences).max())


def _noise(trained: Trained, batch_size: int) -> Tensor:
    """Return pictures of random values in the range that the network takes, the same at every call."""
    backbone, side = trained.model.backbone, trained.config.data.image_size
    generator = torch.Generator().manual_seed(0)
    mean, std = (torch.tensor(values)[:, None, None] for values in (backbone.mean, backbone.std))
    return (torch.rand(batch_size, 3, side, side, generator=generator) - mean) / std
