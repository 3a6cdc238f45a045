"Chapter 04: the descriptions, the baseline against scikit-learn, embeddings of any Learner, and the exercises' checks."
import hashlib
import json

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.vision.core import imagenet_stats
from matplotlib.figure import Figure
from PIL import Image
from sklearn.neighbors import NearestNeighbors
from torch import nn

from dlpipe_nb.core import InputError, PictureError, Run, check, picture_array
from dlpipe_nb.features import (baseline_into, colour_histogram, edge_directions, embed, fit_baseline, hand_features,
                                hand_scores, map_pictures, nearest, pixel_features, plot_map, plot_neighbours, project,
                                symmetry)

LABELS = ("cat", "dog", "fox")


def striped(label, rng, size=48):
    "A picture whose label is the direction of its stripes: upright for a cat, level for a dog, slanted for a fox."
    y, x = np.mgrid[:size, :size] + rng.uniform(0, 9)
    wave = np.sin({"cat": x, "dog": y, "fox": (x + y) / 1.4}[label] / 2) * 60 + 128
    noise = rng.normal(0, 10, (size, size, 3))
    return Image.fromarray(np.clip(wave[..., None] * rng.uniform(0.6, 1.3, 3) + noise, 0, 255).astype(np.uint8))


def striped_run(folder, labels=LABELS[:2], each=18) -> Run:
    "A run with a split manifest of striped pictures."
    rng, rows = np.random.default_rng(0), []
    (folder / "pictures").mkdir(parents=True)
    for label in labels:
        for i in range(each):
            path = folder / "pictures" / f"{label} {i}.png"
            striped(label, rng).save(path)
            part = "train" if i < each * 2 // 3 else "valid" if i < each * 5 // 6 else "test"
            rows.append((str(path), label, part, hashlib.sha256(path.read_bytes()).hexdigest(), 48, 48, "drawn"))
    run = Run(folder / "run")
    run.save_manifest(pd.DataFrame(rows, columns="path label split sha256 width height source".split()))
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory): return striped_run(tmp_path_factory.mktemp("two classes"))


@pytest.fixture(scope="module")
def df(run): return run.manifest()


# ---- descriptions

def test_pixels_are_the_pictures_own(df):
    X = pixel_features(df, 8)
    assert X.shape == (len(df), 8 * 8 * 3) and X.dtype == np.float32
    for i in (0, 20): np.testing.assert_allclose(X[i], picture_array(df.path[i], 8).ravel() / 255, atol=1e-6)


def test_rows_stand_in_the_order_of_the_pictures(df):
    back = df.iloc[::-1]
    assert (pixel_features(back, 8) == pixel_features(df, 8)[::-1]).all()
    assert (hand_features(back, 32) == hand_features(df, 32)[::-1]).all()


@pytest.mark.parametrize("size, d", [(64, 28 + 7 * 7 * 36 + 3), (32, 28 + 3 * 3 * 36 + 3), (16, 28 + 36 + 3)])
def test_hand_features_have_the_stated_length(df, size, d):
    assert hand_features(df.head(3), size).shape == (3, d)


def test_colours_are_shares():
    red = np.zeros((10, 10, 3), np.uint8)
    red[..., 0] = 255
    h = colour_histogram(red)
    assert h.shape == (28,) and h[0] == 1 and h[12 + 7] == 1 and h[20 + 7] == 1 and h.sum() == 3
    half = red.copy()
    half[:5] = (0, 255, 255)
    np.testing.assert_allclose(colour_histogram(half)[[0, 6]], 0.5)


def test_colours_forget_the_place_and_edges_forget_the_light():
    a = np.array(striped("cat", np.random.default_rng(1)))
    np.testing.assert_allclose(colour_histogram(np.roll(a, 7, axis=1)), colour_histogram(a))
    np.testing.assert_allclose(edge_directions(a // 2 + 40), edge_directions(a), atol=0.05)


def test_symmetry_is_one_for_a_mirror_image():
    a = np.random.default_rng(0).integers(0, 256, (20, 10, 3), dtype=np.uint8)
    mirror = np.concatenate([a, a[:, ::-1]], axis=1)
    np.testing.assert_allclose(symmetry(mirror), 1)
    np.testing.assert_allclose(symmetry(a[:, ::-1]), symmetry(a))
    upper = mirror.copy()
    upper[10:, :10] = 0
    assert symmetry(upper)[1] == 1 and symmetry(upper)[2] < 1


@pytest.mark.parametrize("describe", [lambda a: a, lambda a: 1.0, lambda a: np.arange(int(a[0, 0, 0]) % 7)])
def test_a_description_is_one_row_of_one_length(df, describe):
    with pytest.raises(InputError, match="row of numbers, always as many"): map_pictures(df, describe, 8)


def test_bad_manifests_and_pictures(df, tmp_path):
    with pytest.raises(InputError, match="path"): pixel_features(df.drop(columns="path"))
    with pytest.raises(InputError, match="no rows"): pixel_features(df.iloc[:0])
    with pytest.raises(PictureError, match="no file"): pixel_features(df.assign(path=str(tmp_path / "gone.png")))
    with pytest.raises(InputError, match="16×16"): hand_features(df, 12)


# ---- the baseline

@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("labels", [LABELS[:2], LABELS])
def test_stored_weights_say_what_scikit_learn_says(tmp_path, labels):
    run = striped_run(tmp_path, labels)
    found = baseline_into(run)
    df = run.manifest()
    train, test = df[df.split == "train"], df[df.split == "test"]
    model = fit_baseline(hand_features(train), train.label)
    assert (hand_scores(run, test) == model.predict(hand_features(test))).all()
    assert found["hand"]["accuracy"] > 0.9 and found["majority"]["accuracy"] == pytest.approx(1 / len(labels))


def test_baseline_into_writes_what_the_contract_says(run):
    found = baseline_into(run)
    assert json.loads((run / "features.json").read_text()) == found and run.has("features")
    assert found["split"] == "valid" and found["n"] == 6 and found["pixels"]["dimensions"] == 3072
    with np.load(run / "features.npz", allow_pickle=False) as stored:
        assert set(stored) == {"coef", "intercept", "mean", "scale", "labels", "size"}
    assert Image.open(run / "figures" / "baselines.png").width > 500


def test_baseline_into_never_opens_a_test_picture(tmp_path):
    run = striped_run(tmp_path)
    df = run.manifest()
    for path in df.path[df.split == "test"]: open(path, "wb").close()
    baseline_into(run)


def test_the_same_data_give_the_same_baseline(run, df):
    X = hand_features(df, 32)
    assert (fit_baseline(X, df.label)[-1].coef_ == fit_baseline(X, df.label)[-1].coef_).all()


def test_bad_features():
    X, y = np.random.default_rng(0).normal(size=(10, 3)), ["a", "b"] * 5
    for X_, y_, found in ((X, y[:9], "9 labels"), (X[0], y, "features"), (np.where(X > 1, np.nan, X), y, "aren't"),
                          (X, ["a"] * 10, "one class")):
        with pytest.raises(InputError, match=found): fit_baseline(X_, y_)


def test_scores_need_a_baseline_and_a_split(tmp_path, df):
    with pytest.raises(InputError, match="ensure"): hand_scores(Run(tmp_path), df)
    unsplit = Run(tmp_path / "unsplit")
    unsplit.save_manifest(df.assign(split=""))
    with pytest.raises(InputError, match="split manifest"): baseline_into(unsplit)
    assert not (unsplit / "features.npz").exists() and not unsplit.has("features")


# ---- embeddings

def learner(*layers, size=32):
    items = [(torch.zeros(3, size, size), 0)] * 2
    return Learner(DataLoaders.from_dsets(items, items, bs=2, num_workers=0, device="cpu"), nn.Sequential(*layers),
                   loss_func=nn.CrossEntropyLoss())


def test_an_embedding_is_what_the_last_layers_get(df):
    torch.manual_seed(0)
    conv, head = nn.Conv2d(3, 5, 3), nn.Linear(5, 2)
    learn = learner(conv, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(), head)
    learn.model.train()
    E = embed(learn, df, bs=7)
    x = torch.from_numpy(np.stack([picture_array(p, 32) for p in df.path])).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in imagenet_stats)
    with torch.no_grad(): by_hand = conv((x - mean) / std).mean((2, 3)).numpy()
    assert E.dtype == np.float32 and E.shape == (len(df), 5)
    np.testing.assert_allclose(E, by_hand, atol=1e-5)
    assert learn.model.training and not any(m._forward_hooks for m in learn.model.modules())


def test_embed_knows_torchvision_bodies_with_fastais_head(df):
    from dlpipe_nb.training import make_model
    learn = learner(make_model("resnet18", 2))
    learn.record = {"size": 64}
    assert embed(learn, df.head(2)).shape == (2, 1024)


def test_no_hook_is_left_when_embedding_breaks(df):
    learn = learner(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(99, 2))
    with pytest.raises(RuntimeError): embed(learn, df)
    assert not any(m._forward_hooks for m in learn.model.modules())
    with pytest.raises(InputError, match="pooling"): embed(learner(nn.Conv2d(3, 2, 3)), df)


def test_nearest_against_scikit_learn():
    E = np.random.default_rng(0).normal(size=(50, 7))
    oracle = NearestNeighbors(n_neighbors=6, metric="cosine").fit(E).kneighbors(E, return_distance=False)
    for i in range(50): assert (nearest(E, i, 5) == oracle[i, 1:]).all()
    assert 0 not in nearest(np.zeros((4, 2)), 0, 9) and len(nearest(E[:3], 0, 9)) == 2


def test_the_map_is_the_widest_view(df):
    E = np.random.default_rng(0).normal(size=(40, 6)) * [1, 9, 1, 4, 1, 1]
    xy = project(E)
    assert xy.shape == (40, 2)
    np.testing.assert_allclose(np.linalg.svd(E - E.mean(0), compute_uv=False)[:2], np.linalg.norm(xy, axis=0))
    with pytest.raises(InputError): project(E[:1])
    assert isinstance(plot_map({"a": xy, "b": xy}, ["cat", "dog"] * 20), Figure)
    assert isinstance(plot_neighbours(df, np.eye(len(df)), [0, 5], k=3), Figure)


# ---- exercises

def test_the_answers_are_right():
    def standardise(train, new):
        std = train.std(axis=0)
        return (new - train.mean(axis=0)) / np.where(std > 0, std, 1)
    assert check("04.1", 1764).passed and check("04.2", standardise).passed
    assert check("04.3", lambda a: a.mean(axis=(0, 1))).passed
    assert check("04.1", None).passed is None and check("04.2", lambda train, new: None).passed is None


def test_wrong_answers_are_told_apart():
    with np.errstate(all="ignore"):
        said = {1: [check("04.1", n).message for n in (441, 2304, 576, 5, "many")],
                2: [check("04.2", f).message for f in (
                    lambda t, n: (n - n.mean(0)) / n.std(0), lambda t, n: (n - t.mean()) / t.std(),
                    lambda t, n: n - t.mean(0), lambda t, n: (n - t.mean(0)) / t.var(0),
                    lambda t, n: (t - t.mean(0)) / t.std(0), lambda t, n: (n - t.mean(0)) / t.std(0))],
                3: [check("04.3", f).message for f in (
                    lambda a: a.mean(), lambda a: a[:, :, 0], lambda a: a[a > 128], lambda a: a.ravel(),
                    lambda a: np.ones(3), lambda a: a.mean(axis=(0, 1)) / a.max())]}
    for n, messages in said.items():
        assert "right" not in messages and len(set(messages)) == len(messages), (n, messages)
