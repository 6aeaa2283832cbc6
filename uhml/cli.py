"""The command line: ``uhml train``, and the commands of the table below."""

import argparse
import importlib
import logging
import os
import select
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import uhml
from uhml import interruption, logs
from uhml.config import describe_keys, load_config
from uhml.environment import place
from uhml.errors import RankFailed, RunsFailed, UserError, did_you_mean, is_known_everywhere
from uhml.interruption import Preempted

logger = logging.getLogger(__name__)

TRAIN_EXAMPLES = """\
examples:
  uhml train configs/quickstart.yaml
  uhml train configs/folder.yaml data.root=my/pictures --run-dir runs/mine
  torchrun --nproc-per-node 8 -m uhml train configs/sop.yaml data.root=/data/Stanford_Online_Products

keys of CONFIG, each also as section.key=value on the command line (values are the defaults):

"""

COMMANDS = {
    "plan": ("uhml.planning.command", "tell what a run will cost in time, memory and disk, and whether it fits"),
    "evaluate": ("uhml.commands.evaluate", "score a trained network, class by class, with sheets of its answers"),
    "embed": ("uhml.commands.embed", "embed any pictures with a trained network, into a file"),
    "search": ("uhml.commands.search", "find the pictures that are most like one"),
    "explore": ("uhml.commands.explore", "write a page to walk through the pictures and their hierarchy"),
    "compare": ("uhml.commands.compare", "put runs side by side, in a table and a plot"),
    "reproduce": ("uhml.commands.reproduce", "train and score on the benchmarks that are there, and make their table"),
    "export": ("uhml.commands.export", "write a trained network for use elsewhere, as safetensors or ONNX"),
    "prepare": ("uhml.commands.prepare", "download and verify a data set"),
    "check-data": ("uhml.commands.check_data", "say what is wrong with a tree of pictures"),
    "cluster": ("uhml.hierarchy.command", "cluster a file of embeddings by average linkage"),
    "launch": ("launch.launch", "submit a run, or a sweep of runs, to a SLURM cluster"),
    "status": ("launch.status", "say how runs stand: waiting, running, finished, failed"),
    "cancel": ("launch.cancel", "end a run, which saves first"),
}
"""Name, module and purpose; the module declares its options in ``add_arguments`` and works in ``run``."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status.

    0: done. 1: a rank or a run failed. 2: an error of the user's. 75: preempted, and the same command goes on where it
    stopped; 130 after Ctrl-C; 141 where nobody reads what is printed any more.
    """
    try:
        return _main(sys.argv[1:] if arguments is None else arguments)
    except KeyboardInterrupt:  # while modules are imported
        return 130


def _main(arguments: Sequence[str]) -> int:
    # Some modules warn when they are imported, of nothing a user could do about.
    with logs.to_terminal():
        parser, commands = _parsers(arguments)
    _refuse_misspelt(parser, commands, arguments)
    # argparse gives up at overrides that follow an option; they are as good there as before it.
    args, rest = parser.parse_known_args(arguments)
    if rest and (not hasattr(args, "overrides") or any(word.startswith("-") for word in rest)):
        commands[arguments[0]].error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides += rest
    with logs.to_terminal():
        try:
            args.run(args)
            if sys.stdout is not None:  # as it is where it was closed
                sys.stdout.flush()
        # An OSError is a full disk or a file taken away: the message names the file, the run's log the place.
        except (UserError, OSError) as e:
            if isinstance(e, BrokenPipeError) and _is_nobody_reading():
                # What is left to print would be an error at the very end.
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                return 141  # of a program that SIGPIPE ended
            _tell(e)
            return 2
        except (RankFailed, RunsFailed) as e:
            _tell(e)
            return 1
        except Preempted as e:
            logger.info("%s", e)
            return e.exit_status
        except KeyboardInterrupt:
            logger.error("interrupted")
            return 130
    return 0


def _is_nobody_reading() -> bool:
    """Whether the program that was to read what is printed has ended."""
    stdout = select.poll()
    stdout.register(sys.stdout, 0)
    return any(event & select.POLLERR for _, event in stdout.poll(0))


def _tell(error: Exception) -> None:
    """Show the error on the terminal, once: what rank 0 tells no other rank repeats."""
    if place().rank == 0 or not is_known_everywhere(error):
        logger.error("error: %s", error)


class _Parser(argparse.ArgumentParser):
    """Tells what is wrong in one line, and shows examples as they are written."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def _parsers(arguments: Sequence[str]) -> tuple[_Parser, dict[str, _Parser]]:
    """Return the parser, and that of each command.

    Of the table's modules, which may import torch, it imports the one that is asked for only.
    """
    parser = _Parser(prog="uhml", description=uhml.__doc__)
    parser.add_argument("--version", action="version", version=f"uhml {uhml.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    train = commands.add_parser(
        "train",
        help="train an embedding from a folder of pictures and score it",
        description="Train a hyperbolic embedding without labels, and score it on unseen classes where there are any.",
        epilog=TRAIN_EXAMPLES + describe_keys(),
    )
    add_run_arguments(
        train,
        config="a YAML file, such as configs/quickstart.yaml",
        run_dir="folder of the run; an unfinished run there goes on (default: runs/CONFIG-DATE-TIME)",
    )
    train.add_argument("--overwrite", action="store_true", help="begin anew, in the place of the run in --run-dir")
    train.set_defaults(run=_train)
    for name, (module_name, what) in COMMANDS.items():
        command_parser = commands.add_parser(name, help=what, description=f"{what[0].upper()}{what[1:]}.")
        if name in arguments[:1]:
            module = importlib.import_module(module_name)
            module.add_arguments(command_parser)
            command_parser.set_defaults(run=module.run)
    return parser, commands.choices


def _refuse_misspelt(parser: _Parser, commands: dict[str, _Parser], arguments: Sequence[str]) -> None:
    """Say what was meant before argparse looks, which would first of all miss what was misspelt."""
    command = next(iter(arguments), "")
    if command in commands:
        parser, words = commands[command], arguments[1:]
    elif command.startswith("-"):
        words = arguments[:1]
    elif command:
        parser.error(f"there is no command {command}.{did_you_mean(command, commands)}")
    else:
        return
    known = parser._option_string_actions
    for option in (word.partition("=")[0] for word in words):
        if option == "--":
            break
        # argparse takes the beginning of an option for it.
        if option.startswith("--") and not any(other.startswith(option) for other in known):
            parser.error(f"there is no option {option}.{did_you_mean(option, known)}")


def add_run_arguments(parser: argparse.ArgumentParser, *, config: str, run_dir: str) -> None:
    """Declare what says which run is meant: for ``uhml train`` and ``uhml launch``.

    Args:
        parser: of the command.
        config: help for CONFIG.
        run_dir: help for ``--run-dir``.
    """
    parser.add_argument("config", metavar="CONFIG", help=config)
    parser.add_argument("overrides", metavar="key=value", nargs="*", default=[], help="overrides of single keys")
    parser.add_argument("--run-dir", type=Path, help=run_dir)
    parser.add_argument(
        "--allow-change",
        metavar="KEY[,KEY]",
        type=lambda keys: keys.split(","),
        default=[],
        help="keys of CONFIG that may differ from those that the unfinished run in --run-dir was started with",
    )


def count(text: str) -> int:
    """Return a number that was typed, for argparse, which tells what is wrong with one."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 up")
    return int(text)


def run_dir_of(args: argparse.Namespace) -> Path:
    """Return the folder that ``--run-dir`` names, or a new one named by config and time."""
    return args.run_dir or Path("runs") / f"{Path(args.config).stem}-{time.strftime('%Y%m%d-%H%M%S')}"


def _train(args: argparse.Namespace) -> None:
    config = load_config(args.config, args.overrides)
    run_dir = run_dir_of(args)
    # Here, not above: torch and timm take seconds to import, and a mistyped key should be told at once.
    with interruption.handled():
        from uhml.train import train

        train(config, run_dir, args.overwrite, args.allow_change)
