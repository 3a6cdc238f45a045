"""Requests a second and waiting times of three services with the same network: ours, LitServe, and a plain FastAPI + fastai.

    python benchmarks/service.py PHOTOS                        # 16 clients, 5,000 requests to each, three rounds: many minutes
    python benchmarks/service.py PHOTOS --n 500 --rounds 1     # a short look
    python benchmarks/service.py PHOTOS --kinds ours "ours, no store"

A ResNet-18 at 128 pixels, in one ONNX file for ours and LitServe, as a fastai Learner for the plain one; weights don't matter for the time.
All get the same files in the same multipart bodies, from 16 clients in a process of their own, each with one connection. In every round each service is
started, warmed up, measured and stopped, so that they take turns on the same machine. LitServe runs in several settings; compare with its best.
Ours writes every answer to an SQLite store unless it says otherwise; the others keep nothing.
"""
from __future__ import annotations

import argparse
import http.client
import io
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
from fastapi import FastAPI, UploadFile

try: from litserve import LitAPI
except ImportError: raise SystemExit("this benchmark needs LitServe: pip install litserve") from None

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path: sys.path.insert(0, str(ROOT))
KINDS = ("ours", "ours, no store", "LitServe, 1 worker, batches of 1", "LitServe, 1 worker, batches of 16", "LitServe, 2 workers, batches of 1",
         "FastAPI + fastai")
LINE = "----next-file"


def make_models(folder: Path, photos: list[Path], size: int):
    "The same ResNet-18 as a bundle and as fastai's pickle."
    warnings.filterwarnings("ignore")
    from fastai.vision.all import ImageDataLoaders, Resize, resnet18, vision_learner
    from dlpipe_nb.export import export_bundle
    some = photos[:32]
    dls = ImageDataLoaders.from_lists(folder, some, ["cat", "dog"] * (len(some) // 2) + ["cat"] * (len(some) % 2), valid_pct=.5, seed=1,
                                      item_tfms=Resize(size), num_workers=0, bs=8)
    learn = vision_learner(dls, resnet18, pretrained=False)
    learn.model.eval()
    learn.record = {"size": size, "labels": ["cat", "dog"], "arch": "resnet18", "pretrained": False}
    with learn.no_bar(): export_bundle(learn, folder / "bundle", some[:8])
    learn.export(folder / "learner.pkl")


# ---- the three services, each in a process of its own

def ours(folder, port, store):
    from dlpipe_nb.api import serve
    serve(folder / "bundle", port=port, store=store)


class One(LitAPI):
    "LitServe's worker, one picture a call. At the top of the module, since it is sent to another process."
    def __init__(self, folder, threads, **settings):
        super().__init__(**settings)
        self.folder, self.threads = folder, threads
    def setup(self, device):
        from dlpipe_nb.inference import Predictor
        self.predictor = Predictor(self.folder / "bundle", threads=self.threads)
    def decode_request(self, request):
        from dlpipe_nb.core import picture_array
        return picture_array(request["files"].file.read(), self.predictor.size)
    def predict(self, x): return self.predictor.probabilities(x[None])[0]
    def encode_response(self, p):
        said = dict(zip(self.predictor.labels, map(float, p)))
        return {"predictions": [{"label": max(said, key=said.get), "probability": max(said.values()), "probabilities": said}]}


class Many(One):
    "The same in batches."
    def batch(self, inputs): return np.stack(inputs)
    def predict(self, x): return self.predictor.probabilities(x)
    def unbatch(self, output): return list(output)


def litserve(folder, port, workers, batch):
    import litserve as ls
    more = {"max_batch_size": batch, "batch_timeout": 0.003} if batch > 1 else {}
    api = (Many if batch > 1 else One)(folder, max(1, (os.cpu_count() or 1) // workers), **more)
    ls.LitServer(api, accelerator="cpu", workers_per_device=workers).run(
        host="127.0.0.1", port=port, log_level="error", generate_client_file=False, access_log=False)


def plain(folder, port):
    warnings.filterwarnings("ignore")
    import uvicorn
    from fastai.vision.all import PILImage, load_learner
    learn, app = load_learner(folder / "learner.pkl"), FastAPI()

    @app.get("/health")
    def health(): return "ok"

    @app.post("/predict")
    async def predict(files: UploadFile):
        with learn.no_bar(): label, _, p = learn.predict(PILImage.create(io.BytesIO(await files.read())))
        return {"predictions": [{"label": label, "probability": float(p.max())}]}

    uvicorn.run(app, host="127.0.0.1", port=port, log_level="error")


def run_server(kind, folder, port):
    "Be one of the services."
    if kind == "ours": ours(folder, port, folder / f"store-{port}.db")
    elif kind == "ours, no store": ours(folder, port, None)
    elif kind == "FastAPI + fastai": plain(folder, port)
    else:
        words = kind.replace(",", "").split()
        litserve(folder, port, int(words[1]), int(words[-1]))


# ---- the clients

def as_form(name, data):
    "The body of a form with one file."
    head = f'--{LINE}\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\nContent-Type: image/jpeg\r\n\r\n'
    return head.encode() + data + f"\r\n--{LINE}--\r\n".encode()


def run_clients(port, files, n, clients):
    "Ask `n` times from `clients` connections; gives the statuses, the seconds of each, and of all."
    bodies = [as_form(Path(f).name, Path(f).read_bytes()) for f in files]
    order = random.Random(1).choices(range(len(bodies)), k=n) if n > len(bodies) else list(range(n))
    left, seconds, statuses, lock = iter(order), [], [], threading.Lock()
    def client():
        to = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        while True:
            with lock: i = next(left, None)
            if i is None: return to.close()
            began = time.perf_counter()
            to.request("POST", "/predict", bodies[i], {"Content-Type": f"multipart/form-data; boundary={LINE}"})
            answer = to.getresponse()
            answer.read()
            seconds.append(time.perf_counter() - began)
            statuses.append(answer.status)
    threads, began = [threading.Thread(target=client) for _ in range(clients)], time.perf_counter()
    for t in threads: t.start()
    for t in threads: t.join()
    return statuses, seconds, time.perf_counter() - began


def measured(kind, folder, files, n, clients):
    "One service, started, warmed up, measured by clients in another process, and stopped: a row of the table."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    me = [sys.executable, __file__, str(folder)]
    server = subprocess.Popen([*me, "--be", kind, "--port", str(port)], stdout=subprocess.DEVNULL, cwd=folder, start_new_session=True)
    try:
        first = wait_for(port, files[0])
        for count in (max(32, n // 10), n):
            before = cpu_seconds(server.pid)
            made = subprocess.run([*me, "--ask", str(count), "--port", str(port), "--clients", str(clients), "--files", *map(str, files)],
                                  capture_output=True, text=True, check=True)
        statuses, seconds, total = json.loads(made.stdout)
        cpu = cpu_seconds(server.pid) - before
    finally:
        server.terminate()
        try: server.wait(20)
        except subprocess.TimeoutExpired: pass
        try: os.killpg(server.pid, signal.SIGKILL) # and the workers that it started
        except ProcessLookupError: pass
    q = pd.Series(seconds).quantile([.5, .99]) * 1000
    return {"service": kind, "requests/s": len(seconds) / total, "50th ms": q[.5], "99th ms": q[.99], "cpu ms a request": 1000 * cpu / len(seconds),
            "not answered": sum(s != 200 for s in statuses), "first": first}


def cpu_seconds(group):
    "The processor time that a service's processes have taken so far: on a busy machine this tells more than the clock."
    total = 0.0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try: words = stat.read_text().rpartition(")")[2].split()
        except OSError: continue
        if int(words[2]) == group: total += (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")
    return total


def wait_for(port, file, patience=60):
    "Wait until the service answers for a picture; gives the probability that it says."
    end = time.monotonic() + patience
    while True:
        try:
            to = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            to.request("POST", "/predict", as_form("x.jpg", file.read_bytes()), {"Content-Type": f"multipart/form-data; boundary={LINE}"})
            r = to.getresponse()
            said = r.read()
            if r.status == 200: return json.loads(said)["predictions"][0]["probability"]
            if r.status < 500: raise SystemExit(f"{r.status}: {said[:300]}")
        except (OSError, http.client.HTTPException): pass
        if time.monotonic() > end: raise SystemExit("a service did not start")
        time.sleep(0.2)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("photos", type=Path, help="a folder of photographs")
    p.add_argument("--n", type=int, default=5000, help="requests to each service in a round")
    p.add_argument("--clients", type=int, default=16)
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--size", type=int, default=128)
    p.add_argument("--kinds", nargs="+", default=KINDS)
    for hidden in ("--be", "--ask", "--port"): p.add_argument(hidden, help=argparse.SUPPRESS)
    p.add_argument("--files", nargs="*", help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.be: return run_server(a.be, a.photos, int(a.port))
    if a.ask: return print(json.dumps(run_clients(int(a.port), a.files, int(a.ask), a.clients)))
    photos = sorted(f for f in a.photos.resolve().rglob("*") if f.suffix.lower() in (".jpg", ".jpeg", ".png"))[:2000]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        make_models(Path(folder), photos, a.size)
        for k in range(a.rounds):
            for kind in a.kinds if k % 2 == 0 else a.kinds[::-1]:
                n = a.n if kind != "FastAPI + fastai" else max(200, a.n // 5) # it has a fixed rate, and takes long
                rows.append(measured(kind, Path(folder), photos, n, a.clients))
                print("  ", *(f"{v:.1f}" if isinstance(v, float) else v for v in list(rows[-1].values())[:6]), flush=True)
    report(pd.DataFrame(rows), a)


def report(df, a):
    "The medians over the rounds, and what each is of the best LitServe and of the plain one."
    table = df.drop(columns="first").groupby("service", sort=False).median()
    same = df[~df["service"].str.startswith("FastAPI")]["first"]
    print(f"\n{os.cpu_count()} cores, {a.clients} clients, {a.n} requests, median of {a.rounds} rounds; "
          f"ours and LitServe agree within {same.max() - same.min():.0e}\n\n{table.round(1).to_string()}\n")
    lit = table[table.index.str.startswith("LitServe")]
    if "ours" in table.index and len(lit):
        best = lit.loc[lit["requests/s"].idxmax()]
        print(f"ours / best LitServe: {table.loc['ours', 'requests/s'] / best['requests/s']:.2f} in requests a second (at least 1.0), "
              f"{table.loc['ours', '99th ms'] / best['99th ms']:.2f} in the 99th percentile (at most 1.0)")
    if {"ours", "FastAPI + fastai"} <= set(table.index):
        print(f"ours / FastAPI + fastai: {table.loc['ours', 'requests/s'] / table.loc['FastAPI + fastai', 'requests/s']:.1f} (at least 4)")


if __name__ == "__main__": main()
