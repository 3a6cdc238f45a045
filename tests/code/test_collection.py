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

from dlpipe_nb.collection import (Labeller, PictureAdder, add_pictures, agreement, apply_labels, class_balance, collect, collect_into, contact_sheet,
                                  dataset_card, folder_tree, label_cost, measured, pace, pictures_in, read_labels, sizes_and_brightness)
from dlpipe_nb.core import InputError, Run, check, content_hash

COLUMNS = ["path", "label", "split", "sha256", "width", "height", "source"]


def picture(path, colour=(200, 90, 30), size=(40, 30), **how):
    path.parent.mkdir(parents=True, exist_ok=True)
    a = np.full((size[1], size[0], 3), colour, np.uint8)
    a[:, ::3] = np.random.default_rng(zlib.crc32(f"{path.parent.name}/{path.name}".encode())).integers(0, 255, 3)
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


# ---- looking: folders, sizes, light

def test_a_folder_tree_tells_how_much_of_what_lies_where(pets):
    (pets / "dog" / "readme").write_text("x")
    picture(pets / "cat" / "kittens" / "a.PNG")
    (pets / ".hidden").write_text("x")
    said = [line.rstrip() for line in folder_tree(pets).splitlines()]
    assert said == ["pets/", "    cat/  3 .jpg", "        kittens/  1 .png", "    dog/  3 .jpg, 1 no suffix"]
    assert "kittens" not in folder_tree(pets, depth=1)
    with pytest.raises(InputError, match="none at"): folder_tree(pets / "nowhere")


def test_a_darker_class_is_seen_in_the_figures_numbers(tmp_path):
    for i in range(5):
        Image.new("RGB", (40, 30), (20 + i, 20, 20)).save(picture(tmp_path / "cat" / f"{i}.png"))
        Image.new("RGB", (60, 30), (220 + i, 220, 220)).save(picture(tmp_path / "dog" / f"{i}.png"))
    df = collect(tmp_path).manifest
    (tmp_path / "cat" / "0.png").unlink()
    seen = measured(df)
    assert len(seen) == 10 and seen["brightness"].isna().sum() == 1 and list(seen.columns)[-3:] == ["brightness", "contrast", "sharpness"]
    by = seen.groupby("label")["brightness"].median()
    assert by["cat"] == pytest.approx(20/255, abs=.01) and by["dog"] == pytest.approx(221/255, abs=.01)
    fig = sizes_and_brightness(df)
    left, right = fig.axes
    assert "9" not in left.get_title() and "1 can't be read" in right.get_title()
    assert {t.get_text() for t in left.get_legend().get_texts()} == {"cat: 1 size", "dog: 1 size"}
    with pytest.raises(InputError, match="no column width"): sizes_and_brightness(df.drop(columns="width"))


# ---- labelling by hand

@pytest.fixture
def queue(pets): return collect(pets).manifest.iloc[[0, 3, 1, 4, 2, 5]]


def labeller(df, tmp_path, by="ada", labels=("cat", "dog")): return Labeller(df, labels, tmp_path / "labels.csv", by)


def test_labels_are_saved_at_once_and_gone_on_with(queue, tmp_path):
    lab = labeller(queue, tmp_path)
    assert lab.current == queue["path"].iloc[0] and not lab.done
    assert lab.label("cat") == queue["path"].iloc[1] == lab.current
    lab.skip(), lab.label("dog"), lab.label("dog")
    again = labeller(queue, tmp_path)
    assert again.current == queue["path"].iloc[4] and again.labels().equals(lab.labels())
    assert again.labels()["label"].tolist() == ["cat", "", "dog", "dog"] and "3 of 6 labelled, 1 can't say" in repr(again)
    again.label("cat"), again.label("dog")
    assert again.done and again.current is None
    with pytest.raises(InputError, match="none left"): again.label("cat")


def test_several_answers_can_be_taken_back_also_after_a_restart(queue, tmp_path):
    lab = labeller(queue, tmp_path)
    for label in ("cat", "dog", "cat"): lab.label(label)
    assert lab.undo() == queue["path"].iloc[2]
    again = labeller(queue, tmp_path)
    again.undo(), again.undo()
    assert again.current == queue["path"].iloc[0] and not len(again.labels())
    with pytest.raises(InputError, match="to take back"): again.undo()
    again.label("dog")
    assert read_labels(tmp_path / "labels.csv")["label"].tolist() == ["dog"]
    assert len((tmp_path / "labels.csv").read_text().splitlines()) == 1 + 7, "the journal only grows"


def test_what_cant_be_said_is_refused_and_leaves_the_file(queue, tmp_path):
    lab = labeller(queue, tmp_path)
    lab.label("cat")
    before = (tmp_path / "labels.csv").read_bytes()
    with pytest.raises(InputError, match="unicorn"): lab.label("unicorn")
    for labels in ("cat", ("cat",), ("cat", "cat"), ("cat", ""), ("cat", 3)):
        with pytest.raises(InputError, match="two labels"): labeller(queue, tmp_path, labels=labels)
    with pytest.raises(InputError, match="cat"): labeller(queue, tmp_path, labels=("mug", "glass"))
    with pytest.raises(InputError, match="nothing to label"): labeller([], tmp_path)
    assert (tmp_path / "labels.csv").read_bytes() == before and len(lab.labels()) == 1


def test_an_answer_that_cant_be_written_was_not_given(queue, tmp_path, monkeypatch):
    import os
    lab = labeller(queue, tmp_path)
    lab.label("cat")
    def full(fd): raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="no space left"): lab.label("dog")
    assert len(lab.labels()) == 1 and lab.current == queue["path"].iloc[1]


def test_a_line_that_was_cut_off_is_forgiven_and_nothing_else(queue, tmp_path):
    lab, file = labeller(queue, tmp_path), tmp_path / "labels.csv"
    lab.label("cat"), lab.label("dog")
    file.write_bytes(file.read_bytes()[:-30])
    again = labeller(queue, tmp_path)
    assert len(again.labels()) == 1
    again.label("dog"), again.label("cat")
    assert read_labels(file)["label"].tolist() == ["cat", "dog", "cat"]
    for text in ("path,label\na.jpg,cat\n", "at;by;act;label;path;sha256\n"):
        file.write_text(text)
        with pytest.raises(InputError, match="left as it is"): labeller(queue, tmp_path)
        assert file.read_text() == text
    with pytest.raises(InputError, match="none at"): read_labels(tmp_path / "nothing.csv")


def test_two_people_and_two_queues_share_a_file(queue, tmp_path):
    ada, ben = labeller(queue, tmp_path), labeller(queue, tmp_path, by="ben")
    ada.label("cat"), ben.label("dog"), ada.label("dog")
    rest = labeller(queue.iloc[3:], tmp_path)
    assert not len(rest.labels())
    with pytest.raises(InputError, match="to take back"): rest.undo()
    assert read_labels(tmp_path / "labels.csv").groupby("by")["label"].agg(list).to_dict() == {"ada": ["cat", "dog"], "ben": ["dog"]}


def test_the_same_contents_are_asked_once_and_known_by_their_contents(pets, tmp_path):
    shutil.copy(pets / "cat" / "0.jpg", pets / "dog" / "copy.jpg")
    lab = labeller(sorted(pets.rglob("*.jpg")), tmp_path)
    assert "of 6" in repr(lab)
    lab.label("cat")
    shutil.move(pets, tmp_path / "moved")
    assert len(labeller(sorted((tmp_path / "moved").rglob("*.jpg")), tmp_path).labels()) == 1


def test_a_picture_that_vanished_or_is_broken_is_shown_as_such_and_skipped(queue, tmp_path):
    from dlpipe_nb.collection import _labeller_heard, _labeller_page, _labeller_state
    Path(queue["path"].iloc[0]).unlink()
    Path(queue["path"].iloc[1]).write_bytes(b"broken")
    lab = labeller(queue, tmp_path)
    lab._view = _labeller_page(lab)
    for _ in range(2):
        state = _labeller_state(lab)
        assert not state["src"] and "can’t be shown" in state["why"]
        _labeller_heard(lab, lab._view, dict(act="label", label="cat", key=state["key"]), [])
        assert "skip it" in lab._view.state["message"] and lab._view.state["k"] == state["k"]
        _labeller_heard(lab, lab._view, dict(act="skip", label="", key=state["key"]), [])
    assert _labeller_state(lab)["src"].startswith("data:image/jpeg;base64,") and _labeller_state(lab)["skipped"] == 2


def test_what_the_page_sends_and_shows(queue, tmp_path):
    from dlpipe_nb.collection import _labeller_heard
    lab = labeller(queue, tmp_path)
    lab._repr_mimebundle_()
    page = lab._view
    stale = dict(act="label", label="cat", key=page.state["key"])
    _labeller_heard(lab, page, stale, [])
    _labeller_heard(lab, page, stale, [])                     # a key pressed twice: the second is for a picture that has gone
    assert page.state["k"] == 1 and page.state["counts"] == [1, 0] and "is cat" in page.state["message"]
    _labeller_heard(lab, page, dict(act="undo", label="", key="anything"), [])
    _labeller_heard(lab, page, dict(act="undo", label="", key=""), [])
    assert page.state["k"] == 0 and page.state["bad"] and "to take back" in page.state["message"]
    (tmp_path / "labels.csv").unlink()
    (tmp_path / "labels.csv").mkdir()
    _labeller_heard(lab, page, dict(act="label", label="cat", key=page.state["key"]), [])
    assert page.state["bad"] and "can be written" in page.state["message"] and page.state["k"] == 0


@pytest.mark.parametrize("labels, keys", [(("cat", "dog"), {"1": "cat", "2": "dog", "c": "cat", "d": "dog", "ArrowLeft": "cat", "ArrowRight": "dog"}),
                                          (("mug", "Glass", "Giraffe"), {"1": "mug", "2": "Glass", "3": "Giraffe", "m": "mug"}),
                                          (("unicorn", "snake"), {"1": "unicorn", "2": "snake", "ArrowLeft": "unicorn", "ArrowRight": "snake"})])
def test_keys_are_free_and_different(labels, keys):
    from dlpipe_nb.collection import _keys
    got = _keys(labels)
    assert {k: v[1] for k, v in got.items() if v[0] == "label"} == keys and got["u"][0] == "undo" and got["s"][0] == "skip"


def test_labels_become_a_manifest_and_a_source(pets, tmp_path):
    df = pictures_in(pets)
    assert list(df.columns) == COLUMNS and set(df["label"]) == {""} and len(df) == 6
    lab = labeller(df, tmp_path)
    for label in ("cat", "dog", "cat"): lab.label(label)
    lab.skip()
    made = apply_labels(df, lab.labels())
    assert made["label"].tolist() == ["cat", "dog", "cat"] and made["path"].tolist() == df["path"].tolist()[:3]
    given = collect(pets).manifest
    assert apply_labels(given, lab.labels())["label"].tolist() == ["cat", "dog", "cat", "dog", "dog", "dog"]
    got = collect(tmp_path / "labels.csv")
    assert got.manifest["label"].tolist() == ["cat", "dog", "cat"] and got.skipped["reason"].tolist() == ["no label in its row"]
    other = labeller(df, tmp_path, by="ben")
    other.label("dog")
    with pytest.raises(InputError, match="1 with two"): apply_labels(df, read_labels(tmp_path / "labels.csv"))
    with pytest.raises(InputError, match="none of them"): apply_labels(df, lab.labels().head(1).assign(sha256="0"*64))
    with pytest.raises(InputError, match="none at"): pictures_in(tmp_path / "nowhere")


# ---- agreement, cost

def said(labels): return pd.DataFrame(dict(path=[f"{i}.jpg" for i in range(len(labels))], sha256=[f"{i:064}" for i in range(len(labels))], label=labels))


@pytest.mark.parametrize("seed", range(3))
def test_kappa_is_scikit_learns(seed):
    from sklearn.metrics import cohen_kappa_score
    dice = np.random.default_rng(seed)
    a = dice.choice(["cat", "dog", "fox"], 90, p=[.7, .2, .1])
    b = np.where(dice.random(90) < .7, a, dice.choice(["cat", "dog", "fox"], 90))
    got = agreement(said(a), said(b))
    assert got.kappa == pytest.approx(cohen_kappa_score(a, b)) and got.agree == pytest.approx((a == b).mean())
    assert got.low < got.kappa < got.high and got.table.to_numpy().sum() == 90 and len(got.differ) == (a != b).sum()


def test_the_interval_of_kappa_covers_the_truth_about_as_often_as_it_says():
    hits, truth = 0, (.85 - .5)/.5
    for seed in range(60):
        dice = np.random.default_rng(seed)
        a = dice.choice(["cat", "dog"], 150)
        b = np.where(dice.random(150) < .85, a, np.where(a == "cat", "dog", "cat"))
        got = agreement(said(a), said(b), seed=seed)
        hits += got.low <= truth <= got.high
    assert 52 <= hits <= 60


def test_only_what_both_could_say_is_compared():
    got = agreement(said(["cat", "dog", "", "cat"]), said(["cat", "cat", "dog", ""]))
    assert got.pictures == 2 and got.differ["path"].tolist() == ["1.jpg"] and got.differ[["first", "second"]].values.tolist() == [["dog", "cat"]]
    changed = pd.concat([said(["cat", "dog"]), said(["dog", "dog"])])          # the first picture twice: the later word counts
    assert agreement(changed, said(["cat", "dog"])).table.to_numpy().tolist() == [[0, 0], [1, 1]]
    same = agreement(said(["cat"]*5), said(["cat"]*5))
    assert same.agree == 1 and np.isnan(same.kappa) and "nan" in repr(same)
    with pytest.raises(InputError, match="both have labelled"): agreement(said(["cat"]), said([""]).assign(label="dog", sha256="1"*64))
    with pytest.raises(InputError, match="no column label"): agreement(said(["cat"]), said(["cat"]).drop(columns="label"))


def test_what_labels_cost():
    one = label_cost(1800, seconds_each=2, wage_per_hour=20, pauses=0)
    assert (one.answers, one.hours, one.money, one.weeks) == (1800, 1, 20, 1/40)
    two = label_cost(1000, 3.6, 10, labellers=2, settle=.1, pauses=.25)
    assert two.answers == 2100 and two.hours == pytest.approx(2100*3.6/3600*1.25) and "2,100 answers" in repr(two)
    for wrong in (dict(n=0), dict(n=1.5), dict(n=10, seconds_each=-1), dict(n=10, wage_per_hour=float("nan")), dict(n=10, labellers=0)):
        with pytest.raises(InputError): label_cost(**wrong)


def test_pace_is_the_median_gap_of_each_person_without_pauses():
    at = ["2026-03-01T10:00:00.000+00:00", "2026-03-01T10:00:02.000+00:00", "2026-03-01T10:00:03+00:00", "2026-03-01T10:00:05.000+00:00",
          "2026-03-01T11:00:00.000+00:00"]
    assert pace(pd.DataFrame(dict(by=["a", "a", "b", "a", "a"], at=at))) == pytest.approx(2.5)
    assert np.isnan(pace(pd.DataFrame(dict(by=["a"], at=at[:1]))))


# ---- adding pictures

@pytest.fixture
def run(pets, tmp_path):
    run = Run(tmp_path / "runs" / "mine").ensure("problem")
    collect_into(run, pets)
    return run


def bytes_of(colour, kind="PNG", size=(30, 20)):
    import io
    Image.new("RGB", size, colour).save(out := io.BytesIO(), kind)
    return out.getvalue()


def test_added_pictures_are_stored_by_contents_and_counted_once(run, pets):
    before = (run / "manifest.csv").read_bytes()
    red, blue = bytes_of("red"), bytes_of("blue", "WEBP")
    items = [("../../evil name.png", red), ("IMG_1.jpg", blue), ("IMG_1.jpg", red), ("a.txt", b"hello"), ("b.png", b""), ("cut.png", red[:60]),
             ("phone.HEIC", b"\0\0\0\x24ftypheic" + b"\0"*40), pets / "dog" / "0.jpg", pets / "cat" / "0.jpg", pets / "gone.jpg", pets]
    got = add_pictures(run, items, "cat", by="ada")
    assert got["outcome"].tolist() == ["new", "new", "already there", *["refused"]*4, "conflict", "already there", "refused", "refused"]
    why = got["detail"].tolist()
    assert "not a picture" in why[3] and "0 bytes" in why[4] and "HEIC photo" in why[6] and "there as dog" in why[7] and "no such file" in why[9]
    df = run.manifest()
    new = df.tail(2)
    assert (run / "manifest.csv").read_bytes().startswith(before), "the rows that were there changed"
    assert [Path(p).name for p in new["path"]] == [f"{s}{x}" for s, x in zip(new["sha256"], (".png", ".webp"))]
    assert all(Path(p).read_bytes() in (red, blue) and Path(p).resolve().parent == run / "pictures" / "cat" for p in new["path"])
    assert new[["label", "split", "width", "height", "source"]].values.tolist() == [["cat", "", 30, 20, "added by ada"]]*2
    assert not [p for p in run.path.parent.rglob("*evil*")] and "| added by ada | 2 |" in (run / "dataset_card.md").read_text()
    assert add_pictures(run, items[:2], "cat")["outcome"].tolist() == ["already there"]*2 and len(run.manifest()) == len(df)


def test_added_pictures_survive_collecting_again(run, pets):
    add_pictures(run, [("a.png", bytes_of("red"))], "dog")
    collect_into(run, pets)
    assert len(run.manifest()) == 7 and run.manifest()["source"].tolist()[-1] == "added"
    shutil.copy(next((run / "pictures" / "dog").iterdir()), pets / "dog" / "now here too.png")
    collect_into(run, pets)
    assert len(run.manifest()) == 7 and "added" not in set(run.manifest()["source"])


def test_added_pictures_on_a_split_run_wait_without_a_split(run, pets):
    run.save_manifest(run.manifest().assign(split="train"))
    run.write_json("seal.json", {})
    before = (run / "manifest.csv").read_bytes()
    add_pictures(run, [("a.png", bytes_of("red"))], "dog")
    assert run.manifest()["split"].tolist() == ["train"]*6 + [""] and (run / "manifest.csv").read_bytes().startswith(before)
    after = (run / "manifest.csv").read_bytes()
    collect_into(run, pets)
    assert (run / "manifest.csv").read_bytes() == after and "no split yet" in (run / "dataset_card.md").read_text()


def test_a_run_without_a_manifest_begins_one(tmp_path):
    run = Run(tmp_path / "fresh")
    for label, colour in (("mug", "red"), ("a/b: glass?", "blue")): add_pictures(run, [("x.png", bytes_of(colour))], label)
    df = run.manifest()
    assert list(df.columns) == COLUMNS and df["label"].tolist() == ["mug", "a/b: glass?"] and all(Path(p).is_file() for p in df["path"])
    assert {p.parent.parent.name for p in (run / "pictures").rglob("*.png")} == {"pictures"}


@pytest.mark.parametrize("label", ["unicorn", "", "  ", None, "cat\n"])
def test_a_label_outside_the_problem_is_refused_and_nothing_changes(run, label):
    before = sorted((p.as_posix(), p.stat().st_mtime_ns) for p in run.path.rglob("*"))
    with pytest.raises(InputError): add_pictures(run, [("a.png", bytes_of("red"))], label)
    assert sorted((p.as_posix(), p.stat().st_mtime_ns) for p in run.path.rglob("*")) == before


def test_collecting_labels_outside_the_problem_is_refused_and_nothing_changes(tmp_path, pets):
    run = Run(tmp_path / "runs" / "a").ensure("problem")
    picture(pets / "fox" / "1.jpg"), picture(pets / "wolf" / "1.jpg")
    before = sorted(p.as_posix() for p in tmp_path.rglob("*"))
    with pytest.raises(InputError, match="cat, dog; found fox, wolf"): collect_into(run, pets)
    run.write_json("problem.json", {"question": "?", "labels": ["mug", "glass"]})
    with pytest.raises(InputError, match="mug, glass; found cat, dog"): collect_into(run, "drawn", n=4)
    assert sorted(p.as_posix() for p in tmp_path.rglob("*")) == before


def test_the_adder_keeps_a_report_and_takes_files_in_parts(run):
    from dlpipe_nb.collection import _adder_heard
    adder = PictureAdder(run, by="ada")
    adder._repr_mimebundle_()
    page, sent = adder._view, []
    page.send = lambda content, buffers=None: sent.append(content)
    red, part = bytes_of("red", size=(300, 200)), 100
    parts = [red[i:i + part] for i in range(0, len(red), part)]
    _adder_heard(adder, page, dict(id="0", name="big.png", label="cat", failed="larger than 200 MB", last=False), [memoryview(b"")])
    for i, p in enumerate(parts):
        _adder_heard(adder, page, dict(id="1", name="a.png", label="cat", size=len(red), last=i == len(parts) - 1), [memoryview(p)])
    assert adder.report["outcome"].tolist() == ["refused", "new"] and "larger than 200 mb" in adder.report["detail"][0]
    assert page.state["message"] == "2 files: 1 refused, 1 new." and page.state["counts"] == [4, 3] and len(sent) == 1 + len(parts)
    assert len(page.state["thumbs"]["cat"]) == 1 and not adder._parts and not adder._batch and "1 refused" in repr(adder)
    _adder_heard(adder, page, dict(id="2", name="b.png", label="unicorn", size=1, last=True), [memoryview(b"x")])
    assert page.state["bad"] and "unicorn" in page.state["message"] and sent[-1] == {"got": "2"}
    with pytest.raises(InputError, match="unicorn"): PictureAdder(run, ("cat", "unicorn"))
    with pytest.raises(InputError, match="two labels"): PictureAdder(Run(run / "empty"))


# ---- the card

def test_the_card_names_the_gaps_that_a_count_can_show(pets):
    df = collect(pets).manifest
    many = pd.concat([df]*30, ignore_index=True)
    many["sha256"] = [f"{i:064x}" for i in range(len(many))]
    many["place"] = np.where(many["label"] == "cat", "sofa", "yard")
    many["hour"], many["age"] = "day", [np.nan]*9 + [3.5]*(len(many) - 9)
    many = many.drop(many.index[many["label"] == "dog"][:50]).reset_index(drop=True)
    card = dataset_card(many, "Pets", pd.DataFrame(dict(path=["x", "y"], reason=["not a picture"]*2)), labels=("cat", "dog", "fox"))
    for line in ("# Dataset card: Pets", "130 pictures: 90 cat, 40 dog", "| pets | 130 |", "- licence: not stated", "- consent: not stated",
                 "- no picture of fox", "- only 40 of dog", "2.2 times as many cat as dog", "`place` gives the label away: right in 100%",
                 "nearly always the same: `hour` (day)", "`age`: 6 of 130 missing", "- 2 files skipped: not a picture", content_hash(many)):
        assert line in card, line
    assert str(pets.parent) not in card
    told = dataset_card(many, licence="CC BY 4.0", consent="everybody signed")
    assert "Licence: CC BY 4.0." in told and "not stated" not in told.split("## Known gaps")[1]


def test_the_card_counts_contents_that_are_there_twice(pets):
    shutil.copy(pets / "cat" / "0.jpg", pets / "dog" / "same.jpg")
    card = dataset_card(collect(pets).manifest.assign(split=["train"]*4 + ["valid"]*2 + ["test"]))
    assert "1 pictures are there more than once" in card and "1 of them under two labels" in card
    assert "| label | train | valid | test | all |" in card


def test_small_sets_raise_no_false_alarm_of_shortcuts():
    from dlpipe_nb.collection import draw_factors
    for seed in range(3):
        df = draw_factors(60, seed).assign(path="a.jpg", split="", width=96, height=96, source="drawn")
        df["sha256"] = [f"{i:064x}" for i in range(60)]
        card = dataset_card(df)
        assert "gives the label away" not in card and "none needed" in card and "not stated" not in card.replace("made: not stated", "")


def test_the_cards_lie_in_the_run_and_beside_drawn_pictures_never_in_a_source(tmp_path, pets):
    (tmp_path / "data").mkdir()
    before = sorted(pets.rglob("*"))
    run = Run(tmp_path / "runs" / "a")
    collect_into(run, pets, licence="CC0", consent="asked")
    assert "Licence: CC0." in (run / "dataset_card.md").read_text() and sorted(pets.rglob("*")) == before
    add_pictures(run, [("a.png", bytes_of("red"))], "dog")
    collect_into(run, pets)
    assert "Licence: CC0." in (run / "dataset_card.md").read_text(), "the licence was forgotten"
    drawn = Run(tmp_path / "runs" / "b")
    for _ in range(2): collect_into(drawn, n=12, seed=2)
    assert (tmp_path / "data" / "drawn-12-seed2" / "dataset_card.md").read_text().startswith("# Dataset card: drawn-12-seed2")
    assert len(drawn.manifest()) == 12 and "6 cat, 6 dog" in (drawn / "dataset_card.md").read_text()


# ---- exercises 4 and 5

def _kappa(change):
    def answer(t):
        p = np.asarray(t)/np.sum(t)
        rows, cols, po = p.sum(1), p.sum(0), np.trace(p)
        return change(po, rows, cols)
    return answer


@pytest.mark.parametrize("answer, said", [
    (_kappa(lambda po, r, c: (po - (r*c).sum())/(1 - (r*c).sum())), "right"), (_kappa(lambda po, r, c: po), "take off what chance"),
    (_kappa(lambda po, r, c: (r*c).sum()), "agreement by chance"), (_kappa(lambda po, r, c: po - (r*c).sum()), "divide it by the most"),
    (_kappa(lambda po, r, c: (po - .5)/.5), "not one half"), (_kappa(lambda po, r, c: (po - (r*r).sum())/(1 - (r*r).sum())), "one person's shares"),
    (lambda t: (t[0, 0] + t[1, 1])/t.sum(), "take off"), (lambda t: "0.57", "one number"),
    (lambda t: 4/7, "for three"), (lambda t: .1, "say 0.100")])
def test_exercise_4_says_what_is_wrong(answer, said): assert said in check("02.4", answer).message


@pytest.mark.parametrize("answer, said", [
    (lambda b, s, w, k: int(b/(k*s/3600*w) + 1e-9), "right"), (lambda b, s, w, k: int(b/(s/3600*w)), "every one of them is paid"),
    (lambda b, s, w, k: round(b/(k*s/60*w), 2), "were minutes"), (lambda b, s, w, k: b/(k*s*w), "the wage is for an hour"),
    (lambda b, s, w, k: b/w, "hours of work"), (lambda b, s, w, k: int(-(-b//(k*s/3600*w))), "round down"),
    (lambda b, s, w, k: b/(k*s/3600*w), "whole number"), (lambda b, s, w, k: 7, "buys 1,019"), (lambda b, s, w, k: None, "None")])
def test_exercise_5_says_what_is_wrong(answer, said): assert said in check("02.5", answer).message
