"""What labels buy: accuracy of the small network, trained from scratch, against the number of labelled pictures.

    python benchmarks/learning_curve.py                    # 5 sizes, 3 seeds: some minutes on two cores, no GPU
    python benchmarks/learning_curve.py --seeds 1 --sizes 100 400

Prints the table as chapter 05 quotes it. The pets are drawn and split as `dlpipe run` does; each training is judged on the
validation split, by `dlpipe_nb.training.learning_curve`. Every seed draws its own pictures, smaller sets being part of larger ones.
"""
from __future__ import annotations

import argparse
import os
import tempfile
import warnings
from pathlib import Path

warnings.filterwarnings("ignore")

from dlpipe_nb.collection import draw_pets  # noqa: E402
from dlpipe_nb.preprocessing import split  # noqa: E402
from dlpipe_nb.training import labels_for, learning_curve  # noqa: E402


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--sizes", type=int, nargs="+", default=[60, 125, 250, 500, 1000])
    p.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    p.add_argument("--size", type=int, default=64, help="side of the pictures in pixels")
    p.add_argument("--epochs", type=int, help="by default what `train` does")
    a = p.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        df = split(draw_pets(Path(folder) / "pets", n=1800, seed=1))
        table = learning_curve(df, tuple(a.sizes), tuple(a.seeds), a.size, epochs=a.epochs)
    print(f"{os.cpu_count()} cores, no GPU; {a.size} pixels, judged on {(df['split'] == 'valid').sum()} pictures\n")
    print(table.groupby("pictures").agg({"accuracy": ["mean", "std"], "seconds": "mean"}).round(3).to_string(), "\n")
    for name in ("pictures", "seed", "accuracy"):
        values = table[name].round(3).tolist() if name == "accuracy" else table[name].tolist()
        print(f"    {name}={values},")
    print(f"\n95 % would take about {labels_for(table, 0.95):,.0f} pictures")


if __name__ == "__main__": main()
