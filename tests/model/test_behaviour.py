"""What a trained network must do, picture by picture: the minimum on easy pictures, no change under a small shift, the right
change when the animal or its ears are redrawn, and a fall under stress that begins where it should.

The network is a small one, trained for some seconds on 600 small pictures (about 80 % right on new ones), and the minimums are
set for that. The chapter's own network, trained on twice as many at twice the size, keeps the stricter `ALLOWED`.
"""
from __future__ import annotations

import numpy as np
import pytest

from dlpipe_nb.collection import draw_factors, draw_pets
from dlpipe_nb.preprocessing import make_dls, split
from dlpipe_nb.problem import interval
from dlpipe_nb.testing import behaviour, easy_pets, redraw, stress
from dlpipe_nb.training import make_model, probabilities, train

HONEST = {"minimum": .30, "invariance": .35, "direction": .30}


@pytest.fixture(scope="module")
def pets(tmp_path_factory):
    return split(draw_pets(tmp_path_factory.mktemp("pets") / "drawn", n=600, seed=2), seed=1)


@pytest.fixture(scope="module")
def learn(pets):
    return train(make_dls(pets, 48, 32), "small", False, 10, seed=1, device="cpu", precision="fp32")


@pytest.fixture(scope="module")
def table(learn):
    return behaviour(learn, n=40, allowed=HONEST, tolerance=.1).set_index("test")


@pytest.mark.parametrize("test", ["easy pictures are right", "moved by 2 to 4 pixels", "mirrored", "a tenth brighter or darker", "a cat redrawn as a dog is less of a cat",
                                  "a dog's ears let down make it no less a dog", "a cat's ears folded make it no more a cat"])
def test_behaviour_of_a_trained_network(table, test):
    row = table.loc[test]
    assert row.passed and row.n == 40, f"{row.failed} of {row.n} failed, {row.allowed:.0%} are allowed; for instance {row.example}"


def test_everything_that_behaviour_tests_is_looked_at(table):
    assert len(table) == 7


def test_the_network_tells_new_pets_apart_better_than_a_coin(learn):
    rows = draw_factors(120, 909)
    said = probabilities(learn, redraw(rows, 48)).argmax(1)
    right = int((said == np.where(rows.animal == "cat", 0, 1)).sum())
    assert interval(right, len(rows))[0] > .5, f"{right} of {len(rows)}"


def test_easy_pictures_are_no_harder_than_the_others(learn):
    def share(rows): return (probabilities(learn, redraw(rows, 48)).argmax(1) == np.where(rows.animal == "cat", 0, 1)).mean()
    assert share(easy_pets(60, 5)) >= share(draw_factors(60, 5)) - .12


def test_an_untrained_network_fails_what_a_trained_one_passes(learn):
    net = type("Untrained", (), {"model": make_model("small", 2), "record": learn.record})()
    t = behaviour(net, n=20, allowed=HONEST).set_index("test")
    assert not t.passed["easy pictures are right"] and not t.passed["a cat redrawn as a dog is less of a cat"]


def test_stress_takes_away_what_was_learned(learn, pets):
    t = stress(learn, pets[pets.split == "valid"], ["darkness", "blur"], [1, 5]).set_index(["kind", "strength"]).accuracy
    whole = t["none", 0]
    assert t["blur", 1] >= whole - .10, "half a percent of the side can hardly be seen"
    assert t["darkness", 5] <= whole - .15 and abs(t["darkness", 5] - .5) < .2, "in the dark it can only guess"
