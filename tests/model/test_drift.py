"""The drift table's bars on a small scale: quiet weeks are quiet, and each knob turned fully is noticed. `benchmarks/drift.py` is the large one.

Every week has a reference of its own out of pictures drawn for this, so that one unlucky reference doesn't decide; the training saw none of them.
"""
from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binomtest

from dlpipe_nb.collection import draw_pets
from dlpipe_nb.export import reference_of
from dlpipe_nb.inference import Predictor, pack
from dlpipe_nb.monitoring import MEASURES, drift

WEEKS, PICTURES, REFERENCE = 60, 80, 240


class Answered:
    "In the place of a predictor where the pictures were predicted already: `reference_of` asks once more."
    def __init__(self, labels): self.labels = labels
    def predict_many(self, said): return said


@pytest.fixture(scope="module")
def world(small_run, tmp_path_factory):
    "The labels, and pools of predictions: ordinary pictures and those of each knob."
    predictor, folder = Predictor(small_run / "bundle"), tmp_path_factory.mktemp("world")
    assert predictor.info["embedding"]["numbers"] > 0
    def pool(n, seed, **knobs): return predictor.predict_many(list(draw_pets(folder / str(seed), n=n, seed=seed, knobs=knobs)["path"]))
    knobs = ("night", "camera", "breed", "fox")
    return predictor.labels, {"nothing": pool(560, 901)} | {k: pool(100, 902 + i, **{k: 1.0}) for i, k in enumerate(knobs)}


def rows(said):
    return pd.DataFrame([{**p.statistics, "label": p.label, "unsure": p.unsure, "probability": p.probability, "embedding": pack(p.embedding)} for p in said])


def tables(world, knob, weeks=WEEKS):
    "Drift tables: each has its own reference out of the ordinary pictures, and a week out of the others or of the knob's."
    dice, (labels, pools) = np.random.default_rng(7), world
    for _ in range(weeks):
        ordinary = [pools["nothing"][i] for i in dice.permutation(len(pools["nothing"]))]
        strange = ordinary[REFERENCE:] if knob == "nothing" else [pools[knob][i] for i in dice.permutation(len(pools[knob]))]
        yield drift(reference_of(Answered(labels), ordinary[:REFERENCE]), rows(strange[:PICTURES]))


def test_the_pictures_of_the_reference_seen_again_are_no_change_at_all(world):
    "The reference keeps five digits of a number and the store all of them: that alone mustn't look like a difference."
    labels, pools = world
    table = drift(reference_of(Answered(labels), pools["nothing"][:REFERENCE]), rows(pools["nothing"][:REFERENCE])).set_index("measure")
    assert (table.loc[[*MEASURES, "labels", "size"], "effect"] == 0).all()


def test_quiet_weeks_are_quiet(world):
    "At most 5 % false alarms, as far as 240 weeks can tell: more than 18 of them would speak against it (p < 0.05)."
    cries, weeks = sum(t["drifted"].any() for t in tables(world, "nothing", 4 * WEEKS)), 4 * WEEKS
    print(f"{cries} false alarms in {weeks} weeks")
    assert binomtest(int(cries), weeks, 0.05, alternative="greater").pvalue >= 0.05


@pytest.mark.parametrize("knob", ["night", "camera", "breed", "fox"])
def test_each_knob_turned_fully_is_noticed(world, knob):
    noticed = np.mean([t["drifted"].any() for t in tables(world, knob)])
    print(f"{knob}: noticed in {noticed:.0%} of {WEEKS} weeks of {PICTURES} pictures")
    assert noticed >= 0.95


def test_foxes_are_noticed_by_what_the_network_sees(world):
    found = [t.set_index("measure")["drifted"]["embedding"] for t in tables(world, "fox")]
    assert np.mean(found) >= 0.95
