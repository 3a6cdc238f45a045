"""The upload app, as a person uses it: JupyterLab and a real Chromium, buttons pressed, the store looked into.

The functions that a click calls are tested first, without a browser. Pictures of the page are left in the folder that
DLPIPE_SHOTS names, if it does.
"""
from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from datetime import datetime
from pathlib import Path

import pytest

from conftest import BLUE, GREY, RED, ROOT, picture, sideways
from dlpipe_nb.core import InputError
from dlpipe_nb.inference import Predictor, Store

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ARGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync"]
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

NOTEBOOK = """\
import sys
sys.path.insert(0, {root!r})
from dlpipe_nb.app import ClassifierApp
from dlpipe_nb.inference import Predictor, Store
app = ClassifierApp(Predictor({bundle!r}), Store({store!r}))
app"""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def lab(tiny_bundle, tmp_path_factory):
    "JupyterLab on a free port, with a folder and settings of its own; gives (url, token, folder)."
    pytest.importorskip("jupyterlab", reason="JupyterLab isn't installed")
    home = tmp_path_factory.mktemp("lab")
    (home / "work").mkdir()
    code = NOTEBOOK.format(root=str(ROOT), bundle=str(tiny_bundle), store=str(home / "store.db"))
    cell = {"cell_type": "code", "id": "the-app", "metadata": {}, "source": code, "outputs": [], "execution_count": None}
    kernel = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    (home / "work" / "app.ipynb").write_text(json.dumps({"cells": [cell], "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}))
    news = home / "settings" / "@jupyterlab" / "apputils-extension" / "notification.jupyterlab-settings"
    news.parent.mkdir(parents=True)
    news.write_text('{"fetchNews": "false", "checkForUpdates": false}')
    port, token = free_port(), "a-token-for-this-test"
    dirs = {"JUPYTER_CONFIG_DIR": "config", "JUPYTER_DATA_DIR": "data", "JUPYTER_RUNTIME_DIR": "runtime", "IPYTHONDIR": "ipython",
            "JUPYTERLAB_SETTINGS_DIR": "settings", "JUPYTERLAB_WORKSPACES_DIR": "workspaces"}
    env = os.environ | {k: str(home / v) for k, v in dirs.items()} | {"OMP_NUM_THREADS": "1", "JUPYTER_PREFER_ENV_PATH": "1"}
    args = ["--no-browser", "--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0", f"--IdentityProvider.token={token}",
            f"--ServerApp.root_dir={home / 'work'}", "--LabApp.news_url=", "--allow-root"]
    with open(home / "log.txt", "wb") as log:
        server = subprocess.Popen([sys.executable, "-m", "jupyterlab", *args], env=env, stdout=log, stderr=log, cwd=home / "work",
                                  start_new_session=True)
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_for(f"{url}/api?token={token}", server, home / "log.txt")
        yield url, token, home
    finally: _end(server)


def _wait_for(url, server, log, seconds=60):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert server.poll() is None, f"JupyterLab ended:\n{log.read_text()[-2000:]}"
        try: return urllib.request.urlopen(url, timeout=5).read()
        except (urllib.error.URLError, OSError): time.sleep(0.2)
    raise AssertionError(f"JupyterLab did not answer:\n{log.read_text()[-2000:]}")


def _end(server):
    "End JupyterLab and its kernels: they share its process group."
    os.killpg(server.pid, signal.SIGTERM)
    try: server.wait(15)
    except subprocess.TimeoutExpired:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait(5)


@pytest.fixture(scope="module")
def page(lab):
    if not CHROMIUM: pytest.skip("no Chromium on this machine: the app is not tested in a browser")
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright isn't installed: the app is not tested in a browser")
    url, token, _ = lab
    with sync_api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=ARGS)
        page = browser.new_page(viewport={"width": 1280, "height": 1000})
        page.set_default_timeout(30_000)
        page.goto(f"{url}/doc/tree/app.ipynb?token={token}")     # one document, without the side bars
        page.get_by_text("| Idle").wait_for(timeout=60_000)
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.locator('[data-command="runmenu:run-all"]').click()
        try: page.locator("button.widget-upload").wait_for(timeout=60_000)
        except sync_api.TimeoutError: raise AssertionError(f"no app appeared; the notebook says:\n{_outputs(page)}") from None
        yield page
        browser.close()


def _outputs(page):
    shoot(page, "0 no app")
    return "\n".join(page.locator(".jp-OutputArea-output").all_inner_texts())[-2000:]


def shoot(page, name):
    if folder := os.environ.get("DLPIPE_SHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=str(Path(folder) / f"{name}.png"))


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
    store = Store(lab[2] / "store.db")
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
    page.locator(".jp-Notebook").click(position={"x": 5, "y": 5})
    page.keyboard.press("Control+s")
    path = lab[2] / "work" / "app.ipynb"
    end = time.monotonic() + 20
    while '"execution_count": 1' not in path.read_text() and time.monotonic() < end: time.sleep(0.2)
    saved = path.read_text()
    assert '"execution_count": 1' in saved, "the notebook was not saved, so this test shows nothing"
    assert "red.png" not in saved and "base64" not in saved and "widget-state+json" not in saved and len(saved) < 20_000


@pytest.mark.timeout(120)
def test_clear_by_keyboard(page, lab):
    page.get_by_role("button", name="Clear").focus()
    page.keyboard.press("Enter")
    page.get_by_text("Cleared.").wait_for()
    assert page.locator(".dlp-card").count() == 0
    assert len(Store(lab[2] / "store.db").predictions()) == 6
