"""Where a trained network breaks: accuracy under six stresses at five strengths, and how many behavioural cases fail.

    python benchmarks/stress.py                                # seeds 1, 2 and 3, 1,800 pictures, as the course trains
    python benchmarks/stress.py 1 --pictures 600 --size 48 --epochs 10

Each seed draws its pictures, splits them, trains the small network from scratch, and is stressed on 150 validation pictures and
100 freshly drawn pets. The table shows means over the seeds; in brackets the smallest and the largest. About a minute a seed on
two cores without a GPU.
"""
from __future__ import annotations

import argparse
import os
import platform
import tempfile
import warnings

import pandas as pd

from dlpipe_nb.collection import draw_pets
from dlpipe_nb.preprocessing import make_dls, split
from dlpipe_nb.testing import behaviour, stress
from dlpipe_nb.training import train


def measure(seed, pictures, size, epochs):
    "The two tables of one seed's network."
    with tempfile.TemporaryDirectory() as folder:
        df = split(draw_pets(os.path.join(folder, "pets"), n=pictures, seed=seed), seed=seed)
        learn = train(make_dls(df, size), "small", False, epochs, seed=seed)
        valid = df[df["split"] == "valid"]
        valid = valid.sample(min(150, len(valid)), random_state=seed)
        return stress(learn, valid, seed=seed), behaviour(learn, valid, seed=10_000 + seed)


def spread(values): return f"{values.mean():.2f} ({values.min():.2f}–{values.max():.2f})"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("seeds", nargs="*", type=int, default=[1, 2, 3])
    parser.add_argument("--pictures", type=int, default=1800)
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--epochs", type=int, default=14)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    done = [measure(s, args.pictures, args.size, args.epochs) for s in args.seeds]
    stressed, behaved = (pd.concat(tables) for tables in zip(*done))
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores; {args.pictures} pictures of {args.size} pixels, "
          f"{args.epochs} epochs, seeds {', '.join(map(str, args.seeds))}")
    print("\nAccuracy, by stress and strength; untouched: " + spread(stressed.loc[stressed["kind"] == "none", "accuracy"]))
    damaged = stressed[stressed["kind"] != "none"]
    print(damaged.groupby(["kind", "strength"])["accuracy"].agg(spread).unstack().to_string())
    print("\nShare of cases that fail, by behavioural test")
    print(behaved.groupby(["kind", "test"], sort=False)["rate"].agg(spread).to_string())


if __name__ == "__main__":
    main()
