"""What the drawn pets promise: the same from the same seed, no shortcut among their factors, faults with a true key."""
import os

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageOps

from dlpipe_nb.collection import draw_factors, draw_pet, draw_pets
from dlpipe_nb.core import InputError, open_picture, read_json

NOT_NUISANCE = {"label", "animal", "draw_seed"}
KINDS = ["corrupt", "zero_byte", "blank", "wrong_label", "sideways", "wrong_extension", "duplicate", "near_duplicate",
         "label_conflict"]


@pytest.fixture(scope="module")
def factors():
    return draw_factors(1800, seed=1)


def test_at_least_twelve_independent_factors(factors):
    varied = [c for c in factors if c not in NOT_NUISANCE and factors[c].nunique() > 1]
    assert len(varied) >= 12
    numbers = factors[varied].drop(columns=["age_years", "weight_kg"]).apply(
        lambda c: c if c.dtype.kind in "if" else pd.factorize(c)[0])
    related = numbers.corr().abs().to_numpy()
    assert related[~np.eye(len(related), dtype=bool)].max() < 0.12


def test_cats_and_dogs_are_equally_many(factors):
    assert factors["label"].value_counts().to_dict() == {"cat": 900, "dog": 900}
    assert (factors["label"] == factors["animal"]).all()
    assert (factors["label"].to_numpy()[1:] != factors["label"].to_numpy()[:-1]).mean() < 0.9, "the order gives the label away"


def one_hot(column):
    "Numbers and their squares, or a column a value."
    if column.dtype.kind in "if":
        z = column.fillna(column.mean())
        z = ((z - z.mean()) / z.std()).to_numpy()[:, None]
        return np.hstack([z, z**2, z**3, column.isna().to_numpy()[:, None]])
    return pd.get_dummies(column).to_numpy(float)


def nearness(factors, column):
    "Cross-validated accuracy of guessing the animal from one factor."
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import cross_val_score
    return cross_val_score(LogisticRegression(), one_hot(factors[column]), factors["label"], cv=5).mean()


def test_no_single_factor_gives_the_label_away(factors):
    columns = [c for c in factors if c not in NOT_NUISANCE and factors[c].nunique() > 1]
    accuracy = pd.Series({c: nearness(factors, c) for c in columns})
    assert accuracy.max() < 0.56, accuracy.sort_values().tail()
    assert nearness(factors, "animal") == 1, "the yardstick itself must see a giveaway"


def test_nor_do_all_factors_together(factors):
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.model_selection import cross_val_score
    columns = [c for c in factors if c not in NOT_NUISANCE and factors[c].nunique() > 1]
    X = np.hstack([one_hot(factors[c]) for c in columns])
    forest = RandomForestClassifier(60, min_samples_leaf=5, random_state=0)
    assert cross_val_score(forest, X, factors["label"], cv=5).mean() < 0.56


def test_rows_depend_on_seed_and_index_only(factors):
    assert draw_factors(50, seed=1).equals(factors.head(50))
    assert not draw_factors(50, seed=2).equals(factors.head(50))


def test_factors_are_the_same_everywhere():
    row = draw_factors(8, seed=1).iloc[7]
    kept = ["animal", "pose", "coat", "pattern", "background", "ears", "x", "draw_seed"]
    assert row[kept].to_list() == ["cat", "sitting", "black", "tuxedo", "meadow", 0.227, 0.058, 787941550]


def test_the_same_factors_give_the_same_pixels_also_after_a_csv(tmp_path, factors):
    few = factors.head(6)
    few.to_csv(tmp_path / "few.csv", index=False)
    again = pd.read_csv(tmp_path / "few.csv")
    for (_, a), (_, b), c in zip(few.iterrows(), again.iterrows(), few.to_dict("records")):
        first = np.asarray(draw_pet(a))
        assert (first == np.asarray(draw_pet(b))).all() and (first == np.asarray(draw_pet(c))).all()


@pytest.mark.parametrize("size", [16, 33, 96, 300])
def test_any_size(size, factors):
    for row in factors.head(3).to_dict("records"):
        im = draw_pet(row, size)
        assert im.size == (size, size) and im.mode == "RGB"


def test_a_picture_looks_the_same_at_another_size(factors):
    row = {**factors.iloc[3], "noise": 0.0}
    small = np.asarray(draw_pet(row, 64), float)
    large = np.asarray(draw_pet(row, 256).resize((64, 64), Image.Resampling.BOX), float)
    assert np.abs(small - large).mean() < 8


def test_the_animal_alone_changes_the_face_and_not_the_scene(factors):
    row = {**factors[factors["pose"] == "face"].iloc[0], "noise": 0.0, "in_front": "nothing"}
    cat, dog = (np.asarray(draw_pet({**row, "animal": a}), float) for a in ("cat", "dog"))
    changed = np.abs(cat - dog).max(2) > 30
    assert 0.05 < changed.mean() < 0.6
    assert not changed[:, :3].all(), "the background must stay"


@pytest.mark.parametrize("change", [{"pose": "flying"}, {"coat": "tartan"}, {"animal": "horse"}])
def test_unknown_values_are_named(change, factors):
    with pytest.raises(InputError, match=next(iter(change))): draw_pet({**factors.iloc[0], **change})


def test_a_row_that_lacks_factors_is_refused():
    with pytest.raises(InputError, match="pose"): draw_pet({"animal": "cat"})


@pytest.mark.parametrize("knobs", [{"nigth": 1}, {"night": 2}, {"fox": -0.1}, {"fox": "all"}])
def test_bad_knobs_are_refused_and_nothing_is_made(knobs, tmp_path):
    with pytest.raises(InputError): draw_pets(tmp_path / "new", n=4, knobs=knobs)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("faults", [{"mould": 1}, {"blank": -1}, {"blank": 1.5}, 100])
def test_bad_faults_are_refused_and_nothing_is_made(faults, tmp_path):
    with pytest.raises(InputError): draw_pets(tmp_path / "new", n=20, faults=faults)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("wrong", [dict(n=0), dict(n=2.5), dict(n="many"), dict(seed=-1), dict(size=8), dict(size=10**5)])
def test_bad_numbers_are_refused_and_nothing_is_made(wrong, tmp_path):
    with pytest.raises(InputError): draw_pets(tmp_path / "new", **{"n": 4, **wrong})
    assert not (tmp_path / "new").exists()


def test_a_knob_leaves_other_pictures_alone():
    usual, night = draw_factors(300, 4), draw_factors(300, 4, {"night": 0.5})
    dark = night["hour"] == "night"
    assert 0.35 < dark.mean() < 0.65
    assert night[~dark].equals(usual[~dark])
    assert night.drop(columns="hour").equals(usual.drop(columns="hour"))


def test_each_knob_does_what_it_says():
    for knob, column, value in [("night", "hour", "night"), ("camera", "camera", "other"), ("breed", "breed", "new"),
                                ("fox", "label", "fox"), ("empty", "label", "empty")]:
        assert (draw_factors(20, 1, {knob: 1})[column] == value).all()
        assert not (draw_factors(20, 1)[column] == value).any()
    dark, light = (np.mean([np.asarray(draw_pet(r)).mean() for r in draw_factors(12, 1, k).to_dict("records")])
                   for k in ({"night": 1}, {}))
    assert dark < 0.6 * light


def test_a_set_is_reused_continued_and_the_same(tmp_path):
    first = draw_pets(tmp_path / "set", n=6, seed=3)
    assert list(first.columns[:7]) == ["path", "label", "split", "sha256", "width", "height", "source"]
    times = {p: os.stat(p).st_mtime_ns for p in first["path"]}
    assert draw_pets(tmp_path / "set", n=6, seed=3).equals(first)
    assert times == {p: os.stat(p).st_mtime_ns for p in first["path"]}, "drawn again for nothing"
    for p in first["path"][:3]: os.remove(p)
    (tmp_path / "set" / "factors.csv").unlink()
    assert draw_pets(tmp_path / "set", n=6, seed=3).equals(first)
    assert draw_pets(tmp_path / "other", n=6, seed=3)["sha256"].equals(first["sha256"])


def test_many_cores_draw_the_same_as_one(tmp_path):
    many = draw_pets(tmp_path / "many", n=104, seed=3, size=32)
    few = draw_pets(tmp_path / "few", n=6, seed=3, size=32)
    assert many["sha256"].head(6).equals(few["sha256"]) and len(many) == 104


@pytest.mark.parametrize("settings", [dict(n=8), dict(seed=2), dict(size=32), dict(knobs={"night": 1}), dict(faults=1)])
def test_another_set_in_the_folder_is_left_alone(settings, tmp_path):
    draw_pets(tmp_path, n=12, seed=1, size=16)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(InputError, match="another"): draw_pets(tmp_path, **{"n": 12, "seed": 1, "size": 16, **settings})
    assert before == {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}


def test_other_contents_are_left_alone(tmp_path):
    (tmp_path / "holiday.txt").write_text("precious")
    with pytest.raises(InputError, match="holiday.txt"): draw_pets(tmp_path, n=4)
    with pytest.raises(InputError, match="file"): draw_pets(tmp_path / "holiday.txt", n=4)
    assert [p.name for p in tmp_path.rglob("*")] == ["holiday.txt"]


@pytest.fixture(scope="module")
def dirty(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dirty")
    df = draw_pets(folder, n=60, seed=3, faults=2)
    return folder, df, pd.read_csv(folder / "faults_key.csv", keep_default_na=False)


def test_the_key_lists_each_fault(dirty):
    folder, df, key = dirty
    assert key["fault"].value_counts().to_dict() == dict.fromkeys(KINDS, 2)
    assert len(df) == 66 and key["path"].is_unique and all((folder / p).exists() for p in key["path"])
    assert "fault" not in df and "true_label" not in df


def test_the_faults_are_what_the_key_says(dirty):
    folder, df, key = dirty
    by_path = df.assign(path=[os.path.relpath(p, folder).replace(os.sep, "/") for p in df["path"]]).set_index("path")
    for path, fault, of, true in key[["path", "fault", "of", "true_label"]].itertuples(index=False):
        file, label = folder / path, by_path.at[path, "label"]
        assert path.startswith(label + "/")
        if fault in ("corrupt", "zero_byte"):
            with pytest.raises(InputError): open_picture(file)
            continue
        im = open_picture(file)
        if fault == "blank": assert np.asarray(im).std() < 3
        if fault in ("wrong_label", "label_conflict"): assert label != true == by_path.at[path, "animal"]
        if fault == "wrong_extension": assert Image.open(file).format == "PNG" and path.endswith(".jpg")
        if fault in ("duplicate", "label_conflict"): assert file.read_bytes() == (folder / of).read_bytes()
        if fault == "near_duplicate":
            assert file.read_bytes() != (folder / of).read_bytes()
            near = [np.asarray(ImageOps.grayscale(open_picture(f)).resize((8, 8)), float).ravel() for f in (file, folder / of)]
            assert np.corrcoef(near)[0, 1] > 0.95
        if fault == "sideways":
            upright = np.asarray(draw_pet(by_path.loc[path]), float)
            assert np.abs(np.asarray(im, float) - upright).mean() < 12, "EXIF must turn it upright"
            assert np.abs(np.asarray(Image.open(file), float) - upright).mean() > 12, "the stored pixels must lie on their side"


def test_clean_pictures_of_a_dirty_set_are_those_of_a_clean_set(dirty, tmp_path):
    _, df, key = dirty
    clean = draw_pets(tmp_path, n=60, seed=3)
    both = set(df["sha256"]) & set(clean["sha256"])
    assert len(both) == 60 - 2 * 5, "all but corrupt, zero_byte, blank, sideways and wrong_extension"


def test_facts_have_gaps_and_sensible_values(factors):
    for c, low, high in [("age_years", 0.2, 18), ("weight_kg", 0.5, 9)]:
        assert 0.03 < factors[c].isna().mean() < 0.15
        assert factors[c].min() >= low and factors[c].max() <= high


def test_the_stamp_says_what_the_folder_holds(tmp_path):
    draw_pets(tmp_path, n=4, seed=9, size=24, knobs={"night": 1})
    stamp = read_json(tmp_path / "drawn.json")
    assert (stamp["n"], stamp["seed"], stamp["size"], stamp["knobs"]) == (4, 9, 24, {"night": 1})


def test_pixels_are_hard_and_hand_made_features_are_better(tmp_path):
    "A smaller sibling of benchmarks/difficulty.py."
    from dlpipe_nb.features import fit_baseline, hand_features, pixel_features
    df = draw_pets(tmp_path, n=600, seed=1)
    train, y = np.arange(600) < 420, df["label"].to_numpy()
    pixels, hand = (fit_baseline(X[train], y[train]).score(X[~train], y[~train]) for X in (pixel_features(df), hand_features(df)))
    assert pixels <= 0.75
    assert hand >= pixels + 0.08
