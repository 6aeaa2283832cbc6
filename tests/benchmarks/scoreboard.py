"""The scoreboard: frozen, untrained, the ceiling, ours, ours with parts taken out, and what else one could pick.

    python tests/benchmarks/scoreboard.py --out results/cars configs/cars196-small.yaml data.root=cars196

Run it from the top of the repository. The rows of SimCLR and STML need lightly and a clone of STML's code, as rows.py
says. Each row and seed is a run of its own in ``OUT/ROW/seed-S``; the same command again goes on where it stopped, and
makes the table of what is there. Writes ``scoreboard.md``: per cent on unseen classes after the last step, the mean
over seeds and its spread (standard deviation), the dendrogram purity of the training pictures' tree after training,
and the command of each row.
"""

import argparse
import json
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

from uhml.reporting.runs import Spread

ARTICLE = [
    "model.projector=false",
    "model.pooling=default",
    "model.head_init=random",
    "model.curvature=1.0",
    "model.clip_radius=1.0",
    "model.start_norm=10",
    "mining.num_views=1",
    "mining.pictures_per_cluster=8",
    "mining.clusters_together=1",
    "hierarchy.cut_by=counts",
    "loss.omega=0.794",
    "loss.view_weight=0",
    "optim.learning_rate=1e-5",
    "optim.weight_decay=5e-4",
    "optim.schedule=constant",
    "optim.warmup_steps=0",
]
# Chosen on Cars' validation classes: right levels stand a stronger contrast than clusters do, and are hindered by that
# of the views.
ALONE = ["loss.omega=0.8", "mining.pictures_per_cluster=4", "loss.view_weight=0"]
# Row: what runs it, and what it changes. The article's cuts for each data set are given on the command line.
ROWS = {
    "ours": ("ours", "uhml train", []),
    "labels": ("true labels for clusters", "rows.py labels", []),
    "labels-alone": ("true labels, no contrast of views", "rows.py labels", ALONE),
    "flat": ("ours, Euclidean: c = 0", "uhml train", ["model.curvature=0"]),
    "one-level": ("ours, one level", "uhml train", ["hierarchy.cuts=[0.85]"]),
    "one-view": ("ours, without two views", "uhml train", ["mining.num_views=1"]),
    "contrastive": ("contrastive loss on one level", "rows.py contrastive", []),
    "simclr": ("SimCLR (lightly), behind our head", "rows.py simclr", []),
    "stml": ("STML (official code), behind our head", "rows.py stml", []),
    "article": ("the article's plain setting", "uhml train", ARTICLE),
}
# What other methods leave to their users, without our head: a name, and where it is in the results.
OWN = {
    "simclr": ("SimCLR, its own features, cosine", "trained", "backbone"),
    "stml": ("STML, its own embedding", "own"),
}


def command(row, args, seed, run_dir):
    """What runs a row, as a user would type it."""
    _, program, changes = ROWS[row]
    if row == "article":
        changes = [*changes, f"hierarchy.cuts={args.article_cuts}"]
    start = ["-m", "uhml", "train"] if program == "uhml train" else ["tests/benchmarks/rows.py", program.split()[1]]
    return [*start, args.config, *args.overrides, *changes, f"train.seed={seed}", "--run-dir", str(run_dir)]


def cell(results, *path):
    """Mean and spread over seeds of ``recall_at_k[1]``, MAP@R and NMI."""
    found = [_at(result, path) for result in results]
    columns = [[s["recall_at_k"]["1"] for s in found], [s["map_at_r"] for s in found], [s["nmi"] for s in found]]
    return " | ".join(Spread.of(column).text() for column in columns)


def _at(result, path):
    for key in path:
        result = result[key]
    return result


def tree_cell(run_dirs):
    """Mean and spread of the last tree's dendrogram purity, by classes and, where there are any, by super-classes."""
    trees = [_last_tree(run_dir) for run_dir in run_dirs]
    return " / ".join(
        Spread.of([tree[key] for tree in trees]).text()
        for key in ("dendrogram_purity", "super_dendrogram_purity")
        if all(key in tree for tree in trees)
    )


def _last_tree(run_dir):
    log = run_dir / "metrics.jsonl"
    if not log.exists():
        return json.loads((run_dir / "result.json").read_text()).get("tree", {})
    return [entry for entry in map(json.loads, log.read_text().splitlines()) if entry["kind"] == "hierarchy"][-1]


def table(args):
    """Markdown of all rows that there is a result of."""
    lines = [
        "| row | seeds | R@1 | MAP@R | NMI | tree's purity | backbone's R@1 | seconds a run |",
        "|---|---|---|---|---|---|---|---|",
    ]
    run_dirs = {row: sorted(p.parent for p in (args.out / row).glob("seed-*/result.json")) for row in ROWS}
    results = {row: [json.loads((d / "result.json").read_text()) for d in dirs] for row, dirs in run_dirs.items()}
    first = next((found for found in results.values() if found), None)
    if first:
        lines.append(f"| frozen backbone, cosine | | {cell(first[:1], 'frozen')} | | | |")
        lines.append(f"| untrained: fitted head, ball | | {cell(results['ours'][:1] or first[:1], 'start')} | | | |")
    for row, found in results.items():
        if found:
            backbone = cell(found, "trained", "backbone").split(" | ")[0]
            seconds = statistics.median(result["seconds"] for result in found)
            tree = "" if row.startswith("labels") else tree_cell(run_dirs[row])  # theirs is the labels themselves
            lines.append(
                f"| {ROWS[row][0]} | {len(found)} | {cell(found, 'trained')} | {tree} | {backbone} | {seconds:.0f} |"
            )
            if row in OWN:
                name, *path = OWN[row]
                lines.append(f"| {name} | {len(found)} | {cell(found, *path)} | | | |")
    lines.append("")
    for row in ROWS:
        typed = ["python", *command(row, args, "S", f"OUT/{row}/seed-S")]
        lines.append(f"* {ROWS[row][0]}: `{shlex.join(typed)}`")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", help="key=value for all rows")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", default=",".join(ROWS), help="comma-separated, default: all")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--article-cuts", default="[98,50,10]", help="numbers of clusters, for the article's setting")
    args = parser.parse_intermixed_args()
    rows = args.rows.split(",")
    if unknown := [row for row in rows if row not in ROWS]:
        parser.error(f"--rows: there is no row {', '.join(unknown)}; there are {', '.join(ROWS)}")
    for seed in args.seeds.split(","):
        for row in rows:
            run_dir = args.out / row / f"seed-{seed}"
            if (run_dir / "result.json").exists():
                continue
            run_dir.parent.mkdir(parents=True, exist_ok=True)
            print(f"{row}, seed {seed}", flush=True)
            with (args.out / row / f"seed-{seed}.log").open("w") as log:
                done = subprocess.run([sys.executable, *command(row, args, seed, run_dir)], stdout=log, stderr=log)
            if done.returncode:
                sys.exit(f"{row}, seed {seed} ended with status {done.returncode}: see {log.name}")
            (args.out / "scoreboard.md").write_text(table(args))
    if args.out.exists():
        (args.out / "scoreboard.md").write_text(table(args))
        print(table(args))


if __name__ == "__main__":
    main()
