"Chapter 13's page: what is on it, that nothing on it comes from elsewhere, and that a million records don't slow it down."
from __future__ import annotations

import re
import time

import numpy as np
import pandas as pd
import pytest

from conftest import write_tiny_bundle
from code_monitoring import EVIL, filled, seeing_bundle
from dlpipe_nb.core import InputError
from dlpipe_nb.inference import Predictor, Rule, Store, classify
from dlpipe_nb.monitoring import Dashboard, _gathered, _pace_of, alert, monitor, write_dashboard


@pytest.fixture(scope="module")
def bundle(tmp_path_factory): return seeing_bundle(tmp_path_factory.mktemp("seeing") / "bundle")


@pytest.fixture(scope="module")
def page(bundle, tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    store = filled(folder, bundle, dark=True)
    alert(monitor(store, bundle), store, [Rule("bell", lambda p: True, lambda p: None)])
    return write_dashboard(store, bundle, folder / "out" / "page.html").read_text("utf-8")


def test_the_page_says_what_the_report_says(page):
    for words in ("Somebody should look", "brightness", "what the network sees", "Accuracy", "what was said", "bell: done",
                  "The newest", "The least sure", "The strangest", "broken.png", "By the week in which"):
        assert words in page, words


def test_nothing_comes_from_elsewhere_and_names_are_text(page):
    assert not re.search(r"(src|href)=[\"'](?!data:)", page) and "<script" not in page and "url(" not in page and "@import" not in page
    assert EVIL not in page and "&lt;img src=x" in page and "default-src 'none'" in page


def test_an_empty_store_and_a_store_without_feedback_give_a_page(bundle, tmp_path):
    text = write_dashboard(Store(tmp_path / "empty.db"), bundle, tmp_path / "a.html").read_text("utf-8")
    assert "The store is empty" in text and "Too few pictures to say" in text and "None yet" in text
    store = filled(tmp_path, bundle, people=False, images=False)
    text = write_dashboard(store, bundle, tmp_path / "b.html").read_text("utf-8")
    assert "No feedback yet" in text and "the picture was not kept" in text and "None was rung" in text


def test_an_older_bundle_gives_a_page_without_embeddings(tmp_path):
    old = seeing_bundle(tmp_path / "old", embedding=False)
    text = write_dashboard(filled(tmp_path, old), old, tmp_path / "a.html").read_text("utf-8")
    assert "Not compared" in text and "The strangest" not in text and "The newest" in text


def test_what_cannot_be_shown_leaves_the_old_page(bundle, tmp_path):
    out = tmp_path / "page.html"
    out.write_text("old")
    with pytest.raises(InputError, match="no file"): write_dashboard(tmp_path / "typo.db", bundle, out)
    plain = write_tiny_bundle(tmp_path / "plain")
    with pytest.raises(InputError, match="reference with statistics"): write_dashboard(filled(tmp_path, plain), plain, out)
    assert out.read_text() == "old"


def test_pictures_lie_beside_a_store_given_by_its_path(bundle, tmp_path):
    filled(tmp_path, bundle).close()
    assert write_dashboard(tmp_path / "store.db", bundle, tmp_path / "a.html").read_text("utf-8").count("<img") > 10


def test_weeks_are_counted_and_the_shares_are_those_of_a_sample(bundle, tmp_path):
    store = filled(tmp_path, bundle)
    weeks = _pace_of(store, Predictor(bundle).version, 4)
    assert sum(w["pictures"] for w in weeks) == store.n and len(weeks) == 4
    assert all(abs(sum(w["answers"].values()) - 1) < 1e-9 for w in weeks if "sample" in w)


def test_the_widget_looks_again_and_shows_what_went_wrong(bundle, tmp_path, monkeypatch):
    store = filled(tmp_path, bundle)
    board = Dashboard(store, bundle, every=0.05)
    first = board.page.value
    alert(monitor(store, bundle), store)
    classify([("a new one.png", np.zeros((40, 40, 3), np.uint8))], Predictor(bundle), store)
    end = time.monotonic() + 10
    while "a new one.png" not in board.page.value and time.monotonic() < end: time.sleep(0.02)
    board.stop()
    assert board.page.value != first and "sandbox" in board.page.value and "a new one.png" in board.page.value
    import dlpipe_nb.monitoring as monitoring
    def locked(*_): raise InputError("a database that can be read", "a lock", "free it")
    monkeypatch.setattr(monitoring, "_gathered", locked)
    board.look()
    assert "role='alert'" in board.said.value and "free it" in board.said.value


def a_million_more(store, version):
    "A million rows over ten months, nine of ten of this model; the indexes are made afterwards, as for any older store."
    with store.engine.connect() as db:
        raw = db.connection.dbapi_connection
        for command in ("pragma synchronous=off", "drop index ix_predictions_model", "drop index ix_predictions_seen_at"): raw.execute(command)
        raw.execute(f"""with recursive n(i) as (select 0 union all select i + 1 from n where i < 999999)
            insert into predictions (sha256, model, name, source, label, probability, probabilities, unsure, brightness, contrast, sharpness, seen_at, size, embedding)
            select printf('%064x', i), case when i % 10 then '{version}' else 'older' end, i || '.png', '', case when i % 3 then 'cat' else 'dog' end, 0.9,
            '{{"cat": 0.9, "dog": 0.1}}', 0, 0.4, 0.1, 0.05, strftime('%Y-%m-%d %H:%M:%f000', '2026-01-01', (i / 3300) || ' days'), 60.0, zeroblob(6) from n""")
        raw.commit()
    store.close()


def test_a_million_records_are_no_slower_than_a_page_should_be(bundle, tmp_path):
    store, version = filled(tmp_path, bundle), Predictor(bundle).version
    a_million_more(store, version)
    store = Store(tmp_path / "store.db")
    assert store.n > 1_000_000
    took, busy = [], []
    for _ in range(3):
        start, at_work = time.perf_counter(), time.process_time()
        write_dashboard(store, bundle, tmp_path / "a.html", weeks=52)
        took.append(time.perf_counter() - start), busy.append(time.process_time() - at_work)
    print(f"a page over {store.n:,} records: {min(took):.2f} s by the clock, {min(busy):.2f} s of the processor")
    assert min(busy) < 2.0, (took, busy) # the processor's time: other programs on this machine don't count
    start = time.process_time()
    monitor(store, bundle)
    assert time.process_time() - start < 2.0
