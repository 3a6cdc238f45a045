"Chapter 06: every measure against an independent oracle, and what happens with predictions that can't be."
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import fisher_exact
from sklearn.calibration import calibration_curve
from sklearn.metrics import (average_precision_score, confusion_matrix, f1_score, log_loss, precision_recall_curve,
                             precision_recall_fscore_support, precision_score, recall_score, roc_auc_score, roc_curve)

from dlpipe_nb.core import InputError, Run, check
from dlpipe_nb.evaluation import (areas, averages, by, calibration_error, caught, cheapest_threshold, compare_costs, confusion,
                                  coverage_risk, decide, evaluate, evaluate_into, gradcam, network_views, per_class, plot_confusion,
                                  plot_coverage, plot_curves, plot_gradcam, plot_worst, precision_recall, reliability,
                                  reliability_diagram, risk_area, roc, scaled, slices, temperature, threshold, with_looks, worst)
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
    np.testing.assert_allclose(ours.f1, f1_score(preds.label, preds.predicted, **kinds), atol=1e-9)


#: Predictions as they can be: few different probabilities, so many ties, and labels that are absent from either side.
def coarse(n, k, seed, levels, absent):
    rng, labels = np.random.default_rng(seed), ["cat", "dog", "fox", "hen"][:k]
    p = rng.integers(0, levels, (n, k)) + 1e-3
    p = p / p.sum(1, keepdims=True)
    true = rng.integers(0, max(1, k - absent), n)
    said = p.argmax(1)
    return pd.DataFrame({"path": [f"{i}.png" for i in range(n)], "label": np.array(labels)[true], "predicted": np.array(labels)[said],
                         "probability": p.max(1), "correct": true == said, **{f"p_{l}": p[:, i] for i, l in enumerate(labels)}})


ties = st.builds(coarse, st.integers(2, 60), st.integers(2, 4), st.integers(0, 10**6), st.integers(2, 6), st.integers(0, 2))


@few
@given(ties)
def test_averages_against_sklearn(preds):
    ours, labels = averages(confusion(preds)), labels_of(preds)
    for kind in ("macro", "weighted", "micro"):
        want = precision_recall_fscore_support(preds.label, preds.predicted, labels=labels, average=kind, zero_division=np.nan)[:3]
        np.testing.assert_allclose(ours.loc[kind, ["precision", "recall", "f1"]].astype(float), np.array(want, float), atol=1e-9)


@few
@given(ties)
def test_curves_and_areas_against_sklearn(preds):
    table, labels, one_hot = areas(preds), labels_of(preds), []
    for l in labels:
        y, p = preds.label == l, preds[f"p_{l}"]
        one_hot.append(y)
        assert table.n[l] == y.sum()
        if not 0 < y.sum() < len(y):
            assert np.isnan(table.roc_auc[l])
            continue
        ours, (fpr, tpr, level) = roc(preds, l), roc_curve(y, p, drop_intermediate=False)
        np.testing.assert_allclose(ours[["threshold", "false_positive_rate", "true_positive_rate"]], np.c_[level, fpr, tpr], atol=1e-9)
        ours, (precision, recall, level) = precision_recall(preds, l), precision_recall_curve(y, p)
        np.testing.assert_allclose(ours[["recall", "precision"]], np.c_[recall, precision][::-1], atol=1e-9)
        np.testing.assert_allclose(ours.threshold[1:], level[::-1], atol=1e-9)
        assert table.roc_auc[l] == pytest.approx(roc_auc_score(y, p), abs=1e-9)
        assert table.average_precision[l] == pytest.approx(average_precision_score(y, p), abs=1e-9)
    y, p = np.stack(one_hot, 1), preds[[f"p_{l}" for l in labels]].to_numpy()
    assert table.roc_auc["micro"] == pytest.approx(roc_auc_score(y.ravel(), p.ravel()), abs=1e-9)
    assert table.average_precision["micro"] == pytest.approx(average_precision_score(y.ravel(), p.ravel()), abs=1e-9)
    if (y.any(0) & ~y.all(0)).all():
        assert table.roc_auc["macro"] == pytest.approx(roc_auc_score(y, p, average="macro"), abs=1e-9)
        assert table.average_precision["macro"] == pytest.approx(average_precision_score(y, p, average="macro"), abs=1e-9)
    else: assert np.isnan(table.roc_auc["macro"])


def test_curves_of_an_unknown_label():
    with pytest.raises(InputError, match="'fox'"): roc(made_up(), "fox")


@few
@given(ties)
def test_coverage_and_risk_by_hand(preds):
    curve = coverage_risk(preds)
    for r in curve.itertuples():
        kept = preds.probability >= r.threshold
        assert (r.coverage, r.risk) == pytest.approx((kept.mean(), (~preds.correct[kept]).mean()), abs=1e-9)
    want = np.mean([(~preds.correct[preds.probability >= p]).mean() for p in preds.probability])
    assert risk_area(preds) == pytest.approx(want, abs=1e-9)
    assert plot_coverage(preds, .5).axes


priced = st.fixed_dictionaries({"dog": st.fixed_dictionaries({"cat": st.floats(.3, 20)}), "cat": st.fixed_dictionaries({"dog": st.floats(0, 20)})})


@few
@given(frames, priced, st.floats(0, 3))
def test_the_cheapest_answer_one_picture_at_a_time(preds, costs, look):
    labels = labels_of(preds)
    problem = Problem("?", labels, metric="expected cost", target=.2, costs=costs)
    made, matrix = decide(preds, problem, look), cost_matrix(problem)
    for i in range(0, len(preds), 7):
        ways = {"unsure": look} | {l: sum(preds[f"p_{t}"].iloc[i] * matrix[a, b] for a, t in enumerate(labels)) for b, l in enumerate(labels)}
        assert made.cost.iloc[i] == pytest.approx(min(ways.values()), abs=1e-9) and ways[made.answer.iloc[i]] <= min(ways.values()) + 1e-9
    paid = compare_costs(preds, problem, look)
    true, said = ([labels.index(l) for l in preds[c]] for c in ("label", "predicted"))
    assert paid.cost["the likeliest label"] == pytest.approx(matrix[true, said].mean(), abs=1e-9) and paid.cost["always unsure"] == pytest.approx(look)
    assert paid.answered["the cheapest label"] == 1 and paid.answered["always unsure"] == 0 == paid.wrong["always unsure"]


@few
@given(ties, st.floats(0, 1.2))
def test_the_cheapest_threshold_by_brute_force(preds, look):
    problem = Problem("?", labels_of(preds))
    cut = cheapest_threshold(preds, problem, look)
    cost = lambda t: np.where(preds.probability >= t, ~preds.correct, look).mean()
    assert cost(cut.value) == pytest.approx(min(cost(p) for p in preds.probability), abs=1e-9)
    kept = preds.probability >= cut.value
    assert (cut.coverage, cut.accuracy) == pytest.approx((kept.mean(), preds.correct[kept].mean()))


def test_chows_rule_is_best_where_probabilities_are_honest():
    rng = np.random.default_rng(0)
    p = rng.uniform(size=60000)
    preds = pd.DataFrame({"label": np.where(rng.random(60000) < p, "dog", "cat"), "predicted": np.where(p > .5, "dog", "cat"),
                          "probability": np.maximum(p, 1 - p), "p_cat": 1 - p, "p_dog": p})
    problem = Problem("?", ("cat", "dog"))
    for look in (.1, .3):
        assert cheapest_threshold(preds, problem, look).value == pytest.approx(1 - look, abs=.03)
        paid = compare_costs(preds, problem, look).cost
        assert paid["the cheapest, or unsure"] < min(paid["the likeliest label"], paid["always unsure"])


def test_unsure_has_a_price_in_the_record():
    preds = made_up(400, skill=1.0)
    cheap, dear = (evaluate(preds, unsure=c) for c in (.02, 5))
    assert cheap.coverage < dear.coverage == 1 and "unsure costs 0.02" in repr(cheap)
    with pytest.raises(InputError, match="0 or more"): evaluate(preds, unsure=-1)
    with pytest.raises(InputError, match="0 or more"): decide(preds, Problem("?", ("cat", "dog")), float("nan"))


def test_strangers():
    preds = made_up(50, sharp=1).drop(columns="label").assign(label="fox")
    got = caught(preds, 1.0, .8)
    assert got["unsure"] == (preds.probability < .8).sum() and (got["low"], got["high"]) == interval(got["unsure"], 50)
    assert caught(preds, 5.0, .8)["unsure"] > got["unsure"]


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
    assert len(every) == 8 and every.p.is_monotonic_increasing and list(every.columns[:2]) == ["column", "value"]
    wrong = (~preds.correct).sum()
    for r in every.itertuples():
        miss = r.n - r.right
        want = fisher_exact([[miss, r.right], [wrong - miss, len(preds) - wrong - r.right]], alternative="greater").pvalue
        assert r.p == pytest.approx(want, abs=1e-9)
    q = [min(every.p[j] * len(every) / (j + 1) for j in range(i, len(every))) for i in range(len(every))]
    np.testing.assert_allclose(every.q, np.minimum(q, 1), atol=1e-9)


def test_a_weak_slice_comes_first_and_chance_gets_a_large_q():
    rng = np.random.default_rng(0)
    preds = made_up(600, skill=6).assign(night=["yes"] * 60 + ["no"] * 540)
    other = np.where(preds.label == "cat", "dog", "cat")
    preds["predicted"] = np.where((preds.index < 15) | (preds.index % 60 == 59), other, preds.label)
    for i in range(30): preds[f"noise {i}"] = rng.integers(0, 4, 600)
    every = slices(preds, ["night", *[f"noise {i}" for i in range(30)]])
    assert every.loc[0, ["column", "value"]].tolist() == ["night", "yes"] and every.q[0] < 1e-6 and (every.q[1:] > .05).all()


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
                         "ece_after", "threshold", "coverage", "averages", "areas", "risk_area", "label_errors"}
    assert {s["column"] for s in kept["slices"]} == {"light", "brightness", "contrast", "sharpness"}
    assert set(kept["slices"][0]) == {"column", "value", "n", "right", "accuracy", "low", "high", "p", "q"}
    for name in ("confusion", "worst", "reliability", "curves", "coverage"): assert Image.open(run / "figures" / f"{name}.png").width > 300
    assert evaluate_into(run, unsure=5).threshold == run.read_json("evaluation.json")["threshold"] == 0 < res.threshold


def test_looks_of_pictures_without_factors(run):
    df = run.manifest().assign(width=[20] * 30 + [80] * 30)
    preds = run.manifest("valid_predictions.csv").sample(frac=1, random_state=0)
    seen, looks = with_looks(preds, df)
    assert looks == ["brightness", "contrast", "sharpness", "side"] and seen.path.tolist() == preds.path.tolist()
    assert seen.brightness.between(.3, .5).all() and set(seen.side) == {20, 30}
    uneven = preds[(preds.label == "dog") | (preds.index < 5)]
    assert not with_looks(uneven)[0].brightness.isna().any()
    gone = preds.assign(path=["gone.png", *preds.path[1:]])
    assert with_looks(gone)[0].brightness.isna().sum() == 1 and by(with_looks(gone)[0], "brightness").n.sum() == 60


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
    ("06.3", lambda a, b: (a[:, None] > b).mean() + (a[:, None] == b).mean() / 2,
     (lambda a, b: (a[:, None] < b).mean() + (a[:, None] == b).mean() / 2, lambda a, b: (a[:, None] > b).sum(),
      lambda a, b: (a[:, None] > b).mean(), lambda a, b: (a[:, None] >= b).mean(), lambda a, b: .5)),
    ("06.4", lambda l, m: max(0, 1 - l / m), (lambda l, m: l / m, lambda l, m: 1 - l, lambda l, m: 1 - m / l if l > 1 else 1 - l,
                                              lambda l, m: 1 - l / m, lambda l, m: .5)),
    ("06.5", lambda p, c: .2, (lambda p, c: .95, lambda p, c: -.2, lambda p, c: 8, lambda p, c: "x", lambda p, c: .1)),
])
def test_exercises_tell_wrong_answers_apart(exercise, right, wrong):
    assert check(exercise, right).passed, check(exercise, right)
    said = [check(exercise, w) for w in wrong]
    assert check(exercise, None).passed is None and not any(s.passed for s in said) and len({s.message for s in said}) >= 4, said


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    "Twelve grey pictures with a red (cat) or blue (dog) square in one corner, and where it is."
    folder, rows = tmp_path_factory.mktemp("squares"), []
    for i in range(12):
        a = np.full((96, 96, 3), 110, np.uint8)
        r, c, label = 48 * (i % 2), 48 * (i // 2 % 2), ("cat", "dog")[i // 4 % 2]
        a[r + 8:r + 40, c + 8:c + 40] = (220, 30, 30) if label == "cat" else (30, 30, 220)
        Image.fromarray(a).save(folder / f"{i}.png")
        rows.append((str(folder / f"{i}.png"), label, r // 48, c // 48))
    return pd.DataFrame(rows, columns=["path", "label", "row", "col"])


class RedOrBlue:
    "A Learner whose network is written down: the red of a place speaks for cat, its blue for dog."
    def __init__(self, size=96):
        import torch
        from torch import nn
        body = nn.Sequential(nn.Conv2d(3, 2, 12, 12, bias=False), nn.ReLU())
        with torch.no_grad():
            body[0].weight[:] = 0
            body[0].weight[0, 0], body[0].weight[1, 2] = 1, 1
        head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2, bias=False))
        with torch.no_grad(): head[2].weight[:] = torch.eye(2)
        self.model, self.record = nn.Sequential(body, head), {"labels": ["cat", "dog"], "size": size}


def test_gradcam_looks_at_the_square(pictures):
    learn = RedOrBlue()
    maps = gradcam(learn, pictures.path)
    assert maps.shape == (12, 8, 8) and maps.dtype == np.float32 and maps.min() >= 0 and maps.max(axis=(1, 2)) == pytest.approx(1)
    for heat, r in zip(maps, pictures.itertuples()):
        corner = heat[4 * r.row:4 * r.row + 4, 4 * r.col:4 * r.col + 4].sum()
        assert corner > .5 * heat.sum(), "the evidence isn't where the square is"
    other = gradcam(learn, pictures.path, ["dog" if l == "cat" else "cat" for l in pictures.label])
    for heat, r in zip(other, pictures.itertuples()):
        assert heat[4 * r.row + 1:4 * r.row + 3, 4 * r.col + 1:4 * r.col + 3].max() < .3, "the other label's evidence is there too"
    preds = pictures.assign(predicted=pictures.label, probability=.9, correct=True)
    assert plot_gradcam(learn, preds).axes and "no pictures" in plot_gradcam(learn, preds.iloc[:0])._suptitle.get_text()
    assert not learn.model[0]._forward_hooks and not learn.model[0][0]._forward_hooks


@pytest.mark.parametrize("arch,size,grid", [("small", 96, 6), ("small", 64, 8), ("resnet18", 128, 8), ("mobilenet_v3_small", 96, 6)])
def test_gradcam_of_the_courses_networks(pictures, arch, size, grid):
    from dlpipe_nb.training import make_model
    learn = RedOrBlue(size)
    learn.model = make_model(arch, 2)
    for p in learn.model.parameters(): p.requires_grad_(False)            # as a frozen body is
    maps = gradcam(learn, pictures.path[:3])
    assert maps.shape == (3, grid, grid) and np.isfinite(maps).all()
    assert network_views(learn, pictures.path[:3]).shape[:2] == (3, 2)


def test_gradcam_refuses(pictures):
    with pytest.raises(InputError, match="fox"): gradcam(RedOrBlue(), pictures.path, ["fox"] * 12)
    with pytest.raises(InputError, match="none"): gradcam(RedOrBlue(), [])
    from torch import nn
    flat = RedOrBlue()
    flat.model = nn.Sequential(nn.Sequential(nn.Flatten()), nn.Linear(96 * 96 * 3, 2))
    with pytest.raises(InputError, match="grid"): gradcam(flat, pictures.path)


def test_figures_of_many_labels():
    assert plot_curves(made_up(k=4)).axes[0].get_legend() and plot_curves(made_up()).axes
