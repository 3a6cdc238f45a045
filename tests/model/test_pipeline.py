"""The whole road: every phase leaves its result, a killed run goes on where it was, and a run can be repeated."""
from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, picture
from PIL import Image

from dlpipe_nb.core import InputError, Run, content_hash
from dlpipe_nb.inference import Predictor, Store
from dlpipe_nb.pipeline import PHASES, Settings, compare_runs, read_settings, road, run_pipeline

NAMES = [name for name, _, _ in PHASES]         # all of them
ROAD = [name for name, _, _ in road(Settings())] # those that are done unless asked otherwise
COMMAND = [sys.executable, "-c", "from dlpipe_nb.pipeline import main; main()", "run"]
ENV = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}


def test_every_phase_says_a_line_and_leaves_its_result(small_run):
    assert [line.split()[0] for line in small_run.lines] == ROAD
    assert all(" s  " in line for line in small_run.lines)
    assert all((small_run / proof).exists() for _, _, proof in road(Settings()))
    figures = {p.stem for p in (small_run / "figures").glob("*.png")}
    assert figures >= {"contact_sheet", "training", "confusion", "worst", "predictions", "test_confusion"}
    assert not list(small_run.path.glob(".writing-*")), "temporary files were left"


def test_the_verdict_is_what_the_predictions_say(small_run):
    test, held = small_run.read_json("test.json"), small_run.manifest("test_predictions.csv")
    assert test["total"] == len(held) == 48 and test["right"] == int((held.predicted == held.label).sum())
    assert test["result"] in ("pass", "fail", "too few pictures to say") and f"{test['right']} of 48" in test["sentence"]
    assert set(test["baselines"]) == {"majority", "hand"} and test["baselines"]["majority"] == 0.5
    assert small_run.read_json("seal.json")["opened"][0]["model"] == test["model"]


def test_new_pictures_are_in_the_store(small_run):
    store = Store(small_run / "store.db")
    said = store.predictions()
    store.close()
    assert len(said) == 12 and said.error.isna().all() and set(said.label) <= {"cat", "dog"}
    assert set(said.model) == {Predictor(small_run / "bundle").version}
    assert not set(said.sha256) & set(small_run.manifest().sha256), "a picture of the training run isn't new"


def test_the_record_says_how_it_was_trained(small_run):
    record = small_run.read_json("learner/learner.json")
    assert record["arch"] == "small" and record["pretrained"] is False and "from scratch" in record["start"]
    assert record["pictures"] == 156 and len(record["history"]) == 2 and record["hardware"]


def test_a_finished_run_is_not_done_again(small_run):
    lines = []
    run_pipeline("drawn", small_run.path, lines.append, n=240, epochs=2, size=64, pretrained=False)
    assert len(lines) == len(ROAD) and all("done before" in line for line in lines)


def test_other_settings_are_refused_and_change_nothing(small_run):
    def files(): # but not those that SQLite makes and removes as others open and close the store
        return {p: p.stat().st_mtime_ns for p in small_run.path.rglob("*") if p.is_file() and not p.name.endswith(("-wal", "-shm"))}
    gc.collect() # a store that is closed only now, since nobody did, is written to
    before = files()
    with pytest.raises(InputError, match="epochs=2.*epochs=3"):
        run_pipeline("drawn", small_run.path, n=240, epochs=3, size=64, pretrained=False)
    assert files() == before


def own_pictures(folder: Path, n=30) -> Path:
    "Two classes of bright and dark noise under awkward names, with things among them that are no good."
    rng = np.random.default_rng(0)
    for k, name in enumerate(("день", "night time")):
        (folder / name).mkdir(parents=True)
        for i in range(n):
            a = rng.integers(120 * (1 - k), 255 - 120 * k, (48, 40, 3), dtype=np.uint8)
            Image.fromarray(a).save(folder / name / f"it's “{i}”.{'png' if i % 2 else 'webp'}", lossless=True)
        (folder / name / "cut.png").write_bytes(picture(size=(300, 200))[:120])
    (folder / "night time" / "notes.txt").write_text("not a picture")
    return folder


def test_killed_at_any_moment_it_goes_on_where_it_was(tmp_path):
    "SIGKILL after every line that the command prints, a little later each time, until it gets through."
    data, out = own_pictures(tmp_path / "own pictures"), tmp_path / "runs" / "mine"
    args = [*COMMAND, "--data", data, "--out", out, "--epochs", "1", "--size", "32", "--pretrained", "no", "--arch", "small"]
    done, kills, told = [], 0, []
    for attempt in range(len(ROAD) + 3):
        p = subprocess.Popen([str(a) for a in args], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, encoding="utf-8", env=ENV)
        told = []
        for line in p.stdout:
            told.append(line)
            fresh = [x.split()[0] for x in told if x.split() and x.split()[0] in ROAD and "done before" not in x]
            if len(fresh) >= 2 and fresh[-1] != ROAD[-1]:
                time.sleep(0.3 * attempt % 1)
                p.send_signal(signal.SIGKILL)
                kills += 1
                break
        p.stdout.close()
        if p.wait() == 0: break
        assert p.returncode == -signal.SIGKILL, told
        before = [x.split()[0] for x in told if "done before" in x]
        # A phase may end between the last line that was read and the kill, so more may be done than was told; never much less.
        assert before == ROAD[: len(before)] and len(before) >= len(done) - 1, (before, done)
        done = before + fresh
    assert p.returncode == 0 and kills >= 3, told
    run = Run(out)
    assert run.read_json("problem.json")["labels"] == ["night time", "день"]
    assert len(run.manifest()) == 60 and len(run.manifest("faults.csv")) == 2 and len(run.manifest("skipped.csv")) == 1
    assert Store(out / "store.db").n == len(Store(out / "store.db").predictions().drop_duplicates(["sha256", "model"])) == 12


def test_the_same_seed_gives_the_same_data_and_split(tmp_path, small_run):
    run = Run(tmp_path / "again")
    run.ensure("problem").make("manifest", n=240)
    run.make("clean")
    ours, theirs = run.manifest(), small_run.manifest()
    assert content_hash(ours) == content_hash(theirs) and run.read_json("seal.json")["sha256"] == small_run.read_json("seal.json")["sha256"]
    pd.testing.assert_series_equal(ours.split, theirs.split)


def test_any_chapter_can_be_started_from(tmp_path):
    run = Run(tmp_path / "late")
    run.ensure("problem").make("manifest", n=80)
    run.ensure("clean").make("learner", epochs=1, size=32, pretrained=False)
    assert run.ensure("bundle") is run and Predictor(run / "bundle").labels == ("cat", "dog")


def test_the_settings_are_written_as_used(small_run):
    assert read_settings(small_run / "settings.toml") == Settings(n=240, epochs=2, size=64, pretrained=False)
    text = (small_run / "settings.toml").read_text("utf-8")
    assert '"small" was used' in text and f"{small_run.read_json('learner/learner.json')['lr']:.4g} was used" in text
    assert {"python", "torch", "fastai"} <= set(small_run.read_json("run.json")["versions"])


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    "The same run twice; the second from the settings that the first wrote."
    home = tmp_path_factory.mktemp("twins")
    asked = Settings(seed=3, n=100, epochs=1, size=32, pretrained=False, precision="fp32", report=False)
    run_pipeline(out=home / "a", settings=asked)
    return home / "a", run_pipeline(out=home / "b", settings=home / "a" / "settings.toml").run.path


def test_two_runs_with_one_seed_are_the_same_to_the_last_digit(twins):
    a, b = map(Run, twins)
    for name in ("manifest.csv", "test_predictions.csv", "valid_predictions.csv"):
        pd.testing.assert_frame_equal(pd.read_csv(a / name), pd.read_csv(b / name))
    assert a.read_json("seal.json")["sha256"] == b.read_json("seal.json")["sha256"]
    assert (a / "learner" / "model.safetensors").read_bytes() == (b / "learner" / "model.safetensors").read_bytes()
    both = compare_runs(a, b)
    assert both.same and both.apart == 0 and "the same answers" in repr(both) and len(both.settings) == len(both.pictures) == 0


def test_two_runs_with_other_settings_are_told_apart(twins, small_run):
    said = compare_runs(twins[0], small_run.path)
    assert not said.same and not said.same_seal and said.answers is None and "different sealed pictures" in repr(said)
    asked = said.settings.set_index("what")
    assert asked.loc["epochs"].tolist() == [1, 2] and asked.loc["n"].tolist() == [100, 240] and "data" not in asked.index
    assert set(said.pictures["change"]) == {"added", "removed"} and (said.pictures["change"] == "removed").sum() == 100
