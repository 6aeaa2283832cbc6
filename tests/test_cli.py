import json
import os
import re
import shlex
import subprocess
import sys

import pytest

from uhml import cli

COMMANDS = ["train", *cli.COMMANDS]


def ending(arguments, capsys):
    """Exit status, and what was said on either stream."""
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    said = capsys.readouterr()
    return caught.value.code, said.out, said.err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_commands_help_has_examples_which_it_understands(command, capsys):
    code, out, err = ending([command, "--help"], capsys)
    assert (code, err) == (0, "")
    examples = re.findall(rf"^  (uhml {command} .+)$", out, re.MULTILINE)
    assert examples
    for example in examples:
        words = shlex.split(example)[1:]
        words = words[: words.index(">")] if ">" in words else words
        parser, commands = cli._parsers(words)
        cli._refuse_misspelt(parser, commands, words)
        args, rest = parser.parse_known_args(words)
        assert callable(args.run)
        # What follows an option and is no option itself is an override.
        assert all("=" in word and not word.startswith("-") for word in rest)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_misspelt_option_of_any_command_is_answered_with_what_was_meant(command, capsys):
    _, manual, _ = ending([command, "--help"], capsys)
    options = set(re.findall(r"^  (?:-\w, )?(--[a-z-]+)", manual, re.MULTILINE)) | {"--help"}
    for option in options:
        # Two letters change places, before any required argument is given.
        misspelt = option[:-2] + option[-1] + option[-2]
        if misspelt in options or misspelt == option:
            continue
        for given in ([misspelt, "x"], [f"{misspelt}=x"], ["x", misspelt]):
            code, out, err = ending([command, *given], capsys)
            assert (code, out) == (2, "")
            assert err.count("\n") == 1
            assert f"uhml {command}: error: there is no option {misspelt}. Did you mean '{option}'?" in err


@pytest.mark.parametrize("command", COMMANDS)
def test_a_misspelt_command_is_answered_with_what_was_meant(command, capsys):
    code, out, err = ending([command[:-2] + command[-1] + command[-2], "--out", "x"], capsys)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert f"Did you mean {command!r}?" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "uhml: error: the following arguments are required: COMMAND (see uhml --help)"),
        (["zzz"], "uhml: error: there is no command zzz. (see uhml --help)"),
        (["--seed"], "uhml: error: there is no option --seed. (see uhml --help)"),
        (["--verson"], "uhml: error: there is no option --verson. Did you mean '--version'?"),
        (["train", "x", "--steps"], "uhml train: error: there is no option --steps. (see uhml train --help)"),
        (["train"], "uhml train: error: the following arguments are required: CONFIG"),
        (["train", "x", "-q"], "uhml train: error: unrecognized arguments: -q"),
        (["train", "x", "--run-dir"], "uhml train: error: argument --run-dir: expected one argument"),
        (["cluster", "x.npy", "--out", "y.npz", "z"], "uhml cluster: error: unrecognized arguments: z"),
        (["cluster", "x.npy", "--out", "y.npz", "--mode", "exakt"], "invalid choice: 'exakt'"),
    ],
)
def test_other_mistakes_are_told_in_one_line_too(arguments, words, capsys):
    code, out, err = ending(arguments, capsys)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert words in err


def test_ctrl_c_while_modules_are_imported(monkeypatch):
    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_parsers", interrupted)
    assert cli.main(["train"]) == 130


@pytest.mark.parametrize("options", [["--json"], []])
def test_a_reader_that_goes_is_no_error(tmp_path, options):
    """As in ``uhml check-data ... | head``."""
    (tmp_path / "a.png").write_bytes(b"")
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "uhml", "check-data", "folder", "--root", str(tmp_path), *options]
    ended = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=120, check=False)
    os.close(writer)
    assert "roken pipe" not in ended.stderr
    assert ended.returncode == 141


@pytest.mark.parametrize("closed", [">&-", "2>&-"])
def test_a_command_without_a_standard_stream_ends_well(tmp_path, closed):
    """As a daemon starts it."""
    command = f"{sys.executable} -m uhml check-data glyphs data.num_classes=4 --root {tmp_path} --json"
    ended = subprocess.run(
        f"exec {command} {closed}", shell=True, capture_output=True, text=True, timeout=240, check=False
    )
    assert ended.returncode == 0, ended.stderr
    # No line of a log is among what is for scripts.
    assert closed == ">&-" or json.loads(ended.stdout)["refused"] == []


@pytest.mark.parametrize("command", ["train", "compare", "launch", "status", "cancel"])
def test_what_computes_nothing_does_not_wait_for_torch(command):
    """Which takes seconds to import: ``uhml train`` does so once its config is known to be right."""
    imported = f"import sys; from uhml import cli; cli._parsers([{command!r}]); print('torch' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", imported], capture_output=True, text=True, timeout=120, check=True)
    assert ended.stdout == "False\n"
