"""The two widgets of chapter 02 as a person uses them: a real Chromium, keys and buttons pressed, the files looked into.

What a click calls is tested without a browser in tests/code/test_collection.py.
"""
from __future__ import annotations

import csv

import pytest
from app.lab import HEAD, opened, saved, serving, shoot, show

from conftest import BLUE, GREY, RED, picture
from dlpipe_nb.collection import read_labels
from dlpipe_nb.core import Run

LABELLER = """
from pathlib import Path
from dlpipe_nb.collection import Labeller
lab = Labeller(sorted(Path("pictures").iterdir()), ("cat", "dog"), "labels.csv", by="ada")
lab"""
ADDER = """
from dlpipe_nb.collection import PictureAdder
from dlpipe_nb.core import Run
adder = PictureAdder(Run("run").ensure("problem"), by="ada")
adder"""
NASTY = "<b>bold & 'odd'</b>.png"


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    home = tmp_path_factory.mktemp("lab")
    folder = home / "work" / "pictures"
    folder.mkdir(parents=True)
    for i in range(8): (folder / f"{i}.png").write_bytes(picture((20*i, 90, 200 - 20*i), (320, 240)))
    (folder / "3.png").write_bytes(b"no picture at all")
    with serving(home, {"label.ipynb": [HEAD + LABELLER, "# a second cell\n1 + 1"], "add.ipynb": HEAD + ADDER}) as lab: yield lab


def lines(lab):
    with open(lab.home / "work" / "labels.csv", newline="") as f: return [(r["act"], r["label"], r["path"]) for r in csv.DictReader(f)]


def wait_for(page, text): page.locator(".dlp").get_by_text(text, exact=True).wait_for()


@pytest.mark.timeout(240)
def test_label_five_undo_one_reload_resume(lab):
    with opened(lab, "label.ipynb", ".dlp .stage img") as page:
        box = page.get_by_role("group", name="Label pictures")
        wait_for(page, "0 of 8 · ada")
        assert box.get_by_role("button", name="Undo the last answer").get_attribute("aria-disabled") == "true"
        assert "0.png" not in box.inner_text(), "a file's name may give its label away"
        shoot(page, "labeller 1 begin")

        box.get_by_role("button", name="It is: cat").click()
        wait_for(page, "1 of 8 · ada")
        page.keyboard.press("2")                                 # the button has the focus: keys go on from there
        wait_for(page, "2 of 8 · ada")
        page.keyboard.press("c")
        wait_for(page, "3 of 8 · ada")

        assert "can’t be shown" in box.locator(".why").inner_text() and "3.png" in box.inner_text()
        page.keyboard.press("1")                                 # nobody can label what can't be seen ...
        shoot(page, "labeller 2 unreadable")
        box.get_by_role("button", name="Can’t say").click()      # ... but it stops nothing
        wait_for(page, "4 of 8 · ada")
        page.keyboard.press("ArrowRight")
        wait_for(page, "5 of 8 · ada")
        page.keyboard.press("d")
        wait_for(page, "6 of 8 · ada")
        page.keyboard.press("u")
        wait_for(page, "5 of 8 · ada")
        wait_for(page, "2 cat · 2 dog · 1 can’t say")
        assert lines(lab) == [("label", "cat", "pictures/0.png"), ("label", "dog", "pictures/1.png"), ("label", "cat", "pictures/2.png"),
                              ("skip", "", "pictures/3.png"), ("label", "dog", "pictures/4.png"), ("label", "dog", "pictures/5.png"),
                              ("undo", "", "pictures/5.png")]
        shoot(page, "labeller 3 five")

        for key in ("x", "a", "b", "z"): page.keyboard.press(key)    # JupyterLab's keys for cutting and adding cells
        for k in (6, 7):                                             # and "d" twice would delete one: here it is two dogs
            page.keyboard.press("d")
            wait_for(page, f"{k} of 8 · ada")
        assert page.locator(".jp-Notebook .jp-Cell").count() == 2, "a key reached the notebook"
        for left in (6, 5):
            page.keyboard.press("Backspace")
            wait_for(page, f"{left} of 8 · ada")

        text = saved(page, lab, "label.ipynb")
        assert "base64" not in text and "widget-state+json" not in text and len(text) < 20_000
        before = read_labels(lab.home / "work" / "labels.csv")["label"].tolist()
        assert before == ["cat", "dog", "cat", "", "dog"]

        page.reload()                                            # the page goes, the kernel stays
        page.locator(".dlp .stage").wait_for()
        wait_for(page, "5 of 8 · ada")
        assert "Last: 4.png is dog" in page.locator(".dlp").inner_text()

        _new_kernel(page)                                        # and now the kernel goes too
        show(page, lab, "label.ipynb", ".dlp .stage img")
        wait_for(page, "5 of 8 · ada")
        page.locator(".dlp").focus()
        for k, key in enumerate(("2", "1", "c"), 6):
            page.keyboard.press(key)
            wait_for(page, f"{k} of 8 · ada")
        wait_for(page, "All done. Thank you!")
        assert read_labels(lab.home / "work" / "labels.csv")["label"].tolist() == [*before, "dog", "cat", "cat"]
        shoot(page, "labeller 4 done")
        page.keyboard.press("u")
        wait_for(page, "7 of 8 · ada")


def _new_kernel(page):
    page.get_by_role("menuitem", name="Kernel", exact=True).click()
    page.locator('[data-command="kernelmenu:restart"]').click()
    page.locator(".jp-Dialog button.jp-mod-accept").click()
    page.get_by_text("| Idle").wait_for(timeout=60_000)


@pytest.mark.timeout(120)
def test_the_labeller_fits_a_phone(lab):
    with opened(lab, "label.ipynb", ".dlp .stage img", size=(390, 844)) as page:
        page.wait_for_timeout(300)
        box = page.locator(".dlp")
        shoot(page, "labeller 5 phone")
        assert box.evaluate("e => e.scrollWidth <= e.clientWidth + 1"), "the labeller is wider than the window"
        assert all(b.bounding_box()["height"] >= 44 for b in box.get_by_role("button").all())


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    "Pictures to add: two good ones, a copy, a text, a HEIC, a cut one, a large one, and one with a nasty name."
    import numpy as np
    folder = tmp_path_factory.mktemp("uploads")
    noise = np.random.default_rng(0).integers(0, 255, (1400, 1700, 3), np.uint8)
    from PIL import Image
    Image.fromarray(noise).save(folder / "large.png")            # more than a notebook's connection takes at once
    assert (folder / "large.png").stat().st_size > 5_000_000
    contents = {"red.png": picture(RED), "again.png": picture(RED), "blue.jpg": picture(BLUE, kind="JPEG"), "notes.jpg": b"Buy cat food.",
                "phone.HEIC": b"\0\0\0\x24ftypheic\0\0\0\0mif1heic" + b"\0"*40, "cut.png": (folder / "large.png").read_bytes()[:5000],
                NASTY.replace("/", "∕"): picture(GREY)}
    for name, data in contents.items(): (folder / name).write_bytes(data)
    return {p.name: p for p in folder.iterdir()}


def choose(page, label, *paths):
    with page.expect_file_chooser() as chooser: page.get_by_role("button", name=f"Choose pictures of: {label}").click()
    chooser.value.set_files([str(p) for p in paths])


@pytest.mark.timeout(240)
def test_a_person_adds_pictures(lab, files):
    run = Run(lab.home / "work" / "run")
    with opened(lab, "add.ipynb", ".dlp .zone") as page:
        box = page.get_by_role("group", name="Add pictures")
        shoot(page, "adder 1 empty")
        nasty = next(p for n, p in files.items() if n.startswith("<"))
        choose(page, "cat", *(files[n] for n in ("red.png", "again.png", "notes.jpg", "phone.HEIC", "cut.png", "large.png")), nasty)
        box.get_by_text("7 files: 3 new, 3 refused, 1 already there.").wait_for()
        box.get_by_text("3 in this run").wait_for()
        told = dict(zip(("name", "why"), (box.locator("li b").all_inner_texts(), box.locator("li .dim").all_inner_texts())))
        assert "phone.HEIC: refused" in told["name"] and any("HEIC photo" in w for w in told["why"])
        assert "again.png: already there" in told["name"] and "notes.jpg: refused" in told["name"]
        assert box.locator("li b b").count() == 0, "a file's name became part of the page"
        assert box.locator(".thumbs img").count() == 3

        choose(page, "dog", files["blue.jpg"], files["red.png"])
        box.get_by_text("2 files: 1 new, 1 conflict.").wait_for()
        assert "the same bytes are there as cat" in box.inner_text()
        shoot(page, "adder 2 added")

        zone = box.locator(".zone").nth(1)
        drop(page, zone, "green.png", picture((20, 200, 40)))
        box.get_by_text("1 file: 1 new.").wait_for()

        page.set_viewport_size({"width": 390, "height": 844})
        page.wait_for_timeout(400)
        shoot(page, "adder 3 phone")
        assert box.evaluate("e => e.scrollWidth <= e.clientWidth + 1"), "the page is wider than the window"
        assert "base64" not in saved(page, lab, "add.ipynb")
    df = run.manifest()
    assert df["label"].tolist() == ["cat", "cat", "cat", "dog", "dog"] and set(df["source"]) == {"added by ada"}
    assert {files["large.png"].stat().st_size} <= {p.stat().st_size for p in (run / "pictures" / "cat").iterdir()}
    assert sorted(p.suffix for p in (run / "pictures").rglob("*.*")) == [".jpg", ".png", ".png", ".png", ".png"]


def drop(page, zone, name, data):
    "Drop a file on a zone, as a mouse would."
    parts = page.evaluate_handle("""([name, data]) => {
        const d = new DataTransfer();
        d.items.add(new File([new Uint8Array(data)], name, { type: "image/png" }));
        return d; }""", [name, list(data)])
    for kind in ("dragenter", "dragover", "drop"): zone.dispatch_event(kind, {"dataTransfer": parts})
