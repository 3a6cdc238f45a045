"""JupyterLab on a free port and a real Chromium, for the tests that use a widget as a person does.

    with serving(home, {"app.ipynb": CODE}) as lab, opened(lab, "app.ipynb", "button.widget-upload") as page: ...

Pictures of the page are left in the folder that DLPIPE_SHOTS names, if it does.
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
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from conftest import ROOT

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ARGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync"]
#: The first lines of a notebook's code: the package of this checkout is the one that is imported.
HEAD = f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n"


class Lab(NamedTuple):
    "A running JupyterLab: its address, its token, and the folder with `work/` (the notebooks) and log.txt."
    url: str
    token: str
    home: Path


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def write_notebook(path: Path, *cells: str) -> Path:
    "A notebook of code cells."
    made = [{"cell_type": "code", "id": f"cell-{i}", "metadata": {}, "source": code, "outputs": [], "execution_count": None}
            for i, code in enumerate(cells)]
    kernel = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"cells": made, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}), "utf-8")
    return path


@contextmanager
def serving(home: Path, notebooks: dict):
    """JupyterLab with a folder and settings of its own, ended with its kernels; gives a `Lab`.

    `notebooks` is {name: the code of its one cell, or a list of cells}."""
    pytest.importorskip("jupyterlab", reason="JupyterLab isn't installed")
    (home / "work").mkdir(parents=True, exist_ok=True)
    for name, code in notebooks.items(): write_notebook(home / "work" / name, *([code] if isinstance(code, str) else code))
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
        yield Lab(url, token, home)
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


@contextmanager
def opened(lab: Lab, notebook: str, appears: str, size=(1280, 1000)):
    "A Chromium page with `notebook` open and all its cells run, as soon as the CSS selector `appears` is there."
    if not CHROMIUM: pytest.skip("no Chromium on this machine: the widget is not tested in a browser")
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright isn't installed: the widget is not tested in a browser")
    with sync_api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=ARGS)
        try:
            page = browser.new_page(viewport=dict(zip(("width", "height"), size)))
            page.set_default_timeout(30_000)
            show(page, lab, notebook, appears)
            yield page
        finally: browser.close()


def show(page, lab: Lab, notebook: str, appears: str):
    "Load `notebook` in `page`, run all its cells and wait for the selector `appears`; also to load it anew."
    page.goto(f"{lab.url}/doc/tree/{notebook}?token={lab.token}")     # one document, without the side bars
    page.get_by_text("| Idle").wait_for(timeout=60_000)
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.locator('[data-command="runmenu:run-all"]').click()
    try: page.locator(appears).first.wait_for(timeout=60_000)
    except Exception as e:
        if type(e).__name__ != "TimeoutError": raise
        shoot(page, f"nothing in {notebook}")
        said = "\n".join(page.locator(".jp-OutputArea-output").all_inner_texts())[-2000:]
        raise AssertionError(f"{appears} did not appear; the notebook says:\n{said}") from None


def saved(page, lab: Lab, notebook: str, seconds=20) -> str:
    "Save the open notebook with the keyboard; gives the file's text once its counts are in it."
    page.locator(".jp-Notebook").click(position={"x": 5, "y": 5})
    page.keyboard.press("Control+s")
    path, end = lab.home / "work" / notebook, time.monotonic() + seconds
    while '"execution_count": 1' not in path.read_text("utf-8") and time.monotonic() < end: time.sleep(0.2)
    text = path.read_text("utf-8")
    assert '"execution_count": 1' in text, "the notebook was not saved, so this test shows nothing"
    return text


def shoot(page, name: str):
    "Keep a picture of the page."
    if folder := os.environ.get("DLPIPE_SHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=str(Path(folder) / f"{name}.png"))
