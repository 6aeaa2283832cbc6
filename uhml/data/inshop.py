"""In-shop Clothes Retrieval of DeepFashion (Liu et al., CVPR 2016)."""

from pathlib import Path, PurePosixPath

from uhml.data.pictures import Pictures, Splits
from uhml.data.reading import check_exist, check_header, check_int, find_home, read_lines, read_table
from uhml.errors import UserError

FOLDER = "In-shop Clothes Retrieval Benchmark"
PARTITION = "Eval/list_eval_partition.txt"
COLUMNS = "image_name item_id evaluation_status"
STATUSES = ("train", "query", "gallery")


def inshop(root: Path | None) -> Splits:
    """Read the In-shop benchmark by its partition file: 25,882 pictures train, 14,218 query, 12,612 gallery.

    An item is a class; the garment, ``WOMEN/Dresses``, is its super class.

    Args:
        root: the folder with ``Eval/list_eval_partition.txt`` and ``Img/``, or the one it lies in.

    Returns:
        Splits whose ``test`` are the queries and which have a ``gallery``.

    Raises:
        UserError: one of them is missing or not in the official form, or a picture is missing.
    """
    home = find_home(root, "inshop", FOLDER, [PARTITION])
    file = home / PARTITION
    check_header(file, 2, COLUMNS)
    rows = read_table(file, COLUMNS, skip=2)
    count = check_int(read_lines(file)[0].strip(), "the count of pictures on line 1", file)
    if count != len(rows):
        raise UserError(f"{file}: line 1 announces {count:,} pictures, {len(rows):,} follow; is it cut off?")
    of_status: dict[str, list[tuple[str, str, str]]] = {status: [] for status in STATUSES}
    for image, item, status in rows:
        if status not in of_status:
            raise UserError(f"{file}: expected the status {', '.join(STATUSES)} for {image}, found {status!r}.")
        of_status[status].append((str(home / "Img" / image), item, "/".join(PurePosixPath(image).parts[1:-2])))
    for status, listed in of_status.items():
        if not listed:
            raise UserError(f"{file} lists no picture with the status {status}.")
    check_exist([path for listed in of_status.values() for path, _, _ in listed], file)
    # Query and gallery are numbered together, so that a class is the same number in both.
    together = _pictures(of_status["query"] + of_status["gallery"])
    num_query = len(of_status["query"])
    return Splits(
        train=_pictures(of_status["train"]),
        test=together.select(range(num_query)),
        gallery=together.select(range(num_query, len(together))),
    )


def _pictures(listed: list[tuple[str, str, str]]) -> Pictures:
    paths, items, garments = zip(*listed, strict=True)
    return Pictures.from_names(paths, items, garments)
