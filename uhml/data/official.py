"""The official data sets as their authors published them: where they are, and how many pictures they have."""

import dataclasses
from dataclasses import dataclass

import numpy as np

from uhml.data.pictures import Splits


@dataclass(frozen=True, kw_only=True)
class Official:
    """What is known of a data set.

    Attributes:
        folder: what its folder is called in its archive.
        pictures: number of pictures of each part, "train", "test" and "gallery".
        classes: number of classes of train and of test.
        url: where it can be downloaded; None where it cannot, without more ado.
        how: what to do then, as the end of a sentence.
        inside: where files go whose archives are not of the whole folder, by the first part of their names.
        md5: checksums of the files that the authors published, by name.
    """

    folder: str
    pictures: dict[str, int]
    classes: tuple[int, int]
    url: str | None = None
    how: str = ""
    inside: dict[str, str] = dataclasses.field(default_factory=dict)
    md5: dict[str, str] = dataclasses.field(default_factory=dict)


OFFICIAL = {
    "cub200": Official(
        folder="CUB_200_2011",
        pictures={"train": 5_864, "test": 5_924},
        classes=(100, 100),
        url="https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz",
        md5={"CUB_200_2011.tgz": "97eceeb196236b17998738112f37df78"},
    ),
    "cars196": Official(
        folder="cars196",
        pictures={"train": 8_054, "test": 8_131},
        classes=(98, 98),
        how=(
            "its authors no longer serve it: find a copy, such as car_ims.tgz with cars_annos.mat, and give each of "
            "its files as --archive FILE or --url ADDRESS"
        ),
        md5={
            "car_ims.tgz": "d5c8f0aa497503f355e17dc7886c3f14",
            "cars_annos.mat": "b407c6086d669747186bd1d764ff9dbc",
        },
    ),
    "sop": Official(
        folder="Stanford_Online_Products",
        pictures={"train": 59_551, "test": 60_502},
        classes=(11_318, 11_316),
        # The same file as ftp://cs.stanford.edu/cs/cvgl/, by a protocol that firewalls let pass.
        url="http://ftp.cs.stanford.edu/cs/cvgl/Stanford_Online_Products.zip",
        md5={"Stanford_Online_Products.zip": "7f73d41a2f44250d4779881525aea32e"},
    ),
    "inshop": Official(
        folder="In-shop Clothes Retrieval Benchmark",
        pictures={"train": 25_882, "test": 14_218, "gallery": 12_612},
        classes=(3_997, 3_985),
        how=(
            "its authors hand it out for research to those who agree to their terms: do so at "
            "https://mmlab.ie.cuhk.edu.hk/projects/DeepFashion/InShopRetrieval.html, download img.zip and "
            "list_eval_partition.txt, and give both as --archive FILE"
        ),
        inside={"img": "Img", "list_eval_partition.txt": "Eval"},
    ),
}


def differences(name: str, splits: Splits) -> list[str]:
    """Compare a data set's numbers of pictures and classes with the official ones.

    Args:
        name: what ``data.dataset`` says, one of ``OFFICIAL``.
        splits: what was read.

    Returns:
        A clause for each number that is another: ``["5,863 train pictures instead of 5,864"]``.
    """
    official, parts, said = OFFICIAL[name], splits.parts, []
    for part, expected in official.pictures.items():
        found = len(parts.get(part, ()))
        if found != expected:
            said.append(f"{found:,} {part} pictures instead of {expected:,}")
    for part, expected in zip(("train", "test"), official.classes, strict=True):
        pictures = parts.get(part)
        found = 0 if pictures is None or pictures.labels is None else len(np.unique(pictures.labels))
        if found != expected:
            said.append(f"{found:,} {part} classes instead of {expected:,}")
    return said
