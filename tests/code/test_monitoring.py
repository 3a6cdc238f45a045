"Chapter 13: drift is caught and quiet batches aren't, feedback is settled, the report says what it doesn't know."
from __future__ import annotations

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from scipy.stats import ks_2samp

from conftest import BLUE, RED, picture
from dlpipe_nb.core import InputError, check
from dlpipe_nb.inference import Predictor, Store, classify
from dlpipe_nb.monitoring import MEASURES, answers, drift, live_accuracy, monitor, plot_drift, settle


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
    alarms = sum(drift(reference_of(batch(300, seed)), batch(120, seed + 500))["drifted"].any() for seed in range(100, 300))
    assert alarms <= 10   # of 200: alpha is 0.05


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
