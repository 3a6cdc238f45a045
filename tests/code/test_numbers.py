"""The shelter's forms, reading them, outliers, gaps, and tables that learn from the training rows only."""
from __future__ import annotations

import ast
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlpipe_nb import preprocessing
from dlpipe_nb.collection import draw_factors, intake_key, intake_records
from dlpipe_nb.core import InputError, check
from dlpipe_nb.preprocessing import (encode_rows, fences, make_table, parse_age, parse_choice, parse_date, parse_quantity,
                                     parse_weight, read_intake, set_aside)

KG = dict(kg=1, g=.001, lb=.45359237)


@pytest.fixture(scope="module")
def pets(): return draw_factors(900, seed=1)


@pytest.fixture(scope="module")
def table(pets):
    "Read, cleaned by the training rows, and split."
    t = read_intake(intake_records(pets))[0]
    t["split"] = np.random.default_rng(0).choice(["train", "valid", "test"], len(t), p=[.6, .2, .2])
    train = t["split"] == "train"
    for c, possible in (("age", (0, 30)), ("weight", (.05, 120))): t[c], _ = set_aside(t[c], fences(t.loc[train, c]), possible)
    return t


def refused(f, *args, **kwargs):
    "What the `InputError` of a call says."
    with pytest.raises(InputError) as e: f(*args, **kwargs)
    return str(e.value)


# ---- the forms

def test_a_form_depends_on_its_pet_and_the_seed_only(pets):
    forms, before = intake_records(pets), pets.copy()
    some = pets.sample(frac=.3, random_state=1).assign(path="renamed.jpg")
    got = intake_records(some).set_index("draw_seed")
    assert got.equals(forms.set_index("draw_seed").loc[some["draw_seed"]])
    assert intake_records(pets).equals(forms) and not intake_records(pets, seed=2).equals(forms)
    assert pets.equals(before)


def test_a_pet_with_two_pictures_has_one_form(pets):
    twice = pd.concat([pets, pets.head(5)], ignore_index=True)
    assert intake_records(twice).equals(intake_records(pets)) and intake_key(twice).equals(intake_key(pets))


def test_forms_survive_a_csv_file(pets, tmp_path):
    forms = intake_records(pets.head(200))
    forms.to_csv(tmp_path / "forms.csv", index=False)
    back = pd.read_csv(tmp_path / "forms.csv", dtype={c: str for c in forms.columns[1:]}, keep_default_na=False)
    assert back.equals(forms)


@pytest.mark.parametrize("seed", range(1, 4))
def test_the_forms_are_as_dirty_as_promised(seed):
    pets = draw_factors(1200, seed=seed)
    forms, key = intake_records(pets, seed), intake_key(pets, seed)
    assert (forms["draw_seed"] == key["draw_seed"]).all()
    gap = key["weight_says"].isna().groupby([pets["animal"], key["type"]]).mean()
    assert gap["dog", "stray"] > gap["cat", "stray"] > gap["cat", "transfer"], "weights are missing by cause"
    assert gap["dog", "stray"] > max(gap["dog", "transfer"], gap["dog", "surrender"]) + .15
    yes = forms["adopted"].eq("yes").groupby(key["weight_says"].isna()).mean()
    assert yes[False] - yes[True] > .2, "a missing weight tells about the answer"
    assert {"impossible", "ten times", "unknown"} <= set(key["weight_fault"]) and {"impossible", "unknown"} <= set(key["age_fault"])
    assert {"99", "?", "", "unknown"} <= set(forms["age"]) and forms["weight"].str.contains("lb").any()
    assert forms["age"].str.contains(",").any() and forms["date"].str.contains(r"\.").any()
    assert key["age_years"].equals(pets["age_years"]) and key["weight_kg"].equals(pets["weight_kg"])
    good = (key["weight_fault"] == "") & (key["age_fault"] == "")
    assert (key["weight_says"] - key["weight_kg"])[good].abs().max() < .06 and (key["age_says"] - key["age_years"])[good].abs().max() <= .51


def test_pets_that_were_not_drawn_have_no_forms(pets):
    assert "age_years" in refused(intake_records, pets.drop(columns="age_years"))
    assert "draw_seed" in refused(intake_key, pd.DataFrame(dict(path=["a.jpg"], label=["cat"])))
    assert "no rows" in refused(intake_records, pets.head(0))
    assert "without one" in refused(intake_records, pets.assign(draw_seed=pets["draw_seed"].where(pets.index > 3)))
    for seed in (-1, 1.5, True, "1"): assert "seed" in refused(intake_records, pets, seed)


# ---- reading

@pytest.mark.parametrize("seed", range(1, 4))
def test_reading_agrees_with_the_key(seed):
    pets = draw_factors(1000, seed=seed)
    forms, key = intake_records(pets, seed), intake_key(pets, seed)
    before = forms.copy()
    got, report = read_intake(forms)
    for c in ("age", "weight"):
        assert np.isclose(got[c], key[f"{c}_says"], atol=.005, equal_nan=True).mean() >= .98
        assert got[c].isna().sum() == (report["column"] == c).sum(), "a gap for each report, a report for each gap"
    assert (got["type"] == key["type"]).all() and (got["date"].astype(str) == key["date"]).all()
    assert set(got["sex"].dropna()) == set("mfn") and forms.equals(before)
    assert set(report["reason"]) == {"empty", "says unknown"}


@pytest.mark.parametrize("cell, years", [
    ("3 y", 3), ("18 months", 1.5), ("2 yrs", 2), ("pup", .5), (7, 7), ("7", 7), ("0,5", .5), ("1 y 6 m", 1.5), ("1y6m", 1.5), ("3 Y.", 3),
    (" 2.5 years ", 2.5), ("８ y", 8), (np.float32(2.5), 2.5), (np.int64(4), 4), ("26 wk", 26 * 7 / 365.25), (".5", .5), ("2019", 2019)])
def test_an_age_is_read(cell, years):
    values, report = parse_age(pd.Series([cell], dtype=object))
    assert values[0] == pytest.approx(years, abs=1e-6) and not len(report)


@pytest.mark.parametrize("cell, reason", [
    ("?", "says unknown"), ("99", "says unknown"), (99, "says unknown"), (99., "says unknown"), ("Unknown", "says unknown"), ("", "empty"),
    ("   ", "empty"), (None, "empty"), (np.nan, "empty"), (pd.NA, "empty"), ("old", "not a number"), ("-3", "not a number"), (-3., "not a number"),
    ("3-4 y", "not a number"), ("3 4", "not a number"), ("1.200,5", "not a number"), ("½", "not a number"), ("3/4", "not a number"),
    (np.inf, "not a number"), ("3 moons", "no unit called 'moons'"), ("1,250", "thousands or decimals?"), ("12,500 days", "thousands or decimals?")])
def test_what_is_no_age_is_reported_with_its_reason(cell, reason):
    values, report = parse_age(pd.Series([cell], index=["here"], dtype=object))
    assert np.isnan(values["here"]) and report["row"].tolist() == ["here"] and report["reason"].tolist() == [reason]


@given(st.floats(.01, 90), st.sampled_from([("kg", 1), ("g", .001), ("lb", .45359237), ("OZ", .45359237 / 16), ("", 1)]),
       st.sampled_from(["", " ", "  "]), st.sampled_from(".,"), st.integers(0, 2))
@settings(max_examples=150, deadline=None)
def test_a_weight_is_read_however_it_is_written(value, unit, space, mark, digits):
    text = f"{value:.{digits}f}"
    got, report = parse_weight(pd.Series([text.replace(".", mark) + space + unit[0]]))
    assert got[0] == pytest.approx(float(text) * unit[1]) and not len(report)


@given(st.lists(st.one_of(st.text(max_size=12), st.floats(), st.integers(), st.none()), max_size=12))
@settings(max_examples=150, deadline=None)
def test_no_cell_is_dropped_in_silence(cells):
    column = pd.Series(cells, index=range(5, 5 + len(cells)), dtype=object)
    before = column.copy()
    values, report = parse_quantity(column, KG, "kg")
    assert values.index.equals(column.index) and values.dtype == float and column.equals(before)
    assert report["row"].tolist() == values.index[values.isna()].tolist() and (report["reason"] != "").all()
    assert (values.dropna() >= 0).all() and np.isfinite(values.dropna()).all()


def test_a_bare_number_needs_a_unit_where_none_is_the_default():
    values, report = parse_quantity(pd.Series(["4", "4 kg"]), KG)
    assert np.isnan(values[0]) and values[1] == 4 and report["reason"].tolist() == ["needs a unit"]
    assert "stone" in refused(parse_quantity, pd.Series(["4"]), KG, "stone")


def test_words_and_dates():
    values, report = parse_choice(pd.Series([" Stray", "STRAY", "trf.", "lost", "", "?", None]), dict(stray=(), transfer=("trf.",)))
    assert values.tolist()[:3] == ["stray", "stray", "transfer"] and values[3:].isna().all()
    assert report["reason"].tolist() == ["another word", "empty", "says unknown", "empty"]
    dates, report = parse_date(pd.Series(["2024-03-05", "05.03.2024", "3/5/2024", "31.02.2024", ""]))
    assert dates[0] == dates[1] == pd.Timestamp(2024, 3, 5) and dates[2:].isna().all()
    assert report["cell"].tolist() == ["3/5/2024", "31.02.2024", ""]
    again, report = parse_date(dates)
    assert again.equals(dates) and len(report) == 3, "what is a date already stays one"


def test_reading_twice_changes_nothing(pets):
    once = read_intake(intake_records(pets.head(100)))[0]
    assert read_intake(once)[0].equals(once)


def test_forms_without_a_column_are_refused(pets):
    forms = intake_records(pets.head(20))
    for c in ("age", "weight", "type", "sex", "date"): assert f"none called {c}" in refused(read_intake, forms.drop(columns=c))
    assert "rows" in refused(read_intake, forms.head(0))


# ---- outliers

def test_fences_hold_where_the_standard_deviation_gives_in():
    x = pd.Series([*np.random.default_rng(0).normal(4, 1, 500), 420, 420, 400, 42], name="kg")
    low, high = fences(x)
    assert -3 < low < 0 and 8 < high < 11 and x.mean() + 3 * x.std() > 42
    values, report = set_aside(x, (low, high), (0, 120))
    assert report["row"].tolist() == [500, 501, 502, 503] and values.isna().sum() == 4 and len(values) == len(x)
    assert report["reason"].str.split(":").str[0].tolist() == ["impossible"] * 3 + ["unusual"]
    assert x.notna().all(), "the values that it was given stay"


@pytest.mark.parametrize("seed", range(1, 4))
def test_planted_outliers_are_set_aside_and_true_values_kept(seed):
    pets = draw_factors(1500, seed=seed)
    got, key = read_intake(intake_records(pets, seed))[0], intake_key(pets, seed)
    for c, possible, faults in (("age", (0, 30), ["impossible"]), ("weight", (.05, 120), ["impossible", "ten times"])):
        values, report = set_aside(got[c], fences(got[c].head(1000)), possible)
        planted = key[f"{c}_fault"].isin(faults)
        assert values[planted].isna().all() and (values.isna() & got[c].notna() & ~planted).sum() <= 3


def test_fences_need_numbers_that_differ():
    assert "none" in refused(fences, pd.Series([np.nan] * 4, name="kg"))
    assert "half of them 1" in refused(fences, pd.Series([1., 1, 1, 5], name="kg"))
    assert "parse_quantity" in refused(fences, pd.Series(["4 kg", "5"], name="kg"))
    assert "inf" in refused(set_aside, pd.Series([1., np.inf], name="kg"), (0, 5))


# ---- the table

CONT, CAT = ["age", "weight"], ["type", "sex", "street"]


def learned(to): return to.means, to.stds, to.na_dict, {c: list(to.classes[c]) for c in to.cat_names}


def test_a_table_is_what_a_count_by_hand_says(table):
    before = table.copy()
    to, train = make_table(table, CONT, CAT, "adopted"), table[table["split"] == "train"]
    assert table.equals(before) and len(to.train) == len(train) and len(to.valid) == (table["split"] == "valid").sum()
    for c in CONT:
        filled = train[c].fillna(train[c].median())
        assert to.na_dict[c] == train[c].median()
        assert np.allclose((filled - filled.mean()) / filled.std(ddof=0), to.train.xs[c], atol=1e-5)
        assert abs(to.train.xs[c].mean()) < 1e-5 and to.train.xs[c].std(ddof=0) == pytest.approx(1, abs=1e-4)
        assert abs(to.valid.xs[c].mean()) > 1e-3, "valid is measured with train's ruler"
        assert (to.train.xs[f"{c}_na"] == train[c].isna() + 1).all()
    assert list(to.train.xs.index) == list(train.index)
    words = ["#na#", *sorted(train["street"].unique())]
    assert list(to.classes["street"]) == words and [words[i] for i in to.train.xs["street"]] == train["street"].tolist()
    valid = table[table["split"] == "valid"]
    assert [words[i] for i in to.valid.xs["street"]] == [s if s in words else "#na#" for s in valid["street"]]
    assert (to.train.xs["sex"] == 0).equals(train["sex"].isna())


@pytest.mark.parametrize("others", [["valid"], ["test"], ["valid", "test"]])
def test_nothing_is_learned_from_the_other_rows(table, others):
    to, wild = make_table(table, CONT, CAT, "adopted"), table.copy()
    rows = wild["split"].isin(others)
    wild.loc[rows, CONT] = [1e6, np.nan]
    wild.loc[rows, CAT] = "never seen"
    again = make_table(wild, CONT, CAT, "adopted")
    assert learned(again) == learned(to) and again.train.xs.equals(to.train.xs)
    if others == ["test"]: assert again.valid.xs.equals(to.valid.xs)
    else: assert (again.valid.xs[CAT] == 0).all().all()


def test_fastai_alone_would_learn_words_from_validation(table):
    from fastai.tabular.core import Categorify, TabularPandas
    rows = table[table["split"] != "test"]
    splits = [np.flatnonzero(rows["split"] == s).tolist() for s in ("train", "valid")]
    eager = TabularPandas(rows, [Categorify], ["street"], [], y_names="adopted", splits=splits)
    assert len(eager.classes["street"]) > len(make_table(table, CONT, CAT, "adopted").classes["street"])


def test_new_rows_are_measured_with_the_rows_of_training(table):
    to = make_table(table, CONT, CAT, "adopted")
    valid = table[table["split"] == "valid"]
    assert encode_rows(to, valid).xs.equals(to.valid.xs)
    alone = pd.concat([encode_rows(to, valid.iloc[[i]].drop(columns=["adopted", "split"])).xs for i in range(8)])
    assert alone.equals(to.valid.xs.head(8)), "a row alone is the same as a row among others"
    odd = valid.iloc[[0]].assign(age=np.nan, street="Nowhere Road", type=None)
    got = encode_rows(to, odd).xs.iloc[0]
    assert got["age"] == pytest.approx((to.na_dict["age"] - to.means["age"]) / to.stds["age"])
    assert got["age_na"] == 2 and got["street"] == 0 and got["type"] == 0
    assert encode_rows(to, odd.assign(age=pd.Series([None], odd.index, dtype=object))).xs.iloc[0].equals(got)
    categories = valid.assign(**{c: valid[c].astype("category") for c in CAT})
    assert encode_rows(to, categories).xs.equals(to.valid.xs), "pandas' categories of the new rows don't count"


def test_a_gap_where_training_had_none_gets_the_training_median(table):
    full = table.assign(age=table["age"].fillna(3.))
    to = make_table(full, CONT, CAT, "adopted")
    assert "age_na" not in to.cat_names
    row = full[full["split"] == "valid"].iloc[[0]]
    median = full.loc[full["split"] == "train", "age"].median()
    assert encode_rows(to, row.assign(age=np.nan)).xs.equals(encode_rows(to, row.assign(age=median)).xs)


def test_words_training_has_not_are_no_surprise_to_pandas(table):
    import fastai.tabular.core  # noqa: F401, its own warning is not ours
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*Categorical.*")
        to = make_table(table, CONT, CAT, "adopted")
        encode_rows(to, table[table["split"] == "test"])


def test_words_are_words_whatever_pandas_made_of_them():
    df = pd.DataFrame(dict(n=[1., 2, 3, 4], code=[1, 2, 1, 2], y=[True, False, True, False], split=["train", "train", "train", "valid"]))
    to = make_table(df, ["n"], ["code"], "y")
    assert list(to.classes["code"]) == ["#na#", "1", "2"]
    for code in (2, 2., "2", np.int8(2)):
        assert encode_rows(to, pd.DataFrame(dict(n=[1.], code=[code]))).xs["code"].tolist() == [2]


def test_a_table_feeds_a_network(table):
    to = make_table(table, CONT, CAT, "adopted")
    dls = to.dataloaders(bs=16)
    cats, conts, y = dls.one_batch()
    assert cats.shape == (16, 5) and conts.shape == (16, 2) and set(y.flatten().tolist()) <= {0, 1} and list(dls.vocab) == ["no", "yes"]
    batch = dls.valid.new(encode_rows(to, table.head(7))).one_batch()
    assert batch[0].shape == (7, 5) and not batch[1].isnan().any()
    assert make_table(table, ["age"], ["type"], "draw_seed").dataloaders(bs=8).one_batch()[2].dtype.is_floating_point


@pytest.mark.parametrize("change, says", [
    (lambda t: t.drop(columns="weight"), "none called weight"), (lambda t: t.drop(columns="split"), "none called split"),
    (lambda t: t.drop(columns="adopted"), "none called adopted"), (lambda t: t.head(0), "none"),
    (lambda t: t.assign(split=""), "none for train, valid"), (lambda t: t.assign(split=t["split"].replace("valid", "test")), "none for valid"),
    (lambda t: t.assign(weight="4 kg"), "'4 kg' among them"), (lambda t: t.assign(weight=np.nan), "a gap in every one of"),
    (lambda t: t.assign(weight=t["weight"].mask(t["split"] == "train")), "a gap in every one of"),
    (lambda t: t.assign(weight=t["weight"].where(t["split"] != "train", 4.)), "4 in all of them"),
    (lambda t: t.assign(weight=np.inf), "inf among them"), (lambda t: t.assign(weight=None), "only gaps"),
    (lambda t: t.assign(adopted=None), "gaps"), (lambda t: t.assign(adopted=np.inf), "inf among them"), (lambda t: t.assign(adopted=t["adopted"].mask(t.index == t.index[t["split"] == "valid"][0])), "1 gaps"),
    (lambda t: t.assign(adopted=t["adopted"].where(t["split"] == "train", "perhaps")), "'perhaps' only in valid")])
def test_a_table_that_cannot_teach_is_refused(table, change, says):
    bad = change(table.copy())
    before = bad.copy()
    said = refused(make_table, bad, CONT, CAT, "adopted")
    assert says in said and said.startswith("Expected ") and "Next: " in said and bad.equals(before)


def test_the_answer_is_no_input_and_a_column_has_one_place(table):
    assert "to predict adopted" in refused(make_table, table, CONT, ["adopted"], "adopted")
    assert "each named once" in refused(make_table, table, CONT, ["age"], "adopted")
    assert "none" in refused(make_table, table, [], [], "adopted")


def test_new_rows_without_a_column_are_refused(table):
    to = make_table(table, CONT, CAT, "adopted")
    assert "none called street" in refused(encode_rows, to, table.drop(columns="street"))
    assert "'heavy'" in refused(encode_rows, to, table.head(2).assign(weight="heavy"))


def test_importing_changes_no_setting_of_pandas():
    top = [n for n in ast.parse(Path(preprocessing.__file__).read_text("utf-8")).body if isinstance(n, (ast.Import, ast.ImportFrom))]
    assert not [n for n in top if "fastai.tabular" in ast.unparse(n)], "fastai.tabular sets mode.chained_assignment for the whole program"


# ---- the leak

def test_target_encoding_over_all_rows_flatters_and_scaling_does_not():
    from sklearn.linear_model import LogisticRegression
    t = read_intake(intake_records(draw_factors(2400, seed=5)))[0].assign(yes=lambda d: d["adopted"].eq("yes") * 1.)
    train, valid, fresh = t[:1100], t[1100:1400], t[1400:]
    score = {}
    for name, by in (("leak", t[:1400]), ("honest", train)):
        xs = [s["street"].map(by.groupby("street")["yes"].mean()).fillna(.5).to_frame() for s in (train, valid, fresh)]
        model = LogisticRegression().fit(xs[0], train["yes"])
        score[name] = [model.score(x, s["yes"]) for x, s in zip(xs[1:], (valid, fresh))]
    assert score["leak"][0] - score["leak"][1] > .12 > .08 > abs(score["honest"][0] - score["honest"][1])


# ---- the exercise

def reference(train, new):
    return new.assign(weight=new["weight"].fillna(train["weight"].median()), weight_na=new["weight"].isna())


def by(number, na=lambda new: new["weight"].isna()):
    return lambda train, new: new.assign(weight=new["weight"].fillna(number(train["weight"], new["weight"])), weight_na=na(new))


def in_place(train, new):
    new["weight_na"] = new["weight"].isna()
    new["weight"] = new["weight"].fillna(train["weight"].median())
    return new


WRONG = {
    "the new rows: tomorrow": by(lambda t, n: n.median()), "median of both": by(lambda t, n: pd.concat([t, n]).median()),
    "mean of train": by(lambda t, n: t.mean()), "mean of the new": by(lambda t, n: n.mean()),
    "mean of both": by(lambda t, n: pd.concat([t, n]).mean()), "0 kg": by(lambda t, n: 0), "you put in 5": by(lambda t, n: 5.),
    "indicator is missing": lambda t, n: reference(t, n).drop(columns="weight_na"),
    "wrong way round": by(lambda t, n: t.median(), lambda n: n["weight"].notna()),
    "finds no gap": by(lambda t, n: t.median(), lambda n: False),
    "has changed": in_place, "2 rows are gone": lambda t, n: reference(t, n).dropna().loc[n["weight"].notna()],
    "still gaps": lambda t, n: n.assign(weight_na=n["weight"].isna()),
    "other columns": lambda t, n: reference(t, n)[["weight", "weight_na"]],
    "weights changed": lambda t, n: reference(t, n).assign(weight=t["weight"].median()),
    "give a table": lambda t, n: n["weight"].fillna(t["weight"].median())}


def test_the_exercise_knows_right_from_wrong():
    assert check("03.5", reference).passed and check("03.5", None).passed is None
    said = {cause: check("03.5", answer).message for cause, answer in WRONG.items()}
    assert all(cause in message for cause, message in said.items()), said
    assert len(set(said.values())) == len(said)
