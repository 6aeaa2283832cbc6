"""The official data sets, on fixtures in the exact form of their files."""

from pathlib import Path

import numpy as np
import pytest
import scipy.io

from uhml.data.datasets import load_splits
from uhml.errors import UserError


def refused(match, name, root):
    with pytest.raises(UserError, match=match) as error:
        load_splits(name, root)
    assert "\n" not in str(error.value)


def names(pictures, root):
    return [str(Path(path).relative_to(root)) for path in pictures.paths]


# CUB


@pytest.fixture
def cub(tmp_path, draw):
    home = tmp_path / "CUB_200_2011"
    images = [
        "001.Black_footed_Albatross/Black_Footed_Albatross_0046_18.jpg",
        "001.Black_footed_Albatross/Black_Footed_Albatross_0009_34.jpg",
        "100.Brown_Pelican/Brown_Pelican_0122_94022.jpg",
        "101.White_Pelican/White_Pelican_0025_97337.jpg",
        "200.Common_Yellowthroat/Common_Yellowthroat_0003_190521.jpg",
    ]
    draw(home / "images", *images)
    (home / "images.txt").write_text("".join(f"{i} {image}\n" for i, image in enumerate(images, start=1)))
    (home / "image_class_labels.txt").write_text("1 1\n2 1\n3 100\n4 101\n5 200\n")
    return home


@pytest.mark.parametrize("up", [0, 1])
def test_cub(cub, up):
    splits = load_splits("cub200", cub.parent if up else cub)
    assert splits.train.class_names == ("001.Black_footed_Albatross", "100.Brown_Pelican")
    assert splits.train.labels.tolist() == [0, 0, 1]
    assert splits.test.class_names == ("101.White_Pelican", "200.Common_Yellowthroat")
    assert names(splits.test, cub)[0] == "images/101.White_Pelican/White_Pelican_0025_97337.jpg"
    assert splits.gallery is None


def test_cub_refusals(cub):
    refused(r"needs data\.root: the folder CUB_200_2011 with images\.txt", "cub200", None)
    refused("nowhere is no folder", "cub200", cub / "nowhere")
    refused(r"images holds 001\.Black.*data\.dataset=cub200 expects images\.txt", "cub200", cub / "images")
    labels = cub / "image_class_labels.txt"
    labels.write_text("1 1\n2 1 7\n")
    refused(r"labels\.txt, line 2: expected 2 fields \(image_id class_id\), found 3", "cub200", cub)
    labels.write_text("1 1\n2 1\n3 100\n4 one\n")
    refused("expected a number as the class of image 4, found 'one'", "cub200", cub)
    labels.write_text("1 1\n2 1\n3 100\n4 101\n")
    refused("has no class for image 5", "cub200", cub)
    labels.write_text("1 1\n2 1\n3 1\n4 1\n5 1\n")
    refused("classes 1 to 100 to train on and later ones to test on, found 5 and 0", "cub200", cub)
    labels.write_text("")
    refused("lists nothing; expected lines of image_id class_id", "cub200", cub)
    labels.write_bytes(b"\xff\xfe1 1")
    refused("is not text in UTF-8", "cub200", cub)
    labels.unlink()
    refused(r"Cannot read .*image_class_labels\.txt: No such file", "cub200", cub)


def test_missing_pictures_are_counted(cub):
    for picture in (cub / "images" / "001.Black_footed_Albatross").iterdir():
        picture.unlink()
    refused(r"lists 5 pictures, of which 2 are missing, first .*0046_18\.jpg", "cub200", cub)


# Cars

MODELS = [f"Model {number} 2012" for number in range(1, 197)]
CARS = {"train": [(14, "00001.jpg"), (196, "00002.jpg")], "test": [(98, "00001.jpg"), (99, "00002.jpg")]}
"""The class and file of each picture in the official halves, whose names overlap."""

CARS_SPLIT = {"train": ["014 Model 14 2012", "098 Model 98 2012"], "test": ["099 Model 99 2012", "196 Model 196 2012"]}


def write_mat(path, fields, rows, **more):
    records = np.zeros((1, len(rows)), dtype=[(field, object) for field in fields])
    for i, row in enumerate(rows):
        for field, value in zip(fields, row, strict=True):
            records[0, i][field] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    scipy.io.savemat(path, {"annotations": records, **more})


def class_names():
    cells = np.empty((1, len(MODELS)), dtype=object)
    cells[0] = MODELS
    return cells


BOX = ["bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2"]


def cars_pooled(home, draw):
    images = {"car_ims/000001.jpg": 14, "car_ims/000002.jpg": 196, "car_ims/000003.jpg": 98, "car_ims/000004.jpg": 99}
    draw(home, *images)
    write_mat(
        home / "cars_annos.mat",
        ["relative_im_path", *BOX, "class", "test"],
        [(image, 1, 1, 8, 6, number, i // 2) for i, (image, number) in enumerate(images.items())],
        class_names=class_names(),
    )


def cars_devkit(home, draw, nested="", labels="devkit"):
    for part, rows in CARS.items():
        draw(home / f"cars_{part}" / (f"cars_{part}" if nested else ""), *[file for _, file in rows])
    annotations = {part: [(1, 1, 8, 6, *row) for row in rows] for part, rows in CARS.items()}
    write_mat(home / "devkit" / "cars_train_annos.mat", [*BOX, "class", "fname"], annotations["train"])
    write_mat(home / labels / "cars_test_annos_withlabels.mat", [*BOX, "class", "fname"], annotations["test"])
    unlabelled = [(1, 1, 8, 6, file) for _, file in CARS["test"]]
    write_mat(home / "devkit" / "cars_test_annos.mat", [*BOX, "fname"], unlabelled)
    scipy.io.savemat(home / "devkit" / "cars_meta.mat", {"class_names": class_names()})


def cars_csv(home, draw):
    for part, rows in CARS.items():
        draw(home / "car_data" / part, *[f"{MODELS[number - 1]}/{file}" for number, file in rows])
        lines = [f"{file},1,1,8,6,{number}\n" for number, file in rows]
        (home / f"anno_{part}.csv").write_text("".join(lines))
    (home / "names.csv").write_text("".join(f"{name}\n" for name in MODELS))


CARS_LAYOUTS = {
    "pooled": cars_pooled,
    "devkit": cars_devkit,
    "devkit, nested": lambda home, draw: cars_devkit(home, draw, nested=True),
    "devkit, labels beside it": lambda home, draw: cars_devkit(home, draw, labels="."),
    "csv": cars_csv,
}


@pytest.mark.parametrize("layout", CARS_LAYOUTS)
@pytest.mark.parametrize("up", [0, 1])
def test_cars(tmp_path, draw, layout, up):
    CARS_LAYOUTS[layout](tmp_path / "cars196", draw)
    splits = load_splits("cars196", tmp_path if up else tmp_path / "cars196")
    for part, pictures in (("train", splits.train), ("test", splits.test)):
        assert list(pictures.class_names) == CARS_SPLIT[part]
        assert sorted(pictures.labels) == [0, 1]
        assert all(Path(path).is_file() for path in pictures.paths)
    if layout != "pooled":
        # 00001.jpg of the train half and 00001.jpg of the test half are two pictures.
        assert len({*splits.train.paths, *splits.test.paths}) == 4


def test_cars_refusals(tmp_path, draw):
    (tmp_path / "other").mkdir()
    refused(
        r"other holds nothing; .*cars_annos\.mat or devkit/cars_train_annos\.mat or anno_train\.csv",
        "cars196",
        tmp_path / "other",
    )
    home = tmp_path / "devkit_layout"
    cars_devkit(home, draw)
    (home / "devkit" / "cars_test_annos_withlabels.mat").unlink()
    refused(r"expects the file .*cars_test_annos_withlabels\.mat, which is missing", "cars196", home)
    home = tmp_path / "pooled"
    cars_pooled(home, draw)
    (home / "car_ims" / "000003.jpg").unlink()
    refused(r"lists 4 pictures, of which 1 are missing, first .*000003\.jpg", "cars196", home)
    write_mat(home / "cars_annos.mat", ["fname", "class"], [("000001.jpg", 1)])
    refused("expected the variable annotations with the fields relative_im_path, class", "cars196", home)
    fields, row = ["relative_im_path", "class"], ("car_ims/000001.jpg", 1)
    write_mat(home / "cars_annos.mat", fields, [row])
    refused("expected the variable class_names", "cars196", home)
    write_mat(home / "cars_annos.mat", fields, [("car_ims/000001.jpg", 197)], class_names=class_names())
    refused("expected classes 1 to 196, found 197", "cars196", home)
    write_mat(home / "cars_annos.mat", fields, [row], class_names=class_names())
    refused("classes 1 to 98 to train on .* found 1 and 0 pictures", "cars196", home)
    (home / "cars_annos.mat").write_bytes(b"no matlab")
    refused("no MATLAB file that can be read", "cars196", home)
    home = tmp_path / "csv"
    cars_csv(home, draw)
    (home / "anno_test.csv").write_text("00001.jpg,1,1,8,6,98\n00002.jpg,1,1,8,6\n")
    refused(r"anno_test\.csv, line 2: expected 6 fields .* found 5", "cars196", home)
    (home / "anno_test.csv").write_text("00001.jpg,1,1,8,6,x\n")
    refused("expected a number as the class on line 1, found 'x'", "cars196", home)


# Stanford Online Products

SOP_HEADER = "image_id class_id super_class_id path\n"


@pytest.fixture
def sop(tmp_path, draw):
    home = tmp_path / "Stanford_Online_Products"
    rows = {
        "Ebay_train.txt": ["1 1 1 bicycle_final/111085122871_0.JPG", "2 1 1 bicycle_final/111085122871_1.JPG"],
        "Ebay_test.txt": ["3 11319 1 bicycle_final/2_0.JPG", "4 11320 12 toaster_final/3_0.JPG"],
    }
    for file, lines in rows.items():
        draw(home, *[line.split()[-1] for line in lines])
        (home / file).write_text(SOP_HEADER + "\n".join(lines) + "\n")
    return home


@pytest.mark.parametrize("up", [0, 1])
def test_sop(sop, up):
    splits = load_splits("sop", sop.parent if up else sop)
    assert splits.train.labels.tolist() == [0, 0]
    assert splits.test.class_names == ("11319", "11320")
    assert splits.test.super_labels.tolist() == [0, 1]
    assert splits.test.super_class_names == ("01 bicycle_final", "12 toaster_final")
    assert names(splits.test, sop) == ["bicycle_final/2_0.JPG", "toaster_final/3_0.JPG"]


def test_sop_refusals(sop):
    file = sop / "Ebay_test.txt"
    file.write_text("1 1 1 bicycle_final/111085122871_0.JPG\n")
    refused(
        "Ebay_test.txt, line 1: expected the header 'image_id class_id super_class_id path', found '1 1", "sop", sop
    )
    file.write_text(SOP_HEADER + "3 11319 bicycle_final/2_0.JPG\n")
    refused("Ebay_test.txt, line 2: expected 4 fields .* found 3", "sop", sop)
    file.write_text(SOP_HEADER)
    refused("Ebay_test.txt lists nothing", "sop", sop)
    file.write_text("")
    refused("expected the header .* found ''", "sop", sop)
    file.unlink()
    refused("Cannot read .*Ebay_test.txt", "sop", sop)


# In-shop

INSHOP_HEADER = "image_name item_id evaluation_status\n"
INSHOP = [
    "img/WOMEN/Dresses/id_00000002/02_1_front.jpg id_00000002 train",
    "img/MEN/Denim/id_00000080/01_1_front.jpg id_00000080 train",
    "img/WOMEN/Dresses/id_00000003/01_1_front.jpg  id_00000003  query",
    "img/WOMEN/Dresses/id_00000003/01_2_side.jpg   id_00000003  gallery",
    "img/MEN/Shorts/id_00000001/01_2_side.jpg   id_00000001  gallery",
    "img/MEN/Shorts/id_00000001/01_1_front.jpg  id_00000001  query",
]


@pytest.fixture
def inshop(tmp_path, draw):
    home = tmp_path / "In-shop Clothes Retrieval Benchmark"
    draw(home / "Img", *[line.split()[0] for line in INSHOP])
    (home / "Eval").mkdir()
    (home / "Eval" / "list_eval_partition.txt").write_text("6\n" + INSHOP_HEADER + "\n".join(INSHOP) + "\n")
    return home


@pytest.mark.parametrize("up", [0, 1])
def test_inshop(inshop, up):
    splits = load_splits("inshop", inshop.parent if up else inshop)
    assert splits.train.class_names == ("id_00000002", "id_00000080")
    assert splits.train.super_class_names == ("MEN/Denim", "WOMEN/Dresses")
    # A class has the same number among the queries and in the gallery.
    assert splits.test.class_names == splits.gallery.class_names == ("id_00000001", "id_00000003")
    assert splits.test.labels.tolist() == [1, 0]
    assert splits.gallery.labels.tolist() == [1, 0]
    assert names(splits.gallery, inshop)[0] == "Img/img/WOMEN/Dresses/id_00000003/01_2_side.jpg"


def test_part_of_inshop_keeps_queries_and_gallery_together(inshop):
    splits = load_splits("inshop", inshop, num_classes=1)
    assert splits.test.class_names == splits.gallery.class_names == ("id_00000001",)
    assert names(splits.test, inshop) == ["Img/img/MEN/Shorts/id_00000001/01_1_front.jpg"]
    assert splits.test.labels.tolist() == splits.gallery.labels.tolist() == [0]


def test_inshop_refusals(inshop):
    file = inshop / "Eval" / "list_eval_partition.txt"
    lines = "\n".join(INSHOP) + "\n"
    file.write_text("7\n" + INSHOP_HEADER + lines)
    refused("line 1 announces 7 pictures, 6 follow", "inshop", inshop)
    file.write_text("six\n" + INSHOP_HEADER + lines)
    refused("expected a number as the count of pictures on line 1, found 'six'", "inshop", inshop)
    file.write_text(INSHOP_HEADER + lines)
    refused("line 2: expected the header", "inshop", inshop)
    file.write_text("6\n" + INSHOP_HEADER + lines.replace("query", "probe"))
    refused("expected the status train, query, gallery for .*, found 'probe'", "inshop", inshop)
    file.write_text("6\n" + INSHOP_HEADER + lines.replace("query", "gallery"))
    refused("lists no picture with the status query", "inshop", inshop)
