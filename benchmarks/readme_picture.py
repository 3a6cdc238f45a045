"""The README's picture, made from a finished run: what it learned from, how it did in the test, what it says of new pictures.

    make course && .venv/bin/python benchmarks/readme_picture.py runs/course
"""
from __future__ import annotations

import sys
from pathlib import Path

from matplotlib.figure import Figure

from dlpipe_nb.core import Run, atomic_write, open_picture, picture_array
from dlpipe_nb.inference import Store

ROOT = Path(__file__).resolve().parent.parent
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")


def picture(run: Run, columns: int = 8) -> Figure:
    "Three bands: labelled pictures, the test's verdict, and new pictures with what was said of them."
    df, record, test = run.manifest(), run.read_json("learner/learner.json"), run.read_json("test.json")
    colour = dict(zip(record["labels"], COLOURS))
    train = df[df["split"] == "train"].groupby("label").head(columns // 2).sort_values("sha256")
    store = Store(run / "store.db", images=run / "store" / "images")
    said = store.predictions(limit=columns)[::-1]
    fig = Figure(figsize=(1.35 * columns, 5.1))
    top, middle, bottom = fig.subfigures(3, 1, height_ratios=(2.1, 0.75, 2.1))
    top.suptitle(f"Training: {record['pictures']:,} labelled pictures", fontweight="bold", fontsize=13)
    for ax, path, label in zip(top.subplots(1, columns), train["path"], train["label"]): show(ax, path, label, colour[label])
    middle.text(0.5, 0.68, "Testing: pictures nobody had looked at", ha="center", fontweight="bold", fontsize=13)
    middle.text(0.5, 0.22, test["sentence"].split(" On the same pictures")[0], ha="center", fontsize=12)
    bottom.suptitle("Production: new pictures arrive", fontweight="bold", fontsize=13)
    for ax, (_, p) in zip(bottom.subplots(1, columns), said.iterrows()):
        show(ax, store.picture(p["sha256"]), f"{p['label']} {p['probability']:.0%}" + (" ?" if p["unsure"] else ""), colour[p["label"]])
    for part in (top, bottom): part.subplots_adjust(left=0.01, right=0.99, top=0.72, bottom=0.02, wspace=0.08)
    return fig


def show(ax, path, title, colour):
    "One picture under its title."
    ax.imshow(picture_array(path, 128))
    ax.set_title(title, fontsize=12, color=colour, fontweight="bold")
    ax.set(xticks=[], yticks=[])
    for side in ax.spines.values(): side.set(edgecolor=colour, linewidth=2)


if __name__ == "__main__":
    run = Run(sys.argv[1] if len(sys.argv) > 1 else ROOT / "runs" / "course")
    dest = ROOT / "data" / "pipeline.png"
    with atomic_write(dest) as tmp:
        picture(run).savefig(tmp, dpi=110, facecolor="white")
        open_picture(tmp).quantize(256).save(tmp, optimize=True)
    print(dest.relative_to(ROOT))
