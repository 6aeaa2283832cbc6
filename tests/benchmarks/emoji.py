"""Makes a data set that no setting was ever chosen on: emoji, each as four companies draw it.

    npm pack emoji-datasource{,-apple,-google,-twitter,-facebook}@16.0.0
    python tests/benchmarks/emoji.py --out emoji *.tgz
    python tests/benchmarks/scoreboard.py --out results/emoji --rows ours,one-level,simclr configs/list.yaml \\
        data.root=emoji/emoji.csv data.image_size=64 train.num_steps=500 train.global_batch_size=96

Many small classes, as products are: an emoji is a class, of three or four pictures of 64 pixels, and Unicode's
subcategories ("face-smiling", "food-fruit") are classes of classes. Of the emoji in Unicode's order every second one is
to train on, the others to score on. The pictures are the companies' own, and not to be passed on.
"""

import argparse
import csv
import json
import tarfile
from pathlib import Path

COMPANIES = ("apple", "google", "twitter", "facebook")
PICTURES = "package/img/{}/64/"
ABOUT = "package/emoji.json"


def unpack(archives, out):
    """Write the pictures of 64 pixels and what Unicode says of them into a folder; other files stay where they are."""
    wanted = (ABOUT, *(PICTURES.format(company) for company in COMPANIES))
    for archive in archives:
        with tarfile.open(archive) as tar:
            tar.extractall(out, [member for member in tar if member.name.startswith(wanted)], filter="data")


def rows(root):
    """Return path, class, class of classes and part of each picture."""
    emoji = [one for one in json.loads((root / ABOUT).read_text()) if one["category"] != "Component"]
    found, number = [], 0
    for one in sorted(emoji, key=lambda one: one["sort_order"]):
        paths = [PICTURES.format(company) + one["image"] for company in COMPANIES]
        paths = [path for path in paths if (root / path).is_file()]
        # Of two pictures one alone would be there to be found.
        if len(paths) > 2:
            part = "test" if number % 2 else "train"
            found += [(path, one["unified"], one["subcategory"], part) for path in paths]
            number += 1
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archives", nargs="+", type=Path, help="the five packages, as npm packs them")
    parser.add_argument("--out", type=Path, required=True, help="a folder")
    args = parser.parse_args()
    unpack(args.archives, args.out)
    found = rows(args.out)
    with (args.out / "emoji.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "label", "super_label", "split"), *found])
    print(f"{len(found):,} pictures of {len({label for _, label, *_ in found}):,} emoji: {args.out / 'emoji.csv'}")


if __name__ == "__main__":
    main()
