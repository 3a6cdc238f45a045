"Chapter 06: wrong labels are found, looked at and mended; decisions can be taken back; the sealed test stays as it is."
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from cleanlab.filter import find_label_issues
from cleanlab.rank import get_label_quality_scores
from PIL import Image

from dlpipe_nb.collection import draw_pets, read_labels
from dlpipe_nb.core import InputError, Run
from dlpipe_nb.evaluation import (Relabeller, edge_views, label_errors, label_errors_into, network_views, out_of_sample,
                                  plot_label_errors, relabel_into)
from dlpipe_nb.problem import define_into


def share_found(errors, key, top=.07):
    "The share of the planted wrong labels among the first rows, as the issue counts it."
    first = {"/".join(p.split("/")[-2:]) for p in errors["path"].head(round(top * len(errors)))}
    return len(first & set(key["path"])) / len(key)


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    "Drawn pets of which five of a hundred are filed under the other animal, and the key."
    folder = tmp_path_factory.mktemp("planted") / "pets"
    df = draw_pets(folder, 1000, seed=7, size=64, faults={"wrong_label": 50})
    return df, pd.read_csv(folder / "faults_key.csv")


@pytest.fixture(scope="module")
def outside(planted): return out_of_sample(planted[0])


def test_planted_wrong_labels_are_found(planted, outside):
    df, key = planted
    errors = label_errors(outside)
    assert len(key) == 50 == round(.05 * len(df)) and len(errors) == len(df)
    assert share_found(errors, key) >= .7
    assert errors.score.is_monotonic_increasing and (errors.label != errors.suggested).all() and errors.flagged.dtype == bool
    assert set(errors.columns) >= {"path", "label", "suggested", "score", "flagged", "sha256"}
    assert plot_label_errors(errors, 6).axes and "no labels" in plot_label_errors(errors.iloc[:0])._suptitle.get_text()


def test_the_same_seed_gives_the_same_predictions(planted):
    some = pd.concat([planted[0][planted[0].label == l].head(40) for l in ("cat", "dog")])
    pd.testing.assert_frame_equal(out_of_sample(some), out_of_sample(some))
    assert not np.allclose(out_of_sample(some).p_cat, out_of_sample(some, seed=2).p_cat)


def test_a_label_is_judged_by_a_model_that_has_not_seen_it(planted, monkeypatch):
    import dlpipe_nb.evaluation as ev
    some = pd.concat([planted[0][planted[0].label == l].head(25) for l in ("cat", "dog")]).reset_index(drop=True)
    marks = np.arange(50, dtype=np.float32)[:, None, None].repeat(2, 1)
    seen = []
    monkeypatch.setattr(ev, "edge_views", lambda paths: marks)
    monkeypatch.setattr(ev, "_fitted", lambda views, y, rest: seen.append((set(views.ravel()), set(rest.ravel()))) or np.zeros((len(rest), 2)))
    groups = [f"g{i // 5}" if i < 20 else "" for i in range(50)]
    for frame in (some, some.assign(group=groups)):
        seen.clear()
        out_of_sample(frame)
        assert len(seen) == 5 and not any(a & b for a, b in seen) and set.union(*(b for _, b in seen)) == set(range(50))
    for _, rest in seen:                                     # near copies stay together
        assert len({groups[int(i)] for i in range(20) if i in rest}) * 5 == len([i for i in rest if i < 20])


def test_three_labels(tmp_path):
    rows = []
    for i in range(60):
        label = ("bar", "dot", "ring")[i % 3]
        a = np.full((48, 48, 3), 30 + i, np.uint8)
        yy, xx = np.mgrid[:48, :48]
        far = np.hypot(yy - 24, xx - 20 - i % 7)
        a[{"bar": abs(yy - 24) < 5, "dot": far < 12, "ring": (far < 16) & (far > 10)}[label]] = 240
        Image.fromarray(a).save(tmp_path / f"{i}.png")
        rows.append((str(tmp_path / f"{i}.png"), label))
    df = pd.DataFrame(rows, columns=["path", "label"])
    wrong = df.assign(label=["ring" if i in (0, 3) else l for i, l in enumerate(df.label)])
    errors = label_errors(out_of_sample(wrong))
    assert set(errors.path.head(2)) == {df.path[0], df.path[3]} and set(errors.suggested.head(2)) == {"bar"}


def test_against_cleanlab():
    rng = np.random.default_rng(0)
    p = rng.dirichlet([1, 1, 1], 300)
    given = np.array([rng.choice(3, p=r) for r in p])
    given[:30] = (p[:30].argmax(1) + 1) % 3
    names = np.array(["a", "b", "c"])
    preds = pd.DataFrame({"path": [str(i) for i in range(300)], "label": names[given], "predicted": names[p.argmax(1)],
                          "probability": p.max(1), **{f"p_{l}": p[:, i] for i, l in enumerate(names)}})
    errors = label_errors(preds)
    at = errors.path.astype(int)
    np.testing.assert_allclose(errors.score, get_label_quality_scores(given, p, method="normalized_margin")[at], atol=1e-9)
    assert (errors.flagged == find_label_issues(given, p, n_jobs=1)[at]).all() and errors.flagged.any()


@pytest.mark.parametrize("spoil,says", [
    (lambda d: d.assign(label="cat"), "1 labels"), (lambda d: d[d.label == "cat"], "1 labels"),
    (lambda d: pd.concat([d[d.label == "cat"], d[d.label == "dog"].head(3)]), "one with 3"), (lambda d: d.iloc[:0], "0 labels"),
])
def test_too_little_to_judge(planted, spoil, says):
    with pytest.raises(InputError, match=says): out_of_sample(spoil(planted[0]))


def test_one_class_of_predictions_is_no_crash(outside):
    errors = label_errors(outside[outside.label == "cat"])
    assert not errors.flagged.any() and set(errors.suggested) == {"dog"}


@pytest.fixture
def run(tmp_path, planted):
    "A split run of 60 pictures, ten of them in the sealed test."
    run = Run(tmp_path / "run")
    define_into(run)
    df = pd.concat([planted[0][planted[0].label == l].head(30) for l in ("cat", "dog")])
    run.save_manifest(df.assign(split=(["train"] * 20 + ["valid"] * 5 + ["test"] * 5) * 2))
    return run


@pytest.fixture
def errors(run, outside): return label_errors(outside.drop(columns="split", errors="ignore").merge(run.manifest()[["sha256", "split"]], on="sha256"))


def test_relabel_undo_and_go_on(run, errors, tmp_path):
    mine, file = errors[errors.split != "test"].head(6), tmp_path / "decisions.csv"
    who = Relabeller(mine, ("cat", "dog"), file, by="ada")
    first = who.current.path
    assert first == mine.path.iloc[0]
    who.change()
    who.keep()
    who.skip()
    assert who.choices().changed.tolist() == [True, False, False] and who.choices().label.tolist()[2] == "" and "1 changed" in repr(who)
    assert who.undo().path == mine.path.iloc[2] and len(who.choices()) == 2
    again = Relabeller(mine, ("cat", "dog"), file, by="ada")                # another day
    assert again.current.path == mine.path.iloc[2] and again.choices().changed.sum() == 1
    again.change("cat" if again.current.label == "dog" else "dog")
    again.undo(), again.undo(), again.undo()
    assert again.current.path == first and len(again.choices()) == 0
    with pytest.raises(InputError, match="take back"): again.undo()
    for _ in mine.index: again.keep()
    assert again.current is None and not again.choices().changed.any() and len(read_labels(file)) == 6
    with pytest.raises(InputError, match="none left"): again.keep()


def test_the_manifest_follows_and_comes_back(run, errors, tmp_path):
    before = run.manifest()
    mine = errors[errors.split != "test"].head(4)
    who = Relabeller(mine, ("cat", "dog"), tmp_path / "d.csv")
    for _ in range(3): who.change()
    changed = relabel_into(run, who.choices())
    now = run.manifest()
    assert len(changed) == 3 and (now.label != before.label).sum() == 3 and set(changed.sha256) == set(mine.sha256[:3])
    pd.testing.assert_frame_equal(now.drop(columns="label"), before.drop(columns="label"))
    who.undo()
    assert len(relabel_into(run, who.choices())) == 2 and (run.manifest().label != before.label).sum() == 2
    assert len(relabel_into(run, who.choices().iloc[:0])) == 0
    pd.testing.assert_frame_equal(run.manifest(), before)
    assert len(relabel_into(run, read_labels(tmp_path / "d.csv"))) == 2


def test_the_sealed_test_is_not_touched(run, errors, tmp_path):
    before = (run / "manifest.csv").read_bytes()
    with pytest.raises(InputError, match="sealed test"): Relabeller(errors, ("cat", "dog"), tmp_path / "d.csv")
    assert not (tmp_path / "d.csv").exists()
    held = errors[errors.split == "test"]
    with pytest.raises(InputError, match=f"{len(held)} of the sealed test"): relabel_into(run, held.assign(label=held.suggested))
    with pytest.raises(InputError, match="fox"): relabel_into(run, errors[errors.split != "test"].assign(label="fox"))
    with pytest.raises(InputError, match="none of them"): relabel_into(run, errors.assign(label="cat", sha256="0" * 64))
    assert (run / "manifest.csv").read_bytes() == before and not (run / "relabelled.csv").exists()


def test_label_errors_into_a_run(run):
    errors = label_errors_into(run)
    kept = pd.read_csv(run / "label_errors.csv")
    assert len(errors) == len(kept) == 50 and set(errors.split) == {"train", "valid"}
    assert Image.open(run / "figures" / "label_errors.png").width > 300
    assert not kept.path[0].startswith("/")


def test_the_networks_features_are_taken_where_they_are_better(run, monkeypatch):
    import dlpipe_nb.evaluation as ev
    from dlpipe_nb.training import make_model, save_learner
    save_learner(SimpleNamespace(model=make_model("small", 2), record={"labels": ["cat", "dog"], "size": 64, "arch": "small"}), run / "learner")
    asked, real, dice = [], ev.network_views, np.random.default_rng(0)
    monkeypatch.setattr(ev, "edge_views", lambda paths: dice.normal(size=(len(paths), 2, 9)))      # edges that know nothing
    monkeypatch.setattr(ev, "network_views", lambda learn, paths: asked.append(len(list(paths))) or real(learn, paths))
    for share, want in ((0, []), (1, [50])):
        valid = run.manifest().query("split == 'valid'")
        run.save_manifest(valid[["path", "label"]].assign(correct=bool(share)), "valid_predictions.csv")
        assert len(label_errors_into(run)) == 50 and asked == want


def test_views_of_a_picture_and_its_mirror_image(tmp_path):
    a = np.zeros((64, 64, 3), np.uint8)
    a[10:40, 5:25] = 200
    Image.fromarray(a).save(tmp_path / "a.png")
    Image.fromarray(a[:, ::-1]).save(tmp_path / "b.png")
    v = edge_views([tmp_path / "a.png", tmp_path / "b.png"])
    assert v.shape == (2, 2, 1764) and v.dtype == np.float32
    np.testing.assert_allclose(v[0, 0], v[1, 1], atol=1e-6)
