"""Learner and bundle give the same answers on picture files, and the bundle needs none of the workshop to do so."""
from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from dlpipe_nb.core import InputError
from dlpipe_nb.export import export_bundle, parity
from dlpipe_nb.inference import Predictor
from dlpipe_nb.training import load_learner

SAVES = (("jpg", "RGB", {"quality": 90}), ("jpg", "CMYK", {"quality": 85}), ("jpg", "L", {"quality": 60}), ("png", "RGB", {}), ("png", "RGBA", {}),
         ("png", "P", {}), ("png", "LA", {}), ("png", "I;16", {}), ("webp", "RGB", {"quality": 80}), ("bmp", "RGB", {}), ("gif", "P", {}),
         ("tiff", "RGB", {}), ("tiff", "CMYK", {}))
SIDES = ((17, 23), (64, 64), (96, 96), (128, 300), (333, 200), (640, 480), (1200, 900), (2000, 700))


def mixed_files(sources, folder: Path, n=200):
    "`n` files made of the source pictures: every format and mode, many sizes, every EXIF turn."
    plans = itertools.islice(zip(itertools.cycle(SAVES), itertools.cycle(SIDES[::-1] + SIDES[2:5]), itertools.cycle(range(1, 9)), itertools.cycle(sources)), n)
    for i, ((suffix, mode, options), side, turn, source) in enumerate(plans):
        im = Image.open(source).convert("RGB").resize(side)
        if mode == "I;16": im = Image.fromarray(np.asarray(im.convert("L")).astype(np.uint16) * 257)
        elif mode == "P": im = im.quantize(64)
        elif mode in ("RGBA", "LA"): im.putalpha(im.convert("L")), (im := im.convert(mode))
        else: im = im.convert(mode)
        if suffix in ("jpg", "png", "webp", "tiff") and mode != "I;16":
            exif = Image.Exif()
            exif[0x0112] = turn
            options = options | {"exif": exif}
        im.save(folder / f"{i:03} {mode.replace(';', '')}.{suffix}", **options)
    return sorted(folder.iterdir())


def photos():
    "Real photographs, where the environment variable DLPIPE_PHOTOS or a folder beside the repository has some."
    folder = Path(os.environ.get("DLPIPE_PHOTOS", ROOT.parent / "shared" / "photos"))
    return sorted(folder.rglob("*.jpg"))[::40][:40] if folder.is_dir() else []


def test_learner_and_bundle_agree_on_200_mixed_files(small_run, tmp_path):
    drawn = list(small_run.manifest().path[:40])
    sources = [x for pair in zip(drawn, photos()) for x in pair] or drawn
    files = mixed_files(sources, tmp_path)
    assert len(files) == 200 and {f.suffix for f in files} == {".jpg", ".png", ".webp", ".bmp", ".gif", ".tiff"}
    gap = parity(load_learner(small_run / "learner"), Predictor(small_run / "bundle"), files)
    print(f"largest difference on {len(gap)} files: {gap.difference[0]:.1e}")
    assert gap.difference[0] <= 1e-4, gap.head(3)


def test_learner_and_bundle_agree_on_photographs(small_run):
    if not photos(): pytest.skip("no photographs here: name a folder of them in DLPIPE_PHOTOS")
    gap = parity(load_learner(small_run / "learner"), Predictor(small_run / "bundle"), photos())
    assert gap.difference[0] <= 1e-4, gap.head(3)


def test_a_disagreement_refuses_the_export(small_run, tmp_path):
    learn, paths = load_learner(small_run / "learner"), small_run.manifest().path[:8]
    with pytest.raises(InputError, match="agree within"): export_bundle(learn, tmp_path / "bundle", paths, facts={"temperature": 3.0})
    assert not list(tmp_path.iterdir())


def test_inference_starts_in_a_tenth_of_the_time_of_load_learner(small_run, tmp_path):
    "From process start to first answer, ours and fastai's by turns; the best of three each."
    learn = load_learner(small_run / "learner")
    picture = str(small_run.manifest().path[0])
    from dlpipe_nb.preprocessing import make_dls
    learn.dls = make_dls(small_run.manifest().groupby(["split", "label"]).head(8), learn.record["size"], device="cpu")
    learn.model.cpu()
    learn.export(tmp_path / "learner.pkl")
    ours = f"from dlpipe_nb.inference import Predictor; print(Predictor({str(small_run / 'bundle')!r}).predict({picture!r}).label)"
    theirs = ("import torch, warnings; warnings.simplefilter('ignore'); from fastai.learner import load_learner\n"
              f"learn = load_learner({str(tmp_path / 'learner.pkl')!r})\n"
              f"dl = learn.dls.test_dl([{picture!r}])\nprint(learn.get_preds(dl=dl)[0])")
    best = {}
    for _ in range(3):
        for name, code in (("ours", ours), ("theirs", theirs)):
            start = time.perf_counter()
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=os.getcwd(),
                                  env=os.environ | {"PYTHONPATH": str(ROOT)})
            assert done.returncode == 0 and done.stdout.strip(), done.stderr[-800:]
            best[name] = min(best.get(name, 1e9), time.perf_counter() - start)
    print(f"{best['ours']:.2f} s and {best['theirs']:.2f} s: {best['theirs'] / best['ours']:.1f} times")
    assert best["ours"] * 10 <= best["theirs"], best


def test_importtime_shows_neither_torch_nor_fastai():
    done = subprocess.run([sys.executable, "-X", "importtime", "-c", "import dlpipe_nb.inference"], capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})
    loaded = {line.rsplit("|", 1)[-1].strip().split(".")[0] for line in done.stderr.splitlines() if "|" in line}
    assert done.returncode == 0 and "dlpipe_nb" in loaded and not loaded & {"torch", "fastai", "torchvision", "pandas", "sqlalchemy"}
