"""The predictor, the store and the flow between them."""
from __future__ import annotations

import io
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pytest
from conftest import BLUE, GREY, RED, ROOT, picture
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dlpipe_nb.core import InputError, PictureError, check, picture_array
from dlpipe_nb.inference import Prediction, Predictor, Store, classify, files, seal_of


@pytest.fixture(scope="module")
def predictor(tiny_bundle): return Predictor(tiny_bundle)


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "store.db", images=tmp_path / "images")
    yield store
    store.close()


def shade(i): return picture((60 + i % 150, 20 + i // 150, 30))


def test_one_picture_in_every_form_gives_one_answer(predictor, tmp_path):
    data = picture(RED)
    (tmp_path / "a.png").write_bytes(data)
    forms = [tmp_path / "a.png", str(tmp_path / "a.png"), data, bytearray(data), memoryview(data), Image.open(io.BytesIO(data)),
             np.array(Image.open(io.BytesIO(data)))]
    said = [predictor.predict(f) for f in forms]
    assert {p.label for p in said} == {"cat"} and np.ptp([p.probability for p in said]) < 1e-6
    assert said[0].name == "a.png" and predictor.predict(data, name="x").name == "x"
    assert abs(sum(said[0].probabilities.values()) - 1) < 1e-5 and set(said[0].statistics) == {"brightness", "contrast", "sharpness", "size"}


def test_unsure_is_below_the_threshold(predictor):
    assert predictor.predict(picture(GREY)).unsure and not predictor.predict(picture(BLUE)).unsure


@pytest.mark.parametrize("bad", [b"", b"hello", None, 7, "missing.png", np.zeros((0, 0, 3), np.uint8), object()])
def test_what_is_no_picture_raises_alone_and_is_recorded_among_others(predictor, bad):
    with pytest.raises(PictureError): predictor.predict(bad)
    among = predictor.predict_many([picture(RED), bad, picture(BLUE)])
    assert [p.label for p in among] == ["cat", None, "dog"] and "Expected" in among[1].error and among[1].unsure


@given(st.binary(max_size=300))
@settings(max_examples=60, deadline=None)
def test_no_bytes_break_it(predictor, data):
    [p] = predictor.predict_many([data])
    assert p.error or p.label in predictor.labels


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP"])
def test_a_hundred_mutated_pictures_of_each_format(predictor, kind):
    rng, data = np.random.default_rng(0), picture(RED, kind=kind)
    mutants = []
    for _ in range(100):
        m = bytearray(data)
        for at in rng.integers(0, len(m), 4): m[at] = rng.integers(0, 256)
        mutants.append(bytes(m[: rng.integers(1, len(m) + 1)] if rng.random() < 0.3 else m))
    assert all(p.error or p.label in predictor.labels for p in predictor.predict_many(mutants))


@pytest.mark.parametrize("n", [0, 1, 31, 32, 33, 64, 65, 150])
def test_many_are_answered_all_and_in_order(predictor, n):
    said = list(predictor.predict_iter((f"{i}", shade(i)) for i in range(n)))
    assert [p.name for p in said] == [f"{i}" for i in range(n)]
    if n: assert abs(said[-1].probability - predictor.predict(shade(n - 1)).probability) < 1e-5


def test_an_endless_source_is_read_only_as_needed(predictor):
    read = []
    def camera():
        while True:
            read.append(1)
            yield "frame", picture(RED)
    stream = predictor.predict_iter(camera(), bs=4)
    assert next(stream).label == "cat" and len(read) <= 16
    stream.close()


def test_threads_share_a_predictor(predictor):
    with ThreadPoolExecutor(8) as pool: said = list(pool.map(predictor.predict, [picture(RED), picture(BLUE)] * 40))
    assert [p.label for p in said] == ["cat", "dog"] * 40


def test_openvinos_first_answers_may_come_from_many_threads(tiny_bundle):
    "Its bindings set themselves up at the first answer; two threads that did so at once never came back."
    pytest.importorskip("openvino", reason="openvino isn't installed")
    code = ("import sys; sys.setswitchinterval(1e-5)\nimport numpy as np\nfrom concurrent.futures import ThreadPoolExecutor\n"
            "from dlpipe_nb.inference import Predictor\n"
            f"q = Predictor({str(tiny_bundle)!r}, engine='openvino')\nx = np.zeros((4, 32, 32, 3), np.uint8)\n"
            "with ThreadPoolExecutor(8) as pool: print(len(list(pool.map(q.probabilities, [x] * 64))), len(list(q.predict_iter([('a', x[0])] * 300))))")
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=os.environ | {"PYTHONPATH": str(ROOT)})
        assert done.stdout.split() == ["64", "300"], done.stderr


def test_files_finds_pictures_below_and_passes_over_the_rest(tmp_path):
    for name in ("b.png", "a.JPG", "deep/c.webp", "notes.txt", ".hidden.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(picture())
    assert [name for name, _ in files(tmp_path)] == ["a.JPG", "b.png", "deep/c.webp"]
    assert [name for name, _ in files(tmp_path / "notes.txt")] == ["notes.txt"]
    with pytest.raises(InputError, match="no such path"): list(files(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="none"): list(files((tmp_path / "empty").mkdir() or tmp_path / "empty"))


@pytest.mark.parametrize("n", [1, 32, 63, 64, 65, 200])
def test_the_flow_stores_every_picture_and_acts_once(predictor, store, n):
    acted, items = [], [(f"{i}.png", shade(i)) for i in range(n)]
    report = classify(items, predictor, store, source="camera 1", actions=[acted.append])
    assert (report.new, report.known, report.errors) == (n, 0, 0) and store.n == n and len(acted) == n
    again = classify(items, predictor, store, actions=[acted.append])
    assert (again.new, again.known) == (0, n) and store.n == n and len(acted) == n
    assert set(store.predictions().source) == {"camera 1"}


def test_the_same_picture_twice_in_a_flow_is_one_record_and_one_action(predictor, store):
    acted = []
    report = classify([("a", picture(RED)), ("b", picture(RED)), ("broken", b"x"), ("broken too", b"x")], predictor, store, actions=[acted.append])
    assert (report.new, report.known, report.errors) == (2, 2, 2) and len(acted) == store.n == 2


def test_an_error_is_a_record(predictor, store):
    classify([("good", picture(RED)), ("bad", b"x")], predictor, store)
    said = store.predictions().set_index("name")
    assert pd.isna(said.loc["bad"].label) and "Expected" in said.loc["bad"].error and pd.isna(said.loc["good"].error)


def test_store_keeps_ids_and_gives_the_newest_first(predictor, store):
    said = predictor.predict_many([("a", picture(RED)), ("b", picture(BLUE))])
    ids = store.add(said)
    assert store.add(said[::-1]) == ids[::-1] and store.add([]) == []
    assert store.predictions()["name"].tolist() == ["b", "a"] and len(store.predictions(limit=1)) == 1
    assert store.predictions().probabilities[0] == pytest.approx(said[1].probabilities)
    other = Prediction(**{**said[0].__dict__, "model": "another model"})
    assert store.known([said[0], other]) == {(said[0].sha256, said[0].model)} and store.known([]) == set()


def test_another_model_version_is_another_record(predictor, store):
    p = predictor.predict(picture(RED))
    assert len(set(store.add([p, Prediction(**{**p.__dict__, "model": "v2"})]))) == 2


def test_writers_at_the_same_moment_make_one_record(predictor, tmp_path):
    said = predictor.predict_many([shade(i) for i in range(20)])
    ready, got = threading.Barrier(6, timeout=30), []
    def write():
        ready.wait()
        store = Store(tmp_path / "shared.db")
        got.append(tuple(store.add(said)))
        store.close()
    threads = [threading.Thread(target=write) for _ in range(6)]
    [t.start() for t in threads], [t.join() for t in threads]
    assert len(got) == 6 and len(set(got)) == 1 and Store(tmp_path / "shared.db").n == 20


def test_feedback_is_kept_with_who_and_when_and_never_overwritten(predictor, store):
    [i] = store.add([predictor.predict(picture(RED))])
    store.add_feedback(i, "dog", by="anna"), store.add_feedback(i, " cat ", by="ben")
    said = store.feedback()
    assert said.label.tolist() == ["dog", "cat"] and said.given_by.tolist() == ["anna", "ben"] and said.given_at.notna().all()
    for bad in ((99, "dog"), (i, ""), (i, None)):
        with pytest.raises(InputError): store.add_feedback(*bad)
    assert len(store.feedback()) == 2


def test_pictures_are_kept_once_by_their_contents(predictor, store):
    p, data = predictor.predict(picture(RED)), picture(RED)
    assert store.picture(p.sha256) is None
    path = store.keep(p.sha256, data)
    assert store.keep(p.sha256, data) == path == store.picture(p.sha256) and path.read_bytes() == data


def test_a_store_reopens_and_refuses_what_is_not_one(tmp_path, predictor):
    store = Store(tmp_path / "a.db")
    store.add([predictor.predict(picture(RED))])
    store.close()
    assert Store(f"sqlite:///{tmp_path / 'a.db'}").n == 1
    (tmp_path / "text.db").write_text("this is no database, " * 100)
    import sqlite3
    with sqlite3.connect(tmp_path / "other.db") as db: db.execute("create table predictions (id integer)")
    for bad in (tmp_path / "text.db", tmp_path / "other.db", tmp_path, "no-such-dialect://x"):
        with pytest.raises(InputError): Store(bad)
    assert (tmp_path / "text.db").read_text().startswith("this is no database")


OLD = """create table predictions (id integer primary key, sha256 varchar(64) not null, model varchar(64) not null, name text, source text, label text,
    probability float, probabilities json, unsure boolean, brightness float, contrast float, sharpness float, error text, seen_at datetime,
    unique (sha256, model)); insert into predictions (sha256, model, name, label, probability, probabilities, unsure, seen_at)
    values ('aa', 'm', 'old.png', 'cat', 0.9, '{}', 0, '2026-01-01 00:00:00.000000')"""


def older_store(path):
    import sqlite3
    with sqlite3.connect(path) as db: db.executescript(OLD)
    db.close()
    return path


def test_an_older_store_gets_what_came_later_and_keeps_its_records(predictor, tmp_path):
    store = Store(older_store(tmp_path / "s.db"))
    classify([("new.png", picture(RED))], predictor, store)
    rows = store.predictions()
    assert rows["name"].tolist() == ["new.png", "old.png"] and rows["size"].tolist()[0] == 40 and rows["embedding"].isna().all()
    import sqlalchemy as sa
    assert {i["name"] for i in sa.inspect(store.engine).get_indexes("predictions")} == {"ix_predictions_model", "ix_predictions_seen_at"}
    assert Store(tmp_path / "s.db").n == 2


def test_many_open_an_older_store_at_once(tmp_path):
    older_store(tmp_path / "s.db")
    there, opened = threading.Barrier(8), []
    def one():
        there.wait()
        opened.append(Store(tmp_path / "s.db").n)
    threads = [threading.Thread(target=one) for _ in range(8)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert opened == [1] * 8


def test_the_embedding_goes_from_the_network_into_the_store(tmp_path, store):
    from conftest import write_tiny_bundle
    from dlpipe_nb.inference import unpack
    seeing = Predictor(write_tiny_bundle(tmp_path / "bundle", embedding=True))
    one = seeing.predict(picture(RED))
    assert np.allclose(one.embedding, RED) and one == seeing.predict(picture(RED))
    classify([(f"{i}.png", picture((i, 40, 40))) for i in range(100)] + [("broken.png", b"no picture")], seeing, store)
    rows = store.predictions()
    assert rows["embedding"].isna().sum() == 1 and rows["size"].isna().sum() == 1
    assert unpack(b"".join(rows["embedding"].dropna()), 3)[:, 0].tolist() == list(range(99, -1, -1))
    pytest.importorskip("openvino")
    said = Predictor(tmp_path / "bundle", engine="openvino").predict_many([picture(RED)] * 70)
    assert all(np.allclose(p.embedding, RED, atol=0.5) for p in said)


def test_predictions_of_one_model(predictor, store):
    import dataclasses
    said = predictor.predict_many([picture((i, 0, 0)) for i in range(5)])
    store.add([*said[:3], *(dataclasses.replace(p, model="other") for p in said)])
    assert len(store.predictions(model="other")) == 5 and len(store.predictions(limit=2, model=predictor.version)) == 2


def test_the_seal_of_a_description_covers_everything_but_itself():
    info = {"labels": ["cat", "dog"], "threshold": 0.5}
    assert seal_of(info) == seal_of(info | {"sha256": "x"}) != seal_of(info | {"labels": ["dog", "cat"]})


def test_the_check_tells_wrong_answers_apart():
    right = lambda p: p.error is None and p.label == "dog" and p.probability >= 0.9 and not p.unsure
    wrong = [lambda p: p.label == "dog", lambda p: p.probability >= 0.9 and not p.unsure, lambda p: right(p) and p.probability > 0.9,
             lambda p: p.label == "dog" and p.probability >= 0.9]
    assert check("10.1", right).passed and check("10.1", None).passed is None
    said = [check("10.1", w) for w in wrong]
    assert not any(s.passed for s in said) and len({s.message for s in said}) == len(wrong)
