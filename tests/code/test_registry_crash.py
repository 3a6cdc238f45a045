"""SIGKILL at random moments of retrain, promote and roll back: there is always a champion that loads, and a reader in
another process never sees a half-written one. Real processes, a real kill, a real (if tiny) training.

One process imports the workshop once and forks a child for every job: a child is what is killed.
"""
from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, write_tiny_bundle

from dlpipe_nb.core import InputError, Run, read_json
from dlpipe_nb.inference import Predictor, Store, classify
from dlpipe_nb.retraining import Registry, retrain

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork: on this system no process is killed in this test")
KILLS = 20          # of promote and roll back
ROUNDS_KILLED = 10  # of retrain, which takes longer

#: Waits for jobs on its input, a line each, and forks a child for it, whose number is printed. `end` waits for the last one.
WORKSHOP = """
import os, sys, warnings
warnings.simplefilter("ignore")
import random
from dlpipe_nb.core import Run
from dlpipe_nb.inference import Predictor, Store
from dlpipe_nb.retraining import Registry, retrain

import dlpipe_nb.retraining as module
judge = module.gate
module.gate = lambda *them, **more: judge(*them, **more, at_least=10)  # the run is tiny, and what is killed should also promote

def swing(path, seed):
    r, dice = Registry(path), random.Random(seed)
    while True:
        for name in dice.sample(r.names(), 2): r.promote(name)
        r.roll_back()

def read(path):
    r = Registry(path)
    while True: Predictor(r.bundle()).version, len(r.versions())

def round_(run, store, registry):
    retrain(Run(run), Store(store, images="images"), Registry(registry), epochs=1, margin=1.0, at_least=4)

print("ready", flush=True)
for line in sys.stdin:
    if line.startswith("end"): print(os.waitstatus_to_exitcode(os.waitpid(int(line.split()[1]), 0)[1]), flush=True)
    else:
        pid = os.fork()
        if not pid:
            try: eval(line)
            except BaseException as e:
                print(type(e).__name__, e, file=sys.stderr, flush=True)
                os._exit(1)
            os._exit(0)
        print(pid, flush=True)
"""


class Workshop:
    "The process that forks; `begin` gives a child's number, `end` its exit status (-9: killed)."
    def __init__(self, home):
        env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "MPLBACKEND": "agg"}
        self.log = home / "workshop.log"
        self.process = subprocess.Popen([sys.executable, "-c", WORKSHOP], cwd=home, env=env, stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, stderr=open(self.log, "w"), text=True)
        assert self.process.stdout.readline() == "ready\n", self.log.read_text()

    def _ask(self, line):
        print(line, file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline())

    def begin(self, job, *args): return self._ask(f"{job}({', '.join(map(repr, map(str, args)))})")
    def end(self, pid): return self._ask(f"end {pid}")

    def kill(self, pid):
        os.kill(pid, signal.SIGKILL)
        assert self.end(pid) == -signal.SIGKILL, f"it had ended by itself:\n{self.log.read_text()[-1500:]}"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "A run on 120 tiny drawn pets, trained for an epoch, a registry with three versions, and a store with eight labelled pictures."
    from dlpipe_nb.collection import collect_into, draw_pets
    home = tmp_path_factory.mktemp("kills")
    run = Run(home / "runs" / "first")
    collect_into(run.ensure("problem"), n=120, seed=3, data_dir=home)
    run.ensure("clean").make("learner", size=32, epochs=1, pretrained=False)
    run.ensure("bundle")
    registry = Registry(home / "registry")
    registry.promote(registry.add(run / "bundle", {"note": "the first"}, learner=run / "learner"))
    store, new = Store(home / "store.db", images=home / "images"), draw_pets(home / "new", n=8, seed=4, size=48)
    classify([(p, p) for p in new["path"]], Predictor(run / "bundle"), store)
    ids = store.predictions().set_index("sha256")["id"]
    for p in new.itertuples():
        store.keep(p.sha256, open(p.path, "rb").read())
        store.add_feedback(int(ids[p.sha256]), p.label, by="anna")
    return home


@pytest.fixture(scope="module")
def workshop(home):
    made = Workshop(home)
    yield made
    made.process.kill()
    made.process.wait(10)


def files_in(home):
    "The files of the runs and the registry: what a round writes, also for a moment."
    return {os.path.join(d, f) for part in ("runs", "registry") for d, _, files in os.walk(home / part) for f in files}


def champion_of(registry):
    "The champion's version, once its bundle has loaded and nothing half-made passes for a version."
    assert registry.versions()["note"].astype(str).str.contains("missing|changed|readable").sum() == 0
    return Predictor(registry.bundle()).version


def killed_after(workshop, seconds, job, *args):
    "Begin a job and kill it after so long; a job that ended by itself before that is fine."
    pid = workshop.begin(job, *args)
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)  # until it is waited for, the number belongs to it
    return workshop.end(pid)


def test_promote_and_roll_back_killed_at_random_moments(workshop, tmp_path):
    registry = Registry(tmp_path / "registry")
    for i in range(3): registry.add(write_tiny_bundle(tmp_path / f"b{i}", threshold=0.6 + i / 10), {"note": str(i)})
    registry.promote("v0001")
    reader = workshop.begin("read", registry.path)
    dice = random.Random(1)
    for i in range(KILLS):
        assert killed_after(workshop, 0.01 + dice.random() * 0.08, "swing", registry.path, i) == -signal.SIGKILL
        assert champion_of(registry)
    assert len(registry.history()) > KILLS, "the killed ones have hardly done anything"
    workshop.kill(reader)  # it read all the while; had it seen anything half-written, it would have ended
    registry.promote("v0002"), registry.promote("v0003")
    assert registry.roll_back() == "v0002"
    assert not [p.name for p in registry.path.iterdir() if p.name.startswith((".new-", ".writing-"))]


@pytest.mark.timeout(600)
def test_retrain_killed_at_random_moments(home, workshop):
    run, registry, dice = Run(home / "runs" / "first"), Registry(home / "registry"), random.Random(2)
    reader, done = workshop.begin("read", registry.path), 0
    for _ in range(ROUNDS_KILLED):
        before, more = files_in(home), dice.randint(1, 4)
        pid, end = workshop.begin("round_", run.path, home / "store.db", registry.path), time.monotonic() + 30
        while len(files_in(home) - before) < more and time.monotonic() < end: time.sleep(0.004)
        time.sleep(dice.random() * 0.15)
        os.kill(pid, signal.SIGKILL)
        done += workshop.end(pid) == 0
        assert champion_of(registry)
    folders = sorted(p for p in (home / "runs").iterdir() if p.name.startswith("first-"))
    assert folders and sum("done" not in read_json(f / "round.json") for f in folders if (f / "round.json").exists()) <= 1
    last = workshop.begin("round_", run.path, home / "store.db", registry.path)
    assert workshop.end(last) == 0, workshop.log.read_text()[-1500:]
    workshop.kill(reader)
    assert int(registry.champion[1:]) >= 2 + done and champion_of(registry)
    child = Run(registry.path / registry.lineage(registry.champion)["run"])
    assert "done" in child.read_json("round.json") and child.has("bundle")
    assert len(run.read_json("seal.json")["opened"]) >= 3 and not (child / "checkpoint").exists()
    assert not [p.name for p in registry.path.iterdir() if p.name.startswith((".new-", ".writing-"))]


@pytest.mark.timeout(120)
def test_of_two_retrainings_one_is_told_and_a_killed_one_leaves_no_lock(home, workshop):
    run, registry = Run(home / "runs" / "first"), Registry(home / "registry")
    before, first = registry.champion, workshop.begin("round_", run.path, home / "store.db", registry.path)
    lock, end = registry.path / ".retraining.lock", time.monotonic() + 20
    while time.monotonic() < end and _free(lock): time.sleep(0.02)
    store = Store(home / "store.db", images=home / "images")
    with pytest.raises(InputError, match="under way"): retrain(run, store, registry, at_least=4)
    os.kill(first, signal.SIGKILL)
    assert workshop.end(first) == -signal.SIGKILL and _free(lock) and registry.champion == before


def _free(path):
    import fcntl
    with open(path, "a+b") as f:
        try: fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError: return False
    return True
