"""Each kind of bad input, through the function and through the command: one readable line, and everything left as it was."""
from __future__ import annotations

import io
import json
import os
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from command import dlpipe, refused
from conftest import BLUE, RED, picture, sideways, write_tiny_bundle
from PIL import Image

from dlpipe_nb.collection import collect
from dlpipe_nb.core import InputError, PictureError, Run, open_picture, picture_array
from dlpipe_nb.inference import BundleError, Predictor, Store
from dlpipe_nb.pipeline import run_pipeline
from dlpipe_nb.preprocessing import clean, split

AWKWARD = ("a name with spaces.png", "it's \"quoted\".png", "кошка.png", "猫.png", "#50% & more;.png", "-dash.png")


def fill(folder: Path, n=12, classes=("cat", "dog"), size=(40, 32)):
    "A folder a class with n different pictures in each."
    rng = np.random.default_rng(0)
    for k, name in enumerate(classes):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(n):
            a = rng.integers(0, 120, (*size[::-1], 3), dtype=np.uint8)
            a[..., 2 * (k % 2)] += 120
            Image.fromarray(a).save(folder / name / f"{i:03}.png")
    return folder


def listing(folder: Path): return sorted((p.as_posix(), p.stat().st_size) for p in folder.rglob("*"))


def claims(width, height) -> bytes:
    "A PNG of a few bytes whose header claims many pixels."
    def chunk(kind, data): return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


def empty(folder): folder.mkdir()
def one_class(folder): fill(folder, classes=("cat",))
def too_few(folder): fill(folder, n=3)
def no_pictures(folder):
    for name in ("cat", "dog"): (folder / name).mkdir(parents=True), (folder / name / "notes.txt").write_text("no picture")
def none_there(folder): pass


# ---- sources that can't be used: refused before anything is made

@pytest.mark.parametrize("make, says", [(none_there, "no such path"), (empty, "no files"), (one_class, "only one class"),
                                        (too_few, "at least"), (no_pictures, "no picture among them")])
def test_unusable_sources_are_refused_and_leave_nothing(tmp_path, make, says):
    source, out = tmp_path / "pictures", tmp_path / "runs" / "mine"
    make(source)
    before = listing(tmp_path)
    with pytest.raises(InputError, match=says): run_pipeline(source, out, pretrained=False)
    assert not out.exists()
    assert says in refused(dlpipe("run", "--data", source, "--out", out))
    assert not out.exists() and listing(source) == [x for x in before if x[0] != source.as_posix()]


def test_a_csv_without_the_columns_or_with_vanished_files_is_refused(tmp_path):
    (tmp_path / "a.csv").write_text("path\ncat.png\n")
    (tmp_path / "b.csv").write_text("path,label\nmissing.png,cat\n")
    for name, says in (("a.csv", "only path"), ("b.csv", "missing.png")):
        with pytest.raises(InputError, match=says): collect(tmp_path / name)
        assert says in refused(dlpipe("run", "--data", tmp_path / name, "--out", tmp_path / "out"))
        assert not (tmp_path / "out").exists()


def test_settings_that_make_no_sense_are_refused(tmp_path):
    for args in (["--pretrained", "maybe"], ["--target", "1.5"], ["--n", "-3"]):
        refused(dlpipe("run", "--out", tmp_path / "out", *args))
        assert not (tmp_path / "out").exists(), args
    assert dlpipe("run", "--n", "many").returncode == 2


# ---- files in a source that are no good: skipped or left out, listed and counted; the others are used

def test_files_that_are_no_pictures_are_skipped_listed_and_counted(tmp_path):
    folder = fill(tmp_path / "pictures")
    (folder / "cat" / "notes.txt").write_text("not a picture")
    (folder / "cat" / "zero.png").write_bytes(b"")
    (folder / "dog" / "only a name.jpg").write_bytes(b"GIF? no.")
    (folder / "dog" / "huge.png").write_bytes(claims(20_000, 20_000))
    (folder / "dog" / "really a png.jpg").write_bytes(picture(BLUE))
    got = collect(folder)
    assert len(got.manifest) == 25
    why = {Path(p).name: r for p, r in zip(got.skipped.path, got.skipped.reason)}
    assert set(why) == {"notes.txt", "zero.png", "only a name.jpg", "huge.png"}
    assert "0 bytes" in why["zero.png"] and "million pixels" in why["huge.png"]


def test_truncated_and_blank_pictures_are_left_out_by_cleaning_and_stay_on_disk(tmp_path):
    folder = fill(tmp_path / "pictures")
    whole = (folder / "cat" / "000.png").read_bytes()
    (folder / "cat" / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "dog" / "blank.png").write_bytes(picture((9, 9, 9)))
    (folder / "dog" / "twice.png").write_bytes((folder / "dog" / "001.png").read_bytes())
    kept, report = clean(collect(folder).manifest)
    assert {Path(p).name: f for p, f in zip(report.path, report.fault)} == \
        {"cut.png": "truncated", "blank.png": "blank", "twice.png": "duplicate"}
    assert len(kept) == 24 and (folder / "cat" / "cut.png").exists()


def test_a_class_too_small_for_three_splits_is_refused(tmp_path):
    df = collect(fill(tmp_path / "pictures", n=4)).manifest
    with pytest.raises(InputError, match="at least .* of each class"): split(df)


# ---- single pictures, through the Predictor and the command

BROKEN = {"missing.png": None, "zero.png": b"", "cut.jpg": picture(kind="JPEG", size=(300, 200))[:900], "text.png": b"hello",
          "huge.png": claims(20_000, 20_000)}

@pytest.mark.parametrize("name", BROKEN)
def test_a_picture_that_cannot_be_read_is_one_line(tiny_bundle, tmp_path, name):
    path = tmp_path / name
    if BROKEN[name] is not None: path.write_bytes(BROKEN[name])
    with pytest.raises(PictureError) as e: Predictor(tiny_bundle).predict(path)
    assert e.value.expected and e.value.found and e.value.next_step
    done = dlpipe("predict", tiny_bundle, path)
    assert done.returncode == 1 and "Traceback" not in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "Expected" in done.stderr and not done.stdout


def test_broken_pictures_among_good_ones_are_named_and_the_good_ones_answered(tiny_bundle, tmp_path):
    for name, data in BROKEN.items():
        if data is not None: (tmp_path / name).write_bytes(data)
    (tmp_path / "good.png").write_bytes(picture(RED))
    done = dlpipe("predict", tiny_bundle, tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stdout.startswith("good.png: cat") and len(done.stderr.strip().splitlines()) == 4


@pytest.mark.parametrize("name", AWKWARD)
def test_awkward_names_are_accepted(tiny_bundle, tmp_path, name):
    if os.name == "nt" and '"' in name: pytest.skip("no such names on Windows")
    (tmp_path / name).write_bytes(picture(BLUE))
    assert Predictor(tiny_bundle).predict(tmp_path / name).label == "dog"
    store = tmp_path / "st ore.db"
    done = dlpipe("predict", tiny_bundle, "--store", store, "--", tmp_path / name)
    assert done.returncode == 0 and done.stdout.startswith(f"{name}: dog"), done.stderr
    assert Store(store).predictions().name.tolist() == [name]


def test_awkward_names_go_through_collection_and_the_manifest(tmp_path):
    folder = fill(tmp_path / "my 'own' pictures – 写真")
    for k, name in enumerate(AWKWARD):
        if os.name != "nt" or '"' not in name: (folder / "cat" / name).write_bytes(picture((k, 9, 200)))
    got, run = collect(folder), Run(tmp_path / "run")
    run.save_manifest(got.manifest)
    again = run.manifest()
    assert {Path(p).name for p in again.path} >= set(AWKWARD) and all(Path(p).is_file() for p in again.path)


def odd_modes():
    "Red pictures in every odd mode, as bytes, with the suffix that goes with each."
    red, out = Image.new("RGB", (60, 40), RED), {}
    for name, im, kind in (("CMYK", red.convert("CMYK"), "JPEG"), ("palette", red.quantize(8), "PNG"), ("RGBA", red.convert("RGBA"), "PNG"),
                           ("palette gif", red, "GIF"), ("webp", red, "WEBP"), ("tiff", red, "TIFF"), ("bmp", red, "BMP")):
        im.save(b := io.BytesIO(), kind)
        out[name] = (b.getvalue(), f".{kind.lower()}")
    return out

@pytest.mark.parametrize("mode", odd_modes())
def test_odd_modes_are_accepted_and_right(tiny_bundle, tmp_path, mode):
    data, suffix = odd_modes()[mode]
    assert np.abs(picture_array(data, 32).reshape(-1, 3).mean(0) - RED).max() < 12
    path = tmp_path / f"picture{suffix}"
    path.write_bytes(data)
    done = dlpipe("predict", tiny_bundle, path)
    assert done.returncode == 0 and ": cat" in done.stdout, done.stderr


def test_16_bit_and_exif_are_accepted_and_right(tiny_bundle, tmp_path):
    grey = np.linspace(0, 65535, 60 * 40).reshape(40, 60).astype(np.uint16)
    Image.fromarray(grey).save(tmp_path / "deep.png")
    a = np.asarray(open_picture(tmp_path / "deep.png"))
    assert np.abs(a[..., 0].astype(int) - (grey / 257).round()).max() <= 1
    (tmp_path / "phone.jpg").write_bytes(sideways())
    up = np.asarray(open_picture(tmp_path / "phone.jpg")).astype(int)
    assert up.shape == (60, 40, 3) and (up[5, 20] - up[55, 20])[0] > 100, "the red half is not on top"
    done = dlpipe("predict", tiny_bundle, tmp_path)
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 2, done.stderr


# ---- places that can't be written

@pytest.fixture
def read_only(tmp_path):
    "A folder that nobody can write to: by permission, or, for the superuser, as a read-only file system."
    place = tmp_path / "locked"
    place.mkdir()
    if os.name == "nt": pytest.skip("made with POSIX permissions")
    if os.geteuid() != 0:
        place.chmod(0o500)
        yield place
        place.chmod(0o700)
    else:
        if not shutil.which("mount") or subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "none", place], capture_output=True).returncode:
            pytest.skip("the superuser may write anywhere, and nothing can be mounted here")
        yield place
        subprocess.run(["umount", place])


def test_a_read_only_output_folder_is_refused(read_only, tmp_path, tiny_bundle):
    with pytest.raises(InputError, match="read-only|permission"): run_pipeline("drawn", read_only / "run", n=40)
    assert "dlpipe" in refused(dlpipe("run", "--out", read_only / "run"))
    with pytest.raises(InputError): Store(read_only / "store.db")
    (tmp_path / "good.png").write_bytes(picture(RED))
    done = dlpipe("predict", tiny_bundle, tmp_path / "good.png", "--store", read_only / "store.db")
    refused(done)
    assert not list(read_only.iterdir())


def test_an_output_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "run").write_text("a file of mine")
    refused(dlpipe("run", "--out", tmp_path / "run"))
    refused(dlpipe("run", "--out", tmp_path / "run" / "below"))
    assert (tmp_path / "run").read_text() == "a file of mine"


def test_an_output_folder_with_other_files_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("three years of work")
    before = listing(tmp_path)
    refused(dlpipe("run", "--out", tmp_path))
    assert listing(tmp_path) == before


@pytest.mark.skipif(os.name == "nt" or not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs a file system that can be filled")
def test_a_full_disk_is_one_line(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "none", disk], capture_output=True).returncode:
        pytest.skip("nothing can be mounted here")
    try:
        folder = fill(tmp_path / "pictures")
        assert "full disk" in refused(dlpipe("run", "--data", folder, "--out", disk / "run", "--size", "32", "--pretrained", "no"))
    finally: subprocess.run(["umount", disk])


# ---- bundles that aren't what they were

def lose_model(b): (b / "model.onnx").unlink()
def lose_info(b): (b / "model.json").unlink()
def alter_model(b): (b / "model.onnx").write_bytes((b / "model.onnx").read_bytes()[:-1] + b"x")
def alter_info(b): (b / "model.json").write_text((b / "model.json").read_text().replace('"cat", "dog"', '"dog", "cat"'))
def cut_info(b): (b / "model.json").write_text((b / "model.json").read_text()[:100])
def foreign_file(b): (b / "model.pkl").write_bytes(b"\x80\x04.")
def foreign_info(b): (b / "model.json").write_text('{"name": "another program"}')
def foreign_list(b): (b / "model.json").write_text("[1, 2]")
def other_version(b): (b / "model.json").write_text(json.dumps(json.loads((b / "model.json").read_text()) | {"format_version": 9}))
def no_bundle(b): shutil.rmtree(b)
def not_onnx(b):
    from dlpipe_nb.core import sha256_of
    from dlpipe_nb.inference import seal_of
    (b / "model.onnx").write_bytes(b"this is no network")
    info = json.loads((b / "model.json").read_text()) | {"model_sha256": sha256_of(b / "model.onnx")}
    (b / "model.json").write_text(json.dumps(info | {"sha256": seal_of(info)}))

@pytest.mark.parametrize("damage", [lose_model, lose_info, alter_model, alter_info, cut_info, foreign_file, foreign_info,
                                    foreign_list, other_version, no_bundle, not_onnx])
def test_a_damaged_bundle_is_refused(tmp_path, damage):
    bundle = write_tiny_bundle(tmp_path / "bundle")
    Predictor(bundle)
    damage(bundle)
    (tmp_path / "good.png").write_bytes(picture(RED))
    with pytest.raises(BundleError): Predictor(bundle)
    refused(dlpipe("predict", bundle, tmp_path / "good.png"))


def test_a_system_error_is_one_line_too(monkeypatch, capsys):
    from dlpipe_nb import pipeline
    def pulled_out(*args, **kwargs): raise OSError(5, "Input/output error", "runs/first/manifest.csv")
    monkeypatch.setattr(pipeline, "run_pipeline", pulled_out)
    with pytest.raises(SystemExit) as e: pipeline.main(["run"])
    said = capsys.readouterr().err
    assert e.value.code == 1 and said.count("\n") == 1 and "Input/output error" in said and "manifest.csv" in said
