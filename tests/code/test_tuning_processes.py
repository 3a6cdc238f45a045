"""Chapter 07, many processes: killed at any moment, two at once, a worker that dies, a PostgreSQL server, a database that is gone.

The kills come at random moments; `-k killed` selects them, to be run again and again.
"""
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from pathlib import Path

import optuna
import pytest
import sqlalchemy
from postgres import PASSWORD, free_port, postgres_server  # noqa: F401 (a fixture)

from dlpipe_nb.core import InputError
from dlpipe_nb.tuning import (_beating, _bury, _claim, _slot, best, cost, load_study, standing, trials_table, tune, watch)

ROOT = Path(__file__).resolve().parents[2]
SPACE = {"lr": (1e-4, 1e-1, "log"), "wd": (0.0, 0.3)}
posix = pytest.mark.skipif(os.name == "nt", reason="no SIGKILL here")
def value(s): return s["lr"] - s["wd"]


class Searching:
    "A process of its own that searches: a copy of this one, so that it starts at once and can be killed at any moment."
    def __init__(self, db, trials=20, nap=0.05, sampler="random"):
        self.log = Path(tempfile.mkstemp(prefix="tried-")[1])
        self.process = multiprocessing.get_context("fork").Process(target=self.search, args=(db, trials, nap, sampler))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning) # a fork with threads, from 3.12 on; ours do nothing then
            self.process.start()

    def search(self, db, trials, nap, sampler):
        os.environ["TQDM_DISABLE"] = "1"
        tune(lambda s: self.tries(s) or time.sleep(nap) or value(s), SPACE, trials, sampler, db)

    def tries(self, s):
        with open(self.log, "a") as f: f.write(f"{s['lr']}\n")

    def tried(self): return self.log.read_text().splitlines()

    def wait_for(self, trials):
        for _ in range(3000):
            if len(self.tried()) >= trials or not self.process.is_alive(): return self
            time.sleep(0.01)

    def kill(self):
        self.process.kill()
        self.process.join()

    def end(self):
        self.process.join(60)
        self.log.unlink()
        return self.process.exitcode


def states(db): return Counter(t.state.name for t in load_study(db).trials)


def assert_whole(study, trials, sampler="random"):
    "Exactly so many finished trials, a slot each, none running, and the settings of a search that nobody killed."
    done = [t for t in study.trials if t.state.name in ("COMPLETE", "PRUNED")]
    assert len(done) == trials and sorted(map(_slot, done)) == list(range(trials))
    assert not any(t.state.name in ("RUNNING", "WAITING") for t in study.trials)
    if sampler != "tpe":
        whole = tune(value, SPACE, trials, sampler)
        assert sorted(t.params["lr"] for t in done) == sorted(t.params["lr"] for t in whole.trials)


# ---- killed

@posix
@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_killed_again_and_again_at_random_moments(tmp_path, sampler):
    db, seed = tmp_path / "study.db", random.randrange(10**6)
    rng, longest = random.Random(seed), 0.3
    for _ in range(10): # some of the kills come while the database is made
        one = Searching(db, 20, 0.01, sampler)
        time.sleep(rng.uniform(0, longest))
        one.kill()
    began = time.monotonic()
    study = tune(value, SPACE, 20, sampler, db)
    assert time.monotonic() - began < 60, "the dead were found by their silence only"
    assert_whole(study, 20, sampler), seed
    assert standing(load_study(db)).finished == 20 and sqlalchemy_check(db) == "ok", seed


def sqlalchemy_check(db):
    with sqlalchemy.create_engine(f"sqlite:///{db}").connect() as con: return con.exec_driver_sql("pragma integrity_check").scalar()


@posix
@pytest.mark.parametrize("where", ["_claim", "_one_trial", "_suggested"])
def test_killed_between_two_steps(tmp_path, where):
    db = tmp_path / "study.db"
    code = (f"import sys, os, signal; sys.path.insert(0, {str(ROOT)!r}); import dlpipe_nb.tuning as t; old, n = t.{where}, [0]\n"
            "def new(*a):\n    n[0] += 1\n    out = old(*a)\n    if n[0] > 2: os.kill(os.getpid(), signal.SIGKILL)\n    return out\n"
            f"t.{where} = new\nt.tune(lambda s: s['lr'] - s['wd'], {SPACE!r}, 6, 'random', {str(db)!r})")
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", code]).returncode == -signal.SIGKILL
    assert states(db)["RUNNING"] == (where != "_one_trial")
    assert_whole(tune(value, SPACE, 6, "random", db), 6)


@posix
def test_a_living_process_is_left_alone_and_its_trial_counts(tmp_path):
    db = tmp_path / "study.db"
    other = Searching(db, 3, 0.7).wait_for(1)
    study = tune(value, SPACE, 3, "random", db)
    assert len(other.tried()) == 1 and other.end() == 0
    assert_whole(study, 3)
    assert states(db)["FAIL"] == 0


def test_a_trial_of_another_machine_is_given_up_when_its_sign_of_life_stands_still(tmp_path):
    study = tune(value, SPACE, 1, "random", tmp_path / "study.db")
    trial = _claim(study, 3)
    trial.set_user_attr("owner", ["another machine", 1, 1, ""])
    beats = {}
    _bury(study, beats)
    assert states(tmp_path / "study.db")["RUNNING"] == 1
    trial.set_user_attr("beat", 7)
    _bury(study, beats, patience=0)
    assert states(tmp_path / "study.db")["RUNNING"] == 1, "it gave a new sign of life"
    time.sleep(0.01)
    _bury(study, beats, patience=0)
    assert states(tmp_path / "study.db") == {"COMPLETE": 1, "FAIL": 1}


def test_a_trial_that_was_given_up_wrongly_is_not_counted_twice(tmp_path):
    db, calls = tmp_path / "study.db", []
    def sleeps(s): # meanwhile another process thinks that we are dead, and makes the trial itself
        calls.append(s)
        if len(calls) == 2: load_study(db).tell(1, state=optuna.trial.TrialState.FAIL)
        return value(s)
    assert_whole(tune(sleeps, SPACE, 4, "random", db), 4)
    assert len(calls) == 5 and states(db)["FAIL"] == 1


def test_signs_of_life_are_given_while_a_trial_runs(tmp_path):
    study = tune(value, SPACE, 1, "random", tmp_path / "study.db")
    trial = _claim(study, 2)
    with _beating(every=0.02) as (_, at_work):
        at_work.append(trial)
        for _ in range(200):
            if load_study(tmp_path / "study.db").trials[1].user_attrs["beat"] > 1: break
            time.sleep(0.02)
        else: pytest.fail("no sign of life")


# ---- together

@posix
def test_two_processes_share_a_budget(tmp_path):
    db = tmp_path / "study.db"
    alone = tune(lambda s: time.sleep(0.2) or value(s), SPACE, 14, "random", tmp_path / "alone.db")
    pair = [Searching(db, 14, 0.2), Searching(db, 14, 0.2)]
    for p in pair: p.process.join(60)
    tried = [p.tried() for p in pair]
    study = load_study(db)
    assert_whole(study, 14)
    assert sum(map(len, tried)) == 14 == len(set(sum(tried, []))) and min(map(len, tried)) >= 3
    assert cost(study)["elapsed"] < 0.75 * cost(alone)["elapsed"], (cost(study), cost(alone))


def test_many_threads_reach_for_few_slots(tmp_path):
    study = tune(value, SPACE, 1, "random", tmp_path / "study.db")
    got, ready = [], threading.Barrier(6)
    def reach():
        mine = load_study_to_write(tmp_path / "study.db")
        ready.wait()
        for _ in range(3):
            if trial := _claim(mine, 5): got.append(_slot(mine.trials[trial.number]))
    threads = [threading.Thread(target=reach) for _ in range(6)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert sorted(got) == sorted(set(got)) and set(got) <= {1, 2, 3, 4}
    late = [t for t in study.trials if "late" in t.user_attrs]
    assert all(t.state.name == "FAIL" for t in late) and len(trials_table(study)) == len(study.trials) - len(late)


def load_study_to_write(db):
    from dlpipe_nb.tuning import _database
    return optuna.load_study(study_name="study", storage=_database(db), sampler=tune(value, SPACE, 1, "random").sampler)


def test_workers_search_together(tmp_path):
    study = tune(lambda s: time.sleep(0.1) or value(s), SPACE, 12, "random", tmp_path / "a b.db", workers=2)
    assert_whole(study, 12)
    assert len({t.user_attrs["owner"][1] for t in study.trials}) == 2 and os.getpid() not in {t.user_attrs["owner"][1] for t in study.trials}
    assert tune(lambda s: 1 / 0, SPACE, 12, "random", tmp_path / "a b.db", workers=2).best_value == study.best_value


def test_a_workers_failure_is_raised_here_and_stops_the_others(tmp_path):
    def fails(s):
        if s["lr"] > 0.01: raise InputError("a small learning rate", "a large one", "take another")
        return value(s)
    with pytest.raises(InputError, match="a large one"): tune(fails, SPACE, 30, "random", tmp_path / "s.db", workers=2)
    assert states(tmp_path / "s.db")["RUNNING"] == 0 and states(tmp_path / "s.db")["FAIL"] >= 1


@posix
def test_a_killed_worker_is_made_up_for(tmp_path):
    def dies_once(s):
        if not (tmp_path / "died").exists():
            (tmp_path / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return time.sleep(0.05) or value(s)
    assert_whole(tune(dies_once, SPACE, 8, "random", tmp_path / "s.db", workers=2), 8)
    with pytest.raises(InputError, match="code -9"):
        tune(lambda s: os.kill(os.getpid(), signal.SIGKILL), SPACE, 4, "random", tmp_path / "t.db", workers=2)
    assert_whole(tune(value, SPACE, 4, "random", tmp_path / "t.db"), 4)


@posix
def test_workers_end_with_their_killed_parent(tmp_path):
    db = tmp_path / "s.db"
    code = (f"import sys, time; sys.path.insert(0, {str(ROOT)!r}); from dlpipe_nb.tuning import tune\n"
            f"tune(lambda s: time.sleep(0.5) or s['lr'] - s['wd'], {SPACE!r}, 500, 'random', {str(db)!r}, workers=2)")
    parent = subprocess.Popen([sys.executable, "-W", "ignore", "-c", code], env={**os.environ, "TQDM_DISABLE": "1"})
    while not db.exists() or len(started := {t.user_attrs["owner"][1] for t in safe_trials(db)}) < 2: time.sleep(0.1)
    parent.kill()
    parent.wait()
    for _ in range(100):
        if not any(Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().split(")")[1] for pid in started): break
        time.sleep(0.1)
    else: pytest.fail("a worker outlived its parent")


def safe_trials(db):
    try: return load_study(db).trials
    except InputError: return []


def test_workers_need_a_study_that_can_be_shared():
    with pytest.raises(InputError, match="in memory"): tune(value, SPACE, 4, workers=2)
    with pytest.raises(InputError, match="worker"): tune(value, SPACE, 4, workers=0)


# ---- watched

@posix
def test_a_study_is_watched_from_another_process(tmp_path):
    db = tmp_path / "study.db"
    other = Searching(db, 6, 0.2).wait_for(1)
    seen = list(watch(db, every=0.05, timeout=60))
    assert other.end() == 0
    assert seen[-1].finished == seen[-1].asked == 6 and len({s.finished for s in seen}) > 3 and any(s.running for s in seen)
    assert seen[-1].best == best(load_study(db))["value"] and seen[-1].running == 0


# ---- a server

def test_postgresql(postgres_server):
    url = postgres_server.new_database()
    study = tune(value, SPACE, 4, "random", url)
    calls = []
    study = tune(lambda s: calls.append(s) or value(s), SPACE, 7, "random", url.replace("postgresql:", "postgres:"))
    assert len(calls) == 3
    assert_whole(study, 7)
    assert tune(lambda s: 1 / 0, SPACE, 7, "random", url.replace("postgresql:", "postgresql+psycopg:")).best_value == study.best_value
    with pytest.raises(InputError) as e: tune(value, {"lr": (0.0, 1.0)}, 7, "random", url)
    assert "another name" in str(e.value) and PASSWORD not in str(e.value) and "%20" not in str(e.value)


@posix
def test_two_processes_on_a_fresh_postgresql_one_of_them_killed(postgres_server):
    url = postgres_server.new_database()
    pair = [Searching(url, 14, 0.05), Searching(url, 14, 0.05)]
    pair[0].wait_for(2).kill()
    assert pair[1].end() == 0
    assert_whole(load_study(url), 14)


@posix
def test_killed_on_postgresql_at_random_moments(postgres_server):
    url, seed = postgres_server.new_database(), random.randrange(10**6)
    rng = random.Random(seed)
    for _ in range(5):
        one = Searching(url, 10, 0.01)
        time.sleep(rng.uniform(0, 0.3))
        one.kill()
    assert_whole(tune(value, SPACE, 10, "random", url), 10), seed


def test_workers_on_postgresql(postgres_server):
    assert_whole(tune(lambda s: time.sleep(0.05) or value(s), SPACE, 10, "grid", postgres_server.new_database(), workers=2), 9, "grid")


def test_a_server_that_is_stopped_during_a_search(postgres_server):
    url, calls = postgres_server.new_database(), []
    def stops(s):
        calls.append(s)
        if len(calls) == 3: postgres_server.stop()
        return value(s)
    with pytest.raises(InputError, match="database") as e: tune(stops, SPACE, 6, "random", url)
    assert PASSWORD not in str(e.value) and len(calls) == 3
    postgres_server.start()
    assert_whole(tune(value, SPACE, 6, "random", url), 6)


def test_a_wrong_password_and_no_such_database(postgres_server):
    for url in (postgres_server.url(password="not the secret"), postgres_server.url("nowhere")):
        with pytest.raises(InputError, match="database") as e: tune(value, SPACE, 2, storage=url)
        assert "secret" not in str(e.value) and PASSWORD not in str(e.value)


# ---- databases that can't be used

@pytest.mark.parametrize("url", ["postgresql+psycopg://me:s3cret@127.0.0.1:{port}/db", "postgresql://127.0.0.1:{port}/db?user=me&password=s3cret",
                                 "postgresql://me:s3cret@host:notaport/db", "nosuchkind://me:s3cret@host/db", "://s3cret"])
def test_a_database_that_cannot_be_reached(url):
    pytest.importorskip("psycopg")
    began = time.monotonic()
    for go in (lambda u: tune(value, SPACE, 2, storage=u), load_study):
        with pytest.raises(InputError) as e: go(url.format(port=free_port()))
        chain, error = [], e.value
        while error is not None: chain, error = [*chain, str(error)], None if error.__suppress_context__ else error.__context__
        assert "s3cret" not in " ".join(chain) and "database" in str(e.value)
    assert time.monotonic() - began < 15


def test_a_host_that_never_answers():
    import socket
    pytest.importorskip("psycopg")
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(1)
        began = time.monotonic()
        with pytest.raises(InputError, match="database"):
            tune(value, SPACE, 2, storage=f"postgresql://me:s3cret@127.0.0.1:{deaf.getsockname()[1]}/db")
        assert time.monotonic() - began < 20


def test_a_file_that_may_not_be_written(tmp_path):
    db = tmp_path / "study.db"
    tune(value, SPACE, 2, "random", db)
    before = db.read_bytes()
    with pytest.raises(InputError, match="readonly"): tune(value, SPACE, 4, "random", f"sqlite:///file:{db}?mode=ro&uri=true")
    assert db.read_bytes() == before and standing(load_study(db)).finished == 2
    (tmp_path / "a file").touch()
    with pytest.raises(InputError, match="database"): tune(value, SPACE, 2, storage=tmp_path / "a file" / "study.db")
    with pytest.raises(InputError, match="no such file"): load_study(tmp_path / "absent.db")
    assert not (tmp_path / "absent.db").exists()
    with pytest.raises(InputError, match="named other"): load_study(db, "other")


def test_odd_file_names(tmp_path):
    for name in ("100% möglich?.db", "a#b&c.db"):
        assert_whole(tune(value, SPACE, 2, "random", tmp_path / name), 2)
        assert (tmp_path / name).exists() and standing(load_study(tmp_path / name)).finished == 2
