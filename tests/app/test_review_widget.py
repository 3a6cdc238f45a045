"""Chapter 14's review queue as a person uses it: on a page of its own, in a real Chromium, by keyboard and by button, light and
dark, wide and narrow; and the store looked into. What a click calls is tested without a browser in tests/code/test_retraining.py.
"""
from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
from app.lab import ARGS, CHROMIUM, free_port, shoot

from conftest import ROOT, picture
from dlpipe_nb.core import sha256_of
from dlpipe_nb.inference import Predictor, Store, classify

CODE = """
import sys
from dlpipe_nb.retraining import Store, serve_review
serve_review(Store("store.db", images="images"), port=int(sys.argv[1]), browser=False, by="ada", n=6)
"""


@pytest.fixture(scope="module")
def place(tiny_bundle, tmp_path_factory):
    "A folder with a store of eight kept pictures from red to blue, and the page that `serve_review` shows of it."
    if not CHROMIUM: pytest.skip("no Chromium on this machine: the review queue is not tested in a browser")
    for name in ("voila", "playwright.sync_api"): pytest.importorskip(name, reason=f"{name} isn't installed: the review queue is not tested in a browser")
    home = tmp_path_factory.mktemp("review")
    store = Store(home / "store.db", images=home / "images")
    made = [(f"{i}.png", picture((60 + 20 * i, 90, 200 - 20 * i), (320, 240))) for i in range(8)]
    classify(made, Predictor(tiny_bundle), store)
    for _, data in made: store.keep(sha256_of(data), data)
    port, log = free_port(), home / "log.txt"
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "JUPYTER_PREFER_ENV_PATH": "1"} | {
        k: str(home / k.lower()) for k in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")}
    with open(log, "wb") as out:
        server = subprocess.Popen([sys.executable, "-W", "ignore", "-c", CODE, str(port)], env=env, stdout=out, stderr=out, cwd=home, start_new_session=True)
    try:
        end = time.monotonic() + 120
        while time.monotonic() < end:
            assert server.poll() is None, f"serve_review ended:\n{log.read_text()[-2000:]}"
            try: urllib.request.urlopen(f"http://127.0.0.1:{port}/voila/static/none", timeout=5)
            except urllib.error.HTTPError: break                     # it answers, if only that there is no such file
            except OSError: time.sleep(0.2)
        yield f"http://127.0.0.1:{port}", store, log
    finally:
        if server.poll() is None: os.killpg(server.pid, signal.SIGTERM)
        try: server.wait(15)
        except subprocess.TimeoutExpired: os.killpg(server.pid, signal.SIGKILL)


def wait_for(page, text): page.locator(".dlp").get_by_text(text, exact=True).wait_for()


def opened(page, url):
    page.goto(url)
    page.locator(".dlp .stage img").wait_for(timeout=150_000)
    page.locator("#loading").wait_for(state="hidden")


@pytest.mark.timeout(420)
def test_six_pictures_by_key_and_button_undo_skip_resume_and_every_look(place):
    from playwright.sync_api import sync_playwright
    url, store, log = place
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=ARGS)
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(60_000)
        opened(page, url)
        box = page.get_by_role("group", name="Review pictures")
        wait_for(page, "0 of 6 · ada")
        assert "Why this one: " in box.inner_text() and "model had said" not in box.inner_text(), "nothing may lead the eye beforehand"
        assert box.get_by_role("button", name="Undo the last answer").get_attribute("aria-disabled") == "true"
        box.get_by_role("button", name="It is: cat").click()
        wait_for(page, "1 of 6 · ada")
        assert "The model had said" in box.get_by_role("status").inner_text()
        page.keyboard.press("d")
        wait_for(page, "2 of 6 · ada")
        page.keyboard.press("s")
        wait_for(page, "3 of 6 · ada")
        page.keyboard.press("2")
        wait_for(page, "4 of 6 · ada")
        page.keyboard.press("u")
        wait_for(page, "3 of 6 · ada")
        said = store.feedback()
        assert said["label"].tolist() == ["cat", "dog"] and set(said["given_by"]) == {"ada"} and said["given_at"].notna().all()

        for dark in (False, True):
            page.emulate_media(color_scheme="dark" if dark else "light")
            for width in (1280, 390):
                page.set_viewport_size({"width": width, "height": 900 if width > 400 else 844})
                page.wait_for_timeout(400)
                assert page.evaluate("document.documentElement.scrollWidth <= innerWidth + 1"), "the page is wider than the window"
                assert all(b.bounding_box()["height"] >= 44 for b in box.get_by_role("button").all()), "too small for a finger"
                assert contrast(page) >= 4.5
                shoot(page, f"review {'dark' if dark else 'light'} {width}")
        page.emulate_media(color_scheme="light")

        opened(page, url)                                             # another day: what was answered isn't asked again
        wait_for(page, "0 of 6 · ada")
        for k in range(1, 7):
            page.keyboard.press("c") if k > 1 else page.locator(".dlp").press("c")
            wait_for(page, f"{k} of 6 · ada")
        wait_for(page, "All done. Thank you!")
        shoot(page, "review done")
        browser.close()
    assert len(store.feedback()) == 8 and store.feedback()["prediction_id"].nunique() == 8


def contrast(page):
    "How well the text stands out from the page behind it (WCAG)."
    ink, paper = page.evaluate("""() => [getComputedStyle(document.querySelector('.dlp .top b')).color, getComputedStyle(document.body).backgroundColor]
        .map(c => c.match(/[\\d.]+/g).slice(0, 3).map(Number))""")
    def light(c):
        r, g, b = (v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in (x / 255 for x in c))
        return 0.2126 * r + 0.7152 * g + 0.0722 * b
    low, high = sorted((light(ink), light(paper)))
    return (high + 0.05) / (low + 0.05)
