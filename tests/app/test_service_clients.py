"""Ten-line clients against a real service: Python, curl, and JavaScript from a page in a real Chromium; and the page at /docs."""
from __future__ import annotations

import http.server
import json
import shutil
import subprocess
import sys
import threading
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from app.lab import ARGS, CHROMIUM, shoot
from app.servers import Server, running, wait_for
from conftest import BLUE, RED, ROOT, picture
from dlpipe_nb.api import make_api, start
from dlpipe_nb.inference import Store

TOKEN = "sesame"
LESSON = "".join("".join(c["source"]) + "\n" for c in json.loads((ROOT / "nbs/12_api.ipynb").read_text("utf-8"))["cells"])


@pytest.fixture
def files(tmp_path):
    "A red and a blue picture, and a file that is none."
    for name, data in {"rex.png": picture(BLUE), "tom.png": picture(RED), "notes.png": b"milk"}.items(): (tmp_path / name).write_bytes(data)
    return tmp_path


def test_the_python_client_of_the_chapter(tiny_bundle, files):
    code = LESSON[LESSON.index("def classify(path, url, token):"):]
    space = {"urllib": urllib, "json": json, "Path": Path}
    exec(code[:code.index("\n\nrex")], space)
    with start(make_api(tiny_bundle, token=TOKEN)) as service:
        assert space["classify"](files / "rex.png", service.url, TOKEN)[0] == "dog"
        assert space["classify"](files / "tom.png", service.url, TOKEN)[0] == "cat"


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl isn't installed")
def test_curl(tiny_bundle, files):
    with start(make_api(tiny_bundle, token=TOKEN)) as service:
        def curl(*args):
            made = subprocess.run(["curl", "-s", "-H", f"Authorization: Bearer {TOKEN}", *args, f"{service.url}/predict"],
                                  capture_output=True, cwd=files, check=True)
            return [p.get("label") for p in json.loads(made.stdout)["predictions"]]
        assert curl("--data-binary", "@rex.png") == ["dog"]
        assert curl("-F", "files=@rex.png", "-F", "files=@tom.png", "-F", "files=@notes.png") == ["dog", "cat", None]
        assert curl("-H", "Content-Type: image/png", "--data-binary", "@tom.png") == ["cat"]


def test_the_command(tiny_bundle, tmp_path):
    "`dlpipe serve` with its options, refused where it must be."
    def dlpipe(*args):
        return subprocess.run([sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom dlpipe_nb.pipeline import main\n"
                               f"main({['serve', *map(str, args)]!r})"], capture_output=True, text=True, timeout=60)
    open_ = dlpipe(tiny_bundle, "--host", "0.0.0.0", "--port", "0")
    assert open_.returncode == 1 and "token" in open_.stderr and "Traceback" not in open_.stderr
    loose = dlpipe(tiny_bundle, "--images", tmp_path / "images")
    assert loose.returncode == 1 and "--store" in loose.stderr
    gone = dlpipe(tmp_path / "none")
    assert gone.returncode == 1 and "no folder" in gone.stderr


# ---- a page in a browser

PAGE = """<!doctype html><meta charset="utf-8"><title>pets</title>""" + LESSON[LESSON.index('<input type="file" multiple id="files">'):
                                                                               LESSON.index("</script>\n```")] + "</script>"


@contextmanager
def page_of(html):
    "A web server with one page; gives its address."
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.end_headers()
            self.wfile.write(html().encode())
        def log_message(self, *args): pass
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try: yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def browsing():
    "A page of a real Chromium, and the list of the addresses that it asked for."
    sync = pytest.importorskip("playwright.sync_api", reason="Playwright isn't installed")
    if CHROMIUM is None: pytest.skip("no Chromium is installed")
    with sync.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=ARGS)
        page, asked = browser.new_page(), []
        page.set_default_timeout(20_000)
        page.on("request", lambda r: asked.append(r.url))
        try: yield page, asked
        finally: browser.close()


@pytest.mark.parametrize("allowed", [True, False], ids=["the page that was named", "another page"])
def test_javascript_from_a_page(tiny_bundle, files, allowed):
    url = []
    with page_of(lambda: PAGE.replace("http://127.0.0.1:8000", url[0])) as origin:
        api = make_api(tiny_bundle, origin=origin if allowed else "https://pets.example")
        with start(api) as service, browsing() as (page, _):
            url.append(service.url)
            page.goto(origin)
            failures = []
            page.on("pageerror", lambda e: failures.append(str(e)))
            page.on("console", lambda m: failures.append(m.text) if m.type == "error" else None)
            page.set_input_files("#files", [str(files / n) for n in ("rex.png", "tom.png", "notes.png")])
            if allowed:
                page.wait_for_function("document.getElementById('said').textContent != ''")
                lines = page.inner_text("#said").splitlines()
                assert lines[:2] == ["rex.png: dog", "tom.png: cat"] and "picture" in lines[2] and not failures
            else:
                page.wait_for_function("window.performance.getEntriesByType('resource').length > 0")
                page.wait_for_timeout(300)
                assert page.inner_text("#said") == "" and any("CORS" in str(f) for f in failures)


def test_another_origin_is_let_in_only_when_named(tiny_bundle):
    with start(make_api(tiny_bundle, origin="https://pets.example")) as service:
        said = lambda origin: httpx.post(f"{service.url}/predict", content=picture(), headers={"origin": origin}, trust_env=False)
        good, bad = said("https://pets.example"), said("https://evil.example")
        assert good.status_code == 200 and good.headers["access-control-allow-origin"] == "https://pets.example"
        assert bad.status_code == 403 and "access-control-allow-origin" not in bad.headers
        ahead = httpx.options(f"{service.url}/predict", trust_env=False, headers={
            "origin": "https://pets.example", "access-control-request-method": "POST", "access-control-request-headers": "authorization"})
        assert ahead.status_code == 200
    with start(make_api(tiny_bundle)) as service:
        r = httpx.post(f"{service.url}/predict", content=picture(), headers={"origin": "http://localhost:3000"}, trust_env=False)
        assert r.status_code == 200 and not [h for h in r.headers if h.startswith("access-control")], "off by default"


@pytest.mark.parametrize("width,scheme", [(1200, "light"), (390, "dark")])
def test_the_page_for_people(tiny_bundle, tmp_path, files, width, scheme):
    "Every endpoint is on it, a picture can be tried, and nothing is asked from anybody but the service."
    store = Store(tmp_path / "s.db")
    with start(make_api(tiny_bundle, store, token=TOKEN)) as service, browsing() as (page, asked):
        page.set_viewport_size({"width": width, "height": 900})
        page.emulate_media(color_scheme=scheme)
        failures = []
        page.on("pageerror", lambda e: failures.append(str(e)))
        page.goto(f"{service.url}/docs")
        form = page.locator('form[data-path="/predict"]')
        form.locator("input[type=file]").set_input_files(str(files / "rex.png"))
        form.locator("button").click()
        form.locator("pre").filter(has_text="401").wait_for()
        page.get_by_label("Token").fill(TOKEN)
        form.locator("button").click()
        form.locator("pre").filter(has_text='"label": "dog"').wait_for()
        said = page.locator('form[data-path="/feedback"]')
        said.locator("textarea").fill('{"id": 1, "label": "cat"}')
        said.locator("button").click()
        said.locator("pre").filter(has_text="201").wait_for()
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "it is wider than the window"
        shoot(page, f"docs-{width}-{scheme}")
    assert not failures and asked and all(u.startswith(service.url) for u in asked) and len(store.feedback()) == 1


def test_a_stranger_learns_nothing_from_a_service_with_a_token(tiny_bundle, tmp_path):
    with running(tiny_bundle, tmp_path, token=TOKEN, store=tmp_path / "s.db") as server:
        auth = {"authorization": f"Bearer {TOKEN}"}
        assert httpx.get(f"{server.url}/readyz", trust_env=False).json() == {"status": "ready"}, "a stranger hears no more"
        assert "model" in httpx.get(f"{server.url}/readyz", headers=auth, trust_env=False).json()
        assert httpx.get(f"{server.url}/metrics", trust_env=False).status_code == 401
        assert server.memory < 400


def test_the_command_serves_a_registry_with_a_store_and_keeps_the_pictures(tiny_bundle, tmp_path):
    import signal
    from app.lab import free_port
    shutil.copytree(tiny_bundle, tmp_path / "registry/v0001/bundle")
    (tmp_path / "registry/champion").write_text("v0001\n")
    port = free_port()
    args = ["serve", str(tmp_path / "registry"), "--port", str(port), "--store", str(tmp_path / "s.db"), "--images", str(tmp_path / "images")]
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom dlpipe_nb.pipeline import main\nmain({args!r})"
    with open(tmp_path / "log.txt", "wb") as log: process = subprocess.Popen([sys.executable, "-c", code], stdout=log, stderr=log)
    server = Server(process, f"http://127.0.0.1:{port}", tmp_path / "log.txt")
    try:
        wait_for(server)
        assert httpx.post(f"{server.url}/predict", content=picture(), trust_env=False).json()["predictions"][0]["id"] == 1
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0 and "Traceback" not in server.log
    finally: process.kill()
    store = Store(tmp_path / "s.db", images=tmp_path / "images")
    assert store.picture(store.predictions()["sha256"][0]).read_bytes() == picture()
