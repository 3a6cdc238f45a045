"Chapter 07: the search in its three ways, stopping and continuing, what luck does, and the exercises' checks."
import math
import os
import signal
import sqlite3
import subprocess
import sys
import time
import warnings
from datetime import datetime, timedelta

import numpy as np
import optuna
import pandas as pd
import pytest
from matplotlib.figure import Figure
from PIL import Image

from dlpipe_nb.core import InputError, Run, check, sha256_of
from dlpipe_nb.problem import define_into
from dlpipe_nb.problem import Problem, measure
from dlpipe_nb.tuning import (PRUNERS, SAMPLERS, StudyView, _tried, best, best_so_far, cost, distributions, grid_values, importances,
                              load_study, luck, objective_on, plot_parallel, plot_trials, standing, trials_table, tune, tune_into,
                              tuned, watch)

SPACE = {"lr": (1e-4, 1e-1, "log"), "wd": (0.0, 0.3)}
MIXED = {"lr": (1e-4, 1e-1, "log"), "epochs": (2, 10), "arch": ["small", "large"]}


def hill(s): return 1 - (math.log10(s["lr"]) + 2.2) ** 2 - s["wd"] / 10


def tried(study): return [t.params for t in study.trials if t.state.name != "FAIL"]


@pytest.mark.parametrize("bad", [{}, {"lr": (1, 1)}, {"lr": (2.0, 1.0)}, {"lr": (0, 1, "log")}, {"lr": []}, {"lr": 3},
                                 {"lr": (1, 2, "log", 3)}, {"lr": (1, 2, "linear")}, {"lr": (0, math.inf)}, {"lr": ("a", "b")},
                                 {"lr": (1,)}])
def test_a_space_that_cannot_be_searched(bad):
    with pytest.raises(InputError): distributions(bad)
    with pytest.raises(InputError): tune(hill, bad)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_proposal_lies_in_the_space(sampler):
    study = tune(lambda s: s["lr"], MIXED, 18, sampler)
    for p in tried(study):
        assert 1e-4 <= p["lr"] <= 1e-1 and p["epochs"] in range(2, 11) and p["arch"] in ("small", "large")
    assert len(tried(study)) == 18


def test_a_grid_is_the_finest_that_the_budget_pays_for():
    for budget in range(4, 40):
        values = grid_values(SPACE, budget)
        n = math.prod(map(len, values.values()))
        assert n <= budget < (len(values["lr"]) + 1) ** 2
    np.testing.assert_allclose(grid_values({"a": (0.0, 1.0)}, 4)["a"], [0.125, 0.375, 0.625, 0.875])
    np.testing.assert_allclose(grid_values({"a": (1.0, 16.0, "log")}, 2)["a"], [2, 8])
    assert grid_values({"k": (1, 3)}, 9)["k"] == [1, 2, 3] and grid_values({"arch": ["a", "b"]}, 2) == {"arch": ["a", "b"]}
    with pytest.raises(InputError, match="8 trials"): grid_values(MIXED, 7)


def test_a_grid_tries_each_point_once():
    study = tune(hill, SPACE, 9, "grid")
    points = {(p["lr"], p["wd"]) for p in tried(study)}
    assert len(points) == len(study.trials) == 9 and len({lr for lr, _ in points}) == 3


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_seed_decides_what_is_tried(sampler):
    one, same, other = (tried(tune(hill, SPACE, 9, sampler, seed=s)) for s in (1, 1, 2))
    assert one == same and one != other


def test_random_draws_cover_each_decade():
    lrs = [p["lr"] for p in tried(tune(hill, SPACE, 150, "random"))]
    shares = np.histogram(np.log10(lrs), bins=3, range=(-4, -1))[0] / 150
    assert (shares > 0.2).all() and len(set(lrs)) == 150


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("stop", [1, 5])
def test_interrupted_and_continued_is_as_if_never_interrupted(tmp_path, sampler, stop):
    calls = []
    def cut(s):
        if len(calls) == stop: raise KeyboardInterrupt
        calls.append(s)
        return hill(s)
    with pytest.raises(KeyboardInterrupt): tune(cut, SPACE, 9, sampler, tmp_path / "a b" / "study.db")
    rest = []
    study = tune(lambda s: rest.append(s) or hill(s), SPACE, 9, sampler, tmp_path / "a b" / "study.db")
    whole = tune(hill, SPACE, 9, sampler)
    assert len(rest) == 9 - stop and tried(study) == tried(whole) and best(study)["value"] == best(whole)["value"]


def test_a_finished_study_tries_nothing_more(tmp_path):
    tune(hill, SPACE, 4, "random", tmp_path / "s.db")
    study = tune(lambda s: 1 / 0, SPACE, 4, "random", tmp_path / "s.db")
    assert len(study.trials) == 4


KILLED = """
import sys, time
sys.path.insert(0, {root!r})
from dlpipe_nb.tuning import tune
def slow(s):
    time.sleep(0.1)
    return s["lr"]
tune(slow, {{"lr": (1e-4, 1e-1, "log")}}, 200, "random", {db!r})
"""


@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL here")
def test_a_killed_search_continues(tmp_path):
    db = tmp_path / "study.db"
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    child = subprocess.Popen([sys.executable, "-W", "ignore", "-c", KILLED.format(root=root, db=str(db))])
    done = 0
    for _ in range(600):
        time.sleep(0.1)
        try: done = sqlite3.connect(db).execute("select count(*) from trials where state = 'COMPLETE'").fetchone()[0]
        except sqlite3.OperationalError: continue
        if done >= 3: break
    child.send_signal(signal.SIGKILL)
    child.wait()
    calls = []
    study = tune(lambda s: calls.append(s) or s["lr"], {"lr": (1e-4, 1e-1, "log")}, done + 5, "random", db)
    assert best(study)["trials"] == done + 5 and 3 <= len(calls) <= 5


def test_a_study_of_something_else_is_refused_and_left_as_it_was(tmp_path):
    db = tmp_path / "study.db"
    tune(hill, SPACE, 3, "random", db, about={"data": "one"})
    for change in ({"space": {"lr": (1e-4, 1e-1, "log")}}, {"sampler": "tpe"}, {"about": {"data": "two"}}):
        given = {"space": SPACE, "sampler": "random", "about": {"data": "one"}} | change
        with pytest.raises(InputError, match="another name"): tune(hill, trials=5, storage=db, **given)
    assert len(tune(hill, SPACE, 3, "random", db, about={"data": "one"}).trials) == 3
    assert len(tune(lambda s: s["lr"], {"lr": (1e-4, 1e-1, "log")}, 2, "random", db, name="another").trials) == 2


def test_a_file_that_is_no_database(tmp_path):
    (tmp_path / "notes.db").write_text("this is no database, only a text that is long enough to look at" * 20)
    with pytest.raises(InputError, match="study's database"): tune(hill, SPACE, 3, storage=tmp_path / "notes.db")
    assert "no database" in (tmp_path / "notes.db").read_text()


def test_bad_samplers_and_budgets(tmp_path):
    with pytest.raises(InputError, match="random, grid, tpe"): tune(hill, SPACE, sampler="genetic", storage=tmp_path / "s.db")
    with pytest.raises(InputError, match="at least one trial"): tune(hill, SPACE, trials=0)
    assert not (tmp_path / "s.db").exists()


def test_hopeless_trials_count_and_are_told():
    study = tune(lambda s: math.nan if s["lr"] > 1e-2 else hill(s), SPACE, 12, "random")
    df = trials_table(study)
    assert set(df["state"]) == {"complete", "pruned"} and (df.loc[df["state"] == "pruned", "lr"] > 1e-2).all()
    assert best(study)["trials"] == 12 and df["value"].max() == best(study)["value"]
    assert (np.diff(best_so_far(study)) >= 0).all() and best_so_far(study)[-1] == best(study)["value"]
    with pytest.raises(InputError, match="none"): best(tune(lambda s: math.inf, SPACE, 2))


def test_an_objectives_error_is_not_swallowed():
    with pytest.raises(ZeroDivisionError): tune(lambda s: 1 / 0, SPACE, 2)


def test_random_and_tpe_beat_the_grid_where_one_setting_matters():
    goods = np.random.default_rng(0).uniform(-3.5, -1.5, 25)
    def average(sampler):
        return np.mean([best(tune(lambda s: math.exp(-((math.log10(s["lr"]) - g) / 0.3) ** 2), SPACE, 25, sampler, seed=i))["value"]
                        for i, g in enumerate(goods)])
    grid, chance, tpe = map(average, ("grid", "random", "tpe"))
    assert grid + 0.02 < chance < tpe + 0.02


def test_optunas_log_is_as_it_was():
    before = optuna.logging.get_verbosity()
    tune(hill, SPACE, 2)
    assert optuna.logging.get_verbosity() == before


def test_the_table_and_the_figure():
    study = tune(lambda s: s["lr"], MIXED, 8, "random")
    df = trials_table(study)
    assert list(df) == ["trial", "lr", "epochs", "arch", "value", "state", "seconds", "steps"] and len(df) == 8 and (df["seconds"] >= 0).all()
    fig = plot_trials(study)
    assert isinstance(fig, Figure) and [ax.get_xlabel() for ax in fig.axes] == ["trial", "lr", "epochs", "arch"]
    assert fig.axes[1].get_xscale() == "log" and fig.axes[2].get_xscale() == "linear"
    fig.canvas.draw()


@pytest.mark.parametrize("n, k, p", [(100, 40, 0.5), (30, 5, 0.9), (270, 8, 0.62), (1, 3, 0.5)])
def test_luck_against_simulation(n, k, p):
    drawn = np.random.default_rng(0).binomial(n, p, (40_000, k)).max(axis=1) / n
    assert luck(n, k, p) == pytest.approx(drawn.mean(), abs=4 * drawn.std() / 200 + 1e-9)


def test_luck_at_its_ends():
    assert luck(50, 1, 0.7) == pytest.approx(0.7) and luck(50, 9, 1.0) == 1 and luck(50, 9, 0.0) == 0
    assert luck(50, 10, 0.7) > luck(500, 10, 0.7) > 0.7
    for bad in ((0, 1, 0.5), (1, 0, 0.5), (1, 1, 1.5)):
        with pytest.raises(InputError): luck(*bad)


# ---- giving up early

def climbing(s, report=lambda v: None):
    for epoch in range(1, 7):
        v = hill(s) * epoch / 6
        report(v)
    return v


@pytest.mark.parametrize("pruner", PRUNERS)
def test_hopeless_trials_are_given_up_and_the_best_is_not(pruner):
    plain, early = (tune(climbing, SPACE, 30, "random", pruner=p) for p in (None, pruner))
    df = trials_table(early)
    cut = df[df["state"] == "pruned"]
    assert best(early)["settings"] == best(plain)["settings"] and len(df) == 30 and 8 <= len(cut) < 30
    assert (cut["steps"] < 6).all() and (df.loc[df["state"] == "complete", "steps"] == 6).all()
    assert standing(early).pruned == len(cut) == cost(early)["pruned"] and best(early)["trials"] == 30
    assert best_so_far(early)[-1] == best(early)["value"], "a value that was reported on the way is no result"


def test_a_pruned_trial_is_never_the_best():
    def falls(s, report):
        report(1.0 if s["lr"] > 1e-2 else 0.5)
        report(math.nan if s["lr"] > 1e-2 else 0.5)
        return 0.5
    study = tune(falls, SPACE, 12, "random", pruner="median")
    assert best(study)["value"] == 0.5 and trials_table(study)["value"].max() == 1.0 and best_so_far(study)[-1] == 0.5


def test_pruning_the_other_way_round():
    study = tune(lambda s, report: [report(s["lr"]) for _ in range(4)] and s["lr"], SPACE, 20, "random", pruner="median", higher=False)
    df = trials_table(study)
    cut, whole = df.loc[df["state"] == "pruned", "lr"], df.loc[df["state"] == "complete", "lr"]
    assert len(cut) > 4 and cut.min() > whole.min() and best(study)["value"] == whole.min() and (np.diff(best_so_far(study)) <= 0).all()
    assert standing(study).best == whole.min() and plot_trials(study) and plot_parallel(study)


def test_bad_pruners(tmp_path):
    with pytest.raises(InputError, match="median, halving"): tune(climbing, SPACE, pruner="genius", storage=tmp_path / "s.db")
    with pytest.raises(InputError, match="report"): tune(hill, SPACE, pruner="median", storage=tmp_path / "s.db")
    assert not (tmp_path / "s.db").exists()
    tune(hill, SPACE, 2, storage=tmp_path / "s.db")
    with pytest.raises(InputError, match="higher is better"): tune(hill, SPACE, 3, storage=tmp_path / "s.db", higher=False)


def test_where_every_trial_fails_there_is_no_best():
    with pytest.raises(InputError, match="none of 3"): best(tune(lambda s: math.nan, SPACE, 3))


# ---- reading a study

def made(*spans, state="COMPLETE", value=1.0):
    "A study of trials from so many seconds to so many."
    study, t0 = tune(hill, SPACE, 1, "random"), datetime(2026, 1, 1)
    new = optuna.create_study(direction="maximize")
    for key, v in study.user_attrs.items(): new.set_user_attr(key, v)
    for i, (a, b) in enumerate(spans):
        t = optuna.trial.create_trial(value=value + i / 100, params=study.trials[0].params, distributions=study.trials[0].distributions)
        t.datetime_start, t.datetime_complete = t0 + timedelta(seconds=a), t0 + timedelta(seconds=b)
        new.add_trial(t)
    return new


def test_what_a_search_cost():
    c = cost(made((0, 10), (5, 12), (100, 104), (6, 7)))
    assert c["seconds"] == 10 + 7 + 4 + 1 and c["elapsed"] == 12 + 4 and c["trials"] == c["complete"] == 4
    assert c["points_gained"] == pytest.approx(1.5) and c["seconds_a_point"] == pytest.approx(22 / 1.5) and c["seconds_saved"] == 0
    slow = tune(lambda s, report: [(time.sleep(0.01), report(hill(s))) for _ in range(6)] and hill(s), SPACE, 16, "random", pruner="median")
    whole = tune(lambda s, report: [(time.sleep(0.01), report(hill(s))) for _ in range(6)] and hill(s), SPACE, 16, "random")
    saved, really = cost(slow)["seconds_saved"], cost(whole)["seconds"] - cost(slow)["seconds"]
    assert saved > 0 and saved == pytest.approx(really, rel=0.6)


def test_importances_find_the_setting_that_matters():
    for seed in range(2):
        shares = importances(tune(lambda s: hill(s) + 1, SPACE, 40, "random", seed=seed))
        assert shares.index[0] == "lr" and shares["importance"].sum() == pytest.approx(1)
        assert shares.loc["lr", "importance"] > shares.loc["lr", "by_chance"] and shares.loc["wd", "importance"] < shares.loc["wd", "by_chance"]


def test_importances_are_modest():
    noise = [importances(tune(lambda s: np.random.default_rng(int(s["lr"] * 1e9)).normal(), SPACE, 30, "random", seed=s), 12) for s in range(5)]
    assert sum((n["importance"] > n["by_chance"]).any() for n in noise) <= 2
    with pytest.warns(UserWarning, match="few"): importances(tune(hill, SPACE, 8, "random"))
    with pytest.raises(InputError, match="four"): importances(tune(hill, SPACE, 3, "random"))
    with pytest.raises(InputError, match="different"): importances(tune(lambda s: 1.0, SPACE, 9, "random"))


def test_parallel_coordinates_lie_where_the_values_are():
    space = MIXED | {"k": [1, 3]}
    study = tune(lambda s: s["epochs"], space, 12, "random")
    ax = plot_parallel(study, "accuracy").axes[0]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["lr", "epochs", "arch", "k", "accuracy"]
    lines = np.array([line.get_ydata() for line in ax.lines if len(line.get_ydata()) == 5])
    lows = trials_table(study).sort_values("value", kind="stable")
    assert lines.shape == (12, 5) and (0 <= lines).all() and (lines <= 1).all()
    np.testing.assert_allclose(lines[:, 0], np.log(lows["lr"] / 1e-4) / np.log(1e3))
    np.testing.assert_allclose(lines[:, 1], (lows["epochs"] - 2) / 8)
    assert set(lines[:, 3]) == {0.25, 0.75} and plot_trials(study)


def test_standing_and_watch_end_with_the_budget(tmp_path):
    study = tune(hill, SPACE, 4, "random", tmp_path / "s.db")
    now = standing(study)
    assert (now.asked, now.finished, now.running, now.failed, now.left) == (4, 4, 0, 0, 0) and repr(now).startswith("4 of 4 trials; best")
    assert list(watch(tmp_path / "s.db")) == [now] and now.settings == best(study)["settings"]
    assert standing(tune(hill, SPACE, 6, "random", tmp_path / "s.db")).asked == 6


def test_the_panel(tmp_path):
    panel = StudyView(tmp_path / "s.db")
    panel.look.click()
    assert "no such file" in panel.line.value and not panel.figure.value
    tune(hill, SPACE, 3, "random", tmp_path / "s.db")
    panel.look.click()
    assert "3 of 3 trials" in panel.line.value and panel.bar.value == panel.bar.max == 3 and panel.figure.value[:4] == b"\x89PNG"
    assert "no such file" not in panel.line.value
    load_study(tmp_path / "s.db").set_user_attr("trials", 4)
    panel.live.value = True
    panel.follow(0.02)
    tune(hill, SPACE, 4, "random", tmp_path / "s.db")
    for _ in range(500):
        if not panel.live.value: break
        time.sleep(0.02)
    assert panel.bar.value == 4 and not panel.live.value, "following ends with the budget"
    panel.stop()


def test_a_study_from_before_there_were_slots_goes_on(tmp_path):
    whole, old = tune(hill, SPACE, 6, "random"), optuna.create_study(storage=f"sqlite:///{tmp_path}/s.db", study_name="study", direction="maximize")
    old.set_user_attr("plan", whole.user_attrs["plan"])
    for t in whole.trials[:4]: old.add_trial(optuna.trial.create_trial(value=t.value, params=t.params, distributions=t.distributions))
    assert tried(tune(hill, SPACE, 6, "random", tmp_path / "s.db")) == tried(whole)


# ---- with real training

def striped_run(folder, each=36) -> Run:
    "A run with a split manifest: a cat has upright stripes, a dog has level ones."
    rows, wave = [], np.sin(np.arange(48) / 2) * 60 + 128
    (folder / "pictures").mkdir()
    for label in ("cat", "dog"):
        for i in range(each):
            path = folder / "pictures" / f"{label} {i}.png"
            a = np.random.default_rng([i, label == "dog"]).normal(0, 20, (48, 48, 3)) + wave[:, None]
            Image.fromarray(np.clip(a.swapaxes(0, 1) if label == "cat" else a, 0, 255).astype(np.uint8)).save(path)
            part = "train" if i < each * 2 // 3 else "valid" if i < each * 5 // 6 else "test"
            rows.append((str(path), label, part, sha256_of(path), 48, 48, "drawn"))
    run = Run(folder / "run")
    run.save_manifest(pd.DataFrame(rows, columns="path label split sha256 width height source".split()))
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = striped_run(tmp_path_factory.mktemp("striped"))
    define_into(run)
    return run


SMALL = dict(pictures=16, epochs=1, size=32, sampler="random")


def test_tune_into_continues_and_writes_the_best(run):
    first = len(tune_into(run, trials=1, **SMALL).trials)
    study = tune_into(run, trials=2, **SMALL)
    said = run.read_json("tuning.json")
    assert first == 1 and len(study.trials) == 2 and (run / "study.db").exists()
    assert said["settings"] == best(study)["settings"] and set(said["settings"]) == {"lr", "wd"} and said["trials"] == 2
    assert 0 <= said["value"] <= 1 and said["about"]["pictures"] == 16 and (run / "figures" / "tuning.png").exists()


def test_tune_into_refuses_what_training_has_no_setting_for_and_other_data(run):
    tune_into(run, trials=1, **SMALL)
    before = (run / "tuning.json").read_bytes()
    with pytest.raises(InputError, match="depth"): tune_into(run, space={"depth": (1, 5)}, **SMALL)
    with pytest.raises(InputError, match="another name"): tune_into(run, trials=1, **{**SMALL, "pictures": 14})
    df = run.manifest()
    run.save_manifest(df.drop(index=df.index[df["split"] == "train"][0]))
    with pytest.raises(InputError, match="another name"): tune_into(run, trials=1, **SMALL)
    run.save_manifest(df)
    assert (run / "tuning.json").read_bytes() == before


def test_tuning_never_opens_a_test_picture(run, tmp_path):
    other = striped_run(tmp_path)
    define_into(other)
    df = other.manifest()
    for path in df.path[df.split == "test"]: open(path, "wb").close()
    assert len(tune_into(other, trials=1, **SMALL).trials) == 1


@pytest.mark.parametrize("metric", ["recall of dog", "expected cost"])
def test_the_problems_metric_is_honoured(tmp_path, metric):
    run = striped_run(tmp_path)
    define_into(run, metric=metric, target=.9 if "recall" in metric else .2, costs={"dog": {"cat": 10}})
    study = tune_into(run, trials=2, **SMALL)
    said, values = run.read_json("tuning.json"), trials_table(study)["value"]
    assert said["metric"] == metric and said["value"] == (values.max() if "recall" in metric else values.min())
    assert study.direction.name == ("MAXIMIZE" if "recall" in metric else "MINIMIZE")
    define_into(run, metric=metric, target=.9 if "recall" in metric else .2, costs={"dog": {"cat": 20}})
    if metric == "expected cost":
        with pytest.raises(InputError, match="another name"): tune_into(run, trials=2, **SMALL)


def test_the_objective_reports_its_metric_after_each_epoch(run):
    problem, seen = Problem("?", ("cat", "dog"), metric="recall of dog"), []
    value = objective_on(run.manifest(), pictures=16, epochs=3, size=32, problem=problem)({"lr": 1e-3, "wd": 0.1}, seen.append)
    assert len(seen) == 3 and seen[-1] == value and all(v * 6 == pytest.approx(round(v * 6)) for v in seen), "six dogs validate"
    plain = objective_on(run.manifest(), ("cat", "dog"), 16, 1, 32)({"lr": 1e-3, "wd": 0.1})
    assert plain * 12 == pytest.approx(round(plain * 12))


def test_the_objective_does_not_augment_since_its_trainings_are_short(run):
    objective = objective_on(run.manifest(), ("cat", "dog"), 16, 1, 32)
    objective({"lr": 1e-3, "wd": 0.1})
    assert [type(t).__name__ for t in objective.dls.train.after_batch.fs] == ["IntToFloatTensor", "Normalize"]


def test_a_training_that_diverges_is_hopeless_and_what_was_there_stays(run):
    from dlpipe_nb import training  # noqa: F401 (fastai's own additions to the defaults come with it)
    from fastai.learner import defaults
    before = list(defaults.callbacks)
    assert math.isnan(objective_on(run.manifest(), pictures=16, epochs=2, size=32)({"lr": 1e30}))
    assert defaults.callbacks == before
    tune_into(run, trials=2, **SMALL)
    kept = (run / "tuning.json").read_bytes()
    with pytest.raises(InputError, match="none of 2"):
        tune_into(run, trials=2, **SMALL, space={"lr": (1e29, 1e30, "log")}, name="wild")
    assert (run / "tuning.json").read_bytes() == kept and standing(load_study(run / "study.db", "wild")).pruned == 2


def test_real_trainings_by_two_workers(run):
    one, two = (tune_into(run, trials=3, **SMALL, name=n, pruner=None, workers=w) for n, w in (("one", 1), ("two", 2)))
    assert sorted(t.params["lr"] for t in one.trials) == sorted(t.params["lr"] for t in two.trials if t.state.name == "COMPLETE")
    assert len({t.user_attrs["owner"][1] for t in _tried(two)}) == 2


def test_training_takes_what_was_tuned(run, tmp_path):
    from dlpipe_nb.training import train_into
    with pytest.raises(InputError, match="tuning.json"): tuned(Run(tmp_path))
    study = tune_into(run, trials=2, **SMALL)
    settings = tuned(run)
    learn = train_into(run, size=32, epochs=1, **settings)
    assert learn.record["lr"] == settings["lr"] and learn.record["wd"] == best(study)["settings"]["wd"]
    assert run.read_json("tuning.json")["bs"] == 4 and learn.dls.train.bs == 4 and settings == best(study)["settings"]
    run.write_json("tuning.json", run.read_json("tuning.json") | {"bs": 2})
    assert tuned(run)["lr"] == 2 * settings["lr"] and tuned(run)["wd"] == settings["wd"]


# ---- exercises

def test_the_answers_are_right():
    assert check("07.1", (3, 81)).passed and check("07.3", 59).passed
    assert check("07.2", lambda low, high, u: low * (high / low) ** u).passed
    assert check("07.2", lambda low, high, u: math.exp(math.log(low) + u * math.log(high / low))).passed
    assert check("07.1", None).passed is None and check("07.2", lambda low, high, u: None).passed is None


def there(history, others): return [o[len(history) - 1] for o in others if len(o) >= len(history)]


def median_rule(history, others): return bool(there(history, others)) and history[-1] < np.median(there(history, others))


def test_the_median_rule():
    assert check("07.4", median_rule).passed and check("07.4", lambda history, others: None).passed is None


def test_wrong_answers_are_told_apart():
    said = {1: [check("07.1", a).message for a in ((81, 3), (81, 81), (9, 81), (3, 27), (20, 81), 3, (5, 81))],
            2: [check("07.2", f).message for f in (
                lambda low, high, u: low + u * (high - low), lambda low, high, u: high * (low / high) ** u,
                lambda low, high, u: math.log10(low) + u * math.log10(high / low), lambda low, high, u: 10 ** (-4 + 3 * u),
                lambda low, high, u: low * (high / low) ** u ** 2, lambda low, high, u: [low, high])],
            3: [check("07.3", n).message for n in (58, 58.4, 20, 95, 60, 10, "many")],
            4: [check("07.4", f).message for f in (
                lambda h, o: h[-1] < np.median([x[len(h) - 1] for x in o]), lambda h, o: bool(there(h, o)) and not median_rule(h, o),
                lambda h, o: bool(there(h, o)) and h[-1] < np.median([x[-1] for x in o]), lambda h, o: False, lambda h, o: True,
                lambda h, o: bool(there(h, o)) and h[-1] <= np.median(there(h, o)),
                lambda h, o: bool(there(h, o)) and h[-1] < np.mean(there(h, o)),
                lambda h, o: median_rule([max(h)] * len(h), o))]}
    for n, messages in said.items():
        assert "right" not in messages and len(set(messages)) == len(messages), (n, messages)
