"""What few labels buy: hand-made features, embeddings carried over from other tasks, fine-tuning, and training from scratch.

    python benchmarks/label_efficiency.py            # seed 1: three to five minutes on two cores, no GPU
    python benchmarks/label_efficiency.py 1 2        # two seeds: other pets, other draws of labels, other first weights
    python benchmarks/label_efficiency.py 1 --others 2000 --steps 300 --draws 1    # as small as what chapter 04 does live

Two networks are first taught something else on OTHER drawn pets, whose label nobody looks at: the coat's pattern; or coat, pose
and mouth at once. Then each method learns cat or dog from 20, 100 and 500 labels out of the train split, and is judged on the
validation split. Which pictures are labelled is drawn several times; the draws are the same for all methods.
"""
from __future__ import annotations

import argparse
import os
import platform
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from dlpipe_nb.collection import draw_pets
from dlpipe_nb.core import set_seed
from dlpipe_nb.features import (embed, fit_network, hand_features, label_efficiency, linear_method, network_method, new_head,
                                tiny_net)
from dlpipe_nb.preprocessing import split, squares

ROOT = Path(__file__).resolve().parent.parent
TASKS = {"coat": ["pattern"], "coat, pose, mouth": ["pattern", "pose", "mouth"]}
SIZE = 64


def taught(others, pictures, columns, steps, seed):
    "A network that has learned to name these columns of the other pets."
    targets = np.stack([others[c].astype("category").cat.codes for c in columns], axis=1)
    set_seed(seed)
    return fit_network(tiny_net(int((targets.max(axis=0) + 1).sum())), pictures, targets, steps=steps, seed=seed)


def named_right(net, others, pictures, truth):
    "How often the network names the coat's pattern of new pictures."
    from dlpipe_nb.features import _batch
    names = np.array(sorted(others["pattern"].unique()))
    with torch.inference_mode(): said = net(_batch(pictures, net))[:, :len(names)].argmax(dim=1).numpy()
    return (names[said] == truth.to_numpy()).mean()


def measure(seed, args):
    "One seed: the table of all tries."
    df = split(draw_pets(args.data / f"drawn-{args.n}-seed{seed}", n=args.n, seed=seed), seed=seed)
    others = draw_pets(args.data / f"drawn-{args.others}-seed{98 + seed}", n=args.others, seed=98 + seed, size=SIZE)
    train, valid = (df[df["split"] == s].reset_index(drop=True) for s in ("train", "valid"))
    y, y_valid, pictures = train["label"], valid["label"], squares(others["path"].tolist(), SIZE)
    small, small_valid = (squares(part["path"].tolist(), SIZE) for part in (train, valid))
    methods = {"hand-made, linear": linear_method(hand_features(train), y, hand_features(valid), y_valid),
               "from scratch": network_method(lambda: tiny_net(y.nunique()), small, y, small_valid, y_valid)}
    for task, columns in TASKS.items():
        net = taught(others, pictures, columns, args.steps, seed)
        print(f"seed {seed}: a network taught {task}: pattern right on {named_right(net, others, small_valid, valid['pattern']):.0%} "
              "of the validation pictures", flush=True)
        E, V = (embed(part, net, size=SIZE) for part in (train, valid))
        methods[f"{task}: frozen, linear"] = linear_method(E, y, V, y_valid)
        methods[f"{task}: fine-tuned"] = network_method(lambda net=net: new_head(net, y.nunique()), small, y, small_valid,
                                                        y_valid, lr=2e-3)
    return label_efficiency(methods, y, draws=args.draws).assign(seed=seed)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("seeds", nargs="*", type=int, default=[1])
    parser.add_argument("-n", type=int, default=1800, help="pets to draw for cat or dog")
    parser.add_argument("--others", type=int, default=6000, help="other pets, for the first task")
    parser.add_argument("--steps", type=int, default=2500, help="batches of the first task")
    parser.add_argument("--draws", type=int, default=3, help="how often other pictures are labelled")
    parser.add_argument("--data", type=Path, default=ROOT / "data", help="where pictures are drawn")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    began = time.perf_counter()
    tries = pd.concat([measure(seed, args) for seed in args.seeds], ignore_index=True)
    each = tries.groupby(["method", "labels"], sort=False)["accuracy"]
    cells = each.agg(lambda a: f"{a.mean():.2f} ({a.min():.2f}–{a.max():.2f})").unstack("labels")
    print(f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {time.perf_counter() - began:.0f} s; "
          f"right on validation: mean of {args.draws * len(args.seeds)} tries (worst–best)")
    print(cells.to_string())


if __name__ == "__main__":
    main()
