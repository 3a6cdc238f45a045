"""Faults, splits, the seal and the batches."""
from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from conftest import picture
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dlpipe_nb.core import InputError, Run, check, content_hash, picture_array, sha256_of
from dlpipe_nb.preprocessing import clean, clean_into, fault_of, find_faults, make_dls, split, squares


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
    for name, data, fault in (("cut.jpg", whole[: len(whole) // 2], "unreadable"), ("zero.png", b"", "unreadable"), ("text.png", b"x", "unreadable"),
                              ("small.png", picture(size=(15, 200)), "too small"), ("blank.png", picture(), "blank")):
        (tmp_path / name).write_bytes(data)
        assert fault_of(tmp_path / name)[0] == fault, name
    assert fault_of(noise) == ("", "") and fault_of(tmp_path / "gone.png")[0] == "unreadable"


def test_duplicates_and_conflicts(tmp_path):
    df = manifest(tmp_path, 4)
    for a, b in ((0, 1), (2, 6)):
        with open(df.path[a], "rb") as src, open(df.path[b], "wb") as dest: dest.write(src.read())
    faults = find_faults(df).set_index("path").fault.to_dict()
    assert faults == {df.path[1]: "duplicate", df.path[2]: "label conflict", df.path[6]: "label conflict"}
    kept, report = clean(df)
    assert len(kept) == 5 and len(report) == 3 and df.path[0] in set(kept.path)


def test_a_picture_that_vanished_since_collection_is_a_fault_not_a_crash(tmp_path):
    df = manifest(tmp_path, 3)
    (tmp_path / "cat 0.png").unlink()
    assert find_faults(df).fault.tolist() == ["unreadable"]


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
    assert len(clean_into(run)) == 1 and len(run.manifest("faults.csv")) == 1
    assert run.read_json("seal.json") == sealed | {"opened": [{"model": "m", "at": "t"}]}
    clean_into(run, seed=2)
    assert run.read_json("seal.json")["sha256"] != sealed["sha256"] and run.read_json("seal.json")["opened"] == []


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


def test_the_checks_tell_wrong_answers_apart():
    good = lambda a, b: sum(r.tobytes() in {x.tobytes() for x in a} for r in b)
    wrong = [lambda a, b: good(a, b) > 0, lambda a, b: len(b) - good(a, b), lambda a, b: len(b), lambda a, b: 3]
    assert check("03.1", good).passed and len({check("03.1", w).message for w in wrong}) == 4
    right = {"mirror": False, "brighter": True, "small turn": True, "upside down": False}
    wrong = [right | {"mirror": True}, right | {"upside down": True}, right | {"brighter": False}, {"mirror": False}, 7]
    assert check("03.2", right).passed and len({check("03.2", w).message for w in wrong}) == 5
    assert not any(check("03.2", w).passed for w in wrong)
