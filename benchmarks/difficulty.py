"""How hard are the drawn pets? Pixels, hand-made features and the default network on the same sealed test.

    python benchmarks/difficulty.py                # seed 1, 1,800 pictures of 96 pixels
    python benchmarks/difficulty.py 1 2 3          # several seeds, each drawn into data/drawn-1800-seed<seed>
    python benchmarks/difficulty.py --no-network   # only the two baselines, in a few seconds

What issue and design ask for: logistic regression on raw 32×32 pixels at most 0.75; hand-made features clearly better;
the network, trained from scratch, at least 0.93 in at most 90 seconds on two cores, and at least 0.05 above hand-made features.
"""
from __future__ import annotations

import argparse
import os
import platform
import time
import warnings
from pathlib import Path

from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from dlpipe_nb.collection import draw_pets
from dlpipe_nb.preprocessing import make_dls, split

ROOT = Path(__file__).resolve().parent.parent


def logistic(X, df):
    "Test accuracy of logistic regression on features `X`, its strength chosen on the validation split."
    y, part = df["label"].to_numpy(), df["split"].to_numpy()
    best = None
    for C in (1e-4, 1e-3, 1e-2):
        model = make_pipeline(StandardScaler(), LogisticRegression(C=C, max_iter=500)).fit(X[part == "train"], y[part == "train"])
        score = model.score(X[part == "valid"], y[part == "valid"])
        if best is None or score > best[0]: best = score, model
    return best[1].score(X[part == "test"], y[part == "test"])


def network(df, seed):
    "Test accuracy and training seconds of the default network without pretrained weights."
    import torch
    from dlpipe_nb.core import set_seed
    from dlpipe_nb.training import predict_frame, train
    set_seed(seed)
    dls = make_dls(df, 96, 64, ("cat", "dog"), device=torch.device("cpu"))
    began = time.perf_counter()
    learn = train(dls, arch="small", pretrained=False, seed=seed, device="cpu")
    seconds = time.perf_counter() - began
    return predict_frame(learn, df[df["split"] == "test"])["correct"].mean(), seconds


def measure(seed, n, data, with_network):
    "One seed: rows of (what, accuracy, seconds)."
    from dlpipe_nb.features import hand_features, pixel_features
    began = time.perf_counter()
    df = draw_pets(data / f"drawn-{n}-seed{seed}", n=n, seed=seed)
    drawn = time.perf_counter() - began
    df = split(df, seed=seed)
    rows = [("drawing (or reusing)", None, drawn)]
    for name, features in (("pixels 32×32", pixel_features), ("hand-made features", hand_features)):
        began = time.perf_counter()
        rows.append((name, logistic(features(df), df), time.perf_counter() - began))
    if with_network: rows.append(("network from scratch", *network(df, seed)))
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("seeds", nargs="*", type=int, default=[1])
    parser.add_argument("-n", type=int, default=1800, help="pictures to draw")
    parser.add_argument("--data", type=Path, default=ROOT / "data", help="where pictures are drawn")
    parser.add_argument("--no-network", action="store_true")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores; accuracy on the {args.n*20//100} test pictures")
    print(f"{'seed':>4}  {'':22} {'accuracy':>8} {'seconds':>8}")
    for seed in args.seeds:
        for name, accuracy, seconds in measure(seed, args.n, args.data, not args.no_network):
            print(f"{seed:>4}  {name:22} {'' if accuracy is None else format(accuracy, '.3f'):>8} {seconds:>8.1f}", flush=True)


if __name__ == "__main__":
    main()
