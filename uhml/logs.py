"""Log lines: rank 0's on the terminal, every rank's in a file of its own."""

import logging
import os
import sys
import warnings
from pathlib import Path

from tqdm import tqdm


class _AboveProgressBars(logging.Handler):
    """Writes lines to stderr without tearing a progress bar apart."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


def log_to_terminal() -> None:
    """Show uhml's own messages, and others' warnings, on the terminal of rank 0; of other ranks only errors."""
    handler = _AboveProgressBars()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    # torchrun's variable, as this comes before there is a process group.
    handler.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.ERROR)
    logging.getLogger().addHandler(handler)
    logging.getLogger("uhml").setLevel(logging.INFO)
    logging.captureWarnings(True)
    # timm 1.0 calls it at import; nothing a user of uhml could do about it.
    warnings.filterwarnings("ignore", message=".*torch.jit.script.* is deprecated")


def log_to_file(path: Path) -> None:
    """Write everything that is logged in this process to ``path`` too."""
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(handler)
