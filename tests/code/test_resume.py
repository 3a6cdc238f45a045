"""Training that is killed goes on: SIGKILL at random moments, checkpoints that are broken or belong to another training.

    for i in $(seq 10); do pytest -q tests/code/test_resume.py -k sigkill || break; done

runs the kills ten times, at other moments each time. DLPIPE_KILL_SEED=7 repeats one.
"""
from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from conftest import ROOT
from dlpipe_nb.collection import draw_pets
from dlpipe_nb.core import InputError, Run, read_json
from dlpipe_nb.preprocessing import make_dls, split
from dlpipe_nb.problem import define_into
from dlpipe_nb.training import KeepBest, last_checkpoint, train, train_into

SETTINGS = dict(arch="small4", pretrained=False, epochs=4, precision="fp32", device="cpu")
#: A process that imports everything once and then, for each folder it is told, trains in a child of its own (which can be killed).
SCRIPT = """
import json, os, sys, time, traceback
sys.path.insert(0, {root!r})
import torch
torch.set_num_threads(1)
import pandas as pd
from safetensors.torch import save_file
from dlpipe_nb.preprocessing import make_dls
from dlpipe_nb.training import train

def slow():
    time.sleep(0.01)
    return False

def work(folder):
    dls = make_dls(pd.read_csv({manifest!r}), 32, 16, device="cpu")
    learn = train(dls, checkpoint=folder, stop=slow, **{settings})
    save_file({{k: v.contiguous() for k, v in learn.model.state_dict().items()}}, folder + "/result.safetensors")
    with open(folder + "/record.json", "w") as f: json.dump(learn.record, f)

for line in sys.stdin:
    pid = os.fork()
    if pid:
        print(pid, flush=True)
        print(os.waitpid(pid, 0)[1], flush=True)
        continue
    try: work(line.strip())
    except BaseException: traceback.print_exc(); os._exit(1)
    os._exit(0)
"""


class PowerCut(Exception): "Ends a training as rudely as an exception can."


def power_cut(batches):
    "A question that is answered with a `PowerCut` after so many batches."
    left = iter(range(batches))
    def ask():
        if next(left, None) is None: raise PowerCut("in the middle of it")
        return False
    return ask


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    "A run with a problem and 160 drawn pets, split; not trained on yet."
    run = Run(tmp_path_factory.mktemp("resume") / "run")
    define_into(run)
    run.save_manifest(split(draw_pets(run.path.parent / "pets", n=160, seed=1), valid=0.3, test=0.1))
    return run


@pytest.fixture(scope="module")
def manifest(drawn): return drawn.manifest().groupby(["split", "label"]).head(24)


def loaders(manifest, **settings): return make_dls(manifest, 32, 16, device="cpu", **settings)


@pytest.fixture(scope="module")
def straight(manifest): return train(loaders(manifest), **SETTINGS)


def same(a, b): return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


class Trainer:
    "The script at work: `begin` starts a training in a process, which `kill` ends at once and `end` lets end."
    def __init__(self, manifest, path):
        manifest.to_csv(path, index=False)
        code = SCRIPT.format(root=str(ROOT), manifest=str(path), settings=SETTINGS)
        self.process = subprocess.Popen([sys.executable, "-W", "ignore", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=open(path.with_suffix(".log"), "w"), text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        self.log = path.with_suffix(".log")

    def begin(self, folder):
        self.process.stdin.write(f"{folder}\n")
        self.process.stdin.flush()
        self.pid = int(self.process.stdout.readline() or pytest.fail(self.log.read_text()))

    def kill(self):
        "Whether it was still at work."
        with contextlib.suppress(ProcessLookupError): os.kill(self.pid, signal.SIGKILL)
        return int(self.process.stdout.readline()) == signal.SIGKILL

    def end(self, folder):
        from safetensors.torch import load_file
        assert int(self.process.stdout.readline()) == 0, self.log.read_text()
        return read_json(folder / "record.json"), load_file(folder / "result.safetensors")


@pytest.fixture(scope="module")
def trainer(manifest, tmp_path_factory):
    "A trainer, the folder, record and parameters of an undisturbed training, and the seconds it took."
    path = tmp_path_factory.mktemp("killed")
    t = Trainer(manifest, path / "manifest.csv")
    try:
        t.begin(path / "alone")
        began = time.monotonic()
        result = t.end(path / "alone")
        yield t, path, result, time.monotonic() - began
    finally:
        t.process.stdin.close()
        t.process.wait(20)


@pytest.fixture
def dice():
    seed = int(os.environ.get("DLPIPE_KILL_SEED") or time.time_ns() % 10**6)
    print("DLPIPE_KILL_SEED =", seed)     # shown when the test fails
    return random.Random(seed)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has neither fork nor SIGKILL")
@pytest.mark.timeout(180)
def test_sigkill_at_random_moments_ends_where_an_undisturbed_training_does(trainer, dice):
    t, path, (alone, parameters), seconds = trainer
    folder, kills = path / f"killed {time.time_ns()}", 0
    for _ in range(5):
        t.begin(folder)
        time.sleep(dice.uniform(0, 0.8 * seconds))
        kills += t.kill()
    t.begin(folder)
    record, result = t.end(folder)
    print(kills, "kills, continued after epochs", record["continued"])
    assert kills and record["history"] == alone["history"]
    for name, v in parameters.items(): assert torch.equal(result[name], v), name
    assert record["continued"] == sorted(record["continued"])
    if record["continued"]: assert f"continued after epoch {record['continued'][-1]} of 4" in record["start"]
    assert not list(folder.glob(".writing-*"))


# ---- the same without processes: quick, and at moments that are chosen

@pytest.mark.parametrize("batches", [1, 17, 19, 40])
def test_a_power_cut_in_any_epoch_changes_nothing(tmp_path, manifest, straight, batches):
    folder, per_epoch = tmp_path / "c", len(loaders(manifest).train)
    with pytest.raises(PowerCut): train(loaders(manifest), checkpoint=folder, stop=power_cut(batches % (4 * per_epoch)), **SETTINGS)
    again = train(loaders(manifest), checkpoint=folder, **SETTINGS)
    done = batches % (4 * per_epoch) // per_epoch
    assert same(again.model, straight.model) and again.record["history"] == straight.record["history"]
    assert again.record["continued"] == ([done] if done else [])
    assert (f"continued after epoch {done} of 4" in again.record["start"]) == bool(done)


def test_cut_twice_it_says_both_and_still_ends_the_same(tmp_path, manifest, straight):
    folder, n = tmp_path / "c", len(loaders(manifest).train)
    for batches in (n + 1, n + 2):
        with pytest.raises(PowerCut): train(loaders(manifest), checkpoint=folder, stop=power_cut(batches), **SETTINGS)
    again = train(loaders(manifest), checkpoint=folder, **SETTINGS)
    assert again.record["continued"] == [1, 2] and same(again.model, straight.model)


def test_a_finished_training_is_only_read(tmp_path, manifest, straight):
    train(loaders(manifest), checkpoint=tmp_path / "c", **SETTINGS)
    again = train(loaders(manifest), checkpoint=tmp_path / "c", stop=power_cut(0), **SETTINGS)
    assert same(again.model, straight.model) and again.record["continued"] == [4]
    assert sorted(p.name for p in (tmp_path / "c").iterdir())[-2:] == ["epoch-0003", "epoch-0004"]


def test_both_phases_of_a_new_head_are_continued(tmp_path, drawn, straight):
    "The frozen phase is over with checkpoint 0; cut after it, the training goes on with the body."
    df = drawn.manifest()
    df = df.assign(label=np.where(df["facing"] == "left", "left", "right")).groupby(["split", "label"]).head(20)
    start, settings = straight, dict(epochs=2, precision="fp32", device="cpu")
    alone = train(loaders(df), start=start, **settings)
    n = len(loaders(df).train)
    for batches in (2, n + 2):
        folder = tmp_path / f"cut {batches}"
        with pytest.raises(PowerCut): train(loaders(df), start=start, checkpoint=folder, stop=power_cut(batches), **settings)
        assert last_checkpoint(folder)["done"] == batches // n
        again = train(loaders(df), start=start, checkpoint=folder, **settings)
        assert same(again.model, alone.model) and again.record["history"] == alone.record["history"]
        assert [h["epoch"] for h in again.record["history"]] == [0, 1, 2]


@pytest.mark.parametrize("other", [dict(epochs=5), dict(lr=1e-3), dict(wd=0.2), dict(seed=2), dict(arch="small8"), "pictures", "size"])
def test_a_checkpoint_of_another_training_is_refused_and_left(tmp_path, manifest, other):
    folder = tmp_path / "c"
    train(loaders(manifest), checkpoint=folder, **SETTINGS | {"epochs": 1})
    dls, settings = loaders(manifest), SETTINGS | {"epochs": 1}
    if other == "pictures": dls = loaders(manifest.groupby(["split", "label"]).head(23))
    elif other == "size": dls = make_dls(manifest, 48, 16, device="cpu")
    else: settings |= other
    name = {"pictures": "data"}.get(other, other) if isinstance(other, str) else next(iter(other))
    with pytest.raises(InputError, match=f"{name} .* instead of .*begin anew"): train(dls, checkpoint=folder, **settings)
    assert last_checkpoint(folder)["done"] == 1


@pytest.mark.parametrize("damage", ["cut", "altered", "lost", "no JSON", "emptied"])
def test_a_broken_checkpoint_is_named_and_the_older_one_takes_over(tmp_path, manifest, straight, damage):
    folder, n = tmp_path / "c", len(loaders(manifest).train)
    with pytest.raises(PowerCut): train(loaders(manifest), checkpoint=folder, stop=power_cut(3 * n), **SETTINGS)
    newest = folder / "epoch-0003"
    file = newest / ("state.json" if damage == "no JSON" else "state.safetensors")
    data = file.read_bytes()
    if damage == "lost": file.unlink()
    else: file.write_bytes({"cut": data[:100], "altered": data[:-1] + bytes([data[-1] ^ 1]), "no JSON": data[:50], "emptied": b""}[damage])
    with pytest.raises(InputError, match="epoch-0003.*broken.*continues from epoch-0002"):
        train(loaders(manifest), checkpoint=folder, **SETTINGS)
    shutil.rmtree(newest)
    again = train(loaders(manifest), checkpoint=folder, **SETTINGS)
    assert again.record["continued"] == [2] and same(again.model, straight.model)


def test_the_best_of_the_older_checkpoint_stays_too(tmp_path, manifest, monkeypatch):
    "Epoch 1 was the best until epoch 3 came: who must go back to epoch 2 needs it."
    monkeypatch.setattr(KeepBest, "_better", lambda self, row: row["epoch"] in (1, 3))
    folder, n = tmp_path / "c", len(loaders(manifest).train)
    def there(): return [int(p.name[6:]) for p in sorted(folder.iterdir())]
    with pytest.raises(PowerCut): train(loaders(manifest), checkpoint=folder, stop=power_cut(3 * n), **SETTINGS)
    assert there() == [1, 2, 3]
    shutil.rmtree(folder / "epoch-0003")
    assert last_checkpoint(folder)["best"] == 1
    with pytest.raises(PowerCut): train(loaders(manifest), checkpoint=folder, stop=power_cut(n), **SETTINGS)
    assert there() == [1, 2, 3]
    train(loaders(manifest), checkpoint=folder, **SETTINGS)
    assert there() == [3, 4]


def test_a_checkpoint_holds_no_pickle_and_only_what_is_needed(tmp_path, manifest):
    train(loaders(manifest), checkpoint=tmp_path / "c", **SETTINGS)
    folders = sorted((tmp_path / "c").iterdir())
    assert 2 <= len(folders) <= 3     # the last two, and the best
    for folder in folders:
        assert sorted(p.name for p in folder.iterdir()) == ["model.safetensors", "state.json", "state.safetensors"]
        json.loads((folder / "state.json").read_text())


def test_the_best_epoch_is_still_known_after_a_power_cut(tmp_path, manifest, straight):
    "Stopped after being continued, a training keeps an epoch that was finished before the cut, if that was the best."
    folder, n = tmp_path / "c", len(loaders(manifest).train)
    with pytest.raises(PowerCut): train(loaders(manifest), checkpoint=folder, stop=power_cut(3 * n + 1), **SETTINGS)
    learn = train(loaders(manifest), checkpoint=folder, stop=lambda: True, **SETTINGS)
    losses = [h["valid_loss"] for h in straight.record["history"][:3]]
    assert learn.record["stopped"] == {"after": 3, "kept": 1 + int(np.argmin(losses)), "why": "as asked"}
    assert learn.record["history"] == straight.record["history"][:3]


def test_train_into_goes_on_in_its_run_and_clears_up(drawn, monkeypatch):
    from dlpipe_nb import training
    run = drawn
    settings = dict(size=32, bs=16, arch="small4", pretrained=False, epochs=3, precision="fp32", device="cpu")
    carry_out = training._carry_out
    monkeypatch.setattr(training, "_carry_out", lambda *a: carry_out(*a[:5], power_cut(len(a[0].dls.train) + 1), a[6]))
    with pytest.raises(PowerCut): train_into(run, **settings)
    assert (run / "checkpoint" / "epoch-0001").exists() and not run.has("learner")
    monkeypatch.undo()
    learn = train_into(run, **settings)
    assert learn.record["continued"] == [1] and run.has("learner") and not (run / "checkpoint").exists()
