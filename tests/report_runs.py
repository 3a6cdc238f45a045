"Tested runs of small pictures by a network that nobody trained: what the tests of the report have in common."
from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pandas as pd
from PIL import Image

from dlpipe_nb.core import Run, seal, sha256_of
from dlpipe_nb.evaluation import confusion, evaluate
from dlpipe_nb.problem import Problem, define_into
from dlpipe_nb.testing import judge

#: Labels that would do harm if they were taken for code.
EVIL = ("<b>cat</b>", 'dog & "co"', "$fox$")


def predicted(rows: pd.DataFrame, labels, skill, rng) -> pd.DataFrame:
    "Predictions of a made-up network: the larger `skill`, the more often the true label is the likeliest."
    scores = rng.normal(0, 1, (len(rows), len(labels))) + skill * (rows["label"].to_numpy()[:, None] == np.array(labels))
    p = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    out = rows[["path", "label"]].assign(predicted=np.array(labels)[p.argmax(1)], probability=p.max(1))
    return out.assign(correct=out["label"] == out["predicted"], **{f"p_{l}": p[:, i] for i, l in enumerate(labels)})


def counted(run: Run, opened=1):
    "Write test.json for the test_predictions.csv that is there, as `test_into` does after asking a network."
    problem, preds = Problem.load(run), run.manifest("test_predictions.csv")
    table = confusion(preds, problem.labels)
    said = judge(table, problem)
    run.write_json("test.json", {**asdict(said), "sentence": said.sentence, "opened": opened, "model": "a" * 64, "labels": problem.labels,
                                 "baselines": {"majority": 0.5, "hand": 0.6}, "confusion": table.values.tolist()})


def made(folder, labels=("cat", "dog"), n=120, skill=2.5, names="picture", factors=False, **problem) -> Run:
    "A tested run of `n` small pictures by a network that nobody trained."
    run, rng = Run(folder), np.random.default_rng(7)
    define_into(run, labels=labels, **problem)
    (run / "pictures").mkdir(parents=True)
    rows = []
    for i in range(n):
        path = run / "pictures" / f"{names} {i}.png"
        Image.fromarray(rng.integers(0, 255, (20, 16 + i % 9, 3), np.uint8)).save(path)
        rows.append({"path": path.as_posix(), "label": labels[i % len(labels)], "split": ("train", "test", "valid", "test")[i // len(labels) % 4],
                     "sha256": sha256_of(path), "width": 16 + i % 9, "height": 20, "source": "made up"})
    df = pd.DataFrame(rows)
    if factors: df = df.assign(coat=np.where(np.arange(n) % 3, "red", "blue"))
    run.save_manifest(df)
    test = df[df["split"] == "test"]
    run.write_json("seal.json", {**seal(test), "opened": [{"model": "a" * 64, "at": "2026-01-02T03:04:05+00:00"}]})
    history = [{"train_loss": 0.7 / k, "valid_loss": 0.75 / k, "accuracy": 1 - 0.5 / k} for k in range(1, 6)]
    run.write_json("learner/learner.json", {"arch": "small", "labels": labels, "size": 32, "epochs": 5, "lr": 0.008, "seconds": 10.0,
                                            "pictures": 30, "history": history, "sha256": "a" * 64, "bill": {"price": 0.25, "unit": "euros"}})
    run.save_manifest(predicted(df[df["split"] == "valid"], labels, skill, rng), "valid_predictions.csv")
    run.save_manifest(predicted(test, labels, skill, rng), "test_predictions.csv")
    run.write_json("evaluation.json", asdict(evaluate(run.manifest("valid_predictions.csv"), labels)))
    counted(run)
    return run
