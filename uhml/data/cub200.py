"""Caltech-UCSD Birds 200-2011 (Wah et al., 2011)."""

from pathlib import Path

from uhml.data.pictures import Pictures, Splits
from uhml.data.reading import check_exist, check_int, find_home, read_table
from uhml.errors import UserError

NUM_TRAIN_CLASSES = 100


def cub200(root: Path | None) -> Splits:
    """Read ``CUB_200_2011/``: classes 1 to 100 train (5,864 pictures), 101 to 200 test (5,924).

    Args:
        root: the folder with ``images.txt``, ``image_class_labels.txt`` and ``images/``, or the one it lies in.

    Raises:
        UserError: one of them is missing or not in the official form, or a picture is missing.
    """
    home = find_home(root, "cub200", "CUB_200_2011", ["images.txt"])
    labels_file = home / "image_class_labels.txt"
    class_of = {
        image: check_int(number, f"the class of image {image}", labels_file)
        for image, number in read_table(labels_file, "image_id class_id")
    }
    train: list[str] = []
    test: list[str] = []
    for image, relative in read_table(home / "images.txt", "image_id path"):
        if image not in class_of:
            raise UserError(f"{labels_file} has no class for image {image} ({relative}) of images.txt.")
        (train if class_of[image] <= NUM_TRAIN_CLASSES else test).append(str(home / "images" / relative))
    if not train or not test:
        raise UserError(
            f"{labels_file}: expected classes 1 to {NUM_TRAIN_CLASSES} to train on and later ones to test on, "
            f"found {len(train)} and {len(test)} pictures."
        )
    check_exist([*train, *test], home / "images.txt")
    return Splits(train=_by_folder(train), test=_by_folder(test))


def _by_folder(paths: list[str]) -> Pictures:
    # The folders are "001.Black_footed_Albatross": number and name in one.
    return Pictures.from_names(paths, [Path(path).parent.name for path in paths])
