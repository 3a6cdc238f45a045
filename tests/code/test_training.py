"""Training: the record, the hardware, and what is saved."""
from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from dlpipe_nb import training
from dlpipe_nb.core import InputError, check, write_json
from dlpipe_nb.preprocessing import make_dls
from dlpipe_nb.training import (KeepBest, TrainingError, TrainingWatch, best_device, bill, body_features, check_labels, choose_hardware,
                                compare_networks, find_lr, labels_for, learning_curve, load_learner, make_model, picture_cost, plot_learning_curve,
                                plot_lr, plot_networks, predict_frame, pretrained_weights, probabilities, probe, save_learner, small_net,
                                suggest_lr, train)


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


# ---- the loop, and the learning rate

def test_the_finders_curve_rises_in_rate_and_leaves_the_place_as_it_was(dls, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    curve = find_lr(dls, "small4", steps=20, precision="fp32")
    assert curve["lr"].is_monotonic_increasing and 10 <= len(curve) <= 20 and list(tmp_path.iterdir()) == []
    assert curve.equals(find_lr(dls, "small4", steps=20, precision="fp32"))
    assert not curve.equals(find_lr(dls, "small4", steps=20, precision="bf16"))
    lr = np.geomspace(1e-4, 1, 101) # flat to 0.001, down to 0.1, then up
    table = pd.DataFrame({"lr": lr, "loss": np.interp(np.log10(lr), (-4, -3, -1, 0), (0.7, 0.7, 0.3, 3))})
    assert 2e-3 < suggest_lr(table) < 5e-2 and len(plot_lr(table).axes[0].lines) == 2


@pytest.mark.parametrize("pixels, left", [(4 * 32 * 32, 1), (64 * 96 * 96, 2)])
def test_small_batches_are_left_to_one_core(pixels, left):
    from dlpipe_nb.training import _threads_for
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(KeyError), _threads_for(pixels):
            assert torch.get_num_threads() == left
            raise KeyError
        assert torch.get_num_threads() == 2
    finally: torch.set_num_threads(before)


@pytest.mark.parametrize("arch", ["small4", "resnet18", "mobilenet_v3_small", "squeezenet1_1"])
def test_every_network_is_a_body_and_a_head_that_pools_first(arch):
    net = make_model(arch, 3).eval()
    x = torch.rand(2, 3, 64, 64)
    assert net[1][:2](net[0](x)).ndim == 2 and torch.equal(net[1][2:](net[1][:2](net[0](x))), net(x)) and net(x).shape == (2, 3)


# ---- a frozen body

def test_features_are_what_the_head_would_have_been_given(dls):
    learn = train(dls, "small4", False, epochs=1, device="cpu", precision="fp32")
    x, y = body_features(learn, dls.valid)
    with torch.no_grad(): p = learn.model[1][2:].eval()(x).softmax(1)
    theirs, targets = learn.get_preds(dl=dls.valid)
    assert torch.allclose(p, theirs, atol=1e-5) and torch.equal(y, targets.to(y.dtype))


def test_a_new_question_keeps_the_body_gives_a_new_head_and_leaves_the_old_learner_alone(small_run):
    df = small_run.manifest()
    df = df.assign(label=df["facing"]).query("label in ('left', 'right')").groupby(["split", "label"]).head(16)
    start = load_learner(small_run / "learner")
    before = [v.clone() for v in start.model.state_dict().values()]
    learn = train(make_dls(df, 32, 16, device="cpu"), start=start, epochs=1, device="cpu", precision="fp32")
    assert all(torch.equal(a, b) for a, b in zip(before, start.model.state_dict().values()))
    assert learn.record["labels"] == ["left", "right"] and "new head for left, right" in learn.record["start"]
    assert [h["epoch"] for h in learn.record["history"]] == [0, 1] and learn.record["history"][0]["phase"] == "head, 4 epochs"


def test_the_frozen_phase_changes_the_head_only(small_run, monkeypatch):
    from dlpipe_nb.training import Learner
    df = small_run.manifest().groupby(["split", "label"]).head(16)
    start = load_learner(small_run / "learner")
    monkeypatch.setattr(Learner, "fit_one_cycle", lambda *a, _f=Learner.fit_one_cycle, **k: None if hasattr(a[0], "keep_best") else _f(*a, **k))
    learn = train(make_dls(df.assign(label="a " + df["label"]), 32, 16, device="cpu"), start=start, device="cpu", precision="fp32")
    for name, v in learn.model[0].state_dict().items(): assert torch.equal(v, start.model[0].state_dict()[name]), name
    assert not torch.equal(learn.model[1][-1].weight, start.model[1][-1].weight)


# ---- stopped

def test_a_stop_keeps_the_best_epoch_and_says_so(dls):
    seen = []
    learn = train(dls, "small4", False, epochs=6, device="cpu", precision="fp32", stop=lambda: len(seen.append(1) or seen) > 4 * len(dls.train))
    rows, kept = learn.record["history"], learn.record["stopped"]
    best = min(rows, key=lambda r: r["valid_loss"])
    assert kept == {"after": 4, "kept": best["epoch"], "why": "as asked"} and learn.record["valid_accuracy"] == best["accuracy"]
    loss, right = learn.validate()
    assert float(loss) == pytest.approx(best["valid_loss"], abs=1e-4) and float(right) == pytest.approx(best["accuracy"])


def test_stopped_in_the_first_epoch_it_is_still_judged(dls):
    learn = train(dls, "small4", False, epochs=3, device="cpu", precision="fp32", stop=lambda: True)
    assert learn.record["stopped"]["after"] == 0 and len(learn.record["history"]) == 1 and np.isfinite(learn.record["history"][0]["valid_loss"])


def test_patience_ends_a_training_that_gets_no_better(dls):
    learn = train(dls, "small4", False, epochs=30, lr=1e-12, wd=0.0, device="cpu", precision="fp32", patience=2)
    s = learn.record["stopped"]
    assert s["after"] - s["kept"] == 2 and "no better for 2 epochs" in s["why"]


def test_by_accuracy_the_highest_is_kept():
    rows = [dict(epoch=n, valid_loss=l, accuracy=a) for n, (l, a) in enumerate([(0.5, 0.7), (0.4, 0.6), (0.6, 0.8)], 1)]
    for by, best in (("valid_loss", 2), ("accuracy", 3)):
        kept = KeepBest(by)
        kept.learn = type("L", (), {"model": nn.Linear(1, 1)})()
        for row in rows: kept.add(row)
        assert kept.best["epoch"] == best and len(kept.rows) == 3


def test_an_interrupt_ends_a_watched_training_after_the_batch_and_a_second_one_is_the_ordinary_one(dls):
    import signal
    before, calls = signal.getsignal(signal.SIGINT), []
    def interrupt():
        calls.append(1)
        if len(calls) == len(dls.train) + 2: signal.raise_signal(signal.SIGINT)
        return False
    learn = train(dls, "small4", False, epochs=5, device="cpu", precision="fp32", stop=interrupt)
    assert learn.record["stopped"]["after"] == 1 and signal.getsignal(signal.SIGINT) is before
    def twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt): train(dls, "small4", False, epochs=5, device="cpu", precision="fp32", stop=twice)
    assert signal.getsignal(signal.SIGINT) is before


def test_unwatched_an_interrupt_is_an_interrupt(dls, monkeypatch):
    monkeypatch.setattr(training.LossGuard, "after_batch", lambda self: (_ for _ in ()).throw(KeyboardInterrupt("now")))
    with pytest.raises(KeyboardInterrupt): train(dls, "small4", False, epochs=1, device="cpu", precision="bf16")
    assert not torch.is_autocast_enabled("cpu")


def test_the_watch_is_told_all_and_its_button_is_a_method(dls):
    watch = TrainingWatch()
    learn = train(dls, "small4", False, epochs=2, device="cpu", precision="fp32", watch=watch)
    assert watch.bar.value == 1 and len(watch.points) == 2 * len(dls.train) and watch.rows == learn.record["history"]
    assert "Finished after 2 epochs" in watch._said.value and watch._curve.value.count("<circle") == 2 and watch.button.disabled
    watch.stop()
    assert watch.stopped.is_set() and "Stopping" in watch._said.value
    stopped = train(dls, "small4", False, epochs=9, device="cpu", precision="fp32", watch=watch, stop=lambda: len(watch.rows) == 2 and watch.stop())
    assert stopped.record["stopped"]["after"] == 2 and "Stopped after epoch 2" in watch._said.value


# ---- gone wrong

@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_loss_gone_mad_is_stopped_at_once_and_the_last_good_parameters_are_kept(dls, tmp_path, precision):
    watch = TrainingWatch()
    with pytest.raises(TrainingError, match="epoch 1, batch .*tenth of the learning rate.*before the training") as e:
        train(dls, "small4", False, epochs=5, lr=1e4, device="cpu", precision=precision, watch=watch)
    assert all(p.isfinite().all() for p in e.value.learner.model.parameters()) and not torch.is_autocast_enabled("cpu")
    assert "tenth of the learning rate" in watch._said.value


def test_a_nan_later_on_gives_the_best_epoch_back_and_names_the_checkpoint(dls, tmp_path):
    whole = train(dls, "small4", False, epochs=3, device="cpu", precision="fp32")
    poisoned, n = [], len(dls.train)
    def poison():
        poisoned.append(1)
        if len(poisoned) == 2 * n + 1:
            with torch.no_grad(): learner[0].model[1][-1].weight.fill_(float("nan"))
        return False
    learner, grab = [], training._carry_out
    def seen(learn, *a): learner.append(learn); return grab(learn, *a)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(training, "_carry_out", seen)
        with pytest.raises(TrainingError, match="nan in epoch 3.*epoch [12] are in.*epoch-0002 is there") as e:
            train(dls, "small4", False, epochs=3, device="cpu", precision="fp32", stop=poison, checkpoint=tmp_path / "c")
    best = min(whole.record["history"][:2], key=lambda r: r["valid_loss"])
    assert float(e.value.learner.validate()[0]) == pytest.approx(best["valid_loss"], abs=1e-4)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), MemoryError(),
                                   RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")])
def test_too_little_memory_is_answered_with_a_smaller_batch(dls, monkeypatch, error):
    monkeypatch.setattr(training.F, "relu", lambda *a, **k: (_ for _ in ()).throw(error))
    with pytest.raises(TrainingError, match=f"batches of {dls.train.bs} pictures of 32 pixels.*bs={dls.train.bs // 2}"):
        train(dls, "small4", False, epochs=1, device="cpu", precision="bf16")
    assert not torch.is_autocast_enabled("cpu")


def test_any_other_error_stays_itself(dls, monkeypatch):
    monkeypatch.setattr(training.F, "relu", lambda *a, **k: (_ for _ in ()).throw(RuntimeError("a shape that doesn't fit")))
    with pytest.raises(RuntimeError, match="shape"): train(dls, "small4", False, epochs=1, device="cpu", precision="fp32")


def plain(train_labels, valid_labels):
    from fastai.data.core import DataLoaders
    from fastai.data.load import DataLoader
    made = [DataLoader([(torch.zeros(3, 32, 32), n) for n in labels], bs=4, num_workers=0) for labels in (train_labels, valid_labels)]
    return DataLoaders(*made, device="cpu")


@pytest.mark.parametrize("train_labels, valid_labels, said", [([0, 1], [], "validation pictures; found none"), ([0, 1], [1, 1], "at least two classes"),
                                                              ([0, 1], [0, 1, 2], "2 in the validation split only")])
def test_validation_labels_that_can_judge_nothing_are_refused(train_labels, valid_labels, said):
    with pytest.raises(InputError, match=said): check_labels(plain(train_labels, valid_labels))
    with pytest.raises(InputError, match=said): train(plain(train_labels, valid_labels), pretrained=False)
    check_labels(plain([0, 1, 2], [0, 1]))


# ---- what it takes

def test_the_bill_adds_up():
    table = bill(dict(seconds=1800, pictures=900, peak_mb=500), watts=100, price_per_kwh=0.4, per_hour=2.0, seconds_per_label=2, wage=20)
    assert table.loc["energy", "price"] == pytest.approx(0.5 * 0.1 * 0.4) and table.loc["rent", "price"] == pytest.approx(1.0)
    assert table.loc["labels", "price"] == pytest.approx(0.5 * 20) and table.loc["time", "price"] == 0
    assert "100 W" in table.loc["energy", "assumed"] and table.loc["memory", "taken"] == "500 MB"
    assert bill(dict(seconds=1, pictures=1)).loc["memory", "taken"] == "not recorded"


def test_a_step_holds_what_the_way_back_needs_and_a_prediction_one_layer():
    class Fake: record, model = dict(size=32), nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8192, 2))
    table = picture_cost(Fake, n=4, times=1)
    picture, layer = 3 * 32 * 32 * 4 / 1e6, 8 * 32 * 32 * 4 / 1e6
    assert table.loc["a prediction", "MB"] == pytest.approx(2 * layer)
    assert picture + layer <= table.loc["a training step", "MB"] <= picture + 2.1 * layer and (table["ms"] > 0).all()


def test_a_power_law_is_found_again_and_smaller_sets_are_part_of_larger(small_run):
    n = np.array([50, 100, 200, 400])
    curve = pd.DataFrame({"pictures": n, "accuracy": 1 - 2 * n ** -0.5})
    assert labels_for(curve, 0.95) == pytest.approx(1600, rel=1e-6)
    assert labels_for(pd.DataFrame({"pictures": n, "accuracy": 0.5}), 0.95) == np.inf
    rows = small_run.manifest().query("split == 'train'")
    small, large = (training._share(rows, k, seed=3) for k in (20, 60))
    assert set(small["path"]) < set(large["path"]) and abs(len(small) - 20) <= 1 and set(small["label"]) == {"cat", "dog"}


def test_a_learning_curve_and_a_comparison_have_a_row_a_training(small_run, dls, monkeypatch):
    curve = learning_curve(small_run.manifest(), (16, 40), (1, 2), 32, "small4", epochs=1, device="cpu", precision="fp32")
    assert len(curve) == 4 and curve["accuracy"].between(0, 1).all() and len(plot_learning_curve(curve, 0.9).axes[0].lines) == 3
    asked = []
    monkeypatch.setattr(training, "make_dls", lambda *args, **more: asked.append(more["augment"]) or make_dls(*args, **more))
    for augment in (False, True): learning_curve(small_run.manifest(), (40,), (1,), 32, "small4", 1, "fp32", "cpu", augment)
    assert asked == [False, True]
    table = compare_networks(dls, ("small4", "small8"), epochs=1, device="cpu", precision="fp32")
    assert table["arch"].tolist() == ["small4", "small8"] and table["parameters"].is_monotonic_increasing and plot_networks(table).axes


def test_the_record_tells_memory_and_that_nothing_stopped_it(dls):
    record = train(dls, "small4", False, epochs=1, device="cpu", precision="fp32").record
    assert record["stopped"] is None and record["continued"] == [] and 50 < record["peak_mb"] < 50_000


def test_the_checks_tell_wrong_answers_apart():
    def step(w, b, x, y, lr, sign=-1, scale=1):
        e = w * x + b - y
        return float(w + sign * lr * scale * (2 * e * x).mean()), float(b + sign * lr * scale * (2 * e).mean())
    wrong = [lambda *a: step(*a, sign=1), lambda *a: step(*a[:4], 1.0), lambda *a: step(*a, scale=2), lambda *a: (step(*a)[0], 0.0), lambda *a: 7]
    said = [check("05.1", w) for w in wrong]
    assert check("05.1", step).passed and not any(s.passed for s in said) and len({s.message for s in said}) == 5
    said = [check("05.2", n) for n in (270, 100, 280 * 96 * 96, 12, "many")]
    assert check("05.2", 280).passed and not any(s.passed for s in said) and len({s.message for s in said}) == 5


def early_stop(losses, patience, first=1, last=False):
    best = 0
    for epoch, loss in enumerate(losses):
        if loss < losses[best]: best = epoch
        if epoch - best >= patience: break
    return epoch + first, (epoch if last else best) + first


def one_cycle(t, lr_max, first=1 / 25, peak=0.25, last=1e-5, up="cos", down="cos"):
    def way(a, b, s, kind): return b + (1 + np.cos(np.pi * s)) * (a - b) / 2 if kind == "cos" else a + s * (b - a)
    return lr_max * (way(first, 1, t / peak, up) if t <= peak else way(1, last, (t - peak) / (1 - peak), down))


def test_the_check_of_patience_tells_wrong_answers_apart():
    wrong = [lambda l, p: early_stop(l, p, first=0), lambda l, p: early_stop(l, p, last=True), lambda l, p: (len(l), int(np.argmin(l)) + 1),
             lambda l, p: early_stop(l, 1), lambda l, p: 3]
    said = [check("05.3", w) for w in wrong]
    assert check("05.3", early_stop).passed and not any(s.passed for s in said) and len({s.message for s in said}) == 5
    for s, word in zip(said, ("counted from 1", "not the last", "all the losses", "patient", "two epochs")): assert word in s.message


def test_the_check_of_one_cycle_tells_wrong_answers_apart():
    wrong = {"the peak is at": dict(peak=0.5), "begins at": dict(first=0), "ends near": dict(last=0.04), "straight lines": dict(up="line", down="line"),
             "the way up": dict(up="line"), "the way down": dict(down="line")}
    for word, how in wrong.items():
        said = check("05.4", lambda t, lr_max, how=how: one_cycle(t, lr_max, **how))
        assert not said.passed and word in said.message
    assert check("05.4", one_cycle).passed


@pytest.mark.parametrize("n", [80 * 16 // 10, 633])
def test_no_number_of_pictures_gives_an_odd_batch(n):
    "torch 2.15 on a CPU: convolutions of 12 channels, channels last, two threads and an odd batch write past their memory."
    from dlpipe_nb.preprocessing import _even
    assert _even(64, n) % 2 == 0 and 4 <= _even(64, n) <= 64 and _even(7, n) == 6


def test_validation_takes_four_training_batches_at_a_time_up_to_64(small_run):
    df = pd.concat([small_run.manifest()] * 8)
    for bs, valid in ((4, 16), (16, 64), (64, 64)):
        dls = make_dls(df, 32, bs)
        assert (dls.train.bs, dls.valid.bs) == (bs, valid) and sum(len(y) for _, y in dls.valid) == (df["split"] == "valid").sum()
