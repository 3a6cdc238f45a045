"Chapter 08: damage at five strengths, behavioural tests, and pictures from elsewhere."
import io
import sys
import types

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dlpipe_nb import testing
from dlpipe_nb.collection import draw_factors, draw_pet
from dlpipe_nb.core import InputError, Run, seal, sha256_of
from dlpipe_nb.problem import define_into, interval
from dlpipe_nb.testing import (ALLOWED, INVARIANCES, STRESSES, behaviour, corrupt, easy_pets, open_seal, plot_stress, redraw, stress,
                               stress_sheet, twins)

PET = np.asarray(draw_pet(draw_factors(1, 5).iloc[0]))


# ---- damage

@pytest.mark.parametrize("kind", STRESSES)
def test_damage_grows_with_strength_and_leaves_size_and_type(kind):
    far = []
    for strength in range(6):
        a = corrupt(PET, kind, strength, 3)
        assert a.shape == PET.shape and a.dtype == np.uint8
        far.append(np.abs(a.astype(float) - PET).mean())
    assert far[0] == 0 and far[1] > .5
    if kind == "rotation": assert min(far[1:]) > 5          # a picture turned by 90 degrees isn't further off than by 60
    else: assert far == sorted(far) and far[5] > 2 * far[1]


@pytest.mark.parametrize("kind", STRESSES)
def test_damage_is_the_same_for_the_same_seed_only(kind):
    assert (corrupt(PET, kind, 3, 1) == corrupt(PET, kind, 3, 1)).all()
    others = [(corrupt(PET, kind, 3, s) != corrupt(PET, kind, 3, 1)).any() for s in range(2, 9)]
    assert any(others) == (kind in ("noise", "rotation", "occlusion"))


@given(st.integers(9, 40), st.integers(9, 40), st.sampled_from(sorted(STRESSES)), st.integers(1, 5), st.integers(0, 2**32))
def test_damage_works_for_any_shape(h, w, kind, strength, seed):
    a = np.random.default_rng(seed).integers(0, 256, (h, w, 3), np.uint8)
    before = a.copy()
    out = corrupt(a, kind, strength, seed)
    assert out.shape == a.shape and out.dtype == np.uint8 and (a == before).all(), "the picture given is left as it was"


def test_damage_is_what_its_unit_says():
    grey = np.full((100, 100, 3), 127, np.uint8)
    white = np.full((100, 100, 3), 200, np.uint8)
    for strength, share in enumerate(STRESSES["occlusion"][1], 1):
        assert (corrupt(white, "occlusion", strength, 4) == 127).all(axis=2).mean() == pytest.approx(share / 100, abs=.02)
    for strength, left in enumerate(STRESSES["darkness"][1], 1):
        assert corrupt(white, "darkness", strength).mean() == pytest.approx(200 * left / 100, abs=1)
    for strength, much in enumerate(STRESSES["noise"][1][:3], 1):
        assert corrupt(grey, "noise", strength, 4).std() == pytest.approx(much / 100 * 255, rel=.03)
    turned = corrupt(PET, "rotation", 5, 0)
    assert any(np.abs(turned[8:-8, 8:-8].astype(int) - np.rot90(PET, k)[8:-8, 8:-8]).mean() < 12 for k in (1, 3))
    data = io.BytesIO()
    Image.fromarray(PET).save(data, "JPEG", quality=STRESSES["JPEG"][1][2])
    assert (corrupt(PET, "JPEG", 3) == np.asarray(Image.open(data))).all()


def test_occlusion_grows_where_it_is():
    covered = [(corrupt(np.zeros_like(PET), "occlusion", s, 11) == 127).all(axis=2) for s in range(1, 6)]
    assert all((small & large).any() for small, large in zip(covered, covered[1:]))


@pytest.mark.parametrize("kind,strength", [("rain", 1), ("blur", 6), ("blur", -1), ("blur", 1.5), ("blur", True), ("blur", "1")])
def test_corrupt_refuses(kind, strength):
    with pytest.raises(InputError): corrupt(PET, kind, strength)


# ---- stress

@pytest.fixture(scope="module")
def bright(tmp_path_factory):
    "Forty pictures: 'day' is bright, 'dusk' is not."
    folder, rng, rows = tmp_path_factory.mktemp("light"), np.random.default_rng(0), []
    for i in range(40):
        day = i % 2 == 0
        Image.fromarray(rng.integers(*((150, 250) if day else (40, 90)), (32, 32, 3), np.uint8)).save(folder / f"{i}.png")
        rows.append((str(folder / f"{i}.png"), "day" if day else "dusk"))
    return pd.DataFrame(rows, columns=["path", "label"])


def by_light(x):
    "Tells day from dusk by the mean."
    day = (x.reshape(len(x), -1).mean(1) > 120).astype(float)
    return np.stack([day, 1 - day], 1)


LIGHT = dict(labels=("day", "dusk"), size=32)


def test_stress_measures_what_breaks(bright):
    t = stress(by_light, bright, **LIGHT)
    assert list(t.columns) == ["kind", "strength", "n", "right", "accuracy", "low", "high"] and len(t) == 31
    assert t.kind[0] == "none" and t.accuracy[0] == 1 and set(t.kind[1:]) == set(STRESSES)
    dark = t[t.kind == "darkness"].set_index("strength").accuracy
    assert dark[5] == .5 and t[t.kind.isin(("blur", "JPEG", "noise"))].accuracy.eq(1).all()
    assert all((r.low, r.high) == interval(r.right, r.n) and r.accuracy == r.right / r.n for r in t.itertuples())
    again = stress(by_light, bright, ["darkness"], [5], **LIGHT)
    assert again.accuracy.tolist() == [1, .5]


def test_the_damage_of_a_picture_does_not_depend_on_the_others(bright):
    seen = []
    def spy(x):
        seen.append(x)
        return by_light(x)
    stress(spy, bright, ["noise"], [2], **LIGHT)
    stress(spy, bright.head(5), ["noise"], [2], **LIGHT)
    assert (seen[1][:5] == seen[3]).all()


BAD = {"no model": lambda df: stress(None, df, **LIGHT), "no labels": lambda df: stress(by_light, df, size=32), "no size": lambda df: stress(by_light, df, labels=("day", "dusk")),
       "no pictures": lambda df: stress(by_light, df.head(0), **LIGHT), "a strange label": lambda df: stress(by_light, df.assign(label="noon"), **LIGHT),
       "a strange kind": lambda df: stress(by_light, df, ["rain"], **LIGHT), "a strange strength": lambda df: stress(by_light, df, ["blur"], [9], **LIGHT),
       "the wrong shape": lambda df: stress(lambda x: by_light(x)[:, :1], df, **LIGHT), "NaN": lambda df: stress(lambda x: by_light(x) * np.nan, df, **LIGHT),
       "no label column": lambda df: stress(by_light, df[["path"]], **LIGHT), "no pictures and no pets": lambda df: behaviour(by_light, **LIGHT),
       "a share above 1": lambda df: behaviour(by_light, df, allowed={"invariance": 5}, **LIGHT), "a strange kind of test": lambda df: behaviour(by_light, df, allowed={"speed": .1}, **LIGHT),
       "a change of shape": lambda df: behaviour(by_light, df, changes={"cut": lambda a, dice: a[1:]}, **LIGHT),
       "a change of type": lambda df: behaviour(by_light, df, changes={"half": lambda a, dice: a / 2}, **LIGHT)}


@pytest.mark.parametrize("case", BAD)
def test_stress_and_behaviour_refuse(case, bright):
    with pytest.raises(InputError) as e: BAD[case](bright)
    assert e.value.expected and e.value.found and e.value.next_step


def test_figures(bright):
    t = stress(by_light, bright, ["blur", "noise", "JPEG", "darkness"], [1, 5], **LIGHT)
    titles = [ax.get_title() for ax in plot_stress(t).axes]
    assert titles[:4] == ["blur", "noise", "JPEG", "darkness"]
    sheet = stress_sheet(PET)
    assert len(sheet.axes) == 36 and [ax.get_ylabel().split("\n")[0] for ax in sheet.axes[::6]] == list(STRESSES)


# ---- behaviour

def test_changes_are_small_and_keep_the_picture():
    dice = np.random.default_rng(0)
    for name, change in INVARIANCES.items():
        a = change(PET, dice)
        assert a.shape == PET.shape and a.dtype == np.uint8 and (a != PET).any(), name
    moved = [INVARIANCES["moved by 2 to 4 pixels"](PET, dice) for _ in range(60)]
    seen = set()
    for a in moved:
        fits = [(y, x) for y in range(-5, 6) for x in range(-5, 6)
                if (a[6:-6, 6:-6] == PET[6 + y:90 + y, 6 + x:90 + x]).all()]
        assert len(fits) == 1 and all(2 <= abs(v) <= 4 for v in fits[0])
        seen.add(fits[0])
    assert len(seen) > 20


def test_redrawing_changes_what_was_asked_and_nothing_else():
    pets = draw_factors(4, 7)
    same, cat, dog = redraw(pets), redraw(pets, animal="cat"), redraw(pets, animal="dog")
    assert same.shape == (4, 96, 96, 3) and (same[0] == np.asarray(draw_pet(pets.iloc[0]))).all()
    assert all((same[i] == (cat if a == "cat" else dog)[i]).all() for i, a in enumerate(pets.animal))
    assert ((cat == dog).all(axis=3).mean() > .2) and (cat != dog).any()
    assert easy_pets(5).in_front.eq("nothing").all() and easy_pets(5).turn.eq(0).all()
    assert redraw(pets, 64).shape == (4, 64, 64, 3)


def outcome(model, test, **more):
    t = behaviour(model, labels=("cat", "dog"), size=96, n=6, **more).set_index("test")
    assert list(t.columns) == ["kind", "n", "failed", "rate", "allowed", "passed", "example"]
    assert (t.rate == t.failed / t.n).all() and (t.passed == (t.rate <= t.allowed)).all() and ((t.example == "") == (t.failed == 0)).all()
    return t.loc[test]


def always_cat(x): return np.tile([1., 0.], (len(x), 1))


def by_corner(x):
    "A 'network' that looks at one corner pixel."
    p = (x[:, 0, 0].astype(int).sum(1) % 2).astype(float)
    return np.stack([p, 1 - p], 1)


EASY, ANIMAL = "easy pictures are right", "a cat redrawn as a dog is less of a cat"


def test_a_network_that_always_says_cat_passes_invariance_alone():
    t = behaviour(always_cat, labels=("cat", "dog"), size=96, n=6).set_index("test")
    assert t[t.kind == "invariance"].failed.eq(0).all() and not t.passed[EASY] and t.failed[ANIMAL] == 6


def test_a_network_that_looks_at_a_corner_fails_invariance():
    row = outcome(by_corner, "moved by 2 to 4 pixels")
    assert row.kind == "invariance" and row.failed > 0 and row.example.startswith("draw_seed ")


@pytest.fixture(scope="module")
def drawn():
    "What was drawn, by its bytes: every picture that six cases of the tests ask about."
    ears = [{}, *({"animal": a, "ears": u} for a, u in (("dog", 0.), ("dog", .9), ("cat", 0.), ("cat", 1.)))]
    jobs = [(draw_factors(6, 808), [*ears, {"animal": "cat"}, {"animal": "dog"}]), (easy_pets(6), [{}])]
    return {a.tobytes(): {**r, **f} for rows, changes in jobs for f in changes for a, r in zip(redraw(rows, **f), rows.to_dict("records"))}


@pytest.mark.parametrize("rule,failing", [
    (lambda f: .9 if f["animal"] == "cat" else .1, set()),
    (lambda f: .1 if f["animal"] == "cat" else .9, {EASY, ANIMAL}),
    (lambda f: (.9 if f["animal"] == "cat" else .1) + .09 * f["ears"], {"a dog's ears let down make it no less a dog", "a cat's ears folded make it no more a cat"}),
    (lambda f: (.9 if f["animal"] == "cat" else .1) - .09 * f["ears"], set()),
    (lambda f: .5, {ANIMAL, EASY}),
])
def test_direction_and_minimum_find_what_is_wrong(drawn, rule, failing):
    "A 'network' that knows every drawn pet, and answers by a rule of what was drawn."
    p = lambda x: np.array([rule(drawn[a.tobytes()]) for a in x])
    t = behaviour(lambda x: np.stack([p(x), 1 - p(x)], 1), labels=("cat", "dog"), size=96, n=6, changes={})
    assert set(t[~t.passed].test) == failing and set(t.kind) == {"direction", "minimum"}


def test_allowed_and_changes_are_the_callers(bright):
    t = behaviour(by_light, bright, allowed={"invariance": 1}, changes={"inverted": lambda a, dice: 255 - a}, **LIGHT)
    assert len(t) == 1 and t.rate[0] == 1 and t.passed[0] and t.allowed[0] == 1 and t.example[0] == "0.png" and ALLOWED["invariance"] < 1


def test_stress_into_writes_tables_and_figures(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = Run("runs/two")
    df = pictures(run / "pictures", draw_factors(20, 3)).assign(split=["valid", "train"] * 10, source="drawn")
    run.save_manifest(df)
    learn = types.SimpleNamespace(record={"labels": ["cat", "dog"], "size": 32})
    fake = types.SimpleNamespace(load_learner=lambda folder: learn, probabilities=lambda learn, x: by_light(x))
    monkeypatch.setitem(sys.modules, "dlpipe_nb.training", fake)
    damaged, behaved = testing.stress_into(run, n=6)
    assert damaged.n.eq(6).all() and len(damaged) == 31 and len(behaved) == 7
    assert pd.read_csv(run / "stress.csv").right.tolist() == damaged.right.tolist() and len(pd.read_csv(run / "behaviour.csv")) == 7
    assert all(Image.open(run / "figures" / f"{n}.png").width > 500 for n in ("stress", "stress_sheet"))


# ---- twins, and pictures from elsewhere

def pictures(folder, factors, labels=None, name="{i}.png"):
    rows = []
    for i, r in enumerate(factors.to_dict("records")):
        label = r["label"] if labels is None else labels[i]
        p = folder / label / name.format(i=i)
        p.parent.mkdir(parents=True, exist_ok=True)
        draw_pet(r).save(p)
        rows.append((p.as_posix(), label, sha256_of(p)))
    return pd.DataFrame(rows, columns=["path", "label", "sha256"])


@pytest.fixture
def run(tmp_path, monkeypatch):
    "A run of 24 drawn pets and a 'network' that answers by the file's label, but for every fifth."
    monkeypatch.chdir(tmp_path)
    run = Run("runs/one")
    define_into(run, target=.6)
    df = pictures(run / "pictures", draw_factors(24, 3)).assign(split=(["train"] * 2 + ["valid", "test"]) * 6, source="drawn")
    run.save_manifest(df)
    run.write_json("seal.json", seal(df[df.split == "test"]))
    (run / "learner").mkdir()
    (run / "learner" / "model.safetensors").write_bytes(b"parameters")
    def predict_frame(learn, df):
        said = [l if i % 5 else {"cat": "dog", "dog": "cat"}[l] for i, l in enumerate(df.label)]
        p = np.where(np.array(said) == "cat", .9, .1)
        return pd.DataFrame({"path": df.path, "label": df.label, "predicted": said, "probability": .9, "correct": np.array(said) == df.label, "p_cat": p, "p_dog": 1 - p})
    fake = types.SimpleNamespace(load_learner=lambda folder: "a learner", predict_frame=predict_frame)
    monkeypatch.setitem(sys.modules, "dlpipe_nb.training", fake)
    return run


def crop(src, dest, mirror=False, **save):
    im = Image.open(src).crop((2, 2, 94, 94)).resize((96, 96))
    if mirror: im = im.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    im.save(dest, **save)
    return dest


def test_twins_are_found_to_the_byte_nearly_and_mirrored(run, tmp_path):
    df = run.manifest()
    made = [tmp_path / n for n in ("same.png", "crop.jpg", "mirror.png", "new.png", "broken.png")]
    made[0].write_bytes(open(df.path[0], "rb").read())
    crop(df.path[1], made[1], quality=80)
    Image.open(df.path[2]).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(made[2])
    draw_pet(draw_factors(1, 99).iloc[0]).save(made[3])
    made[4].write_bytes(b"no picture")
    t = twins(pd.DataFrame({"path": map(str, made)}), df).set_index("path")
    assert t.of.to_dict() == {str(made[0]): df.path[0], str(made[1]): df.path[1], str(made[2]): df.path[2]}
    assert t.split.tolist().count("train") == 2 and t.how[str(made[0])] == "the same bytes" and t.alike[str(made[0])] == 1
    assert t.how[str(made[1])].endswith(" alike") and t.how[str(made[2])].endswith(" alike, mirrored")


def test_twins_of_a_picture_that_is_there_twice(run, tmp_path):
    df = run.manifest()
    a = crop(df.path[1], tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(a.read_bytes())
    t = twins(pd.DataFrame({"path": [str(a), str(tmp_path / "b.png")]}), df)
    assert sorted(t.path) == [str(a), str(tmp_path / "b.png")] and set(t.of) == {df.path[1]}
    assert not len(twins(df, df.head(0))) and not len(twins(df.head(0), df))


@pytest.mark.parametrize("mirror,split", [(False, "train"), (True, "valid")])
def test_a_near_duplicate_in_training_breaks_the_seal_and_names_both(run, mirror, split):
    df = run.manifest()
    test, other = df[df.split == "test"].iloc[1], df[df.split == split].iloc[2]
    if mirror: Image.open(test.path).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(other.path)
    else: crop(test.path, other.path)
    run.save_manifest(df.assign(sha256=[sha256_of(p) for p in df.path]))
    before = (run / "seal.json").read_bytes()
    with pytest.raises(testing.SealError) as e: open_seal(run, "abc")
    name = lambda p: p.rsplit("/", 1)[-1]
    assert f"{name(test.path)}, which is nearly {name(other.path)} in {split} (" in str(e.value)
    assert (run / "seal.json").read_bytes() == before


def test_a_file_that_became_a_test_picture_behind_the_manifest_is_found(run):
    df = run.manifest()
    test, other = df[df.split == "test"].iloc[0], df[df.split == "train"].iloc[0]
    open(other.path, "wb").write(open(test.path, "rb").read())
    with pytest.raises(testing.SealError, match="the same bytes"): open_seal(run, "abc")


def test_a_clean_run_opens_though_training_files_are_gone(run):
    import os
    os.remove(run.manifest().query("split == 'train'").path.iloc[0])
    assert len(open_seal(run, "abc")) == 6


def test_test_folder(run, tmp_path):
    ours, df = tmp_path / "from Ana", run.manifest()
    pictures(ours, draw_factors(20, 77))
    crop(df[df.split == "train"].path.iloc[0], ours / "cat" / "known.jpg", quality=85)
    (ours / "dog" / "sealed.png").write_bytes(open(df[df.split == "test"].path.iloc[0], "rb").read())
    (ours / "dog" / "notes.png").write_bytes(b"no picture")
    (ours / "dog" / "twice.png").write_bytes(next((ours / "dog").glob("[0-9]*.png")).read_bytes())
    seal_before = (run / "seal.json").read_bytes()
    got = testing.test_folder(run, ours)
    table, said = got
    assert len(table) == 20 and (said.right, said.total) == (16, 20) and said.target == .6 and "left out" in repr(got)
    why = {p.rsplit("/", 1)[-1]: r for p, r in zip(got.left_out.path, got.left_out.reason)}
    assert why["known.jpg"].startswith("in training: ") and why["sealed.png"].startswith("in the sealed test: the same bytes")
    assert "notes.png" in why and sum("duplicate" in r for r in why.values()) == 1 and len(why) == 4
    assert (run / "seal.json").read_bytes() == seal_before, "it isn't an opening"
    kept = run.manifest(got.file)
    assert kept.correct.sum() == 16 and set(kept) >= {"path", "label", "predicted", "probability", "correct", "p_cat", "p_dog", "sha256"}
    assert all(Image.open(p) for p in kept.path) and len(run.manifest(got.file.replace(".csv", "-left-out.csv"))) == 4
    testing.test_folder(run, ours)
    log = run.read_json("elsewhere.json")
    assert len(log) == 2 and log[0]["folder"] == "from Ana" and log[0]["right"] == 16 and log[0]["left_out"] == 4 and len(log[0]["model"]) == 64


def test_two_folders_of_one_name_do_not_overwrite_each_other(run, tmp_path):
    files = set()
    for k in (1, 2):
        pictures(tmp_path / str(k) / "pets", draw_factors(12, 70 + k))
        files.add(testing.test_folder(run, tmp_path / str(k) / "pets").file)
    assert len(files) == 2 and all((run / f).exists() for f in files)


def test_a_folder_called_drawn_is_a_folder(run, tmp_path):
    pictures(tmp_path / "drawn", draw_factors(12, 71))
    assert len(testing.test_folder(run, "drawn").table) == 12


@pytest.mark.parametrize("make,words", [
    (lambda f, df: None, "nothing at"),
    (lambda f, df: pictures(f, draw_factors(6, 5), ["cat", "rabbit"] * 3), "some labelled rabbit"),
    (lambda f, df: pictures(f, draw_factors(6, 5), ["Cat", "dog"] * 3), "some labelled Cat"),
    (lambda f, df: pictures(f, draw_factors(6, 5), ["cat"] * 6), "only one class"),
    (lambda f, df: [crop(p, (f / l).mkdir(parents=True, exist_ok=True) or f / l / f"{i}.png") for i, (p, l) in enumerate(zip(df.path, df.label))], "none among 24"),
])
def test_test_folder_refuses_and_writes_nothing(run, tmp_path, make, words):
    make(tmp_path / "elsewhere", run.manifest())
    before = sorted(run.path.rglob("*"))
    with pytest.raises(InputError, match=words): testing.test_folder(run, tmp_path / "elsewhere")
    assert sorted(run.path.rglob("*")) == before
