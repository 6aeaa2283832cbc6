import dataclasses
import json
import os
import re
import shutil

import numpy as np
import pytest
import torch
from launched import uhml
from PIL import Image

from uhml import cli
from uhml.data.decode import load_rgb
from uhml.data.images import list_images
from uhml.data.pictures import Pictures
from uhml.data.transforms import plain_transform
from uhml.data.verify import list_pictures
from uhml.poincare import distance_matrix
from uhml.trained import embed_to_file, gallery, load_trained
from uhml.trained.gallery import embedded_gallery
from uhml.trained.vectors import read_vectors


def search(*words):
    return cli.main(["search", *map(str, words)])


def searched(capsys, *words):
    """What the command prints for scripts, and what it says beside."""
    assert search(*words, "--json") == 0
    said = capsys.readouterr()
    return json.loads(said.out), said.err


def embedded(run, paths):
    trained = load_trained(str(run))
    transform = plain_transform(trained.config.data, trained.model.backbone.mean, trained.model.backbone.std)
    with torch.inference_mode():
        return torch.cat([trained.model(transform(load_rgb(path))[None]) for path in paths])


def test_neighbours_are_the_nearest_of_the_training_pictures(run_copy, shapes, capsys):
    train = list_pictures(load_trained(str(run_copy)).config.data).train
    queries = [train.paths[3], next(map(str, shapes.rglob("*.png"))), train.paths[-1]]
    found, said = searched(capsys, run_copy, "--top", 7, "--query", *queries)
    assert f"Embedding {len(train)} pictures" in said
    assert found["pictures"] == len(train)
    points = embedded(run_copy, train.paths).double()
    for query, answer in zip(queries, found["queries"], strict=True):
        far = distance_matrix(embedded(run_copy, [query]).double(), points, 0.1)[0]
        if query in train.paths:
            far[train.paths.index(query)] = torch.inf
        # A picture of a shape is one of a glyph, too, and found at no distance.
        nearest = far.sort().values[:7]
        assert [one["distance"] for one in answer["neighbors"]] == pytest.approx(nearest.tolist(), abs=1e-4)
        for one in answer["neighbors"]:
            row = train.paths.index(one["path"])
            assert one["distance"] == pytest.approx(float(far[row]), abs=1e-4)
            assert one["label"] == train.class_names[train.labels[row]]
        assert query not in [one["path"] for one in answer["neighbors"]]
    # Again, by a link to a picture: nothing is embedded, and the picture is still told from the others.
    link = shapes.parent / "link.png"
    link.unlink(missing_ok=True)
    link.symlink_to(queries[0])
    again, said = searched(capsys, run_copy, "--top", 7, "--query", link)
    assert "Embedding" not in said
    assert again["queries"][0]["neighbors"] == found["queries"][0]["neighbors"]


def test_another_folder_is_embedded_anew_when_something_changed(run_copy, shapes, tmp_path, capsys):
    folder = tmp_path / "pictures"
    shutil.copytree(shapes, folder)
    paths = list(list_images(folder).paths)
    words = (run_copy, "--images", folder, "--query", paths[0], "--top", 3)
    found, said = searched(capsys, *words)
    assert f"Embedding {len(paths)} pictures" in said
    assert "Embedding" not in searched(capsys, *words)[1]

    nearest = found["queries"][0]["neighbors"][0]["path"]
    os.remove(nearest)
    found, said = searched(capsys, *words)
    assert f"Embedding {len(paths) - 1} pictures" in said
    assert nearest not in [one["path"] for one in found["queries"][0]["neighbors"]]

    # The same names, another picture.
    nearest = found["queries"][0]["neighbors"][0]
    Image.new("RGB", (40, 40), "red").save(nearest["path"])
    found, said = searched(capsys, *words)
    assert "Embedding" in said
    assert nearest not in found["queries"][0]["neighbors"]

    # Another checkpoint. It is a link to a file that is not to be written to.
    newest = max((run_copy / "checkpoints").glob("step-*.pt"))
    newest.unlink()
    other, said = searched(capsys, *words)
    assert "Embedding" in said
    assert other["step"] < found["step"]
    assert other["queries"] != found["queries"]


def test_vectors_of_uhml_embed_are_searched_as_they_are(run_copy, shapes, tmp_path, capsys):
    query = next(map(str, shapes.rglob("*.png")))
    expected, _ = searched(capsys, run_copy, "--images", shapes, "--query", query)
    assert len(expected["queries"][0]["neighbors"]) == min(20, len(list_images(shapes)) - 1)
    for name in ("v.npy", "v.parquet"):
        assert cli.main(["embed", str(run_copy), "--images", str(shapes), "--out", str(tmp_path / name)]) == 0
        found, said = searched(capsys, run_copy, "--vectors", tmp_path / name, "--query", query)
        assert "Embedding" not in said
        assert found["queries"] == expected["queries"]


def test_vectors_of_another_network_are_refused(run_copy, shapes, tmp_path, capsys):
    out = tmp_path / "v.npy"
    assert cli.main(["embed", str(run_copy), "--images", str(shapes), "--out", str(out)]) == 0
    query = next(map(str, shapes.rglob("*.png")))
    earlier = min((run_copy / "checkpoints").glob("step-*.pt"))
    assert search(earlier, "--vectors", out, "--query", query) == 2
    assert f"The vectors of {out} are not those that the network gives" in capsys.readouterr().err
    # Pictures that are gone, or have become others, are no reason to refuse the rest.
    names = out.with_suffix(".csv")
    rows = names.read_text().replace(str(shapes), str(tmp_path / "gone"))
    names.write_text(rows)
    assert search(run_copy, "--vectors", out, "--query", query) == 0


def test_without_faiss_it_is_the_same(run_copy, shapes, tmp_path, capsys, monkeypatch):
    query = next(map(str, shapes.rglob("*.png")))
    expected, _ = searched(capsys, run_copy, "--query", query)
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None if name == "faiss" else pytest.fail(name))
    assert searched(capsys, run_copy, "--query", query)[0] == expected


def test_table_and_sheet(run_copy, shapes, tmp_path, capsys):
    queries = [path for path in map(str, shapes.rglob("*.png")) if "red" in path or "img" in path][::5]
    words = (run_copy, "--images", shapes, "--query", *queries, "--top", 12)
    assert search(*words, "--sheet", tmp_path / "s.png") == 0
    said = capsys.readouterr().out
    assert "[red]ünï $x_{" in said
    assert f"in {shapes}" in said
    with Image.open(tmp_path / "s.png") as sheet:
        assert sheet.width > 1000
        # Two lines of neighbours for each query.
        assert sheet.height > len(queries) * 2 * 128
    assert search(*words, "--sheet", tmp_path / "s.png") == 2
    assert "is there already" in capsys.readouterr().err


def test_more_than_there_are(run_copy, shapes, tmp_path, capsys):
    paths = list(list_images(shapes).paths)[:3]
    (tmp_path / "list.txt").write_text("".join(f"{path}\n" for path in paths))
    found, _ = searched(capsys, run_copy, "--images", tmp_path / "list.txt", "--query", paths[0], "--top", 99)
    assert {one["path"] for one in found["queries"][0]["neighbors"]} == set(paths[1:])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--query", "absent.png"], "The picture .*absent.png does not exist"),
        (["--query", "bad.png"], "bad.png is empty"),
        (["--query", "one.png", "--images", "absent"], "no such folder or list"),
        (["--query", "one.png", "--images", "broken"], "bad.png is empty .0 bytes.*--skip-corrupt"),
        (["--query", "one.png", "--vectors", "absent.npy"], "There is no file absent.npy"),
        (["--query", "one.png", "--vectors", "wide.npy"], "have 3 dimensions, and the network's have 16"),
        (["--query", "one.png", "--vectors", "nameless.npy"], "needs nameless.csv beside it"),
        (["--query", "one.png", "--vectors", "short.npy"], "holds 2 vectors, and 1 pictures are named"),
        (["--query", "one.png", "--vectors", "others.npy"], "others.npy are not those that the network gives"),
        (["--query", "one.png", "--vectors", "outside.npy"], "lies outside the ball"),
        (["--query", "one.png", "--vectors", "words.npy"], "is not a .npy file"),
        (["--query", "one.png", "--vectors", "words.parquet"], "is no Parquet file"),
        (["--query", "one.png", "--sheet", "sheet.txt"], "--sheet sheet.txt must end in .png"),
    ],
)
def test_what_is_refused(run_copy, shapes, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    shutil.copy(next(shapes.rglob("*.png")), "one.png")
    (tmp_path / "bad.png").touch()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "bad.png").touch()
    for name, shape in (("wide", (1, 3)), ("nameless", (1, 16)), ("short", (2, 16)), ("outside", (1, 16))):
        np.save(f"{name}.npy", np.full(shape, 9.0, np.float32))
        if name != "nameless":
            (tmp_path / f"{name}.csv").write_text("path\none.png\n")
    # Of pictures that are gone nothing can be compared.
    shutil.copy("outside.npy", "others.npy")
    shutil.move("outside.csv", "others.csv")
    (tmp_path / "outside.csv").write_text("path\ngone.png\n")
    (tmp_path / "words.npy").write_text("words")
    (tmp_path / "words.parquet").write_text("words")
    assert search(run_copy, *words) == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize("top", ["0", "-1", "many"])
def test_numbers_refused(top, capsys):
    with pytest.raises(SystemExit):
        search("run", "--query", "a.png", "--top", top)
    assert "is no number from 1 up" in capsys.readouterr().err or top == "-1"


def test_a_picture_that_changes_while_the_gallery_is_unfinished(run_copy, shapes, tmp_path, monkeypatch):
    folder = tmp_path / "pictures"
    shutil.copytree(shapes, folder)
    trained, pictures = load_trained(str(run_copy)), list_images(folder)
    rounds = embed_to_file.embed_rounds

    def cut(*arguments, **options):
        yield next(iter(rounds(*arguments, **options)))
        raise RuntimeError("cut")

    small = dataclasses.replace(trained.config, eval=dataclasses.replace(trained.config.eval, batch_size=8))
    trained = dataclasses.replace(trained, config=small)
    monkeypatch.setattr(embed_to_file, "embed_rounds", cut)
    with pytest.raises(RuntimeError, match="cut"):
        embedded_gallery(trained, pictures, tmp_path / "gallery")
    assert (tmp_path / "gallery" / "vectors.npy.unfinished" / "state.json").exists()
    monkeypatch.setattr(embed_to_file, "embed_rounds", rounds)
    Image.new("RGB", (40, 40), "red").save(pictures.paths[0])
    found = embedded_gallery(trained, pictures, tmp_path / "gallery")
    torch.testing.assert_close(torch.tensor(found.rows[:1]), embedded(run_copy, pictures.paths[:1]))


@pytest.mark.parametrize("content", ["", "[]", '{"files": 3}', "[" * 9999])
def test_a_damaged_gallery_is_made_anew(run_copy, shapes, tmp_path, capsys, content):
    trained, pictures = load_trained(str(run_copy)), list_images(shapes)
    made = embedded_gallery(trained, pictures, tmp_path / "gallery")
    key = (tmp_path / "gallery" / "key.json").read_text()
    (tmp_path / "gallery" / "key.json").write_text(content)
    again = embedded_gallery(trained, pictures, tmp_path / "gallery")
    assert again.paths == made.paths
    assert np.array_equal(again.rows, made.rows)
    assert (tmp_path / "gallery" / "key.json").read_text() == key


def test_a_gallery_that_leaves_pictures_out_is_not_taken_where_none_may_be(tmp_path, monkeypatch):
    made = []

    def embed_to_file(trained, pictures, file, *, skip_corrupt, overwrite):
        made.append(skip_corrupt)
        np.save(file, np.zeros((1, 2), np.float32))
        file.with_suffix(".csv").write_text("path\na.png\n")

    monkeypatch.setattr(gallery, "embed_to_file", embed_to_file)
    monkeypatch.setattr(gallery, "what_rows_depend_on", lambda *_: {})
    for skip_corrupt in (True, True, False, False):
        embedded_gallery(None, Pictures(paths=()), tmp_path / "gallery", skip_corrupt=skip_corrupt)
    assert made == [True, False]


def test_a_name_that_is_no_utf8_is_found_and_shown(run_copy, shapes, tmp_path, capsys):
    """Training takes it, so its run can be searched."""
    folder = tmp_path / "pictures"
    shutil.copytree(shapes, folder)
    query = min(map(str, folder.rglob("*.png")))
    odd = os.path.join(os.fsencode(os.path.dirname(query)), b"caf\xe9.png")
    shutil.copyfile(query, odd)
    words = (run_copy, "data.dataset=folder", f"data.root={folder}", "--query", query, "--top", 1)
    assert search(*words) == 0
    assert "caf\\udce9.png" in capsys.readouterr().out
    found, said = searched(capsys, *words)
    assert "Embedding" not in said
    assert found["queries"][0]["neighbors"][0]["path"] == os.fsdecode(odd)


def test_as_its_user_types_it(run_copy, shapes):
    query = next(map(str, shapes.rglob("*.png")))
    said = uhml("search", run_copy, "train.device=cpu", "--query", query, "--top", 2)
    assert "distance" in said
    assert read_vectors(run_copy / "search" / "train" / "vectors.npy").rows.shape[1] == 16
