"""Chapter 06's relabeller as a person uses it: a real Chromium, keys and buttons pressed, and the manifest looked into.

What a click calls is tested without a browser in tests/code/test_label_errors.py.
"""
from __future__ import annotations

import csv

import pandas as pd
import pytest
from app.lab import HEAD, opened, saved, serving, shoot

from conftest import picture
from dlpipe_nb.collection import read_labels
from dlpipe_nb.core import Run, sha256_of
from dlpipe_nb.evaluation import relabel_into
from dlpipe_nb.problem import define_into

WIDGET = """
from dlpipe_nb.core import Run
from dlpipe_nb.evaluation import Relabeller, relabel_into
run = Run("run")
errors = run.manifest("label_errors.csv")
who = Relabeller(errors, ("cat", "dog", "fox"), "decisions.csv", by="ada")
who"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    home = tmp_path_factory.mktemp("lab")
    folder = home / "work" / "pictures"
    folder.mkdir(parents=True)
    rows = []
    for i in range(6):
        file = folder / f"{i}.png"
        file.write_bytes(picture((30 * i, 90, 200 - 20 * i), (320, 240)) if i != 4 else b"no picture at all")
        rows.append((str(file), ("cat", "dog")[i % 2], ("dog", "cat")[i % 2], sha256_of(file)))
    run = Run(home / "work" / "run")
    define_into(run, labels=("cat", "dog", "fox"))
    df = pd.DataFrame(rows, columns=["path", "label", "suggested", "sha256"]).assign(split="train", score=.1, flagged=True)
    run.save_manifest(df, "label_errors.csv")
    run.save_manifest(df[["path", "label", "split", "sha256"]].assign(width=320, height=240, source="made up"))
    with serving(home, {"relabel.ipynb": [HEAD + WIDGET, "# apply below"]}) as lab: yield lab


def decisions(lab):
    with open(lab.home / "work" / "decisions.csv", newline="") as f: return [(r["act"], r["label"]) for r in csv.DictReader(f)]


def wait_for(page, text): page.locator(".dlp").get_by_text(text, exact=True).wait_for()


@pytest.mark.timeout(240)
def test_keep_change_cant_say_undo_and_the_manifest_follows(lab):
    with opened(lab, "relabel.ipynb", ".dlp .stage img") as page:
        box = page.get_by_role("group", name="Check labels")
        wait_for(page, "0 of 6 · ada")
        wait_for(page, "It is labelled “cat”. Could it be “dog”?")
        assert "0.png" not in box.inner_text()
        assert box.get_by_role("button", name="Undo the last decision").get_attribute("aria-disabled") == "true"
        shoot(page, "relabeller 1 begin")

        box.get_by_role("button", name="Change to: dog").click()
        wait_for(page, "1 of 6 · ada")
        wait_for(page, "It is labelled “dog”. Could it be “cat”?")
        page.keyboard.press("k")
        wait_for(page, "2 of 6 · ada")
        box.get_by_role("button", name="No, it is: fox").click()
        wait_for(page, "3 of 6 · ada")
        page.keyboard.press("c")
        wait_for(page, "1 kept · 3 changed · 0 can’t say")
        assert "can’t be shown" in box.locator(".why").inner_text()
        page.keyboard.press("k")                                  # nobody can judge what can't be seen
        box.get_by_text("It can’t be seen").wait_for()
        shoot(page, "relabeller 2 unreadable")
        page.keyboard.press("s")
        wait_for(page, "5 of 6 · ada")
        page.keyboard.press("u")
        page.keyboard.press("Backspace")
        wait_for(page, "1 kept · 2 changed · 0 can’t say")
        for key, k in (("k", 4), ("s", 5), ("c", 6)):
            page.keyboard.press(key)
            wait_for(page, f"{k} of 6 · ada")
        wait_for(page, "All done. Thank you!")
        wait_for(page, "2 kept · 3 changed · 1 can’t say")
        shoot(page, "relabeller 3 done")
        assert decisions(lab) == [("label", "dog"), ("label", "dog"), ("label", "fox"), ("label", "cat"), ("skip", ""), ("undo", ""),
                                  ("undo", ""), ("label", "dog"), ("skip", ""), ("label", "cat")]
        for key in ("x", "a", "d", "d"): page.keyboard.press(key)  # JupyterLab's own keys
        assert page.locator(".jp-Notebook .jp-Cell").count() == 2, "a key reached the notebook"
        text = saved(page, lab, "relabel.ipynb")
        assert "base64" not in text and len(text) < 20_000

        page.reload()                                             # the page goes, the kernel stays
        page.locator(".dlp .stage").wait_for()
        wait_for(page, "6 of 6 · ada")

    run = Run(lab.home / "work" / "run")
    said = read_labels(lab.home / "work" / "decisions.csv")
    assert len(relabel_into(run, said)) == 3
    assert run.manifest()["label"].tolist() == ["dog", "dog", "fox", "dog", "cat", "cat"]
    relabel_into(run, said.iloc[:0])
    assert run.manifest()["label"].tolist() == ["cat", "dog"] * 3


@pytest.mark.timeout(120)
def test_the_relabeller_fits_a_phone(lab):
    (lab.home / "work" / "decisions.csv").unlink(missing_ok=True)
    with opened(lab, "relabel.ipynb", ".dlp .stage img", size=(390, 844)) as page:
        page.wait_for_timeout(300)
        box = page.locator(".dlp")
        shoot(page, "relabeller 4 phone")
        assert box.evaluate("e => e.scrollWidth <= e.clientWidth + 1"), "the relabeller is wider than the window"
        assert all(b.bounding_box()["height"] >= 44 for b in box.get_by_role("button").all())
