"""The checks of chapter 12's exercises tell plausible wrong answers apart, and say what is wrong."""
from __future__ import annotations

import json
import urllib.request

import pytest

from dlpipe_nb.api import _check_1, _check_2, _check_3, _check_4

RIGHT = {"a picture that can be read": 200, "a token that is wrong": 401, "a body of ten gigabytes": 413, "a text file named cat.jpg": 422,
         "the service is full": 503}


def test_statuses():
    assert _check_1(RIGHT) == ""
    said = {_check_1(RIGHT | wrong) for wrong in ({"a token that is wrong": 500}, {"a body of ten gigabytes": 422}, {"the service is full": 429},
                                                  {"the service is full": None})} | {_check_1([200])}
    assert len(said) == 5 and all(said)


def client(path="/predict", auth="Bearer {}", post=True, whole=False):
    "A client, right or wrong in one way."
    def label_of(url, data, token):
        headers = {"Authorization": auth.format(token)} if auth else {}
        with urllib.request.urlopen(urllib.request.Request(url + path, data if post else None, headers)) as r: said = json.load(r)
        return said if whole else said["predictions"][0]["label"]
    return label_of


def test_clients():
    assert _check_2(client()) == ""
    said = {_check_2(f) for f in (client("/classify"), client(auth=None), client(auth="{}"), client(post=False), client(whole=True),
                                  lambda url, data, token: "cat")}
    assert len(said) == 6 and all(said)


def insisting(tries=5, again=lambda s: s >= 500, pause=lambda n: 2 ** n):
    def insist(send, wait):
        for n in range(tries):
            if n: wait(pause(n))
            status = send()
            if not again(status): break
        return status
    return insist


def test_trying_again():
    assert _check_3(insisting()) == ""
    said = {_check_3(f) for f in (insisting(1), insisting(9), insisting(again=lambda s: s != 200), insisting(again=lambda s: s == 503),
                                  insisting(again=lambda s: True), insisting(pause=lambda n: 1))}
    assert len(said) == 6 and all(said)
    assert _check_3(lambda send, wait: None) is None


@pytest.mark.parametrize("wrong", [lambda r, s: r / s, lambda r, s: s / r, lambda r, s: int(r), lambda r, s: r * s])
def test_places(wrong):
    assert _check_4(lambda r, s: int(r * s)) == "" and _check_4(wrong)


def test_places_say_different_things():
    assert len({_check_4(f) for f in (lambda r, s: r / s, lambda r, s: 1 / r * s, lambda r, s: int(r), lambda r, s: float(int(r * s)))}) == 4
    assert _check_4(lambda r, s: None) is None
