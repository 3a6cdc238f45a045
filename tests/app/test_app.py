"""The upload app, as a person uses it: JupyterLab, Voilà and a real Chromium, buttons pressed, the store looked into.

The functions that a click calls are tested first, without a browser. Pictures of the page are left in the folder that
DLPIPE_SHOTS names, if it does. tests/app/lab.py starts JupyterLab; `dlpipe app` starts Voilà.
"""
from __future__ import annotations

import base64
import html
import io
import os
import re
import signal
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zlib
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from app.lab import ARGS, CHROMIUM, HEAD, free_port, saved, serving, shoot, show
from conftest import BLUE, GREY, RED, ROOT, picture, sideways, write_tiny_bundle
from dlpipe_nb.core import InputError, check
from dlpipe_nb.inference import Predictor, Store

NASTY = "<b>schön & 'weird'</b> 猫.png"


@pytest.fixture
def app(tiny_bundle, tmp_path):
    from dlpipe_nb.app import ClassifierApp
    return heard(ClassifierApp(Predictor(tiny_bundle), Store(tmp_path / "store.db")))


def heard(app):
    "The app, with a list `sent` of what it sends to its page."
    app.sent = []
    app.view.send = lambda message, buffers=None: app.sent.append((message, buffers))
    return app


def state(app): return [m["state"] for m, _ in app.sent if "state" in m][-1]


def arrives(app, name, data, parts=1, last=True, note="", size=None):
    "A file as the browser's half sends it."
    step = max(1, -(-len(data) // parts))
    for at in range(0, max(1, len(data)), step):
        whole = at + step >= len(data)
        app._heard(dict(act="part", file=name, name=name, size=len(data) if size is None else size, note=note, last=last and whole),
                   [memoryview(data[at:at + step])])


# ---- without a browser

def test_classify_shows_and_stores(app):
    shown = app.classify([("red.png", picture(RED)), ("blue.png", picture(BLUE)), ("grey.png", picture(GREY))])
    assert [s.prediction.label for s in shown[:2]] == ["cat", "dog"] and shown[2].prediction.unsure
    assert [s.id for s in app.results] == [s.id for s in shown] == [c["id"] for c in state(app)["cards"]]
    assert set(app.store.predictions()["id"]) == {s.id for s in shown}
    assert set(app.store.predictions()["source"]) == {"app"}
    assert app.message == "3 pictures looked at. red.png: a cat. blue.png: a dog. grey.png: unsure, perhaps a cat."


def bomb():
    "A file of 50 kB that claims 400 million pixels."
    row = zlib.compress(bytes(2501) * 20_000)
    part = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return (b"\x89PNG\r\n\x1a\n" + part(b"IHDR", struct.pack(">IIBBBBB", 20_000, 20_000, 1, 0, 0, 0, 0)) + part(b"IDAT", row)
            + part(b"IEND", b""))


HEIC = b"\0\0\0\x24ftypheic\0\0\0\0mif1heic" + b"\0" * 40
BROKEN = {"empty.jpg": (b"", "not a picture"), "text.jpg": (b"Buy cat food.", "not a picture"), "cut.png": (picture()[:60], ""),
          "cut.jpg": (picture(kind="JPEG", size=(400, 300))[:-700], ""), "photo.heic": (HEIC, "HEIC photo"), "bomb.png": (bomb(), "million pixels"),
          "page.png": (b"<html><script>alert(1)</script>", "not a picture")}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_says_so_and_harms_no_other(app, name):
    data, said = BROKEN[name]
    shown = app.classify([("good.png", picture()), (name, data), ("also good.png", picture(BLUE))])
    assert [bool(s.prediction.error) for s in shown] == [False, True, False]
    assert "1 of them can't be read" in app.message and app.bad
    card = state(app)["cards"][1]
    assert card["name"] == name and said in card["error"] and "Next:" in card["error"] and card["bars"] == []


def test_the_same_picture_twice_is_one_card(app):
    a, b = app.classify([("one.png", picture()), ("two.png", picture())])
    assert a.id == b.id and len(app.results) == 1 == len(state(app)["cards"])
    app.say_wrong(a.id, "dog")
    app.classify([("three.png", picture())])
    assert len(app.results) == 1 and app.results[0].told == "dog"


def test_feedback_is_stored_and_the_page_follows(app):
    red, grey = app.classify([("red.png", picture(RED)), ("grey.png", picture(GREY))])
    believed = lambda: [c["believed"] for c in state(app)["cards"]]
    assert believed() == ["cat", ""]
    app._heard(dict(act="wrong", id=red.id, label="dog"), [])
    assert app.store.feedback()[["prediction_id", "label"]].values.tolist() == [[red.id, "dog"]]
    assert believed() == ["dog", ""] and "stored" in app.message and state(app)["cards"][0]["told"] == "a dog"


def test_bad_choices_are_refused_and_leave_everything(app):
    red, = app.classify([("red.png", picture())])
    for id, label in [(red.id, "unicorn"), (10**6, "dog"), (None, "dog"), (red.id, ["dog"])]:
        with pytest.raises(InputError): app.say_wrong(id, label)
        app._heard(dict(act="wrong", id=id, label=label), [])
        assert app.bad and "Expected" in app.message
    assert len(app.store.feedback()) == 0 and app.results == [red]


def test_without_a_store_it_says_that_nothing_is_stored(tiny_bundle):
    from dlpipe_nb.app import ClassifierApp
    app = ClassifierApp(Predictor(tiny_bundle))
    red, = app.classify([("red.png", picture())])
    app.say_wrong(red.id, "dog")
    assert "this window only" in app.message and app.results[0].told == "dog"
    again, blue = app.classify([("again.png", picture()), ("blue.png", picture(BLUE))])
    assert again.id == red.id and blue.id != red.id and len(app.results) == 2


def test_clear_empties_the_page_and_not_the_store(app):
    app.classify([("red.png", picture()), ("bad.png", b"")])
    app._heard(dict(act="clear"), [])
    assert app.results == [] and state(app)["cards"] == [] == state(app)["rows"] and len(app.store.predictions()) == 2


def test_a_file_in_parts_is_put_together_and_not_kept(app):
    data = picture(size=(300, 200))
    arrives(app, "red.png", data, parts=5, last=False)
    assert app.results == [] and len(app._whole) == 1, "it waits for the rest of the choice"
    arrives(app, "blue.png", picture(BLUE), note="scaled down")
    assert [s.prediction.name for s in app.results] == ["red.png", "blue.png"] and app.results[1].note == "scaled down"
    for i in range(9): arrives(app, f"{i}.png", picture((200, 0, i)), last=i == 8)
    assert app.message == "9 pictures looked at.", "one sentence for all that were chosen together"
    assert app.results[0].prediction.name == "8.png"
    del app.results[:9]
    assert app.results[0].prediction.sha256 == Predictor(app.predictor.path).predict(data).sha256, "the bytes came as they were"
    assert app._whole == [] and app._parts == {}
    answered = [m["got"] for m, _ in app.sent if "got" in m]
    assert answered[:6] == ["red.png"] * 5 + ["blue.png"] and len(answered) == 15, "every part gets its answer"


def test_what_is_left_half_sent_is_forgotten(app):
    for i in range(20): app._heard(dict(act="part", file=f"f{i}", name=f"{i}.png", size=10**6, note="", last=False), [b"x" * 1000])
    assert len(app._parts) <= 4
    for _ in range(3): app._heard(dict(act="part", file="liar", name="liar.png", size=10**9, note="", last=False), [bytes(30_000_000)])
    assert "at most 64 MB" in app.message and app.bad
    arrives(app, "red.png", picture())
    assert [s.prediction.name for s in app.results] == ["red.png"]


def test_what_the_browser_cannot_send_gets_a_card_and_a_record(app):
    app._heard(dict(act="part", file="f", name="raw.dng", last=True, failed="90 MB, and so on", next="save it as a JPEG"), [])
    assert "90 MB" in app.results[0].prediction.error and "save it as a JPEG" in app.results[0].prediction.error
    assert app.store.predictions()["name"].tolist() == ["raw.dng"]


def test_what_a_handler_raises_is_shown_and_answered(app):
    def broken(*args, **kwargs): raise RuntimeError("the disk is on fire")
    app.predictor.predict_many = broken
    arrives(app, "a.png", b"abc")
    assert "the disk is on fire" in app.message and app.bad and app.sent[-1][0] == {"got": "a.png"}
    app._heard(dict(act="dance"), [])
    assert "That went wrong" in app.message


def test_pictures_are_sent_once_and_whole_to_a_new_page(app):
    red, = app.classify([("red.png", picture())])
    app.classify([("blue.png", picture(BLUE)), ("bad.png", b"")])
    sent = [(m["pictures"], len(b)) for m, b in app.sent if "pictures" in m]
    assert [n for _, n in sent] == [1, 1] and sent[0][0] == [red.id]
    app._heard(dict(act="hello"), [])
    assert len(app.sent[-1][0]["pictures"]) == 2 and all(Image.open(io.BytesIO(b)) for b in app.sent[-1][1])


def test_nothing_is_in_the_widgets_state(app):
    app.classify([(NASTY, picture()), ("bad.png", b"")])
    text = str(app.view.get_state())
    assert "schön" not in text and "bad.png" not in text and len(text) < 60_000


def test_the_gallery_is_bounded_and_the_history_is_not(app):
    from dlpipe_nb.app import MAX_CARDS
    app.classify([(f"{i}.png", picture((200, 40, i))) for i in range(MAX_CARDS + 3)])
    assert len(state(app)["cards"]) == MAX_CARDS and len(app.history) == MAX_CARDS + 3 == state(app)["n"]


def test_uploads_of_ipywidgets_are_read():
    from dlpipe_nb.app import uploads
    assert uploads(({"name": "a.png", "content": memoryview(b"abc")},)) == [("a.png", b"abc")]


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.5", "", "::", "example.org"])
def test_other_addresses_need_a_token(tiny_bundle, host):
    from dlpipe_nb.app import serve
    for token in (None, "", "  "):
        with pytest.raises(InputError, match="token"): serve(tiny_bundle, host=host, token=token)


def test_serving_says_what_is_missing(tiny_bundle, tmp_path, monkeypatch):
    import socket
    from dlpipe_nb.app import serve
    with pytest.raises(InputError, match="bundle"): serve(tmp_path / "none")
    with pytest.raises(InputError, match="folder"): serve(tiny_bundle, store=tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as s, pytest.raises(InputError, match="port"):
        serve(tiny_bundle, port=s.getsockname()[1])
    monkeypatch.setitem(sys.modules, "voila.app", None)
    with pytest.raises(InputError, match=r"dlpipe_nb\[course\]"): serve(tiny_bundle, port=free_port())


# ---- the exercises

def contrast(one, other, linear=True, add=0.05, weights=(0.2126, 0.7152, 0.0722), ordered=True):
    line = lambda c: c if not linear else c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
    a, b = (sum(w * line(v / 255) for w, v in zip(weights, colour)) + add for colour in (one, other))
    return max(a, b) / max(min(a, b), 1e-9) if ordered else a / b


def guarded(catch=Exception, speak=lambda say, e: say(f"oh: {e}"), let=False):
    def make(work, say):
        def handler(event):
            try: work(event)
            except catch as e:
                speak(say, e)
                if let: raise
        return handler
    return make


def fitted(w, h, longest):
    k = min(1, longest / max(w, h))
    return max(1, round(k * w)), max(1, round(k * h))


def corrected(history, errors=False, confirmed=True, share=lambda wrong, h: wrong.groupby(h["answer"]).mean()):
    h = history if errors else history[history["error"] == ""]
    return share((h["told"] != "") & ((h["told"] != h["answer"]) | (not confirmed)), h).to_dict()


def of_those_told(wrong, h): return wrong[h["told"] != ""].groupby(h["answer"]).mean()


WRONG = [("11.1", lambda name: name, "as it went in"), ("11.1", lambda name: name.replace("&", "&amp;"), "still a <"),
         ("11.1", lambda name: html.escape(name, quote=False), "quotation mark"),
         ("11.1", lambda name: html.escape(name.replace("<", "&lt;")), "escaped twice"),
         ("11.1", lambda name: re.sub("[<>&'\"]", "", name), "not the file's name"), ("11.1", lambda name: name.encode(), "not bytes"),
         ("11.2", lambda h: corrected(h, confirmed=False), "no correction"),
         ("11.2", lambda h: corrected(h, share=lambda wrong, h: wrong.groupby(h["answer"]).sum()), "a count"),
         ("11.2", lambda h: corrected(h, share=lambda wrong, h: wrong.groupby(h["answer"]).sum() / len(h)), "not by all pictures"),
         ("11.2", lambda h: corrected(h, share=of_those_told), "nobody commented"), ("11.2", lambda h: 0.3, "dictionary"),
         ("11.2", lambda h: corrected(h) | {None: 0}, "leave them out"),
         ("11.3", lambda work, say: "done", "a function"), ("11.3", lambda work, say: [work(1), print][1], "at once"),
         ("11.3", lambda work, say: work, "leaves the handler"), ("11.3", guarded(let=True), "leaves the handler"),
         ("11.3", guarded(speak=lambda say, e: None), "vanishes"), ("11.3", guarded(speak=lambda say, e: say("oh")), "own words"),
         ("11.3", guarded(catch=BaseException), "too much"),
         ("11.4", lambda a, b: contrast(a, b, ordered=False), "lighter over"), ("11.4", lambda a, b: contrast(a, b, add=0), "0.05"),
         ("11.4", lambda a, b: contrast(a, b, linear=False), "linear"),
         ("11.4", lambda a, b: contrast(a, b, weights=(1/3, 1/3, 1/3)), "count alike"),
         ("11.5", lambda w, h, l: w * l / max(w, h), "two whole numbers"),
         ("11.5", lambda w, h, l: (w * l / max(w, h), h * l / max(w, h)), "whole numbers"),
         ("11.5", lambda w, h, l: (round(w * l / max(w, h)), round(h * l / max(w, h))), "small enough"),
         ("11.5", lambda w, h, l: (min(w, l), min(h, l)), "same factor"),
         ("11.5", lambda w, h, l: fitted(w, h, l * w // max(w, h)) if h < w else (min(w, l), round(h * min(1, l / w))), "longer"),
         ("11.5", lambda w, h, l: tuple(round(min(1, l / max(w, h)) * n) for n in (w, h)), "keep at least one")]


@pytest.mark.parametrize("exercise, answer, said", WRONG)
def test_an_exercise_says_what_is_wrong(exercise, answer, said):
    got = check(exercise, answer)
    assert got.passed is False and said in got.message, got


@pytest.mark.parametrize("exercise, answer", [("11.1", html.escape), ("11.2", corrected), ("11.3", guarded()), ("11.4", contrast), ("11.5", fitted)])
def test_an_exercise_knows_what_is_right(exercise, answer): assert check(exercise, answer).passed and check(exercise, None).passed is None


# ---- in a browser

NOTEBOOK = HEAD + """\
from dlpipe_nb.app import ClassifierApp
from dlpipe_nb.inference import Predictor, Store
app = ClassifierApp(Predictor({bundle!r}), Store({store!r}))
app"""
FAKE_CAMERA = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]


@pytest.fixture(scope="module")
def lab(tiny_bundle, tmp_path_factory):
    "JupyterLab that saves the widgets' state with the notebook: so the test of what is saved means something."
    home = tmp_path_factory.mktemp("lab")
    keeps = home / "settings" / "@jupyter-widgets" / "jupyterlab-manager" / "plugin.jupyterlab-settings"
    keeps.parent.mkdir(parents=True)
    keeps.write_text('{"saveState": true}')
    code = NOTEBOOK.format(bundle=str(tiny_bundle), store=str(home / "store.db"))
    with serving(home, {"app.ipynb": code}) as lab: yield lab


@pytest.fixture(scope="module")
def browser():
    if not CHROMIUM: pytest.skip("no Chromium on this machine: the app is not tested in a browser")
    api = pytest.importorskip("playwright.sync_api", reason="playwright isn't installed: the app is not tested in a browser")
    with api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=[*ARGS, *FAKE_CAMERA])
        yield browser
        browser.close()


def new_page(browser, size=(1280, 1000), dark=False):
    page = browser.new_context(viewport=dict(zip(("width", "height"), size)), color_scheme="dark" if dark else "light").new_page()
    page.set_default_timeout(30_000)
    return page


@pytest.fixture(scope="module")
def page(browser, lab):
    page = new_page(browser)
    show(page, lab, "app.ipynb", ".dlp-app[data-theme]")
    return page


def choose(page, *paths):
    with page.expect_file_chooser() as chooser: page.get_by_role("button", name="Choose pictures").click()
    chooser.value.set_files([str(p) for p in paths])


def card(page, name): return page.locator(".dlp-card", has=page.locator(".dlp-name", has_text=re.compile(f"^{re.escape(name)}$")))


def says(page, text): page.get_by_role("status").get_by_text(text).wait_for()


def noise(size, exif=None, quality=98):
    "A reddish JPEG that can't be pressed small."
    grain = np.random.default_rng(0).integers(0, 200, (size[1], size[0], 3), np.uint8)
    grain[..., 0] += 55
    out = io.BytesIO()
    Image.fromarray(grain).save(out, "JPEG", quality=quality, **({"exif": exif} if exif else {}))
    return out.getvalue()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    "Pictures to upload, good and bad, small and large."
    folder = tmp_path_factory.mktemp("uploads")
    turned = Image.Exif()
    turned[0x0112] = 6
    large = noise((5300, 3975), turned)
    assert 25_000_000 < len(large) < 40_000_000, f"{len(large) / 1e6:.0f} MB"
    huge = io.BytesIO()
    Image.frombytes("1", (10_400, 10_000), os.urandom(1300 * 10_000)).save(huge, "PNG", compress_level=0)
    contents = {"red.png": picture(RED, (300, 200)), "blue.jpg": picture(BLUE, (200, 300), "JPEG"), "grey.png": picture(GREY),
                "sideways.jpg": sideways((300, 120)), "broken.png": b"\x89PNG\r\n\x1a\nthis is no picture", "large.jpg": large,
                "large cut.jpg": large[:9_000_000], "huge.png": huge.getvalue(), NASTY: picture((220, 60, 40), (200, 200)),
                **{name: data for name, (data, _) in BROKEN.items()}}
    for name, data in contents.items(): (folder / name.replace("/", "∕")).write_bytes(data)
    return {name: folder / name.replace("/", "∕") for name in contents}


@pytest.mark.timeout(240)
def test_a_person_uploads_looks_and_corrects(page, lab, files):
    store = Store(lab.home / "store.db")
    shoot(page, "1 empty")
    choose(page, files["red.png"], files["blue.jpg"], files["broken.png"], files["sideways.jpg"])
    card(page, "red.png").get_by_text("A cat", exact=True).wait_for()
    card(page, "blue.jpg").get_by_text("A dog", exact=True).wait_for()
    assert "can't be read" in card(page, "broken.png").inner_text().lower()
    assert "replace the file" in card(page, "broken.png").inner_text()
    says(page, "1 of them can't be read")
    assert upright(page, "sideways.jpg"), "the sideways picture wasn't turned upright"
    assert card(page, "broken.png").get_by_role("button").count() == 0
    shoot(page, "2 four pictures")

    card(page, "red.png").get_by_role("button", name="It is a dog: red.png", exact=True).click()
    card(page, "red.png").get_by_text("You said:").wait_for()
    fb, said = store.feedback(), store.predictions()
    assert fb["label"].tolist() == ["dog"]
    assert said.loc[said["id"] == fb["prediction_id"][0], "name"].tolist() == ["red.png"]

    page.get_by_role("button", name="Choose pictures").focus()
    press_until(page, "It is a cat: blue.jpg")
    page.keyboard.press("Enter")
    says(page, "blue.jpg is a cat; stored")
    cells = page.locator(".jp-Notebook .jp-Cell").all_inner_texts
    before = [text.split("Is it")[0] for text in cells()]
    for key in "abddx": page.keyboard.press(key)                 # JupyterLab's keys to add, delete and cut cells
    assert [text.split("Is it")[0] for text in cells()] == before, "a key reached the notebook"
    assert store.feedback()["label"].tolist() == ["dog", "cat"]

    choose(page, files["grey.png"], files[NASTY])
    card(page, "grey.png").get_by_text("Unsure").wait_for()
    assert card(page, "grey.png").get_by_role("button").count() == 2
    assert page.locator(".dlp-name b, .dlp-history b").count() == 0, "a file's name became part of the page"
    assert page.locator(".dlp-history tr").count() == 1 + 6
    assert [s.sha256 for s in store.predictions().query("name == 'red.png'").itertuples()] == [sha(files["red.png"])], "sent as it is"
    shoot(page, "3 six pictures")


def sha(path):
    from dlpipe_nb.core import sha256_of
    return sha256_of(path)


def upright(page, name):
    image = card(page, name).locator("img")
    image.wait_for()
    w, h = image.evaluate("i => i.decode().then(() => [i.naturalWidth, i.naturalHeight])")
    return h > w


@pytest.mark.timeout(240)
def test_large_pictures_come_through_and_bad_ones_say_why(page, lab, files):
    choose(page, files["large.jpg"])
    page.get_by_role("progressbar", name="Pictures sent").wait_for()
    card(page, "large.jpg").get_by_text("A cat", exact=True).wait_for()
    assert "scaled down by the browser" in card(page, "large.jpg").inner_text() and upright(page, "large.jpg")
    page.get_by_role("progressbar", name="Pictures sent").wait_for(state="hidden")

    bad = ["large cut.jpg", "huge.png", *BROKEN]
    choose(page, *(files[n] for n in bad))
    says(page, f"{len(bad)} pictures looked at. {len(bad)} of them can't be read.")
    for name in bad:
        text = card(page, name).inner_text()
        assert "Can't be read" in text and "Next:" in text and "Traceback" not in text, f"{name}: {text}"
        assert card(page, name).locator("img").count() == 0
    assert "more than 100 million" in card(page, "huge.png").inner_text()
    assert "HEIC photo" in card(page, "photo.heic").inner_text()
    shoot(page, "4 what can't be read")


@pytest.mark.timeout(120)
def test_drop_and_paste(page):
    drop(page, "dropped.png", picture((210, 30, 20)))
    says(page, "dropped.png: a cat.")
    page.locator(".dlp-app").focus()
    transfer(page, ".dlp-app", ["paste"], "clipboardData", "ClipboardEvent", "pasted.png", picture((20, 30, 210)))
    says(page, "pasted.png: a dog.")


def drop(page, name, data): transfer(page, ".dlp-app .dlp-drop", ["dragenter", "dragover", "drop"], "dataTransfer", "DragEvent", name, data)


def transfer(page, where, kinds, field, event, name, data):
    "Drop or paste a file, as a mouse or a key would."
    page.evaluate("""([where, kinds, field, event, name, text]) => {
        const bytes = Uint8Array.from(atob(text), c => c.charCodeAt(0)), files = new DataTransfer();
        files.items.add(new File([bytes], name, { type: "image/png" }));
        for (const kind of kinds) document.querySelector(where).dispatchEvent(
            new window[event](kind, { [field]: files, bubbles: true, cancelable: true })); }""",
                  [where, kinds, field, event, name, base64.b64encode(data).decode()])


@pytest.mark.timeout(120)
def test_the_camera_takes_a_picture(page, lab):
    before = len(Store(lab.home / "store.db").predictions())
    page.get_by_role("button", name="Use the camera").click()
    page.wait_for_function("document.querySelector('.dlp-camera video').videoWidth > 0")
    shoot(page, "5 camera")
    page.get_by_role("button", name="Take the picture").click()
    says(page, "1 picture looked at. camera ")
    page.get_by_role("button", name="Close the camera").click()
    assert page.locator(".dlp-camera").is_hidden() and page.evaluate("!document.querySelector('.dlp-camera video').srcObject.active")
    assert len(Store(lab.home / "store.db").predictions()) == before + 1
    for error, said in (("NotAllowedError", "not allowed"), ("NotFoundError", "there is none")):
        page.evaluate("""error => { navigator.mediaDevices.getUserMedia =
            () => Promise.reject(new DOMException("", error)); }""", error)
        page.get_by_role("button", name="Use the camera").click()
        says(page, said)
        assert page.locator(".dlp-camera").is_hidden()


@pytest.mark.timeout(120)
def test_nothing_uploaded_is_saved_in_the_notebook(page, lab):
    text = saved(page, lab, "app.ipynb")
    assert "widget-state+json" in text, "the widgets' state was not saved, so this test shows nothing"
    for name in ("red.png", "sideways.jpg", "schön", "base64"): assert name not in text
    assert len(text) < 100_000, f"{len(text)} characters"


@pytest.mark.timeout(120)
def test_after_a_reload_the_page_shows_it_all_again(page):
    cards = page.locator(".dlp-card").count()
    page.reload()
    page.locator(".dlp-card").nth(cards - 1).wait_for()
    card(page, "red.png").get_by_text("You said:").wait_for()
    assert upright(page, "sideways.jpg") and page.locator(".dlp-card").count() == cards


#: The contrast of each visible text in the app with what lies behind it, mixed as the browser mixes them.
CONTRASTS = """() => {
    const paint = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
    const over = (colours) => {
        paint.canvas.width = paint.canvas.height = 1;
        for (const c of ["white", ...colours]) { paint.fillStyle = c; paint.fillRect(0, 0, 1, 1); }
        return [...paint.getImageData(0, 0, 1, 1).data].slice(0, 3);
    };
    const behind = e => e ? [...behind(e.parentElement), getComputedStyle(e).backgroundColor] : [];
    const texts = [...document.querySelectorAll(".dlp-app *")].filter(e => e.offsetParent && e.getAttribute("aria-disabled") != "true"
        && [...e.childNodes].some(n => n.nodeType == 3 && n.textContent.trim()));
    return texts.map(e => [e.className || e.tagName, over([...behind(e), getComputedStyle(e).color]), over(behind(e))]);
}"""


def faint(page):
    "The texts with too little contrast; and the kinds of text that were looked at."
    found = page.evaluate(CONTRASTS)
    return {kind: round(contrast(one, other), 1) for kind, one, other in found if contrast(one, other) < 4.5}, {k for k, *_ in found}


def too_wide(page):
    "What sticks out of the app, if anything."
    return page.locator(".dlp-app").evaluate("""root => { const r = root.getBoundingClientRect();
        return [...root.querySelectorAll("*")].filter(e => e.offsetParent && !e.closest(".dlp-scroll *")
            && e.getBoundingClientRect().right > r.right + 1).map(e => e.className || e.tagName); }""")


@pytest.mark.timeout(120)
def test_light_dark_and_phone_in_lab(page):
    for theme in ("Light", "Dark"):
        page.evaluate("name => document.body.dataset.jpThemeName", theme)
        if theme == "Dark": set_dark(page)
        for width in (1280, 390):
            page.set_viewport_size({"width": width, "height": 1000 if width > 400 else 844})
            page.wait_for_timeout(300)
            assert too_wide(page) == []
            low, kinds = faint(page)
            assert low == {} and {"dlp-said", "dlp-said dlp-unsure", "dlp-said dlp-error", "dlp-name", "dlp-told"} <= kinds, low
            shoot(page, f"6 lab {theme.lower()} {width}")
    page.set_viewport_size({"width": 1280, "height": 1000})


def set_dark(page):
    page.get_by_role("menuitem", name="Settings", exact=True).click()
    page.locator(".lm-Menu-item", has_text=re.compile("^Theme$")).hover()
    page.locator(".lm-Menu-item", has_text=re.compile("^JupyterLab Dark$")).click()
    page.wait_for_function("document.body.dataset.jpThemeLight == 'false'")
    page.wait_for_function("document.querySelector('.dlp-app').dataset.theme == 'dark'")


@pytest.mark.timeout(120)
def test_clear_by_keyboard(page, lab):
    stored = len(Store(lab.home / "store.db").predictions())
    page.get_by_role("button", name="Clear").focus()
    page.keyboard.press("Enter")
    says(page, "Cleared.")
    assert page.locator(".dlp-card").count() == 0 and page.locator(".dlp-history").is_hidden()
    assert len(Store(lab.home / "store.db").predictions()) == stored > 10


# ---- a registry: the app follows its champion

def test_the_app_follows_a_registrys_champion_and_keeps_the_old_one_if_the_new_is_broken(tmp_path):
    from dlpipe_nb.app import ClassifierApp
    for i, name in enumerate(("v0001", "v0002", "v0003")): write_tiny_bundle(tmp_path / name / "bundle", threshold=0.6 + i / 10)
    (tmp_path / "v0003" / "bundle" / "model.onnx").write_bytes(b"torn")
    point = lambda name: (tmp_path / "champion").write_text(f"{name} promoted 2026-01-01T00:00:00+00:00\n")
    point("v0001")
    app = ClassifierApp(tmp_path)
    said = lambda: heard(app).classify([("a.png", picture(RED))])[0].prediction.model
    first = said()
    point("v0002")
    second = said()
    assert second != first and second == Predictor(tmp_path / "v0002" / "bundle").version and not app.bad
    point("v0003")
    assert said() == second and app.bad and "the old one answers" in app.message
    point("v0002")
    assert said() == second and not app.bad
    (tmp_path / "champion").write_text("../elsewhere")
    assert said() == second and app.bad
    with pytest.raises(InputError, match="version"): ClassifierApp(tmp_path)


# ---- by itself, with Voilà

@contextmanager
def alone(home: Path, bundle: Path, *more):
    "`dlpipe app` on a free port; gives its address, the process and its log."
    pytest.importorskip("voila", reason="Voilà isn't installed: the app is not tested on a page of its own")
    home.mkdir(parents=True, exist_ok=True)
    port, log = free_port(), home / "log.txt"
    env = os.environ | {"OMP_NUM_THREADS": "1", "JUPYTER_PREFER_ENV_PATH": "1", "TMPDIR": str(home)} | {
        k: str(home / k.lower()) for k in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")}
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from dlpipe_nb.pipeline import main; main(sys.argv[1:])"
    with open(log, "wb") as out:
        server = subprocess.Popen([sys.executable, "-c", code, "app", str(bundle), f"--port={port}", "--no-browser", *more], env=env,
                                  stdout=out, stderr=out, cwd=home, start_new_session=True)
    try:
        end = time.monotonic() + 60
        while time.monotonic() < end:
            assert server.poll() is None, f"dlpipe app ended:\n{log.read_text()[-2000:]}"
            try: urllib.request.urlopen(f"http://127.0.0.1:{port}/voila/static/none", timeout=5)
            except urllib.error.HTTPError: break                     # it answers, if only that there is no such file
            except OSError: time.sleep(0.2)
        yield f"http://127.0.0.1:{port}", server, log
    finally:
        if server.poll() is None: os.killpg(server.pid, signal.SIGTERM)
        try: server.wait(15)
        except subprocess.TimeoutExpired: os.killpg(server.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def voila(tiny_bundle, tmp_path_factory):
    home = tmp_path_factory.mktemp("voila")
    with alone(home, tiny_bundle, "--store", "answers.db") as (url, *_): yield url, home


def press_until(page, wanted, key="Tab", most=40):
    "Press Tab until the button with this name has the focus, and is seen to have it."
    for _ in range(most):
        page.keyboard.press(key)
        name, line = page.evaluate("""() => { const e = document.activeElement;
            return [e.getAttribute("aria-label") || e.textContent, getComputedStyle(e).outlineStyle]; }""")
        if name.startswith(wanted):
            assert line != "none", f"{wanted} has the focus, and nobody sees it"
            return
    raise AssertionError(f"{wanted} can't be reached with {key}")


def choosing(page):
    "The browser's dialogue, by keyboard alone. A browser that is short of time may lose the focus or a key: tried three times."
    from playwright.sync_api import TimeoutError as NothingCame
    for last in (False, False, True):
        press_until(page, "Choose pictures")
        try:
            with page.expect_file_chooser(timeout=10_000) as chooser: page.keyboard.press("Enter")
            return chooser.value
        except NothingCame:
            if last: raise


def ready(page):
    "Wait until Voilà has put the app in its place and taken its own curtain away."
    page.locator(".dlp-app[data-theme]").wait_for(timeout=60_000)
    page.locator("#loading").wait_for(state="hidden")
    page.wait_for_load_state("networkidle")


def test_only_this_computers_names_are_answered_without_a_token(voila):
    asked = urllib.request.Request(voila[0], headers={"Host": "dogs.example"})
    with pytest.raises(urllib.error.HTTPError) as refused: urllib.request.urlopen(asked, timeout=10)
    assert refused.value.code == 403


@pytest.mark.timeout(240)
def test_by_keyboard_alone_under_voila(browser, voila, files):
    url, home = voila
    page, asked = new_page(browser), []
    page.on("request", lambda request: asked.append(request))
    page.goto(url)
    page.bring_to_front()
    ready(page)
    away = [q.url for q in asked if not q.url.startswith((url, "blob:", "data:")) and q.failure != "csp"]
    assert asked and away == [], "the page asks for something from elsewhere"
    shoot(page, "7 voila empty")
    choosing(page).set_files([str(files[n]) for n in ("red.png", "blue.jpg", "grey.png", "sideways.jpg", "broken.png", "large.jpg")])
    says(page, "looked at")
    card(page, "large.jpg").get_by_text("A cat", exact=True).wait_for()
    assert "Can't be read" in card(page, "broken.png").inner_text()
    assert upright(page, "sideways.jpg") and upright(page, "large.jpg")

    press_until(page, "It is a dog: red.png")
    page.keyboard.press("Space")
    card(page, "red.png").get_by_text("You said:").wait_for()
    says(page, "red.png is a dog; stored")
    assert page.evaluate("document.activeElement.className") == "dlp-asked", "the focus fell out of the page with the button"
    press_until(page, "It is a cat: red.png")
    assert Store(home / "answers.db").feedback()["label"].tolist() == ["dog"]

    for dark in (False, True):
        page.emulate_media(color_scheme="dark" if dark else "light")
        for width in (1280, 390):
            page.set_viewport_size({"width": width, "height": 1000 if width > 400 else 844})
            page.wait_for_function(f"document.querySelector('.dlp-app').dataset.theme == '{'dark' if dark else 'light'}'")
            page.wait_for_timeout(300)
            assert too_wide(page) == [] and page.evaluate("document.documentElement.scrollWidth <= innerWidth + 1")
            assert faint(page)[0] == {}
            small = [b.inner_text() for b in page.locator(".dlp-app button:visible").all() if b.bounding_box()["height"] < 40]
            assert not small, f"too small for a finger: {small}"
            around = page.evaluate("getComputedStyle(document.body).backgroundColor")
            assert around == page.locator(".dlp-app").evaluate("e => getComputedStyle(e).backgroundColor")
            shoot(page, f"8 voila {'dark' if dark else 'light'} {width}")
    press_until(page, "Clear", key="Shift+Tab")
    page.keyboard.press("Enter")
    says(page, "Cleared.")
    page.context.close()


@pytest.mark.timeout(120)
def test_a_token_many_labels_no_camera_and_the_end(browser, tmp_path):
    bundle = write_tiny_bundle(tmp_path / "b", labels=tuple("abcdef"))
    with alone(tmp_path / "home", bundle, "--store", "s.db", "--token", "open sesame") as (url, server, log):
        for path in ("", "/voila/render/app.ipynb", "/api/kernels"):
            assert "login" in urllib.request.urlopen(url + path, timeout=5).url, f"{path} is open to everybody"
        page = new_page(browser)
        page.add_init_script("delete Navigator.prototype.mediaDevices") # as on a page that came unencrypted from afar
        page.goto(url)
        assert page.locator(".dlp-app").count() == 0 and "login" in page.url, "without the token there is no app"
        page.goto(f"{url}/?token=open%20sesame")
        ready(page)
        assert page.get_by_role("button", name="Use the camera").count() == 0
        drop(page, "red.png", picture())
        page.get_by_label("What red.png is in truth").select_option("e")
        page.get_by_role("button", name="Say so").click()
        says(page, "red.png is an e; stored")
        shoot(page, "9 many labels")
        assert Store(tmp_path / "home" / "s.db").feedback()["label"].tolist() == ["e"]
        page.context.close()
        kernels = children(server.pid)
        assert kernels, "no kernel, so this test shows nothing"
        server.send_signal(signal.SIGTERM)
        assert server.wait(15) == 0, log.read_text()[-2000:]
        assert not any(Path(f"/proc/{k}").exists() for k in kernels), "a kernel outlived its server"
        assert list((tmp_path / "home").glob("dlpipe-app-*")) == [] and "Traceback" not in log.read_text()
        assert f"The app is at {url}/?token=" in log.read_text() and "sesame" not in log.read_text()


def children(pid):
    "The processes that a process has started."
    tasks = Path(f"/proc/{pid}/task")
    if not tasks.exists(): pytest.skip("no /proc on this machine: whether kernels end is not tested")
    return [int(c) for task in tasks.iterdir() for c in (task / "children").read_text().split()]
