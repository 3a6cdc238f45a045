"Chapter 04: descriptions, baselines and what they lean on, embeddings and their cache, transfer, and the exercises' checks."
import copy
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.vision.core import imagenet_stats
from matplotlib.figure import Figure
from PIL import Image
from sklearn.inspection import permutation_importance
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.neighbors import NearestNeighbors
from torch import nn

from dlpipe_nb.core import InputError, PictureError, Run, check, picture_array
from dlpipe_nb.evaluation import confusion
from dlpipe_nb.features import (CS, activations, baseline_frame, baseline_into, colour_histogram, compare_features, draw_labels,
                                edge_directions, embed, fit_baseline, fit_network, group_importance, hand_features, hand_scores,
                                hog_weights, label_efficiency, linear_method, map_pictures, nearest, network_key, network_method,
                                new_head, pixel_features, plot_activations, plot_comparison, plot_hog_weights,
                                plot_label_efficiency, plot_map, plot_neighbours, project, symmetry, tiny_net, tuned_baseline)
from dlpipe_nb.preprocessing import squares

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
    E = embed(df, learn, bs=7)
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
    assert embed(df.head(2), learn).shape == (2, 1024)


def test_no_hook_is_left_when_embedding_breaks(df):
    learn = learner(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(99, 2))
    with pytest.raises(RuntimeError): embed(df, learn)
    assert not any(m._forward_hooks for m in learn.model.modules())
    with pytest.raises(InputError, match="pooling"): embed(df, learner(nn.Conv2d(3, 2, 3)))


def test_nearest_against_scikit_learn():
    E = np.random.default_rng(0).normal(size=(50, 7))
    oracle = NearestNeighbors(n_neighbors=6, metric="cosine").fit(E).kneighbors(E, return_distance=False)
    for i in range(50): assert (nearest(E, i, 5) == oracle[i, 1:]).all()
    assert 0 not in nearest(np.zeros((4, 2)), 0, 3) and (nearest(E, -1, 5) == nearest(E, 49, 5)).all()


@pytest.mark.parametrize("i, k", [(0, 4), (0, 0), (4, 1), (-5, 1)])
def test_no_more_neighbours_than_there_are(i, k):
    with pytest.raises(InputError, match="from 1 to 3 neighbours"): nearest(np.eye(4), i, k)


def test_the_map_is_the_widest_view(df):
    E = np.random.default_rng(0).normal(size=(40, 6)) * [1, 9, 1, 4, 1, 1]
    xy = project(E)
    assert xy.shape == (40, 2)
    np.testing.assert_allclose(np.linalg.svd(E - E.mean(0), compute_uv=False)[:2], np.linalg.norm(xy, axis=0))
    with pytest.raises(InputError): project(E[:1])
    assert isinstance(plot_map({"a": xy, "b": xy}, ["cat", "dog"] * 20), Figure)
    assert isinstance(plot_neighbours(df, np.eye(len(df)), [0, 5], k=3), Figure)


# ---- what a model leans on, and what it leaves

def test_the_choice_of_C_is_cross_validation_on_the_given_rows():
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(60, 90)), np.array(["cat", "dog"] * 30)
    X[:, 0] += np.where(y == "dog", 1.5, 0)
    parts = StratifiedKFold(5, shuffle=True, random_state=0)
    by_hand = {C: cross_val_score(fit_baseline(X, y, C), X, y, cv=parts).mean() for C in CS}
    model = tuned_baseline(X, y)
    assert model[-1].C == max(sorted(CS), key=by_hand.get) and len(set(by_hand.values())) > 1
    assert tuned_baseline(X, y, Cs=(0.5,))[-1].C == 0.5
    assert (tuned_baseline(X, y)[-1].coef_ == model[-1].coef_).all()


def test_of_equal_Cs_the_smallest_wins_and_few_labels_are_enough():
    X, y = np.array([[0.], [0], [5], [5]]), [0, 0, 1, 1]
    assert tuned_baseline(X, y, Cs=(1.0, 0.01, 0.1))[-1].C == 0.01
    for X_, y_, found in ((X, [0, 0, 0, 1], "a class with one"), (X, [1] * 4, "one class"), (X * np.nan, y, "finite"),
                          (X[:3], y, "4 labels")):
        with pytest.raises(InputError, match=found): tuned_baseline(X_, y_)


def test_on_shuffled_labels_the_tuned_baseline_is_at_chance():
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(400, 60)), rng.permutation([0, 1] * 200)
    assert abs(tuned_baseline(X[:200], y[:200]).score(X[200:], y[200:]) - 0.5) < 0.1


def test_importance_against_scikit_learn_for_single_columns():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(300, 3))
    y = (X @ [2.0, 0.7, 0] > 0).astype(int)
    model, before = fit_baseline(X, y, C=1.0), X.copy()
    ours = group_importance(model, X, y, {str(i): slice(i, i + 1) for i in range(3)}, repeats=60).set_index("group")
    theirs = permutation_importance(model, X, y, n_repeats=60, random_state=1).importances_mean
    np.testing.assert_allclose(ours.loc[["0", "1", "2"], "lost"], theirs, atol=0.015)
    assert ours.index[0] == "0" and abs(ours.loc["2", "lost"]) < 0.01 and (X == before).all()


def test_a_groups_columns_are_shuffled_together():
    class Difference:  # the first two columns are equal and cancel out, as long as they stay together
        def score(self, X, y): return ((9 * X[:, 0] - 9 * X[:, 1] + X[:, 2] > 0) == y).mean()
    x, z = np.random.default_rng(0).normal(size=(2, 400))
    X, y = np.stack([x, x, z], axis=1), z > 0
    table = group_importance(Difference(), X, y, {"both": slice(0, 2), "one": slice(0, 1), "third": slice(2, 3)})
    lost = table.set_index("group")["lost"]
    assert lost["both"] == 0 and lost["one"] > 0.3 and lost["third"] > 0.3 and table["columns"].tolist()[-1] == 2
    with pytest.raises(InputError): group_importance(fit_baseline(X, y), X * np.nan, y, {"one": slice(0, 1)})


def test_weights_go_back_to_the_cell_they_are_for():
    a = np.full((64, 64, 3), 128, np.uint8)
    a[:, 36:] = 200
    back = hog_weights(edge_directions(a), 64)
    assert back.shape == (8, 8, 9) and set(np.argwhere(back > back.max() / 2)[:, 1]) <= {3, 4}
    weights = np.zeros(1764)
    weights[((2 * 7 + 5) * 4 + 1) * 9 + 6] = 1  # block in line 2, column 5; its upper right cell; direction 6
    assert np.argwhere(hog_weights(weights)).tolist() == [[2, 6, 6]]
    a[:] = 128
    a[16:24, 40:48] = np.random.default_rng(0).integers(0, 256, (8, 8, 1))
    around = hog_weights(edge_directions(a)).sum(axis=2)
    assert np.unravel_index(around.argmax(), around.shape) == (2, 5)
    weights = np.random.default_rng(0).normal(size=1764)
    assert hog_weights(weights).sum() == pytest.approx(weights.sum())
    with pytest.raises(InputError, match="1764"): hog_weights(weights[:-1])


@pytest.mark.parametrize("label, along", [("cat", 1), ("dog", 0)])
def test_a_stroke_runs_along_the_edge(label, along):
    a = np.array(striped(label, np.random.default_rng(0), 64))
    fig = plot_hog_weights(hog_weights(edge_directions(a)), ("no", "yes"), (a, a))
    strokes, width = fig.axes[1].collections[0].get_segments(), fig.axes[1].collections[0].get_linewidths()
    ends = strokes[int(np.argmax(width))]
    assert np.abs(ends[1] - ends[0]).argmax() == along and max(fig.axes[0].collections[0].get_linewidths()) == 0


def test_chapter_06_reads_what_the_baseline_says(df):
    X = hand_features(df, 32)
    model = fit_baseline(X, df.label)
    said = baseline_frame(model, X, df.iloc[::-1].reset_index(drop=True))
    np.testing.assert_allclose(said[["p_cat", "p_dog"]], model.predict_proba(X))
    assert (said.predicted == model.predict(X)).all() and (said.probability >= 0.5).all()
    assert confusion(baseline_frame(model, X, df)).to_numpy().sum() == len(df)
    with pytest.raises(InputError, match="labels"): baseline_frame(model, X[:3], df)
    with pytest.raises(InputError, match="label"): baseline_frame(model, X, df.drop(columns="label"))


# ---- looking into a network

def small(seed=0, width=5):
    "A network with fixed random weights; five numbers a picture."
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, width, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 2))


def test_activations_are_what_the_layers_give(df):
    net = tiny_net(2)
    net[0].eval()
    modes = [m.training for m in net.modules()]
    seen = activations(net, df.path[0], size=64)
    assert [a.shape for a in seen] == [(c, s, s) for c, s in ((24, 32), (48, 16), (96, 8), (128, 4), (160, 2), (160, 1))]
    x = torch.from_numpy(picture_array(df.path[0], 64)).permute(2, 0, 1)[None] / 255
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in imagenet_stats)
    with torch.no_grad(): by_hand = copy.deepcopy(net).eval()[:2]((x - mean) / std)[0].numpy()
    np.testing.assert_allclose(seen[1], by_hand, atol=1e-5)
    assert [m.training for m in net.modules()] == modes and not any(m._forward_hooks for m in net.modules())
    assert isinstance(plot_activations(df.path[0], {"first": seen[0], "last": seen[5]}, k=3), Figure)
    with pytest.raises(InputError, match="ReLU"): activations(nn.Conv2d(3, 2, 3), df.path[0], size=32)
    with pytest.raises(InputError, match="no file"): activations(net, "gone.png", size=32)


def test_a_shared_relu_is_heard_each_time_it_works(df):
    from dlpipe_nb.training import make_model
    assert len(activations(make_model("resnet18", 2), df.path[0], size=64)) >= 17


def test_two_networks_share_a_key_only_if_they_compute_the_same():
    net = small()
    keys = [network_key(n) for n in (net, small(1), nn.Sequential(net[0], nn.GELU(), *net[2:]), copy.deepcopy(net).bfloat16())]
    assert len(set(keys)) == 4 and network_key(copy.deepcopy(net)) == keys[0] == network_key(net.train())
    with torch.no_grad(): net[4].bias[0] += 1e-6
    assert network_key(net) != keys[0]


# ---- the cache

class Calls(list):
    "How many pictures a network was given, call by call."
    def __init__(self, net): net.register_forward_pre_hook(lambda module, x: self.append(len(x[0])))


def test_the_second_call_computes_nothing(df, tmp_path):
    net = small()
    calls, plain = Calls(net), embed(df, net, size=32)
    assert sum(calls) == len(df) and not list(tmp_path.iterdir())
    calls.clear()
    first = embed(df, net, size=32, bs=3, cache=tmp_path)
    assert sum(calls) == len(df) and len(list(tmp_path.rglob("*.npz"))) == 3
    calls.clear()
    again = embed(df.iloc[::-1], net, size=32, cache=str(tmp_path))
    assert calls == [] and (again == first[::-1]).all()
    np.testing.assert_allclose(first, plain, atol=1e-5)


def test_a_picture_twice_is_computed_once(df):
    net = small()
    calls, twice = Calls(net), pd.concat([df.head(3), df.head(3)])
    E = embed(twice, net, size=32)
    assert sum(calls) == 3 and (E[:3] == E[3:]).all()


def test_whatever_changes_is_computed_anew(df, tmp_path):
    part = df.head(4).assign(path=[str(tmp_path / f"{i}.png") for i in range(4)])
    for old, new in zip(df.path, part.path): Path(new).write_bytes(Path(old).read_bytes())
    net, cache = small(), tmp_path / "cache"
    before, calls = embed(part, net, size=32, cache=cache), Calls(net)
    Path(part.path[1]).write_bytes(Path(df.path[30]).read_bytes())  # the manifest's sha256 is stale now
    after = embed(part, net, size=32, cache=cache)
    assert calls == [1] and (after[[0, 2, 3]] == before[[0, 2, 3]]).all() and not np.allclose(after[1], before[1])
    calls.clear()
    embed(part, net, size=48, cache=cache)
    with torch.no_grad(): net[0].weight[0] *= 2
    assert not np.allclose(embed(part, net, size=32, cache=cache), after) and calls == [4, 4]
    calls.clear()
    os.rename(part.path[0], tmp_path / "moved.png")
    moved = part.assign(path=[str(tmp_path / "moved.png"), *part.path[1:]])
    embed(moved, net, size=32, cache=cache)
    assert calls == []


@pytest.mark.parametrize("harm", [lambda b: b[:len(b) // 2], lambda b: b"", lambda b: b"not a zip" * 40,
                                  lambda b: b[:300] + bytes([b[300] ^ 255]) + b[301:]], ids=["cut", "empty", "other", "a bit"])
def test_a_broken_cache_file_is_said_once_and_computed_again(df, tmp_path, harm):
    net = small()
    first = embed(df, net, size=32, bs=3, cache=tmp_path)
    file = sorted(tmp_path.rglob("*.npz"))[1]
    file.write_bytes(harm(file.read_bytes()))
    calls = Calls(net)
    with pytest.warns(UserWarning, match="1 unreadable") as said: again = embed(df.iloc[::-1], net, size=32, cache=tmp_path)[::-1]
    assert len(said) == 1 and sum(calls) == 12
    np.testing.assert_allclose(again, first, atol=1e-6)
    calls.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        embed(df, net, size=32, cache=tmp_path)
    assert calls == []


def test_a_file_with_other_things_in_it_counts_as_broken(df, tmp_path):
    net = small()
    embed(df, net, size=32, cache=tmp_path)
    np.savez(next(tmp_path.iterdir()) / "zzz.npz", names=np.array(["a", "b"]), rows=np.zeros((1, 5)))
    with pytest.warns(UserWarning, match="unreadable"): embed(df, net, size=32, cache=tmp_path)


@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL there")
def test_a_killed_process_loses_one_chunk(df, tmp_path):
    (tmp_path / "killed.py").write_text(f"""
import sys, time, torch
sys.path[:0] = [{str(Path(__file__).resolve().parents[2])!r}, {str(Path(__file__).parent)!r}]
import pandas as pd
from test_features import embed, small
net, df = small(), pd.read_json({str(tmp_path / 'df.json')!r})
net.register_forward_pre_hook(lambda module, x: time.sleep(0.25))
embed(df, net, size=32, bs=2, cache={str(tmp_path / 'cache')!r})
""")
    df[["path"]].to_json(tmp_path / "df.json")
    process = subprocess.Popen([sys.executable, tmp_path / "killed.py"], stderr=subprocess.PIPE)
    until = time.time() + 60
    def written(): return sum(name.endswith(".npz") for _, _, names in os.walk(tmp_path / "cache") for name in names)  # folders may vanish meanwhile
    while written() < 2 and process.poll() is None and time.time() < until: time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, process.stderr.read().decode()
    kept = 8 * len([f for f in (tmp_path / "cache").rglob("*.npz") if f.parent.parent.name == "cache"])
    net = small()
    calls = Calls(net)
    E = embed(df, net, size=32, cache=tmp_path / "cache")
    assert 16 <= kept < len(df) and sum(calls) == len(df) - kept
    np.testing.assert_allclose(E, embed(df, small(), size=32), atol=1e-5)


def test_bad_pictures_are_named_and_nothing_is_kept_of_them(df, tmp_path):
    net, cache = small(), tmp_path / "cache"
    gone = df.assign(path=[*df.path[:-1], str(tmp_path / "gone.png")])
    with pytest.raises(PictureError, match="gone.png"): embed(gone, net, size=32, cache=cache)
    assert not cache.exists()
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(PictureError, match="text.png"): embed(df.head(2).assign(path=str(tmp_path / "text.png")), net, size=32, cache=cache)
    with pytest.raises(PictureError, match="file"): embed(df.head(2).assign(path=str(tmp_path)), net, size=32)
    with torch.no_grad(): net[0].weight.fill_(np.nan)
    with pytest.raises(InputError, match="finite"): embed(df, net, size=32, cache=cache)
    assert not cache.exists()


def test_embed_asks_for_what_it_needs(df, tmp_path):
    net = small()
    for call, said in ((lambda: embed(df.iloc[:0], net, size=32), "no rows"), (lambda: embed(net, df), "swap them"),
                       (lambda: embed(df.drop(columns="path"), net, size=32), "path"),
                       (lambda: embed(df, net), "size=64")):
        with pytest.raises(InputError, match=said): call()
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file where a folder"): embed(df.head(2), net, size=32, cache=tmp_path / "file")


# ---- comparing descriptions

def test_the_comparison_gives_each_description_the_same_chance(df):
    table = compare_features(df, {"pixels": lambda part: pixel_features(part, 8), "edges": lambda part: hand_features(part, 32)})
    assert list(table.columns) == ["description", "accuracy", "low", "high", "numbers", "C", "describing", "fitting"]
    train, valid = df[df.split == "train"], df[df.split == "valid"]
    model = tuned_baseline(hand_features(train, 32), train.label)
    row = table.set_index("description").loc["edges"]
    assert row.accuracy == model.score(hand_features(valid, 32), valid.label) and row.C == model[-1].C
    assert table.numbers.tolist() == [192, 28 + 324 + 3] and (table.describing > 0).all()
    p, n, z = row.accuracy, len(valid), 1.959964
    half = z / (1 + z**2 / n) * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    middle = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    assert (row.low, row.high) == pytest.approx((middle - half, middle + half), abs=1e-4)
    assert isinstance(plot_comparison(table), Figure)


def test_the_comparison_opens_no_test_picture(df, tmp_path):
    hidden = df.assign(path=df.path.where(df.split != "test", str(tmp_path / "gone.png")))
    compare_features(hidden, {"pixels": lambda part: pixel_features(part, 8)}, Cs=(0.01,))


def test_a_bad_comparison_is_refused(df):
    views = {"pixels": lambda part: pixel_features(part, 8)}
    for bad, said in ((df.drop(columns="split"), "split"), (df.assign(split="train"), "split manifest"),
                      (df.assign(label="cat"), "one class")):
        with pytest.raises(InputError, match=said): compare_features(bad, views)
    with pytest.raises(InputError, match="finite"): compare_features(df, {"nan": lambda part: np.full((len(part), 2), np.nan)})
    with pytest.raises(InputError, match="describe the same"): compare_features(df, {"short": lambda part: np.ones((3, 2))})


def test_tsne_keeps_neighbours_and_gives_the_same_map_again():
    rng = np.random.default_rng(0)
    E = np.concatenate([rng.normal(size=(25, 60)), rng.normal(12, 1, size=(25, 60))])
    xy = project(E, "tsne")
    group = np.repeat([0, 1], 25)
    assert xy.shape == (50, 2) and all(group[nearest(xy - xy.mean(0), i, 1)[0]] == group[i] for i in range(50))
    assert (project(E, "tsne") == xy).all()
    assert project(E[:5], "tsne").shape == (5, 2)
    for call, said in ((lambda: project(E, "umap"), "'umap'"), (lambda: project(E[:4], "tsne"), "five rows"),
                       (lambda: project(E * np.nan), "finite"), (lambda: plot_map({"a": xy}, [1]), "label for each")):
        with pytest.raises(InputError, match=said): call()


# ---- transfer

def test_labels_are_drawn_evenly_and_again_the_same():
    y = np.array(["cat"] * 30 + ["dog"] * 50)
    rows = draw_labels(y, 20, seed=3)
    assert len(set(rows)) == 20 and (y[rows] == "cat").sum() == 10 and (rows == draw_labels(y, 20, seed=3)).all()
    assert set(rows) != set(draw_labels(y, 20, seed=4)) and len(draw_labels(y, 7)) == 7
    for bad, n in ((y, 62), (y, 3), (y, 0), (["cat"] * 9, 4)):
        with pytest.raises(InputError, match="labels"): draw_labels(bad, n)


def test_all_methods_get_the_same_rows():
    got = {"a": [], "b": []}
    methods = {k: lambda rows, seed, k=k: got[k].append((len(rows), seed, *rows)) or 0.5 for k in got}
    table = label_efficiency(methods, ["cat", "dog"] * 20, sizes=(4, 8), draws=2)
    assert got["a"] == got["b"] and len(set(got["a"])) == 4 and len(table) == 8
    assert table.groupby(["method", "labels"]).draw.nunique().eq(2).all()
    fig = plot_label_efficiency(table, guess=0.5)
    assert [t.get_text() for t in fig.axes[0].get_xticklabels()] == ["4", "8"]


def test_tries_side_by_side_give_the_same_table(df):
    x, y = squares(df.path.tolist(), 32), df.label.to_numpy()
    methods = {k: network_method(lambda: tiny_net(2), x, y, x, y, lr=lr) for k, lr in (("slow", 1e-3), ("fast", 4e-3))}
    alone, beside = (label_efficiency(methods, y, sizes=(8, 12), draws=2, workers=w) for w in (1, 2))
    assert beside.equals(alone) and list(alone.method[:2]) == ["slow", "fast"] and alone.accuracy.nunique() > 1


def test_a_network_learns_several_questions_at_once(df):
    x, y = squares(df.path.tolist(), 32), (df.label == "dog").to_numpy().astype(int)
    net = fit_network(tiny_net(5), x, np.stack([y, np.arange(len(y)) % 3], axis=1), steps=40, bs=16)
    again = fit_network(copy.deepcopy(net), x, np.stack([y, np.arange(len(y)) % 3], axis=1), steps=1)
    assert not net.training and again is not net
    told = embed(df, net, size=32)
    assert fit_baseline(told, y).score(told, y) > 0.9
    for targets, said in ((y[:5], "for 36 pictures"), (y - 1, "from 0"), (y, "2 outputs")):
        with pytest.raises(InputError, match=said): fit_network(tiny_net(5), x, targets, steps=1)


def test_the_same_seed_trains_the_same_network(df):
    x, y = squares(df.path.tolist(), 32), (df.label == "dog").to_numpy().astype(int)
    keys = []
    for seed in (1, 1, 2):
        torch.manual_seed(0)
        keys.append(network_key(fit_network(tiny_net(2), x, y, steps=3, bs=8, seed=seed)))
    assert keys[0] == keys[1] != keys[2]


def test_a_new_head_leaves_the_old_network_alone():
    from dlpipe_nb.training import make_model
    net = tiny_net(7)
    key, new = network_key(net), new_head(net, 2)
    assert new[-1].out_features == 2 and network_key(net) == key and (new[0][0].weight == net[0][0].weight).all()
    new[0][0].weight.data.zero_()
    assert network_key(net) == key and new_head(make_model("resnet18", 3), 2)(torch.zeros(2, 3, 64, 64)).shape == (2, 2)
    with pytest.raises(InputError, match="linear"): new_head(nn.Conv2d(3, 2, 3), 2)


def test_methods_learn_from_the_drawn_rows_only(df):
    x, y = squares(df.path.tolist(), 32), df.label.to_numpy()
    rows = draw_labels(y, 20)
    wrong = np.where(np.isin(np.arange(len(y)), rows), y, "dog")  # the labels that weren't drawn are nonsense
    X = hand_features(df, 32)
    assert linear_method(X, wrong, X, y)(rows, 0) == linear_method(X, y, X, y)(rows, 0) > 0.9
    start = tiny_net(2)
    key, learn = network_key(start), network_method(lambda: new_head(start, 2), x, y, x, y)
    assert learn(rows, 0) == learn(rows, 0) > 0.8 and network_key(start) == key


# ---- exercises

def standardise(train, new):
    std = train.std(axis=0)
    return (new - train.mean(axis=0)) / np.where(std > 0, std, 1)


def labels_needed(curve, target, order=True, log=np.log, exp=np.exp, low_end=True, never=float("inf")):
    "The reference, with places to go wrong."
    if order: curve = curve.sort_index()
    if low_end and curve.iloc[0] >= target: return float(curve.index[0])
    for (n, low), (m, high) in zip(curve.items(), curve.iloc[1:].items()):
        if high >= target: return float(exp(np.interp(target, [low, high], log([n, m]))))
    return never


def same(x): return np.asarray(x, float)


RIGHT = {1: 1764, 2: standardise, 3: labels_needed, 4: lambda a: a.mean(axis=(0, 1))}
WRONG = {
    1: {"not one": 441, "cells; the blocks": 576, "7 blocks": 2304, "count the blocks": 5, "whole number": "many"},
    2: {"own mean": lambda t, n: (n - n.mean(0)) / n.std(0), "mean of its own": lambda t, n: (n - t.mean()) / t.std(),
        "half of it": lambda t, n: n - t.mean(0), "variance": lambda t, n: (n - t.mean(0)) / t.var(0),
        "give the new rows": lambda t, n: (t - t.mean(0)) / t.std(0), "never changes": lambda t, n: (n - t.mean(0)) / t.std(0)},
    3: {"scale of log": lambda c, t: labels_needed(c, t, log=same, exp=same), "first size": lambda c, t: c[c >= t].index.min(),
        "isn't reached yet": lambda c, t: c[c < t].index.max(), "needn't be in order": lambda c, t: labels_needed(c, t, order=False),
        "enough already": lambda c, t: labels_needed(c, t, low_end=False),
        "never reached": lambda c, t: labels_needed(c, t, never=9999.0), "not a share": lambda c, t: t, "about 224": lambda c, t: 7},
    4: {"row of one": lambda a: a.mean(), "one-dimensional": lambda a: a[:, :, 0], "same length": lambda a: a[a > 128],
        "forget something": lambda a: a.ravel(), "same row": lambda a: np.ones(3),
        "finite": lambda a: a.mean(axis=(0, 1)) / a.max()},
}


@pytest.mark.parametrize("n", RIGHT)
def test_the_answer_is_right(n):
    assert check(f"04.{n}", RIGHT[n]).message == "right" and check(f"04.{n}", None).passed is None
    if callable(RIGHT[n]): assert check(f"04.{n}", lambda *a: None).passed is None


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("n", WRONG)
def test_wrong_answers_are_told_apart(n):
    said = {cause: check(f"04.{n}", answer) for cause, answer in WRONG[n].items()}
    for cause, c in said.items(): assert c.passed is False and cause in c.message, (cause, c.message)
    assert len({c.message for c in said.values()}) == len(said) >= 3
