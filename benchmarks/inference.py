"""How fast does a bundle answer, beside the other ways? Same weights, same photo files from disk, by turns in one run.

    python benchmarks/inference.py PHOTOS                  # a folder with a folder a class; a ResNet-18 at 128 px, exported first
    python benchmarks/inference.py PHOTOS --n 300 --rounds 2 # a first reading
    python benchmarks/inference.py --memory                # 100,000 made-up pictures through `classify`: the largest memory

*learn.predict* and *get_preds* are fastai's, on the Learner that was exported; get_preds with 0, 1 and 2 workers, of which the best
counts. *bare onnxruntime* is a loop by hand: two threads decode as we do, the network takes all cores. *ours* is `Predictor` as it
comes; *ours, onnxruntime* without the extra `fast`; *bf16* at reduced precision. Every round asks each contender once, in turn; a
ratio is the median of the rounds' ratios, since on a shared machine only neighbours compare. Times are medians as well.
"""
from __future__ import annotations

import argparse
import io
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from dlpipe_nb.core import picture_array
from dlpipe_nb.inference import Predictor, Rule, Store, append_to, classify

ROOT = Path(__file__).resolve().parent.parent
MEMORY_LIMIT = 500


def prepared(photos, folder, size):
    "A Learner and its bundle, and the Learner's pickle: untrained, since the answers don't matter for the time."
    import pandas as pd
    import torch
    from fastai.vision.all import (CategoryBlock, ColReader, ColSplitter, CrossEntropyLossFlat, DataBlock, ImageBlock, Learner, Normalize,
                                   Resize, imagenet_stats)
    from dlpipe_nb.export import export_bundle
    from dlpipe_nb.training import make_model
    few = photos[:: max(1, len(photos) // 60)][:60]
    df = pd.DataFrame({"path": few, "label": [["cat", "dog"][i % 2] for i in range(len(few))], "valid": [i % 3 == 0 for i in range(len(few))]})
    block = DataBlock((ImageBlock, CategoryBlock), get_x=ColReader("path"), get_y=ColReader("label"), splitter=ColSplitter("valid"),
                      item_tfms=Resize(size), batch_tfms=Normalize.from_stats(*imagenet_stats))
    torch.manual_seed(1)
    learn = Learner(block.dataloaders(df, bs=32, num_workers=0, device="cpu"), make_model("resnet18", 2), loss_func=CrossEntropyLossFlat())
    learn.record = {"size": size, "labels": ["cat", "dog"], "arch": "resnet18", "pretrained": False}
    export_bundle(learn, folder / "bundle", few, facts={"metrics": {}, "card": "for a benchmark"})
    learn.export(folder / "learner.pkl")
    return learn


def bare(bundle, paths, size):
    "The loop that one would write by hand: two threads decode, onnxruntime takes all cores."
    import onnxruntime
    session = onnxruntime.InferenceSession(bundle / "model.onnx", providers=["CPUExecutionProvider"])
    def loop(bs=32):
        items, waiting, said = iter(paths), deque(), []
        with ThreadPoolExecutor(2) as pool:
            while True:
                while len(waiting) < 3 and (batch := [p for _, p in zip(range(bs), items)]):
                    waiting.append([pool.submit(picture_array, p, size) for p in batch])
                if not waiting: return said
                x = np.stack([f.result() for f in waiting.popleft()])
                said.append(session.run(None, {"pictures": x})[0])
    return loop


def timed(f, *args):
    start = time.perf_counter()
    f(*args)
    return time.perf_counter() - start


def rounds(contenders, n):
    "The times of each contender in each of n rounds, in an order that turns; one go before that doesn't count."
    for f in contenders.values(): f()
    seen, names = {k: [] for k in contenders}, list(contenders)
    for i in range(n):
        for k in names[i % len(names):] + names[:i % len(names)]: seen[k].append(timed(contenders[k]))
    return seen


def ratio(seen, theirs, ours): return statistics.median(t / o for t, o in zip(seen[theirs], seen[ours]))


def one_picture(learn, predictors, photos, n, size):
    "Milliseconds for one picture, warm."
    some = photos[:: max(1, len(photos) // 15)][:15]
    def predict_all():
        with learn.no_bar(), learn.no_logging():
            for p in some: learn.predict(p)
    contenders = {"fastai learn.predict": predict_all}
    for name, q in predictors.items(): contenders[name] = lambda q=q: [q.predict(p) for p in some]
    seen = rounds(contenders, n)
    return {k: [1000 * t / len(some) for t in v] for k, v in seen.items()}


def many_pictures(learn, predictors, photos, n, bundle, size):
    "Seconds for all photos."
    def get_preds(workers):
        with learn.no_bar(), learn.no_logging():
            learn.get_preds(dl=learn.dls.test_dl(photos, bs=32, num_workers=workers))
    contenders = {f"fastai get_preds, {w} workers": lambda w=w: get_preds(w) for w in (0, 1, 2)}
    contenders["bare onnxruntime"] = bare(bundle, photos, size)
    for name, q in predictors.items(): contenders[name] = lambda q=q: q.predict_many(photos)
    return rounds(contenders, n)


def first_answer(folder, picture, n):
    "Seconds from the start of a process to its first answer."
    ours = f"from dlpipe_nb.inference import Predictor; print(Predictor({str(folder / 'bundle')!r}).predict({str(picture)!r}).label)"
    plain = ours.replace(").predict", ", engine='onnxruntime').predict")
    theirs = ("import warnings; warnings.simplefilter('ignore'); from fastai.vision.all import *\n"
              f"print(load_learner({str(folder / 'learner.pkl')!r}).predict({str(picture)!r})[0])")
    def starts(code):
        def go():
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
            assert done.returncode == 0, done.stderr[-600:]
        return go
    return rounds({"fastai load_learner, predict": starts(theirs), "ours": starts(ours), "ours, onnxruntime": starts(plain)}, n)


def agreement(predictors, photos):
    "The largest difference of a probability from onnxruntime's at full precision, and how many labels differ."
    want = predictors["ours, onnxruntime"].predict_many(photos)
    for name, q in predictors.items():
        got = q.predict_many(photos)
        gap = max(abs(a.probabilities[k] - b.probabilities[k]) for a, b in zip(want, got) for k in a.probabilities)
        yield f"{name:22} ({q.engine}): largest difference {gap:.1e}, {sum(a.label != b.label for a, b in zip(want, got))} labels differ of {len(got)}"


def line(what, seen, theirs, ours, bar, unit):
    t, o = (statistics.median(seen[k]) for k in (theirs, ours))
    print(f"{what:28} {theirs:30} {unit(t):>12}   {ours:18} {unit(o):>12}   {ratio(seen, theirs, ours):6.2f} times (bar: {bar})", flush=True)


def speed(a):
    photos = [str(p) for p in sorted(a.photos.rglob("*")) if p.suffix.lower() in (".jpg", ".jpeg", ".png")]
    photos = photos[:: max(1, len(photos) // a.n)][: a.n]
    if len(photos) < 20: raise SystemExit(f"Expected at least 20 photos in {a.photos}; found {len(photos)}. Next: name another folder.")
    folder = Path(tempfile.mkdtemp())
    learn = prepared(photos, folder, a.size)
    predictors = {"ours": Predictor(folder / "bundle"), "ours, onnxruntime": Predictor(folder / "bundle", engine="onnxruntime")}
    try: predictors["ours, bf16"] = Predictor(folder / "bundle", precision="bf16")
    except ValueError as e: print(f"no bf16: {e}")
    print(f"{platform.processor() or platform.machine()}, {predictors['ours'].threads} cores, Python {platform.python_version()}, "
          f"{len(photos)} photos at {a.size} px, {a.rounds} rounds; engine {predictors['ours'].engine}")
    for text in agreement(predictors, photos[:200]): print(text)
    seen = one_picture(learn, predictors, photos, a.rounds, a.size)
    for k in predictors: line("one picture, warm", seen, "fastai learn.predict", k, 4, lambda t: f"{t:.1f} ms")
    seen = many_pictures(learn, predictors, photos, a.rounds, folder / "bundle", a.size)
    rate = lambda t: f"{len(photos) / t:.0f}/s"
    best = min((k for k in seen if "get_preds" in k), key=lambda k: statistics.median(seen[k]))
    for k in predictors:
        line(f"{len(photos)} photos", seen, best, k, 4 if "bf16" in k else 2.2, rate)
        line(f"{len(photos)} photos", seen, "bare onnxruntime", k, 1.5 if "bf16" in k else 0.95, rate)
    seen = first_answer(folder, photos[0], max(3, a.rounds))
    for k in ("ours", "ours, onnxruntime"): line("start to first answer", seen, "fastai load_learner, predict", k, 20, lambda t: f"{t:.2f} s")


def rss():
    "The memory of this process, in MB."
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 1e6


def memory(a):
    "Send made-up pictures through a store, with an action for one in a hundred, and say how much memory it took at most."
    sys.path.insert(0, str(ROOT / "tests"))
    from conftest import write_tiny_bundle
    seen, folder = [], Path(tempfile.mkdtemp())
    pixels = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)
    def camera():
        for i in range(a.pictures):
            pixels[0, 0] = i % 256, i // 256 % 256, i // 65536
            Image.fromarray(pixels).save(out := io.BytesIO(), "BMP")
            if i % 1000 == 0: seen.append(rss())
            yield f"{i}", out.getvalue()
    store, rule = Store(folder / "store.db"), Rule("hundredth", lambda p: p.name.endswith("00"), append_to(folder / "list.jsonl"))
    start = time.perf_counter()
    report = classify(camera(), Predictor(write_tiny_bundle(folder / "bundle")), store, actions=[rule])
    seconds = time.perf_counter() - start
    print(f"{report.new:,} pictures in {seconds:.0f} s; memory {seen[1]:.0f} MB after 1,000, {max(seen):.0f} MB at most, {rss():.0f} MB at the end; "
          f"{store.n:,} records, {report.acted:,} actions (bar: under {MEMORY_LIMIT} MB)")
    if max(seen) > MEMORY_LIMIT or store.n != a.pictures: raise SystemExit(1)


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("photos", nargs="?", type=Path, help="a folder of photographs")
    p.add_argument("--n", type=int, default=1000, help="how many photos")
    p.add_argument("--size", type=int, default=128)
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--memory", action="store_true")
    p.add_argument("--pictures", type=int, default=100_000, help="for --memory")
    a = p.parse_args()
    warnings.simplefilter("ignore")
    if a.memory: memory(a)
    elif a.photos: speed(a)
    else: p.error("name a folder of photos, or --memory")
