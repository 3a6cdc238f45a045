"""The whole circle, for three seeds: night falls, it is noticed, sixty labels make a challenger that passes the gate and is better at
night on pictures never learned from; a challenger from wrong labels is refused; one line goes back. Its accuracies are printed (-s).
"""
from __future__ import annotations

from pathlib import Path

import pytest

from dlpipe_nb.collection import collect_into, draw_pets
from dlpipe_nb.core import Run
from dlpipe_nb.inference import Predictor, Store, classify
from dlpipe_nb.retraining import Registry, give_label, go_round, retrain, review_queue

OTHER = {"cat": "dog", "dog": "cat"}


def see(store, pictures, bundle):
    classify([(Path(p).name, p) for p in pictures["path"]], Predictor(bundle), store)
    for p in pictures.itertuples(): store.keep(p.sha256, Path(p.path).read_bytes())


def accuracy(bundle, pictures):
    "The share of pictures that a bundle names rightly."
    said = Predictor(bundle).predict_many(list(pictures["path"]))
    return sum(p.label == label for p, label in zip(said, pictures["label"])) / len(pictures)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_night_falls_and_the_circle_turns(seed, tmp_path, capsys):
    run = Run(tmp_path / "runs" / "first")
    collect_into(run.ensure("problem"), n=1300, seed=seed, data_dir=tmp_path)
    run.ensure("clean").make("learner", size=64, epochs=14, seed=seed, pretrained=False)
    run.ensure("bundle")
    night = lambda name, n: draw_pets(tmp_path / name, n=n, seed=1000 * seed + n, knobs={"night": 1.0})
    arrived, fresh, trusted = night("arrived", 180), night("fresh", 240), night("trusted", 120)
    registry = Registry(tmp_path / "registry")
    registry.promote(registry.add(run / "bundle", {"note": "the first"}, learner=run / "learner"))
    before = accuracy(registry.bundle(), fresh)

    store, truth = Store(tmp_path / "store.db", images=tmp_path / "images"), dict(zip(arrived["sha256"], arrived["label"]))
    see(store, arrived, registry.bundle())
    for sha in review_queue(store, n=60, by="anna", bundle=registry.bundle())["sha256"]: give_label(store, sha, truth[sha], by="anna")
    turn = go_round(run, store, registry, epochs=5, seed=seed, say=lambda line: None)
    assert turn.report.alarm and "brightness" in turn.report.drifted, "night fell, and nobody noticed"
    assert turn.round and turn.round.version == registry.champion == "v0002", turn.sentence
    after = accuracy(registry.bundle(), fresh)
    learned = set(turn.round.run.manifest().query("source == 'feedback'")["sha256"])
    assert learned <= set(truth) and not learned & set(fresh["sha256"]), "the measure was learned from"

    spoiled = Store(tmp_path / "spoiled.db", images=tmp_path / "images")
    rest = arrived[~arrived["sha256"].isin(learned)]
    see(spoiled, rest, registry.bundle())
    for p in rest.itertuples(): give_label(spoiled, p.sha256, OTHER[p.label], by="script")
    refused = retrain(turn.round.run, spoiled, registry, epochs=5, seed=seed, recent=trusted)
    wrong = accuracy(refused.run / "bundle", fresh)
    with capsys.disabled():
        g = turn.round.gate
        print(f"\n  seed {seed}: at night {before:.3f} → {after:.3f}; sealed test {g.champion:.3f} → {g.challenger:.3f}; from wrong labels {wrong:.3f}, {'promoted' if refused.version else 'refused'}")
    assert after >= before + 0.02, f"sixty labels won nothing back: {before:.3f} → {after:.3f}"
    assert refused.version is None and registry.champion == "v0002", refused.gate.sentence
    assert registry.roll_back() == "v0001" and accuracy(registry.bundle(), fresh) == before
