"Chapter 08: the verdict, the seal and what breaks it, two models compared."
import math
import multiprocessing
import sys
import types
from unittest import mock

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import binom, bootstrap, chi2
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests

from dlpipe_nb import testing
from dlpipe_nb.core import InputError, Run, check, content_hash, sha256_of
from dlpipe_nb.problem import Problem, define_into, interval, measure, score
from dlpipe_nb.core import seal
from dlpipe_nb.testing import SealError, compare, difference, holm, judge, open_seal, verdict


@given(st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.floats(0.05, 0.95))
def test_verdict_follows_the_interval(counts, target):
    v, (low, high) = verdict(*counts, target), interval(*counts)
    assert v.result == ("pass" if low >= target else "fail" if high < target else "too few pictures to say")
    assert (v.low, v.high, v.accuracy) == (low, high, counts[0] / counts[1])


@pytest.mark.parametrize("right,total,result,words", [
    (9, 10, "too few pictures to say", "9 of 10 right, 90.0 % (95 % interval 59.6–98.2 %): 90 % lies inside"),
    (282, 300, "pass", "282 of 300 right, 94.0 % (95 % interval 90.7–96.2 %): at least 90 %, so it passes."),
    (240, 300, "fail", "below 90 %, so it fails."),
    (94, 100, "too few pictures to say", "At this rate, 217 would be enough to pass."),
])
def test_verdicts_in_words(right, total, result, words):
    v = verdict(right, total)
    assert v.result == result and words in v.sentence and words in repr(v)


@pytest.mark.parametrize("right,total,target", [(11, 10, .9), (0, 0, .9), (9, 10, 90), (9, 10, 0), (0.9, 1, .9)])
def test_verdict_refuses(right, total, target):
    with pytest.raises(InputError): verdict(right, total, target)


CAREFUL = [[165, 21], [3, 111]]
COSTS = {"dog": {"cat": 10}}


@pytest.mark.parametrize("metric,target,result,words", [
    ("recall of dog", .90, "pass", "Recall of dog 97.4 % (111 of 114; 95 % interval 92.5–99.1 %): at least 90 %, so it passes. Of all 300 pictures 92.0 % are right."),
    ("recall of dog", .95, "too few pictures to say", "95 % lies inside, so 114 pictures of dog are too few to say."),
    ("recall of cat", .95, "fail", "(165 of 186; 95 % interval 83.4–92.5 %): below 95 %, so it fails."),
    ("expected cost", .05, "fail", "Expected cost 0.17 a picture (95 % interval 0.09–0.357 a picture): above 0.05 a picture, so it fails."),
    ("expected cost", .20, "too few pictures to say", "0.2 a picture lies inside, so 300 pictures are too few to say."),
    ("expected cost", .50, "pass", "at most 0.5 a picture, so it passes."),
])
def test_verdicts_by_another_metric(metric, target, result, words):
    p = Problem("?", ("cat", "dog"), metric=metric, target=target, costs=COSTS)
    v = judge(CAREFUL, p)
    assert v.result == result and words in v.sentence and v.score == score(CAREFUL, p) and v.target == target
    assert (v.right, v.total, v.accuracy) == (276, 300, .92) and (v.low, v.high) == interval(276, 300)


def test_a_verdict_by_accuracy_is_what_it_always_was():
    assert judge(CAREFUL, Problem("?", ("cat", "dog"), costs=COSTS)) == verdict(276, 300)
    assert judge(np.array(CAREFUL), Problem("?", ("cat", "dog"), target=.8, confidence=.9)) == verdict(276, 300, .8, .9)


@pytest.fixture
def run(tmp_path, monkeypatch):
    "A run of 60 small pictures with a seal and a learner that isn't one."
    monkeypatch.chdir(tmp_path)
    run, rng, rows = Run("runs/one"), np.random.default_rng(0), []
    define_into(run)
    for i in range(60):
        p = run / "pictures" / f"it's número {i}.png"
        p.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (8, 8, 3), np.uint8)).save(p)
        rows.append(dict(path=p.as_posix(), label=("cat", "dog")[i % 2], split="test" if i < 40 else "train", sha256=sha256_of(p), source="made up"))
    df = pd.DataFrame(rows)
    run.save_manifest(df)
    run.write_json("seal.json", seal(df[df.split == "test"]))
    run.write_json("evaluation.json", {"temperature": 1.5, "threshold": 0.6})
    (run / "learner").mkdir()
    (run / "learner" / "model.safetensors").write_bytes(b"parameters")
    return run


def test_opening_is_counted_and_recorded(run):
    rows = open_seal(run, "abc")
    assert len(rows) == 40 and set(rows.split) == {"test"}
    open_seal(run, "def")
    opened = run.read_json("seal.json")["opened"]
    assert [o["model"] for o in opened] == ["abc", "def"] and opened[0]["at"].endswith("+00:00")


def test_the_seal_is_the_one_that_preprocessing_writes(run):
    held = run.manifest().query("split == 'test'")
    sealed = seal(held)
    assert sealed["sha256"] == content_hash(held) and sealed["pictures"] == 40 and sealed["labels"] == {"cat": 20, "dog": 20}
    assert seal(held.sample(frac=1, random_state=0))["sha256"] == sealed["sha256"]


def at(df, i, **values):
    for c, v in values.items(): df.loc[i, c] = v
    return df


CHEATS = {
    "a changed file": (lambda r, df: Image.new("RGB", (8, 8)).save(df.path[3]), "changed: it's número 3.png"),
    "a file that is gone": (lambda r, df: (r / "pictures" / "it's número 5.png").unlink(), "missing: it's número 5.png"),
    "a new label": (lambda r, df: r.save_manifest(at(df, 4, label="dog")), "relabelled: it's número 4.png (cat → dog)"),
    "a row added": (lambda r, df: r.save_manifest(at(df, 50, split="test")), "added: it's número 50.png"),
    "a row removed": (lambda r, df: r.save_manifest(df.drop(index=7)), "removed: it's número 7.png"),
    "a row moved to train": (lambda r, df: r.save_manifest(at(df, 8, split="train")), "removed: it's número 8.png"),
    "a row twice": (lambda r, df: r.save_manifest(pd.concat([df, df.iloc[:1]])), "41 rows where 40 were sealed"),
    "a changed file with a matching hash": (lambda r, df: (Image.new("RGB", (8, 8)).save(df.path[3]), r.save_manifest(at(df, 3, sha256=sha256_of(df.path[3])))),
                                            "changed: it's número 3.png"),
    "the same picture in train": (lambda r, df: r.save_manifest(at(df, 55, sha256=df.sha256[2])), "it's número 2.png, which is also it's número 55.png in train"),
    "five relabelled": (lambda r, df: r.save_manifest(at(df, [0, 2, 4, 6, 8], label="dog")), "and 2 more"),
    "no test pictures": (lambda r, df: r.save_manifest(df.assign(split="train")), "no test pictures"),
    "no manifest hash in the seal": (lambda r, df: r.write_json("seal.json", {"opened": []}), "without a hash"),
}


@pytest.mark.parametrize("name", CHEATS)
def test_a_broken_seal_names_the_picture_and_changes_nothing(run, name):
    cheat, words = CHEATS[name]
    cheat(run, run.manifest())
    before = (run / "seal.json").read_bytes()
    with pytest.raises(SealError) as e: open_seal(run, "abc")
    assert words in str(e.value) and (run / "seal.json").read_bytes() == before


def test_a_seal_without_contents_still_breaks(run):
    sealed = run.read_json("seal.json")
    run.write_json("seal.json", {k: v for k, v in sealed.items() if k != "contents"})
    assert len(open_seal(run, "abc")) == 40
    run.save_manifest(run.manifest().drop(index=7))
    with pytest.raises(SealError, match="other pictures or labels .39. than those sealed .40."): open_seal(run, "abc")


def test_no_seal(run):
    (run / "seal.json").unlink()
    with pytest.raises(InputError): open_seal(run, "abc")


@pytest.fixture
def learner(monkeypatch):
    "Stands in for chapter 05: a 'network' that answers all but every tenth picture rightly."
    def predict_frame(learn, df):
        right = np.arange(len(df)) % 10 > 0
        said = [l if r else {"cat": "dog", "dog": "cat"}[l] for l, r in zip(df.label, right)]
        p = np.where(np.array(said) == "cat", .9, .1)
        return pd.DataFrame({"path": df.path, "label": df.label, "predicted": said, "probability": .9, "correct": right, "p_cat": p, "p_dog": 1 - p})
    fake = types.SimpleNamespace(load_learner=lambda folder: "a learner", predict_frame=predict_frame)
    monkeypatch.setitem(sys.modules, "dlpipe_nb.training", fake)
    return fake


def test_test_into(run, learner):
    said = testing.test_into(run, baselines={"majority": 0.5, "by hand": 0.7512})
    kept = run.read_json("test.json")
    assert (said.right, said.total) == (36, 40) and kept["result"] == said.result == "too few pictures to say"
    assert "On the same pictures: always the commonest label 50.0 %, by hand 75.1 %." in kept["sentence"] and "different models" not in kept["sentence"]
    assert kept["opened"] == 1 and kept["model"] == sha256_of(run / "learner" / "model.safetensors")
    assert set(kept) >= {"result", "sentence", "right", "total", "accuracy", "low", "high", "target", "confidence", "opened", "model", "baselines"}
    preds = run.manifest("test_predictions.csv")
    assert len(preds) == 40 and preds.correct.sum() == 36
    for name in ("test_confusion", "test_mistakes"): assert Image.open(run / "figures" / f"{name}.png").width > 300


@pytest.mark.parametrize("metric,target,words,blind", [
    ("recall of dog", .8, "Recall of dog 100.0 % (20 of 20; ", "Without looking, always dog gets 100 %."),
    ("recall of cat", .8, "Recall of cat 80.0 % (16 of 20; ", "Without looking, always cat gets 100 %."),
    ("expected cost", .3, "Expected cost 0.1 a picture (", "Without looking, always dog gets 0.5 a picture.")])
def test_test_into_judges_by_the_problems_metric(run, learner, metric, target, words, blind):
    problem = define_into(run, metric=metric, target=target, costs=COSTS)
    said = testing.test_into(run, baselines={"by hand": 0.75})
    kept = run.read_json("test.json")
    want = judge([[16, 4], [0, 20]], problem)
    assert said == want and kept["result"] == want.result and kept["score"]["rule"]["name"] == metric
    assert kept["sentence"].startswith(words) and blind in kept["sentence"] and "by accuracy: by hand 75.0 %" in kept["sentence"]
    assert (kept["right"], kept["total"], kept["accuracy"], kept["target"]) == (36, 40, .9, target)
    assert (kept["low"], kept["high"]) == interval(36, 40) and kept["score"]["value"] == want.score.value


def test_the_sentence_warns_when_models_were_compared_on_the_test(run, learner):
    testing.test_into(run)
    assert "different models" not in testing.test_into(run).sentence + run.read_json("test.json")["sentence"]
    (run / "learner" / "model.safetensors").write_bytes(b"other parameters")
    testing.test_into(run)
    kept = run.read_json("test.json")
    assert kept["opened"] == 3 and "2 different models" in kept["sentence"]


def test_what_is_wrong_costs_no_opening(run, learner):
    def broken(folder): raise InputError("a learner", "none", "train")
    with pytest.raises(InputError): testing.test_into(run, baselines={"by hand": 75})
    learner.load_learner = broken
    with pytest.raises(InputError): testing.test_into(run)
    assert run.read_json("seal.json")["opened"] == [] and not run.has("test")


def frame(right): return pd.DataFrame({"path": [f"{i}.png" for i in range(len(right))], "label": "cat", "predicted": np.where(right, "cat", "dog")})


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=80))
def test_mcnemar(pairs):
    a, b = map(np.array, zip(*pairs))
    c = compare(frame(a), frame(b).sample(frac=1, random_state=0))
    assert (c.both, c.only_a, c.only_b, c.neither) == ((a & b).sum(), (a & ~b).sum(), (~a & b).sum(), (~a & ~b).sum())
    n, few = c.only_a + c.only_b, min(c.only_a, c.only_b)
    assert c.p == pytest.approx(min(1, 2 * binom.cdf(few, n, .5)), abs=1e-9)
    assert c.p == pytest.approx(mcnemar([[c.both, c.only_a], [c.only_b, c.neither]], exact=True).pvalue, abs=1e-9)


def test_mcnemar_approaches_its_approximation():
    c = compare(frame([True] * 600 + [False] * 400), frame([True] * 100 + [False] * 500 + [True] * 400))
    assert c.p == pytest.approx(chi2.sf((abs(c.only_a - c.only_b) - 1) ** 2 / (c.only_a + c.only_b), 1), rel=.05)


@pytest.mark.parametrize("a,b", [(frame([True]), frame([True] * 2)), (frame([]), frame([])), (frame([True, False]), frame([True, False]).assign(label="dog")),
                                 (pd.concat([frame([True])] * 2), pd.concat([frame([True])] * 2))])
def test_compare_refuses(a, b):
    with pytest.raises(InputError): compare(a, b)


def answers(n, seed, labels=("cat", "dog", "bird")):
    "Two models' predictions of the same pictures, the second's in another order."
    rng = np.random.default_rng(seed)
    true = rng.choice(labels, n)
    said = [np.where(rng.random(n) < share, true, rng.choice(labels, n)) for share in (.8, .6)]
    a, b = (pd.DataFrame({"path": [f"{i}.png" for i in range(n)], "label": true, "predicted": p}) for p in said)
    return a, b.sample(frac=1, random_state=seed)


THREE = ("cat", "dog", "bird")
METRICS = {"accuracy": None, "recall": Problem("?", THREE, metric="recall of dog"),
           "cost": Problem("?", THREE, metric="expected cost", target=1, costs={"dog": {"cat": 7, "bird": .5}})}


def by_problem(d, problem):
    if problem is None: return (d.label == d.predicted).mean()
    return measure(pd.crosstab(d.label, d.predicted).reindex(index=THREE, columns=THREE, fill_value=0), problem)


@settings(max_examples=25, deadline=None)
@given(st.integers(30, 400), st.integers(0, 10**6), st.sampled_from(sorted(METRICS)), st.sampled_from([.8, .95]))
def test_the_paired_bootstrap_is_scipys(n, seed, name, confidence):
    a, b = answers(n, seed)
    if (a.label == "dog").sum() < 5: return
    problem = METRICS[name]
    got = difference(a, b, problem, confidence, draws=400, seed=seed)
    assert got.a == pytest.approx(by_problem(a, problem), abs=1e-9) and got.b == pytest.approx(by_problem(b, problem), abs=1e-9)
    assert got.value == pytest.approx(got.a - got.b, abs=1e-9) and got.n == n
    label, x, y = a.label.to_numpy(), a.predicted.to_numpy(), b.sort_index().predicted.to_numpy()
    counts = (label == "dog") if name == "recall" else np.ones(n)
    cost = lambda said: np.array([0 if t == s else {("dog", "cat"): 7, ("dog", "bird"): .5}.get((t, s), 1) for t, s in zip(label, said)])
    gains = [cost(s) if name == "cost" else (label == s) * counts for s in (x, y)]
    lead = lambda g, h, c, axis: (g.sum(axis) - h.sum(axis)) / c.sum(axis)
    want = bootstrap((*map(np.asarray, (gains[0] * 1., gains[1] * 1., counts * 1.)),), lead, paired=True, vectorized=True, n_resamples=400, method="percentile",
                     confidence_level=confidence, random_state=np.random.default_rng(seed)).confidence_interval
    assert (got.low, got.high) == pytest.approx((want.low, want.high), abs=1e-9)


def test_the_paired_bootstrap_is_the_loop_by_hand():
    a, b = answers(120, 3)
    b = b.sort_index()
    right_a, right_b = (a.label == a.predicted).to_numpy(), (b.label == b.predicted).to_numpy()
    rng, leads = np.random.default_rng(5), []
    for _ in range(500):
        some = rng.integers(0, 120, 120)
        leads.append(right_a[some].mean() - right_b[some].mean())
    got = difference(a, b, confidence=.9, draws=500, seed=5)
    assert (got.low, got.high) == pytest.approx(np.percentile(leads, [5, 95]), abs=1e-9)
    few = [difference(a, b, draws=101, seed=s) for s in (1, 1, 2)]
    assert few[0] == few[1] != few[2]


def test_redrawing_in_batches_is_redrawing_at_once(monkeypatch):
    gain, counts = np.random.default_rng(0).normal(size=50), np.ones(50)
    whole = testing._redrawn(gain, counts, .95, 300, 1)
    real = np.random.default_rng
    sizes = []
    class Spy:
        def __init__(self, seed): self.rng = real(seed)
        def integers(self, low, high, shape):
            sizes.append(shape[0])
            return self.rng.integers(low, high, shape)
    monkeypatch.setattr(testing.np.random, "default_rng", Spy)
    big = np.tile(gain, 30_000)
    testing._redrawn(big, np.ones(len(big)), .95, 5, 1)
    assert max(sizes) <= 2 and sum(sizes) == 5, "a large test set is redrawn a few at a time"
    assert testing._redrawn(gain, counts, .95, 300, 1) == whole


def test_a_difference_knows_which_way_is_better():
    a, b = answers(400, 1)
    more, cost = difference(a, b), difference(a, b, METRICS["cost"])
    assert more.better == "A" and more.value > 0 and cost.better == "A" and cost.value < 0 and "A is better" in repr(cost)
    assert difference(b, a).better == "B" and difference(a, a).better == "" and "0 lies inside" in repr(difference(a, a))


def test_few_pictures_that_differ_and_the_two_methods_disagree():
    a, b = frame([True] * 282 + [False] * 18), frame([True] * 278 + [False] * 22)
    assert compare(a, b).p == .125 and difference(a, b).better == "A"


@pytest.mark.parametrize("change", [
    lambda a, b: (a, b, None, 0), lambda a, b: (a, b, None, 95), lambda a, b: (a, b, None, .95, 10), lambda a, b: (a, b.head(3)), lambda a, b: (a[["path", "label"]], b),
    lambda a, b: (a, b, Problem("?", ("cat", "dog"), metric="recall of dog")),
    lambda a, b: (a[a.label != "dog"], b[b.label != "dog"], METRICS["recall"]), lambda a, b: (a.head(0), b.head(0))])
def test_difference_refuses(change):
    with pytest.raises(InputError): difference(*change(*answers(40, 0)))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_holm(ps):
    with mock.patch("gc.collect"): theirs = multipletests(ps, method="holm")[1] # statsmodels tidies the whole memory at each call
    assert holm(ps).tolist() == pytest.approx(theirs.tolist(), abs=1e-9)
    assert holm({i: p for i, p in enumerate(ps)}).index.tolist() == list(range(len(ps)))


@pytest.mark.parametrize("ps", [[], [1.2], [-.1], [float("nan")]])
def test_holm_refuses(ps):
    with pytest.raises(InputError): holm(ps)


def _open_often(folder, name):
    for k in range(8): testing._record(Run(folder), f"{name}{k}")


def test_no_opening_is_lost_when_processes_open_at_the_same_time(run):
    jobs = [multiprocessing.get_context("fork").Process(target=_open_often, args=(run.path, name)) for name in "ABC"]
    for j in jobs: j.start()
    for j in jobs: j.join(60)
    assert [j.exitcode for j in jobs] == [0] * 3
    assert sorted(o["model"] for o in run.read_json("seal.json")["opened"]) == [f"{n}{k}" for n in "ABC" for k in range(8)]


def test_a_lock_left_by_a_dead_process_stops_nobody(run):
    (run / ".seal.lock").write_text("")
    assert len(open_seal(run, "abc")) == 40


def exact(a, b): return sum(math.comb(a + b, k) for k in range(a + b + 1) if abs(2 * k - a - b) >= abs(a - b)) / 2 ** (a + b)


def redrawn(a, b, rng, same=True, replace=True, ends=(2.5, 97.5)):
    n = len(a)
    draw = lambda: rng.integers(0, n, (2000, n)) if replace else np.array([rng.permutation(n) for _ in range(2000)])
    at = draw()
    return np.percentile(a[at].mean(1) - b[at if same else draw()].mean(1), ends)


@pytest.mark.parametrize("exercise,right,wrong", [
    ("08.1", max(w for w in range(361) if verdict(360 - w, 360).result == "pass"), (36, 345, 30, 3, .1)),
    ("08.2", lambda b, a: {k for k in b.keys() | a.keys() if b.get(k) != a.get(k)},
     (lambda b, a: set(b) ^ set(a), lambda b, a: {k for k in b if b[k] != a.get(k)}, lambda b, a: {k for k in a if a[k] != b.get(k)},
      lambda b, a: set(b) | set(a), lambda b, a: "b")),
    ("08.3", exact, (lambda a, b: exact(a, b) / 2, lambda a, b: 2 * math.comb(a + b, min(a, b)) / 2 ** (a + b), lambda a, b: chi2.sf((a - b) ** 2 / (a + b), 1),
                     lambda a, b: .5, lambda a, b: min(1, 2 * sum(math.comb(a + b, k) for k in range(b + 1)) / 2 ** (a + b)))),
    ("08.4", lambda x, y: sum(a != b for a, b in zip(x, y)) / len(x),
     (lambda x, y: abs(x.count("c") - y.count("c")) / len(x), lambda x, y: sum(a != b for a, b in zip(x, y)), lambda x, y: sum(a == b for a, b in zip(x, y)) / len(x),
      lambda x, y: sum(a != b for a, b in zip(x, y)) / (len(x) + len(y)), lambda x, y: True, lambda x, y: 2 / 7)),
    ("08.5", lambda a, b, rng: redrawn(a, b, rng),
     (lambda a, b, rng: redrawn(b, a, rng), lambda a, b, rng: redrawn(a, b, rng, same=False), lambda a, b, rng: redrawn(a, b, rng, replace=False),
      lambda a, b, rng: redrawn(a, 0 * b, rng), lambda a, b, rng: redrawn(a, b, rng, ends=(16, 84)), lambda a, b, rng: redrawn(100 * a, 100 * b, rng),
      lambda a, b, rng: redrawn(a, b, rng)[::-1], lambda a, b, rng: .05)),
])
def test_exercises_tell_wrong_answers_apart(exercise, right, wrong):
    assert check(exercise, right).passed, check(exercise, right)
    said = [check(exercise, w) for w in wrong]
    assert check(exercise, None).passed is None and not any(s.passed for s in said) and len({s.message for s in said}) >= 4, said
