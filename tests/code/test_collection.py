"""Collecting from folders, names and tables, and what is said of input that can't be used."""
import json
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from PIL import Image

from dlpipe_nb.collection import class_balance, collect, collect_into, contact_sheet
from dlpipe_nb.core import InputError, Run, check

COLUMNS = ["path", "label", "split", "sha256", "width", "height", "source"]


def picture(path, colour=(200, 90, 30), size=(40, 30), **how):
    path.parent.mkdir(parents=True, exist_ok=True)
    a = np.full((size[1], size[0], 3), colour, np.uint8)
    a[:, ::3] = np.random.default_rng(zlib.crc32(path.name.encode())).integers(0, 255, 3)
    Image.fromarray(a).save(path, **how)
    return path


def huge(path, side=20_000):
    "A few bytes that claim side × side pixels."
    def chunk(kind, data): return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(b"")))


@pytest.fixture
def pets(tmp_path):
    for label in ("cat", "dog"):
        for i in range(3): picture(tmp_path / "pets" / label / f"{i}.jpg")
    return tmp_path / "pets"


def test_a_folder_a_class(pets):
    got = collect(pets)
    assert list(got.manifest.columns) == COLUMNS and len(got.manifest) == 6 and not len(got.skipped)
    assert got.manifest["label"].value_counts().to_dict() == {"cat": 3, "dog": 3}
    assert set(got.manifest["width"]) == {40} and set(got.manifest["height"]) == {30} and set(got.manifest["split"]) == {""}
    assert "6 pictures: 3 cat, 3 dog" in repr(got)


def test_folders_inside_a_class_belong_to_it(pets):
    picture(pets / "cat" / "kittens" / "of 2024" / "a.png")
    assert collect(pets).manifest["label"].value_counts().to_dict() == {"cat": 4, "dog": 3}


@pytest.mark.parametrize("name", ["with space.jpg", "Minka's 'best'.jpg", 'say "cheese".png', "Kätzchen.jpg", "ネコ.png", "кошка.webp",
                                  "a,b;c.jpg", "100%.jpg", "#1.jpg", "upper.JPG"])
def test_names_of_all_kinds(pets, name, tmp_path):
    picture(pets / "cat" / name)
    run = Run(tmp_path / "runs" / "names")
    collect_into(run, pets)
    df = run.manifest()
    assert len(df) == 7 and any(p.endswith("/" + name) for p in df["path"])
    assert all(Image.open(p) for p in df["path"])


def test_kaggles_names(tmp_path):
    for i in range(2):
        for label in ("cat", "dog"): picture(tmp_path / f"{label}.{i}.jpg")
    picture(tmp_path / "holiday.jpg")
    got = collect(tmp_path)
    assert got.manifest["label"].value_counts().to_dict() == {"cat": 2, "dog": 2}
    assert got.skipped["path"].str.endswith("holiday.jpg").all() and "no label" in got.skipped["reason"][0]


def test_train_and_valid_folders_are_joined_and_that_is_said(tmp_path):
    for part in ("train", "valid"):
        for label in ("cat", "dog"): picture(tmp_path / part / label / f"{part}.jpg")
    got = collect(tmp_path)
    assert got.manifest["label"].value_counts().to_dict() == {"cat": 2, "dog": 2}
    assert "train, valid were joined" in got.note


def table(folder, text, encoding="utf-8", name="labels.csv"):
    (folder / name).write_bytes(text.encode(encoding))
    return folder / name


@pytest.mark.parametrize("text", ["path,label\ncat/0.jpg,cat\ndog/1.jpg,dog\n", "file;kind\ncat/0.jpg;cat\ndog/1.jpg;dog\n",
                                  "label,path\ncat,cat/0.jpg\ndog,dog/1.jpg\n", "cat/0.jpg,cat\ndog/1.jpg,dog\n",
                                  "\ufeffpath,label\n cat/0.jpg , cat\ndog\\1.jpg,dog\n", "path\tlabel\ncat/0.jpg\tcat\ndog/1.jpg\tdog\n"])
def test_tables_of_paths_and_labels(pets, text):
    assert collect(table(pets, text)).manifest["label"].to_list() == ["cat", "dog"]


def test_a_tables_other_columns_come_along(pets):
    got = collect(table(pets, "path,label,age_years,name\ncat/0.jpg,cat,3.5,Minka\ndog/1.jpg,dog,,Rex\n"))
    assert got.manifest["age_years"].tolist()[0] == 3.5 and np.isnan(got.manifest["age_years"][1])
    assert got.manifest["name"].to_list() == ["Minka", "Rex"]


def test_rows_without_a_label_and_repeated_rows_are_listed(pets):
    got = collect(table(pets, "path,label\ncat/0.jpg,cat\ndog/1.jpg,dog\ndog/2.jpg,\ncat/0.jpg,dog\n"))
    assert len(got.manifest) == 2 and got.skipped["reason"].to_list() == ["no label in its row", "listed twice"]


def test_what_is_no_picture_is_listed_with_a_reason(pets):
    (pets / "cat" / "empty.jpg").touch()
    (pets / "cat" / "list.jpg").write_text("milk")
    (pets / "dog" / "notes.txt").write_text("good dog")
    (pets / "dog" / "cut.png").write_bytes((picture(pets / "whole.png")).read_bytes()[:12])
    huge(pets / "dog" / "huge.png")
    (pets / "readme.md").write_text("hello")
    got = collect(pets)
    reasons = {p.rsplit("/", 1)[1]: r for p, r in got.skipped.itertuples(index=False)}
    assert len(got.manifest) == 6
    assert "0 bytes" in reasons["empty.jpg"] and "name only" in reasons["list.jpg"] and reasons["notes.txt"] == "not a picture"
    assert "million pixels" in reasons["huge.png"] and "name only" in reasons["cut.png"]
    assert "folder" in reasons["readme.md"] and "folder" in reasons["whole.png"]


def test_hidden_litter_is_not_even_listed(pets):
    for name in (".DS_Store", "Thumbs.db"): (pets / "cat" / name).write_text("x")
    picture(pets / "__MACOSX" / "cat" / "0.jpg")
    assert not len(collect(pets).skipped)


def test_a_wrong_or_missing_suffix_is_no_fault(pets):
    shutil.copy(picture(pets / "cat" / "a.png"), pets / "cat" / "really_a_png.jpg")
    shutil.copy(pets / "cat" / "a.png", pets / "cat" / "without")
    assert len(collect(pets).manifest) == 9


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "I;16", "1"])
def test_pictures_of_every_mode(pets, mode):
    suffix = "jpg" if mode == "CMYK" else "png"
    Image.new(mode, (20, 20)).save(pets / "cat" / f"mode.{suffix}")
    assert len(collect(pets).manifest) == 7


def test_a_truncated_picture_keeps_its_header_and_waits_for_cleaning(pets):
    whole = (pets / "cat" / "0.jpg").read_bytes()
    (pets / "cat" / "0.jpg").write_bytes(whole[:-100])
    assert len(collect(pets).manifest) == 6


def broken_off(folder):
    (folder / "cat").mkdir()
    return folder


@pytest.mark.parametrize("make, said", [
    (lambda d: d / "nowhere", "nothing at"),
    (lambda d: d, "no files"),
    (broken_off, "no files"),
    (lambda d: picture(d / "cat" / "1.jpg").parent.parent, "only one class, 'cat'"),
    (lambda d: picture(d / "IMG_1.jpg").parent, "only one class, 'IMG'"),
    (lambda d: picture(d / "one.jpg"), "another kind of file"),
    (lambda d: table(d, "only\nx\n"), "only only"),
    (lambda d: table(d, ""), "isn't one"),
    (lambda d: table(d, "path,label\n"), "no files"),
    (lambda d: table(d, "path,label\ngone.jpg,cat\nlost.jpg,dog\n"), "2 missing, such as gone.jpg, lost.jpg"),
    (lambda d: table(d, "päth,label\nx,y\n", "utf-16"), "isn't one"),
])
def test_sources_that_cant_be_used_say_why_and_stay_as_they_are(tmp_path, make, said):
    source = make(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError) as e: collect(source)
    assert said in str(e.value) and "Expected" in str(e.value) and "Next:" in str(e.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_files_that_are_no_pictures_at_all(tmp_path):
    for label in ("cat", "dog"):
        (tmp_path / label).mkdir()
        (tmp_path / label / "a.jpg").touch()
    with pytest.raises(InputError, match="2 files and no picture among them.*0 bytes"): collect(tmp_path)


def test_the_oxford_pets_without_a_network(monkeypatch, tmp_path):
    import time
    import urllib.request
    import fastai.data.external
    def offline(*a, **k): raise OSError("no route")
    monkeypatch.setattr(urllib.request, "urlopen", offline)
    monkeypatch.setattr(fastai.data.external, "fastai_path", lambda folder: tmp_path)
    began = time.perf_counter()
    with pytest.raises(InputError, match="network"): collect("pets")
    assert time.perf_counter() - began < 8


def test_the_oxford_pets_that_are_on_this_disk(monkeypatch, tmp_path):
    import fastai.data.external
    monkeypatch.setattr(fastai.data.external, "fastai_path", lambda folder: tmp_path)
    images = tmp_path / "oxford-iiit-pet" / "images"
    for name in ("Abyssinian_1.jpg", "Maine_Coon_2.jpg", "pug_7.jpg"): picture(images / name)
    (images / "Abyssinian_1.mat").write_text("x")
    got = collect("pets")
    assert got.manifest["label"].to_list() == ["cat", "cat", "dog"] and set(got.manifest["source"]) == {"Oxford-IIIT Pet"}


def test_collect_into_leaves_what_the_next_phase_needs(tmp_path):
    (tmp_path / "data").mkdir()
    run = Run(tmp_path / "runs" / "first")
    got = collect_into(run, "drawn", n=12, seed=4)
    df = run.manifest()
    assert list(df.columns[:7]) == COLUMNS and "background" in df and df["sha256"].to_list() == got.manifest["sha256"].to_list()
    assert (tmp_path / "data" / "drawn-12-seed4" / "factors.csv").exists()
    assert json.loads((run / "collection.json").read_text())["balance"] == {"cat": 6, "dog": 6}
    assert (run / "figures" / "contact_sheet.png").exists() and (run / "skipped.csv").exists()


def test_without_a_data_folder_the_run_keeps_the_pictures(tmp_path):
    run = Run(tmp_path / "first")
    collect_into(run, "drawn", n=4)
    assert all((run / "pictures") in Path(p).resolve().parents for p in run.manifest()["path"])


def test_a_contact_sheet_shows_each_class_and_survives_broken_pictures(pets):
    (pets / "cat" / "0.jpg").write_bytes(b"broken")
    df = pd.concat([collect(pets).manifest, pd.DataFrame([{"path": str(pets / "cat" / "0.jpg"), "label": "cat"}])])
    fig = contact_sheet(df, n=4, cols=2, title="Pets")
    assert isinstance(fig, Figure) and [ax.get_title() for ax in fig.axes] == ["cat", "dog"] * 2
    assert len(contact_sheet(df, n=100).axes) == len(df)
    lopsided = pd.concat([df[df["label"] == "dog"].head(1), df[df["label"] == "cat"]])
    assert len(contact_sheet(lopsided, n=4).axes) == 4


@pytest.mark.parametrize("call", [lambda df: contact_sheet(df.head(0)), lambda df: contact_sheet(df[["path"]]), lambda df: contact_sheet(df, n=0),
                                  lambda df: class_balance(df.head(0)), lambda df: class_balance(df[["path"]])])
def test_nothing_to_show_is_an_input_error(call):
    with pytest.raises(InputError): call(pd.DataFrame(dict(path=["a.jpg"], label=["cat"])))


def test_class_balance_counts():
    got = class_balance(pd.DataFrame(dict(path=list("abcd"), label=["dog", "cat", "dog", "dog"])))
    assert got["pictures"].to_dict() == {"cat": 1, "dog": 3} and got["share"].to_dict() == {"cat": 0.25, "dog": 0.75}


@pytest.mark.parametrize("answer, said", [({"night": 0.5}, "right"), ({"night": 1}, "every picture"), ({"fox": 0.5}, "called 'night'"),
                                          ({"night": 50}, "more than all"), (0.5, "dictionary"), ({"night": 0.5, "camera": 0.5}, "more than the light")])
def test_exercise_1_says_what_is_wrong(answer, said): assert said in check("02.1", answer).message


@pytest.mark.parametrize("answer, said", [
    (lambda p: p.split("/")[-1].rsplit(".", 2)[0], "right"), (lambda p: p.split(".")[0], "wherever it lies"),
    (lambda p: p.rsplit(".", 1)[0], "number"), (lambda p: p.split("/")[-1].split(".")[0], "hold dots"), (lambda p: 3, "as text")])
def test_exercise_2_says_what_is_wrong(answer, said): assert said in check("02.2", answer).message


@pytest.mark.parametrize("answer, said", [
    (lambda df, c: df.groupby(c)["label"].agg(lambda l: l.value_counts().iloc[0]).sum() / len(df), "right"),
    (lambda df, c: df.groupby(c)["label"].agg(lambda l: l.value_counts().iloc[0]).sum(), "share of all"),
    (lambda df, c: df.groupby(c)["label"].agg(lambda l: l.value_counts(normalize=True).iloc[0]).mean(), "mean over the values"),
    (lambda df, c: 70.0, "percentage"), (lambda df, c: df, "one number")])
def test_exercise_3_says_what_is_wrong(answer, said): assert said in check("02.3", answer).message
