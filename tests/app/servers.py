"""A service in a process of its own, for the tests that stop it, kill it, weigh it or change its model.

    with running(bundle, tmp_path, store=tmp_path / "store.db") as server: httpx.get(f"{server.url}/model")
"""
from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import httpx

from conftest import ROOT
from app.lab import free_port

#: What the process runs; `slow` are the seconds that each call of the network takes on top.
CODE = """
import json, sys, time
root, bundle, port, slow, settings = json.loads(sys.argv[1])
sys.path.insert(0, root)
import dlpipe_nb.api as api
from dlpipe_nb.inference import Predictor
if slow:
    class Slow(Predictor):
        def look(self, x):
            time.sleep(slow)
            return super().look(x)
    api.Predictor = Slow
make = api.make_api
api.make_api = lambda bundle, store, token, origin: make(bundle, store, token, origin=origin, look_every=0.2, **settings.get("limits", {}))
api.serve(bundle, port=port, store=settings.get("store"), token=settings.get("token"), origin=settings.get("origin"))
"""


class Server:
    "A running process: its `url`, the `process`, and what it has written so far."
    def __init__(self, process, url, log): self.process, self.url, self.log_file = process, url, log

    @property
    def log(self) -> str: return self.log_file.read_text("utf-8", "replace")

    @property
    def memory(self) -> float:
        "The megabytes it takes at this moment; 0 where that can't be asked."
        file = Path(f"/proc/{self.process.pid}/statm")
        return int(file.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6 if file.exists() else 0.0


@contextmanager
def running(bundle: Path, folder: Path, slow: float = 0, **settings):
    "A service in a process; gives a `Server`, and kills what is left of it."
    import json
    port = free_port()
    text = json.dumps([str(ROOT), str(bundle), port, slow, {k: str(v) if isinstance(v, Path) else v for k, v in settings.items()}])
    log = folder / f"log-{port}.txt"
    with open(log, "wb") as out:
        process = subprocess.Popen([sys.executable, "-c", CODE, text], stdout=out, stderr=out, cwd=folder)
    server = Server(process, f"http://127.0.0.1:{port}", log)
    try:
        wait_for(server)
        yield server
    finally:
        process.kill()
        process.wait(10)


def wait_for(server, seconds=30):
    "Wait until the service answers."
    end = time.monotonic() + seconds
    while time.monotonic() < end and server.process.poll() is None:
        try:
            if httpx.get(f"{server.url}/healthz", timeout=5, trust_env=False).status_code == 200: return
        except httpx.TransportError: time.sleep(0.05)
    raise AssertionError(f"the service did not start:\n{server.log}")
