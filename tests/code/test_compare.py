"""Two runs side by side: what differs is found, what doesn't is not."""
from __future__ import annotations

import pandas as pd
import pytest
from command import dlpipe, refused

from dlpipe_nb.core import InputError, Run
from dlpipe_nb.pipeline import Settings, asdict, compare_runs, main

SHAS = [f"{i:064x}" for i in range(12)]


def made(path, labels=None, splits=None, right=(1,) * 6, seal="s", asked=None, folder="data", **noted) -> Run:
    "A run's papers: twelve pictures, six of them in the test."
    run, labels, splits = Run(path), labels or dict.fromkeys(SHAS, "cat"), splits or {}
    df = pd.DataFrame({"path": [str(path.parent / folder / f"{s[-2:]}.png") for s in labels], "label": list(labels.values()),
                       "split": [splits.get(s, "test" if s in SHAS[:6] else "train") for s in labels], "sha256": list(labels), "source": "x"})
    run.save_manifest(df)
    run.write_json("problem.json", {"labels": ["cat", "dog"]})
    run.write_json("seal.json", {"sha256": seal})
    run.write_json("run.json", {"settings": asdict(asked or Settings()), "phases": {"training": {"said": "", "seconds": 5.0}}, **noted})
    test = df[df["sha256"].isin(SHAS[:6])][["path", "label"]]
    hit = list(right)[: len(test)]
    test = test.assign(predicted=["cat" if r else "dog" for r in hit], p_cat=[0.9 if r else 0.2 for r in hit], p_dog=[0.1 if r else 0.8 for r in hit])
    run.save_manifest(test, "test_predictions.csv")
    run.write_json("test.json", {"right": sum(hit), "total": len(hit), "result": "pass", "sentence": ""})
    return run


def test_nothing_differs(tmp_path):
    both = compare_runs(made(tmp_path / "a"), made(tmp_path / "b"))
    assert both.same and both.apart == 0 and both.answers.both == 6
    assert "the same, in the same splits" in repr(both) and "the same answers" in repr(both) and "versions   the same" in repr(both)


def test_pictures_are_known_by_their_contents_not_their_names(tmp_path):
    both = compare_runs(made(tmp_path / "a"), made(tmp_path / "b", folder="elsewhere"))
    assert both.same and not len(both.pictures)


def test_every_kind_of_change_to_the_pictures(tmp_path):
    labels = dict.fromkeys(SHAS[:-1], "cat") | {"f" * 64: "dog", SHAS[7]: "dog"}
    both = compare_runs(made(tmp_path / "a"), made(tmp_path / "b", labels, {SHAS[8]: "valid"}, seal="other"))
    rows = both.pictures.set_index("sha256")
    assert rows["change"].to_dict() == {"f" * 64: "added", SHAS[11]: "removed", SHAS[7]: "relabelled", SHAS[8]: "moved"}
    assert rows.loc[SHAS[7], ["label_a", "label_b"]].tolist() == ["cat", "dog"] and rows.loc[SHAS[8], "split_b"] == "valid"
    assert not both.same and both.answers is None and "different sealed pictures" in repr(both)


def test_settings_times_and_versions(tmp_path):
    a = made(tmp_path / "a", versions={"torch": "1"})
    both = compare_runs(a, made(tmp_path / "b", asked=Settings(epochs=3), versions={"torch": "2"}))
    assert both.settings.to_dict("records") == [{"what": "epochs", "a": None, "b": 3}]
    assert both.versions.to_dict("records") == [{"what": "torch", "a": "1", "b": "2"}] and not both.same
    assert "epochs – → 3" in repr(both) and "torch 1 → 2" in repr(both)


def test_the_tests_are_compared_picture_by_picture(tmp_path):
    both = compare_runs(made(tmp_path / "a", right=(1, 1, 1, 1, 0, 0)), made(tmp_path / "b", right=(1, 0, 0, 0, 0, 1)))
    assert (both.answers.only_a, both.answers.only_b, both.answers.p) == (3, 1, 0.625) and both.apart == pytest.approx(0.7)
    assert "4 of 6 right, pass → 2 of 6 right, pass" in repr(both) and "only a right 3, only b right 1, p = 0.62" in repr(both)


def test_a_run_without_papers_and_one_that_is_not_tested(tmp_path):
    a = made(tmp_path / "a", asked=Settings(lr=0.1, epochs=4))
    (a / "run.json").unlink()
    a.write_json("learner/learner.json", {"epochs": 4, "lr": 0.1, "history": []})
    b = made(tmp_path / "b", asked=Settings(epochs=5))
    b.write_json("learner/learner.json", {"epochs": 5, "lr": 0.1, "history": []})
    (b / "test.json").unlink()
    both = compare_runs(a, b)
    assert both.settings.to_dict("records") == [{"what": "epochs", "a": 4, "b": 5}], "what both record"
    assert both.tests[1] is None and both.answers is None and "not tested" in repr(both)


def test_the_command(tmp_path, capsys):
    made(tmp_path / "a"), made(tmp_path / "b", asked=Settings(epochs=3))
    with pytest.raises(SystemExit) as e: main(["compare", str(tmp_path / "a"), str(tmp_path / "b")])
    assert e.value.code == 0 and "settings   epochs – → 3" in capsys.readouterr().out
    with pytest.raises(InputError, match="no problem.json"): compare_runs(tmp_path / "a", tmp_path / "none")
    assert "check the spelling" in refused(dlpipe("compare", tmp_path / "a", tmp_path / "none")) and not (tmp_path / "none").exists()
