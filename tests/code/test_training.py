"""Training: the record, the hardware, and what is saved."""
from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from dlpipe_nb import training
from dlpipe_nb.core import InputError, check, write_json
from dlpipe_nb.preprocessing import make_dls
from dlpipe_nb.training import (best_device, choose_hardware, load_learner, make_model, predict_frame, pretrained_weights, probabilities,
                                probe, save_learner, small_net, train)


@pytest.fixture(scope="module")
def dls(small_run):
    return make_dls(small_run.manifest().groupby(["split", "label"]).head(24), 32, 16, device="cpu")


@pytest.mark.parametrize("size", [32, 64, 96, 100])
@pytest.mark.parametrize("n_out", [2, 3])
def test_the_small_network_takes_any_size(size, n_out):
    assert small_net(n_out)(torch.zeros(2, 3, size, size)).shape == (2, n_out)


def test_the_same_seed_gives_the_same_training(dls):
    a, b, c = (train(dls, pretrained=False, epochs=1, seed=s, precision="fp32", device="cpu") for s in (3, 3, 4))
    assert a.record["history"] == b.record["history"] != c.record["history"]
    for x, y in zip(a.model.parameters(), b.model.parameters()): assert torch.equal(x, y)


def test_the_record_says_what_was_done(dls):
    record = train(dls, pretrained=False, epochs=1, device="cpu", precision="fp32").record
    assert record["precision"] == "fp32" and "as asked" in record["hardware"] and record["labels"] == ["cat", "dog"]
    assert record["parameters"] == sum(p.numel() for p in small_net(2).parameters()) and record["seconds"] > 0


def test_bf16_learns_too_and_leaves_the_network_in_fp32(dls):
    learn = train(dls, pretrained=False, epochs=1, device="cpu", precision="bf16")
    assert all(p.dtype == torch.float32 for p in learn.model.parameters()) and np.isfinite(learn.record["history"][0]["train_loss"])
    assert not torch.is_autocast_enabled("cpu")


def test_without_weights_or_network_it_says_so_and_trains_from_scratch(tmp_path, monkeypatch, dls):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("urllib.request.urlopen", lambda *a, **k: (_ for _ in ()).throw(OSError("no network")))
    found, note = pretrained_weights("resnet18")
    assert not found and "training from scratch" in note
    record = train(dls, epochs=1, device="cpu", precision="fp32").record
    assert record["arch"] == "small" and record["pretrained"] is False and record["start"] == note
    with pytest.raises(InputError, match="pretrained"): train(dls, pretrained=True, device="cpu")


def test_cached_weights_are_found_and_fine_tuned_and_a_broken_file_is_named(tmp_path, monkeypatch, dls):
    "Weights of the right shape stand in for the downloaded ones: what is tested is the loading."
    import torchvision
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    file = tmp_path / "hub" / "checkpoints" / torchvision.models.ResNet18_Weights.DEFAULT.url.rpartition("/")[2]
    file.parent.mkdir(parents=True)
    stand_in = torchvision.models.resnet18()
    torch.save(stand_in.state_dict(), file)
    assert pretrained_weights("resnet18")[0]
    assert torch.equal(make_model("resnet18", 2, pretrained=True)[0][0].weight, stand_in.conv1.weight)
    learn = train(dls, epochs=1, device="cpu", precision="fp32")
    assert learn.record["arch"] == "resnet18" and learn.record["pretrained"] and "found on this disk" in learn.record["start"]
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(InputError, match="delete it"): make_model("resnet18", 2, pretrained=True)


@pytest.mark.parametrize("wrong", [dict(precision="fp8"), dict(pretrained="perhaps"), dict(arch="resnet-eighteen"), dict(arch="small", pretrained=True)])
def test_settings_that_make_no_sense_are_refused(dls, wrong):
    with pytest.raises(InputError): train(dls, device="cpu", **{"pretrained": False} | wrong)


def test_the_hardware_is_chosen_and_can_be_forced():
    net = small_net(2)
    assert choose_hardware(net, 32, "fp32", "cpu").precision == "fp32" and best_device().type in ("cuda", "mps", "cpu")
    chosen = choose_hardware(net, 32, device="cpu")
    assert chosen.precision in ("fp32", "bf16") and ("probe" in chosen.note or "no bf16" in chosen.note)
    assert set(probe(net, 32, 0.05)) == {"fp32", "bf16"}


def test_the_faster_precision_of_the_probe_wins(monkeypatch):
    monkeypatch.setattr(training, "_cpu_has_bf16", lambda: True)
    for times, best in (({"fp32": 3.0, "bf16": 1.0}, "bf16"), ({"fp32": 1.0, "bf16": 3.0}, "fp32")):
        monkeypatch.setattr(training, "probe", lambda *a, times=times: times)
        assert choose_hardware(small_net(2), 32, device="cpu").precision == best


def test_saved_and_loaded_it_answers_the_same(small_run, tmp_path):
    learn = load_learner(small_run / "learner")
    x = np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), dtype=np.uint8)
    again = load_learner(save_learner(learn, tmp_path / "learner"))
    assert (probabilities(again, x) == probabilities(learn, x)).all() and np.allclose(probabilities(learn, x).sum(1), 1, atol=1e-6)
    assert sorted(p.name for p in (tmp_path / "learner").iterdir()) == ["learner.json", "model.safetensors"]


@pytest.mark.parametrize("damage", ["lose", "alter", "cut"])
def test_a_damaged_learner_is_refused(small_run, tmp_path, damage):
    folder = save_learner(load_learner(small_run / "learner"), tmp_path / "learner")
    file = folder / "model.safetensors"
    data = file.read_bytes()
    file.unlink() if damage == "lose" else file.write_bytes(data[:-1] + b"\xff" if damage == "alter" else data[:500])
    with pytest.raises(InputError): load_learner(folder)


def test_predict_frame_is_complete_and_does_not_depend_on_the_batch(small_run):
    learn, df = load_learner(small_run / "learner"), small_run.manifest().head(10)
    a, b = predict_frame(learn, df), predict_frame(learn, df, bs=3)
    assert list(a.columns) == ["path", "label", "predicted", "probability", "correct", "p_cat", "p_dog"]
    np.testing.assert_allclose(a[["p_cat", "p_dog"]], b[["p_cat", "p_dog"]], atol=1e-6)
    assert (a.correct == (a.predicted == a.label)).all() and len(predict_frame(learn, df.head(0))) == 0


def test_the_checks_tell_wrong_answers_apart():
    def step(w, b, x, y, lr, sign=-1, scale=1):
        e = w * x + b - y
        return float(w + sign * lr * scale * (2 * e * x).mean()), float(b + sign * lr * scale * (2 * e).mean())
    wrong = [lambda *a: step(*a, sign=1), lambda *a: step(*a[:4], 1.0), lambda *a: step(*a, scale=2), lambda *a: (step(*a)[0], 0.0), lambda *a: 7]
    said = [check("05.1", w) for w in wrong]
    assert check("05.1", step).passed and not any(s.passed for s in said) and len({s.message for s in said}) == 5
    said = [check("05.2", n) for n in (270, 100, 280 * 96 * 96, 12, "many")]
    assert check("05.2", 280).passed and not any(s.passed for s in said) and len({s.message for s in said}) == 5
