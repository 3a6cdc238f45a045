"""How well faults are found: scored on drawn pets and on real photos, and what each kind of copy survives."""
from __future__ import annotations

import io
import sys
from pathlib import Path

import imagehash
import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, picture
from PIL import Image, ImageOps

from dlpipe_nb.collection import draw_factors, draw_pet, draw_pets
from dlpipe_nb.core import InputError, open_picture
from dlpipe_nb.preprocessing import (FAULTS, CleaningScore, _both_ways, _proposed, clean, examine, fault_of, fault_sheet, find_faults, near_pairs,
                                     score_cleaning)

sys.path.insert(0, str(ROOT / "benchmarks"))
from faults import KINDS, near_copy, plant, timed  # noqa: E402

PHOTOS = ROOT.parent / "shared" / "photos"


def saved(im, path, *args, **settings):
    im.save(path, *args, **settings)
    return path.as_posix()


def noise(seed): return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 36, 3), dtype=np.uint8))


def rows(*table, columns=("path", "label", "split")): return pd.DataFrame(table, columns=columns[:len(table[0])])


@pytest.fixture(scope="module")
def pets(): return [draw_pet(row) for row in draw_factors(40, 6).to_dict("records")]


# ---- the score

def passes(score: CleaningScore, kinds):
    recall = score.kinds["recall"]
    for kind in kinds: assert recall[kind] >= (0.9 if kind == "near_duplicate" else 0.98), (kind, score)
    assert score.thrown_away <= 0.01, score


@pytest.mark.parametrize("seed", range(1, 6))
def test_planted_faults_are_found_and_good_pictures_stay(seed, tmp_path):
    df = draw_pets(tmp_path, n=180, seed=seed, faults=8)
    key = pd.read_csv(tmp_path / "faults_key.csv", keep_default_na=False)
    kept, report = clean(df)
    score = score_cleaning(df, kept, key, report)
    assert score.kinds["planted"].eq(8).all() and score.good >= 120
    passes(score, KINDS)
    assert score.kinds.loc["wrong_label", "found"] == 0, "nothing in one picture tells that its label is wrong"


@pytest.fixture(scope="module")
def photographed(tmp_path_factory):
    if not PHOTOS.is_dir(): pytest.skip("no photos beside the repository, in ../shared/photos")
    return plant(PHOTOS, tmp_path_factory.mktemp("photos"))


def test_faults_planted_in_real_photos_are_found(photographed):
    df, key = photographed
    assert len(key) == 40 and len(df) == 1600 + 15
    kept, report = clean(df)
    passes(score_cleaning(df, kept, key, report), KINDS)


def test_checking_photos_takes_at_most_twice_the_time_of_decoding_them(photographed):
    "The same cores and threads, one after the other; the better of two rounds each."
    decoding, finding = timed(photographed[0], rounds=2)
    assert finding <= 2 * decoding, f"{finding:.2f} s to check what Pillow decodes in {decoding:.2f} s"


def test_the_score_counts_as_a_person_would():
    df = rows(*[(f"data/pets/cat/{k}.jpg", "cat", "") for k in range(12)])
    key = rows(("cat/0.jpg", "corrupt", ""), ("cat/1.jpg", "duplicate", "cat/2.jpg"), ("cat/3.jpg", "near_duplicate", "cat/4.jpg"), ("cat/5.jpg", "sideways", ""),
               ("cat/6.jpg", "label_conflict", "cat/7.jpg"), ("cat/8.jpg", "wrong_label", ""), columns=("path", "fault", "of"))
    def score(*gone, report=None): return score_cleaning(df, df.drop(index=list(gone)), key, report)
    perfect = score(0, 1, 4, 6, 7)
    assert perfect.good == 3 + 1 + 2 and perfect.lost == () and perfect.kinds["found"].to_dict() == dict(corrupt=1, duplicate=1, near_duplicate=1, sideways=0, label_conflict=1, wrong_label=0)
    assert len(score(0, 1, 2).lost) == 1, "both of a pair: one good picture is lost"
    assert score(5).lost == ("data/pets/cat/5.jpg",) and score(5).kinds.loc["sideways", "found"] == 0
    assert score(report=rows((df.path[5], "sideways"), columns=("path", "fault"))).kinds.loc["sideways", "found"] == 1
    assert score(9, 10, 11).thrown_away == 0.5 and score(8).kinds.loc["wrong_label", "found"] == 1
    assert score().kinds["recall"].sum() == 0 and "0/1" in repr(score())


# ---- single pictures

SAVING = {"JPEG": {}, "progressive": dict(progressive=True), "PNG": {}, "GIF": {}, "WEBP": dict(lossless=True), "BMP": {}, "TIFF": {}}


@pytest.mark.parametrize("kind", SAVING)
@pytest.mark.parametrize("share", [0.2, 0.5, 0.8, 0.97])
def test_a_file_that_was_cut_off_is_truncated_in_every_format(kind, share, pets, tmp_path):
    out, name = io.BytesIO(), kind if kind != "progressive" else "JPEG"
    pets[1].resize((220, 180)).save(out, name, **SAVING[kind])
    path = tmp_path / f"cut.{name.lower()}"
    path.write_bytes(out.getvalue())
    assert fault_of(path) == ("", "")
    path.write_bytes(out.getvalue()[:int(len(out.getvalue()) * share)])
    with pytest.raises(InputError): open_picture(path)
    assert fault_of(path)[0] in ("truncated",) if name != "TIFF" else fault_of(path)[0] in ("truncated", "unreadable")


def test_reading_at_a_small_size_sees_every_cut_that_reading_in_full_sees(pets, tmp_path):
    out = io.BytesIO()
    pets[2].resize((500, 400)).save(out, "JPEG", quality=90)
    data, path = out.getvalue(), tmp_path / "cut.jpg"
    for end in np.linspace(1, len(data), 60).astype(int):
        path.write_bytes(data[:end])
        try: full = open_picture(path) is not None
        except InputError: full = False
        assert (fault_of(path)[0] == "") is full, end


def test_what_never_was_a_picture_is_unreadable_not_truncated(tmp_path):
    for name, data in {"text.jpg": b"<html>not found</html>", "zero.png": b"", "noise.jpg": bytes(range(256)) * 20}.items():
        (tmp_path / name).write_bytes(data)
        assert fault_of(tmp_path / name)[0] == "unreadable", name
    damaged = bytearray(picture((9, 9, 9), (80, 80)))
    damaged[len(damaged) // 2] ^= 255
    (tmp_path / "damaged.png").write_bytes(damaged)
    assert fault_of(tmp_path / "damaged.png")[0] == "unreadable"
    (tmp_path / "folder.jpg").mkdir()
    assert fault_of(tmp_path / "folder.jpg")[0] == "unreadable"


def test_oddities_are_noted_and_cost_no_row(pets, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    paths = [saved(pets[0].convert("CMYK"), tmp_path / "cmyk.jpg"), saved(pets[1].convert("L").convert("I;16").point(lambda v: v * 257), tmp_path / "16.png"),
             saved(pets[2].quantize(32), tmp_path / "palette.png"), saved(pets[3].convert("RGBA").rotate(20), tmp_path / "alpha.webp"), saved(pets[4].convert("LA"), tmp_path / "la.png"),
             saved(pets[5].convert("1"), tmp_path / "1.png"), saved(pets[6], tmp_path / "png.jpg", "PNG"), saved(pets[7], tmp_path / "nothing", "PNG"),
             saved(pets[8], tmp_path / "turned.jpg", exif=exif), saved(pets[9].convert("L"), tmp_path / "grey.jpg"), saved(pets[10], tmp_path / "fine.jfif", "JPEG"),
             saved(pets[11].convert("CMYK"), tmp_path / "both.tif", "JPEG", exif=exif)]
    kept, report = clean(rows(*[(p, "cat") for p in paths]))
    assert len(kept) == 12 and set(report["action"]) == {"noted"}
    said = report.groupby(report["path"].map(lambda p: Path(p).name))["fault"].agg(set).to_dict()
    odd, wrong = {"odd mode"}, {"wrong extension"}
    assert said == {"cmyk.jpg": odd, "16.png": odd, "palette.png": odd, "alpha.webp": odd, "la.png": odd, "1.png": odd, "png.jpg": wrong, "nothing": wrong,
                    "turned.jpg": {"sideways"}, "both.tif": {"odd mode", "wrong extension", "sideways"}}


def test_a_bomb_is_refused_before_it_is_decoded(tmp_path):
    import zlib
    raw = bytearray(picture(size=(20, 20)))
    raw[16:24] = (60000).to_bytes(4, "big") * 2
    raw[29:33] = zlib.crc32(raw[12:29]).to_bytes(4, "big")
    (tmp_path / "bomb.png").write_bytes(raw)
    fault, detail = fault_of(tmp_path / "bomb.png")
    assert fault == "unreadable" and "million" in detail


# ---- copies


def copies(im):
    "The same picture saved again in the ways that must be survived."
    w, h = im.size
    def again(im, kind="JPEG", **settings):
        out = io.BytesIO()
        im.save(out, kind, **settings)
        return open_picture(out.getvalue())
    cut = lambda l, t, r, b: im.crop((round(w * l), round(h * t), round(w * (1 - r)), round(h * (1 - b))))
    return {"quality 40": again(im, quality=40), "BMP": again(im, "BMP"), "WebP": again(im, "WEBP", quality=60), "half the size": again(im.resize((w // 2, h // 2)), quality=85),
            "twice the size": again(im.resize((2 * w, 2 * h)), quality=85), "+10 %": again(im.point(lambda v: v * 1.1), quality=90), "-10 %": again(im.point(lambda v: v * .9), quality=90),
            "crop 2 %": again(cut(.02, .02, .02, .02), quality=90), "crop 5 %": again(cut(.05, .05, .05, .05), quality=90), "one corner": again(cut(.05, .05, 0, 0), quality=90),
            "everything": again(cut(.03, .01, .02, .03).resize((w * 3 // 4, h * 3 // 4)).point(lambda v: v * .95), quality=60), "mirrored": again(ImageOps.mirror(im), quality=90)}


@pytest.mark.parametrize("way", copies(Image.new("RGB", (96, 96))))
def test_a_near_duplicate_survives(way, pets, tmp_path):
    paths = [saved(im, tmp_path / f"{k}.png") for k, im in enumerate(pets)]
    again = [saved(copies(im)[way], tmp_path / f"{k} again.{'bmp' if way == 'BMP' else 'png'}") for k, im in enumerate(pets)]
    kept, report = clean(rows(*[(p, "cat") for p in paths + again]))
    pairs = {frozenset((Path(p).stem.split()[0], Path(o).stem.split()[0])) for p, o in zip(report["path"], report["of"])}
    assert len(report) >= 38 and all(len(p) == 1 for p in pairs), "a copy of another picture"
    assert set(report["fault"]) == {"near duplicate"} and report["detail"].str.contains("mirrored").all() == (way == "mirrored")


@pytest.mark.parametrize("knobs", [{"night": 1}, {"camera": 1}, {}])
def test_different_pets_are_no_copies_however_dark_or_blurred(knobs, tmp_path):
    df = draw_pets(tmp_path, n=90, seed=8, knobs=knobs)
    assert len(find_faults(df)) <= 1
    for p in df["path"]: open_picture(p).point(lambda v: v * .2).save(p, "PNG")
    assert len(near_pairs(examine(df))) <= 1


def test_the_larger_copy_stays_and_the_first_of_equals(pets, tmp_path):
    paths = [saved(pets[0].resize((48, 48)), tmp_path / "small.png"), saved(pets[0], tmp_path / "large.png"), saved(pets[1], tmp_path / "first.png"), saved(pets[1], tmp_path / "second.png")]
    report = find_faults(rows(*[(p, "cat") for p in paths]))
    assert report[["path", "fault", "of"]].values.tolist() == [[paths[0], "near duplicate", paths[1]], [paths[3], "duplicate", paths[2]]]


def test_a_copy_in_another_split_is_told_twice_and_the_test_keeps_its_own(pets, tmp_path):
    paths = [saved(im, tmp_path / f"{k}.png") for k, im in enumerate([pets[0], pets[0], pets[1], pets[1].point(lambda v: v * .96), pets[2], pets[2]])]
    df = rows(*zip(paths, ["cat"] * 6, ["train", "test", "valid", "train", "train", "train"]))
    report = find_faults(df)
    assert sorted(report[["path", "fault", "of"]].values.tolist()) == sorted([
        [paths[0], "across splits", paths[1]], [paths[0], "duplicate", paths[1]], [paths[3], "across splits", paths[2]], [paths[3], "near duplicate", paths[2]], [paths[5], "duplicate", paths[4]]])
    assert clean(df)[0]["path"].tolist() == [paths[1], paths[2], paths[4]]


def test_copies_with_different_labels_both_go_be_they_exact_or_near(pets, tmp_path):
    paths = [saved(im, tmp_path / f"{k}.png") for k, im in enumerate([pets[0], pets[0], pets[1], pets[1].point(lambda v: v * .96), pets[2], pets[1]])]
    kept, report = clean(rows(*zip(paths, ["cat", "dog", "cat", "dog", "cat", "cat"])))
    assert kept["path"].tolist() == [paths[4]] and set(report["fault"]) == {"label conflict"} and len(report) == 5
    assert report.set_index("path").loc[paths[2], "of"] == paths[3] and "'dog'" in report.set_index("path").loc[paths[2], "detail"]


def test_a_chain_of_copies_keeps_what_is_no_copy_of_what_stays(pets, tmp_path):
    paths = [saved(im, tmp_path / f"{k}.png") for k, im in enumerate([pets[0], pets[0], pets[0]])]
    kept, report = clean(rows(*[(p, "cat") for p in paths + paths[:1]]))
    assert kept["path"].tolist() == paths[:1] and report["of"].eq(paths[0]).all() and len(report) == 3
    assert "listed twice" in set(report["detail"])


def test_the_search_for_pairs_finds_what_comparing_all_finds():
    rng = np.random.default_rng(0)
    bits = rng.random((3000, 128)) < .5
    bits[1500:] = bits[:1500] ^ (rng.random((1500, 128)) < .2)
    found = {p for i, j in _proposed(bits, bits, 32) for p in zip(i.tolist(), j.tolist())}
    expected = {(i, int(j)) for i in range(len(bits)) for j in i + 1 + np.flatnonzero((bits[i] != bits[i + 1:]).sum(axis=1) <= 32)}
    assert found == expected and len(found) > 1000


def test_the_hash_is_image_hashs_and_a_mirror_image_has_the_mirrored_one(pets):
    for im in pets[:10]:
        small = im.resize((32, 32))
        grey = np.asarray(small.convert("L").resize((9, 8), Image.Resampling.LANCZOS), int)
        as_is, mirrored = _both_ways(small)
        assert (as_is[:64].reshape(8, 8) == (grey[:, 1:] > grey[:, :-1])).all()
        assert (as_is[:64] == imagehash.dhash(small).hash.ravel()).all() and (mirrored == _both_ways(ImageOps.mirror(small))[0]).all()


# ---- the report

def test_every_fault_can_be_shown(pets, tmp_path):
    df = draw_pets(tmp_path, n=30, seed=2, faults=1)
    report = find_faults(df)
    assert set(report["action"]) == {"removed", "noted"} and set(report["fault"]) < set(FAULTS)
    fig = fault_sheet(report)
    titles = [ax.get_title() for ax in fig.axes]
    assert set(titles) - {"… of", "… upright"} == set(report["fault"])
    assert len(fault_sheet(report.iloc[:0]).axes) == 0


def test_cleaning_deletes_nothing_and_a_clean_set_stays_whole(pets, tmp_path):
    paths = [saved(im, tmp_path / f"{k}.png") for k, im in enumerate(pets[:8])]
    before = {p: Path(p).read_bytes() for p in paths}
    df = rows(*[(p, "cat") for p in paths])
    kept, report = clean(df)
    assert kept.equals(df) and not len(report) and list(report) == ["path", "fault", "detail", "of", "action"]
    assert {p: Path(p).read_bytes() for p in paths} == before


def test_noise_has_no_copies(tmp_path):
    df = rows(*[(saved(noise(k), tmp_path / f"{k}.png"), "cat") for k in range(150)])
    assert not len(find_faults(df))


def test_five_ways_of_copying_differ(pets):
    assert len({near_copy(pets[0], way) for way in range(5)}) == 5
