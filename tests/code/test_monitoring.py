"Chapter 13: drift is caught and quiet batches aren't, feedback is settled, the report says what it doesn't know."
from __future__ import annotations

import base64
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import sqlalchemy as sa
from scipy.stats import false_discovery_control, ks_2samp

from conftest import BLUE, RED, picture
from dlpipe_nb.core import InputError, check
from dlpipe_nb.inference import Predictor, Store, classify, pack
from dlpipe_nb.monitoring import (MEASURES, accuracy_by_week, alarms, answers, distances, drift, embeddings, live_accuracy, monitor, plot_drift,
                                  reference_embeddings, settle, two_samples, write_dashboard)


def batch(n, seed, dark=0.0, unsure=0.05, dogs=0.5):
    "Made-up predictions, as a store gives them."
    rng = np.random.default_rng(seed)
    return pd.DataFrame({"label": np.where(rng.random(n) < dogs, "dog", "cat"), "unsure": rng.random(n) < unsure,
                         "brightness": np.clip(rng.normal(0.5 - dark, 0.1, n), 0, 1),
                         "contrast": np.clip(rng.normal(0.2, 0.05, n), 0, 1),
                         "sharpness": np.clip(rng.normal(0.04, 0.01, n), 0, 1), "probability": rng.beta(12, 1, n)})


def reference_of(df):
    counts = answers(df)
    return {"n": len(df), "statistics": {m: df[m].tolist() for m in MEASURES},
            "labels": {k: int(counts.get(k, 0)) for k in ("cat", "dog", "unsure")}}


REFERENCE = reference_of(batch(300, 0))


def test_answers_counts_unsure_as_an_answer_and_leaves_out_what_was_not_read():
    df = pd.DataFrame({"label": ["cat", "cat", "dog", None], "unsure": [False, True, False, True]})
    assert answers(df).to_dict() == {"cat": 1, "unsure": 1, "dog": 1}


def test_a_dark_batch_drifts_in_brightness_only():
    table = drift(REFERENCE, batch(150, 1, dark=0.2)).set_index("measure")
    assert table.loc["brightness", "drifted"] and table["drifted"].sum() == 1
    assert list(table.index) == [*MEASURES, "labels"]


def test_effect_is_scipys_distance_and_adjusted_p_is_never_smaller():
    df = batch(150, 2, dark=0.05)
    table = drift(REFERENCE, df).set_index("measure")
    assert table.loc["brightness", "effect"] == pytest.approx(ks_2samp(REFERENCE["statistics"]["brightness"], df["brightness"]).statistic)
    assert (table["p_adjusted"] >= table["p_value"] - 1e-12).all()


def test_labels_drift_when_one_answer_takes_over_and_says_which():
    row = drift(REFERENCE, batch(150, 3, dogs=0.95)).set_index("measure").loc["labels"]
    assert row["drifted"] and row["change"].startswith(("dog", "cat"))


def test_many_more_unsure_answers_are_drift():
    row = drift(REFERENCE, batch(150, 3, unsure=0.5)).set_index("measure").loc["labels"]
    assert row["drifted"] and row["change"].startswith("unsure")


def test_quiet_weeks_seldom_cry():
    cries = sum(drift(reference_of(batch(300, seed)), batch(120, seed + 500))["drifted"].any() for seed in range(100, 300))
    assert cries <= 200 * 0.05


def test_digits_that_the_reference_does_not_keep_are_no_change():
    "As `export.reference_of` rounds: of values crowded just below 1, many are 1 in the reference and none in the store."
    rows = batch(300, 9).assign(probability=1 - 10 ** np.random.default_rng(1).uniform(-9, -1, 300))
    rounded = {"statistics": {m: rows[m].round(5).tolist() for m in MEASURES}}
    table = drift(reference_of(rows) | rounded, rows).set_index("measure")
    assert (table["effect"] == 0).all() and ks_2samp(rounded["statistics"]["probability"], rows["probability"]).statistic > 0.3


def test_a_crowd_with_a_tiny_change_is_significant_and_not_drift():
    row = drift(REFERENCE, batch(50_000, 5, dark=0.01)).set_index("measure").loc["brightness"]
    assert not row["drifted"]
    big = reference_of(batch(50_000, 6))
    row = drift(big, batch(50_000, 7, dark=0.01)).set_index("measure").loc["brightness"]
    assert row["p_adjusted"] < 1e-6 and row["effect"] < 0.15 and not row["drifted"]


def test_answers_that_are_all_the_same_in_both_are_no_drift():
    df = batch(60, 8).assign(label="cat", unsure=False)
    row = drift(reference_of(df), df).set_index("measure").loc["labels"]
    assert not row["drifted"] and row["p_value"] == 1


@pytest.mark.parametrize("reference, recent, words", [
    ({}, batch(50, 1), "statistics"),
    ({**REFERENCE, "labels": {}}, batch(50, 1), "labels"),
    ({**REFERENCE, "statistics": {k: v for k, v in REFERENCE["statistics"].items() if k != "contrast"}}, batch(50, 1), "contrast"),
    (REFERENCE, batch(50, 1).drop(columns="unsure"), "unsure"),
    (REFERENCE, batch(50, 1).assign(label="fox"), "fox"),
    (REFERENCE, batch(29, 1), "29"),
    (REFERENCE, batch(50, 1).assign(label=None), "0"),
])
def test_what_cannot_be_compared_is_refused_in_words(reference, recent, words):
    with pytest.raises(InputError, match=words): drift(reference, recent)


def test_rows_with_errors_do_not_count():
    df = batch(100, 9)
    broken = df.head(20).assign(label=None, brightness=np.nan, contrast=np.nan, sharpness=np.nan, probability=0.0)
    assert drift(REFERENCE, df)["effect"].tolist() == drift(REFERENCE, pd.concat([df, broken]))["effect"].tolist()


def test_the_figure_has_a_panel_for_each_measure():
    fig = plot_drift(REFERENCE, batch(60, 10, dark=0.2))
    assert len(fig.axes) == 6 and {"brightness", "answers"} <= {ax.get_title() for ax in fig.axes}


# ---- embeddings

def seeing(df, seed, shift=0.0, d=6):
    "The same predictions with made-up embeddings, moved by `shift` in one direction, and a size."
    E = np.random.default_rng(seed).normal(size=(len(df), d)) + shift * np.eye(d)[0]
    return df.assign(embedding=[pack(e) for e in E], size=96.0)


def reference_with_embeddings(seed=1, n=300):
    E = np.random.default_rng(seed).normal(size=(n, 6))
    statistics = REFERENCE["statistics"] | {"size": [96.0] * n}
    return REFERENCE | {"statistics": statistics, "embedding": {"n": n, "numbers": 6, "float16": base64.b64encode(pack(E)).decode()}}


SEEING = reference_with_embeddings()


def test_a_change_that_only_the_network_sees_is_caught():
    table = drift(SEEING, seeing(batch(120, 1), 5, shift=1.5)).set_index("measure")
    assert list(table.index) == [*MEASURES, "labels", "size", "distance", "embedding"]
    assert table.loc["embedding", "drifted"] and table.loc["embedding", "effect"] > 0.5 and "told apart" in table.loc["embedding", "change"]
    assert not table.drop(index=["embedding", "distance"])["drifted"].any()


def test_no_change_is_seen_where_there_is_none_and_twice_the_same_answer():
    week = seeing(batch(120, 1), 6)
    assert not drift(SEEING, week)["drifted"].any() and drift(SEEING, week).equals(drift(SEEING, week))


def test_another_picture_size_is_seen():
    row = drift(SEEING, seeing(batch(120, 1), 6).assign(size=480.0)).set_index("measure").loc["size"]
    assert row["drifted"] and row["change"] == "96 → 480"


def test_two_samples_keeps_its_promise_and_has_power():
    rng = np.random.default_rng(0)
    quiet = [two_samples(rng.normal(size=(60, 8)), rng.normal(size=(40, 8)), shuffles=99)[0] for _ in range(200)]
    assert np.mean(np.array(quiet) < 0.05) <= 0.10
    found = [two_samples(rng.normal(size=(60, 8)), rng.normal(size=(40, 8)) + 0.6, shuffles=99)[0] for _ in range(20)]
    assert np.mean(np.array(found) < 0.05) >= 0.95


def test_two_samples_agrees_with_scikit_learn():
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import cross_val_predict
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(150, 5)), rng.normal(size=(150, 5)) + [0.7, 0, 0, 0, 0]
    X, y = np.r_[a, b], np.r_[np.zeros(150), np.ones(150)]
    theirs = roc_auc_score(y, cross_val_predict(LinearDiscriminantAnalysis(), X, y, cv=5, method="decision_function"))
    assert two_samples(a, b, shuffles=9)[1] == pytest.approx(2 * theirs - 1, abs=0.05)


def test_embeddings_that_are_all_the_same_are_no_drift():
    p, effect = two_samples(np.ones((40, 4)), np.ones((30, 4)), shuffles=99)
    assert p > 0.5 and effect == 0


def test_distances_leave_a_row_out_of_its_own_neighbours():
    from sklearn.neighbors import NearestNeighbors
    E, F = np.random.default_rng(2).normal(size=(50, 4)), np.random.default_rng(3).normal(size=(7, 4))
    near = NearestNeighbors(n_neighbors=5).fit(E)
    assert np.allclose(distances(F, E), near.kneighbors(F)[0].mean(1)) and np.allclose(distances(E), near.kneighbors()[0].mean(1))


def test_a_bundle_and_a_store_without_embeddings_go_on_working():
    week = batch(60, 1)
    assert list(drift(SEEING, week)["measure"]) == list(drift(REFERENCE, seeing(week, 1))["measure"]) == [*MEASURES, "labels"]
    assert reference_embeddings(REFERENCE) is None and embeddings(week, 6).shape == (0, 6)


def test_embeddings_of_another_bundle_and_a_garbled_reference_are_refused():
    with pytest.raises(InputError, match="embeddings of 6 numbers.*found some of 3"): drift(SEEING, seeing(batch(60, 1), 1, d=3))
    for kept in ({"n": 3, "numbers": 6, "float16": "@@"}, {"n": 3, "numbers": 6, "float16": "AAAA"}, {"numbers": 6}):
        with pytest.raises(InputError, match="export the bundle again"): drift(SEEING | {"embedding": kept}, seeing(batch(60, 1), 1))


# ---- feedback

def said(*rows): return pd.DataFrame(rows, columns=["id", "prediction_id", "label", "given_by"])
PREDICTIONS = pd.DataFrame({"id": [1, 2, 3, 4], "sha256": ["a", "b", "c", "a"], "label": ["cat", "dog", None, "dog"]})


def test_the_last_word_of_a_person_counts_and_disputes_are_listed():
    got = settle(PREDICTIONS, said((1, 1, "dog", "anna"), (2, 1, "cat", "anna"), (3, 2, "dog", "anna"), (4, 2, "cat", "ben"))).set_index("sha256")
    assert got.loc["a", "label"] == "cat" and not got.loc["a", "conflict"]
    assert got.loc["b", "conflict"] and got.loc["b", "label"] is None and got.loc["b", "said"] == "cat, dog"


def test_people_without_a_name_are_different_people():
    got = settle(PREDICTIONS, said((1, 1, "dog", ""), (2, 1, "cat", None))).set_index("sha256")
    assert got.loc["a", "conflict"] and got.loc["a", "people"] == 2


def test_feedback_follows_the_picture_not_the_prediction():
    got = settle(PREDICTIONS, said((1, 1, "dog", "anna"), (2, 4, "cat", "ben"), (3, 99, "cat", "ben")))
    assert got["sha256"].tolist() == ["a"] and got["conflict"].all()


def test_the_word_of_who_settles_a_dispute_counts_alone_in_the_accuracy_too():
    told = said((1, 1, "dog", "anna"), (2, 1, "cat", "ben"), (3, 1, "cat", "settled by carla"), (4, 1, "dog", "anna"))
    row, = settle(PREDICTIONS, told).to_dict("records")
    assert (row["label"], row["said"], row["people"], row["conflict"]) == ("cat", "cat", 1, False)
    live = live_accuracy(PREDICTIONS, told)
    assert (live.right, live.total, live.conflicting) == (1, 2, 0)   # two predictions for the picture: cat and dog


def test_settling_nothing_gives_an_empty_table_and_no_accuracy(tmp_path):
    store = Store(tmp_path / "s.db")
    assert settle(store.predictions(), store.feedback()).empty
    live = live_accuracy(store.predictions(), store.feedback())
    assert live.total == 0 and (live.low, live.high) == (0, 1) and "no usable feedback" in repr(live)


def test_live_accuracy_counts_and_leaves_disputes_and_errors_out():
    predictions = PREDICTIONS.iloc[:3]
    live = live_accuracy(predictions, said((1, 1, "cat", "x"), (2, 2, "cat", "x"), (3, 3, "cat", "x")))
    assert (live.right, live.total) == (1, 2) and live.low < 0.5 < live.high
    live = live_accuracy(predictions, said((1, 1, "cat", "x"), (2, 1, "dog", "y")))
    assert live.total == 0 and live.conflicting == 1


def test_accuracy_by_week_has_a_row_a_week_and_leaves_out_the_future():
    rows = pd.DataFrame({"id": range(1, 31), "sha256": [f"{i}" for i in range(30)], "label": "cat",
                         "seen_at": pd.to_datetime(["2026-11-16"] * 10 + ["2026-11-10 23:59"] * 10 + ["2031-01-01"] * 9 + ["2026-11-22 23:59"], format="mixed")})
    people = said(*((i, i, "dog" if i % 5 == 0 else "cat", "x") for i in range(1, 31)))
    table = accuracy_by_week(rows, people, now=pd.Timestamp("2026-11-23"))
    assert [f"{w:%Y-%m-%d}" for w in table["week"]] == ["2026-11-09", "2026-11-16"]
    assert table["right"].tolist() == [8, 8] and table["total"].tolist() == [10, 11] and (table["low"] < table["high"]).all()
    assert accuracy_by_week(rows.head(0), people).empty


# ---- the report

def red_or_blue(n, seed, dark=0):
    "(name, bytes) of n pictures, each another shade; `dark` takes light away."
    rng = np.random.default_rng(seed)
    shade = lambda c: tuple(int(max(0, v - dark + d)) for v, d in zip(c, rng.integers(0, 20, 3)))
    return [(f"{i}.png", picture(shade(RED if i % 2 else BLUE))) for i in range(n)]


@pytest.fixture
def bundle(tiny_bundle, tmp_path):
    "The tiny bundle with a reference made of its own answers."
    import json, shutil
    from dlpipe_nb.inference import seal_of
    folder = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    store = Store(tmp_path / "reference.db")
    classify(red_or_blue(60, 0), Predictor(folder), store, bs=100)
    info = json.loads((folder / "model.json").read_text())
    info |= {"reference": reference_of(store.predictions()), "metrics": {"test": {"accuracy": 0.95}}}
    info["sha256"] = seal_of(info)
    (folder / "model.json").write_text(json.dumps(info))
    return folder


def test_monitor_is_quiet_alarmed_or_says_that_it_cannot_say(bundle, tmp_path):
    predictor = Predictor(bundle)
    quiet, night, few = (Store(tmp_path / f"{n}.db") for n in ("quiet", "night", "few"))
    classify(red_or_blue(60, 1), predictor, quiet, bs=100)
    classify(red_or_blue(60, 2, dark=40) + [("broken.png", b"no picture")], predictor, night, bs=100)
    classify(red_or_blue(5, 3), predictor, few, bs=100)
    assert not monitor(quiet, predictor).alarm and "none that matters" in repr(monitor(quiet, predictor))
    report = monitor(tmp_path / "night.db", bundle)
    assert report.alarm and "brightness" in report.drifted and report.errors == 1 and report.pictures == 60
    assert not monitor(night, predictor, alpha=0).drifted and not monitor(night, predictor, min_effect=1.1).drifted
    assert monitor(few, predictor).drift is None and "too few pictures to say" in repr(monitor(few, predictor))


def test_monitor_looks_at_one_model_and_at_recent_pictures_only(bundle, tmp_path):
    predictor, store = Predictor(bundle), Store(tmp_path / "s.db")
    classify(red_or_blue(40, 1), predictor, store, bs=100)
    import dataclasses
    other = [dataclasses.replace(p, model="another") for p in predictor.predict_many(b for _, b in red_or_blue(40, 5, dark=40))]
    store.add(other)
    assert monitor(store, predictor).pictures == 40
    assert monitor(store, predictor, last=30).pictures == 30
    assert monitor(store, predictor, since="2100-01-01").pictures == 0
    with pytest.raises(InputError, match="time"): monitor(store, predictor, since="yesterday-ish")


def test_a_live_accuracy_below_the_promise_is_an_alarm_by_itself(bundle, tmp_path):
    predictor, store = Predictor(bundle), Store(tmp_path / "s.db")
    classify(red_or_blue(40, 1), predictor, store, bs=100)
    for row in store.predictions().itertuples(): store.add_feedback(row.id, "dog", by="x")
    report = monitor(store, predictor)
    assert report.worse and report.alarm and not report.drifted and report.promised == 0.95


def test_what_cannot_be_compared_is_said(bundle, tmp_path):
    store = Store(tmp_path / "s.db")
    classify(red_or_blue(40, 1), Predictor(bundle), store, bs=100)
    report = monitor(store, bundle)
    assert len(report.missing) == 2 and "Not compared: size: the bundle has none" in repr(report) and "embedding: the bundle has none" in repr(report)


def test_an_empty_store_and_another_models_store_are_said(bundle, tmp_path):
    import dataclasses
    store = Store(tmp_path / "s.db")
    assert "The store is empty" in repr(monitor(store, bundle))
    store.add(dataclasses.replace(p, model="another") for p in Predictor(bundle).predict_many(b for _, b in red_or_blue(3, 1)))
    assert "no answers of model" in repr(monitor(store, bundle)) and "another (3)" in repr(monitor(store, bundle))


def test_a_path_without_a_store_makes_none(bundle, tmp_path):
    with pytest.raises(InputError, match="no file"): monitor(tmp_path / "typo.db", bundle)
    assert not (tmp_path / "typo.db").exists()


def test_a_clock_that_jumps_is_said_and_the_newest_are_the_last_stored(bundle, tmp_path):
    import sqlalchemy as sa
    store = Store(tmp_path / "s.db")
    classify(red_or_blue(40, 1), Predictor(bundle), store, bs=100)
    assert not monitor(store, bundle).notes
    with store.engine.begin() as db:
        db.execute(sa.text("update predictions set seen_at = '2031-05-01 00:00:00' where id = 7"))
        db.execute(sa.text("update predictions set seen_at = '1970-01-01 00:00:00' where id = 40"))
    report = monitor(store, bundle)
    assert len(report.notes) == 2 and "1 records lie in the future, up to 2031-05-01" in report.notes[0] and "jumped back 2 times" in report.notes[1]
    assert monitor(store, bundle, last=1).pictures == 1 and report.pictures == 40


def test_a_reference_without_statistics_is_refused_in_words(tiny_bundle, tmp_path):
    store = Store(tmp_path / "s.db")
    classify(red_or_blue(40, 1), Predictor(tiny_bundle), store, bs=100)
    with pytest.raises(InputError, match="a reference with statistics.*export the bundle again"): monitor(store, tiny_bundle)


def test_who_only_looks_writes_nothing(bundle, tmp_path):
    store = Store(tmp_path / "s.sqlite")
    before = sa.inspect(store.engine).get_table_names()
    assert alarms(store).empty and list(alarms(store)) == ["id", "model", "began_at", "ended_at", "said", "actions"]
    write_dashboard(store, bundle, tmp_path / "page.html")
    assert sa.inspect(store.engine).get_table_names() == before


def test_a_locked_store_is_said(bundle, tmp_path, monkeypatch):
    import sqlite3
    store = Store(tmp_path / "s.db")
    store.close()
    real = sqlite3.connect(tmp_path / "s.db")
    real.execute("pragma journal_mode=delete")
    real.execute("begin exclusive")
    import dlpipe_nb.inference as inference
    import sqlalchemy as sa
    monkeypatch.setattr(inference, "_engine", lambda url: sa.create_engine(url, connect_args={"timeout": 0.1}))
    with pytest.raises(InputError, match="database is locked"): monitor(tmp_path / "s.db", bundle)
    real.close()


def test_production_needs_neither_torch_nor_fastai():
    code = "import sys, dlpipe_nb.monitoring; print(sorted({m.partition('.')[0] for m in sys.modules} & {'torch', 'fastai', 'fastcore'}))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


# ---- the exercises' checks

@pytest.mark.parametrize("answer, passed, words", [
    (["contrast", "probability"], True, "right"), (["brightness"], False, "too small"), (["sharpness", "contrast"], False, "0.20"),
    (["contrast", "labels", "probability"], False, "under 0.15"), (["contrast"], False, "two measures"), (["colour"], False, "isn't one"),
    (None, None, "not attempted")])
def test_exercise_1(answer, passed, words):
    got = check("13.1", answer)
    assert got.passed is passed and words in got.message


@pytest.mark.parametrize("answer, passed, words", [
    (lambda a, b: ks_2samp(a, b).statistic, True, "right"),
    (lambda a, b: abs(a.mean() - b.mean()), False, "means"),
    (lambda a, b: max(abs((a <= v).sum() - (b <= v).sum()) for v in np.r_[a, b]), False, "means"),
    (lambda a, b: 0.3, False, "distance 0"),
    (lambda a, b: None, None, "not attempted")])
def test_exercise_2(answer, passed, words):
    got = check("13.2", answer)
    assert got.passed is passed and words in got.message


@pytest.mark.parametrize("answer, passed, words", [
    (lambda p: false_discovery_control(p), True, "right"),
    (lambda p: np.sort(false_discovery_control(p)), False, "in the order in which"),
    (lambda p: np.minimum(np.array(p) * len(p), 1), False, "Bonferroni"),
    (lambda p: np.array(p) * len(p) / (np.argsort(np.argsort(p)) + 1), False, "now none may be larger"),
    (lambda p: [min(p)], False, "4, not 1"),
    (lambda p: p, False, "yours"),
    (lambda p: None, None, "not attempted")])
def test_exercise_3(answer, passed, words):
    got = check("13.3", answer)
    assert got.passed is passed and words in got.message


def rung(looks, ends=("quiet",)):
    found, on = [], False
    for i, said in enumerate(looks):
        if said == "alarm" and not on: found.append(i)
        on = True if said == "alarm" else False if said in ends else on
    return found


@pytest.mark.parametrize("answer, passed, words", [
    (rung, True, "right"),
    (lambda looks: [i for i, x in enumerate(looks) if x == "alarm"], False, "doesn't ring again"),
    (lambda looks: rung(looks, ("quiet", "few")), False, "ends nothing"),
    (lambda looks: rung(looks)[:1], False, "rings again"),
    (lambda looks: [i + 1 for i in rung(looks)], False, "count from 0"),
    (lambda looks: len(rung(looks)), False, "list"),
    (lambda looks: None, None, "not attempted")])
def test_exercise_4(answer, passed, words):
    got = check("13.4", answer)
    assert got.passed is passed and words in got.message


@pytest.mark.parametrize("answer, passed, words", [
    (1 - 0.95**8, True, "right"), (0.34, True, "right"), (0.4, False, "twice"), (0.95**8, False, "without"), (0.05, False, "one question"),
    (34, False, "between 0 and 1"), ("a third", False, "number"), (None, None, "not attempted")])
def test_exercise_5(answer, passed, words):
    got = check("13.5", answer)
    assert got.passed is passed and words in got.message
