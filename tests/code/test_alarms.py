"Chapter 13: an alarm rings once in its period, is written down, and what failed is tried again."
from __future__ import annotations

import http.server
import json
import threading
from contextlib import contextmanager

import pandas as pd
import pytest

from dlpipe_nb.core import InputError
from dlpipe_nb.inference import Rule, Store, append_to, webhook
from dlpipe_nb.monitoring import Alarm, LiveAccuracy, Report, alarms, alert


def report(alarm=True, few=False, model="m1"):
    row = dict(measure="brightness", change="0.50 → 0.20", p_value=0.0, p_adjusted=0.0, effect=0.8, drifted=alarm)
    return Report(model, 9 if few else 100, 0, None if few else pd.DataFrame([row]), LiveAccuracy(0, 0, 0.0, 1.0, 0), 0.95)


def test_it_rings_once_in_a_period_and_again_in_the_next(store):
    rung = []
    bell = Rule("bell", lambda p: True, rung.append)
    states = [alert(r, store, [bell]).state for r in (report(False), report(), report(), report(few=True), report(), report(False), report(False), report())]
    assert states == ["quiet", "begun", "going on", "too few pictures", "going on", "ended", "quiet", "begun"]
    assert [p.name for p in rung] == ["alarm 1", "alarm 2"] and "brightness (0.50 → 0.20)" in rung[0].error and rung[0].model == "m1"
    table = alarms(store)
    assert table["id"].tolist() == [2, 1] and table["ended_at"].isna().tolist() == [True, False] and set(table["actions"]) == {"bell: done"}


def test_two_models_have_alarms_of_their_own(store):
    assert alert(report(), store).state == alert(report(model="m2"), store).state == "begun"
    assert alert(report(False), store).state == "ended" and alert(report(model="m2"), store).state == "going on"


def test_what_fails_is_noted_stops_nobody_and_is_tried_again(store):
    works, rung = [], []
    def ring(p):
        if not works: raise ConnectionError("no line")
        rung.append(p.name)
    rules = [Rule("phone", lambda p: True, ring), Rule("list", lambda p: True, rung.append)]
    assert alert(report(), store, rules) == Alarm("begun", 1, done=1, failed=1)
    assert "phone: failed (ConnectionError: no line)" in alarms(store)["actions"][0] and "list: done" in alarms(store)["actions"][0]
    works.append(True)
    assert alert(report(), store, rules) == Alarm("going on", 1, done=1, failed=0) and alert(report(), store, rules).done == 0
    assert rung[1:] == ["alarm 1"]


def test_a_killed_program_rings_at_the_next_look(store, monkeypatch):
    import dlpipe_nb.monitoring as monitoring
    rung, real = [], monitoring._deliver
    bell = Rule("bell", lambda p: True, rung.append)
    def killed(*_): raise KeyboardInterrupt
    monkeypatch.setattr(monitoring, "_deliver", killed)
    with pytest.raises(KeyboardInterrupt): alert(report(), store, [bell])
    monkeypatch.setattr(monitoring, "_deliver", real)
    assert alert(report(), store, [bell]) == Alarm("going on", 1, 1, 0) and len(rung) == 1


def test_a_file_gets_one_line_even_if_the_note_of_it_was_lost(store, tmp_path):
    import sqlalchemy as sa
    file = tmp_path / "alarms.jsonl"
    rule = Rule("file", lambda p: True, append_to(file))
    alert(report(), store, [rule])
    with store.engine.begin() as db: db.execute(sa.text("update alarm_actions set state = 'pending'"))
    assert alert(report(), store, [rule]).done == 1
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(lines) == 1 and lines[0]["name"] == "alarm 1" and "Drift" in lines[0]["error"]


@contextmanager
def receiver():
    got = []
    class Take(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            got.append((self.headers["Idempotency-Key"], json.loads(self.rfile.read(int(self.headers["Content-Length"])))))
            self.send_response(204)
            self.end_headers()
        def log_message(self, *_): pass
    server = http.server.HTTPServer(("127.0.0.1", 0), Take)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try: yield f"http://127.0.0.1:{server.server_port}/alarm", got
    finally: server.shutdown()


def test_a_webhook_is_called_once(store):
    with receiver() as (url, got):
        for _ in range(3): alert(report(), store, [webhook(url, secret="s", tries=1)])
    assert len(got) == 1 and got[0][1]["name"] == "alarm 1" and "Drift: brightness" in got[0][1]["error"] and got[0][1]["key"] == got[0][0]


def test_many_looking_at_once_ring_once(tmp_path):
    rung, there = [], threading.Barrier(6)
    Store(tmp_path / "s.db").close()
    def one():
        store = Store(tmp_path / "s.db")
        there.wait()
        alert(report(), store, [Rule("bell", lambda p: True, rung.append)])
        store.close()
    threads = [threading.Thread(target=one) for _ in range(6)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert len(rung) == 1 and len(alarms(tmp_path / "s.db")) == 1


def test_rules_of_one_name_are_refused(store):
    bell = Rule("bell", lambda p: True, print)
    with pytest.raises(InputError, match="different names"): alert(report(), store, [bell, bell])
