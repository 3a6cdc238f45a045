"""Where pictures come from: folders that fill, many sources at once, devices behind a broker."""
from __future__ import annotations

import os
import threading
import time

import numpy as np
import pytest
from conftest import BLUE, RED, picture
from mosquitto import broker, closed_broker  # noqa: F401, fixtures

from dlpipe_nb.core import InputError, PictureError
from dlpipe_nb.inference import classify, merge_sources, mqtt_source, watch_folder


def shade(i): return picture((60 + i % 150, 20 + i // 150, 30))
def bmp(i): return picture((60 + i % 150, 20 + i // 150, 30), kind="BMP", size=(50, 50))


def until(condition, seconds=20):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition(): return True
        time.sleep(0.02)
    return False


class Flow(threading.Thread):
    "A flow that runs beside the test, until it is stopped."
    def __init__(self, items, predictor, store, **k):
        super().__init__(daemon=True)
        self.go = lambda: classify(items, predictor, store, **k)
        self.report = self.error = None
        self.start()
    def run(self):
        try: self.report = self.go()
        except Exception as e: self.error = e


# ---- a pause

def test_none_brings_out_what_waits(predictor):
    asked = []
    def camera():
        for i in range(5):
            asked.append(i)
            yield f"{i}", shade(i)
        yield None
        asked.append("after the pause")
        yield "late", shade(9)
    said = predictor.predict_iter(camera(), bs=32)
    assert [next(said).name for _ in range(5)] == list("01234") and asked[-1] == 4
    assert next(said).name == "late" and list(said) == []


def test_an_item_may_be_an_error_and_may_name_its_source(predictor, store):
    classify([("a", picture(RED), "yard"), ("b", PictureError("x", "y", "z"), "door"), ("c", picture(BLUE))], predictor, store, source="rest")
    said = store.predictions().set_index("name")
    assert said["source"].to_dict() == {"a": "yard", "b": "door", "c": "rest"} and "found y" in said.loc["b", "error"]


# ---- a folder that fills

def test_a_watched_folder_gives_what_is_there_and_what_arrives(predictor, store, tmp_path):
    yard, stop = tmp_path / "yard", threading.Event()
    (yard / "deep").mkdir(parents=True)
    (yard / "first.png").write_bytes(shade(1)), (yard / "notes.txt").write_text("no picture")
    flow = Flow(watch_folder(yard, stop=stop, settle=0.3), predictor, store, source="yard")
    assert until(lambda: store.n == 1)
    (yard / "deep" / "second.png").write_bytes(shade(2))
    with open(yard / "slow.bmp", "wb") as f:                       # written in pieces, with pauses
        for piece in np.array_split(np.frombuffer(bmp(3), np.uint8), 6): f.write(piece.tobytes()), f.flush(), time.sleep(0.12)
    (yard / "part.tmp").write_bytes(shade(4))
    os.rename(yard / "part.tmp", yard / "moved in.png")
    (yard / "broken.jpg").write_bytes(b"no signal")
    (yard / "new").mkdir()
    (yard / "new" / "fifth.png").write_bytes(shade(5))
    assert until(lambda: store.n == 6), store.predictions()[["name", "error"]]
    time.sleep(0.5)
    stop.set()
    flow.join(10)
    said = store.predictions().set_index("name")
    assert set(said.index) == {"first.png", "deep/second.png", "slow.bmp", "moved in.png", "broken.jpg", "new/fifth.png"}
    assert said["error"].notna().sum() == 1 and "Expected" in said.loc["broken.jpg", "error"] and flow.report.new == 6


def test_a_file_that_vanishes_is_an_error_record(predictor, store, tmp_path):
    flow = Flow(watch_folder(tmp_path, seconds=1.5, settle=0.6), predictor, store)
    time.sleep(0.4)
    (tmp_path / "gone.png").write_bytes(shade(1))
    time.sleep(0.3)
    (tmp_path / "gone.png").unlink()
    flow.join(10)
    [row] = store.predictions().to_dict("records")
    assert row["name"] == "gone.png" and "vanished" in row["error"]


def test_a_changed_file_is_read_again_and_an_unchanged_one_isnt(predictor, store, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(shade(1))
    flow = Flow(watch_folder(tmp_path / "in", seconds=2, settle=0.1, rescan=0.2), predictor, store)
    assert until(lambda: store.n == 1)
    (tmp_path / "in" / "a.png").write_bytes(shade(2))
    flow.join(10)
    assert store.n == 2 and (flow.report.new, flow.report.known) == (2, 0)


def test_a_folder_that_isnt_there_is_refused_at_once(tmp_path):
    with pytest.raises(InputError, match="no folder"): watch_folder(tmp_path / "nowhere")


# ---- many sources

def test_a_slow_and_a_failing_source_dont_hold_up_the_others(predictor, store):
    def quick():
        for i in range(100): yield f"q{i}", shade(i)
    def slow():
        for i in range(2):
            time.sleep(1)
            yield f"s{i}", shade(200 + i)
    def failing():
        yield "f0", shade(300)
        raise ConnectionError("no route to the camera")
    start, when = time.monotonic(), {}
    for p in predictor.predict_iter(merge_sources({"quick": quick(), "slow": slow(), "bad": failing()})):
        when.setdefault(p.source, []).append((time.monotonic() - start, p))
    assert len(when["quick"]) == 100 and len(when["slow"]) == 2 and max(t for t, _ in when["quick"]) < 1
    assert when["slow"][0][0] < 1.8, "it doesn't wait for a batch to fill"
    error = when["bad"][-1][1].error
    assert len(when["bad"]) == 2 and "no route" in error and "bad" in error


def test_a_source_that_never_answers_doesnt_keep_the_merge_from_stopping(predictor, store):
    stop = threading.Event()
    def stuck():
        threading.Event().wait(30)
        yield "never", b""
    flow = Flow(merge_sources({"stuck": stuck(), "good": [("a", picture(RED))]}, stop=stop), predictor, store)
    assert until(lambda: store.n == 1, 5)
    stop.set()
    flow.join(5)
    assert flow.report.new == 1


def test_a_fast_source_waits_for_room(predictor):
    read = []
    def fast():
        for i in range(10_000):
            read.append(i)
            yield f"{i}", b"x" * 1000
    items = merge_sources({"fast": fast()}, room=8)
    for _ in range(5): next(items)
    time.sleep(0.3)
    assert len(read) <= 5 + 8 + 2
    items.close()
    assert until(lambda: threading.active_count() < 20)
    with pytest.raises(InputError): merge_sources({})


# ---- devices behind a broker

def device(port, **k):
    import paho.mqtt.client as mqtt
    client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2)
    client.connect("127.0.0.1", port)
    client.loop_start()
    return client


def send(client, name, data):
    client.publish(f"pets/{name}/picture", data, qos=1).wait_for_publish(10)


def test_five_devices_one_slow_and_one_sending_garbage(predictor, store, broker):  # noqa: F811
    stop = threading.Event()
    flow = Flow(mqtt_source("127.0.0.1", broker.port, stop=stop), predictor, store)
    time.sleep(0.5)
    def work(name, n, pause, make):
        client = device(broker.port)
        for i in range(n):
            send(client, name, make(i))
            time.sleep(pause)
        client.disconnect(), client.loop_stop()
    jobs = [("door", 40, 0, lambda i: shade(i)), ("yard", 40, 0, lambda i: shade(100 + i)), ("kitchen", 40, 0.001, lambda i: shade(200 + i)),
            ("slow", 3, 0.4, lambda i: shade(300 + i)), ("mad", 20, 0, lambda i: b"\xff\xd8 garbage %d" % i)]
    devices = [threading.Thread(target=work, args=j) for j in jobs]
    [t.start() for t in devices], [t.join() for t in devices]
    assert until(lambda: store.n == 143), (store.n, flow.error)
    stop.set()
    flow.join(10)
    said = store.predictions()
    assert said["source"].value_counts().to_dict() == {"door": 40, "yard": 40, "kitchen": 40, "mad": 20, "slow": 3}
    assert set(said.loc[said["error"].notna(), "source"]) == {"mad"} and flow.report.errors == 20
    assert said["name"].str.startswith(tuple(j[0] for j in jobs)).all()


def test_what_is_sent_while_we_are_away_is_there_when_we_come_back(predictor, store, broker):  # noqa: F811
    assert classify(mqtt_source("127.0.0.1", broker.port, seconds=0.6), predictor, store).new == 0   # the broker knows us now
    client = device(broker.port)
    for i in range(30): send(client, "door", shade(i))
    assert classify(mqtt_source("127.0.0.1", broker.port, seconds=2), predictor, store).new == 30
    assert classify(mqtt_source("127.0.0.1", broker.port, seconds=1), predictor, store) .new == store.n - 30 == 0, "each was acknowledged"
    client.disconnect(), client.loop_stop()


def test_what_wasnt_stored_isnt_acknowledged(predictor, store, broker):  # noqa: F811
    first = mqtt_source("127.0.0.1", broker.port, seconds=20)
    assert next(first) is None
    time.sleep(0.4)
    client = device(broker.port)
    for i in range(5): send(client, "door", shade(i))
    got = [next(x for x in first if x is not None) for _ in range(5)]
    assert len(got) == 5
    first.close()                                                  # we die with five pictures in our hands
    assert classify(mqtt_source("127.0.0.1", broker.port, seconds=1.5), predictor, store).new == 5
    client.disconnect(), client.loop_stop()


def test_too_large_a_picture_is_an_error_record(predictor, store, broker):  # noqa: F811
    stop = threading.Event()
    flow = Flow(mqtt_source("127.0.0.1", broker.port, stop=stop, most=1000), predictor, store)
    time.sleep(0.5)
    client = device(broker.port)
    send(client, "door", b"x" * 5000), send(client, "door", shade(1))
    assert until(lambda: store.n == 2)
    stop.set(), flow.join(10), client.disconnect(), client.loop_stop()
    assert store.predictions()["error"].dropna().str.contains("at most").tolist() == [True]


def test_a_broker_that_isnt_there_or_doesnt_let_us_in_is_named(closed_broker):  # noqa: F811
    from postgres import free_port
    with pytest.raises(InputError, match="a broker at"): next(mqtt_source("127.0.0.1", free_port(), seconds=1))
    with pytest.raises(InputError, match="lets us in"): list(mqtt_source("127.0.0.1", closed_broker.port, seconds=5))
    assert set(mqtt_source("127.0.0.1", closed_broker.port, seconds=0.5, user="me", password="horse battery")) == {None}
    with pytest.raises(InputError, match="one \\+"): mqtt_source("127.0.0.1", topic="pets/picture")


def test_a_lost_broker_is_one_sources_failure(predictor, store, closed_broker):  # noqa: F811
    sources = {"post": mqtt_source("127.0.0.1", closed_broker.port, seconds=5), "folder": [("a", picture(RED))]}
    report = classify(merge_sources(sources), predictor, store)
    assert (report.new, report.errors) == (2, 1) and "post" in set(store.predictions()["source"])


def test_idle_moments_are_not_counted_as_pictures(monkeypatch):
    from dlpipe_nb import inference
    bars, real = [], inference.progress
    monkeypatch.setattr(inference, "progress", lambda *a: bars.append(real(*a)) or bars[-1])
    assert list(inference._counted(iter([1, None, None, 2]))) == [1, None, None, 2] and bars[0].n == 2 and bars[0].total is None
    assert list(inference._counted([1, 2, 3])) == [1, 2, 3] and bars[1].n == bars[1].total == 3
