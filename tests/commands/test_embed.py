import csv
import dataclasses
import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from launched import uhml
from PIL import Image

from uhml import cli
from uhml.commands import embed as command
from uhml.commands.options import overridden
from uhml.config import load_config, parse_config
from uhml.data.decode import load_rgb
from uhml.data.images import list_images
from uhml.data.transforms import plain_transform
from uhml.errors import UserError
from uhml.trained import load_trained
from uhml.trained.vectors import read_vectors

EMBED = ("eval.batch_size=4", "data.num_workers=0")


def embed(*words):
    return cli.main(["embed", *map(str, words)])


def one_by_one(run, pictures, features=False):
    """The vectors by the network alone, a picture at a time."""
    trained = load_trained(str(run))
    backbone = trained.model.backbone
    transform = plain_transform(trained.config.data, backbone.mean, backbone.std)
    with torch.inference_mode():
        images = [transform(load_rgb(path))[None] for path in pictures]
        return torch.cat([trained.model.features(x) if features else trained.model(x) for x in images]).numpy()


def test_rows_are_the_network_s_and_names_are_kept(finished_run, shapes, tmp_path):
    out = tmp_path / "vectors.npy"
    assert embed(finished_run, "--images", shapes, "--out", out) == 0
    with out.with_suffix(".csv").open(newline="") as file:
        paths = [row["path"] for row in csv.DictReader(file)]
    assert paths == sorted(map(str, shapes.rglob("*.png")), key=lambda path: path.split(os.sep))
    rows = np.load(out)
    assert rows.dtype == np.float32
    assert len(np.unique(rows, axis=0)) == len(rows)
    np.testing.assert_allclose(rows, one_by_one(finished_run, paths), atol=1e-5)
    # What names the rows is itself a list of the pictures, in that order.
    assert list(list_images(out.with_suffix(".csv")).paths) == paths
    assert not list(tmp_path.glob("*.unfinished"))


def test_a_script_gets_the_same_points(finished_run, shapes, tmp_path):
    out = tmp_path / "vectors.npy"
    assert embed(finished_run, "--images", shapes, "--out", out, *EMBED) == 0
    rows, paths = read_vectors(out)
    network = load_trained(str(finished_run))
    trained = dataclasses.replace(network, config=overridden(network.config, EMBED))
    points = trained.embed(paths)
    assert torch.equal(points, torch.from_numpy(rows))
    torch.testing.assert_close(network.embed([Path(path) for path in paths]), points, rtol=0, atol=1e-5)
    opened = [Image.open(path) for path in paths]
    assert torch.equal(points, trained.embed(opened))
    assert trained.embed([]).shape == (0, trained.config.model.embedding_dim)
    assert "Embedder" not in repr(network)
    (tmp_path / "a.jpg").touch()
    with pytest.raises(UserError, match="is empty"):
        network.embed([paths[0], tmp_path / "a.jpg"])


@pytest.mark.parametrize("mode", ["F", "I"])
def test_images_of_a_script_are_looked_at_like_files(finished_run, tmp_path, mode):
    network = load_trained(str(finished_run))
    deep = np.random.default_rng(0).integers(0, 65536, (50, 70), np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    turned = Image.fromarray((deep // 257).astype(np.uint8))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    files = [tmp_path / "deep.png", tmp_path / "turned.jpg"]
    images = [Image.open(file) for file in files]
    sizes = [image.size for image in images]
    assert torch.equal(network.embed(images), network.embed(files))
    assert [image.size for image in images] == sizes
    with pytest.raises(UserError, match=f"An image of mode {mode} has .* grey values"):
        network.embed([Image.fromarray(np.full((9, 9), -1.0)).convert(mode)])


def test_an_image_without_pixels_is_told(finished_run):
    with pytest.raises(UserError, match="An image of mode RGB has no pixels"):
        load_trained(str(finished_run)).embed([Image.new("RGB", (0, 5))])


def test_parquet_holds_the_same(finished_run, shapes, tmp_path):
    for out in ("v.npy", "v.parquet"):
        assert embed(finished_run, "--images", shapes, "--out", tmp_path / out, "--features") == 0
    table = pq.read_table(tmp_path / "v.parquet").to_pydict()
    rows, paths = read_vectors(tmp_path / "v.npy")
    assert table["path"] == paths
    assert np.array_equal(np.array(table["vector"], np.float32), rows)
    again = read_vectors(tmp_path / "v.parquet")
    assert again.paths == paths
    assert np.array_equal(again.rows, rows)
    np.testing.assert_allclose(rows, one_by_one(finished_run, paths, features=True), atol=1e-5)


def test_a_list_is_taken_in_its_order(finished_run, shapes, tmp_path):
    chosen = [*shapes.rglob("*.png")][::-7]
    (tmp_path / "list.txt").write_text("".join(f"{path}\n" for path in chosen))
    assert embed(finished_run, "--images", tmp_path / "list.txt", "--out", tmp_path / "v.npy") == 0
    rows, paths = read_vectors(tmp_path / "v.npy")
    assert paths == [str(path) for path in chosen]
    np.testing.assert_allclose(rows, one_by_one(finished_run, paths), atol=1e-5)


def test_killed_at_any_moment_it_goes_on_to_the_same_result(finished_run, shapes, tmp_path):
    """Killed so late that it has written a state, and so early; each time with rows after the last state."""
    pictures = tmp_path / "pictures"
    for number in range(12):
        shutil.copytree(shapes, pictures / str(number))
    command = ["embed", finished_run, *EMBED, "--images", pictures, "--out"]
    assert cli.main([str(word) for word in [*command, tmp_path / "whole.npy"]]) == 0
    going = [sys.executable, "-m", "uhml", *map(str, command), str(tmp_path / "killed.npy")]
    partial = tmp_path / "killed.npy.unfinished"
    # A state after every round, so that something is kept of a few hundred pictures.
    patched = (
        "import sys, uhml.trained.vectors, uhml.cli; uhml.trained.vectors.SECONDS_BETWEEN_STATES = 0; "
        f"sys.exit(uhml.cli.main({going[3:]!r}))"
    )
    seen = []
    for at_least in (1, 150):
        process = subprocess.Popen([sys.executable, "-c", patched], stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 200
        while time.monotonic() < deadline and process.poll() is None:
            rows = partial / "rows.npy"
            if (partial / "state.json").exists() and rows.stat().st_size > 128 + at_least * 16 * 4:
                break
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        said = process.communicate()[1]
        assert process.returncode == -signal.SIGKILL, said
        assert (f"Going on after {seen[-1]}" in said) if seen else "Going on" not in said
        state = (partial / "state.json").read_text()
        seen.append(int(state.partition('"seen": ')[2].partition(",")[0]))
        # As if it had been killed while it wrote a row.
        with (partial / "rows.npy").open("ab") as file:
            file.write(b"half a row")
    assert 0 < seen[0] < seen[1]
    said = uhml(*going[3:])
    assert f"Going on after {seen[1]} of" in said
    assert (tmp_path / "killed.npy").read_bytes() == (tmp_path / "whole.npy").read_bytes()
    assert (tmp_path / "killed.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()
    assert not partial.exists()


@pytest.mark.parametrize("content", ["", "[]", '{"key": {}}', '{"key": {}, "seen": -1, "files": "", "left_out": []}'])
def test_unfinished_work_that_is_damaged_is_begun_anew(finished_run, shapes, tmp_path, content, caplog):
    (unfinished := tmp_path / "v.npy.unfinished").mkdir()
    (unfinished / "rows.npy").write_bytes(b"rubbish")
    (unfinished / "state.json").write_text(content)
    assert embed(finished_run, "--images", shapes, "--out", tmp_path / "v.npy") == 0
    assert "state.json is damaged: " in caplog.text
    assert not unfinished.exists()
    rows, paths = read_vectors(tmp_path / "v.npy")
    np.testing.assert_allclose(rows, one_by_one(finished_run, paths), atol=1e-5)


def test_a_row_without_a_path_is_told(tmp_path):
    np.save(tmp_path / "v.npy", np.zeros((2, 3), np.float32))
    for text in ('path\na.png\n""\n', "label,path\nx,a.png\ny\n"):
        (tmp_path / "v.csv").write_text(text)
        with pytest.raises(UserError, match=r"v\.csv: the path of a row is empty"):
            read_vectors(tmp_path / "v.npy")


@pytest.mark.ddp
def test_two_ranks_write_what_one_does_and_leave_out_the_same(finished_run, shapes, tmp_path):
    broken = tmp_path / "pictures"
    shutil.copytree(shapes, broken)
    paths = list(list_images(broken).paths)
    for row in (0, 5, 6, len(paths) - 1):
        with open(paths[row], "r+b") as file:
            file.truncate(90)
    arguments = ["embed", finished_run, "eval.batch_size=3", "--skip-corrupt", "--images", broken, "--out"]
    said = uhml(*arguments, tmp_path / "one.npy")
    assert "Left out 4 pictures that cannot be read" in said
    assert all(paths[row] in said for row in (0, 5, 6, len(paths) - 1))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "uhml"]
    command = [*torchrun, *map(str, arguments), str(tmp_path / "two.npy")]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert ended.returncode == 0, ended.stderr
    one, two = (read_vectors(tmp_path / f"{name}.npy") for name in ("one", "two"))
    kept = [path for row, path in enumerate(paths) if row not in (0, 5, 6, len(paths) - 1)]
    assert one.paths == two.paths == kept
    np.testing.assert_allclose(one.rows, two.rows, atol=1e-5)
    np.testing.assert_allclose(one.rows, one_by_one(finished_run, kept), atol=1e-5)


def test_a_picture_that_is_mended_is_gone_on_with_and_one_that_was_seen_is_not(finished_run, shapes, tmp_path, capsys):
    folder, out = tmp_path / "pictures", tmp_path / "v.npy"
    shutil.copytree(shapes, folder)
    paths = list(list_images(folder).paths)
    whole = Path(paths[-2]).read_bytes()
    Path(paths[-2]).write_bytes(b"")
    words = (finished_run, *EMBED, "--images", folder, "--out", out)
    assert embed(*words) == 2
    Path(paths[-2]).write_bytes(whole)
    assert embed(*words) == 0
    assert "Going on after" in capsys.readouterr().err
    np.testing.assert_allclose(read_vectors(out).rows, one_by_one(finished_run, paths), atol=1e-5)
    # Once more, and what was embedded already becomes another picture.
    Path(paths[-2]).write_bytes(b"")
    assert embed(*words, "--overwrite") == 2
    Path(paths[-2]).write_bytes(whole)
    Image.new("RGB", (40, 40), "red").save(paths[0])
    assert embed(*words, "--overwrite") == 0
    assert "pictures that were embedded already have changed: beginning anew" in capsys.readouterr().err
    np.testing.assert_allclose(read_vectors(out).rows, one_by_one(finished_run, paths), atol=1e-5)


def test_an_unreadable_picture_is_named_and_the_command_goes_on_without(finished_run, shapes, tmp_path, capsys):
    broken = tmp_path / "pictures"
    shutil.copytree(shapes, broken)
    paths = list(list_images(broken).paths)
    open(paths[-2], "w").close()
    words = (finished_run, *EMBED, "--images", broken, "--out", tmp_path / "v.npy")
    assert embed(*words) == 2
    said = capsys.readouterr().err
    assert f"{paths[-2]} is empty (0 bytes). Mend it, or add --skip-corrupt" in said
    assert embed(*words, "--skip-corrupt") == 0
    assert f"Going on after {(len(paths) - 2) // 4 * 4} of {len(paths)} pictures" in capsys.readouterr().err
    assert read_vectors(tmp_path / "v.npy").paths == paths[:-2] + paths[-1:]


def test_memory_does_not_grow_with_the_pictures(finished_run, shapes, tmp_path):
    """The peak of a process that embeds many times as many pictures is not that of all their vectors."""
    one = next(shapes.rglob("*.png"))
    peaks = {}
    measure = (
        "import resource, sys; from uhml.cli import main; code = main(sys.argv[1:]); "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss); sys.exit(code)"
    )
    for number in (64, 2048):
        (tmp_path / f"{number}.txt").write_text(f"{one}\n" * number)
        words = [finished_run, "eval.batch_size=64", "data.num_workers=0", "--features"]
        words += ["--images", tmp_path / f"{number}.txt", "--out", tmp_path / f"{number}.npy"]
        command = [sys.executable, "-c", measure, "embed", *map(str, words)]
        ended = subprocess.run(command, capture_output=True, text=True, check=True, timeout=200)
        peaks[number] = int(ended.stdout)
    vectors = (tmp_path / "2048.npy").stat().st_size / 1024
    assert vectors > 0
    # Kilobytes. All images at once would be 2048 x 3 x 32 x 32 x 4 bytes = 24 MiB; the vectors are a few.
    assert peaks[2048] - peaks[64] < 12 * 1024


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--images", "absent", "--out", "v.npy"], "absent: there is no such folder or list"),
        (["--images", "one.png", "--out", "v.npy"], "is a picture: name a folder"),
        (["--images", "one.tar", "--out", "v.npy"], "is a tar file: name the folder"),
        (["--images", "empty", "--out", "v.npy"], "holds no picture"),
        (["--images", "gone.txt", "--out", "v.npy"], "of which 1 are missing"),
        (["--images", "list.txt", "--out", "v.txt"], "must end in .npy or .parquet"),
        (["--images", "list.txt", "--out", "absent/v.npy"], "there is no folder"),
        (["--images", "list.txt", "--out", "old.npy"], "old.npy is there already.*--overwrite"),
        (["--images", "list.txt", "--out", "other.npy"], "other.csv, for the names.*--overwrite"),
        (["model.embedding_dim=3", "--images", "list.txt", "--out", "v.npy"], "the network is trained"),
        (["data.image_siz=3", "--images", "list.txt", "--out", "v.npy"], "Did you mean 'data.image_size'"),
    ],
)
def test_what_is_refused(finished_run, shapes, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    one = next(shapes.rglob("*.png"))
    shutil.copy(one, "one.png")
    (tmp_path / "one.tar").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "gone.txt").write_text("absent.png\n")
    (tmp_path / "list.txt").write_text("one.png\n")
    (tmp_path / "old.npy").touch()
    (tmp_path / "other.csv").touch()
    before = sorted(os.listdir())
    assert embed(finished_run, *words) == 2
    assert re.search(message, capsys.readouterr().err)
    assert sorted(os.listdir()) == before


def test_a_name_with_a_carriage_return_is_one_name(finished_run, shapes, tmp_path):
    path = tmp_path / "pictures" / "a\rb.png"
    path.parent.mkdir()
    shutil.copy(next(shapes.rglob("*.png")), path)
    assert embed(finished_run, *EMBED, "--images", path.parent, "--out", tmp_path / "v.npy") == 0
    assert read_vectors(tmp_path / "v.npy").paths == [str(path)]


def test_an_archive_by_another_name_is_no_matrix(tmp_path):
    np.savez(tmp_path / "v.npz", np.zeros(3))
    (tmp_path / "v.npz").rename(tmp_path / "v.npy")
    with pytest.raises(UserError, match="is an archive of arrays"):
        read_vectors(tmp_path / "v.npy")


def test_a_checkpoint_reads_nothing_of_the_environment(monkeypatch):
    monkeypatch.setenv("SECRET", "hunter2")
    config = parse_config({"data": {"dataset": "folder", "root": "${oc.env:SECRET}"}}, "a stranger's")
    assert overridden(config, ["data.num_workers=0"]).data.root == "${oc.env:SECRET}"
    assert overridden(config, ["data.root=${oc.env:SECRET}"]).data.root == "hunter2"


def test_a_checkpoint_that_its_run_removes_meanwhile_is_told_of(run_copy, shapes, tmp_path, monkeypatch, capsys):
    list_images = command.list_images

    def overtaken(*args):
        shutil.rmtree(run_copy / "checkpoints")
        return list_images(*args)

    monkeypatch.setattr(command, "list_images", overtaken)
    assert cli.main(["embed", str(run_copy), "--images", str(shapes), "--out", str(tmp_path / "v.npy")]) == 2
    assert "is gone: its run has newer ones; start the same command again" in capsys.readouterr().err


def test_a_home_that_nobody_has(finished_run, tmp_path, capsys):
    assert embed(finished_run, *EMBED, "--images", "~nobody-here/x", "--out", tmp_path / "v.npy") == 2
    assert "~nobody-here/x: nobody knows what folder ~ stands for" in capsys.readouterr().err


def test_the_list_itself_is_never_overwritten(finished_run, shapes, tmp_path, capsys):
    listed = tmp_path / "pets.csv"
    text = "path,label\n" + "".join(f"{path},a\n" for path in sorted(shapes.rglob("*.png")))
    listed.write_text(text)
    words = ["embed", str(finished_run), "--images", str(listed), "--out", str(tmp_path / "pets.npy"), "--overwrite"]
    assert cli.main(words) == 2
    assert "pets.csv name its rows, the list itself: name another file" in capsys.readouterr().err
    assert listed.read_text() == text


def test_where_files_have_no_locks_it_works_all_the_same(finished_run, shapes, tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("uhml.run.lock.fcntl.lockf", refuse)
    assert cli.main(["embed", str(finished_run), "--images", str(shapes), "--out", str(tmp_path / "v.npy")]) == 0
    assert "has no locks" in capsys.readouterr().err


def test_other_work_at_the_file_is_not_gone_on_with(finished_run, shapes, tmp_path, capsys):
    (tmp_path / "list.txt").write_text(f"{next(shapes.rglob('*.png'))}\n" * 20 + f"{tmp_path / 'bad.png'}\n")
    (tmp_path / "bad.png").touch()
    out = ("--out", tmp_path / "v.npy")
    assert embed(finished_run, *EMBED, "--images", tmp_path / "list.txt", *out) == 2
    assert (tmp_path / "v.npy.unfinished").exists()
    capsys.readouterr()
    assert embed(finished_run, *EMBED, "--images", shapes, *out) == 2
    assert "unfinished work of another command (it differs in: pictures)" in capsys.readouterr().err
    assert embed(finished_run, *EMBED, "--images", shapes, *out, "--overwrite") == 0
    assert read_vectors(tmp_path / "v.npy").paths == list(list_images(shapes).paths)


@pytest.mark.parametrize("name", ["absent", "empty", "weights.pt"])
def test_no_network_there(finished_run, shapes, tmp_path, capsys, name):
    (tmp_path / "empty").mkdir()
    (tmp_path / "weights.pt").write_bytes(b"PK damaged")
    assert embed(tmp_path / name, "--images", shapes, "--out", tmp_path / "v.npy") == 2
    said = capsys.readouterr().err
    assert str(tmp_path / name) in said
    assert "checkpoint" in said


def test_config_of_the_run_is_what_the_pictures_are_fitted_by(finished_run):
    assert load_trained(str(finished_run)).config == load_config(finished_run / "config.yaml")
