"Chapter 07: the search in its three ways, stopping and continuing, what luck does, and the exercises' checks."
import math
import os
import signal
import sqlite3
import subprocess
import sys
import time

import numpy as np
import optuna
import pandas as pd
import pytest
from matplotlib.figure import Figure
from PIL import Image

from dlpipe_nb.core import InputError, Run, check, sha256_of
from dlpipe_nb.problem import define_into
from dlpipe_nb.tuning import (SAMPLERS, best, best_so_far, distributions, grid_values, luck, plot_trials, trials_table, tune,
                              tune_into)

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
    assert list(df) == ["trial", "lr", "epochs", "arch", "value", "state", "seconds"] and len(df) == 8 and (df["seconds"] >= 0).all()
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
    before = (run / "tuning.json").read_bytes() if (run / "tuning.json").exists() else None
    with pytest.raises(InputError, match="depth"): tune_into(run, space={"depth": (1, 5)}, **SMALL)
    with pytest.raises(InputError, match="another name"): tune_into(run, trials=1, **{**SMALL, "pictures": 14})
    df = run.manifest()
    run.save_manifest(df.drop(index=df.index[df["split"] == "train"][0]))
    with pytest.raises(InputError, match="another name"): tune_into(run, trials=1, **SMALL)
    run.save_manifest(df)
    assert ((run / "tuning.json").read_bytes() if before else None) == before


def test_tuning_never_opens_a_test_picture(run, tmp_path):
    other = striped_run(tmp_path)
    define_into(other)
    df = other.manifest()
    for path in df.path[df.split == "test"]: open(path, "wb").close()
    assert len(tune_into(other, trials=1, **SMALL).trials) == 1


# ---- exercises

def test_the_answers_are_right():
    assert check("07.1", (3, 81)).passed and check("07.3", 59).passed
    assert check("07.2", lambda low, high, u: low * (high / low) ** u).passed
    assert check("07.2", lambda low, high, u: math.exp(math.log(low) + u * math.log(high / low))).passed
    assert check("07.1", None).passed is None and check("07.2", lambda low, high, u: None).passed is None


def test_wrong_answers_are_told_apart():
    said = {1: [check("07.1", a).message for a in ((81, 3), (81, 81), (9, 81), (3, 27), (20, 81), 3, (5, 81))],
            2: [check("07.2", f).message for f in (
                lambda low, high, u: low + u * (high - low), lambda low, high, u: high * (low / high) ** u,
                lambda low, high, u: math.log10(low) + u * math.log10(high / low), lambda low, high, u: 10 ** (-4 + 3 * u),
                lambda low, high, u: low * (high / low) ** u ** 2, lambda low, high, u: [low, high])],
            3: [check("07.3", n).message for n in (58, 58.4, 20, 95, 60, 10, "many")]}
    for n, messages in said.items():
        assert "right" not in messages and len(set(messages)) == len(messages), (n, messages)
