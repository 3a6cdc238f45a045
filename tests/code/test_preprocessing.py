"""Faults, splits, the seal and the batches."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import picture
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dlpipe_nb.core import InputError, Run, check, content_hash, open_picture, picture_array, sha256_of
from dlpipe_nb.preprocessing import _room
from dlpipe_nb.preprocessing import clean, clean_into, fault_of, find_faults, find_groups, group_names, make_dls, presize, split, squares


def manifest(folder, n=20, labels=("cat", "dog")):
    "n pictures of noise a label, on disk, as a manifest."
    rng, rows = np.random.default_rng(0), []
    for label in labels:
        for i in range(n):
            path = folder / f"{label} {i}.png"
            Image.fromarray(rng.integers(0, 256, (40, 36, 3), dtype=np.uint8)).save(path)
            rows.append((path.as_posix(), label, "", sha256_of(path), 36, 40, "noise"))
    return pd.DataFrame(rows, columns=["path", "label", "split", "sha256", "width", "height", "source"])


def table(sizes): return pd.DataFrame([(f"{l}{i}", l, f"{l}{i}") for l, n in sizes.items() for i in range(n)], columns=["path", "label", "sha256"])


def test_each_fault_is_named(tmp_path):
    whole = picture((9, 200, 9), (80, 80), "JPEG")
    noise = tmp_path / "noise.png"
    Image.fromarray(np.random.default_rng(1).integers(0, 255, (50, 50, 3), dtype=np.uint8)).save(noise)
    for name, data, fault in (("cut.jpg", whole[: len(whole) // 2], "truncated"), ("zero.png", b"", "unreadable"), ("text.png", b"x", "unreadable"),
                              ("small.png", picture(size=(15, 200)), "too small"), ("blank.png", picture(), "blank")):
        (tmp_path / name).write_bytes(data)
        assert fault_of(tmp_path / name)[0] == fault, name
    assert fault_of(noise) == ("", "") and fault_of(tmp_path / "gone.png")[0] == "missing"


@given(st.integers(10, 90), st.integers(10, 90), st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_a_split_is_stratified_seeded_and_whole(cats, dogs, seed):
    df = table({"cat": cats, "dog": dogs})
    done = split(df, seed=seed)
    assert len(done) == len(df) and done.split.isin(("train", "valid", "test")).all()
    for label, n in (("cat", cats), ("dog", dogs)):
        for part, share in (("train", .65), ("valid", .15), ("test", .20)):
            got = ((done.label == label) & (done.split == part)).sum()
            assert got >= 1 and abs(got - share * n) <= 2
    again = split(df.sample(frac=1, random_state=seed % 1000), seed=seed).set_index("path").split
    assert (again.sort_index() == done.set_index("path").split.sort_index()).all(), "the split depends on the order of the rows"


@pytest.mark.parametrize("df", [table({"cat": 50}), table({"cat": 50, "dog": 4}), table({"cat": 2, "dog": 2})])
def test_a_split_that_would_leave_a_class_out_is_refused(df):
    with pytest.raises(InputError): split(df)


@pytest.mark.parametrize("shares", [(0, .2), (.2, 0), (.6, .4), (-.1, .2)])
def test_shares_that_make_no_sense_are_refused(shares):
    with pytest.raises(InputError): split(table({"cat": 50, "dog": 50}), *shares)


def test_missing_columns_and_rows_are_refused(tmp_path):
    df = manifest(tmp_path, 2)
    for bad in (df.drop(columns="label"), df.drop(columns="path"), df.iloc[:0]):
        with pytest.raises(InputError): clean(bad)


def test_cleaning_again_keeps_the_seal_its_openings_and_the_report(tmp_path):
    df, run = manifest(tmp_path, 20), Run(tmp_path / "run")
    (tmp_path / "cut.png").write_bytes(b"x")
    run.save_manifest(pd.concat([df, df.head(1).assign(path=(tmp_path / "cut.png").as_posix())], ignore_index=True))
    assert len(clean_into(run)) == 1
    sealed = run.read_json("seal.json")
    held = run.manifest().query("split == 'test'")
    assert sealed["sha256"] == content_hash(held) and sealed["pictures"] == len(held) == 8 and sealed["opened"] == []
    run.write_json("seal.json", sealed | {"opened": [{"model": "m", "at": "t"}]})
    before = run.manifest()
    assert len(clean_into(run)) == 1 and len(run.manifest("faults.csv")) == 1
    assert run.read_json("seal.json") == sealed | {"opened": [{"model": "m", "at": "t"}]} and run.manifest().equals(before)


def files(run): return {p.name: p.read_bytes() for p in run.path.iterdir() if p.is_file()}


@pytest.mark.parametrize("settings", [dict(seed=2), dict(valid=.2), dict(test=.3)])
def test_another_split_of_a_sealed_run_is_refused_and_nothing_changes(tmp_path, settings):
    run = sealed_run(tmp_path)
    before = files(run)
    with pytest.raises(InputError, match="sealed"): clean_into(run, **settings)
    assert files(run) == before


@pytest.mark.parametrize("spoil", [lambda df: df.assign(split=df.split.replace("valid", "test")),
                                   lambda df: df.assign(label=df.label.where(df.split != "test", "cat")),
                                   lambda df: df.assign(split="")])
def test_a_sealed_run_with_another_test_is_refused_and_nothing_changes(tmp_path, spoil):
    run = sealed_run(tmp_path)
    run.save_manifest(spoil(run.manifest()))
    before = files(run)
    with pytest.raises(InputError, match="sealed"): clean_into(run)
    assert files(run) == before


def sealed_run(folder, n=20):
    run = Run(folder / "run")
    run.save_manifest(manifest(folder, n))
    clean_into(run)
    return run


def add(run, folder, **pictures):
    "Add rows without a split: name=(picture, label[, group])."
    rows = []
    for name, (im, label, *group) in pictures.items():
        path = folder / f"{name}.png"
        im.save(path)
        rows.append(dict(path=path.as_posix(), label=label, split="", sha256=sha256_of(path), **({"group": group[0]} if group else {})))
    run.save_manifest(pd.concat([run.manifest(), pd.DataFrame(rows)], ignore_index=True))


def noise(seed, size=(36, 40)): return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def test_pictures_added_to_a_sealed_run_never_touch_the_test(tmp_path):
    run = sealed_run(tmp_path)
    sealed, old = (run / "seal.json").read_bytes(), run.manifest()
    test, train = (Image.open(old.path[old.split == part].iloc[0]) for part in ("test", "train"))
    second = Image.open(old.path[(old.split == "test") & (old.label == old.label[old.split == "test"].iloc[0])].iloc[1])
    labels = [old.label[old.split == part].iloc[0] for part in ("test", "train")]
    other = {"cat": "dog", "dog": "cat"}[labels[0]]
    near = test.point(lambda v: v * .97)
    fresh = {f"fresh{k}": (noise(100 + k), ("cat", "dog")[k % 2]) for k in range(12)}
    add(run, tmp_path, same=(test, labels[0]), near=(near, labels[0]), conflict=(second.point(lambda v: v * .97), other), known=(train, labels[1]), **fresh)
    report = clean_into(run)
    now = run.manifest()
    assert (run / "seal.json").read_bytes() == sealed
    assert now[now.split == "test"].path.tolist() == old[old.split == "test"].path.tolist()
    kept = now.set_index(now.path.map(lambda p: p.rsplit("/")[-1]))
    assert not kept.index.isin(["same.png", "near.png", "conflict.png", "known.png"]).any()
    parts = kept.loc[[f"{k}.png" for k in fresh], "split"]
    assert set(parts) == {"train", "valid"} and 1 <= (parts == "valid").sum() <= 5
    assert (kept.loc[old.path.map(lambda p: p.rsplit("/")[-1]), "split"].tolist()) == old.split.tolist()
    said = report[report.action == "removed"].assign(name=lambda d: d.path.map(lambda p: p.rsplit("/")[-1])).set_index("name")
    assert said.loc[["same.png", "near.png", "conflict.png"], "detail"].str.contains("sealed test").all() and len(said) == 4
    again = run.manifest()
    clean_into(run)
    assert run.manifest().equals(again)


def test_a_new_picture_joins_its_group_or_leaves_with_it(tmp_path):
    df, run = manifest(tmp_path, 20), Run(tmp_path / "run")
    run.save_manifest(df.assign(group=[f"{l}{i // 2}" for l, i in zip(df.label, range(len(df)))]))
    clean_into(run)
    groups = run.manifest().drop_duplicates("split").set_index("split").group
    add(run, tmp_path, a=(noise(1), "cat", groups["test"]), b=(noise(2), "cat", groups["valid"]), c=(noise(3), "dog", groups["train"]), d=(noise(4), "dog", "Rex"), e=(noise(5), "dog", "Rex"))
    report = clean_into(run)
    now = run.manifest().assign(name=lambda d: d.path.map(lambda p: p.rsplit("/")[-1])).set_index("name").split
    assert "a.png" not in now.index and now[["b.png", "c.png"]].tolist() == ["valid", "train"] and now["d.png"] == now["e.png"]
    left = report[report.path.str.endswith("a.png")].iloc[0]
    assert left.fault == "across splits" and groups["test"] in left.detail


def test_another_class_for_a_sealed_run_is_refused(tmp_path):
    run = sealed_run(tmp_path)
    add(run, tmp_path, fox=(noise(1), "fox"))
    before = files(run)
    with pytest.raises(InputError, match="fox"): clean_into(run)
    assert files(run) == before


def test_a_run_sealed_by_an_earlier_version_goes_on(tmp_path):
    "Without the settings in its seal, and with the old three columns in faults.csv."
    run = sealed_run(tmp_path)
    seal = run.read_json("seal.json")
    seal.pop("settings")
    run.write_json("seal.json", seal)
    run.save_manifest(pd.DataFrame([("gone.png", "unreadable", "x")], columns=["path", "fault", "detail"]), "faults.csv")
    with pytest.raises(InputError, match="sealed"): clean_into(run, seed=2)
    report = clean_into(run)
    assert report[["fault", "of", "action"]].values.tolist() == [["unreadable", "", "removed"]]


def test_a_picture_that_vanished_from_train_is_left_out_and_from_the_test_only_noted(tmp_path):
    run = sealed_run(tmp_path)
    rows = run.manifest().drop_duplicates("split").set_index("split").path
    for part in ("train", "test"): Path(rows[part]).unlink()
    report = clean_into(run).set_index("path")
    assert report.loc[rows["train"], "action"] == "removed" and report.loc[rows["test"], "action"] == "noted"
    assert rows["test"] in set(run.manifest().path) and rows["train"] not in set(run.manifest().path)


# ---- groups

@given(st.lists(st.tuples(st.integers(1, 9), st.sampled_from(["cat", "dog", "both"])), min_size=12, max_size=60), st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_groups_never_straddle_and_shares_are_close(groups, seed):
    rows = [(f"{k} {i}", ("cat", "dog")[i % 2] if label == "both" else label, f"g{k}") for k, (n, label) in enumerate(groups) for i in range(n)]
    rows += [(f"{label}{i}", label, f"{label}{i}" if i % 3 else "") for label in ("cat", "dog") for i in range(24)]
    df = pd.DataFrame(rows, columns=["path", "label", "group"])
    done = split(df, seed=seed)
    assert done.drop(columns="split").equals(df)
    assert done[done.group != ""].groupby("group").split.nunique().max() == 1
    for label, n in df.label.value_counts().items():
        for part, share in (("train", .65), ("valid", .15), ("test", .20)):
            got = ((done.label == label) & (done.split == part)).sum()
            assert got >= 1 and abs(got - share * n) <= 5, (label, part, got, share * n)
    again = split(df.sample(frac=1, random_state=seed), seed=seed)
    assert again.sort_values("path").split.tolist() == done.sort_values("path").split.tolist()


def test_our_dealer_comes_as_near_to_the_shares_as_scikit_learns():
    "StratifiedGroupKFold with 20 folds: 13 for train, 3 for valid, 4 for test."
    from sklearn.model_selection import StratifiedGroupKFold
    def miss(parts, labels):
        t = pd.crosstab(labels, parts, normalize="index").reindex(columns=["train", "valid", "test"], fill_value=0)
        return np.abs(t - [.65, .15, .20]).to_numpy().mean()
    ours, theirs = [], []
    for seed in range(4):
        rng = np.random.default_rng(seed)
        sizes = rng.integers(1, 8, 120)
        df = pd.DataFrame(dict(label=np.repeat(rng.choice(["cat", "dog"], 120, p=[.7, .3]), sizes), group=np.repeat([f"g{i}" for i in range(120)], sizes)))
        df["path"] = [str(i) for i in range(len(df))]
        ours.append(miss(split(df, seed=seed).split, df.label))
        fold = np.empty(len(df), int)
        for k, (_, rows) in enumerate(StratifiedGroupKFold(20, shuffle=True, random_state=seed).split(df, df.label, df.group)): fold[rows] = k
        theirs.append(miss(np.where(fold < 13, "train", np.where(fold < 16, "valid", "test")), df.label))
    assert np.mean(ours) <= np.mean(theirs) and np.max(ours) < .02, (np.mean(ours), np.mean(theirs))


def test_few_large_groups_reach_every_split_or_are_refused():
    def films(*sizes): return pd.DataFrame([(f"{l}{k} {i}", l, f"{l} film {k}") for l in ("cat", "dog") for k, n in enumerate(sizes) for i in range(n)], columns=["path", "label", "group"])
    done = split(films(20, 20, 20))
    assert (pd.crosstab(done.label, done.split) == 20).all().all()
    assert (pd.crosstab(split(films(40, 6, 5)).label, split(films(40, 6, 5)).split)["train"] == 40).all()
    with pytest.raises(InputError, match="3 groups"): split(films(30, 30))


def test_without_groups_the_split_is_the_one_without_the_column(tmp_path):
    df = table({"cat": 40, "dog": 30})
    plain = split(df).split
    for column in ("", None, [f"alone {i}" for i in range(70)]): assert split(df.assign(group=column)).split.equals(plain)
    assert split(df.assign(film=["x"] * 35 + ["y"] * 35), groups="nothing like that").split.equals(plain)
    with pytest.raises(InputError): split(df.assign(film=["x"] * 35 + ["y"] * 35), groups="film")


def test_find_groups_joins_looks_and_names(tmp_path):
    df = manifest(tmp_path, 4)
    Image.open(df.path[0]).point(lambda v: v * .95).save(df.path[5])
    Image.open(df.path[1]).point(lambda v: v * .95).save(df.path[6])
    names = find_groups(df.assign(group=["", "Tom", "", "", "", "", "Rex", "Rex"]))
    assert names.tolist() == ["like cat 0.png", "Rex+Tom", "", "", "", "like cat 0.png", "Rex+Tom", "Rex+Tom"]
    assert group_names(df.assign(group=[1.0, np.nan] * 4)).tolist() == ["1", ""] * 4


# ---- small squares

def test_presized_pictures_are_pixel_for_pixel_what_production_computes(tmp_path):
    df = manifest(tmp_path, 5)
    small = presize(df, tmp_path / "small", 24)
    assert (squares(small.path, 24) == squares(df.path, 24)).all()
    assert small.sha256.equals(df.sha256) and small.original.equals(df.path) and (small.width == 24).all() and small.label.equals(df.label)
    assert all(sha in path for sha, path in zip(small.sha256, small.path))


def test_presizing_goes_on_where_it_was_killed(tmp_path):
    df = manifest(tmp_path, 5)
    small = presize(df.head(4), tmp_path / "small", 24)
    times = [(tmp_path / p).stat().st_mtime_ns for p in small.path]
    (tmp_path / small.path[0]).unlink()
    whole = presize(df, tmp_path / "small", 24)
    assert [(tmp_path / p).stat().st_mtime_ns for p in small.path][1:] == times[1:] and len(list((tmp_path / "small").iterdir())) == 10
    assert (squares(whole.path, 24) == squares(df.path, 24)).all()


def test_presizing_what_vanished_or_changed_is_refused_by_name(tmp_path):
    df = manifest(tmp_path, 3)
    (tmp_path / "dog 1.png").unlink()
    with pytest.raises(InputError, match="dog 1.png"): presize(df, tmp_path / "small")
    assert not (tmp_path / "small").exists()
    noise(77).save(tmp_path / "dog 1.png")
    with pytest.raises(InputError, match="dog 1.png.*other bytes"): presize(df, tmp_path / "small")


def test_a_vanished_picture_is_named_by_squares_and_batches(tmp_path):
    df = split(manifest(tmp_path, 20))
    gone = df.path[df.split == "train"].iloc[0]
    (tmp_path / gone).unlink()
    for call in (lambda: squares(df.path, 16), lambda: make_dls(df, 16)):
        with pytest.raises(InputError, match=gone.rsplit("/")[-1]): call()


@pytest.mark.parametrize("phase", [clean, split, find_faults, find_groups, make_dls, lambda df: presize(df, "nowhere")])
def test_every_step_asks_for_its_columns_and_rows(phase):
    for bad in (pd.DataFrame(dict(colour=["red"])), pd.DataFrame(columns=["path", "label", "split", "sha256"])):
        with pytest.raises(InputError): phase(bad)


def test_batches_hold_the_pictures_of_core(tmp_path):
    df = split(manifest(tmp_path, 20))
    dls = make_dls(df, 32, 8, augment=False, device="cpu")
    assert list(dls.vocab) == ["cat", "dog"] and len(dls.train_ds) == 26 and len(dls.valid_ds) == 6
    xb, yb = dls.valid.one_batch()
    from fastai.vision.core import imagenet_stats
    mean, std = (np.array(s) for s in imagenet_stats)
    rows = df[df.split == "valid"]
    for x, y, path, label in zip(xb.numpy(), yb, rows.path, rows.label):
        np.testing.assert_allclose((x.transpose(1, 2, 0) * std + mean) * 255, picture_array(path, 32), atol=1e-3)
        assert dls.vocab[int(y)] == label
    assert (squares(rows.path[:2], 32)[1] == picture_array(rows.path.iloc[1], 32)).all()


def test_validation_pictures_are_never_changed_at_random(tmp_path):
    dls = make_dls(split(manifest(tmp_path, 20)), 32, 8, device="cpu")
    a, b = dls.valid.one_batch()[0], dls.valid.one_batch()[0]
    assert (a == b).all()


def test_labels_outside_the_problem_and_empty_classes_are_refused(tmp_path):
    df = split(manifest(tmp_path, 20))
    with pytest.raises(InputError, match="dog"): make_dls(df, 32, labels=("cat", "fox"))
    with pytest.raises(InputError, match="fox"): make_dls(df, 32, labels=("cat", "dog", "fox"))
    with pytest.raises(InputError, match="valid"): make_dls(df[(df.split != "valid") | (df.label == "cat")], 32)


def told_apart(exercise, right, wrong):
    assert check(exercise, right).passed, check(exercise, right).message
    got = [check(exercise, w) for w in wrong]
    assert not any(g.passed for g in got) and len({g.message for g in got}) == len(wrong) >= 3, got
    return [g.message for g in got]


def test_check_1_tells_wrong_answers_apart():
    good = lambda a, b: sum(r.tobytes() in {x.tobytes() for x in a} for r in b)
    said = told_apart("03.1", good, [lambda a, b: good(a, b) > 0, lambda a, b: len(b) - good(a, b), lambda a, b: len(b), lambda a, b: int(np.isin(a, b).sum() * 0 + 30)])
    for words, message in zip(("not whether", "don't leak", "length", "whole row"), said): assert words in message


def test_check_2_tells_wrong_answers_apart():
    right = {"mirror": False, "brighter": True, "small turn": True, "upside down": False}
    said = told_apart("03.2", right, [right | {"mirror": True}, right | {"upside down": True}, right | {"brighter": False}, {"mirror": False}, 7])
    for words, message in zip(("other way", "swaps", "lit", "brighter", "dictionary"), said): assert words in message


def test_check_3_tells_wrong_answers_apart():
    def right(df):
        n = df[df.group != ""].groupby("group").split.nunique()
        return list(n.index[n > 1])
    wrong = [lambda df: len(right(df)) > 0, lambda df: list((n := df.groupby("group").split.nunique()).index[n > 1]),
             lambda df: [g for g, n in df[df.group != ""].group.value_counts().items() if n > 1],
             lambda df: sorted(set(df.group[df.split == "train"]) & set(df.group[df.split == "test"]) - {""}), lambda df: ["a", "a"]]
    said = told_apart("03.3", right, wrong)
    for words, message in zip(("names", "empty", "no leak", "train and valid", "once"), said): assert words in message


def my_clean(df, distance=60, decode=True, blank=2, upright=True):
    "The reference of exercise 03.4, with knobs to spoil it."
    keep, seen = [], []
    for path in df.path:
        if not upright and Image.open(path).getexif().get(0x0112, 1) != 1: continue
        try: grey = open_picture(path).convert("L")
        except InputError:
            if not decode: keep.append(path)
            continue
        if np.asarray(grey).std() < blank: continue
        small = np.asarray(grey.resize((17, 16)), int)
        bits = small[:, 1:] > small[:, :-1]
        if any((bits != other).sum() < distance for other in seen): continue
        seen.append(bits)
        keep.append(path)
    return df[df.path.isin(keep)]


def test_check_4_says_what_is_missed_and_what_is_lost():
    def delete(df):
        Path(df.path[0]).unlink()
        return df
    wrong = [lambda df: my_clean(df, 1), lambda df: my_clean(df, decode=False), lambda df: my_clean(df, blank=0, distance=-1), lambda df: my_clean(df, upright=False),
             lambda df: my_clean(df, 115), lambda df: df.path.tolist(), delete, lambda df: df.iloc[:0]]
    said = told_apart("03.4", my_clean, wrong)
    for words, message in zip(("near duplicate", "corrupt", "blank", "sideways", "good pictures", "table", "deleted", "good pictures"), said): assert words in message, message


# ---- whole batches

def test_whole_batches_are_what_fastai_makes_one_by_one(tmp_path):
    df = split(manifest(tmp_path, 120))
    dls = make_dls(df, 32, 4, augment=False, device="cpu")
    for dl in dls.loaders:
        dl.shuffle, dl.drop_last = False, False
        whole = [(x.clone(), y.clone()) for x, y in dl]
        stored = dl.dataset.__dict__.pop("stored")
        single = list(dl)
        assert len(whole) == len(single) > 1
        for (x, y), (a, b) in zip(whole, single):
            assert type(x) is type(a) and type(y) is type(b) and torch.equal(x, a) and torch.equal(y, b)
        dl.dataset.stored = stored
    assert len(dls.train.dataset.stored[0]) == (df["split"] == "train").sum()


def test_squares_beyond_the_free_memory_lie_in_a_file():
    small, large = _room((4, 8, 8, 3), free=10**6), _room((4, 8, 8, 3), free=1000)
    assert type(small) is np.ndarray and isinstance(large, np.memmap)
    large[2] = 7
    assert large[2].min() == 7 and large[3].max() == 0 and torch.from_numpy(large)[2].min() == 7
    assert _room((0, 8, 8, 3), free=0).shape == (0, 8, 8, 3)
