"""The command as people type it: mistakes, and the page on localhost."""

import http.client
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading

import numpy as np
import pytest
from pages import read_page

from uhml import cli
from uhml.commands import explore
from uhml.errors import UserError
from uhml.explorer.serve import server
from uhml.hierarchy import Dendrogram
from uhml.trained import network


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["absent", "--out", "page.html"], "absent: no such checkpoint"),
        ([".", "--out", "page.html"], "holds no checkpoints"),
        (["RUN", "--out", "old.html"], "old.html is there already.*--overwrite"),
        (["RUN", "--out", "absent/page.html"], "there is no folder"),
        (["RUN", "--out", "page.png"], "must end in .html"),
        (["RUN", "--out", "page.html", "--images", "absent"], "--images .*absent: there is no such folder or list"),
        (["RUN", "--out", "page.html", "--images", "few"], "1 pictures are too few to explore: it takes 10"),
        (["RUN", "--out", "page.html", "--images", "list.txt"], "missing, first .*gone.png"),
        (["RUN", "--out", "page.html", "--max-pictures", "3"], "--max-pictures 3 is too few"),
        (["RUN", "--out", "page.html", "data.root=absent"], "data.root=absent is no folder"),
    ],
)
def test_mistakes(labelled_run, words, message, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old.html").touch()
    (tmp_path / "few").mkdir()
    picture = next((labelled_run.parent / "shapes").rglob("*.png"))
    (tmp_path / "few" / "one.png").write_bytes(picture.read_bytes())
    (tmp_path / "list.txt").write_text("few/one.png\ngone.png\n")
    assert cli.main(["explore", *(str(labelled_run) if word == "RUN" else word for word in words)]) == 2
    assert re.search(message, caplog.records[-1].getMessage())
    assert "\n" not in caplog.records[-1].getMessage()
    assert not (tmp_path / "page.html").exists()


def test_a_run_without_classes_has_no_test_part(plain_page, tmp_path, caplog):
    run = str(plain_page.parent / "run")
    assert cli.main(["explore", run, "--part", "test", "--out", str(tmp_path / "page.html")]) == 2
    assert "--part test: no classes are known" in caplog.text


def test_pictures_that_cannot_be_read_are_left_out_on_demand(labelled_run, tmp_path, caplog):
    folder = tmp_path / "pictures"
    shutil.copytree(labelled_run.parent / "shapes", folder)
    paths = sorted(folder.rglob("*.png"))
    paths[3].write_bytes(b"")
    words = ["explore", str(labelled_run), "--images", str(folder), "--out", str(tmp_path / "page.html")]
    assert cli.main(words) == 2
    assert f"{paths[3]} is empty (0 bytes). Mend or remove it, or add data.skip_corrupt=true" in caplog.text
    assert cli.main([*words, "data.skip_corrupt=true"]) == 0
    assert read_page(tmp_path / "page.html").meta["num_all"] == len(paths) - 1


def test_a_page_is_made_of_a_checkpoint_that_is_gone_by_then_and_of_a_name_that_is_no_utf8(
    labelled_run, tmp_path, monkeypatch
):
    run = tmp_path / "caf\udce9"
    shutil.copytree(labelled_run, run)
    embed_share = explore.embed_share

    def overtaken(*args, **options):
        rows = embed_share(*args, **options)
        for path in (run / "checkpoints").iterdir():
            path.unlink()
        return rows

    monkeypatch.setattr(explore, "embed_share", overtaken)
    assert cli.main(["explore", str(run), "--out", str(tmp_path / "page.html")]) == 0
    assert read_page(tmp_path / "page.html").meta["run"] == r"caf\udce9"


def test_a_tree_of_other_pictures_is_told_and_a_users_copy_passed_over(labelled_run, tmp_path, caplog):
    shutil.copytree(labelled_run, tmp_path / "run")
    trees = tmp_path / "run" / "hierarchies"
    newest = max(trees.glob("step-*.npz"))
    shutil.copy(newest, trees / f"{newest.stem}_old.npz")
    words = ["explore", str(tmp_path / "run"), "--out", str(tmp_path / "page.html"), "--overwrite"]
    assert cli.main(words) == 0
    Dendrogram(np.array([[0.0, 1.0, 0.5, 2.0], [2.0, 3.0, 0.6, 3.0]])).save(newest)
    assert cli.main(words) == 2
    assert f"in {trees} is of 3 pictures, and the run has" in caplog.text


def test_a_checkpoint_that_goes_while_it_is_read_gives_way_to_the_next(labelled_run, tmp_path, monkeypatch):
    shutil.copytree(labelled_run, tmp_path / "run")
    folder, find = tmp_path / "run" / "checkpoints", network.find_checkpoint
    old = max(folder.glob("step-*.pt"))

    def overtaken(*args):
        found = find(*args)
        if old.exists():
            old.rename(folder / "step-00000099.pt")
        return found

    monkeypatch.setattr(network, "find_checkpoint", overtaken)
    assert network.load_trained(str(tmp_path / "run")).checkpoint.name == "step-00000099.pt"


def test_the_server_shows_the_page_to_this_machine_alone(tmp_path, capfd):
    page = tmp_path / "page.html"
    page.write_text("<p>Grüße")
    with server(page, 0) as listening:
        assert listening.server_address[0] == "127.0.0.1"
        port = listening.server_port
        threading.Thread(target=listening.serve_forever, daemon=True).start()

        def get(path, host=f"localhost:{port}"):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
            connection.request("GET", path, headers={"Host": host})
            answer = connection.getresponse()
            return answer.status, answer.read().decode()

        assert get("/") == (200, "<p>Grüße")
        assert get("/page.html")[0] == get("/../page.html")[0] == get("/", "evil.example")[0] == 404
        # Browsers leave out the port that is HTTP's own.
        assert get("/", "localhost")[0] == get("/", "127.0.0.1")[0] == 200
        with pytest.raises(UserError, match=f"--serve {port}: cannot listen there"):
            server(page, port)
        page.unlink()
        assert get("/")[0] == 404
        listening.shutdown()
    assert "Traceback" not in capfd.readouterr().err


def test_a_reader_that_goes_leaves_no_traceback(tmp_path, capfd):
    page = tmp_path / "page.html"
    page.write_text("<p>")
    with server(page, 0) as listening:
        # So that the end of this waits for what they do.
        listening.daemon_threads = False
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        with socket.create_connection(listening.server_address) as reader:
            reader.sendall(b"GET / HT")
            # Closed by a reset, as when a program is killed.
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        # Answered after the first is taken: they come in a queue.
        following = http.client.HTTPConnection(*listening.server_address, timeout=30)
        following.request("GET", "/")
        assert following.getresponse().read() == b"<p>"
        following.close()
        listening.shutdown()
    assert capfd.readouterr().err == ""


@pytest.mark.slow
def test_serving_ends_with_ctrl_c(labelled_run, tmp_path):
    page = tmp_path / "page.html"
    # Port 0 is any that is free.
    command = [sys.executable, "-m", "uhml", "explore", str(labelled_run), "--out", str(page), "--serve", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        port = next(found[1] for line in process.stderr if (found := re.search(r"http://127\.0\.0\.1:(\d+)/", line)))
        connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=30)
        connection.request("GET", "/")
        assert connection.getresponse().read() == page.read_bytes()
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
        assert "Traceback" not in process.stderr.read()
