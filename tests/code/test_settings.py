"""The settings: one file for all of them, refused in words where something is wrong, and the nearer word wins."""
from __future__ import annotations

from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
from command import dlpipe, refused

from dlpipe_nb import pipeline
from dlpipe_nb.core import InputError, check
from dlpipe_nb.pipeline import PHASES, Settings, _check_5, read_settings, road, run_pipeline, settings_toml

#: Another value than the default for every setting.
OTHER = dict(seed=7, metric="recall of dog", target=0.8, data="my pets", n=60, valid=0.1, test=0.3, trials=3, sampler="random", size=48,
             arch="resnet18", pretrained=False, epochs=3, lr=1e-5, wd=0.2, bs=16, patience=2, precision="fp32", device="cpu",
             label_errors=True, stress=True, report=False, new="in box", margin=0.05, at_least=5)


def written(tmp_path, text) -> Path:
    path = tmp_path / "my.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_all_settings_have_another_value_here():
    default = asdict(Settings())
    assert set(OTHER) == set(default) and all(OTHER[k] != default[k] for k in OTHER)


@pytest.mark.parametrize("settings", [Settings(), Settings(**OTHER), Settings(pretrained=True, data='C:\\pets "x"\t#[]\x7f\n', new="кошки 猫")])
def test_what_is_written_is_read_back(tmp_path, settings):
    text = settings_toml(settings, {"epochs": 14})
    assert read_settings(written(tmp_path, text)) == settings
    assert all(f"{f.name} =" in text for f in fields(settings)), "the file must name every setting"


def test_what_was_chosen_is_noted_but_not_set(tmp_path):
    text = settings_toml(Settings(size=64), {"epochs": 14, "precision": "bf16", "size": 64})
    lines = {line.lstrip("# ").split(" =")[0]: line for line in text.splitlines() if " =" in line}
    assert lines["epochs"].startswith("# epochs =") and "14 was used" in lines["epochs"]
    assert "bf16 was used" in lines["precision"] and "was used" not in lines["size"]
    assert read_settings(written(tmp_path, text)) == Settings(size=64)


def test_a_file_says_only_what_differs(tmp_path):
    assert read_settings(written(tmp_path, "seed = 4\n[training]\nepochs = 3")) == Settings(seed=4, epochs=3)
    assert read_settings(written(tmp_path, "")) == Settings()


@pytest.mark.parametrize("text, says", [
    ("[training]\nepoch = 3", "epoch.*did you mean epochs"),
    ("[trainning]\nepochs = 3", r"\[trainning\].*did you mean \[training\]"),
    ("[nonsense]\n", r"\[nonsense\]"),
    ("epochs = 3", r"epochs in another place.*belongs under \[training\]"),
    ("[collection]\nepochs = 3", r"it belongs under \[training\]"),
    ("[training]\nseed = 3", "put it at the top"),
    ("[training]\nxyzzy = 3", "dlpipe settings"),
    ('[training]\nepochs = "three"', r"a whole number, at least 1 for \[training\] epochs; found 'three'"),
    ("[training]\nepochs = 3.5", "a whole number"),
    ("[training]\nepochs = true", "a whole number"),
    ("[training]\nepochs = 0", "at least 1"),
    ("[training]\nlr = nan", "a number"),
    ("[training]\nlr = inf", "a number"),
    ("[training]\nprecision = 'fp8'", "auto, fp32, bf16 or fp16"),
    ("[training]\npretrained = 'yes'", "true or false or auto"),
    ("[testing]\nstress = 1", "true or false"),
    ("[testing]\nstress = [true]", "true or false"),
    ("[collection]\ndata = 5", "a text"),
    ("seed = -1", "at least 0"),
    ("[retraining]\nmargin = 2", "at most 1"),
    ("[training]\nepochs: 3", "TOML in .*my.toml; found something else"),
    ("[training]\nepochs = 3\nepochs = 4", "TOML in"),
])
def test_a_mistake_in_the_file_is_named(tmp_path, text, says):
    with pytest.raises(InputError, match=says): read_settings(written(tmp_path, text))


def test_a_file_that_is_no_text_or_not_there(tmp_path):
    (tmp_path / "my.toml").write_bytes(b"\xff\xfe\0")
    with pytest.raises(InputError, match="TOML in"): read_settings(tmp_path / "my.toml")
    with pytest.raises(InputError, match="no file .*dlpipe settings > my.toml"): read_settings(tmp_path / "none.toml")


def test_a_call_is_checked_as_the_file_is(tmp_path):
    with pytest.raises(InputError, match="epoch.*did you mean epochs"): run_pipeline("drawn", tmp_path / "run", epoch=3)
    with pytest.raises(InputError, match="a whole number"): run_pipeline("drawn", tmp_path / "run", epochs="3")
    assert not (tmp_path / "run").exists()


# ---- the nearer word wins

@pytest.fixture
def asked(monkeypatch):
    "The settings that `dlpipe run` would run with: nothing is run."
    got = []
    class Stop(Exception): pass
    def state(run, s): got.append(s); raise Stop
    monkeypatch.setattr(pipeline, "_state", state)
    def ask(*args):
        with pytest.raises(Stop): pipeline.main(["run", *map(str, args)])
        return got[-1]
    return ask


def test_options_win_over_the_file_and_the_file_over_the_defaults(tmp_path, asked):
    mine = written(tmp_path, "seed = 4\n[training]\nepochs = 3\nlr = 0.01\n[testing]\nstress = true\nreport = false\n[tuning]\ntrials = 2")
    out = ["--out", tmp_path / "run"]
    assert asked(*out) == Settings()
    assert asked(*out, "--settings", mine) == Settings(seed=4, epochs=3, lr=0.01, stress=True, report=False, trials=2)
    assert asked(*out, "--settings", mine, "--epochs", 5, "--no-stress", "--trials", 0, "--pretrained", "no") == Settings(
        seed=4, epochs=5, lr=0.01, report=False, pretrained=False)


def test_every_option_reaches_its_setting(tmp_path, asked):
    options = []
    for k, v in OTHER.items():
        if k in ("data", "new", "valid", "test", "sampler", "wd", "bs", "patience", "at_least"): continue
        name = k.replace("_", "-")
        options += [f"--{name}" if v is True else f"--no-{name}"] if isinstance(v, bool) and k != "pretrained" else [
            f"--{name}", "no" if k == "pretrained" else v]
    data = tmp_path / "my pets"
    data.mkdir()
    got = asked("--out", tmp_path / "run", "--data", data, "--new", data, *options)
    kept = {k: getattr(Settings(), k) for k in ("valid", "test", "sampler", "wd", "bs", "patience", "at_least")}
    assert got == replace(Settings(**OTHER), data=data.as_posix(), new=data.as_posix(), **kept)


def test_the_defaults_are_printed_as_a_file(tmp_path):
    done = dlpipe("settings")
    assert done.returncode == 0 and read_settings(written(tmp_path, done.stdout)) == Settings()
    assert all(f.metadata["says"] in done.stdout for f in fields(Settings))


@pytest.mark.parametrize("text, says", [("[training]\nepoch = 3", "did you mean epochs"), ("[training", "TOML")])
def test_the_command_refuses_a_wrong_file_in_one_line(tmp_path, text, says):
    assert says in refused(dlpipe("run", "--settings", written(tmp_path, text), "--out", tmp_path / "run"))
    assert not (tmp_path / "run").exists()


# ---- the road, and the exercises

def test_the_road_has_what_was_asked_for():
    names = lambda **s: [name for name, _, _ in road(Settings(**s))]
    every = [name for name, _, _ in PHASES]
    assert names(trials=1, label_errors=True, stress=True) == every
    assert set(every) - set(names()) == {"tuning", "labels", "stress"} and "report" not in names(report=False)
    assert every.index("stress") < every.index("testing"), "look at validation pictures before the seal is opened"


def merged(defaults, file, call):
    if strange := (file.keys() | call.keys()) - defaults.keys(): raise ValueError(str(strange))
    return {**defaults, **file, **call}


def changed(a, b):
    return {"added": len(b.keys() - a.keys()), "removed": len(a.keys() - b.keys()), "relabelled": sum(a[k] != b[k] for k in a.keys() & b.keys())}


LAST = ["training", "evaluation", "testing", "export", "inference", "report"]
CIRCLE = ["run", "register", "watch", "monitor", "review", "retrain", "rollback"]


@pytest.mark.parametrize("exercise, answer, says", [
    ("15.1", LAST, ""),
    ("15.1", LAST[:-1], "report uses the network too"),
    ("15.1", ["features", *LAST], "hand-made features"),
    ("15.1", ["preprocessing", *LAST], "stay as they are"),
    ("15.1", ["retraining"], "no phase retraining"),
    ("15.2", merged, ""),
    ("15.2", lambda d, f, c: {**c, **f, **d}, "the wrong way round"),
    ("15.2", lambda d, f, c: {**d, **c, **f}, "the file wins over the call"),
    ("15.2", lambda d, f, c: {k: c.get(k) or f.get(k) or d[k] for k in d}, "0 and False"),
    ("15.2", lambda d, f, c: {**d, **f, **c}, "passed in silence"),
    ("15.2", lambda d, f, c: {**f, **c}, "every setting must be in it"),
    ("15.2", lambda d, f, c: (merged(d, f, c), d.update(f), d.update(c))[0], "the defaults were changed"),
    ("15.3", changed, ""),
    ("15.3", lambda a, b: changed(b, a), "the wrong way round"),
    ("15.3", lambda a, b: {"added": len(b.items() - a.items()), "removed": len(a.items() - b.items()), "relabelled": 1}, "compare the hashes"),
    ("15.3", lambda a, b: {"added": 0, "removed": len(a) - len(b), "relabelled": 1}, "difference of the two sizes"),
    ("15.3", lambda a, b: changed(a, b) | {"relabelled": 0}, "q is a cat in a"),
    ("15.4", CIRCLE, ""),
    ("15.4", ["register", "run", *CIRCLE[2:]], "nothing to register"),
    ("15.4", ["run", "watch", "register", *CIRCLE[3:]], "before register there is none"),
    ("15.4", ["run", "register", "watch", "monitor", "retrain", "review", "rollback"], "without people's labels"),
    ("15.4", ["run", "register", "watch", "review", "monitor", "retrain", "rollback"], "look first"),
    ("15.4", CIRCLE[:-1], "each of the seven once"),
])
def test_the_exercises_tell_wrong_answers_apart(exercise, answer, says):
    said = check(exercise, answer)
    assert said.passed is (not says) and says in said.message, said


def test_exercise_5_looks_at_the_run(tmp_path):
    from dlpipe_nb.core import Run
    run = Run(tmp_path / "mine")
    assert "isn't a run" in _check_5(run.path)
    run.write_json("problem.json", {"labels": ["cat", "dog"]})
    assert "three or more" in _check_5(run.path)
    run.write_json("problem.json", {"labels": ["cat", "dog", "fox"]})
    assert "isn't tested yet" in _check_5(run.path)
    run.write_json("test.json", {}), run.write_json("seal.json", {"opened": [1, 2]})
    assert "opened 2 times" in _check_5(run.path)
    run.write_json("seal.json", {"opened": [1]})
    assert "no bundle" in _check_5(run)
    run.write_json("bundle/model.json", {})
    assert _check_5(run) == ""


def test_the_metric_that_was_asked_for_is_the_problem_s(tmp_path):
    from dlpipe_nb.core import Run
    from dlpipe_nb.problem import Problem
    run = Run(tmp_path / "run")
    asked = Settings(metric="recall of dog", target=0.8)
    assert "dog" in pipeline._problem(run, asked) and "80" in pipeline._problem(run, asked)
    assert (Problem.load(run).metric, Problem.load(run).target) == ("recall of dog", 0.8)
    with pytest.raises(InputError, match="leave them out"): pipeline._problem(run, Settings(metric="accuracy"))
    with pytest.raises(InputError, match="a metric for image classification"): pipeline._problem(Run(tmp_path / "b"), Settings(metric="recall of cow"))


# ---- the optional phases: what they are asked for, and what comes of it (what they do is tested in their own chapters)

@pytest.fixture
def asked_of(monkeypatch):
    "Stands in for the functions of other chapters; gives what each was called with."
    import types
    from dlpipe_nb import evaluation, testing, training, tuning
    import pandas as pd
    calls = {}
    def note(module, name, gives):
        def fake(run, *args, **named): calls[name] = (args, named); return gives(run) if callable(gives) else gives
        monkeypatch.setattr(module, name, fake)
    best = {"settings": {"lr": 0.02, "wd": 0.3}, "trials": 4, "value": 0.91, "metric": "accuracy"}
    note(tuning, "tune_into", lambda run: run.write_json("tuning.json", best))
    note(tuning, "tuned", {"lr": 0.02, "wd": 0.3})
    record = dict(arch="small", size=64, epochs=2, hardware="CPU", start="from scratch")
    note(training, "train_into", types.SimpleNamespace(record=record))
    note(evaluation, "label_errors_into", pd.DataFrame({"flagged": [True, False, False]}))
    note(testing, "stress_into", (None, pd.DataFrame({"passed": [True, True, False]})))
    return calls


def test_what_tuning_found_is_trained_with_unless_said_otherwise(tmp_path, asked_of):
    from dlpipe_nb.core import Run
    run, s = Run(tmp_path / "run"), Settings(trials=4, sampler="random", seed=9, bs=32)
    assert "the best of 4 trials: lr 0.02, wd 0.3; accuracy 0.910" in pipeline._tuning(run, s)
    assert asked_of["tune_into"][1] == dict(trials=4, sampler="random", seed=9, arch="small")
    pipeline._training(run, s)
    got = asked_of["train_into"][1]
    assert (got["lr"], got["wd"], got["arch"], got["bs"]) == (0.02, 0.3, "small", 32) and asked_of["tuned"][0] == (32,)
    pipeline._training(run, replace(s, lr=0.5, wd=0.0))
    assert (asked_of["train_into"][1]["lr"], asked_of["train_into"][1]["wd"]) == (0.5, 0.0), "0 is a value too"
    pipeline._training(run, Settings(epochs=2, size=48, precision="fp32", device="cpu", patience=3, seed=5, pretrained=False))
    assert asked_of["train_into"][1] == dict(size=48, bs=64, seed=5, arch="auto", pretrained=False, epochs=2, lr=None, wd=0.05,
                                             precision="fp32", device="cpu", patience=3)


def test_doubtful_labels_and_stress_say_a_line(tmp_path, asked_of):
    assert "1 of 3 labels are doubtful" in pipeline._labels(tmp_path, Settings(seed=5)) and asked_of["label_errors_into"][1] == {"seed": 5}
    assert "2 of 3 tests of its behaviour passed" in pipeline._stress(tmp_path, Settings(seed=5)) and asked_of["stress_into"][1] == {"seed": 5}


def test_python_3_10_reads_with_the_package(tmp_path, monkeypatch):
    import sys
    import types
    asked = []
    def loads(text): asked.append(text); return {"seed": 4}
    monkeypatch.setitem(sys.modules, "tomllib", None)
    monkeypatch.setitem(sys.modules, "tomli", types.SimpleNamespace(loads=loads))
    assert read_settings(written(tmp_path, "seed = 4")) == Settings(seed=4) and asked == ["seed = 4"]
