"""Caltech-UCSD Birds 200-2011 (Wah et al., 2011)."""

from pathlib import Path

from uhml.data.pictures import Splits
from uhml.data.reading import check_both_parts, check_exist, check_int, find_home, read_table
from uhml.data.splitting import split
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
    paths, classes, trains = [], [], []
    for image, relative in read_table(home / "images.txt", "image_id path"):
        if image not in class_of:
            raise UserError(f"{labels_file} has no class for image {image} ({relative}) of images.txt.")
        paths.append(str(home / "images" / relative))
        classes.append(Path(relative).parent.name)  # "001.Black_footed_Albatross": number and name in one
        trains.append(class_of[image] <= NUM_TRAIN_CLASSES)
    check_both_parts(trains, NUM_TRAIN_CLASSES, labels_file)
    check_exist(paths, home / "images.txt")
    return split(paths, classes, None, trains)
