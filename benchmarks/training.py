"""How fast is `train`? The same network, pictures, size, epochs and batches, three ways, by turns in one run.

    python benchmarks/training.py                                  # the drawn pets, seeds 1 2 3
    python benchmarks/training.py --data FOLDER --arch resnet18 --size 128 --epochs 3
    python benchmarks/training.py --whole                          # also from nothing to a tested model, against plain fastai

*fastai* is what its documentation begins with: `ImageDataLoaders` on the files, `Learner.fit_one_cycle`, fp32. *ours* is `make_dls` and
`train`, the reading of the pictures and the choice of a precision included. *torch* is a loop written by hand, with our batches and
our precision: what is lost to fastai's callbacks. Pictures per second count training and validation pictures of all epochs.
"""
from __future__ import annotations

import argparse
import contextlib
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from fastai.vision.all import (CrossEntropyLossFlat, ImageDataLoaders, Learner, Normalize, Resize, accuracy, aug_transforms,
                               imagenet_stats)

from dlpipe_nb.collection import collect, draw_pets
from dlpipe_nb.core import set_seed
from dlpipe_nb.preprocessing import make_dls, split
from dlpipe_nb.training import best_device, choose_hardware, make_model, train

ROOT = Path(__file__).resolve().parent.parent
AUGMENT = dict(max_rotate=15, max_zoom=1.15, max_warp=0.1, max_lighting=0.3)


def by_fastai(df, a, lr, seed):
    "Plain fastai on the files; gives the validation accuracy."
    rows = df.assign(path=[str(Path(p).absolute()) for p in df["path"]], is_valid=df["split"] == "valid")
    dls = ImageDataLoaders.from_df(rows, path="/", fn_col="path", label_col="label", valid_col="is_valid", bs=a.bs,
                                   item_tfms=Resize(a.size), batch_tfms=[*aug_transforms(**AUGMENT), Normalize.from_stats(*imagenet_stats)])
    learn = Learner(dls, make_model(a.arch, len(dls.vocab)), loss_func=CrossEntropyLossFlat(), metrics=accuracy, wd=0.05)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(a.epochs, lr)
    return float(learn.recorder.values[-1][-1])


def by_us(df, a, lr, seed):
    "make_dls and train; gives the validation accuracy."
    learn = train(make_dls(df, a.size, a.bs), arch=a.arch, pretrained=False, epochs=a.epochs, lr=lr, seed=seed, precision=a.precision)
    return learn.record["valid_accuracy"]


def by_hand(df, a, lr, seed):
    "A loop in plain torch with our batches and precision; gives the validation accuracy."
    dls, net = make_dls(df, a.size, a.bs), make_model(a.arch, df["label"].nunique())
    hw = choose_hardware(net, a.size, a.precision)
    dev, half = torch.device(hw.device), {"bf16": torch.bfloat16, "fp16": torch.float16}.get(hw.precision)
    form = torch.channels_last if half else torch.contiguous_format
    net, dls = net.to(dev, memory_format=form), dls.to(dev)
    opt = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=0.05, eps=1e-5, betas=(0.9, 0.99))
    plan = torch.optim.lr_scheduler.OneCycleLR(opt, lr, total_steps=a.epochs * len(dls.train), pct_start=0.25, div_factor=25, final_div_factor=4000)
    scaler = torch.amp.GradScaler(dev.type, enabled=half is torch.float16)
    cast = lambda: torch.autocast(dev.type, half) if half else contextlib.nullcontext()
    for _ in range(a.epochs):
        net.train()
        for xb, yb in dls.train:
            with cast(): out = net(xb.as_subclass(torch.Tensor).contiguous(memory_format=form))
            scaler.scale(torch.nn.functional.cross_entropy(out.float(), yb.as_subclass(torch.Tensor))).backward()
            scaler.step(opt)
            scaler.update()
            opt.zero_grad()
            plan.step()
        net.eval()
        right = []
        with torch.inference_mode(), cast():
            for xb, yb in dls.valid:
                right += (net(xb.as_subclass(torch.Tensor).contiguous(memory_format=form)).argmax(1) == yb).tolist()
    return float(np.mean(right))


WAYS = {"fastai": by_fastai, "ours": by_us, "torch": by_hand}

PLAIN = """
import sys, time
from pathlib import Path
from fastai.vision.all import *
from dlpipe_nb.training import make_model
set_seed(1)
folder, size, epochs, lr = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
dls = ImageDataLoaders.from_folder(folder, train="train", valid="valid", item_tfms=Resize(size), batch_tfms=[*aug_transforms(), Normalize.from_stats(*imagenet_stats)])
learn = Learner(dls, make_model("small", 2), loss_func=CrossEntropyLossFlat(), metrics=accuracy, wd=0.05)
with learn.no_bar(), learn.no_logging():
    learn.fit_one_cycle(epochs, lr)
    files = get_image_files(folder / "test")
    said = learn.get_preds(dl=dls.test_dl(files))[0].argmax(1)
print(float(np.mean([dls.vocab[i] == f.parent.name for i, f in zip(said, files)])))
"""


def whole(epochs, lr):
    "Seconds and test accuracy from the start of the process: `dlpipe run`, and fastai's defaults on the same split files."
    with tempfile.TemporaryDirectory() as tmp:
        df = split(draw_pets(Path(tmp) / "drawn", n=1800, seed=1), seed=1)
        for i, row in df.iterrows():
            to = Path(tmp) / "folders" / row["split"] / row["label"] / f"{i}.jpg"
            to.parent.mkdir(parents=True, exist_ok=True)
            to.write_bytes(Path(row["path"]).read_bytes())
        for name, command in {
            "fastai's defaults": [sys.executable, "-W", "ignore", "-c", PLAIN, f"{tmp}/folders", "96", f"{epochs}", f"{lr}"],
            "dlpipe run": [sys.executable, "-c", "from dlpipe_nb.pipeline import main; main()", "run", "--data", f"{tmp}/drawn", "--out", f"{tmp}/run", "--epochs", f"{epochs}"],
        }.items():
            began = time.perf_counter()
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            seconds = time.perf_counter() - began
            told = done.stdout.strip().splitlines()
            print(f"{name:18} {seconds:6.1f} s  {next((l for l in told if l.startswith('testing')), told[-1]).strip()[:110]}", flush=True)


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("seeds", nargs="*", type=int, default=[1, 2, 3])
    p.add_argument("--data", default="drawn", help="drawn, or a folder of labelled pictures")
    p.add_argument("--arch", default="small")
    p.add_argument("--size", type=int, default=96)
    p.add_argument("--epochs", type=int, default=14)
    p.add_argument("--bs", type=int, default=64)
    p.add_argument("--lr", type=float, default=4e-3)
    p.add_argument("--precision", default="auto")
    p.add_argument("--whole", action="store_true", help="also time a whole run")
    a = p.parse_intermixed_args()
    warnings.filterwarnings("ignore")
    df = draw_pets(ROOT / "data" / "drawn-1800-seed1", n=1800, seed=1) if a.data == "drawn" else collect(a.data).manifest
    df = split(df, seed=1)
    df = df[df["split"] != "test"].reset_index(drop=True)
    hw = choose_hardware(make_model(a.arch, 2), a.size, a.precision)
    print(f"{len(df):,} pictures, {a.arch} at {a.size} px, {a.epochs} epochs, batches of {a.bs}; {best_device()}, {hw}, {platform.machine()}, torch {torch.__version__}")
    rows = []
    for seed in a.seeds:
        for way, work in WAYS.items():
            set_seed(seed)
            lr = a.lr * min(a.bs, int((df["split"] == "train").sum()) // 16) / 64
            began = time.perf_counter()
            right = work(df, a, lr, seed)
            seconds = time.perf_counter() - began
            rows.append(dict(way=way, seed=seed, seconds=seconds, pictures_per_second=len(df) * a.epochs / seconds, accuracy=right))
            print(f"  seed {seed} {way:7} {seconds:6.1f} s {rows[-1]['pictures_per_second']:7.0f} pictures/s, {right:.3f} right", flush=True)
    table = pd.DataFrame(rows).groupby("way", sort=False).agg(seconds=("seconds", "median"), pictures_per_second=("pictures_per_second", "median"),
                                                               accuracy=("accuracy", "mean"), standard_error=("accuracy", "sem"))
    print(table.round(3).to_string())
    speed = pd.DataFrame(rows).pivot(index="seed", columns="way", values="pictures_per_second")
    for other in ("fastai", "torch"):
        ratios = (speed["ours"] / speed[other]).sort_values()
        print(f"ours / {other}: {ratios.median():.2f} ({ratios.iloc[0]:.2f} to {ratios.iloc[-1]:.2f})")
    if a.whole: whole(a.epochs, a.lr)


if __name__ == "__main__": main()
