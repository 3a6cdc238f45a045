"""How good is chapter 13's alarm? False alarms and power over simulated weeks; prints the chapter's table.

    python benchmarks/drift.py runs/course           # draws 6,000 pets, predicts them once, then draws weeks from them
    python benchmarks/drift.py runs/course --quick   # fewer pictures and weeks

Needs a run with a bundle. A week is drawn without replacement from pictures that the training never saw; `share` is how
many of its pictures have the knob turned on, the others are ordinary. An alarm is what `monitor` calls one: any measure drifted.
"""
from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
from statsmodels.stats.proportion import proportion_confint

from dlpipe_nb.collection import draw_pets
from dlpipe_nb.inference import Predictor, pack
from dlpipe_nb.monitoring import drift

KNOBS = {"night": "night falls", "camera": "another camera", "breed": "a new breed", "fox": "foxes"}


def pool(predictor: Predictor, folder: Path, n: int, seed: int, knobs: dict) -> pd.DataFrame:
    "Predictions for `n` freshly drawn pictures, as a store gives them."
    drawn = draw_pets(folder / f"{seed}", n=n, seed=seed, knobs=knobs)
    said = predictor.predict_many(list(drawn["path"]))
    rows = [{**p.statistics, "label": p.label, "unsure": p.unsure, "probability": p.probability, "embedding": pack(p.embedding)} for p in said]
    return pd.DataFrame(rows).assign(truth=drawn["label"].to_numpy())


def week(pools: dict, knob: str | None, share: float, n: int, dice) -> pd.DataFrame:
    "A week of `n` pictures, `share` of them with the knob turned."
    turned = int(round(n * share)) if knob else 0
    parts = [pools["nothing"].sample(n - turned, random_state=int(dice.integers(2**31)))]
    if turned: parts.append(pools[knob].sample(turned, random_state=int(dice.integers(2**31))))
    return pd.concat(parts, ignore_index=True)


def alarms(reference: dict, pools: dict, knob: str | None, share: float, n: int, weeks: int) -> tuple[float, dict]:
    "The share of weeks with an alarm, and how often each measure was its reason."
    dice = np.random.default_rng([n, int(100 * share), weeks, *(knob or "nothing").encode()])
    tables = [drift(reference, week(pools, knob, share, n, dice)) for _ in range(weeks)]
    return float(np.mean([t["drifted"].any() for t in tables])), pd.concat(tables).groupby("measure")["drifted"].mean().to_dict()


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("run", type=Path, help="a run with a bundle")
    p.add_argument("--quick", action="store_true")
    p.add_argument("--weeks", type=int)
    p.add_argument("--only", nargs="*", choices=[*KNOBS], default=[*KNOBS], help="some of the knobs; the numbers are the same as with all")
    a = p.parse_args()
    predictor, weeks = Predictor(a.run / "bundle"), a.weeks or (20 if a.quick else 100)
    sizes, shares = ((60, 120), (1.0,)) if a.quick else ((30, 60, 120, 250), (1.0, 0.5, 0.25))
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as tmp:
        counts = (600, 200) if a.quick else (3000, 750)
        pools = {"nothing": pool(predictor, Path(tmp), counts[0], 501, {})}
        pools |= {k: pool(predictor, Path(tmp), counts[1], 502 + i, {k: 1.0}) for i, k in enumerate(KNOBS) if k in a.only}
    print(f"drawn and predicted in {time.perf_counter() - start:.0f} s; reference of {predictor.info['reference']['n']} pictures; "
          f"{weeks} weeks a field; {os.cpu_count()} cores", flush=True)
    print("accuracy:", ", ".join(f"{k} {(d['label'] == d['truth']).mean():.2f}" for k, d in pools.items() if k != "fox"), "\n")
    print("| week | " + " | ".join(f"{n} pictures" for n in sizes) + " |\n|---|" + "---|" * len(sizes))
    fields = [(None, 0.0, "nothing happens"), *((k, s, v if s == 1 else f"{v}, {s:.0%} of the pictures") for k, v in KNOBS.items() if k in a.only for s in shares)]
    for knob, share, name in fields:
        found = [alarms(predictor.info["reference"], pools, knob, share, n, weeks) for n in sizes]
        print(f"| {name} | " + " | ".join(f"{x:.0%}" for x, _ in found) + " |", flush=True)
        why = {m: round(v, 2) for m, v in found[-1][1].items() if v >= 0.1}
        if knob and share == 1: print(f"<!-- reasons with {sizes[-1]} pictures: {why} -->")
        if not knob: print("<!-- 95 % intervals:", [tuple(round(float(v), 3) for v in proportion_confint(round(x * weeks), weeks, method="wilson")) for x, _ in found], "-->")
    print(f"\nin {time.perf_counter() - start:.0f} s")


if __name__ == "__main__": main()
