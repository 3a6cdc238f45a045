"""Rules, the outbox, appended files and webhooks: each action once, and what fails comes again."""
from __future__ import annotations

import http.server
import json
import sqlite3
import threading
import time

import numpy as np
import pytest
from conftest import BLUE, GREY, RED, picture

from dlpipe_nb.core import InputError, check
from dlpipe_nb.inference import (CsvFile, Rule, Store, append_to, classify, genuine, is_error, is_unsure, says,
                                 signature, webhook)


ITEMS = [("red", picture(RED)), ("blue", picture(BLUE)), ("grey", picture(GREY)), ("broken", b"x")]


def always(p): return True
def lines(path): return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_conditions_choose_what_they_say(predictor):
    red, blue, grey, broken = predictor.predict_many(ITEMS)
    assert [says("dog", 0.9)(p) for p in (red, blue, grey, broken)] == [False, True, False, False]
    assert not says("dog", 1.01)(blue) and [is_unsure(p) for p in (red, grey, broken)] == [False, True, False]
    assert [is_error(p) for p in (red, grey, broken)] == [False, False, True]
    assert says(grey.label, sure=False)(grey) and not says(grey.label)(grey)


def test_each_rule_acts_once_on_what_it_is_about(predictor, store, tmp_path):
    did = []
    rules = [Rule("dogs", says("dog", 0.9), append_to(tmp_path / "dogs.jsonl")), Rule("ask", is_unsure, lambda p: did.append(p.name)),
             Rule("mend", is_error, lambda p: did.append(p.error))]
    report = classify(ITEMS, predictor, store, actions=rules)
    assert (report.acted, report.failed) == (3, 0) and did[0] == "grey" and "Expected" in did[1]
    assert [x["name"] for x in lines(tmp_path / "dogs.jsonl")] == ["blue"]
    again = classify(ITEMS, predictor, store, actions=rules)
    assert again.acted == 0 and len(did) == 2 and len(lines(tmp_path / "dogs.jsonl")) == 1
    assert store.actions()["state"].tolist() == ["done"] * 3 and store.actions()["attempts"].tolist() == [1] * 3


def test_a_failing_action_stops_nobody_and_comes_again(predictor, store, tmp_path):
    down, did = [True], []
    def door(p):
        if down[0]: raise OSError("the door doesn't answer")
        did.append(p.name)
    rules = [Rule("door", always, door), Rule("list", always, append_to(tmp_path / "list.jsonl"))]
    report = classify(ITEMS, predictor, store, actions=rules, bs=2)
    assert (report.new, report.failed) == (4, 3) and len(lines(tmp_path / "list.jsonl")) == 4, "it rests after three failures"
    todo = store.actions().query("action == 'door'")
    assert todo["state"].tolist() == ["failed"] * 3 + ["pending"] and "doesn't answer" in todo["error"].iloc[0]
    down[0] = False
    again = classify([], predictor, store, actions=rules)
    assert again.acted == 4 and sorted(did) == sorted(n for n, _ in ITEMS) and len(lines(tmp_path / "list.jsonl")) == 4
    assert set(store.actions()["state"]) == {"done"}


def test_a_failed_action_is_tried_again_within_a_long_run(predictor, store):
    tries = []
    def door(p):
        tries.append(p.name)
        if len(tries) == 1: raise OSError("busy")
    def slowly():
        yield ITEMS[0]
        for _ in range(20):
            yield None
            time.sleep(0.02)
    report = classify(slowly(), predictor, store, actions=[Rule("door", always, door)], retry=0.1)
    assert tries == ["red", "red"] and (report.acted, report.failed) == (1, 1)


def test_a_condition_that_fails_is_recorded_and_decided_later(predictor, store):
    did = []
    classify(ITEMS, predictor, store, actions=[Rule("clever", lambda p: p.colour == "red", did.append)])
    todo = store.actions()
    assert set(todo["state"]) == {"undecided"} and "colour" in todo["error"].iloc[0] and not did
    report = classify([], predictor, store, actions=[Rule("clever", lambda p: p.label == "cat" and not p.unsure, did.append)])
    assert [p.name for p in did] == ["red"] and report.acted == 1 and report.failed == 0
    assert store.actions()["state"].value_counts().to_dict() == {"not wanted": 3, "done": 1}


def test_what_was_noted_and_not_done_is_done_after_a_restart(predictor, store, tmp_path):
    rule = Rule("list", always, append_to(tmp_path / "list.jsonl"))
    store.add(predictor.predict_many(ITEMS), "yard", [rule])    # and here the power goes
    assert set(store.actions()["state"]) == {"pending"} and not (tmp_path / "list.jsonl").exists()
    report = classify(ITEMS, predictor, Store(tmp_path / "store.db"), actions=[rule])
    assert (report.known, report.acted) == (4, 4) and {x["source"] for x in lines(tmp_path / "list.jsonl")} == {"yard"}


def test_a_line_that_was_written_but_not_ticked_off_isnt_written_again(predictor, store, tmp_path):
    said, rule = predictor.predict_many(ITEMS), Rule("list", always, append_to(tmp_path / "list.jsonl"))
    store.add(said, rules=[rule])
    for p in said[:2]: rule.carry_out(p)                        # and here the power goes, in the middle of a line
    with open(tmp_path / "list.jsonl", "a") as f: f.write('{"key": "lis')
    fresh = Rule("list", always, append_to(tmp_path / "list.jsonl"))
    assert classify([], predictor, store, actions=[fresh]).acted == 4
    assert [x["name"] for x in lines(tmp_path / "list.jsonl")] == [n for n, _ in ITEMS]


def test_record_and_note_are_one_transaction(predictor, store, monkeypatch):
    def broken(*args): raise RuntimeError("killed here")
    monkeypatch.setattr(Store, "_note", broken)
    with pytest.raises(RuntimeError): store.add(predictor.predict_many(ITEMS), rules=[Rule("x", always, print)])
    assert store.n == 0 and len(store.actions()) == 0


def test_two_rules_on_one_file_write_both(predictor, store, tmp_path):
    rules = [Rule(n, always, append_to(tmp_path / "list.jsonl")) for n in "ab"]
    classify(ITEMS, predictor, store, actions=rules)
    assert len({x["key"] for x in lines(tmp_path / "list.jsonl")}) == 8


def test_two_flows_at_once_act_once(predictor, tmp_path):
    items = [(str(i), picture((60 + i, 10, 10))) for i in range(60)]
    def flow(): classify(items, predictor, Store(tmp_path / "s.db"), actions=[Rule("list", always, append_to(tmp_path / "list.jsonl"))], bs=4)
    threads = [threading.Thread(target=flow) for _ in range(3)]
    [t.start() for t in threads], [t.join() for t in threads]
    assert Store(tmp_path / "s.db").n == 60 == len(lines(tmp_path / "list.jsonl"))


def test_an_old_store_gets_the_outbox_and_keeps_its_records(predictor, tmp_path):
    old = Store(tmp_path / "old.db")
    old.add(predictor.predict_many(ITEMS[:2]))
    old.close()
    with sqlite3.connect(tmp_path / "old.db") as db: db.execute("drop table actions")
    store, did = Store(tmp_path / "old.db"), []
    report = classify(ITEMS, predictor, store, actions=[Rule("r", always, did.append)])
    assert (report.known, report.new, report.acted) == (2, 2, 2) and [p.name for p in did] == ["grey", "broken"]


def test_rules_that_make_no_sense_are_refused(predictor, store, tmp_path):
    for make in (lambda: Rule("", always, print), lambda: Rule("x" * 201, always, print), lambda: Rule("x", "dog", print),
                 lambda: Rule("x", always, None), lambda: webhook("ftp://x")):
        with pytest.raises(InputError): make()
    with pytest.raises(InputError, match="different names"):
        classify(ITEMS, predictor, store, actions=[Rule("a", always, print), Rule("a", is_error, print)])
    with pytest.raises(InputError, match="Store"): classify(ITEMS, predictor, CsvFile(tmp_path / "a.csv"), actions=[print])
    assert store.n == 0


def test_a_file_that_isnt_ours_isnt_touched(predictor, store, tmp_path):
    (tmp_path / "letter.txt").write_text("Dear Anna, without a line end")
    report = classify(ITEMS[:1], predictor, store, actions=[Rule("r", always, append_to(tmp_path / "letter.txt"))])
    assert report.failed == 1 and (tmp_path / "letter.txt").read_text() == "Dear Anna, without a line end"


# ---- webhooks

class Receiver:
    "A server that answers with the given statuses in turn, then with 200, and keeps what came."
    def __init__(self, *statuses):
        got, todo = self.got, self.todo = [], list(statuses)
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                got.append((dict(self.headers), self.rfile.read(int(self.headers["Content-Length"]))))
                self.send_response(todo.pop(0) if todo else 200)
                self.send_header("Location", "/elsewhere")
                self.send_header("Content-Length", "0")
                self.end_headers()
            def log_message(self, *args): pass
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/in"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def __enter__(self): return self
    def __exit__(self, *args): self.server.shutdown(), self.server.server_close()


def test_a_webhook_is_signed_and_says_what_was_said(predictor, store):
    with Receiver() as r:
        assert classify(ITEMS[:1], predictor, store, source="door", actions=[Rule("Tür", always, webhook(r.url, "secret"))]).acted == 1
        [(headers, body)] = r.got
    assert genuine("secret", headers, body) and not genuine("other", headers, body) and not genuine("secret", headers, body + b" ")
    said = json.loads(body)
    assert said["label"] == "cat" and said["source"] == "door" and said["key"].startswith("Tür/") and "%" in headers["Idempotency-Key"]


def test_an_old_or_unsigned_letter_isnt_genuine():
    def sent(at): return {"X-Dlpipe-Timestamp": str(at), "X-Dlpipe-Signature": signature("s", str(at), b"{}")}
    now = int(time.time())
    assert genuine("s", sent(now), b"{}") and not genuine("s", sent(now - 301), b"{}") and not genuine("s", sent(now + 400), b"{}")
    assert not genuine("s", {}, b"{}") and not genuine("s", sent("nan"), b"{}") and not genuine("s", sent("²"), b"{}")
    assert not genuine("s", sent(now) | {"X-Dlpipe-Timestamp": str(now - 1)}, b"{}")


def test_a_webhook_is_sent_again_with_the_same_key(predictor, store):
    with Receiver(503, 500) as r:
        report = classify(ITEMS[:1], predictor, store, actions=[Rule("w", always, webhook(r.url, "s", pause=0.01))])
        assert (report.acted, report.failed, len(r.got)) == (1, 0, 3) and len({h["Idempotency-Key"] for h, _ in r.got}) == 1


@pytest.mark.parametrize("status, sent", [(404, 1), (302, 1), (503, 2)])
def test_what_a_receiver_refuses_is_a_failure_and_waits(predictor, store, status, sent):
    with Receiver(*[status] * 2) as r:
        rule = Rule("w", always, webhook(r.url, tries=2, pause=0.01))
        report = classify(ITEMS[:1], predictor, store, actions=[rule])
        assert (report.acted, report.failed, len(r.got)) == (0, 1, sent) and str(status) in store.actions()["error"][0]
        r.todo.clear()
        assert classify([], predictor, store, actions=[rule]).acted == 1 and store.actions()["attempts"][0] == 2


def test_nobody_there_is_a_failure_in_words(predictor, store):
    with Receiver() as r: url = r.url
    report = classify(ITEMS[:1], predictor, store, actions=[Rule("w", always, webhook(url, tries=1, timeout=1))])
    assert report.failed == 1 and "Expected an answer" in store.actions()["error"][0]


# ---- the checks of the exercises

def test_the_checks_tell_wrong_answers_apart():
    def each_tells(exercise, right, wrong):
        assert check(exercise, right).passed and check(exercise, None).passed is None
        said = [check(exercise, w) for w in wrong]
        assert not any(s.passed for s in said) and len({s.message for s in said}) == len(wrong), said
    each_tells("10.2", 960, [1000, 1260, 700, 40])
    each_tells("10.3", lambda keys: list(dict.fromkeys(keys)),
               [list, lambda k: sorted(set(k))[:2], lambda k: list(dict.fromkeys(list(k)[::-1])), _once_of_list])
    def device(t, *, head=True, tail=True, n=True, empty=True):
        a = t.split("/")
        return a[1] if (a[0] == "pets" or not head) and (a[-1] == "picture" or not tail) and (len(a) == 3 or not n) else ""
    each_tells("10.4", device, [lambda t: device(t, head=False), lambda t: device(t, tail=False), lambda t: device(t, n=False),
                                lambda t: device(t).partition(" ")[0], lambda t: "yard"[:0] or "picture"])
    def changed(items, least, *, keep=True, to=abs, more=0, none=True, first=True):
        last = None
        for x in items:
            if x is None:
                if none: yield None
                continue
            far = last is None and first or last is not None and to(x[1].mean() - last) >= least + more
            if far: yield x
            if far or not keep or last is None: last = x[1].mean()
    def as_function(**k): return lambda items, least: changed(items, least, **k)
    each_tells("10.5", as_function(), [as_function(keep=False), as_function(to=float), as_function(more=0.5), as_function(none=False),
                                       as_function(first=False), lambda items, least: items])


def _once_of_list(keys): return list(dict.fromkeys(keys)) if isinstance(keys, list) else list(keys)
