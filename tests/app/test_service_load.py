"""The service when it is busy: batches, a full room, SIGTERM and SIGKILL, and a new model in the middle of it all."""
from __future__ import annotations

import http.client
import io
import json
import os
import re
import shutil
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
from PIL import Image

from conftest import picture, write_tiny_bundle
from dlpipe_nb.api import Batcher, make_api, start
from dlpipe_nb.inference import Predictor, Store
from app.servers import running


def different(n, seed=0) -> list[bytes]:
    "`n` pictures of which no two are the same; half of them rather red."
    rng = np.random.default_rng(seed)
    made = []
    for i in range(n):
        a = rng.integers(0, 60, (24, 24, 3), np.uint8)
        a[..., 0 if i % 2 else 2] += 150
        out = io.BytesIO()
        Image.fromarray(a).save(out, "PNG")
        made.append(out.getvalue())
    return made


def post(url, data):
    "(status, JSON, seconds) of a POST to /predict; (None, None, seconds) where the connection fails."
    began, to = time.perf_counter(), http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
    try:
        to.request("POST", "/predict", data)
        r = to.getresponse()
        said = r.status, json.loads(r.read())
    except (OSError, http.client.HTTPException): said = None, None
    finally: to.close()
    return *said, time.perf_counter() - began


class Slow(Predictor):
    "A predictor that takes 30 ms a call and notes how many pictures each had."
    def look(self, x):
        self.__dict__.setdefault("sizes", []).append(len(x))
        time.sleep(0.03)
        return super().look(x)


# ---- batches

def test_a_lonely_item_does_not_wait_and_a_crowd_shares():
    sizes = []
    def work(items):
        sizes.append(len(items))
        time.sleep(0.02)
        return [-i for i in items]
    b = Batcher(work, most=8)
    began = time.perf_counter()
    assert b.ask(7).result(5) == -7 and time.perf_counter() - began < 0.2 and sizes == [1]
    futures = [b.ask(i) for i in range(50)]
    assert [f.result(5) for f in futures] == [-i for i in range(50)]
    assert sum(sizes) == 51 and max(sizes) == 8 and len(sizes) <= 10
    b.close()
    assert b.ask(1).result(5) == -1, "after it was closed the next item begins a new thread"
    b.close()


def test_a_failing_batch_is_told_and_the_next_is_answered():
    def work(items):
        if "bad" in items: raise KeyError("bad")
        return items if "short" not in items else []
    b = Batcher(work, most=1)
    bad, short, good = b.ask("bad"), b.ask("short"), b.ask("good")
    assert isinstance(bad.exception(5), KeyError) and "results" in str(short.exception(5)) and good.result(5) == "good"
    b.close()


def test_close_finishes_what_is_in_the_queue():
    b = Batcher(lambda items: time.sleep(0.05) or items, most=1)
    futures = [b.ask(i) for i in range(5)]
    b.close()
    assert all(f.done() for f in futures)


def test_batches_form_under_load_and_everybody_gets_their_own_answer(tiny_bundle):
    predictor = Slow(tiny_bundle)
    pictures = different(60)
    with start(make_api(predictor, batch=16)) as service, ThreadPoolExecutor(20) as crowd:
        post(service.url, pictures[0])
        assert predictor.sizes[-1] == 1
        answers = list(crowd.map(lambda d: post(service.url, d), pictures))
        text = httpx.get(f"{service.url}/metrics", trust_env=False).text
    assert [a[1]["predictions"][0]["label"] for a in answers] == ["cat" if i % 2 else "dog" for i in range(60)]
    assert max(predictor.sizes[2:]) >= 4 and max(predictor.sizes) <= 16
    assert f"dlpipe_batch_pictures_count {len(predictor.sizes):.1f}" in text and "dlpipe_batch_pictures_sum 61.0" in text


def test_a_batch_says_what_the_predictor_says(tiny_bundle):
    predictor, pictures = Predictor(tiny_bundle), different(5) + [picture((120, 120, 121)), b"milk"]
    direct = predictor.predict_many([(f"{i}.png", d) for i, d in enumerate(pictures)])
    with start(make_api(predictor)) as service:
        said = httpx.post(f"{service.url}/predict", files=[("f", (f"{i}.png", d)) for i, d in enumerate(pictures)],
                          trust_env=False).json()["predictions"]
    for d, s in zip(direct, said):
        assert (d.name, d.label) == (s["name"], s.get("label")) and bool(d.error) == ("error" in s)
        if not d.error: assert abs(d.probability - s["probability"]) < 1e-5 and d.unsure == s["unsure"] and d.model == s["model"]


# ---- more than it can carry

def test_a_full_service_says_so_at_once_and_stays_small(tiny_bundle, tmp_path):
    pictures = [d + os.urandom(100_000) for d in different(30)] # what follows a picture's end isn't looked at
    with running(tiny_bundle, tmp_path, slow=0.1, store=tmp_path / "s.db", limits={"waiting": 24, "batch": 4}) as server:
        before, most, done = server.memory, [0.0], threading.Event()
        def weigh():
            while not done.wait(0.02): most[0] = max(most[0], server.memory)
        scales = threading.Thread(target=weigh)
        scales.start()
        with ThreadPoolExecutor(150) as crowd: answers = list(crowd.map(lambda i: post(server.url, pictures[i % 30]), range(450)))
        done.set()
        scales.join()
        statuses = [a[0] for a in answers]
        assert set(statuses) == {200, 503}, {s: statuses.count(s) for s in set(statuses)}
        assert statuses.count(200) >= 24
        quick = sorted(s for status, _, s in answers if status == 503)
        assert quick[len(quick) // 2] < 2, "half of the refusals took longer than two seconds"
        if before: assert most[0] - before < 150, f"from {before:.0f} to {most[0]:.0f} MB"
        assert post(server.url, pictures[0])[0] == 200
        metrics = httpx.get(f"{server.url}/metrics", trust_env=False).text
        assert f'dlpipe_requests_total{{path="/predict",status="503"}} {statuses.count(503):.1f}' in metrics


def test_503_says_when_to_come_back_and_health_is_always_answered(tiny_bundle):
    predictor = Slow(tiny_bundle)
    with start(make_api(predictor, waiting=1)) as service, ThreadPoolExecutor(12) as crowd:
        asked = [crowd.submit(httpx.post, f"{service.url}/predict", content=d, trust_env=False) for d in different(12)]
        health = [httpx.get(f"{service.url}{p}", trust_env=False).status_code for p in ("/healthz", "/readyz") * 3]
        full = [r for r in (a.result() for a in asked) if r.status_code == 503]
    assert full and health == [200] * 6
    assert all(r.headers["retry-after"] == "1" and "again" in r.json()["error"] for r in full)


def test_bodies_together_have_a_limit(tiny_bundle):
    "Nine bodies that are announced as the longest allowed: there is room for eight; the ninth is refused unread."
    with start(make_api(tiny_bundle, max_bytes=1_000_000)) as service:
        where, held = (urlsplit(service.url).hostname, urlsplit(service.url).port), []
        head = b"POST /predict HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1000000\r\n\r\n"
        for _ in range(8):
            held.append(socket.create_connection(where))
            held[-1].sendall(head + b"x")
        time.sleep(0.3)
        with socket.create_connection(where) as s:
            s.sendall(head.replace(b"\r\n\r\n", b"\r\nExpect: 100-continue\r\n\r\n"))
            assert s.recv(100).startswith(b"HTTP/1.1 503")
        for s in held: s.close()
        end = time.monotonic() + 5
        while time.monotonic() < end and post(service.url, picture())[0] != 200: time.sleep(0.05)
        assert post(service.url, picture() + bytes(900_000))[0] == 200, "those who left gave their places back"


# ---- stopped and killed

def crowd_until(server, pictures, then, clients=12):
    "Send pictures from many clients, call `then` in the middle; gives the answers."
    left, lock, answers = list(enumerate(pictures)), threading.Lock(), []
    def client():
        while True:
            with lock:
                if not left: return
                i, data = left.pop()
            status, said, _ = post(server.url, data)
            with lock: answers.append((status, said))
            if status is None: return
    threads = [threading.Thread(target=client) for _ in range(clients)]
    for t in threads: t.start()
    while len(answers) < 20 and any(t.is_alive() for t in threads): time.sleep(0.005)
    then()
    for t in threads: t.join()
    return answers


def recorded(file):
    "The ids in a store."
    store = Store(file)
    ids = set(map(int, store.predictions()["id"]))
    store.close()
    return ids


def test_sigterm_finishes_what_was_accepted(tiny_bundle, tmp_path):
    with running(tiny_bundle, tmp_path, slow=0.1, store=tmp_path / "s.db", limits={"batch": 4}) as server:
        answers = crowd_until(server, different(300), lambda: server.process.send_signal(signal.SIGTERM))
        code = server.process.wait(30)
    good = [said["predictions"][0]["id"] for status, said in answers if status == 200]
    assert code == 0 and "Traceback" not in server.log, server.log
    assert {status for status, _ in answers} <= {200, None} and len(good) > 20 and len(good) < 300
    assert recorded(tmp_path / "s.db") == set(good), "what is in the store and what was answered are the same"


def test_requests_in_flight_at_sigterm_are_all_answered(tiny_bundle, tmp_path):
    "One request a client, all of them under way when the signal comes: every one is answered."
    with running(tiny_bundle, tmp_path, slow=0.3, store=tmp_path / "s.db", limits={"batch": 2}) as server:
        with ThreadPoolExecutor(12) as crowd:
            asked = [crowd.submit(post, server.url, d) for d in different(12)]
            end = time.monotonic() + 10
            while time.monotonic() < end and under_way(server) < 12: time.sleep(0.02)
            server.process.send_signal(signal.SIGTERM)
            answers = [a.result() for a in asked]
        assert [a[0] for a in answers] == [200] * 12 and server.process.wait(20) == 0
    assert len(recorded(tmp_path / "s.db")) == 12


def under_way(server):
    "How many pictures have come in: those that wait, and those in the calls before."
    text = httpx.get(f"{server.url}/metrics", trust_env=False).text
    number = lambda name: float(re.search(rf"^{name} (\S+)", text, re.M)[1])
    return number("dlpipe_waiting_pictures") + number("dlpipe_batch_pictures_sum") + 2 # two are with the network


def test_kill_loses_no_answer_and_the_service_starts_again(tiny_bundle, tmp_path):
    pictures, given = different(400, seed=3), []
    for k in range(3):
        with running(tiny_bundle, tmp_path, store=tmp_path / "s.db") as server:
            answers = crowd_until(server, pictures[k * 100:], server.process.kill)
        given += [said["predictions"][0]["id"] for status, said in answers if status == 200]
    assert given and set(given) <= recorded(tmp_path / "s.db")


# ---- a new model

def promote(registry, name):
    "What `Registry.promote` of chapter 14 does to the file."
    (registry / "champion.new").write_text(f"{name}\n")
    os.replace(registry / "champion.new", registry / "champion")


@pytest.fixture
def registry(tmp_path):
    "Three versions: 0.8 and 0.6 as thresholds, and one that is broken."
    for name, threshold in [("v0001", 0.8), ("v0002", 0.6), ("v0003", 0.7)]:
        write_tiny_bundle(tmp_path / "registry" / name / "bundle", threshold=threshold)
    (tmp_path / "registry/v0003/bundle/model.onnx").write_bytes(b"half a network")
    promote(tmp_path / "registry", "v0001")
    return tmp_path / "registry"


def until(what, seconds=15):
    "Wait until `what()` is true; fails otherwise."
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


def test_a_new_champion_while_sixteen_clients_send(registry, tmp_path):
    with running(registry, tmp_path, store=tmp_path / "s.db") as server:
        model = lambda: httpx.get(f"{server.url}/model", trust_env=False).json()
        ready = lambda: httpx.get(f"{server.url}/readyz", trust_env=False).json()
        pictures, answers, done = different(40), [], threading.Event()
        def client(k):
            with httpx.Client(trust_env=False, timeout=30) as c:
                for i in range(10**6):
                    if done.is_set(): return
                    r = c.post(f"{server.url}/predict", content=pictures[(i + k) % 40])
                    answers.append((r.status_code, r.json()["predictions"][0]["model"]))
        with ThreadPoolExecutor(16) as crowd:
            asked = [crowd.submit(client, k) for k in range(16)]
            try:
                first = model()
                promote(registry, "v0002")
                until(lambda: model()["version"] != first["version"])
                promote(registry, "v0003")
                until(lambda: ready()["refused"])
                assert model()["threshold"] == 0.6 and "model.onnx" in ready()["refused"] and ready()["status"] == "ready"
                promote(registry, "v0001")
                until(lambda: model() == first and ready()["refused"] is None)
            finally: done.set()
            for a in asked: a.result()
    assert {status for status, _ in answers} == {200} and len({m for _, m in answers}) == 2 and len(answers) > 50
    assert "refused" in server.log and "Traceback" not in server.log


def test_a_bundle_that_is_replaced_in_its_folder(tmp_path):
    bundle = write_tiny_bundle(tmp_path / "bundle")
    api = make_api(bundle, look_every=3600)
    champion = api.state.champion
    with start(api) as service:
        version = lambda: httpx.get(f"{service.url}/model", trust_env=False).json()["version"]
        first = version()
        assert not champion.look()
        (bundle / "model.onnx").write_bytes(b"half of it is copied")
        assert not champion.look() and champion.refused and version() == first and post(service.url, picture())[0] == 200
        write_tiny_bundle(tmp_path / "new", labels=("cat", "dog", "fox"))
        for name in ("model.onnx", "model.json"): shutil.copy(tmp_path / "new" / name, bundle / name)
        assert champion.look() and champion.refused is None and version() != first
        assert set(post(service.url, picture())[1]["predictions"][0]["probabilities"]) == {"cat", "dog", "fox"}
        shutil.rmtree(bundle)
        assert not champion.look() and "no" in champion.refused and post(service.url, picture())[0] == 200


def test_another_picture_size_between_two_requests(tmp_path):
    "A request that began with the old model ends with it, though the new one takes pictures of another size."
    bundle = write_tiny_bundle(tmp_path / "bundle")
    api = make_api(bundle)
    old = api.state.champion.predictor
    write_tiny_bundle(tmp_path / "new", size=48)
    new = Predictor(tmp_path / "new")
    from dlpipe_nb.api import _read
    pairs = [(p, _read("x", picture(), p.size, 10**6)) for p in (old, new, old)]
    said = api.state.line.classify(pairs)
    assert [s.model for s in said] == [old.version, new.version, old.version] and {s.label for s in said} == {"cat"}


@pytest.mark.parametrize("text", ["", "v1", "../../etc", "v0009", "\x00", "v0001/../v0002"])
def test_a_champion_file_of_nonsense(registry, text):
    api = make_api(registry)
    (registry / "champion").write_text(text)
    assert not api.state.champion.look() and api.state.champion.refused
    assert api.state.champion.predictor.threshold == 0.8


def test_a_model_that_can_not_answer_is_refused(registry, monkeypatch):
    api = make_api(registry)
    monkeypatch.setattr("dlpipe_nb.api.Predictor.probabilities", lambda self, x: np.zeros((1, 5), np.float32))
    promote(registry, "v0002")
    assert not api.state.champion.look() and "shape" in api.state.champion.refused


# ---- when the store fails

def test_a_store_that_can_not_be_written_is_told_and_recovers(tiny_bundle, tmp_path):
    import sqlite3
    store = Store(tmp_path / "s.db")
    real, broken = store.add, [True]
    def add(*a, **k):
        if broken[0]:
            from sqlalchemy.exc import OperationalError
            from dlpipe_nb.core import InputError
            raise InputError("a database that can be written", "disk full", "free it") from OperationalError("x", {}, sqlite3.Error())
        return real(*a, **k)
    store.add = add
    with start(make_api(tiny_bundle, store)) as service:
        r = httpx.post(f"{service.url}/predict", content=picture(), trust_env=False)
        assert r.status_code == 503 and "nothing was recorded" in r.json()["error"] and r.headers["retry-after"]
        broken[0] = False
        assert post(service.url, picture())[0] == 200 and store.n == 1


def test_numbers_of_two_services_do_not_mix_and_paths_are_few(tiny_bundle):
    with start(make_api(tiny_bundle)) as a, start(make_api(tiny_bundle)) as b:
        post(a.url, picture())
        post(a.url, b"milk")
        for i in range(20): httpx.get(f"{a.url}/secret-{i}", trust_env=False)
        one, two = (httpx.get(f"{s.url}/metrics", trust_env=False) for s in (a, b))
    assert one.headers["content-type"].startswith("text/plain")
    assert 'dlpipe_predictions_total{label="cat",unsure="false"} 1.0' in one.text and "dlpipe_predictions_total{" not in two.text
    assert 'dlpipe_errors_total{kind="picture"} 1.0' in one.text and 'path="other",status="404"} 20.0' in one.text
    assert "secret" not in one.text
