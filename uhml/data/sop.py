"""Stanford Online Products (Song et al., CVPR 2016), and any other set in its layout."""

from pathlib import Path

from uhml.data.pictures import Pictures, Splits
from uhml.data.reading import check_exist, check_header, check_int, find_home, read_table

COLUMNS = "image_id class_id super_class_id path"


def sop(root: Path | None) -> Splits:
    """Read ``Stanford_Online_Products/``, split by its two files: 59,551 pictures train, 60,502 test.

    Its 12 kinds of product are the super classes, named by the folder of their first picture.

    Args:
        root: the folder with ``Ebay_train.txt``, ``Ebay_test.txt`` and the pictures' folders, or the one it lies in.

    Raises:
        UserError: one of them is missing or not in the official form, or a picture is missing.
    """
    home = find_home(root, "sop", "Stanford_Online_Products", ["Ebay_train.txt"])
    return Splits(train=_read(home, "Ebay_train.txt"), test=_read(home, "Ebay_test.txt"))


def _read(home: Path, file: str) -> Pictures:
    check_header(home / file, 1, COLUMNS)
    paths, classes, super_classes = [], [], []
    name_of: dict[int, str] = {}
    for _, class_id, super_class_id, relative in read_table(home / file, COLUMNS, skip=1):
        paths.append(str(home / relative))
        classes.append(f"{check_int(class_id, 'class_id', home / file):05d}")
        number = check_int(super_class_id, "super_class_id", home / file)
        super_classes.append(name_of.setdefault(number, f"{number:02d} {Path(relative).parent.name}"))
    check_exist(paths, home / file)
    return Pictures.from_names(paths, classes, super_classes)
