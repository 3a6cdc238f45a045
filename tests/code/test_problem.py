"Chapter 01: the problem, its metrics against scikit-learn, intervals and their coverage, baselines, costs, the explorer."
import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta, binom, norm
from sklearn.dummy import DummyClassifier
from sklearn.metrics import accuracy_score, recall_score

from dlpipe_nb.core import InputError, Run, check
from dlpipe_nb.problem import (METRICS, TASKS, CostExplorer, Problem, baselines, break_even, chance_to_pass, cost_matrix, define_into,
                               expected_cost, interval, interval_coverage, measure, metric_of, pictures_needed, score, side_by_side)

shares = st.floats(0.05, 0.95)
STRICT = Problem("Cat room or yard?", ("cat", "dog"), metric="expected cost", target=0.5, costs={"dog": {"cat": 10}})
FLAT = Problem("What is it worth?", task="predicting a number", metric="mean absolute error", target=20_000, unit="euros",
               harms={"too low": "the seller"})
LETTER = Problem("What does it say?", task="translating text", metric="chrF", target=60)
CAREFUL, ACCURATE = [[550, 70], [10, 370]], [[595, 25], [35, 345]]
#: What problem.json held before the harms, the unit and other metrics than accuracy.
OLD = {"question": "Cat?", "labels": ["cat", "dog"], "task": "image classification", "out_of_scope": ["a fox"], "metric": "accuracy",
       "target": 0.9, "confidence": 0.95, "costs": {"dog": {"cat": 3.0}}}


def wilson(right, n, confidence):
    "The closed form, written independently of scipy's."
    z, p = norm.ppf((1 + confidence) / 2), right / n
    mid, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (mid - half) / (1 + z * z / n), (mid + half) / (1 + z * z / n)


@given(st.integers(1, 3000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.floats(0.5, 0.999))
def test_interval_is_wilsons(counts, confidence):
    assert interval(*counts, confidence) == pytest.approx(wilson(*counts, confidence), abs=1e-9)


def test_nine_of_ten_is_not_yet_ninety_percent():
    assert interval(9, 10) == pytest.approx((0.5958, 0.9821), abs=1e-4)


@pytest.mark.parametrize("right,total,confidence", [(0.9, 10, .95), (11, 10, .95), (-1, 10, .95), (0, 0, .95), (9, 10, 95), ("9", 10, .95)])
def test_interval_refuses(right, total, confidence):
    with pytest.raises(InputError): interval(right, total, confidence)


@settings(deadline=None)
@given(shares, st.floats(0.01, 0.2), st.floats(0.6, 0.99))
def test_pictures_needed_is_the_number_that_passes(target, margin, confidence):
    if target + margin > 1: return
    n, rate = pictures_needed(target, margin, confidence), target + margin
    assert wilson(rate * n, n, confidence)[0] >= target - 1e-9
    assert n == 1 or wilson(rate * (n - 1), n - 1, confidence)[0] < target + 1e-9


@pytest.mark.parametrize("target,margin", [(0.9, 0), (0.9, 0.2), (90, 0.01), (0.9, -0.1)])
def test_pictures_needed_refuses(target, margin):
    with pytest.raises(InputError): pictures_needed(target, margin)


@given(st.lists(st.sampled_from("abcd"), min_size=1, max_size=60))
def test_baselines_against_sklearn(labels):
    best = DummyClassifier(strategy="most_frequent").fit(labels, labels).score(labels, labels)
    table = baselines(labels)
    assert table.accuracy.iloc[0] == pytest.approx(best) and table.accuracy.is_monotonic_decreasing


def test_baselines_of_nothing():
    with pytest.raises(InputError): baselines([])


def test_problem_round_trip(tmp_path):
    run = Run(tmp_path / "r")
    made = define_into(run, labels=["a", "b", "c"], target=0.8, costs={"a": {"b": 3}})
    assert Problem.load(run) == made and made.labels == ("a", "b", "c") and made.costs == {"a": {"b": 3.0}}
    assert run.has("problem") and define_into(run, labels=["a", "b"]).target == 0.9
    assert isinstance(hash(made), int) and "a, b, c" in repr(made)


@pytest.mark.parametrize("wrong", [
    dict(labels=("cat",)), dict(labels=()), dict(labels="cat"), dict(labels=("cat", "cat")), dict(labels=("cat", "Cat")),
    dict(labels=("cat", "")), dict(labels=("cat", " dog")), dict(labels=("cat", 3)), dict(labels=None), dict(labels=("cat", "do\ng")),
    dict(target=0), dict(target=1), dict(target=90), dict(target="0.9"), dict(target=float("nan")), dict(target=True), dict(confidence=1),
    dict(costs={"cat": {"dog": -1}}), dict(costs={"cat": {"fox": 1}}), dict(costs={"cat": {"cat": 1}}), dict(costs={"cat": 1}), dict(costs=[1]),
    dict(costs={"cat": {"dog": float("inf")}}), dict(question=" "), dict(metric="recall"), dict(out_of_scope=(1,)),
    dict(metric="recall of"), dict(metric="recall of fox"), dict(metric="a recall of dog"), dict(metric=None), dict(metric="chrF", target=50),
    dict(metric="expected cost"), dict(metric="expected cost", target=1), dict(metric="expected cost", target=.5, costs={"cat": {"dog": 0}, "dog": {"cat": .5}}),
    dict(metric="expected cost", target=.5, unit=3), dict(unit="euros"), dict(task="sorting"), dict(task="predicting a number"),
    dict(harms={"dog": "the cats"}), dict(harms={"dog": {"cat": 3}}), dict(harms={"dog": {"fox": "the fox"}}), dict(harms=["the cats"]),
    dict(labels=(), task="predicting a number", metric="mean absolute error", target=3), dict(labels=(), task="translating text", metric="accuracy"),
    dict(labels=(), task="translating text", metric="chrF", target=100), dict(labels=(), task="translating text", metric="human rating", target=1),
    dict(labels=(), task="translating text", metric="chrF", target=60, harms={"": "nobody"}), dict(labels=(), task="translating text", metric="chrF"),
    dict(labels=(), task="translating text", metric="chrF", target=60, costs={"a": {"b": 1}}),
])
def test_problem_refuses_and_says_why(wrong):
    with pytest.raises(InputError) as e: Problem(**{"question": "?", "labels": ("cat", "dog"), **wrong})
    assert str(e.value).startswith("Expected ") and "Next: " in str(e.value)


@pytest.mark.parametrize("text", ["[]", "{}", '{"question": "?", "labels": ["a", "b"], "traget": 1}', "{", '{"question": "?", "labels": null}'])
def test_a_spoilt_problem_file(tmp_path, text):
    (tmp_path / "problem.json").write_text(text)
    with pytest.raises(InputError): Problem.load(Run(tmp_path))


def test_a_refused_definition_leaves_the_old_one(tmp_path):
    run = Run(tmp_path)
    before = define_into(run)
    with pytest.raises(InputError): define_into(run, target=2)
    assert Problem.load(run) == before


def test_expected_cost():
    plain, strict = Problem("?", ("cat", "dog")), Problem("?", ("cat", "dog"), costs={"dog": {"cat": 10}})
    table = np.array([[595, 25], [35, 345]])
    assert expected_cost(table, plain) == pytest.approx(0.06) and expected_cost(table.tolist(), strict) == pytest.approx(0.375)
    for wrong in ([[1, 2]], [[1, 2, 3]] * 3, [[0, 0], [0, 0]]):
        with pytest.raises(InputError): expected_cost(wrong, plain)


@pytest.mark.parametrize("name,higher", [("accuracy", True), ("recall of dog", True), ("expected cost", False)])
def test_a_metric_knows_its_direction(name, higher):
    m = metric_of(name, ("cat", "dog"))
    assert (m.higher, m.better(2, 1), m.reached(2, 1), m.reached(1, 1)) == (higher, higher, higher, True)
    assert {m.task for m in METRICS.values()} == set(TASKS)


def test_goals_in_words():
    assert Problem("?", ("cat", "dog"), metric="recall of dog", target=0.955).goal == "recall of dog at least 95.5 %"
    assert STRICT.goal == "expected cost at most 0.5 a picture" and replace(STRICT, unit="euros").goal.endswith("at most 0.5 euros a picture")
    assert FLAT.goal == "mean absolute error at most 20,000 euros" and LETTER.goal == "chrF at least 60 points"
    assert "≤ 20,000 euros" in repr(FLAT) and "≥ 0.9 with" in repr(Problem("?", ("a", "b")))
    assert STRICT.rule.span(.0912, .3571) == "0.0912–0.357 a picture" and metric_of("accuracy").span(.9, .95) == "90.0–95.0 %"


def test_a_problem_of_an_earlier_run_loads(tmp_path):
    (tmp_path / "problem.json").write_text(json.dumps(OLD))
    old = Problem.load(Run(tmp_path))
    assert {k: v for k, v in json.loads(json.dumps(asdict(old))).items() if k in OLD} == OLD and old.harms == {} and old.unit == ""
    (tmp_path / "problem.json").write_text('{"question": "?", "labels": ["cat", "dog"]}')
    assert Problem.load(Run(tmp_path)).goal == "accuracy at least 90 %"


def test_other_tasks_are_written_down_and_refused_by_the_pipeline(tmp_path):
    run = Run(tmp_path)
    before = define_into(run)
    for task in ("predicting a number", "translating text", "dancing"):
        with pytest.raises(InputError, match="image classification, which is all"): define_into(run, task=task)
    for p in (FLAT, LETTER):
        with pytest.raises(InputError, match="image classification"): p.save(run)
        with pytest.raises(InputError, match="image classification"): measure(CAREFUL, p)
        assert Problem(**asdict(p)) == p
    assert Problem.load(run) == before
    run.write_json("problem.json", asdict(FLAT))
    with pytest.raises(InputError, match="image classification"): Problem.load(run)


def test_side_by_side():
    table = side_by_side(STRICT, FLAT, LETTER)
    assert list(table.columns) == list(TASKS) and table.loc["better"].tolist() == ["lower", "lower", "higher"]
    assert table.loc["labels"].tolist() == ["cat, dog", "none", "none"] and table.loc["who is hurt", FLAT.task] == "too low: the seller"


def singles(table, labels): return map(np.array, zip(*[(t, s) for i, t in enumerate(labels) for j, s in enumerate(labels) for _ in range(table[i][j])]))


tables = st.integers(2, 4).flatmap(lambda k: st.lists(st.lists(st.integers(0, 9), min_size=k, max_size=k), min_size=k, max_size=k))


@given(tables, st.data())
def test_measure_against_sklearn(table, data):
    labels = tuple("abcd"[:len(table)])
    if not sum(table[0]): table[0][0] = 1
    true, said = singles(table, labels)
    costs = {t: {s: data.draw(st.floats(0.1, 50)) for s in labels if s != t} for t in labels}
    assert measure(table, Problem("?", labels)) == pytest.approx(accuracy_score(true, said))
    assert measure(np.array(table), Problem("?", labels, metric="recall of a")) == pytest.approx(recall_score(true, said, labels=["a"], average=None)[0])
    dear = Problem("?", labels, metric="expected cost", target=.01, costs=costs)
    assert measure(table, dear) == pytest.approx(np.mean([0 if t == s else costs[t][s] for t, s in zip(true, said)])) == expected_cost(table, dear)


def test_measure_refuses():
    import pandas as pd
    by_recall = Problem("?", ("cat", "dog"), metric="recall of dog")
    with pytest.raises(InputError, match="pictures of dog"): measure([[5, 1], [0, 0]], by_recall)
    with pytest.raises(InputError, match="in this order"): measure(pd.DataFrame(CAREFUL, ["dog", "cat"], ["dog", "cat"]), by_recall)
    for wrong in ([[1, -1], [1, 1]], [[1, float("nan")], [1, 1]], [[1, 2], [3]], [["a", 1], [1, 1]], [[0, 0], [0, 0]], 7):
        with pytest.raises(InputError, match='2 × 2 table of counts'): measure(wrong, by_recall)
    with pytest.raises(InputError, match="whole numbers"): score([[.5, .5], [1, 1]], by_recall)


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=40), st.sampled_from(["accuracy", "recall of a", "expected cost"]))
def test_baselines_by_metric(labels, metric):
    labels = ["a", *labels]
    p = Problem("?", tuple("abc"), metric=metric, target=.2, costs={"b": {"a": 7.0, "c": .3}})
    table = baselines(labels, p).set_index("baseline")[metric]
    for l in p.labels:
        said = DummyClassifier(strategy="constant", constant=l).fit(["a", "b", "c"], ["a", "b", "c"]).predict(labels)
        want = {"accuracy": np.mean(said == labels), "recall of a": float(l == "a"),
                "expected cost": np.mean([cost_matrix(p)["abc".index(t), "abc".index(s)] for t, s in zip(labels, said)])}[metric]
        assert table[f"always {l}"] == pytest.approx(want)
    assert (table.is_monotonic_decreasing if p.rule.higher else table.is_monotonic_increasing) and len(table) == 5
    if metric == "accuracy" and len(set(labels)) == 3: assert set(baselines(labels).accuracy.round(9)) <= set(table.round(9))


def test_dice_cost_what_they_cost_on_average():
    labels = np.array(["cat"] * 620 + ["dog"] * 380)
    table, rng = baselines(labels, STRICT).set_index("baseline")["expected cost"], np.random.default_rng(0)
    costs = cost_matrix(STRICT)
    for name, said in [("at random, each label alike", rng.integers(0, 2, (400, 1000))), ("at random, as often as each occurs", (rng.random((400, 1000)) < .38).astype(int))]:
        assert table[name] == pytest.approx(costs[(labels == "dog").astype(int), said].mean(), rel=.02)
    with pytest.raises(InputError, match="fox"): baselines(["fox"], STRICT)


@given(tables, tables, st.data())
def test_break_even_is_where_both_cost_the_same(a, b, data):
    if len(a) != len(b): return
    a[0][0] = b[0][0] = 5
    labels = tuple("abcd"[:len(a)])
    p = Problem("?", labels, costs={t: {s: data.draw(st.floats(0, 20)) for s in labels if s != t} for t in labels})
    c = break_even(a, b, p, "a", "b")
    at = lambda cost: replace(p, costs={**p.costs, "a": {**p.costs["a"], "b": cost}})
    if c is not None:
        assert expected_cost(a, at(c)) == pytest.approx(expected_cost(b, at(c)), abs=1e-6)
        return
    sides = {np.sign(round(expected_cost(a, at(x)) - expected_cost(b, at(x)), 9)) for x in (0, 1, 100, 1e6)} - {0}
    assert len(sides) <= 1


def test_break_even_of_the_chapter():
    assert break_even(CAREFUL, ACCURATE, Problem("?", ("cat", "dog")), "dog", "cat") == pytest.approx(1.8)
    assert break_even(CAREFUL, CAREFUL, STRICT, "dog", "cat") is None


# ---- intervals

@given(st.integers(1, 3000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.floats(0.5, 0.999))
def test_the_exact_interval_is_clopper_and_pearsons(counts, confidence):
    (r, n), a = counts, (1 - confidence) / 2
    low, high = beta.ppf(a, r, n - r + 1) if r else 0, beta.isf(a, r + 1, n - r) if r < n else 1
    assert interval(r, n, confidence, "exact") == pytest.approx((low, high), abs=1e-7)


def test_interval_methods():
    assert interval(9, 10) == interval(9, 10, method="wilson") != interval(9, 10, method="exact")
    with pytest.raises(InputError, match="wilson, exact"): interval(9, 10, method="naive")


@pytest.mark.parametrize("method", ["wilson", "exact"])
def test_coverage_is_what_a_simulation_finds(method):
    rng = np.random.default_rng(1)
    for n, p in [(10, .9), (30, .97), (60, .6)]:
        ends = [interval(r, n, method=method) for r in range(n + 1)]
        hit = np.mean([ends[r][0] <= p <= ends[r][1] for r in rng.binomial(n, p, 20_000)])
        assert interval_coverage(n, p, method=method) == pytest.approx(hit, abs=.01)


@pytest.mark.parametrize("n", [10, 20, 50, 100])
def test_the_exact_interval_keeps_its_promise_and_the_naive_one_does_not(n):
    rates = np.linspace(.02, .99, 60).reshape(3, 20)
    naive = lambda r, n: (r / n - 1.96 * (r / n * (1 - r / n) / n) ** .5, r / n + 1.96 * (r / n * (1 - r / n) / n) ** .5)
    exact, wilson, wald = (interval_coverage(n, rates, method=m) for m in ("exact", "wilson", naive))
    assert exact.shape == (3, 20) and exact.min() >= .95 and wilson.min() > .8 > wald.min()
    assert abs(wilson.mean() - .95) < .02 < exact.mean() - .94


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 90), st.sampled_from([0., .01, .5, .9, .949, 1.]), shares, st.sampled_from([.8, .95, .99]))
def test_chance_to_pass_counts_what_the_interval_passes(n, true, target, confidence):
    brute = sum(binom.pmf(r, n, true) for r in range(n + 1) if interval(r, n, confidence)[0] >= target)
    assert chance_to_pass(n, true, target, confidence) == pytest.approx(brute, abs=1e-9)


def test_chance_to_pass_takes_arrays():
    n, p = np.array([[10], [100], [1000]]), np.array([.9, .95])
    got = chance_to_pass(n, p)
    assert got.shape == (3, 2) and got[1, 1] == chance_to_pass(100, .95) and isinstance(chance_to_pass(100, .95), float)
    assert chance_to_pass(360, 1.0, target=.99) == 0 and chance_to_pass(pictures_needed(.9, .04), .94) == pytest.approx(.57, abs=.01)
    for wrong in [(0, .9), (10.5, .9), (10, 1.1), (10, "x"), (10, .9, 90)]:
        with pytest.raises((InputError, ValueError)): chance_to_pass(*wrong)


def test_score_of_shares_is_wilsons():
    by_recall = Problem("?", ("cat", "dog"), metric="recall of dog", target=.9, confidence=.8)
    s = score(CAREFUL, by_recall)
    assert (s.right, s.total, s.value) == (370, 380, 370 / 380) and (s.low, s.high) == interval(370, 380, .8)
    s = score(CAREFUL, Problem("?", ("cat", "dog")))
    assert (s.right, s.total) == (920, 1000) and (s.low, s.high) == interval(920, 1000) and "920 of 1000" in repr(s)


def test_score_of_costs():
    s = score(CAREFUL, STRICT)
    assert s.value == pytest.approx(.17) and s == score(CAREFUL, STRICT) and s.right is None and s.total == 1000
    each = np.repeat([0., 1, 10], [920, 70, 10])
    spread = 1.96 * each.std() / 1000 ** .5
    assert s.low < .17 < s.high and s.high - s.low == pytest.approx(2 * spread, rel=.1) and s.high - .17 > .17 - s.low
    equal = score(CAREFUL, replace(STRICT, costs={}))
    assert (equal.low, equal.high) == pytest.approx(tuple(1 - x for x in interval(920, 1000)[::-1]), abs=.004)
    assert score([[5, 5], [5, 5]], replace(STRICT, confidence=.5)).high < score([[5, 5], [5, 5]], STRICT).high


@pytest.mark.parametrize("table,low,high", [([[180, 0], [0, 180]], 0, 10 * interval(0, 360)[1]), ([[1, 0], [0, 0]], 0, 10 * interval(0, 1)[1]),
                                            ([[0, 0], [20, 0]], 10 * interval(20, 20)[0], 10 + interval(0, 20)[1])])
def test_score_where_nothing_can_be_redrawn(table, low, high):
    s = score(table, STRICT)
    assert (s.low, s.high) == pytest.approx((low, high))


def test_the_cost_interval_covers_an_error_that_was_not_seen():
    rng, p, truth = np.random.default_rng(0), [.49, .02, .002, .488], .02 + 10 * .002
    found = [(t.sum() and t[2], score(t.reshape(2, 2), STRICT)) for t in rng.multinomial(360, p, 60)]
    assert np.mean([n == 0 for n, _ in found]) > .3, "the dear error is in every test, so this shows nothing"
    assert np.mean([s.low <= truth <= s.high for _, s in found]) >= .9


# ---- later phases

def test_a_phase_that_only_knows_accuracy_refuses_another_metric(tmp_path):
    from dlpipe_nb.retraining import retrain
    run = Run(tmp_path)
    define_into(run, metric="recall of dog", target=.95)
    with pytest.raises(InputError, match="metric is accuracy.*recall of dog"): retrain(run, None, None)
    assert [p.name for p in tmp_path.iterdir()] == ["problem.json"]


def test_a_whole_run_keeps_the_problem_that_was_defined_before(tmp_path):
    from dlpipe_nb.pipeline import Settings, _problem
    run = Run(tmp_path)
    made = define_into(run, metric="expected cost", target=.2, costs={"dog": {"cat": 10}})
    assert "expected cost at most 0.2 a picture" in _problem(run, Settings()) and Problem.load(run) == made
    with pytest.raises(InputError, match="expected cost at most 0.2"): _problem(run, Settings(target=.95))
    assert Problem.load(run) == made
    define_into(run, target=.95)
    assert all("at least 95 %" in _problem(run, Settings(target=t)) for t in (.95, None))
    with pytest.raises(InputError, match="at least 95 %"): _problem(run, Settings(target=.9))


# ---- the explorer, without a browser

@pytest.fixture
def explorer(): return CostExplorer({"careful": CAREFUL, "<b>quick</b>": ACCURATE}, STRICT)


def test_the_explorer_says_who_costs_less(explorer):
    assert explorer.winner == "careful" and explorer.averages == {"careful": pytest.approx(.17), "<b>quick</b>": pytest.approx(.375)}
    explorer.set({"dog": {"cat": 1}})
    assert explorer.winner == "<b>quick</b>" and explorer.break_even("dog", "cat") == pytest.approx(1.8) and "it is 1.8" in explorer.sentence
    explorer.set({"dog": {"cat": 1.8}})
    assert explorer.winner is None and explorer.sentence.startswith("Both cost the same")
    assert Problem("?", ("cat", "dog"), costs=explorer.costs).costs == {"cat": {"dog": 1.0}, "dog": {"cat": 1.8}}


def test_a_slider_does_what_set_does(explorer):
    explorer.sliders["cat", "dog"].value = 3.0
    other = CostExplorer({"careful": CAREFUL, "<b>quick</b>": ACCURATE}, STRICT)
    other.set({"cat": {"dog": 3}})
    assert explorer.costs == other.costs and [w.value for w in (explorer._said, explorer._tables, explorer._lines)] == [
        w.value for w in (other._said, other._tables, other._lines)]
    assert "a cat called dog" in explorer._lines.value and "70<small> × 3 = 210</small>" in explorer._tables.value


def test_the_explorer_shows_the_break_even_and_escapes_names(explorer):
    assert "break-even 1.8" in explorer._lines.value and 'role="status"' in explorer._said.value
    assert "<b>quick" not in explorer._said.value + explorer._tables.value + explorer._lines.value
    explorer.set({"cat": {"dog": 20}, "dog": {"cat": 20}})
    assert "break-even" not in explorer._lines.value and "beyond the slider" in explorer.sentence


def test_the_explorer_refuses_and_moves_nothing(explorer):
    before = explorer.costs
    for wrong in ({"dog": {"cat": 500}}, {"cat": {"dog": 2}, "dog": {"fox": 1}}, {"dog": {"cat": -1}}, 3):
        with pytest.raises(InputError): explorer.set(wrong)
    assert explorer.costs == before
    for tables, highest in [({"one": CAREFUL}, 20), ({"a": CAREFUL, "b": [[1]]}, 20), ({"a": CAREFUL, "b": ACCURATE}, 5)]:
        with pytest.raises(InputError): CostExplorer(tables, STRICT, highest)


def test_what_a_handler_raises_is_shown(explorer, monkeypatch):
    def broken(): raise RuntimeError("the <disk> is on fire")
    monkeypatch.setattr(explorer, "_show", broken)
    explorer.sliders["cat", "dog"].value = 4.0
    assert "the &lt;disk&gt; is on fire" in explorer._said.value and 'role="alert"' in explorer._said.value


def test_the_explorer_with_three_labels():
    p = Problem("?", ("a", "b", "c"))
    e = CostExplorer({"x": [[5, 1, 0], [0, 5, 2], [1, 0, 5]], "y": [[6, 0, 0], [0, 6, 1], [3, 0, 3]]}, p)
    assert len(e.sliders) == 6
    e.set({"b": {"c": 0}, "c": {"a": 20}})
    assert e.winner == "x"


def plan(true, target, chance): return int(np.argmax(chance_to_pass(np.arange(1, 5001), true, target) >= chance)) + 1


def messages(exercise, wrong): return [check(exercise, w) for w in wrong]


@pytest.mark.parametrize("exercise,right,wrong", [
    ("01.1", 96, (90, 95, 97, 101, 0.96)),
    ("01.2", lambda p, a, b: "cat" if p * a <= (1 - p) * b else "dog",
     (lambda p, a, b: "cat" if p <= .5 else "dog", lambda p, a, b: "cat" if p * b <= (1 - p) * a else "dog",
      lambda p, a, b: "dog" if p * a <= (1 - p) * b else "cat", lambda p, a, b: p * a, lambda p, a, b: "cat" if a <= b else "dog")),
    ("01.3", plan, (pictures_needed(.9, .05), lambda t, g, c: pictures_needed(g, t - g), lambda t, g, c: 239.0, lambda t, g, c: plan(.95, g, c),
                    lambda t, g, c: plan(t, g, .8), lambda t, g, c: plan(t, .9, c), lambda t, g, c: plan(t, g, c) + 1, lambda t, g, c: 30)),
    ("01.4", Problem("?", ("pear", "apple"), out_of_scope=("plum",), harms={"pear": {"apple": "the cook"}}),
     (Problem("?", ("dog", "cat")), Problem("?", ("pear", "apple")), Problem("?", ("pear", "apple"), out_of_scope="plum", target=.4),
      Problem("?", ("pear", "apple"), out_of_scope="plum", metric="recall of pear"), Problem("?", ("pear", "apple"), out_of_scope="plum"), {})),
])
def test_exercises_tell_wrong_answers_apart(exercise, right, wrong):
    assert check(exercise, right).passed and check(exercise, None).passed is None
    said = messages(exercise, wrong)
    assert not any(s.passed for s in said) and len({s.message for s in said}) >= 4, said


def test_a_number_and_a_text_are_problems_of_ones_own():
    harmed = replace(LETTER, out_of_scope=("poems",), harms={"a wrong name": "the reader"})
    assert check("01.4", replace(FLAT, out_of_scope=("castles",))).passed and check("01.4", harmed).passed
