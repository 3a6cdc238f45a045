"""The upload app, as a person uses it: JupyterLab and a real Chromium, buttons pressed, the store looked into.

The functions that a click calls are tested first, without a browser. Pictures of the page are left in the folder that
DLPIPE_SHOTS names, if it does. tests/app/lab.py starts both.
"""
from __future__ import annotations

from datetime import datetime

import pytest

from app.lab import HEAD, opened, saved, serving, shoot
from conftest import BLUE, GREY, RED, picture, sideways
from dlpipe_nb.core import InputError
from dlpipe_nb.inference import Predictor, Store

NASTY = "<b>schön & 'weird'</b> 猫.png"


@pytest.fixture
def app(tiny_bundle, tmp_path):
    from dlpipe_nb.app import ClassifierApp
    return ClassifierApp(Predictor(tiny_bundle), Store(tmp_path / "store.db"))


def sent(name, data):
    "A file as the browser's half of the upload widget sends it."
    return {"name": name, "type": "", "size": len(data), "content": memoryview(data), "last_modified": datetime.now()}


# ---- without a browser

def test_classify_shows_and_stores(app):
    shown = app.classify([("red.png", picture(RED)), ("blue.png", picture(BLUE)), ("grey.png", picture(GREY))])
    assert [s.prediction.label for s in shown[:2]] == ["cat", "dog"] and shown[2].prediction.unsure
    assert [s.id for s in app.results] == [s.id for s in shown]
    assert set(app.store.predictions()["id"]) == {s.id for s in shown}
    assert set(app.store.predictions()["source"]) == {"app"}


@pytest.mark.parametrize("data", [b"", b"no picture", picture()[:60], picture(kind="JPEG")[:-200]], ids=["empty", "text", "cut", "cut jpeg"])
def test_a_broken_file_says_so_and_harms_no_other(app, data):
    shown = app.classify([("good.png", picture()), ("bad.png", data), ("also good.png", picture(BLUE))])
    assert [bool(s.prediction.error) for s in shown] == [False, True, False]
    assert "1 of them can't be read" in app.message and "dlp-bad" in app._status.value
    assert "bad.png" in app._cards[shown[1].id].picture.value and not app._cards[shown[1].id].buttons


def test_the_same_picture_twice_is_one_card(app):
    a, b = app.classify([("one.png", picture()), ("two.png", picture())])
    assert a.id == b.id and len(app.results) == 1 and len(app._gallery.children) == 1
    app.say_wrong(a.id, "dog")
    app.classify([("three.png", picture())])
    assert len(app.results) == 1 and app.results[0].told == "dog"


def test_feedback_is_stored_and_the_buttons_follow(app):
    red, grey = app.classify([("red.png", picture(RED)), ("grey.png", picture(GREY))])
    offered = lambda s: [l for l, b in app._cards[s.id].buttons.items() if b.layout.display != "none"]
    assert offered(red) == ["dog"] and offered(grey) == ["cat", "dog"]
    app._cards[red.id].buttons["dog"].click()
    fb = app.store.feedback()
    assert fb[["prediction_id", "label"]].values.tolist() == [[red.id, "dog"]]
    assert offered(red) == ["cat"] and "stored" in app.message


def test_bad_choices_are_refused_and_leave_everything(app):
    red, = app.classify([("red.png", picture())])
    for id, label in [(red.id, "unicorn"), (10**6, "dog"), (None, "dog")]:
        with pytest.raises(InputError): app.say_wrong(id, label)
    assert len(app.store.feedback()) == 0 and app.results == [red]


def test_without_a_store_it_says_that_nothing_is_stored(tiny_bundle):
    from dlpipe_nb.app import ClassifierApp
    app = ClassifierApp(Predictor(tiny_bundle))
    red, = app.classify([("red.png", picture())])
    app.say_wrong(red.id, "dog")
    assert "this window only" in app.message and app.results[0].told == "dog"


def test_clear_empties_the_page_and_not_the_store(app):
    app.classify([("red.png", picture()), ("bad.png", b"")])
    app.clear()
    assert app.results == [] and app._gallery.children == () and app._table.value == "" and len(app.store.predictions()) == 2


def test_an_upload_is_read_and_not_kept(app):
    app._upload.value = (sent("red.png", picture()),)
    assert app._upload.value == () and app.results[0].prediction.label == "cat" and not app._upload.disabled


def test_what_a_handler_raises_is_shown(app):
    def broken(*args, **kwargs): raise RuntimeError("the disk is on fire")
    app.predictor.predict_many = broken
    app._upload.value = (sent("a.png", b"abc"),)
    assert "the disk is on fire" in app.message and not app._upload.disabled


def test_names_are_escaped(app):
    shown, = app.classify([(NASTY, picture())])
    for value in (app._cards[shown.id].picture.value, app._table.value, app._status.value): assert "<b>sch" not in value
    app.say_wrong(shown.id, "dog")
    assert "<b>sch" not in app._status.value


def test_the_gallery_is_bounded_and_the_history_is_not(app):
    from dlpipe_nb.app import MAX_CARDS
    app.classify([(f"{i}.png", picture((200, 40, i))) for i in range(MAX_CARDS + 3)])
    assert len(app._gallery.children) == MAX_CARDS == len(app._cards) and len(app.history) == MAX_CARDS + 3


def test_many_labels_get_a_list(tmp_path):
    from conftest import write_tiny_bundle
    from dlpipe_nb.app import ClassifierApp
    app = ClassifierApp(Predictor(write_tiny_bundle(tmp_path / "b", labels=tuple("abcdef"))), Store(tmp_path / "s.db"))
    shown, = app.classify([("red.png", picture())])
    picker = app._cards[shown.id].children[2].children[0]
    picker.value = "e"
    assert app.store.feedback()["label"].tolist() == ["e"]


# ---- in a browser

NOTEBOOK = HEAD + """\
from dlpipe_nb.app import ClassifierApp
from dlpipe_nb.inference import Predictor, Store
app = ClassifierApp(Predictor({bundle!r}), Store({store!r}))
app"""


@pytest.fixture(scope="module")
def lab(tiny_bundle, tmp_path_factory):
    home = tmp_path_factory.mktemp("lab")
    code = NOTEBOOK.format(bundle=str(tiny_bundle), store=str(home / "store.db"))
    with serving(home, {"app.ipynb": code}) as lab: yield lab


@pytest.fixture(scope="module")
def page(lab):
    with opened(lab, "app.ipynb", "button.widget-upload") as page: yield page


def upload(page, *paths):
    with page.expect_file_chooser() as chooser: page.get_by_role("button", name="Choose pictures").click()
    chooser.value.set_files([str(p) for p in paths])


def card(page, name): return page.locator(".dlp-card", has=page.locator(f'.dlp-name:text-is("{name}")'))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    "Pictures to upload: red, blue, unsure, sideways, one with a nasty name, and one that is broken."
    folder = tmp_path_factory.mktemp("uploads")
    contents = {"red.png": picture(RED, (300, 200)), "blue.jpg": picture(BLUE, (200, 300), "JPEG"), "grey.png": picture(GREY),
                "sideways.jpg": sideways((300, 120)), "broken.png": b"\x89PNG\r\n\x1a\nthis is no picture",
                NASTY.replace("/", "∕"): picture((220, 60, 40), (200, 200))}
    for name, data in contents.items(): (folder / name).write_bytes(data)
    return {name: folder / name for name in contents}


@pytest.mark.timeout(240)
def test_a_person_uploads_looks_and_corrects(page, lab, files):
    store = Store(lab.home / "store.db")
    shoot(page, "1 empty")

    upload(page, files["red.png"], files["blue.jpg"], files["broken.png"], files["sideways.jpg"])
    card(page, "red.png").get_by_text("A cat", exact=True).wait_for()
    card(page, "blue.jpg").get_by_text("A dog", exact=True).wait_for()
    assert "can't be read" in card(page, "broken.png").inner_text().lower()
    assert "replace the file" in card(page, "broken.png").inner_text()
    assert "1 of them can't be read" in page.get_by_role("status").inner_text()
    w, h = card(page, "sideways.jpg").locator("img").evaluate("i => [i.naturalWidth, i.naturalHeight]")
    assert h > w, "the sideways picture wasn't turned upright"
    assert card(page, "broken.png").get_by_role("button").count() == 0
    shoot(page, "2 four pictures")

    button = card(page, "red.png").get_by_role("button", name="It is a dog")
    assert button.get_attribute("title") == "red.png is a dog"
    button.click()
    card(page, "red.png").get_by_text("You said:").wait_for()
    fb, said = store.feedback(), store.predictions()
    assert fb["label"].tolist() == ["dog"]
    assert said.loc[said["id"] == fb["prediction_id"][0], "name"].tolist() == ["red.png"]

    nasty = next(p for n, p in files.items() if n.startswith("<"))
    upload(page, files["grey.png"], nasty)
    card(page, "grey.png").get_by_text("Unsure").wait_for()
    assert card(page, "grey.png").get_by_role("button").count() == 2
    assert page.locator(".dlp-name b").count() == 0, "a file's name became part of the page"
    assert page.locator(".dlp-history tr").count() == 1 + 6
    shoot(page, "3 six pictures")
    page.locator(".dlp-history").scroll_into_view_if_needed()
    shoot(page, "4 history")


@pytest.mark.timeout(120)
def test_the_page_fits_a_phone(page):
    page.set_viewport_size({"width": 390, "height": 844})
    page.locator("#jp-main-content-panel, .jp-Notebook").first.wait_for()
    page.wait_for_timeout(500)
    shoot(page, "5 phone")
    app = page.locator(".dlp-app")
    assert app.evaluate("e => e.scrollWidth <= e.clientWidth + 1"), "the app is wider than the window"
    page.set_viewport_size({"width": 1280, "height": 1000})


@pytest.mark.timeout(120)
def test_nothing_uploaded_is_saved_in_the_notebook(page, lab):
    text = saved(page, lab, "app.ipynb")
    assert "red.png" not in text and "base64" not in text and "widget-state+json" not in text and len(text) < 20_000


@pytest.mark.timeout(120)
def test_clear_by_keyboard(page, lab):
    page.get_by_role("button", name="Clear").focus()
    page.keyboard.press("Enter")
    page.get_by_text("Cleared.").wait_for()
    assert page.locator(".dlp-card").count() == 0
    assert len(Store(lab.home / "store.db").predictions()) == 6
