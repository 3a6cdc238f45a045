"""Which network: its size, the time to train it, the time of a prediction and its accuracy, each trained from scratch.

    python benchmarks/networks.py                       # five networks, one seed: several minutes on two cores, no GPU
    python benchmarks/networks.py --archs small resnet18 --seeds 1 2 3 --epochs 14 --size 96

Prints the table as chapter 05 quotes it. The pets are drawn and split as `dlpipe run` does; accuracy is on the validation split.
No pretrained weights: those of other people's networks need a network to fetch, and would be another question.
"""
from __future__ import annotations

import argparse
import os
import tempfile
import warnings
from pathlib import Path

warnings.filterwarnings("ignore")

from dlpipe_nb.collection import draw_pets  # noqa: E402
from dlpipe_nb.preprocessing import make_dls, split  # noqa: E402
from dlpipe_nb.training import compare_networks  # noqa: E402

ROUNDED = {"train_seconds": 1, "predict_ms": 2, "accuracy": 3}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--archs", nargs="+", default=["small12", "small", "small48", "mobilenet_v3_small", "resnet18"])
    p.add_argument("--seeds", type=int, nargs="+", default=[1])
    p.add_argument("--size", type=int, default=64, help="side of the pictures in pixels")
    p.add_argument("--epochs", type=int, help="by default what `train` does")
    a = p.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        df = split(draw_pets(Path(folder) / "pets", n=1800, seed=1))
        table = compare_networks(make_dls(df, a.size), tuple(a.archs), a.epochs, tuple(a.seeds)).round(ROUNDED)
    print(f"{os.cpu_count()} cores, no GPU; {a.size} pixels, judged on {(df['split'] == 'valid').sum()} pictures\n")
    print(table.to_string(index=False), "\n")
    for name in table.columns: print(f"    {name}={table[name].tolist()},")


if __name__ == "__main__": main()
