"""Wrong labels planted in drawn pets: how many are found among the top-ranked 7 %, and what mending them is worth.

    python benchmarks/label_errors.py                 # seeds 1 to 5
    python benchmarks/label_errors.py --train 1 2 3   # and train before and after, judged on 600 new pets

Each seed draws 1,800 pets of which 90 (5 %) are filed under the other animal. `out_of_sample` and `label_errors` rank them; a person
who knows the truth looks at the first 126 (7 %) and changes what is wrong. About half a minute a seed on two cores without a GPU, and
a few minutes more with --train.
"""
from __future__ import annotations

import argparse
import os
import platform
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd

from dlpipe_nb.collection import draw_pets
from dlpipe_nb.evaluation import label_errors, out_of_sample

OTHER = {"cat": "dog", "dog": "cat"}


def planted(folder, n, seed):
    "The manifest, and the true labels."
    df = draw_pets(folder, n, seed=100 + seed, size=96, faults={"wrong_label": n // 20})
    key = set(pd.read_csv(folder / "faults_key.csv")["path"])
    wrong = df["path"].map(lambda p: "/".join(Path(p).parts[-2:]) in key)
    return df, df["label"].where(~wrong, df["label"].map(OTHER))


def accuracy(df, judge, seed, size=48):
    "Of the small network trained on `df`, measured on `judge`."
    from dlpipe_nb.training import make_dls, train
    both = pd.concat([df.assign(split="train"), judge.assign(split="valid")])
    learn = train(make_dls(both, size, labels=("cat", "dog")), "small", False, seed=seed)
    return learn.record["valid_accuracy"]


def measure(seed, n, with_training):
    "One row of the table."
    with tempfile.TemporaryDirectory() as folder:
        df, truth = planted(Path(folder) / "pets", n, seed)
        began = time.perf_counter()
        errors = label_errors(out_of_sample(df, seed=seed))
        seconds = time.perf_counter() - began
        first = df["path"].isin(errors["path"].head(round(.07 * n)))
        wrong, flagged = df["label"] != truth, df["path"].isin(errors["path"][errors["flagged"]])
        row = {"seed": seed, "found in 7 %": (wrong & first).sum() / wrong.sum(), "flagged": int(flagged.sum()),
               "of them wrong": (wrong & flagged).sum() / max(1, flagged.sum()), "seconds": round(seconds, 1)}
        if not with_training: return row
        judge = draw_pets(Path(folder) / "judge", 600, seed=900 + seed, size=96)
        mended = df.assign(label=np.where(first, truth, df["label"]))
        labels = {"as planted": df, "relabelled": mended, "all true": df.assign(label=truth)}
        return row | {name: accuracy(d, judge, seed) for name, d in labels.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("seeds", nargs="*", type=int, default=[1, 2, 3, 4, 5])
    parser.add_argument("--n", type=int, default=1800, help="pictures")
    parser.add_argument("--train", action="store_true", help="train before and after, too")
    a = parser.parse_args()
    warnings.filterwarnings("ignore")
    rows = []
    for seed in a.seeds:
        rows.append(measure(seed, a.n, a.train))
        print(pd.DataFrame(rows[-1:]).round(3).to_string(index=False, header=seed == a.seeds[0]), flush=True)
    print(f"\nmeans over {len(rows)} seeds:\n{pd.DataFrame(rows).drop(columns='seed').mean().round(3).to_string()}")
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")


if __name__ == "__main__": main()
