"Chapter 01: the problem, its intervals, baselines and costs."
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm
from sklearn.dummy import DummyClassifier

from dlpipe_nb.core import InputError, Run, check
from dlpipe_nb.problem import Problem, baselines, define_into, expected_cost, interval, pictures_needed

shares = st.floats(0.05, 0.95)


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


def messages(exercise, wrong): return [check(exercise, w) for w in wrong]


@pytest.mark.parametrize("exercise,right,wrong", [
    ("01.1", 96, (90, 95, 97, 101, 0.96)),
    ("01.2", lambda p, a, b: "cat" if p * a <= (1 - p) * b else "dog",
     (lambda p, a, b: "cat" if p <= .5 else "dog", lambda p, a, b: "cat" if p * b <= (1 - p) * a else "dog",
      lambda p, a, b: "dog" if p * a <= (1 - p) * b else "cat", lambda p, a, b: p * a, lambda p, a, b: "cat" if a <= b else "dog")),
    ("01.3", Problem("?", ("pear", "apple"), out_of_scope=("plum",), costs={"pear": {"apple": 2}}),
     (Problem("?", ("dog", "cat")), Problem("?", ("pear", "apple")), Problem("?", ("pear", "apple"), out_of_scope="plum", target=.4),
      Problem("?", ("pear", "apple"), out_of_scope="plum"), {})),
])
def test_exercises_tell_wrong_answers_apart(exercise, right, wrong):
    assert check(exercise, right).passed and check(exercise, None).passed is None
    said = messages(exercise, wrong)
    assert not any(s.passed for s in said) and len({s.message for s in said}) >= 4, said
