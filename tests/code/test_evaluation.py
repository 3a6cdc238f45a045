"Chapter 06: every measure against an independent oracle, and what happens with predictions that can't be."
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.calibration import calibration_curve
from sklearn.metrics import confusion_matrix, log_loss, precision_score, recall_score

from dlpipe_nb.core import InputError, Run, check
from dlpipe_nb.evaluation import (by, calibration_error, confusion, evaluate, evaluate_into, per_class, plot_confusion,
                                  plot_worst, reliability, reliability_diagram, scaled, slices, temperature, threshold, worst)
from dlpipe_nb.problem import Problem, cost_matrix, define_into, interval, score


def made_up(n=200, k=2, seed=0, sharp=3.0, skill=1.5):
    "Predictions of a classifier that never was: `sharp` above 1 makes it too sure."
    rng, labels = np.random.default_rng(seed), ["cat", "dog", "fox", "hen"][:k]
    true = rng.integers(0, k, n)
    true[:k] = range(k)
    scores = rng.normal(0, 1, (n, k))
    scores[range(n), true] += skill
    p = np.exp(scores * sharp)
    p /= p.sum(1, keepdims=True)
    said = p.argmax(1)
    return pd.DataFrame({"path": [f"pictures/{i}.png" for i in range(n)], "label": [labels[i] for i in true],
                         "predicted": [labels[i] for i in said], "probability": p.max(1), "correct": true == said,
                         **{f"p_{l}": p[:, i] for i, l in enumerate(labels)}})


frames = st.builds(made_up, st.integers(20, 150), st.integers(2, 4), st.integers(0, 10**6), st.floats(0.3, 6), st.floats(0, 3))
few = settings(max_examples=25, deadline=None)


def labels_of(preds): return [c[2:] for c in preds if c.startswith("p_")]


@few
@given(frames)
def test_confusion_precision_recall_against_sklearn(preds):
    labels = labels_of(preds)
    table = confusion(preds)
    assert (table.values == confusion_matrix(preds.label, preds.predicted, labels=labels)).all()
    ours, kinds = per_class(table), dict(labels=labels, average=None, zero_division=np.nan)
    np.testing.assert_allclose(ours.precision, precision_score(preds.label, preds.predicted, **kinds), atol=1e-9)
    np.testing.assert_allclose(ours.recall, recall_score(preds.label, preds.predicted, **kinds), atol=1e-9)


@few
@given(frames, st.integers(2, 20))
def test_calibration_against_sklearn(preds, bins):
    accuracy, sure = calibration_curve(preds.correct, preds.probability, n_bins=bins)
    ours = reliability(preds, bins)
    np.testing.assert_allclose(ours.accuracy, accuracy, atol=1e-9)
    np.testing.assert_allclose(ours.probability, sure, atol=1e-9)
    assert calibration_error(preds, bins) == pytest.approx((ours.n * abs(accuracy - sure)).sum() / len(preds), abs=1e-9)


@few
@given(frames)
def test_temperature_is_the_likeliest_and_changes_no_answer(preds):
    t, labels = temperature(preds), labels_of(preds)
    after = scaled(preds, t)
    assert (after.predicted == preds.predicted).all() and 0.1 <= t <= 10
    assert np.allclose(after[[f"p_{l}" for l in labels]].sum(axis=1), 1) and np.allclose(scaled(preds, 1).probability, preds.probability)
    if preds.correct.all(): assert t == 1
    else:
        loss = lambda x: log_loss(preds.label, scaled(preds, float(np.exp(x[0])))[[f"p_{l}" for l in labels]], labels=labels)
        best = min(loss([v]) for v in np.linspace(np.log(.1), np.log(10), 21))
        assert loss([np.log(t)]) <= best + 1e-6


def test_a_known_temperature_is_found():
    rng = np.random.default_rng(0)
    p = rng.uniform(0.02, 0.98, 40000)
    true = rng.random(40000) < p
    q = 1 / (1 + np.exp(-2.5 * np.log(p / (1 - p))))
    preds = pd.DataFrame({"label": np.where(true, "dog", "cat"), "predicted": np.where(q > .5, "dog", "cat"),
                          "probability": np.maximum(q, 1 - q), "p_cat": 1 - q, "p_dog": q})
    assert temperature(preds) == pytest.approx(2.5, rel=.05)
    assert calibration_error(scaled(preds, temperature(preds))) < .01 < calibration_error(preds)


@few
@given(frames, st.floats(0.3, 0.999), st.integers(1, 15))
def test_threshold_is_the_smallest_that_reaches_the_target(preds, target, at_least):
    cut = threshold(preds, target, at_least)
    fits = []
    for v in sorted(preds.probability.unique()):
        kept = preds[preds.probability >= v]
        if kept.correct.mean() >= target and len(kept) >= at_least: fits.append((v, len(kept) / len(preds), kept.correct.mean()))
    assert cut.reached == bool(fits)
    if fits:
        assert (cut.coverage, cut.accuracy) == pytest.approx(fits[0][1:], abs=1e-9)
        kept = preds.probability >= cut.value
        assert kept.mean() == pytest.approx(cut.coverage) and preds.correct[kept].mean() == pytest.approx(cut.accuracy)
    else: assert (cut.value, cut.coverage) == (0, 1)


def test_threshold_treats_equal_probabilities_alike():
    preds = pd.DataFrame({"label": ["cat"] * 30, "predicted": ["cat"] * 14 + ["dog"] + ["dog"] * 15, "probability": [.9] * 15 + [.8] * 15})
    preds["p_cat"] = np.where(preds.predicted == "cat", preds.probability, 1 - preds.probability)
    preds["p_dog"] = 1 - preds.p_cat
    assert threshold(preds, .93).value == pytest.approx(.85) and not threshold(preds, .95).reached


def test_a_target_out_of_reach_is_said():
    preds = made_up()
    preds["predicted"] = np.where(preds.label == "cat", "dog", "cat")
    res = evaluate(preds)
    assert res.threshold == 0 and res.coverage == 1 and "no threshold reaches 0.9" in res.notes[0] and "no threshold" in repr(res)


@few
@given(frames, st.sampled_from(["recall of dog", "expected cost"]), st.floats(0.02, 0.9))
def test_threshold_by_another_metric(preds, metric, target):
    labels = labels_of(preds)
    p = Problem("?", labels, metric=metric, target=target, costs={"dog": {"cat": 10}})
    costs = cost_matrix(p)[[labels.index(l) for l in preds.label], [labels.index(s) for s in preds.predicted]]
    def good(kept, goal):
        if metric == "expected cost": return kept.sum() >= min(10, len(preds)) and costs[kept].mean() <= goal
        mine = kept & (preds.label == "dog").to_numpy()
        return mine.sum() >= min(10, (preds.label == "dog").sum()) and preds.correct[mine].mean() >= goal
    res = evaluate(preds, labels, target, problem=p)
    calm = scaled(preds, res.temperature).probability.to_numpy()
    for goal in (target / 10 if metric == "expected cost" else 1 - (1 - target) / 10, target):
        fits = [(calm >= v).mean() for v in np.unique(calm) if good(calm >= v, goal)]
        if fits: break
    assert res.coverage == pytest.approx(max(fits, default=1)) and ("nothing is unsure" in str(res.notes)) == (not fits)
    assert res.score == score(confusion(preds, labels), p) and metric in repr(res)


@few
@given(frames, st.floats(0.3, 0.99))
def test_a_problem_by_accuracy_changes_nothing(preds, target):
    p = Problem("?", labels_of(preds), target=target, costs={"dog": {"cat": 10}})
    assert repr(evaluate(preds, p.labels, target, problem=p)) == repr(evaluate(preds, p.labels, target)) and evaluate(preds, problem=p).score is None


@few
@given(frames)
def test_slices(preds):
    preds = preds.assign(light=np.linspace(0, 1, len(preds)), colour=["red", None, "blue", "NA"] * (len(preds) // 4) + ["red"] * (len(preds) % 4))
    colours = by(preds, "colour")
    assert set(colours.value) == {"red", "missing", "blue", "NA"} and colours.n.sum() == len(preds) and colours.accuracy.is_monotonic_increasing
    want = preds.assign(colour=preds.colour.fillna("missing")).groupby("colour").correct.mean()
    np.testing.assert_allclose(colours.accuracy, want[colours.value])
    for r in colours.itertuples(): assert (r.low, r.high) == interval(r.right, r.n)
    lights = by(preds, "light")
    assert len(lights) == 4 and lights.n.max() - lights.n.min() <= 1 and lights.right.sum() == preds.correct.sum()
    every = slices(preds, ["light", "colour"])
    assert len(every) == 8 and every.high.is_monotonic_increasing and list(every.columns[:2]) == ["column", "value"]


def test_slices_of_odd_columns():
    preds = made_up(40)
    assert by(preds.assign(x=np.nan), "x").value.tolist() == ["missing"]
    assert by(preds.assign(x=[1.5] * 39 + [np.nan]), "x").n.tolist().count(39) == 1
    assert set(by(preds.assign(x=[True, False] * 20), "x").value) == {"True", "False"}
    assert by(preds.assign(x=[*range(39), np.nan]), "x").n.sum() == 40
    assert slices(preds, []).empty
    with pytest.raises(InputError): by(preds, "weather")


def test_worst_are_the_confident_mistakes():
    preds = made_up()
    rows = worst(preds, 5)
    assert len(rows) == 5 and not rows.correct.any() and rows.probability.iloc[0] == preds.probability[~preds.correct].max()


@pytest.mark.parametrize("spoil", [
    lambda d: d.drop(columns="predicted"), lambda d: d.iloc[:0], lambda d: d.assign(predicted="fox"), lambda d: d.assign(label="fox"),
    lambda d: d.assign(p_cat=np.nan), lambda d: d.assign(p_cat=0.9), lambda d: d.assign(p_cat=-d.p_cat), lambda d: d.drop(columns=["p_cat", "p_dog"]),
    lambda d: d[d.label == "cat"],
])
def test_predictions_that_cannot_be(spoil):
    with pytest.raises(InputError, match="Expected .*; found .* Next: "): evaluate(spoil(made_up()))


def test_labels_that_look_like_numbers():
    preds = made_up().replace({"cat": "0", "dog": "1"}).rename(columns={"p_cat": "p_0", "p_dog": "p_1"})
    assert evaluate(preds.assign(predicted=preds.predicted.astype(int)), ("0", "1")).right == preds.correct.sum()


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = Run("runs/one")
    define_into(run)
    preds = made_up(60)
    for p in preds.path: 
        (tmp_path / p).parent.mkdir(exist_ok=True)
        Image.new("RGB", (40, 30), "teal").save(tmp_path / p)
    run.save_manifest(preds[["path", "label"]].assign(split="valid", sha256="", width=40, height=30, source="made up", light=np.linspace(0, 1, 60)))
    run.save_manifest(preds, "valid_predictions.csv")
    return run


def test_evaluate_into(run):
    res = evaluate_into(run)
    kept = run.read_json("evaluation.json")
    assert run.has("evaluation") and kept["right"] == res.right and kept["confusion"] == res.confusion
    assert set(kept) >= {"n", "right", "accuracy", "interval", "labels", "confusion", "per_class", "temperature", "ece_before",
                         "ece_after", "threshold", "coverage"}
    assert {s["column"] for s in kept["slices"]} == {"light"}
    for name in ("confusion", "worst", "reliability"): assert Image.open(run / "figures" / f"{name}.png").width > 300


def test_evaluate_into_by_another_metric(run):
    plain = evaluate_into(run)
    problem = define_into(run, metric="expected cost", target=.3, costs={"dog": {"cat": 10}})
    res, kept = evaluate_into(run), run.read_json("evaluation.json")
    assert kept["score"]["rule"]["name"] == "expected cost" and kept["score"]["value"] == score(res.confusion, problem).value
    assert (res.right, res.interval, res.temperature) == (plain.right, plain.interval, plain.temperature) and plain.score is None


def test_evaluate_into_without_predictions(tmp_path):
    with pytest.raises(InputError, match="valid_predictions.csv"): evaluate_into(Run(tmp_path))


def test_figures_of_extremes(run):
    preds = run.manifest("valid_predictions.csv")
    perfect = preds.assign(predicted=preds.label, probability=preds[["p_cat", "p_dog"]].max(axis=1))
    assert "no mistakes" in plot_worst(perfect)._suptitle.get_text()
    assert plot_confusion(confusion(made_up(k=4))).axes and reliability_diagram(perfect, 1.0).axes
    assert evaluate(perfect).temperature == 1 and "stays 1" in evaluate(perfect).notes[-1]


def test_per_class_never_answered_is_none():
    preds = made_up().assign(predicted="dog")
    assert evaluate(preds).per_class["cat"]["precision"] is None


def kept(preds, t, op=lambda a, b: a >= b, flip=False, over=None):
    k = preds[op(preds.probability, t)]
    out = (len(k) / len(preds), k.correct.sum() / (over or len(k)) if len(k) else float("nan"))
    return out[::-1] if flip else out


@pytest.mark.parametrize("exercise,right,wrong", [
    ("06.1", .875, (.7, .8, .75, 87.5, "x")),
    ("06.2", kept, (lambda p, t: kept(p, t, lambda a, b: a > b), lambda p, t: kept(p, t, flip=True), lambda p, t: kept(p, t, over=5),
                    lambda p, t: (sum(p.probability >= t), 1), lambda p, t: 1.0)),
    ("06.3", lambda p, c: .2, (lambda p, c: .95, lambda p, c: -.2, lambda p, c: 8, lambda p, c: "x", lambda p, c: .1)),
])
def test_exercises_tell_wrong_answers_apart(exercise, right, wrong):
    assert check(exercise, right).passed, check(exercise, right)
    said = [check(exercise, w) for w in wrong]
    assert check(exercise, None).passed is None and not any(s.passed for s in said) and len({s.message for s in said}) >= 4, said
