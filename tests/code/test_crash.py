"""Killed at random moments and started again: every picture one record, every action once; and the memory stays small."""
from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from dlpipe_nb.inference import Store

N = 2000
FLOW = """
import sys
from dlpipe_nb.inference import Predictor, Rule, append_to, classify, destination, files
rules = [Rule("all", lambda p: True, append_to("list.jsonl")), Rule("tenth", lambda p: p.name.endswith("0.png"), append_to("list.jsonl"))]
if not sys.argv[2].endswith("db"): rules = []
print(classify(files("in"), Predictor(sys.argv[1], engine="onnxruntime"), destination(sys.argv[2]), source="yard", actions=rules))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A folder `in` with 2,000 small drawn pets: ten of them, and in each copy one pixel of its own."
    from dlpipe_nb.collection import draw_pets
    place = tmp_path_factory.mktemp("crash")
    drawn = draw_pets(place / "drawn", n=10, seed=5)
    pets = [np.array(Image.open(p).convert("RGB").resize((32, 32))) for p in drawn["path"]]
    (place / "in").mkdir()
    for i in range(N):
        a = pets[i % 10].copy()
        a[0, 0] = i % 256, i // 256, 9
        Image.fromarray(a).save(place / "in" / f"{i:04}.png", compress_level=1)
    return place


def start(place, bundle, to):
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", FLOW, str(bundle), to], cwd=place, env=env, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True)


def size(path): return path.stat().st_size if path.exists() else 0


def kill_and_restart(place, bundle, to, watched, kills, rng):
    "Start it, wait until `watched` has grown by a random amount, kill it, and again; then let it finish. Gives the last one's words."
    for k in range(kills):
        process, before, more = start(place, bundle, to), size(watched), rng.randint(1, 60_000)
        while process.poll() is None and size(watched) < before + more: time.sleep(0.001)
        time.sleep(rng.random() * 0.02)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    process = start(place, bundle, to)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out


@pytest.mark.skipif(os.name == "nt", reason="there is no SIGKILL on Windows")
def test_killed_at_random_moments_it_ends_with_each_record_and_each_action_once(place, tiny_bundle):
    out = kill_and_restart(place, tiny_bundle, "store.db", place / "list.jsonl", 6, random.Random(1))
    store, lines = Store(place / "store.db"), (place / "list.jsonl").read_text("utf-8").splitlines()
    assert store.n == N and "known=0" not in out, "at least one kill came after some records"
    keys = [json.loads(line)["key"] for line in lines]
    assert len(keys) == len(set(keys)) == N + N // 10
    done = store.actions()
    assert len(done) == N + N // 10 and set(done["state"]) == {"done"}


@pytest.mark.skipif(os.name == "nt", reason="there is no SIGKILL on Windows")
@pytest.mark.parametrize("to", ["said.csv", "said.parquet"])
def test_files_are_whole_after_kills(place, tiny_bundle, to):
    import pandas as pd
    if to.endswith("parquet"): pytest.importorskip("pyarrow")
    kill_and_restart(place, tiny_bundle, to, place / to, 3, random.Random(2))
    rows = pd.read_csv(place / to) if to.endswith("csv") else pd.read_parquet(place / to)
    assert len(rows) == rows["sha256"].nunique() == N and set(rows["source"]) == {"yard"}


MEMORY = """
import io, json, sys
import numpy as np
from PIL import Image
from dlpipe_nb.inference import Predictor, Rule, append_to, classify, Store
def rss(): return int(open("/proc/self/statm").read().split()[1]) * 4096 / 1e6
a, seen = np.random.default_rng(0).integers(0, 255, (300, 400, 3), dtype=np.uint8), []
def camera(n):
    for i in range(n):
        a[0, 0] = i % 256, i // 256 % 256, i // 65536
        Image.fromarray(a).save(out := io.BytesIO(), "BMP")
        if i % 500 == 0: seen.append(rss())
        yield f"{i}", out.getvalue()
rule = Rule("tenth", lambda p: p.name.endswith("0"), append_to("list.jsonl"))
classify(camera(int(sys.argv[2])), Predictor(sys.argv[1]), Store("memory.db"), actions=[rule])
print(json.dumps([*seen, rss()]))
"""


def test_memory_stays_small_however_many_come(tmp_path, tiny_bundle):
    if not os.path.exists("/proc/self/statm"): pytest.skip("no /proc/self/statm to read the memory from")
    done = subprocess.run([sys.executable, "-c", MEMORY, str(tiny_bundle), "5000"], cwd=tmp_path, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=300)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert max(seen) < 500 and seen[-1] - seen[2] < 40, seen   # 5,000 such pictures are 1,800 MB
