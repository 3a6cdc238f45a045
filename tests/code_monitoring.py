"What the tests of chapter 13's page share: a bundle with embeddings and a store with a bit of everything in it."
from __future__ import annotations

import base64
from pathlib import Path

import numpy as np
import sqlalchemy as sa

from conftest import BLUE, RED, picture, write_tiny_bundle
from dlpipe_nb.core import sha256_of
from dlpipe_nb.inference import Predictor, Store, classify, pack

EVIL = "<img src=x onerror=alert(1)> & a very long name of a picture.png"


def shades(n, seed, dark=0):
    "(name, bytes) of n pictures, each another shade of red or blue; `dark` takes light away."
    rng = np.random.default_rng(seed)
    shade = lambda c: tuple(int(max(0, v - dark + d)) for v, d in zip(c, rng.integers(0, 25, 3)))
    return [(f"{i}.png", picture(shade(RED if i % 2 else BLUE))) for i in range(n)]


def seeing_bundle(folder: Path, embedding=True) -> Path:
    "The tiny bundle with a reference of its own answers, embeddings included."
    scratch = Predictor(write_tiny_bundle(folder.with_name(folder.name + " scratch"), embedding=embedding))
    said = scratch.predict_many(data for _, data in shades(90, 0))
    named = ["unsure" if p.unsure else p.label for p in said]
    reference = {"n": len(said), "labels": {k: named.count(k) for k in ("cat", "dog", "unsure")},
                 "statistics": {m: [p.statistics[m] for p in said] for m in ("brightness", "contrast", "sharpness", "size")}
                 | {"probability": [p.probability for p in said]}}
    if embedding:
        E = np.stack([p.embedding for p in said])
        reference["embedding"] = {"n": len(E), "numbers": 3, "float16": base64.b64encode(pack(E)).decode()}
    return write_tiny_bundle(folder, embedding=embedding, reference=reference, metrics={"test": {"accuracy": 0.9}})


def filled(folder: Path, bundle: Path, dark=False, people=True, images=True) -> Store:
    "A store of 80 pictures over three weeks, with an unreadable one, a nasty name, and feedback with a dispute."
    store, predictor = Store(folder / "store.db", images=folder / "store" / "images" if images else None), Predictor(bundle)
    items = [*shades(78, 1, 40 if dark else 0), (EVIL, picture((120, 118, 122))), ("broken.png", b"no picture")]
    for _, data in items[:-1]: store.keep(sha256_of(data), data)
    classify(items, predictor, store, source="yard")
    with store.engine.begin() as db:
        for i in range(3): db.execute(sa.text(f"update predictions set seen_at = strftime('%Y-%m-%d %H:%M:%f000', 'now', '-{7 * (2 - i)} days') where id > {27 * i}"))
    if people:
        for r in store.predictions().iloc[:45].itertuples():
            if isinstance(r.label, str): store.add_feedback(r.id, r.label if r.id % 9 else "dog" if r.label == "cat" else "cat", by="anna")
        store.add_feedback(5, "dog", by="ben"), store.add_feedback(5, "cat", by="eve")
    return store
