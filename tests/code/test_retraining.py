"Chapter 14: only settled, unseen pictures are learned from; the registry never loses a champion; the gate keeps its word."
from __future__ import annotations

import multiprocessing
import os
import shutil

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from conftest import BLUE, RED, picture, write_tiny_bundle
from dlpipe_nb import retraining
from dlpipe_nb.core import InputError, Run, check, read_json, sha256_of, write_json
from dlpipe_nb.inference import BundleError, Predictor, Store, classify
from dlpipe_nb.retraining import Registry, gate, new_pictures, paired_bootstrap, retrain


# ---- the pictures that may be learned from

def shades(n, start=0):
    "(name, bytes, label) of n different pictures: red cats and blue dogs."
    made = []
    for i in range(start, start + n):
        red = i % 2 == 0
        r, g, b = RED if red else BLUE
        made.append((f"{i}.png", picture((r - i % 20, g + i, b)), "cat" if red else "dog"))
    return made


@pytest.fixture
def seen(tiny_bundle, tmp_path):
    "A store that has seen, and kept, ten pictures; and those pictures."
    store, made = Store(tmp_path / "s.db", images=tmp_path / "images"), shades(10)
    classify([(n, b) for n, b, _ in made], Predictor(tiny_bundle), store, bs=100)
    for _, b, _ in made: store.keep(sha256_of(b), b)
    return store, made


def tell(store, data, label, by="anna"):
    ids = store.predictions().set_index("sha256")["id"]
    store.add_feedback(int(ids[sha256_of(data)]), label, by=by)


def test_labelled_pictures_become_a_manifest(seen):
    store, made = seen
    for _, b, label in made[:4]: tell(store, b, label)
    got, left_out = new_pictures(store, ("cat", "dog"))
    assert len(got) == 4 and left_out.empty
    assert list(got.columns) == ["path", "label", "split", "sha256", "width", "height", "source"]
    assert (got["source"] == "feedback").all() and got["width"].eq(60).all() and got["height"].eq(40).all()
    assert dict(zip(got["sha256"], got["label"])) == {sha256_of(b): l for _, b, l in made[:4]}
    assert all(sha256_of(p) == s for p, s in zip(got["path"], got["sha256"]))


def test_what_is_left_out_is_listed_with_its_reason(seen, tiny_bundle, tmp_path):
    store, made = seen
    data = [b for _, b, _ in made]
    tell(store, data[0], "cat"), tell(store, data[0], "dog", by="ben")
    tell(store, data[1], "fox")
    tell(store, data[2], "cat")
    tell(store, data[3], "dog"), store.picture(sha256_of(data[3])).unlink()
    tell(store, data[4], "cat"), store.picture(sha256_of(data[4])).write_bytes(picture((9, 9, 9)))
    classify([("broken.png", b"no picture")], Predictor(tiny_bundle), store)
    store.keep(sha256_of(b"no picture"), b"no picture"), tell(store, b"no picture", "cat")
    tell(store, data[5], "dog")
    got, left_out = new_pictures(store, ("cat", "dog"), pd.DataFrame({"sha256": [sha256_of(data[2])]}))
    assert got["sha256"].tolist() == [sha256_of(data[5])]
    reasons = dict(zip(left_out["sha256"], left_out["reason"]))
    assert reasons == {sha256_of(data[0]): "people disagree", sha256_of(data[1]): "not one of the labels",
                       sha256_of(data[2]): "already in the run", sha256_of(data[3]): "the picture wasn't kept",
                       sha256_of(data[4]): "the kept file was changed", sha256_of(b"no picture"): "not a picture that can be read"}


def test_a_store_without_feedback_or_images_gives_none(tiny_bundle, tmp_path):
    store = Store(tmp_path / "s.db")
    got, left_out = new_pictures(store, ("cat", "dog"))
    assert got.empty and left_out.empty and "path" in got
    classify([(n, b) for n, b, _ in shades(2)], Predictor(tiny_bundle), store)
    tell(store, shades(1)[0][1], "cat")
    got, left_out = new_pictures(store, ("cat", "dog"))
    assert got.empty and left_out["reason"].tolist() == ["the picture wasn't kept"]


# ---- the registry

@pytest.fixture
def registry(tiny_bundle, tmp_path):
    r = Registry(tmp_path / "registry")
    for note in ("first", "second", "third"): r.add(tiny_bundle, {"note": note})
    return r


def test_versions_are_copies_with_lineage(registry, tiny_bundle):
    assert registry.names() == ["v0001", "v0002", "v0003"] and registry.champion is None
    about = read_json(registry.path / "v0002" / "lineage.json")
    assert about["note"] == "second" and about["model"] == Predictor(tiny_bundle).version
    assert set(about["files"]) == {"bundle/model.onnx", "bundle/model.json"}
    assert Predictor(registry.bundle("v0002")).version == about["model"]
    assert not [p for p in registry.path.iterdir() if p.name.startswith(".")]


def test_promote_and_roll_back(registry):
    assert registry.promote("v0001") == registry.champion == "v0001"
    registry.promote("v0003"), registry.promote("v0003")
    assert registry.versions()["champion"].tolist() == [False, False, True]
    assert registry.roll_back() == registry.champion == "v0001"
    with pytest.raises(InputError, match="earlier champion"): registry.roll_back()
    assert registry.champion == "v0001"


def test_roll_back_twice_goes_back_two_champions(registry):
    for v in registry.names(): registry.promote(v)
    assert [registry.roll_back(), registry.roll_back()] == ["v0002", "v0001"]


def test_roll_back_skips_a_damaged_version(registry):
    for v in registry.names(): registry.promote(v)
    (registry.bundle("v0002") / "model.onnx").unlink()
    assert registry.roll_back() == "v0001"


@pytest.mark.parametrize("harm, words", [
    (lambda v: shutil.rmtree(v), "v0002"),
    (lambda v: (v / "bundle" / "model.onnx").unlink(), "model.onnx is missing"),
    (lambda v: (v / "bundle" / "model.json").write_text("{}"), "model.json was changed"),
    (lambda v: (v / "lineage.json").unlink(), "no readable lineage.json"),
    (lambda v: (v / "lineage.json").write_text("[]"), "no readable lineage.json")])
def test_a_missing_or_damaged_version_is_refused_and_shown(registry, harm, words):
    registry.promote("v0001")
    harm(registry.path / "v0002")
    for ask in (registry.promote, registry.bundle):
        with pytest.raises(InputError, match=words): ask("v0002")
    assert registry.champion == "v0001"
    table = registry.versions().set_index("version")
    assert "v0002" not in table.index or words in table.loc["v0002", "note"]


@pytest.mark.parametrize("text", ["", "hello", "v0001 ../secret", "v1"])
def test_a_champion_file_that_is_no_name_is_refused(registry, text):
    (registry.path / "champion").write_text(text)
    with pytest.raises(InputError, match="champion file"): registry.champion


def test_a_champion_that_is_gone_is_refused_in_words(registry):
    registry.promote("v0003")
    shutil.rmtree(registry.path / "v0003")
    with pytest.raises(InputError, match="v0003"): registry.bundle()


def test_a_broken_bundle_is_not_added(registry, tiny_bundle, tmp_path):
    bad = shutil.copytree(tiny_bundle, tmp_path / "bad")
    (bad / "model.onnx").write_bytes(b"x")
    with pytest.raises(BundleError): registry.add(bad)
    with pytest.raises(BundleError): registry.add(tmp_path / "nowhere")
    assert registry.names() == ["v0001", "v0002", "v0003"]


def test_an_empty_registry_says_so_and_a_file_is_no_registry(tmp_path):
    empty = Registry(tmp_path / "new")
    assert empty.names() == [] and empty.champion is None and empty.versions().empty and "none yet" in repr(empty)
    with pytest.raises(InputError, match="a champion"): empty.bundle()
    with pytest.raises(InputError, match="none yet"): empty.promote("v0001")
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="a file"): Registry(tmp_path / "file")


def test_a_leftover_of_a_killed_add_is_no_version(registry):
    (registry.path / ".new-1234").mkdir()
    (registry.path / "v0004").write_text("not a folder")
    (registry.path / "v12").mkdir()
    assert registry.names() == ["v0001", "v0002", "v0003"]


def test_a_number_that_was_taken_meanwhile_is_skipped(registry, tiny_bundle, monkeypatch):
    late = iter([["v0001"], ["v0001", "v0002"], ["v0001", "v0002", "v0003"]])   # as if two others were adding at this moment
    monkeypatch.setattr(Registry, "names", lambda self: next(late))
    assert registry.add(tiny_bundle) == "v0004"


def _promote_forever(path):
    r = Registry(path)
    while True:
        for v in ("v0001", "v0002", "v0003"): r.promote(v)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_kill_while_promoting_leaves_a_champion(registry):
    registry.promote("v0001")
    for pause in (0.05, 0.11, 0.17):
        worker = multiprocessing.get_context("fork").Process(target=_promote_forever, args=(registry.path,))
        worker.start()
        worker.join(pause)
        worker.kill()
        worker.join()
        assert Predictor(registry.bundle()).version


# ---- the gate

def frames(lost, gained, wrong=10, n=360):
    before = np.arange(n) >= gained + wrong
    after = before.copy()
    after[:gained], after[n - lost:] = True, False
    make = lambda ok: pd.DataFrame({"path": [f"{i}.png" for i in range(n)], "label": "cat", "predicted": np.where(ok, "cat", "dog")})
    return make(before), make(after)


@pytest.mark.parametrize("lost, gained, options, promoted, words", [
    (1, 12, {}, True, "12 gained, 1 lost"),
    (0, 0, {}, True, "not worse"),
    (7, 3, {}, True, "not worse by more than 0.02"),
    (7, 3, {"strict": True}, False, "ruled out"),
    (15, 3, {}, False, "worse by 0.033"),
    (15, 3, {"margin": 0.05}, True, "0.05"),
    (2, 1, {"at_least": 500}, False, "too few")])
def test_the_gate_keeps_its_rule(lost, gained, options, promoted, words):
    got = gate(*frames(lost, gained), **options)
    assert got.promoted is promoted and words in got.sentence and repr(got) == got.sentence
    assert (got.lost, got.gained, got.pictures) == (lost, gained, 360)
    assert got.difference == pytest.approx((gained - lost) / 360) and got.low <= got.difference <= got.high


def test_the_margin_itself_is_allowed():
    champion, challenger = frames(lost=4, gained=0, n=200)
    assert gate(champion, challenger, margin=0.02).promoted


def test_a_slice_that_is_clearly_worse_stops_a_challenger_that_is_as_good_overall():
    champion, challenger = frames(lost=9, gained=9, wrong=3)
    champion["pattern"] = ["plain"] * 300 + ["tabby"] * 60
    got = gate(champion, challenger, slices=("pattern",))
    assert not got.promoted and "tabby" in got.sentence and got.slices.set_index("slice").loc["pattern tabby", "worse"]
    assert gate(champion, challenger).promoted


def test_one_picture_of_a_small_slice_is_no_reason():
    champion, challenger = frames(lost=1, gained=1)
    champion["pattern"] = ["plain"] * 340 + ["tabby"] * 20
    assert gate(champion, challenger, slices=("pattern",)).promoted


def test_other_pictures_are_one_more_slice():
    got = gate(*frames(2, 2), others={"recent": frames(30, 0, n=100)})
    assert not got.promoted and "recent" in got.sentence
    assert gate(*frames(2, 2), others={"recent": frames(0, 30, n=100)}).promoted


def test_the_order_of_the_rows_does_not_matter():
    a, b = frames(3, 8)
    assert gate(a, b.sample(frac=1, random_state=0)).sentence == gate(a, b).sentence


@pytest.mark.parametrize("spoil, options", [
    (lambda a, b: (a, b.head(10)), {}), (lambda a, b: (a, pd.concat([b, b.head(1)])), {}), (lambda a, b: (a.head(0), b.head(0)), {}),
    (lambda a, b: (a, b), {"slices": ("colour",)}), (lambda a, b: (a, b), {"others": {"recent": (a, b.head(3)) for a, b in [frames(1, 1)]}})])
def test_what_cannot_be_compared_is_refused(spoil, options):
    with pytest.raises(InputError): gate(*spoil(*frames(3, 8)), **options)


def test_the_bootstrap_agrees_with_theory():
    before, after = np.arange(400) >= 80, np.arange(400) >= 64
    after[-8:] = False
    low, high = paired_bootstrap(before, after)
    spread = np.sqrt(24 / 400 - 0.02**2) / 20
    assert low == pytest.approx(0.02 - 1.96 * spread, abs=0.004) and high == pytest.approx(0.02 + 1.96 * spread, abs=0.004)


# ---- a round, with the training itself replaced: that is chapter 05's to test

@pytest.fixture
def scene(seen, tiny_bundle, tmp_path, monkeypatch):
    "A run of 8 sealed pictures, a registry with a champion, a store; a challenger that is trained in no time."
    store, made = seen
    run = Run(tmp_path / "runs" / "first")
    run.write_json("problem.json", {"question": "?", "labels": ["cat", "dog"]})
    rows = [(b, l, "train" if i < 12 else "valid" if i < 16 else "test") for i, (_, b, l) in enumerate(shades(24, start=30))]
    (tmp_path / "data").mkdir()
    for b, _, _ in rows: (tmp_path / "data" / f"{sha256_of(b)}.png").write_bytes(b)
    run.save_manifest(pd.DataFrame([{"path": str(tmp_path / "data" / f"{sha256_of(b)}.png"), "label": l, "split": s, "sha256": sha256_of(b),
                                     "width": 60, "height": 40, "source": "folder"} for b, l, s in rows]))
    run.write_json("seal.json", {"opened": []})
    registry = Registry(tmp_path / "registry")
    learner = tmp_path / "learner"
    write_json(learner / "learner.json", {"lr": 1})
    registry.promote(registry.add(tiny_bundle, learner=learner))
    def train(child, learner, epochs, lr, weight, seed): child.write_json("learner/learner.json", {"lr": lr, "from": str(learner), "history": []})
    def tested(worse):
        def both(run, child, bundle):
            child.write_json("seal.json", {"opened": []})
            run.write_json("seal.json", {"opened": [1, 2]})
            child.write_json("evaluation.json", {"accuracy": 1})
            write_tiny_bundle(child / "bundle", threshold=0.7)
            return frames(40 if worse else 1, 1)
        return both
    monkeypatch.setattr(retraining, "_train_challenger", train)
    monkeypatch.setattr(retraining, "_tested", tested(False))
    return run, store, registry, made, lambda: monkeypatch.setattr(retraining, "_tested", tested(True))


def test_a_round_promotes_with_lineage_and_leaves_the_test_split_alone(scene):
    run, store, registry, made, _ = scene
    for _, b, label in made[:8]: tell(store, b, label)
    got = retrain(run, store, registry, at_least=5)
    assert got.version == registry.champion == "v0002" and got.added == 8 and got.openings == 2
    assert got.run.path == run.path.with_name("first-2")
    about = read_json(registry.path / "v0002" / "lineage.json")
    assert about["parent"] == "v0001" and about["settings"]["lr"] == 2e-3 and "history" not in about["settings"]
    assert (registry.path / "v0002" / "learner").is_dir() and "Promoted" in about["gate"]
    old, new = run.manifest(), got.run.manifest()
    test = lambda df: set(df.loc[df["split"] == "test", "sha256"])
    assert test(old) == test(new) and len(new) == len(old) + 8
    added = new[new["source"] == "feedback"]
    assert added["split"].value_counts().to_dict() == {"train": 6, "valid": 2} and set(added.loc[added["split"] == "valid", "label"]) == {"cat", "dog"}


def test_a_refused_challenger_changes_nothing(scene):
    run, store, registry, made, make_worse = scene
    make_worse()
    for _, b, label in made[:8]: tell(store, b, label)
    got = retrain(run, store, registry, at_least=5)
    assert got.version is None and registry.champion == "v0001" and registry.names() == ["v0001"] and "Refused" in repr(got)


def test_trusted_recent_pictures_are_never_learned_from(scene):
    run, store, registry, made, _ = scene
    for _, b, label in made: tell(store, b, label)
    recent, _ = new_pictures(store, ("cat", "dog"))
    got = retrain(run, store, registry, at_least=5, recent=recent.head(3))
    assert got.added == 7 and not set(recent.head(3)["sha256"]) & set(got.run.manifest()["sha256"])
    assert got.gate.slices["slice"].tolist() == ["recent"]


def test_what_is_wrong_is_said_before_anything_is_written(scene, tiny_bundle, tmp_path):
    run, store, registry, made, _ = scene
    with pytest.raises(InputError, match="20 new labelled"): retrain(run, store, registry)
    for _, b, label in made[:8]: tell(store, b, label)
    with pytest.raises(InputError, match="a champion"): retrain(run, store, Registry(tmp_path / "none"), at_least=5)
    with pytest.raises(InputError, match="scratch"): retrain(run, store, registry, at_least=5, start="zero")
    bare = Registry(tmp_path / "bare")
    bare.promote(bare.add(tiny_bundle))
    with pytest.raises(InputError, match="only its bundle"): retrain(run, store, bare, at_least=5)
    assert not run.path.with_name("first-2").exists() and registry.names() == ["v0001"]
    retrain(run, store, registry, at_least=5, out=tmp_path / "out")
    with pytest.raises(InputError, match="a new folder"): retrain(run, store, registry, at_least=5, out=tmp_path / "out")


# ---- the exercises' checks

@pytest.mark.parametrize("answer, passed, words", [
    (["A", "B", "E"], True, "right"), ("ABE", True, "right"), (["A", "B", "C", "E"], False, "0.030"), (["A", "D"], False, "tabbies"), (["A", "E"], False, "strict"),
    (["A", "B"], False, "chance"), (["B"], False, "A is better"), (["Z"], False, "letters"), (None, None, "not attempted")])
def test_exercise_1(answer, passed, words):
    got = check("14.1", answer)
    assert got.passed is passed and words in got.message


def _right(before, after, draws, rng):
    picks = (rng.integers(len(before), size=len(before)) for _ in range(draws))
    return np.array([after[i].mean() - before[i].mean() for i in picks])


@pytest.mark.parametrize("answer, passed, words", [
    (_right, True, "right"),
    (lambda b, a, d, r: -_right(b, a, d, r), False, "sign"),
    (lambda b, a, d, r: 400 * _right(b, a, d, r), False, "counts"),
    (lambda b, a, d, r: _right(b, a, d, r).mean(), False, "array"),
    (lambda b, a, d, r: np.full(d, a.mean() - b.mean()), False, "with replacement"),
    (lambda b, a, d, r: np.array([r.choice(a, len(a)).mean() - r.choice(b, len(b)).mean() for _ in range(d)]), False, "separately"),
    (lambda b, a, d, r: None, None, "not attempted")])
def test_exercise_2(answer, passed, words):
    got = check("14.2", answer)
    assert got.passed is passed and words in got.message


def test_a_new_picture_that_is_nearly_a_test_picture_is_left_out(tmp_path):
    from dlpipe_nb.collection import draw_pets
    from dlpipe_nb.retraining import _apart
    df = draw_pets(tmp_path / "pets", 8, size=64).assign(split=["test"] * 4 + ["train"] * 4)
    paths = []
    for i in (0, 5):
        paths.append((tmp_path / f"again {i}.jpg").as_posix())
        Image.open(df["path"][i]).resize((80, 80)).save(paths[-1], quality=80)
    new = pd.DataFrame({"path": paths, "label": df["label"][[0, 5]].to_list(), "sha256": [sha256_of(p) for p in paths]})
    kept, left_out = _apart(new, pd.DataFrame(columns=["sha256", "said", "reason"]), df)
    assert kept["path"].tolist() == paths[1:] and left_out["sha256"].tolist() == [new["sha256"][0]]
    assert "test picture" in left_out["reason"][0] and left_out["said"][0] == df["label"][0]
