"""core: pictures of every kind, writing that is whole or not at all, the run's folder, and `check`."""
from __future__ import annotations

import errno
import importlib
import io
import json
import os
import random
import struct
import subprocess
import sys
import types
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

import dlpipe_nb.core as core
from dlpipe_nb.core import (CHAPTERS, STAGES, InputError, PictureError, Run, atomic_write, check, content_hash, is_picture_name,
                            open_picture, picture_array, picture_statistics, progress, read_json, set_seed, sha256_of, write_json)

ORIENTATION = 0x0112
CORNERS = {"red": (255, 0, 0), "green": (0, 200, 0), "blue": (0, 0, 255), "yellow": (240, 240, 0)}
#: How a camera's picture lies when the note says n: what has to be done to the upright one to get it.
LYING = {1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
         5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270}


def upright(w=64, h=48) -> Image.Image:
    "A picture whose four corners differ: red and green above, blue and yellow below."
    im = Image.new("RGB", (w, h))
    for n, colour in enumerate(CORNERS.values()): im.paste(colour, (n % 2 * w // 2, n // 2 * h // 2, w, h))
    return im


def saved(im, kind="PNG", **options) -> bytes:
    out = io.BytesIO()
    im.save(out, kind, **options)
    return out.getvalue()


def same(a, b, within=0) -> bool:
    "Whether two pictures have one size and no pixel differs by more than `within`."
    return a.size == b.size and np.abs(np.asarray(a, int) - np.asarray(b, int)).max() <= within


def png_claiming(w, h) -> bytes:
    "The start of a PNG file that claims to be w by h pixels."
    def chunk(kind, data): return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, 8, 2, 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b""))


def memory_limit(mb: int):
    "What a child process calls to be refused more memory than this."
    resource = pytest.importorskip("resource", reason="limits of memory are a Unix matter")
    return lambda: resource.setrlimit(resource.RLIMIT_AS, (mb << 20, mb << 20))


# ---- opening pictures: each mode

def test_rgb_stays_as_it_is():
    im = open_picture(saved(upright()))
    assert im.mode == "RGB" and same(im, upright())


@pytest.mark.parametrize("kind, within", [("PNG", 0), ("BMP", 0), ("TIFF", 0), ("PPM", 0), ("GIF", 1), ("JPEG", 12), ("WEBP", 30)])
def test_every_format_gives_the_same_picture(kind, within):
    options = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    assert same(open_picture(saved(upright(), kind, **options)), upright(), within)


def test_cmyk_jpeg():
    im = open_picture(saved(upright().convert("CMYK"), "JPEG", quality=95, subsampling=0))
    assert im.mode == "RGB" and same(im, upright(), 16)


def test_grey_and_black_and_white():
    assert same(open_picture(saved(Image.new("L", (4, 4), 77))), Image.new("RGB", (4, 4), (77, 77, 77)))
    assert same(open_picture(saved(Image.new("1", (4, 4), 1))), Image.new("RGB", (4, 4), "white"))


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_and_not_cut_off(kind):
    ramp = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    im = open_picture(saved(Image.fromarray(ramp), kind))
    assert im.mode == "RGB"
    assert np.abs(np.asarray(im, int)[..., 0].ravel() - np.arange(256)).max() <= 1


def test_sixteen_bits_turned_by_exif():
    lying = np.zeros((10, 30), np.uint16)
    lying[:, :10] = 65535
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    im = open_picture(saved(Image.fromarray(lying), exif=exif))
    assert im.size == (10, 30) and im.getpixel((5, 2)) == (255, 255, 255) and im.getpixel((5, 27)) == (0, 0, 0)


def test_thirty_two_bits_and_floats():
    ramp = np.arange(256, dtype=np.float32).reshape(16, 16)
    for a in (ramp / 255, ramp - 100, (ramp * 257).astype(np.int32)):
        im = np.asarray(open_picture(saved(Image.fromarray(a), "TIFF")), int)[..., 0].ravel()
        assert (im[0], im[-1]) == (0, 255) and (np.diff(im) >= 0).all()
    assert open_picture(Image.fromarray(np.full((4, 4), 0.5, np.float32))).mode == "RGB"


def test_what_is_transparent_becomes_white():
    half = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    half.putpixel((1, 0), (255, 0, 0, 0))
    for im in (half, half.convert("LA"), half.quantize(8)):
        seen = open_picture(saved(im))
        assert seen.mode == "RGB" and seen.getpixel((1, 0)) == (255, 255, 255)
        assert seen.getpixel((0, 0)) != (255, 255, 255)
    assert same(open_picture(saved(Image.new("RGBA", (1, 1), (255, 0, 0, 128)))), Image.new("RGB", (1, 1), (255, 127, 127)), 1)


def test_a_palette_with_a_transparent_colour():
    im = Image.new("P", (2, 1), 0)
    im.putpalette([0, 200, 0, 0, 0, 255])
    im.putpixel((1, 0), 1)
    seen = open_picture(saved(im, transparency=1))
    assert [seen.getpixel((x, 0)) for x in (0, 1)] == [(0, 200, 0), (255, 255, 255)]
    seen = open_picture(saved(im, "GIF", transparency=1))
    assert [seen.getpixel((x, 0)) for x in (0, 1)] == [(0, 200, 0), (255, 255, 255)]
    plain = open_picture(saved(im))
    assert [plain.getpixel((x, 0)) for x in (0, 1)] == [(0, 200, 0), (0, 0, 255)]


@pytest.mark.parametrize("mode, colour", [("RGB", (255, 0, 0)), ("L", 7)])
def test_one_colour_of_a_png_declared_transparent(mode, colour):
    seen = open_picture(saved(Image.new(mode, (2, 2), colour), transparency=colour))
    assert seen.getpixel((0, 0)) == (255, 255, 255)


def test_the_first_frame_of_a_moving_picture():
    frames = [Image.new("RGB", (8, 8), c) for c in ("red", "blue")]
    assert open_picture(saved(frames[0], "GIF", save_all=True, append_images=frames[1:])).getpixel((4, 4)) == (255, 0, 0)


@pytest.mark.parametrize("kind, options, within", [("JPEG", {"quality": 95, "subsampling": 0}, 12), ("PNG", {}, 0),
                                                   ("WEBP", {"lossless": True}, 0), ("TIFF", {}, 0)])
@pytest.mark.parametrize("n", LYING)
def test_exif_turns_the_picture_upright(n, kind, options, within):
    exif = Image.Exif()
    exif[ORIENTATION] = n
    lying = upright() if LYING[n] is None else upright().transpose(LYING[n])
    data = saved(lying, kind, exif=exif, **options)
    assert same(open_picture(data), upright(), within)
    assert same(Image.fromarray(picture_array(data, 32)), Image.fromarray(picture_array(upright(), 32)), within)
    assert ImageOps.exif_transpose(open_picture(data)).size == (64, 48), "and is not turned a second time"


@pytest.mark.parametrize("exif", [b"Exif\0\0garbagegarbage", b"Exif\0\0II*\0\xff\xff\xff\x7f\0\0", b"Exif\0\0"])
@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_a_picture_with_a_broken_note_is_still_a_picture(exif):
    assert same(open_picture(saved(upright(), "JPEG", exif=exif, quality=95, subsampling=0)), upright(), 12)


def test_an_unknown_orientation_is_upright():
    exif = Image.Exif()
    exif[ORIENTATION] = 99
    assert same(open_picture(saved(upright(), exif=exif)), upright())


# ---- opening pictures: where they come from

@pytest.mark.parametrize("name", ["cat.png", "a cat.png", "it's \"a\" cat.png", "кошка 猫 ñ.png", "no suffix", "wrong.jpg", "CAT.PNG"])
def test_every_source_and_name_gives_the_same_picture(tmp_path, name):
    if os.name == "nt" and '"' in name: pytest.skip("Windows has no such names")
    data, path = saved(upright()), tmp_path / name
    path.write_bytes(data)
    with open(path, "rb") as f: from_file = open_picture(f)
    sources = [path, str(path), data, bytearray(data), io.BytesIO(data), upright(), np.asarray(upright())]
    assert all(same(im, upright()) for im in [from_file, *map(open_picture, sources)])


def test_the_pictures_given_are_left_as_they_were():
    jpeg = Image.open(io.BytesIO(saved(upright(800, 600), "JPEG")))
    open_picture(jpeg, 32)
    assert jpeg.size == (800, 600)
    im = upright()
    open_picture(im).paste("white", (0, 0, 64, 48))
    assert same(im, upright())
    a = np.asarray(upright()).copy()
    picture_array(a, 16)[:] = 0
    assert same(Image.fromarray(a), upright())


# ---- what is no picture

@pytest.mark.parametrize("name, data, word", [
    ("empty.jpg", b"", "contents"),
    ("text.jpg", b"I am a cat.", "contents"),
    ("truncated.jpg", saved(upright(400, 300), "JPEG")[:900], "truncated"),
    ("truncated.png", saved(Image.fromarray(np.random.default_rng(0).integers(0, 255, (200, 200, 3), np.uint8)))[:20_000], "truncated"),
    ("header only.png", saved(upright())[:20], ""),
    ("huge.png", png_claiming(20_000, 20_000), "claimed"),
    ("over.png", png_claiming(10_001, 10_000), "claimed"),
    ("not there.jpg", None, "no file"),
])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_what_is_no_picture_is_refused_in_words(tmp_path, name, data, word):
    path = tmp_path / name
    if data is not None: path.write_bytes(data)
    for give in (lambda: open_picture(path), lambda: picture_array(str(path), 32), lambda: open_picture(path, 32)):
        with pytest.raises(PictureError) as e: give()
        said = str(e.value)
        assert name in said and word in said and said.startswith("Expected ") and " Next: " in said and "\n" not in said
    if data is not None:
        assert path.read_bytes() == data
        with pytest.raises(PictureError): open_picture(data)


def test_a_folder_is_no_picture(tmp_path):
    with pytest.raises(PictureError, match="a folder"): open_picture(tmp_path)


@pytest.mark.parametrize("src", [None, 3, [], np.zeros((2, 2, 7), np.uint8), np.zeros((0, 0, 3), np.uint8), io.BytesIO(b"")], ids=lambda x: type(x).__name__)
def test_what_can_hold_no_picture_is_refused(src):
    with pytest.raises(PictureError): open_picture(src)
    with pytest.raises(PictureError): picture_array(src, 8)


def test_a_picture_error_is_an_input_error_is_a_value_error():
    e = PictureError("a", "b", "c")
    assert isinstance(e, InputError) and isinstance(e, ValueError) and str(e) == "Expected a; found b. Next: c."
    assert (e.expected, e.found, e.next_step) == ("a", "b", "c")


def test_an_input_error_survives_being_sent_between_processes():
    import pickle
    e = pickle.loads(pickle.dumps(PictureError("a", "b", "c")))
    assert type(e) is PictureError and str(e) == "Expected a; found b. Next: c."


@pytest.mark.parametrize("name, yes", [("a.jpg", True), ("A.JPEG", True), ("a.webp", True), ("a.txt", False), (".a.jpg", False),
                                       ("._cat.jpg", False), ("jpg", False), ("a.jpg.part", False)])
def test_names_of_pictures(name, yes): assert is_picture_name(Path("x") / name) is yes


# ---- arrays

@pytest.mark.parametrize("w, h", [(64, 48), (48, 64), (10, 10), (3, 300), (1, 1), (97, 96)])
@pytest.mark.parametrize("size", [1, 32, 96])
def test_an_array_is_square_and_eight_bit(w, h, size):
    a = picture_array(upright(w, h), size)
    assert a.shape == (size, size, 3) and a.dtype == np.uint8 and a.flags.writeable


def test_the_middle_is_kept():
    im = Image.new("RGB", (300, 100), "red")
    im.paste("blue", (100, 0, 200, 100))
    a = picture_array(im, 50)
    assert (a[:, 3:-3] == (0, 0, 255)).all()
    assert (picture_array(im.rotate(90, expand=True), 50)[3:-3] == (0, 0, 255)).all()


def test_a_large_jpeg_decoded_smaller_is_the_same_picture():
    rng = np.random.default_rng(0)
    im = Image.fromarray(rng.integers(0, 255, (12, 16, 3), np.uint8)).resize((1600, 1200), Image.Resampling.BICUBIC)
    fast, slow = picture_array(saved(im, "JPEG", quality=95), 64), picture_array(im, 64)
    assert np.abs(fast.astype(int) - slow.astype(int)).mean() < 2


def test_a_long_thin_picture_takes_no_more_memory_than_it_has_pixels():
    code = ("import io, sys; from PIL import Image; from dlpipe_nb.core import picture_array\n"
            "a = picture_array(Image.new('RGB', (400_000, 1), 'red'), 96); print(a.shape)")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, preexec_fn=memory_limit(3000),
                          timeout=60, cwd=Path(core.__file__).parents[1], env=env)
    assert made.stdout.strip() == "(96, 96, 3)", made.stderr[-300:]


def test_statistics_lie_between_0_and_1_and_mean_what_they_say():
    black, white = np.zeros((8, 8, 3), np.uint8), np.full((8, 8, 3), 255, np.uint8)
    board = np.indices((8, 8)).sum(0) % 2 * 255
    board = np.repeat(board[..., None], 3, 2).astype(np.uint8)
    assert picture_statistics(black) == {"brightness": 0, "contrast": 0, "sharpness": 0}
    assert picture_statistics(white)["brightness"] == pytest.approx(1)
    s = picture_statistics(board)
    assert s["brightness"] == pytest.approx(.5) and s["contrast"] == pytest.approx(.5) and s["sharpness"] == pytest.approx(1)
    assert all(type(v) is float for v in s.values())


# ---- writing: whole, or not at all

def leftovers(folder): return [p.name for p in Path(folder).iterdir() if p.name.startswith(".writing-")]


def test_a_file_appears_whole(tmp_path):
    with atomic_write(tmp_path / "new" / "a.txt") as tmp:
        tmp.write_text("hello")
        assert not (tmp_path / "new" / "a.txt").exists()
    assert (tmp_path / "new" / "a.txt").read_text() == "hello" and not leftovers(tmp_path / "new")


@pytest.mark.parametrize("name", ["model", "old", "новая папка"])
def test_a_folder_takes_the_place_of_the_old_one(tmp_path, name):
    for text in ("first", "second"):
        with atomic_write(tmp_path / name) as tmp:
            tmp.mkdir()
            (tmp / f"{text}.txt").write_text(text)
    assert [p.name for p in (tmp_path / name).iterdir()] == ["second.txt"] and not leftovers(tmp_path)


def old_contents(tmp_path, folder: bool) -> Path:
    "Something there already: a file, or a folder with a file."
    path = tmp_path / "kept"
    if folder: path.mkdir()
    (path / "a" if folder else path).write_text("old")
    return path


def still_old(path, folder: bool): return (path / "a" if folder else path).read_text() == "old" and not leftovers(path.parent)


def write_anew(path, folder: bool, error=None):
    with atomic_write(path) as tmp:
        if folder: tmp.mkdir()
        (tmp / "a" if folder else tmp).write_text("new")
        if error: raise error


@pytest.mark.parametrize("folder", [False, True], ids=["file", "folder"])
@pytest.mark.parametrize("error", [RuntimeError("stop"), KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")], ids=repr)
def test_what_was_there_stays_when_writing_fails(tmp_path, folder, error):
    path = old_contents(tmp_path, folder)
    with pytest.raises((type(error), InputError)): write_anew(path, folder, error)
    assert still_old(path, folder)


@pytest.mark.parametrize("folder, at", [(False, 1), (True, 1), (True, 2)])
def test_what_was_there_stays_when_the_last_step_fails(tmp_path, monkeypatch, folder, at):
    path, real, done = old_contents(tmp_path, folder), os.replace, []

    def replace(src, dest):
        done.append(dest)
        if len(done) == at: raise OSError(errno.ENOSPC, "No space left on device")
        return real(src, dest)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(InputError, match="full disk"): write_anew(path, folder)
    assert still_old(path, folder)


@pytest.mark.parametrize("folder", [False, True], ids=["file", "folder"])
def test_what_was_there_stays_when_nothing_was_written(tmp_path, folder):
    path = old_contents(tmp_path, folder)
    with pytest.raises((OSError, InputError)):
        with atomic_write(path): pass
    assert still_old(path, folder)


@pytest.mark.parametrize("code, word", [(errno.ENOSPC, "full disk"), (errno.EROFS, "read-only"), (errno.EACCES, "permission"),
                                        (errno.EPERM, "permission"), (errno.EDQUOT, "quota")])
def test_a_place_that_can_not_be_written_is_named(tmp_path, monkeypatch, code, word):
    def refuse(*args, **kwargs): raise OSError(code, os.strerror(code))
    monkeypatch.setattr(core.tempfile, "mkdtemp", refuse)
    with pytest.raises(InputError) as e: write_json(tmp_path / "a.json", {})
    assert word in str(e.value) and str(tmp_path) in str(e.value) and "\n" not in str(e.value)
    assert list(tmp_path.iterdir()) == []


def test_other_errors_are_passed_on(tmp_path):
    with pytest.raises(IsADirectoryError):
        with atomic_write(tmp_path / "a") as tmp:
            tmp.mkdir()
            open(tmp, "w")


def test_a_folder_below_a_file(tmp_path):
    (tmp_path / "file").write_text("a file")
    for path in ("file/a.json", "file/deeper/a.json"):
        with pytest.raises(InputError, match="a file where a folder should be"): write_json(tmp_path / path, {})
    assert (tmp_path / "file").read_text() == "a file"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_folder_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(InputError, match="permission"): write_json(tmp_path / "a.json", {})
    finally: tmp_path.chmod(0o700)


@pytest.fixture
def small_disk(tmp_path):
    "A file system of 64 KiB of its own, where this may be made."
    disk = tmp_path / "disk"
    disk.mkdir()
    if not sys.platform.startswith("linux") or os.geteuid() != 0: pytest.skip("only Linux's superuser can mount a small disk")
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True, text=True)
    if made.returncode: pytest.skip(f"no disk could be mounted here: {made.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("folder", [False, True], ids=["file", "folder"])
def test_a_disk_that_is_really_full(small_disk, folder):
    path = old_contents(small_disk, folder)
    with pytest.raises(InputError, match="a full disk"):
        with atomic_write(path) as tmp:
            if folder: tmp.mkdir()
            (tmp / "a" if folder else tmp).write_bytes(bytes(200_000))
    assert still_old(path, folder)
    with pytest.raises(InputError, match="a full disk"): write_json(small_disk / "b.json", ["x" * 100] * 2000)
    assert sorted(p.name for p in small_disk.iterdir()) == ["kept"]


def test_a_disk_that_is_really_read_only(small_disk):
    path = old_contents(small_disk, folder=False)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(InputError, match="read-only"): write_json(path, {})
    with pytest.raises(InputError, match="read-only"): Run(small_disk / "new" / "run").write_json("a.json", {})
    assert path.read_text() == "old"


# ---- JSON, fingerprints, seeds

def test_json_there_and_back(tmp_path):
    obj = {"a": np.float32(0.5), "b": np.arange(3), "c": Path("x") / "y", "d": [True, None, "ключ", np.int64(3), np.bool_(True)]}
    path = write_json(tmp_path / "deep" / "a.json", obj)
    assert read_json(path) == {"a": 0.5, "b": [0, 1, 2], "c": "x/y", "d": [True, None, "ключ", 3, True]}
    assert "ключ" in path.read_text("utf-8")


def test_what_json_can_not_hold_leaves_the_old_file(tmp_path):
    path = write_json(tmp_path / "a.json", 1)
    with pytest.raises(TypeError): write_json(path, {"a": object()})
    assert read_json(path) == 1 and not leftovers(tmp_path)


@pytest.mark.parametrize("data, word", [(None, "no file"), (b"{", "something else"), (b"", "something else"), (b"\xff\xfe\x00", "something else")])
def test_reading_what_is_no_json(tmp_path, data, word):
    if data is not None: (tmp_path / "a.json").write_bytes(data)
    with pytest.raises(InputError, match=word): read_json(tmp_path / "a.json")


def test_fingerprints(tmp_path):
    abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # the standard's own example
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_of(b"abc") == sha256_of(tmp_path / "a") == sha256_of(str(tmp_path / "a")) == abc


def test_the_fingerprint_of_a_manifest_forgets_order_and_paths_only():
    df = pd.DataFrame({"path": ["a", "b"], "label": ["cat", "dog"], "sha256": ["1", "2"]})
    h = content_hash(df)
    assert h == content_hash(df[::-1]) == content_hash(df.assign(path=["x", "y"]))
    assert h != content_hash(df.assign(label=["dog", "cat"])) and h != content_hash(df[:1]) and h != content_hash(pd.concat([df, df[:1]]))


def test_one_seed_one_sequence():
    def draw(seed):
        assert set_seed(seed) == seed
        return random.random(), np.random.rand()
    assert draw(1) == draw(1) != draw(2)
    import torch
    set_seed(3)
    a = torch.rand(1)
    set_seed(3)
    assert torch.equal(a, torch.rand(1))


def test_progress_passes_everything_on(): assert list(progress(iter("abc"), "letters", total=3)) == ["a", "b", "c"]


# ---- the run's folder

def rows(**columns):
    base = {"path": ["data/cat one.jpg", "data/it's, \"a\" dog.jpg"], "label": ["cat", "dog"], "split": ["", "train"],
            "sha256": ["0" * 64, "1e5" + "0" * 61], "width": [10, 20], "height": [30, 40], "source": ["drawn", "NA"]}
    return pd.DataFrame({**base, **columns})


def test_a_manifest_comes_back_as_it_was(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    df = rows(ear=["pointed", "None"], size=[0.5, np.nan], night=[True, False])
    run = Run("runs/one")
    assert run.save_manifest(df) == run / "manifest.csv"
    back = run.manifest()
    pd.testing.assert_frame_equal(back, df, check_dtype=False)
    assert list(back["split"]) == ["", "train"] and back["width"].dtype.kind == "i" and back["night"].dtype == bool


def test_labels_that_look_like_something_else_stay_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for labels in (["NA", "null"], ["007", "1e3"], ["True", "nan"], ["кошка", "猫"]):
        df = rows(label=labels)
        Run("r").save_manifest(df)
        assert list(Run("r").manifest()["label"]) == labels


def test_a_manifest_leads_to_its_pictures_from_anywhere(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.png").write_bytes(b"a")
    (tmp_path / "nbs").mkdir()
    monkeypatch.chdir(tmp_path)
    Run("runs/one").save_manifest(rows(path=["data/a.png", str(tmp_path / "data" / "a.png")]))
    for here in (tmp_path, tmp_path / "nbs", tmp_path / "runs" / "one", tmp_path.parent):
        monkeypatch.chdir(here)
        paths = Run(os.path.relpath(tmp_path / "runs" / "one")).manifest()["path"]
        assert [Path(p).read_bytes() for p in paths] == [b"a", b"a"]
    assert str(tmp_path) not in (tmp_path / "runs/one/manifest.csv").read_text("utf-8"), "what is stored can be moved"


def test_a_run_and_its_pictures_can_be_moved_together(tmp_path, monkeypatch):
    (tmp_path / "here" / "data").mkdir(parents=True)
    (tmp_path / "here" / "data" / "a.png").write_bytes(b"a")
    monkeypatch.chdir(tmp_path)
    Run("here/run").save_manifest(rows()[:1].assign(path="here/data/a.png"))
    (tmp_path / "here").rename(tmp_path / "there")
    assert Path(Run("there/run").manifest()["path"][0]).read_bytes() == b"a"


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\r\0"), min_size=1, max_size=8), min_size=1, max_size=4))
def test_any_label_comes_back(tmp_path_factory, labels):
    df = pd.DataFrame({"path": [f"{n}.png" for n in range(len(labels))], "label": labels, "sha256": "0"})
    run = Run(tmp_path_factory.mktemp("run"))
    run.save_manifest(df)
    assert list(run.manifest()["label"]) == labels


def test_no_manifest_says_how_to_get_one(tmp_path):
    with pytest.raises(InputError, match="run.ensure"): Run(tmp_path).manifest()


def test_a_run_is_made_by_its_first_file(tmp_path):
    run = Run(tmp_path / "a" / "b")
    assert not run.path.exists() and "nothing yet" in repr(run)
    run.write_json("problem.json", {"a": 1})
    assert run.read_json("problem.json") == {"a": 1} and run.has("problem") and "problem" in repr(run)
    with pytest.raises(InputError, match="a file at"): Run(run / "problem.json")


def test_a_figure_is_kept(tmp_path):
    from matplotlib.figure import Figure
    path = Run(tmp_path).save_figure(Figure(), "empty")
    assert path == tmp_path / "figures" / "empty.png" and Image.open(path).format == "PNG"


@pytest.fixture
def made(monkeypatch):
    "The stages' functions replaced: each notes its call and writes its proof."
    calls = []
    def stand_in(stage, proof):
        def make(run, **settings):
            calls.append((stage, settings))
            return run.write_json(proof, {})
        return make
    real = importlib.import_module
    modules = {}
    for stage, (proof, where, _) in STAGES.items():
        module, name = where.split(".")
        setattr(modules.setdefault(f"dlpipe_nb.{module}", types.SimpleNamespace()), name, stand_in(stage, proof))
    monkeypatch.setattr(core.importlib, "import_module", lambda name: modules.get(name) or real(name))
    return calls


def test_ensure_makes_what_is_missing_and_no_more(tmp_path, made):
    run = Run(tmp_path)
    assert run.ensure("clean", seed=3) is run
    assert made == [("problem", {}), ("manifest", {}), ("clean", {"seed": 3})]
    run.ensure("features").ensure("clean", seed=4)
    assert made[3:] == [("features", {})]
    run.ensure("bundle")
    assert [s for s, _ in made] == list(STAGES) and all(run.has(s) for s in STAGES)


def test_ensure_goes_on_after_the_last_finished_stage(tmp_path, made):
    run = Run(tmp_path).ensure("manifest")
    (tmp_path / "problem.json").unlink()
    run.ensure("manifest")
    assert [s for s, _ in made] == ["problem", "manifest"]


def test_an_unknown_stage_is_named(tmp_path):
    for ask in (Run(tmp_path).has, Run(tmp_path).ensure):
        with pytest.raises(InputError, match="'tested'.*spelling"): ask("tested")


def test_every_stage_has_a_chapter(): assert all(where.split(".")[0] in CHAPTERS for _, where, _ in STAGES.values())


# ---- check

def share(im):
    w, h = im.size
    return 1 - min(w, h) / max(w, h)


@pytest.mark.parametrize("answer, passed, word", [
    (None, None, "not attempted"), (..., None, "not attempted"), (lambda im: None, None, "not attempted"),
    (share, True, "right"), (lambda im: 1 - share(im), False, "the lost share is the rest"),
    (lambda im: "a", False, "number"), (lambda im: 1 / 0, False, "ZeroDivisionError"), (lambda: 3, False, "TypeError"),
    (lambda im: 5000, False, "between 0 and 1"), (lambda im: 0.5, False, "0.5"),
])
def test_check_says_what_is_wrong(answer, passed, word):
    said = check("00.1", answer)
    assert said.passed is passed and word in repr(said) and repr(said)[0] == {True: "✓", False: "✗", None: "–"}[passed]


@pytest.mark.parametrize("exercise", ["", "00", "00.99", "99.1", "five", "00.x", "-16.1", 0.1])
def test_check_knows_its_exercises(exercise):
    with pytest.raises(InputError, match="exercise's number"): check(exercise, 1)


def test_a_second_path_in_a_row_moves_with_the_run_too(tmp_path, monkeypatch):
    run, pictures = Run(tmp_path / "runs" / "a"), tmp_path / "pictures"
    faults = pd.DataFrame({"path": [pictures / "b.png", pictures / "c.png"], "fault": ["duplicate", "blank"],
                           "of": [str(pictures / "a.png"), ""]})
    run.save_manifest(faults, "faults.csv")
    run.save_manifest(pd.DataFrame({"path": ["x.png"], "original": [str(pictures / "a.png")], "of": ["a fact"], "group": ["07"]}))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "runs").rename(tmp_path / "elsewhere" / "runs")
    moved = Run(tmp_path / "elsewhere" / "runs" / "a")
    monkeypatch.chdir(tmp_path)
    assert moved.manifest("faults.csv")["of"].tolist() == ["elsewhere/pictures/a.png", ""]
    row = moved.manifest().iloc[0]
    assert (row["original"], row["of"], row["group"]) == ("elsewhere/pictures/a.png", "a fact", "07")
