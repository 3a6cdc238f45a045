"Chapter 08, the report: its numbers, what it refuses, and what each rule of its advice says."
import math
import sys
from dataclasses import asdict, replace

import nbformat
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nbformat.v4 import new_code_cell, new_notebook
from scipy.stats import fisher_exact
from sklearn.metrics import average_precision_score, classification_report, roc_auc_score

from dlpipe_nb import testing
from dlpipe_nb.core import InputError, Run, sha256_of
from dlpipe_nb.evaluation import calibration_error, confusion
from dlpipe_nb.testing import advice, class_table, evidence, judge, ranking, report, suspects, surprises
from report_runs import EVIL, made, predicted

def pieces(run: Run) -> str:
    "All pieces of the report, made in this process: what the notebook's cells give."
    space = {}
    for cell in testing._notebook(run.path.as_posix())["cells"]:
        if cell.cell_type != "code": continue
        *lines, last = cell.source.splitlines()
        exec("\n".join(l for l in lines if "rcParams" not in l), space)
        space["said"] = space.get("said", "") + eval(last, space)
    return space["said"]


@pytest.fixture(scope="module")
def run(tmp_path_factory): return made(tmp_path_factory.mktemp("report") / "run", factors=True)


@pytest.fixture(scope="module")
def seen(run): return evidence(run)


def hashes(run): return {p.relative_to(run.path).as_posix(): sha256_of(p) for p in run.path.rglob("*") if p.is_file()}


def told(e): return {a.says: a for a in advice(e)}


# ---- the page

@pytest.fixture(scope="module")
def page(run):
    before = hashes(run)
    path = report(run)
    assert {k: v for k, v in hashes(run).items() if not k.startswith("report.")} == before, "a report changes nothing else, the seal least of all"
    assert path == run / "report.html"
    return path.read_text("utf-8")


def test_the_page_has_the_numbers_of_the_test_and_of_scikit_learn(run, page):
    test, preds = run.read_json("test.json"), run.manifest("test_predictions.csv")
    assert test["sentence"] in page and f"{test['right']} of {test['total']}" in page
    said = classification_report(preds.label, preds.predicted, output_dict=True)
    for name, row in (("cat", "cat"), ("dog", "dog"), ("macro avg", "macro average"), ("weighted avg", "weighted average")):
        cells = "".join(f"<td>{100 * said[name][k]:.1f} %</td>" for k in ("precision", "recall", "f1-score"))
        assert f'<th scope="row">{row}</th>{cells}<td>{said[name]["support"]:.0f}</td>' in page
    assert f"cat {roc_auc_score(preds.label == 'cat', preds.p_cat):.4f}" in page
    assert f"dog {average_precision_score(preds.label == 'dog', preds.p_dog):.4f}" in page


def test_the_page_tells_where_the_network_comes_from(page):
    for words in ("Which of these does the picture show: cat, dog?", "2026-01-02 03:04 UTC", "opened once", "price: 0.25; unit: euros",
                  "training 0.700 → 0.140", "No search for better settings was made", "made up", "highest learning rate"):
        assert words in page, words


def test_the_notebook_beside_it_was_executed_and_can_be_again(run, page):
    nb = nbformat.read(run / "report.ipynb", 4)
    nbformat.validate(nb)
    code = [c for c in nb.cells if c.cell_type == "code"]
    assert all(c.outputs and c.execution_count for c in code) and "Run('.')" in code[0].source
    assert str(run.path) not in (run / "report.ipynb").read_text("utf-8") + page, "no absolute path"


def test_what_another_process_makes_is_the_same_to_the_last_pixel(run, seen, page):
    nb = nbformat.read(run / "report.ipynb", 4)
    said = "".join(o.data.get("text/html", "") for c in nb.cells for o in c.get("outputs", []))
    for piece in (seen.headline(), seen.about_answers(), seen.cases(right=True, sure=True), seen.next_steps()): assert piece in said


def test_a_report_may_go_elsewhere(run, monkeypatch, tmp_path):
    monkeypatch.setattr(testing, "_execute", lambda nb, folder: nb)
    there = report(run, tmp_path / "sent" / "to the boss.html")
    assert there.exists() and report(run, tmp_path / "sent") == tmp_path / "sent" / "report.html"
    nb = nbformat.read(tmp_path / "sent" / "to the boss.ipynb", 4)
    way = next(c.source for c in nb.cells if c.cell_type == "code").partition("Run('")[2].partition("')")[0]
    assert way.startswith("..") and (tmp_path / "sent" / way).resolve() == run.path.resolve()


# ---- every kind of run

KINDS = {
    "three labels with names that are code": dict(labels=EVIL, n=180, names="<script>alert('x')</script> & Ünï"),
    "recall": dict(metric="recall of dog", target=.8, harms={"dog": {"cat": "the <i>cats</i>"}}),
    "expected cost, hopeless": dict(metric="expected cost", target=.5, costs={"dog": {"cat": 10}}, unit="€", skill=.5),
    "small and perfect": dict(n=16, skill=99),
    "ten labels": dict(labels=tuple(f"label {i}" for i in range(10)), n=240, skill=1),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_run_has_a_report(kind, tmp_path):
    run = made(tmp_path / "run", **{k: v.replace("/", "∕") if k == "names" else v for k, v in KINDS[kind].items()})
    said, test = pieces(run), run.read_json("test.json")
    assert testing._esc(test["sentence"]) in said and f'class="verdict {test["result"] if test["result"] in ("pass", "fail") else "unknown"}"' in said
    assert "nan" not in said.replace("data:image", "").casefold().split("base64")[0] and ">nan" not in said and "<script" not in said and "<b>cat" not in said
    assert said.count("<img") == said.count('alt="') and 'alt=""' not in said


def test_a_picture_that_has_gone_leaves_a_gap(tmp_path):
    run = made(tmp_path / "run", n=40)
    for p in list((run / "pictures").iterdir())[::2]: p.unlink()
    assert "can’t be read" in pieces(run)


def test_what_is_there_besides_is_shown(tmp_path):
    import optuna
    run = made(tmp_path / "run", n=40)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(study_name="study", storage=f"sqlite:///{run / 'study.db'}", direction="maximize")
    study.optimize(lambda t: t.suggest_float("lr", .001, .1), n_trials=3)
    run.write_json("tuning.json", {"settings": {"lr": .05}, "value": .9, "trials": 3, "sampler": "tpe"})
    (run / "dataset_card.md").write_text("# A card <b>", "utf-8")
    pd.DataFrame([("none", 0, 20, 19, .95, .8, 1), ("blur", 1, 20, 9, .45, .3, .7)],
                 columns=["kind", "strength", "n", "right", "accuracy", "low", "high"]).to_csv(run / "stress.csv", index=False)
    pd.DataFrame([dict(test="shift", kind="invariance", n=20, failed=7, rate=.35, allowed=.1, passed=False, example="x.png")]).to_csv(run / "behaviour.csv", index=False)
    run.write_json("elsewhere.json", [{"folder": "from Ana", "at": "2026-02-03", "sentence": "50 of 60 right.", "right": 50, "total": 60, "result": "fail"}])
    (run / "faults.csv").write_text("path,fault,detail\na.png,broken,x\nb.png,broken,y\n", "utf-8")
    before, said = hashes(run), pieces(run)
    assert hashes(run) == before, "not even the study is touched"
    for words in ("The best 3 of 3 complete trials", "# A card &lt;b&gt;", "blur at strength 1", "7 of 20", "50 of 60 right.", "broken",
                  "lr 0.008 was used, 0.05 found", "shift: 7 of 20 failed", "Prepare it for blur", "9 of 20, 45.0 % right, untouched 95.0 %", "from Ana: 50 of 60 right"):
        assert words in said, words
    (run / "study.db").write_bytes(b"no database")
    assert "study.db can’t be read" in pieces(run)


# ---- what is refused

@pytest.mark.parametrize("gone,words", [("test.json", "opens the seal: a report never does that"), ("test_predictions.csv", "was tested"),
                                        ("learner/learner.json", 'run.ensure("learner")'), ("problem.json", 'run.ensure("problem")')])
def test_a_run_that_was_not_tested_is_refused(gone, words, tmp_path):
    run = made(tmp_path / "run", n=16)
    (run / gone).unlink()
    before = hashes(run)
    with pytest.raises(InputError, match="none") as e: report(run)
    assert words in str(e.value) and hashes(run) == before


def test_predictions_that_the_test_did_not_count_are_refused(tmp_path):
    run = made(tmp_path / "run", n=40)
    preds = run.manifest("test_predictions.csv")
    flip = preds.predicted.map({"cat": "dog", "dog": "cat"})
    run.save_manifest(preds.assign(predicted=flip), "test_predictions.csv")
    with pytest.raises(InputError, match="the answers that test.json counted"): report(run)


@pytest.mark.parametrize("tool", ["nbclient", "nbconvert", "ipykernel"])
def test_a_missing_tool_is_named(run, tool, monkeypatch):
    monkeypatch.setitem(sys.modules, tool, None)
    with pytest.raises(InputError, match=r'dlpipe_nb\[course\]'): report(run)


def test_a_place_that_can_not_be_is_refused(run, tmp_path):
    with pytest.raises(InputError, match="ends in .html"): report(run, tmp_path / "report.pdf")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="a folder for the report"): report(run, tmp_path / "file" / "x.html")


def failing(code, tmp_path, **more): return testing._execute(new_notebook(cells=[new_code_cell(code)]), tmp_path, **more)


@pytest.mark.parametrize("code,words", [("1 / 0", "ZeroDivisionError: division by zero"), ("import time\ntime.sleep(60)", "Timeout"),
                                        ("import os\nos._exit(3)", "Dead")])
def test_a_cell_that_fails_is_one_error(code, words, tmp_path):
    with pytest.raises(InputError, match=words): failing(code, tmp_path, **({"timeout": 1} if "sleep" in code else {}))


def test_the_kernel_is_this_python_and_what_it_prints_is_not_kept(tmp_path):
    nb = failing("import sys, warnings\nprint('x')\nwarnings.warn('y')\nsys.executable", tmp_path)
    assert [o.data["text/plain"] for o in nb.cells[0].outputs] == [repr(sys.executable)]
    assert list(tmp_path.iterdir()) == []


def test_it_works_where_an_event_loop_is_running(tmp_path):
    import asyncio
    async def cell(): return failing("1 + 1", tmp_path)
    assert asyncio.run(cell()).cells[0].outputs[0].data["text/plain"] == "2"


# ---- the numbers, each against its oracle

def answers(seed, n, k):
    rng, labels = np.random.default_rng(seed), tuple("abcd"[:k])
    rows = pd.DataFrame({"path": [f"{i}.png" for i in range(n)], "label": rng.choice(labels, n)})
    return predicted(rows, labels, rng.uniform(0, 3), rng), labels


some_answers = st.builds(answers, st.integers(0, 10**6), st.integers(5, 80), st.integers(2, 4))


@settings(max_examples=15, deadline=None)
@given(some_answers)
def test_the_class_table_is_scikit_learns(made):
    preds, labels = made
    said = classification_report(preds.label, preds.predicted, labels=list(labels), output_dict=True, zero_division=0)
    for row, name in zip(class_table(preds, labels).values, (*labels, "macro avg", "weighted avg")):
        assert np.allclose(row, [said[name][k] for k in ("precision", "recall", "f1-score", "support")], atol=1e-9)


def test_a_label_that_was_never_answered_has_precision_0():
    preds = pd.DataFrame({"label": ["a", "b", "b"], "predicted": ["a", "a", "a"]})
    assert class_table(preds, ("a", "b")).loc["b"].tolist() == [0, 0, 0, 2]


@settings(max_examples=15, deadline=None)
@given(some_answers)
def test_the_areas_are_scikit_learns(made):
    preds, labels = made
    found = ranking(preds, labels)
    for l in labels:
        y = preds.label == l
        assert (l in found) == (0 < y.sum() < len(y))
        if l in found:
            assert math.isclose(found[l]["auc"], roc_auc_score(y, preds[f"p_{l}"]), abs_tol=1e-9)
            assert math.isclose(found[l]["ap"], average_precision_score(y, preds[f"p_{l}"]), abs_tol=1e-9)


@settings(max_examples=10, deadline=None)
@given(some_answers)
def test_surprises_are_fishers_and_holms(made):
    multipletests = pytest.importorskip("statsmodels.stats.multitest").multipletests
    preds, labels = made
    found = surprises(preds.assign(kind=np.arange(len(preds)) % 3), ["label", "kind"], at_least=3)
    assert (found.p.diff().dropna() >= 0).all()
    for r in found.itertuples():
        mine = (preds.label if r.column == "label" else pd.Series(np.arange(len(preds)) % 3)).astype(str) == r.value
        right = preds.label == preds.predicted
        table = pd.crosstab(mine, right).reindex([True, False], columns=[True, False], fill_value=0)
        assert math.isclose(r.p, fisher_exact(table)[1], abs_tol=1e-9) and (r.n, r.right) == (mine.sum(), (mine & right).sum())
        assert math.isclose(r.rest, right[~mine].mean(), abs_tol=1e-12)
    if len(found): assert np.allclose(found.p_all, multipletests(found.p, method="holm")[1], atol=1e-9)


@settings(max_examples=10, deadline=None)
@given(some_answers)
def test_suspects_are_cleanlabs(made):
    find = pytest.importorskip("cleanlab.filter").find_label_issues
    preds, labels = made
    if preds.label.nunique() < len(labels): return
    odd = find(preds.label.map({l: i for i, l in enumerate(labels)}).to_numpy(), preds[[f"p_{l}" for l in labels]].to_numpy(),
               filter_by="confident_learning", n_jobs=1)
    assert set(suspects(preds, labels).index) == set(np.flatnonzero(odd))


def test_honest_probabilities_seldom_look_dishonest():
    rng = np.random.default_rng(0)
    p = rng.uniform(.5, 1, 200)
    limit = testing._honest_error(p)
    def error(right): return calibration_error(pd.DataFrame({"label": np.where(right, "a", "b"), "predicted": "a", "probability": p, "p_a": p, "p_b": 1 - p}))
    kept = np.mean([error(rng.random(200) < p) <= limit for _ in range(60)])
    assert kept >= .85 and error(rng.random(200) < p - .2) > limit


# ---- advice: every rule speaks when it should, with its number, and not otherwise

def with_test(e, right, wrong, **test):
    "The same run with so many of each label right and wrong: {label: (right, wrong)}."
    rows = [(l, l if i < r else next(x for x in e.labels if x != l)) for l, (r, w) in zip(e.labels, zip(right, wrong)) for i in range(r + w)]
    preds = pd.DataFrame(rows, columns=["label", "predicted"]).assign(path="x.png", probability=.8)
    for l in e.labels: preds[f"p_{l}"] = np.where(preds.predicted == l, .8, .2 / (len(e.labels) - 1))
    said = judge(confusion(preds, e.labels), e.problem)
    return replace(e, preds=preds, factors=[], test={**e.test, **asdict(said), "sentence": said.sentence, **test})


def history(*rows): return [{"train_loss": a, "valid_loss": b, "accuracy": .5} for a, b in rows]


ADVICE = {
    "pass": (lambda e: with_test(e, (98, 98), (2, 2)), "Export it", "accuracy 98.0 %"),
    "fail": (lambda e: with_test(e, (70, 70), (30, 30)), "Don’t put it to work", "accuracy 70.0 %"),
    "too few": (lambda e: with_test(e, (47, 47), (3, 3)), "Collect test pictures of the same kind: 117 more; at this rate 217 in all", "accuracy 94.0 %"),
    "too few and below": (lambda e: with_test(e, (44, 44), (6, 6)), "Improve it first", "accuracy 88.0 %"),
    "another model": (lambda e: replace(e, record={**e.record, "sha256": "b" * 64}), "Test the network that is in the run now", "b" * 16),
    "opened for two": (lambda e: replace(e, opened=[{"model": "a"}, {"model": "b"}]), "Collect new test pictures before the next decision", "opened twice, for 2 models"),
    "no better than hand-made": (lambda e: with_test(e, (80, 80), (20, 20), baselines={"hand": .79}), "Ask whether a network is needed", "79.0 %"),
    "diverged": (lambda e: replace(e, record={**e.record, "history": history((.7, .7), (math.nan, math.nan))}), "a lower learning rate", "nan"),
    "learned nothing": (lambda e: replace(e, record={**e.record, "history": history((.7, .7), (.68, .69))}), "Let it learn more", "an even guess has 0.693"),
    "stopped late": (lambda e: replace(e, record={**e.record, "history": history((.7, .7), (.2, .3), (.1, .5))}), "Stop earlier", "0.300 after epoch 2 of 3"),
    "by heart": (lambda e: replace(e, record={**e.record, "history": history((.7, .7), (.05, .4))}), "It overfits", "a gap of 0.350"),
    "worse than validation": (lambda e: with_test(replace(e, chosen={**e.chosen, "n": 200, "right": 196, "accuracy": .98}), (80, 80), (20, 20)), "Find out why the test differs from validation: is it tuned", "98.0 % of 200"),
    "better than validation": (lambda e: with_test(replace(e, chosen={**e.chosen, "n": 200, "right": 150, "accuracy": .75}), (98, 98), (2, 2)), "are its pictures easier", "75.0 % of 200"),
    "a weak label": (lambda e: with_test(e, (60, 95), (40, 5)), "Collect more training pictures of cat", "recall of cat 60 of 100, 60.0 %"),
    "a leaning": (lambda e: with_test(e, (80, 99), (20, 1)), "It leans from cat to dog", "20 are cat called dog, 1 the other way round"),
    "few of a label": (lambda e: with_test(e, (100, 12), (5, 1)), "Collect at least 17 more test pictures of dog", "dog 13"),
    "unbalanced": (lambda e: replace(e, df=pd.DataFrame({"split": "train", "label": ["cat"] * 90 + ["dog"] * 20})), "Collect about 70 more training pictures of dog", "dog 20, cat 90"),
    "a weak slice": (lambda e: replace(t := with_test(e, (90, 90), (10, 10)), factors=["coat"], preds=t.preds.assign(coat=np.where((t.preds.label != t.preds.predicted) | (t.preds.index % 9 == 0), "red", "blue"))), "like the weak slice, coat red", "among 2 slices"),
    "dark is hard": (lambda e: replace(t := with_test(e, (90, 90), (10, 10)), preds=t.preds.assign(brightness=np.where(t.preds.label == t.preds.predicted, .6, .2) + np.arange(len(t.preds)) / 1e4)), "Add darker pictures", "where it is wrong"),
    "overconfident": (lambda e: replace(with_test(e, (55, 55), (45, 45)), chosen={**e.chosen, "temperature": 1.0}), "Don’t take its probabilities at their word", "calibration error 0.25"),
    "mostly unsure": (lambda e: replace(with_test(e, (90, 90), (10, 10)), chosen={**e.chosen, "temperature": 1.0, "threshold": .9}), "Plan for people", "200 of 200, 100.0 % are unsure"),
    "no threshold": (lambda e: replace(e, chosen={**e.chosen, "threshold": 0.0}), "no threshold tells the sure ones", "0 of 60"),
}


@pytest.mark.parametrize("case", ADVICE)
def test_advice(case, seen):
    change, words, number = ADVICE[case]
    found = [a for a in advice(change(seen)) if words in a.says]
    assert len(found) == 1 and found[0].todo and number in found[0].because, [*map(str, advice(change(seen)))]


def test_a_good_run_is_told_what_is_in_order(seen):
    good = replace(with_test(seen, (98, 98), (2, 2)), chosen={**seen.chosen, "temperature": 1.0, "threshold": .5, "n": 200, "right": 195, "accuracy": .975})
    good = replace(good, preds=good.preds.assign(probability=.98, p_cat=np.where(good.preds.predicted == "cat", .98, .02), p_dog=np.where(good.preds.predicted == "dog", .98, .02)))
    said = told(good)
    assert [a.says.split(",")[0] for a in said.values() if a.todo and "suspect" not in a.says] == ["Export it"]
    for words in ("The test pictures decided nothing before.", "It learned, and not by heart.", "Test and validation agree.", "Its probabilities can be believed.",
                  "No label is found less often than chance would make it.", "The network is better than hand-made features."):
        assert words in said and any(c.isdigit() or c == "o" for c in said[words].because), words


def test_advice_by_cost_names_the_dearest_error(tmp_path):
    run = made(tmp_path / "run", **KINDS["expected cost, hopeless"])
    said = [a for a in advice(evidence(run)) if "costs the most" in a.says]
    table = confusion(run.manifest("test_predictions.csv"), ("cat", "dog")).values
    assert len(said) == 1 and f"of {table[0, 1] + 10 * table[1, 0]:,.4g} in all" in said[0].because


def test_each_sentence_names_a_number(seen):
    for a in advice(seen): assert any(c.isdigit() for c in a.because) or "once" in a.because, a


def test_the_order_puts_what_is_to_be_done_first(seen):
    todo = [a.todo for a in advice(seen)]
    assert todo == sorted(todo, reverse=True) and "target" in advice(seen)[0].because


@pytest.mark.parametrize("p,words", [(1.0, "&gt; 99.999 %"), (.9995, "99.950 %"), (.5, "50.0 %"), (.0004, "0.040 %"), (0.0, "&lt; 0.001 %")])
def test_no_probability_is_rounded_to_certainty(p, words):
    row = {"p_a": p, "p_b": 1 - p}
    assert words.replace("&gt;", ">").replace("&lt;", "<") == testing._exact(p) and f"width:{100 * p:.1f}%" in testing._bars(row, ("a", "b"))
