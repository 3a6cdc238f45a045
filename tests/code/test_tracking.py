"""A run that is logged to MLflow can be read back from there: settings, curves, results, figures, bundle."""
from __future__ import annotations

import sys

import pytest
from command import dlpipe, refused
from conftest import picture, write_tiny_bundle

from dlpipe_nb import pipeline
from dlpipe_nb.core import InputError, Run, read_json
from dlpipe_nb.pipeline import Settings, track_run

mlflow = pytest.importorskip("mlflow", reason="MLflow isn't installed: pip install 'dlpipe_nb[track]'")


@pytest.fixture(autouse=True)
def no_server(monkeypatch, tmp_path):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path) # MLflow keeps the files of a database of one's own in ./mlruns


@pytest.fixture
def run(tmp_path) -> Run:
    "What a finished run leaves, as far as a tracker looks at it; nothing was trained."
    run = Run(tmp_path / "runs" / "first")
    write_tiny_bundle(run / "bundle")
    settings = dict(pipeline.asdict(Settings(epochs=2, data="my pets")))
    run.write_json("run.json", {"settings": settings, "phases": {"training": {"said": "", "seconds": 12.5}}, "versions": {"torch": "9.9"}})
    run.write_json("problem.json", {"labels": ["cat", "dog"], "metric": "accuracy", "target": 0.9})
    run.write_json("evaluation.json", {"accuracy": 0.8})
    run.write_json("test.json", {"result": "pass", "sentence": "19 of 20 right", "accuracy": 0.95, "low": 0.76, "high": 0.99})
    run.write_json("seal.json", {"sha256": "5" * 64})
    run.write_json("learner/learner.json", {"lr": 0.01, "size": 64, "history": [
        {"epoch": 1, "train_loss": 0.7, "accuracy": 0.6}, {"epoch": 2, "train_loss": 0.4, "accuracy": 0.8}]})
    (run / "figures").mkdir()
    (run / "figures" / "worst.png").write_bytes(picture())
    (run / "settings.toml").write_text("seed = 1\n")
    return run


def logged(run):
    noted = run.read_json("tracked.json")
    client = mlflow.MlflowClient(noted["url"])
    return client, client.get_run(noted["id"])


def test_what_was_logged_is_read_back(run):
    said = track_run(run)
    client, got = logged(run)
    assert got.info.run_id in said and got.info.status == "FINISHED" and got.info.run_name == "first"
    assert got.data.params["epochs"] == "2" and got.data.params["data"] == "my pets" and got.data.params["lr"] == "0.01"
    assert got.data.metrics["test_accuracy"] == 0.95 and got.data.metrics["seconds_training"] == 12.5
    curve = [(m.step, m.value) for m in client.get_metric_history(got.info.run_id, "train_loss")]
    assert sorted(curve) == [(1, 0.7), (2, 0.4)]
    assert got.data.tags["verdict"] == "19 of 20 right" and got.data.tags["version torch"] == "9.9" and got.data.tags["seal"] == "5" * 64
    home = client.download_artifacts(got.info.run_id, "bundle")
    assert read_json(f"{home}/model.json") == read_json(run / "bundle" / "model.json")
    assert [f.path for f in client.list_artifacts(got.info.run_id, "figures")] == ["figures/worst.png"]
    assert (run.path.parent / "mlflow.db").exists() and not (run.path / "mlflow.db").exists()


def test_a_run_is_logged_once_in_each_place(run, tmp_path):
    track_run(run)
    assert "tracked before" in track_run(run)
    client, got = logged(run)
    assert len(client.search_runs([got.info.experiment_id])) == 1
    assert "tracked as" in track_run(run, f"mlflow:sqlite:///{(tmp_path / 'other.db').as_posix()}")


def test_a_log_that_breaks_off_is_marked_and_can_be_done_again(run, monkeypatch):
    whole = pipeline._log
    def half(run, client, tracked): raise OSError("the disk is full")
    monkeypatch.setattr(pipeline, "_log", half)
    with pytest.raises(OSError): track_run(run)
    assert not (run / "tracked.json").exists()
    monkeypatch.setattr(pipeline, "_log", whole)
    track_run(run)
    client, got = logged(run)
    assert sorted(r.info.status for r in client.search_runs([got.info.experiment_id])) == ["FAILED", "FINISHED"]


def test_what_cannot_be_tracked_is_refused(run, tmp_path):
    with pytest.raises(InputError, match="mlflow, or mlflow:URL"): track_run(run, "wandb")
    with pytest.raises(InputError, match="no bundle in"): track_run(tmp_path / "nothing")
    said = refused(dlpipe("run", "--out", tmp_path / "new", "--track", "mlflow:http://127.0.0.1:9"))
    assert "127.0.0.1:9" in said and not (tmp_path / "new").exists(), "before anything is drawn"


def test_without_mlflow_it_says_which_extra(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(InputError, match=r"dlpipe_nb\[track\]"): track_run(run)
