"""The drift table's bars on a small scale: quiet weeks are quiet, and each knob turned fully is noticed. `benchmarks/drift.py` is the large one.

The reference is made of pictures drawn for it, the weeks are drawn from others; none of them was seen by the training.
"""
from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from dlpipe_nb.collection import draw_pets
from dlpipe_nb.export import reference_of
from dlpipe_nb.inference import Predictor, pack
from dlpipe_nb.monitoring import drift

WEEKS, PICTURES = 60, 80


@pytest.fixture(scope="module")
def world(small_run, tmp_path_factory):
    "A predictor's reference, and pools of predictions: ordinary pictures and those of each knob."
    predictor, folder = Predictor(small_run / "bundle"), tmp_path_factory.mktemp("world")
    assert predictor.info["embedding"]["numbers"] > 0
    def drawn(n, seed, **knobs): return list(draw_pets(folder / str(seed), n=n, seed=seed, knobs=knobs)["path"])
    def pool(paths):
        return pd.DataFrame([{**p.statistics, "label": p.label, "unsure": p.unsure, "probability": p.probability, "embedding": pack(p.embedding)}
                             for p in predictor.predict_many(paths)])
    pools = {"nothing": pool(drawn(320, 901))} | {k: pool(drawn(100, 902 + i, **{k: 1.0})) for i, k in enumerate(("night", "camera", "breed", "fox"))}
    return reference_of(predictor, drawn(240, 900)), pools


def alarms(world, knob, **without):
    dice, (reference, pools) = np.random.default_rng(7), world
    weeks = [pools[knob].sample(PICTURES, random_state=int(dice.integers(2**31))) for _ in range(WEEKS)]
    return [drift({k: v for k, v in reference.items() if k not in without}, week) for week in weeks]


def test_quiet_weeks_are_quiet(world):
    cries = sum(t["drifted"].any() for t in alarms(world, "nothing"))
    print(f"{cries} false alarms in {WEEKS} weeks")
    assert cries <= 0.05 * WEEKS


@pytest.mark.parametrize("knob", ["night", "camera", "breed", "fox"])
def test_each_knob_turned_fully_is_noticed(world, knob):
    noticed = np.mean([t["drifted"].any() for t in alarms(world, knob)])
    print(f"{knob}: noticed in {noticed:.0%} of {WEEKS} weeks of {PICTURES} pictures")
    assert noticed >= 0.95


def test_foxes_are_noticed_by_what_the_network_sees(world):
    tables = [t.set_index("measure")["drifted"] for t in alarms(world, "fox")]
    assert np.mean([t["embedding"] for t in tables]) >= 0.95
