"""Other data on the same road (chapter 15): drawn forms, sounds and advertisements, and what is made of them."""
from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy.io import wavfile

from dlpipe_nb.core import InputError, Run, check, seal
from dlpipe_nb.pipeline import (RATE, SAID, THINGS, Words, adoption_chance, ask_table, best_accuracy, chances, draw_adoptions,
                                draw_adverts, draw_sounds, export_table, open_rows, prediction_frame, spectrogram_picture,
                                text_dls, train_table, train_text)
from dlpipe_nb.preprocessing import encode_rows, fences, make_dls, make_table, read_intake, set_aside, split
from dlpipe_nb.testing import SealError

ROOT = Path(__file__).resolve().parents[2]
WORDS = ["species", "hair", "colour", "type", "sex"]


def refused(f, *args, **kwargs):
    "What the `InputError` of a call says."
    with pytest.raises(InputError) as e: f(*args, **kwargs)
    said = str(e.value)
    assert said.startswith("Expected ") and "Next: " in said
    return said


@pytest.fixture(scope="module")
def clips(tmp_path_factory): return draw_sounds(tmp_path_factory.mktemp("sounds") / "some", n=60, seed=3)


@pytest.fixture(scope="module")
def adverts(): return draw_adverts(1500, seed=3)


def read_forms(n, seed):
    "Forms, split, read and cleaned by the training rows."
    t = read_intake(split(draw_adoptions(n, seed), seed=seed))[0]
    for c, possible in (("age", (0, 30)), ("weight", (.05, 120))):
        t[c], _ = set_aside(t[c], fences(t.loc[t["split"] == "train", c]), possible)
    return t


# ---- seeds

def test_the_same_seed_gives_the_same_rows_and_another_seed_others():
    for draw in (draw_adoptions, draw_adverts):
        one = draw(40, seed=2)
        assert one.equals(draw(40, seed=2)) and len(one) == 40
        assert not set(one["sha256"]) & set(draw(40, seed=5)["sha256"])
        assert one["sha256"].is_unique and one["path"].is_unique and set(one["label"]) in ({"yes", "no"}, {"cat", "dog"})
    assert draw_adverts(30, seed=2)["text"].tolist() == draw_adverts(50, seed=2)["text"].tolist()[:30]


def test_the_same_seed_gives_the_same_sounds_byte_for_byte(tmp_path, clips):
    again = draw_sounds(tmp_path / "again", n=60, seed=3)
    assert again["sha256"].tolist() == clips["sha256"].tolist()
    assert [Path(a).read_bytes() for a in again["wav"]] == [Path(b).read_bytes() for b in clips["wav"]]
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "again").rglob("*")}
    assert draw_sounds(tmp_path / "again", n=60, seed=3).equals(again)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "again").rglob("*")} == before, "what is there isn't drawn again"
    longer = draw_sounds(tmp_path / "longer", n=64, seed=3)
    assert longer["sha256"].tolist()[:60] == clips["sha256"].tolist()


# ---- the rules, and the best possible

def test_the_adoption_rule_by_hand():
    ask = lambda *row: float(adoption_chance(*(np.array([v]) for v in row))[0])
    odds = 1.5 * (3.6 - .75 * 2 + .9 + .3 - .9 * .3)
    assert ask(2., 4., True, True, "stray") == pytest.approx(1 / (1 + np.exp(-odds)))
    assert ask(2., 4., True, True, "stray") > ask(2., 4., True, False, "stray"), "a cat should have long hair"
    assert ask(2., 4., False, True, "stray") < ask(2., 4., False, False, "stray"), "and a dog short"
    assert ask(.5, 4.3, True, True, "stray") > ask(3.5, 4.3, True, True, "stray"), "kittens first"
    assert ask(.5, 4.3, False, False, "stray") < ask(3.5, 4.3, False, False, "stray"), "but no pups"
    assert ask(4., 4.3, False, False, "transfer") > max(ask(4., 2., False, False, "transfer"), ask(4., 8., False, False, "transfer"))


def test_the_best_possible_accuracy_is_what_the_likelier_answer_gets():
    assert best_accuracy([.9, .2, .6, .5]) == pytest.approx(.7) and best_accuracy([0, 1]) == 1
    forms = draw_adoptions(4000, seed=4)
    got = ((forms["chance"] > .5) == (forms["label"] == "yes")).mean()
    assert got == pytest.approx(best_accuracy(forms["chance"]), abs=.02) and .8 < got < .9
    adverts = draw_adverts(4000, seed=4)
    sure = adverts[adverts["chance"] != .5]
    assert ((sure["chance"] > .5) == (sure["label"] == "dog")).mean() == pytest.approx(best_accuracy(sure["chance"]), abs=.015)
    assert .9 < best_accuracy(adverts["chance"]) < .95
    for bad in ([], [.5, 1.2], [-.1], [np.nan]): assert "chances from 0 to 1" in refused(best_accuracy, bad)


def test_what_was_eaten_gives_the_answer_away_and_no_other_column_does():
    forms = draw_adoptions(1500, seed=2)
    said = np.where(forms["meals"] < 60, "yes", "no")
    assert (said == forms["label"]).mean() > .96 > best_accuracy(forms["chance"])
    table = read_forms(1500, 2).fillna({"age": 5, "weight": 4})
    for c in WORDS: assert table.groupby(c)["label"].agg(lambda v: v.value_counts(normalize=True).iloc[0]).max() < .85


# ---- advertisements

def statements(text):
    "How many statements speak for a dog less those for a cat, counted in the text."
    found = 0
    for kind, things in THINGS.items():
        for thing in things:
            for sentence in re.findall(rf"[^.]*\b{thing}\b[^.]*\.", text, re.I):
                likes = any(s in sentence for s in SAID[True])
                assert likes != any(s in sentence for s in SAID[False])
                found += 1 if (kind == "dog") == likes else -1
    return found


def test_the_chance_of_an_advertisement_is_what_its_sentences_say(adverts):
    for a in adverts.head(300).itertuples(): assert a.chance == pytest.approx(1 / (1 + 11. ** -statements(a.text)), abs=1e-3), a.text


def test_no_advertisement_names_the_kind_and_no_single_word_gives_it_away(adverts):
    assert not adverts["text"].str.contains(r"\b(?:cat|dog|kitten|pupp?y|pup|meow|bark|woof)s?\b", case=False).any()
    common = adverts["text"].str.lower().str.findall(r"[a-z']+").map(set)
    many = pd.Series([w for s in common for w in s]).value_counts()
    for word in many[many > 150].index:
        of = adverts.loc[common.map(lambda s: word in s), "label"]
        assert of.value_counts(normalize=True).iloc[0] < .72, word


def test_an_animals_advertisements_belong_together(adverts):
    groups = adverts.groupby("group")
    assert groups["label"].nunique().max() == 1 and groups.size().between(1, 3).all() and groups.size().max() == 3
    assert groups["text"].agg(lambda t: t.str.extract(r"number (\d{4})\.$")[0].nunique()).max() == 1
    parts = split(adverts, seed=1)
    assert parts.groupby("group")["split"].nunique().max() == 1


def test_words():
    assert list(Words()(["She can't: 12 (twelve)!", ""])) == [["she", "can't", ":", "12", "(", "twelve", ")", "!"], []]


def test_the_word_list_is_learned_from_train_only(adverts):
    df = split(adverts, seed=1)
    df.loc[df["split"] == "valid", "text"] += " zebra zebra zebra zebra"
    vocab = text_dls(df).vocab[0]
    assert "zebra" not in vocab and "loves" in vocab


# ---- sounds

def test_a_clip_is_a_sound_and_its_picture(clips):
    assert list(clips.columns[:7]) == ["path", "split", "sha256", "width", "height", "source", "wav"]
    for c in clips.head(12).itertuples():
        rate, x = wavfile.read(c.wav)
        assert rate == RATE and x.shape == (12000,) and x.dtype == np.int16 and np.abs(x).max() < 32000
        assert x.std() / 32767 == pytest.approx(c.loudness, abs=2e-3)
        seen = np.asarray(Image.open(c.path)).astype(float)
        assert seen.shape == (128, 128) and np.abs(seen - spectrogram_picture(x / 32767)).mean() < 2
        assert c.label in Path(c.path).name


def test_the_two_clips_of_a_recording_belong_together(clips):
    groups = clips.groupby("group")
    assert (groups.size() == 2).all() and groups["label"].nunique().max() == groups["around"].nunique().max() == 1
    assert groups["sha256"].nunique().min() == 2 and set(clips["label"]) == {"cat", "dog"}


@pytest.mark.parametrize("pitch", [500, 1000, 2500])
def test_a_tone_is_a_bright_line_at_its_height(pitch):
    t = np.arange(12000) / RATE
    seen = spectrogram_picture(np.sin(2 * np.pi * pitch * t) * (t < .75))
    assert seen.shape == (128, 128) and seen.dtype == np.uint8
    row = seen[:, 20].argmax()
    assert 4000 * (128 - row) / 128 == pytest.approx(pitch, abs=40)
    assert seen[row, 20] > 240 and seen[row, 120] < 20, "time runs to the right"


@pytest.mark.parametrize("x", [np.zeros((2, 4000)), np.zeros(100), np.full(4000, np.nan)])
def test_what_is_no_sound_is_refused(x): assert "1,024 samples" in refused(spectrogram_picture, x)


def test_wrong_input_is_answered_in_words(tmp_path, clips):
    for bad in (0, -3, 2.5, "many", True): assert "whole number" in refused(draw_adverts, bad)
    for bad in (1, 2.5, None): assert "whole number of clips" in refused(draw_sounds, tmp_path / "no", bad)
    assert "as seed" in refused(draw_sounds, tmp_path / "no", 4, -1) and "as seed" in refused(draw_adverts, 4, .5)
    assert "whole number" in refused(draw_adoptions, 0) and "seed" in refused(draw_adoptions, 5, -1)
    assert not (tmp_path / "no").exists(), "nothing was begun"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    assert "other files" in refused(draw_sounds, tmp_path / "mine", 4)
    folder = Path(clips["path"][0]).parents[1]
    assert "'seed': 4" in refused(draw_sounds, folder, 60, 4) and "'n': 60" in refused(draw_sounds, folder, 62, 3)
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["letter.txt"]


def test_a_drawing_that_is_interrupted_leaves_nothing(tmp_path, monkeypatch):
    from dlpipe_nb import pipeline
    write, done = pipeline._write_clip, []
    def stumble(*args):
        if len(done) == 3: raise KeyboardInterrupt
        done.append(1)
        return write(*args)
    monkeypatch.setattr(pipeline, "_write_clip", stumble)
    with pytest.raises(KeyboardInterrupt): draw_sounds(tmp_path / "set", 8)
    assert list(tmp_path.iterdir()) == []


# ---- the seal, and the table of predictions

def sealed(tmp_path):
    df, run = split(draw_adverts(200, seed=1), seed=1), Run(tmp_path)
    run.write_json("seal.json", seal(df[df["split"] == "test"]))
    return run, df


def test_rows_are_opened_once_and_counted(tmp_path):
    run, df = sealed(tmp_path)
    for n in (1, 2):
        held = open_rows(run, df.sample(frac=1, random_state=n), "some model")
        assert set(held["path"]) == set(df.loc[df["split"] == "test", "path"]) and len(run.read_json("seal.json")["opened"]) == n
    assert run.read_json("seal.json")["opened"][0]["model"] == "some model"


@pytest.mark.parametrize("change, says", [
    (lambda d: d.assign(label=np.where(d.index == d.index[d["split"] == "test"][0], "fox", d["label"])), "relabelled: "),
    (lambda d: d.drop(d.index[d["split"] == "test"][0]), "removed: "),
    (lambda d: d.assign(split=np.where(d.index == d.index[d["split"] == "train"][0], "test", d["split"])), "added: ")])
def test_changed_rows_are_no_test(tmp_path, change, says):
    run, df = sealed(tmp_path)
    with pytest.raises(SealError) as e: open_rows(run, change(df), "some model")
    assert says in str(e.value) and "advertisement" in str(e.value) and run.read_json("seal.json")["opened"] == []


def test_predictions_of_any_model_are_one_table():
    df = pd.DataFrame(dict(path=["a", "b"], label=["no", "yes"], more=[1, 2]), index=[7, 3])
    got = prediction_frame(df, ("no", "yes"), [[.8, .2], [.6, .4]])
    assert list(got.columns) == ["path", "label", "predicted", "probability", "correct", "p_no", "p_yes"]
    assert got["predicted"].tolist() == ["no", "no"] and got["correct"].tolist() == [True, False] and got["probability"].tolist() == [.8, .6]
    assert "2 probabilities for each of 2" in refused(prediction_frame, df, ("no", "yes"), [[.8, .2]])


# ---- targets, for two seeds

def right(learn, labels, rows, dl): return prediction_frame(rows, labels, chances(learn, dl))["correct"].mean()


@pytest.fixture(scope="module", params=(1, 2))
def tabular(request):
    t = read_forms(2400, request.param)
    to = make_table(t, ["age", "weight"], WORDS, "label")
    return t, to, train_table(to, seed=request.param)


def test_the_table_model_beats_the_sum_of_columns(tabular):
    from dlpipe_nb.features import fit_baseline
    t, to, learn = tabular
    held, known = t[t["split"] == "test"], t[t["split"] == "train"]
    got = right(learn, ("no", "yes"), held, learn.dls.valid.new(encode_rows(to, held)))
    x = lambda rows: pd.get_dummies(encode_rows(to, rows).xs.astype({c: pd.CategoricalDtype(range(len(to.classes[c]))) for c in to.cat_names}))
    simple = fit_baseline(x(known).to_numpy(float), known["label"], C=1.).score(x(held).to_numpy(float), held["label"])
    assert got > .77 and got > simple + .03 and got < best_accuracy(held["chance"]) + .03


def test_the_exported_table_answers_as_the_learner(tabular, tmp_path):
    t, to, learn = tabular
    rows = t[t["split"] == "test"].head(80).copy()
    rows.iloc[0, rows.columns.get_indexer(["age", "weight"])] = np.nan
    rows.iloc[1, rows.columns.get_indexer(["colour"])] = "never seen"
    rows.iloc[2, rows.columns.get_indexer(["sex"])] = np.nan
    folder = export_table(learn, to, tmp_path / "bundle")
    ours = chances(learn, learn.dls.valid.new(encode_rows(to, rows)))
    assert np.abs(ask_table(folder, rows) - ours).max() < 1e-5
    alone = np.concatenate([ask_table(folder, rows.iloc[[i]]) for i in range(3)])
    assert np.abs(alone - ours[:3]).max() < 1e-5, "a row alone is the same as a row among others"
    for c in ("age", "hair"): assert f"none called {c}" in refused(ask_table, folder, rows.drop(columns=c))
    assert sorted(f.name for f in folder.iterdir()) == ["table.json", "table.onnx"]
    code = (f"import sys, pandas as pd; sys.path.insert(0, {str(ROOT)!r}); from dlpipe_nb.pipeline import ask_table; "
            f"ask_table({folder.as_posix()!r}, pd.DataFrame({rows[['age', 'weight', *WORDS]].head(2).astype(object).where(rows.notna(), None).to_dict('list')!r})); "
            "print([m for m in ('torch', 'fastai') if m in sys.modules])")
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert made.stdout.strip() == "[]", made.stderr


@pytest.mark.parametrize("seed", (1, 2))
def test_the_text_model_reads_what_single_words_do_not_say(seed):
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    df = split(draw_adverts(2000, seed=seed), seed=seed)
    known, held = df[df["split"] == "train"], df[df["split"] == "test"]
    learn = train_text(df, seed=seed)
    got = right(learn, ("cat", "dog"), held, learn.dls.test_dl(held))
    words = make_pipeline(CountVectorizer(), LogisticRegression(C=.3, max_iter=2000)).fit(known["text"], known["label"])
    assert got > .85 and words.score(held["text"], held["label"]) < .68 and got < best_accuracy(held["chance"]) + .03


@pytest.mark.parametrize("seed", (1, 2))
def test_the_sound_model_hears_what_thresholds_and_pixels_do_not(seed, tmp_path):
    from sklearn.tree import DecisionTreeClassifier
    from dlpipe_nb.features import fit_baseline, pixel_features
    from dlpipe_nb.training import predict_frame, train
    df = split(draw_sounds(tmp_path / "set", n=800, seed=seed), seed=seed)
    known, held = df[df["split"] == "train"], df[df["split"] == "test"]
    for c in ("loudness", "pitch"):
        assert DecisionTreeClassifier(max_depth=1, random_state=0).fit(known[[c]], known["label"]).score(held[[c]], held["label"]) < .72
    pixels = fit_baseline(pixel_features(known), known["label"]).score(pixel_features(held), held["label"])
    learn = train(make_dls(df, 64, augment=False), "small12", False, 10, 3e-3, seed=seed, precision="fp32")
    got = predict_frame(learn, held)["correct"].mean()
    assert got > .85 and got > pixels + .03


def test_the_same_seed_gives_the_same_models():
    t = read_forms(300, 1)
    to = make_table(t, ["age", "weight"], WORDS, "label")
    one, two = (train_table(to, epochs=1, seed=1).keep_best.rows for _ in range(2))
    assert one == two
    df = split(draw_adverts(200, seed=1), seed=1)
    one, two = (train_text(df, epochs=1, seed=1).keep_best.rows for _ in range(2))
    assert one == two


# ---- what the command pays for it

def test_the_command_loads_none_of_it():
    code = (f"import sys; sys.path.insert(0, {str(ROOT)!r}); import dlpipe_nb.pipeline; "
            "print([m for m in ('torch', 'fastai', 'pandas', 'scipy', 'sklearn', 'onnxruntime') if m in sys.modules])")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60).stdout.strip() == "[]"


# ---- the exercises

def tapes(group, start=None):
    def halves(t):
        out = pd.concat([t.assign(start=0.), t.assign(start=t["seconds"] / 2)], ignore_index=True)
        out = out.assign(group=group(out)) if group else out
        return out if start is None else out.assign(start=start(out))
    return halves


def mine(text, words):
    said = re.findall(r"[a-z']+", text.lower())
    return [said.count(w) for w in words]


def changed(t):
    t["group"] = t["path"]
    return pd.concat([t.assign(start=0.), t.assign(start=1.5)])


BY_PATH = lambda t: t["path"]
WRONG = {
    "15.6": {"mean chance": .55, "the dice aren't": 1.0, "0.5 too": .75, "first pet only": .9, "above a half": .5, "you say 0.3": .3,
             "give a number": "0.7"},
    "15.7": {"inside another": lambda text, words: [text.lower().count(w) for w in words],
             "all letters small": lambda text, words: [re.findall(r"[A-Za-z']+", text).count(w) for w in words],
             "count how often": lambda text, words: [int(w in re.findall(r"[a-z']+", text.lower())) for w in words],
             "sticks to the last word": lambda text, words: [text.lower().split().count(w) for w in words],
             "give 4 counts": lambda text, words: [2], "the counts are [3, 1, 0, 2]": lambda text, words: [0] * 4,
             "give a list": lambda text, words: 3},
    "15.8": {"add a column group": tapes(None), "one group of each label": tapes(lambda t: t["label"]),
             "halves can be parted": tapes(lambda t: [f"half {i}" for i in range(len(t))]), "you give 40 rows": lambda t: t.assign(group=t["path"]),
             "has changed": changed, "halves that start": tapes(BY_PATH, lambda t: t["start"] * 2),
             "add the column start": lambda t: tapes(BY_PATH)(t).drop(columns="start"),
             "40 groups of 2": tapes(lambda t: [f"ten {i // 4}" for i in range(len(t))]),
             "the labels have moved": lambda t: tapes(BY_PATH)(t).assign(label="dog"),
             "both a cat and a dog": tapes(lambda t: [f"pair {i // 2}" for i in range(len(t))]),
             "give a table": lambda t: 80}}


@pytest.mark.parametrize("exercise, answer", [("15.6", .7), ("15.7", mine), ("15.8", tapes(BY_PATH))])
def test_an_exercise_knows_right_from_wrong(exercise, answer):
    assert check(exercise, answer).passed and check(exercise, None).passed is None
    said = {cause: check(exercise, wrong) for cause, wrong in WRONG[exercise].items()}
    assert all(c.passed is False and cause in c.message for cause, c in said.items()), said
    assert len({c.message for c in said.values()}) == len(said) >= 3
