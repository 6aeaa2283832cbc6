"""The exported file, used as its card says, gives the network's own points."""

import html
import json
import re

import numpy as np
import onnxruntime
import pytest
import torch
from markdown_it import MarkdownIt
from PIL import Image
from safetensors import safe_open

from uhml import cli
from uhml.config import dump_config, parse_config
from uhml.data.decode import load_rgb
from uhml.data.transforms import plain_transform
from uhml.errors import UserError
from uhml.model import build_embedder
from uhml.run.checkpoint import load_weights, save_checkpoint
from uhml.trained import card, export, load_trained


@pytest.fixture
def make_run(tmp_path):
    """Write a run's folder with a network of random weights, and features that a head was fitted to."""

    def _make_run(image_size=48, step=3, data=None, **model):
        config = parse_config(
            {
                "data": {"image_size": image_size, **(data or {})},
                "model": {"backbone": "test_resnet", "weights": "random", "embedding_dim": 12, **model},
            },
            "a test",
        )
        torch.manual_seed(0)
        network = build_embedder(config.model, config.data.image_size)
        # As far from the origin as points of a trained network, some at the clip and some not.
        network.eval()
        features = network.features(torch.rand(16, 3, image_size, image_size))
        network.head.mean.copy_(features.mean(0))
        tangent = network.head.linear(features - features.mean(0))
        network.head.scale.copy_(config.model.clip_radius / tangent.norm(dim=1).median())
        (tmp_path / "run" / "checkpoints").mkdir(parents=True)
        state = {"model": network.state_dict(), "config": dump_config(config), "step": step}
        save_checkpoint(tmp_path / "run" / "checkpoints", step, state, keep=1)
        return tmp_path / "run"

    return _make_run


@pytest.fixture
def pictures(tmp_path):
    """Two pictures, neither square; one of them is grey, of 16 bits."""
    random = np.random.default_rng(0)
    paths = [tmp_path / "a.jpg", tmp_path / "b.jpg"]
    Image.fromarray(random.integers(0, 256, (60, 83, 3), np.uint8)).save(paths[0])
    Image.fromarray(random.integers(0, 65536, (97, 51), np.uint16)).save(paths[1], format="PNG")
    return paths


def points_of(run, pictures):
    """The network's own points, from the run."""
    trained = load_trained(str(run))
    trained.model.inference_precision = "float32"
    transform = plain_transform(trained.config.data, trained.model.backbone.mean, trained.model.backbone.std)
    with torch.inference_mode():
        return trained.model(torch.stack([transform(load_rgb(path)) for path in pictures]))


def code_of(out):
    """The code in the card."""
    (code,) = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)
    return code


@pytest.mark.parametrize(("fit", "reduce_to"), [("crop", None), ("squash", None), ("crop", 50), ("squash", 55)])
@pytest.mark.parametrize("format", ["safetensors", "onnx"])
def test_the_code_in_the_card_gives_the_networks_points(
    make_run, pictures, tmp_path, monkeypatch, format, fit, reduce_to
):
    data = {"fit": fit, "reduce_to": reduce_to}
    run = make_run(data=data, inference_precision="bfloat16" if format == "onnx" else "float32")
    out = tmp_path / "deep" / "out"
    assert cli.main(["export", str(run), "--format", format, "--out", str(out)]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["README.md", f"model.{format}"]
    for picture in pictures:
        (out / picture.name).write_bytes(picture.read_bytes())
    monkeypatch.chdir(out)
    assert ("uhml itself does so in bfloat16" in (out / "README.md").read_text()) == (format == "onnx")
    said = {}
    exec(code_of(out), said)
    expected = points_of(run, pictures)
    assert expected.norm(dim=1).min() > 0.1
    np.testing.assert_allclose(
        np.asarray(said["points"]), expected, rtol=0, atol=0 if format == "safetensors" else 1e-5
    )


@pytest.mark.parametrize(
    ("backbone", "size", "curvature"),
    [
        ("tf_efficientnet_lite0", 64, 0.1),
        ("test_vit", 48, 1.0),
        ("torchvision/resnet18", 48, 0.0),
        pytest.param("resnet50", 64, 0.1, marks=pytest.mark.slow),
        pytest.param("vit_tiny_patch16_224", 64, 0.1, marks=pytest.mark.slow),
    ],
)
def test_onnx_gives_the_same_points_for_any_number_of_pictures(make_run, tmp_path, backbone, size, curvature, capsys):
    run = make_run(image_size=size, backbone=backbone, curvature=curvature, clip_radius=0.9)
    out = tmp_path / "out"
    assert cli.main(["export", str(run), "--format", "onnx", "--out", str(out), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert 0 <= said["max_difference"] <= 1e-5
    session = onnxruntime.InferenceSession(out / "model.onnx", providers=["CPUExecutionProvider"])
    model = load_trained(str(run)).model
    for batch_size in (1, 2, 7):
        images = torch.rand(batch_size, 3, size, size) * 3 - 1
        with torch.inference_mode():
            expected = model(images)
        (points,) = session.run(["points"], {"images": images.numpy()})
        assert points.dtype == np.float32
        np.testing.assert_allclose(points, expected, rtol=0, atol=1e-5)
    assert expected.norm(dim=1).max() > 0.1
    described = session.get_modelmeta().custom_metadata_map
    assert json.loads(described["preprocessing"])["size"] == size
    assert float(described["curvature"]) == curvature


def test_safetensors_is_as_good_as_the_run(make_run, pictures, tmp_path):
    run, out = make_run(), tmp_path / "out"
    assert cli.main(["export", str(run), "--format", "safetensors", "--out", str(out)]) == 0
    before, after, again = (load_trained(str(source)) for source in (run, out, out / "model.safetensors"))
    assert (after.config, after.step) == (before.config, 3)
    assert after.checkpoint == again.checkpoint == out / "model.safetensors"
    assert torch.equal(points_of(out, pictures), points_of(run, pictures))
    # model.init_from goes through the same door.
    network = build_embedder(before.config.model, 48)
    load_weights(network, str(out))
    for name, tensor in before.model.state_dict().items():
        assert torch.equal(network.state_dict()[name], tensor), name
    with safe_open(out / "model.safetensors", "pt") as file:
        described = file.metadata()
    expected = {"size": 48, "fit": "crop", "resize_shorter_side": 55, "interpolation": "bicubic", "channels": "RGB"}
    found = json.loads(described["preprocessing"])
    assert found.items() >= expected.items()
    assert (found["mean"], found["std"]) == (list(before.model.backbone.mean), list(before.model.backbone.std))


def test_from_an_exported_folder_to_the_other_format(make_run, tmp_path):
    run = make_run()
    assert cli.main(["export", str(run), "--format", "safetensors", "--out", str(tmp_path / "a")]) == 0
    assert cli.main(["export", str(tmp_path / "a"), "--format", "onnx", "--out", str(tmp_path / "b")]) == 0
    assert (tmp_path / "b" / "model.onnx").stat().st_size > 10_000
    with pytest.raises(UserError, match=r"b is an export to ONNX: uhml reads those of --format safetensors"):
        load_trained(str(tmp_path / "b"))


def test_a_graph_that_gives_other_points_is_not_written(make_run, tmp_path, monkeypatch, caplog):
    run, out = make_run(), tmp_path / "out"
    monkeypatch.setattr(export._Graph, "forward", lambda self, images: self.head.tangent(self.network(images)))
    assert cli.main(["export", str(run), "--format", "onnx", "--out", str(out)]) == 2
    assert re.search(r"onnxruntime's points are up to \S+ from the network's own, more than 1e-05", caplog.text)
    assert list(out.iterdir()) == []


def test_packages_that_are_missing(make_run, tmp_path, monkeypatch, caplog):
    run, out = make_run(), tmp_path / "out"
    find_spec = export.importlib.util.find_spec

    def without(*names):
        monkeypatch.setattr(
            export.importlib.util, "find_spec", lambda name, *rest: None if name in names else find_spec(name, *rest)
        )

    without("onnx", "onnxscript", "onnxruntime")
    assert cli.main(["export", str(run), "--format", "onnx", "--out", str(out)]) == 2
    assert "--format onnx needs onnx and onnxscript: pip install 'uhml[onnx]'." in caplog.text
    without("onnxruntime")
    assert cli.main(["export", str(run), "--format", "onnx", "--out", str(out)]) == 0
    assert "nothing was compared" in caplog.text
    assert "Nothing was compared" in (out / "README.md").read_text()


def test_what_is_refused(make_run, tmp_path, caplog):
    run, out = make_run(), tmp_path / "out"

    def refused(words, source, *more):
        caplog.clear()
        assert cli.main(["export", str(source), "--format", "safetensors", *more]) == 2
        assert words in caplog.text

    assert cli.main(["export", str(run), "--format", "safetensors", "--out", str(out)]) == 0
    refused("model.safetensors is there already: name another folder, or add --overwrite", run, "--out", str(out))
    assert cli.main(["export", str(run), "--format", "safetensors", "--out", str(out), "--overwrite"]) == 0
    refused("is a file: name a folder", run, "--out", str(out / "README.md"))
    (run / "lock").touch()
    refused("is the folder of a run, which takes no other files", run, "--out", str(run))
    assert not (run / "model.safetensors").exists()
    refused("no such checkpoint", tmp_path / "absent", "--out", str(tmp_path / "new"))
    refused("holds no checkpoints/step-*.pt", tmp_path, "--out", str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()
    whole = (out / "model.safetensors").read_bytes()
    (out / "model.safetensors").write_bytes(whole[:-1])
    refused("is damaged", out, "--out", str(tmp_path / "new"))
    other = tmp_path / "other.safetensors"
    export.safetensors.torch.save_file({"a": torch.zeros(1)}, other)
    refused("holds weights alone", other, "--out", str(tmp_path / "new"))
    network = build_embedder(load_trained(str(run)).config.model, 48)
    with pytest.raises(UserError, match=r"model\.init_from=.*is of another network"):
        load_weights(network, str(other))


# The card


def written(run, out):
    assert cli.main(["export", str(run), "--format", "safetensors", "--out", str(out)]) == 0
    return (out / "README.md").read_text()


def test_the_card_has_the_scores_of_this_step_only(make_run, tmp_path):
    run = make_run()
    scores = {"recall_at_k": {"1": 0.5, "4": 0.75}, "map_at_r": 0.25, "nmi": 0.125}
    result = {"frozen": {**scores, "nmi": 0.0625}, "trained": scores, "steps": 3}
    (run / "result.json").write_text(json.dumps(result))
    text = written(run, tmp_path / "a")
    assert "| R@1 | R@4 | MAP@R | NMI |" in text
    assert "| frozen backbone, cosine | 50.0 | 75.0 | 25.0 | 6.2 |" in text
    assert "| **trained embedding, ball** | 50.0 | 75.0 | 25.0 | 12.5 |" in text
    (run / "result.json").write_text(json.dumps({**result, "steps": 4}))
    assert "None known of this step." in written(run, tmp_path / "b")
    # As a run leaves it that had nothing to score.
    (run / "result.json").write_text(json.dumps({"frozen": None, "start": None, "trained": None, "steps": 3}))
    assert "None: there were no classes to score on." in written(run, tmp_path / "c")


def test_names_do_nothing_in_the_card(make_run, tmp_path):
    evil = "<img src=x onerror=alert(1)>](http://<x>)|`\n# *b*"
    run = make_run(data={"dataset": "folder", "root": f"/home/somebody/{evil}"}, init_from=f"/home/somebody/{evil}")
    text = written(run, tmp_path / "out")
    assert "somebody" not in text
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    # Of the path the last name only, which begins after the slashes in it.
    assert prose.count(r"\<x\>\)\|\`" + "\N{REPLACEMENT CHARACTER}" + r"\# \*b\*") == 2
    assert not re.search(r"(?<!\\)[<>|]", re.sub(r"(?<!\\)`.*?`", "", prose))
    assert "\n# *b*" not in text
    fenced = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert len(fenced) == 1
    assert re.search(r"(?m)^  weights: random$", fenced[0])


@pytest.mark.parametrize(
    ("model", "licence"),
    [
        ({"weights": "package"}, "apache-2.0"),
        ({"weights": "hub", "backbone": "vit_small_patch16_224.dino"}, "apache-2.0"),
        ({"weights": "hub", "backbone": "torchvision/resnet50"}, None),
        ({"weights": "my.safetensors"}, None),
        ({"weights": "package", "init_from": "runs/other"}, None),
    ],
)
def test_licence(model, licence):
    assert card.licence_of_weights(parse_config({"model": model}, "a test").model) == licence


def test_escaped_text_is_shown_as_it_is():
    name = "<img src=x onerror=alert(1)> [a](b) *c* _d_ `e` & &amp; \\ ~f~ #1 | !"
    text = re.sub(r"^<p>|</p>\n$", "", MarkdownIt("commonmark").enable("strikethrough").render(card.escape(name)))
    assert "<" not in text
    assert html.unescape(text) == name
    assert card.escape("a\nb\x1b") == "a\N{REPLACEMENT CHARACTER}b\N{REPLACEMENT CHARACTER}"
