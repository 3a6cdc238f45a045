"""What giving up early saves and loses, on a pretend training and on a short real one.

    python benchmarks/tuning.py               # the pretend training, 40 problems: about a minute
    python benchmarks/tuning.py --real        # and short trainings on drawn pets, 3 seeds: about half an hour on two cores
    python benchmarks/tuning.py --real --seeds 1 --trials 8

Each row: how many of the trials were pruned, the seconds of work relative to the same search without a pruner (for the
pretend training, whose epochs take no time, the epochs), and the best value found. Same seeds, same settings in the same order
for random search.
"""
import argparse
import math
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from dlpipe_nb.core import Run  # noqa: E402
from dlpipe_nb.tuning import PRUNERS, best, cost, objective_on, trials_table, tune  # noqa: E402

SPACE = {"lr": (1e-4, 1e-1, "log"), "wd": (0.0, 0.3)}
EPOCHS = 9


def pretend(settings, report, good):
    "The pretend training of chapter 07, with its good region at a learning rate of 10**good."
    step = math.log10(settings["lr"]) - good
    final = 0.6 + 0.33 * math.exp(-(step / 0.35) ** 2) + 0.02 * settings["wd"] / 0.3
    for epoch in range(1, EPOCHS + 1):
        value = 0.5 + (final - 0.5) * (1 - 0.5 ** (epoch / 2))
        report(value)
    return value


def pretend_rows(problems=40, trials=40):
    goods = np.random.default_rng(0).uniform(-3.5, -1.5, problems)
    for sampler in ("random", "tpe"):
        for pruner in (None, *PRUNERS):
            studies = [tune(lambda s, report: pretend(s, report, g), SPACE, trials, sampler, seed=i, pruner=pruner)
                       for i, g in enumerate(goods)]
            tables = [trials_table(s) for s in studies]
            yield {"training": f"pretend, {trials} trials", "sampler": sampler, "pruner": str(pruner),
                   "pruned": np.mean([(t["state"] == "pruned").mean() for t in tables]),
                   "work": np.mean([t["steps"].sum() / (trials * EPOCHS) for t in tables]),
                   "best": np.mean([best(s)["value"] for s in studies]),
                   "se": np.std([best(s)["value"] for s in studies], ddof=1) / problems ** 0.5}


def real_rows(seeds, trials, pictures):
    with tempfile.TemporaryDirectory() as folder:
        run = Run(folder)
        run.make("problem")
        run.make("manifest")
        run.ensure("clean")
        df, space = run.manifest(), {"lr": (5e-4, 5e-2, "log"), "wd": (0.01, 0.3, "log")}
        for sampler in ("random", "tpe"):
            alone = {}
            for pruner in (None, "median", "halving"):
                rows = []
                for seed in range(1, seeds + 1):
                    study = tune(objective_on(df, pictures=pictures, seed=seed), space, trials, sampler, seed=seed, pruner=pruner)
                    c = cost(study)
                    alone.setdefault(seed, c["seconds"])
                    rows.append((c["pruned"] / trials, c["seconds"] / alone[seed], best(study)["value"], c["seconds"]))
                pruned, work, value, seconds = np.mean(rows, axis=0)
                yield {"training": f"drawn pets, {trials} trials", "sampler": sampler, "pruner": str(pruner), "pruned": pruned,
                       "work": work, "best": value, "se": np.std([r[2] for r in rows], ddof=1) / seeds ** 0.5 if seeds > 1 else math.nan,
                       "seconds": seconds}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", action="store_true")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--pictures", type=int, default=1000)
    parser.add_argument("--problems", type=int, default=40)
    args = parser.parse_args()
    rows = list(pretend_rows(args.problems))
    if args.real: rows += real_rows(args.seeds, args.trials, args.pictures)
    print(pd.DataFrame(rows).round(3).to_string(index=False))
