"""The embedded data set: characters drawn from the font faces that matplotlib ships."""

from pathlib import Path

from uhml.data.pictures import Splits


def glyphs(root: Path | None) -> Splits:
    """Skeleton."""
    raise NotImplementedError
