"""Files that are never found half written."""

from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Write aside, then rename: who reads meanwhile reads what was there before, or all of ``text``."""
    aside = path.with_name(f"{path.name}.partial")
    aside.write_text(text)
    aside.replace(path)
