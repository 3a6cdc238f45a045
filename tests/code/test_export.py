"""Chapter 09: a bundle is whole or not at all, answers as the Learner does, and says only what was measured."""
from __future__ import annotations

import errno
import io
import json
import os
import pickle
import pickletools
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pandas as pd
import pytest
import torch
from conftest import ROOT, write_tiny_bundle
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from PIL import Image
from torch import nn

from dlpipe_nb import export
from dlpipe_nb.core import InputError, Run, check, read_json, sha256_of, write_json
from dlpipe_nb.export import (RECIPE, Deployed, ParityError, TooCostly, export_bundle, export_into, export_onnx, model_card,
                              parity, plot_parity, quantize_bundle, race, unmeasured, variants)
from dlpipe_nb.inference import BundleError, Predictor, check_bundle
from dlpipe_nb.training import make_model, save_learner

SIZE, LABELS = 32, ["cat", "dog"]
RECORD = {"labels": LABELS, "size": SIZE, "arch": "small", "pretrained": False, "pictures": 24, "epochs": 3, "precision": "fp32"}


def learner(model, **record):
    "A Learner on the CPU around `model`."
    learn = Learner(DataLoaders(*[DataLoader([], bs=1, num_workers=0)] * 2), model, loss_func=nn.CrossEntropyLoss())
    learn.record = RECORD | record
    return learn


@pytest.fixture(scope="module")
def learn():
    "The small network, untrained, its head made loud so that answers differ."
    torch.manual_seed(3)
    model = make_model("small", 2).eval()
    with torch.no_grad():
        head = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
        head.weight.mul_(20)
        x = torch.randn(16, 3, SIZE, SIZE)
        head.bias.sub_(model(x).mean(0))
    return learner(model)


@pytest.fixture(scope="module")
def data(tmp_path_factory, learn):
    "A manifest: 40 training and 24 validation pictures, labelled as the network does; the test pictures are not there."
    folder, rows, dice = tmp_path_factory.mktemp("pictures"), [], np.random.default_rng(5)
    for i in range(70):
        split = "train" if i < 40 else "valid" if i < 64 else "test"
        a = dice.integers(0, 256, (6, 5, 3), dtype=np.uint8)
        path = folder / f"{i:02}.png"
        if split != "test": Image.fromarray(a).resize((48, 40)).save(path)
        rows.append((path.as_posix(), "", split, f"{i:064}", "drawn"))
    df = pd.DataFrame(rows, columns=["path", "label", "split", "sha256", "source"])
    seen = [p for p in df["path"] if Path(p).exists()]
    said = export._learner_says(learn, seen, 1.0).argmax(1)
    return df.assign(label=[*np.array(LABELS, object)[said], *["cat", "dog"] * 3])


@pytest.fixture(scope="module")
def made(tmp_path_factory, learn, data):
    "A bundle of that network."
    return export_bundle(learn, tmp_path_factory.mktemp("made") / "bundle", valid(data)[:6], 1.5, 0.6, {"card": "# cat or dog"})


@pytest.fixture
def quick(monkeypatch, made):
    "The exporter replaced by a copy of its result, for tests of all that is around it."
    monkeypatch.setattr(export, "export_onnx", lambda learn, path, temperature=1.0: shutil.copy(made / "model.onnx", path))


def valid(df): return list(df.loc[df["split"] == "valid", "path"])
def state(folder): return {p.name: sha256_of(p) for p in sorted(Path(folder).iterdir())}


@pytest.fixture
def old(made, tmp_path):
    "A copy of the bundle, as it might lie there before another export."
    return shutil.copytree(made, tmp_path / "here" / "bundle")


# ---- what a bundle holds

def test_a_bundle_holds_what_production_needs(made):
    info = check_bundle(made)
    assert info["labels"] == LABELS and info["size"] == SIZE and info["temperature"] == 1.5 and info["threshold"] == 0.6
    assert info["precision"] == "fp32" and info["parity"] <= 1e-4 and info["parity_pictures"] == 6 + 3 * 10
    assert info["picture"]["crop"] == "the middle square" and set(info["versions"]) >= {"torch", "onnx", "onnxruntime", "python"}
    assert info["reference"]["n"] == 6 and info["created"].startswith("20") and info["model_sha256"] == sha256_of(made / "model.onnx")
    assert sorted(p.name for p in made.iterdir()) == ["model.json", "model.onnx"]


def test_normalisation_temperature_and_softmax_are_in_the_graph(made, learn, data):
    graph = onnx.load(made / "model.onnx").graph
    assert [i.name for i in graph.input] == ["pictures"] and graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert graph.node[-1].op_type == "Softmax" and "BatchNormalization" not in {n.op_type for n in graph.node}
    x = np.random.default_rng(1).integers(0, 256, (3, SIZE, SIZE, 3), dtype=np.uint8)
    with torch.inference_mode(): want = Deployed(learn.model, 1.5)(torch.from_numpy(x)).numpy()
    assert np.allclose(Predictor(made).probabilities(x), want, atol=1e-5)


def test_an_older_bundle_is_still_loaded(tmp_path):
    old = write_tiny_bundle(tmp_path / "bundle")
    assert "precision" not in read_json(old / "model.json") and Predictor(old).info["card"]


def test_a_flipped_bit_is_refused(old):
    data = bytearray((old / "model.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (old / "model.onnx").write_bytes(data)
    with pytest.raises(BundleError, match="another one"): Predictor(old)


# ---- the second output

def test_the_embedding_is_the_networks_own_projected(made, learn, data):
    "The last layer's input, as torch gives it, turned by the matrix that is in the file: the same numbers."
    from onnx import numpy_helper
    model, seen = onnx.load(made / "model.onnx"), []
    last = [m for m in learn.model.modules() if isinstance(m, nn.Linear)][-1]
    hook = last.register_forward_pre_hook(lambda m, x: seen.append(x[0]))
    x = export.squares(valid(data)[:6], SIZE)
    with torch.inference_mode(): Deployed(learn.model, 1.5)(torch.from_numpy(x))
    hook.remove()
    held = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}
    want = seen[0].numpy() @ held["embedding_turn"] + held["embedding_shift"]
    probs, got = Predictor(made).look(x)
    assert got.shape == (6, 5) == (6, check_bundle(made)["embedding"]["numbers"]) and np.allclose(got, want, atol=1e-3)
    assert np.allclose(got.mean(0), 0, atol=1e-3) and np.allclose(got.std(0, ddof=1), 1, atol=1e-2)


def test_reference_and_predictions_hold_the_embedding_and_the_size(made, data):
    from dlpipe_nb.monitoring import reference_embeddings
    p, reference = Predictor(made).predict(valid(data)[0]), check_bundle(made)["reference"]
    assert np.allclose(reference_embeddings(reference)[0], p.embedding, atol=0.01) and reference["embedding"]["n"] == reference["n"] == 6
    assert reference["statistics"]["size"] == [40.0] * 6 and p.statistics["size"] == 40


def test_the_embedding_is_fitted_on_the_pictures_that_are_given(learn, data, tmp_path):
    train = list(data.loc[data["split"] == "train", "path"])
    folder = export_bundle(learn, tmp_path / "bundle", valid(data)[:6], fit=train)
    got = Predictor(folder).look(export.squares(train, SIZE))[1]
    assert got.shape == (40, 16) and np.allclose(got.mean(0), 0, atol=1e-2) and np.allclose(got.std(0, ddof=1), 1, atol=1e-2)
    assert check_bundle(folder)["embedding"]["share"] > 0.9


def test_a_second_embedding_takes_the_place_of_the_first(made, data, tmp_path):
    file = Path(shutil.copy(made / "model.onnx", tmp_path / "model.onnx"))
    assert export.add_embedding(file, export.squares(valid(data)[:9], SIZE), 3)["numbers"] == 3
    outputs = [(o.name, o.type.tensor_type.shape.dim[1].dim_value) for o in onnx.load(file).graph.output]
    assert outputs == [("probabilities", 2), ("embedding", 3)]


def test_a_network_without_a_last_layer_goes_without_embedding_and_says_so(tmp_path, data):
    net = learner(nn.Sequential(nn.Conv2d(3, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    folder = export_bundle(net, tmp_path / "bundle", valid(data)[:3])
    assert check_bundle(folder)["embedding"]["numbers"] == 0 and "embedding" not in check_bundle(folder)["reference"]
    assert Predictor(folder).predict(valid(data)[0]).embedding is None


def test_smaller_bundles_and_the_other_engine_give_the_embedding_too(learn, data, tmp_path):
    full = export_bundle(learn, tmp_path / "full", valid(data), fit=list(data.loc[data["split"] == "train", "path"]))
    x = export.squares(valid(data), SIZE)
    want = Predictor(full).look(x)[1]
    for precision in ("int8", "fp16"):
        small = quantize_bundle(full, tmp_path / precision, data, precision, max_loss=100, n=16).path
        got = Predictor(small).look(x)[1]
        assert got.shape == want.shape and np.corrcoef(got[:, 0], want[:, 0])[0, 1] > 0.95
        assert check_bundle(small)["reference"]["embedding"]["numbers"] == 16
    pytest.importorskip("openvino")
    assert np.allclose(Predictor(full, engine="openvino").look(x)[1], want, atol=0.01)
    if "BF16" in __import__("openvino").Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        assert np.corrcoef(Predictor(full, precision="bf16").look(x)[1][:, 0], want[:, 0])[0, 1] > 0.95


# ---- parity

def test_every_kind_of_file_is_compared(learn, made, data, tmp_path):
    files = variants(valid(data)[0], tmp_path)
    kinds = {(im.format, im.mode, im.getexif().get(0x0112)) for im in map(Image.open, files)}
    assert {("JPEG", "CMYK", None), ("JPEG", "L", None), ("PNG", "RGBA", None), ("JPEG", "RGB", 6), ("PNG", "RGB", 3)} <= kinds
    gap = parity(learn, Predictor(made), files)
    assert len(gap) == 10 and gap["difference"].max() <= 1e-4 and (gap["difference"].diff().dropna() <= 0).all()


SABOTAGES = {"not normalised": lambda self, x: self.model(x.permute(0, 3, 1, 2).float() / 255).div(self.temperature).softmax(1),
             "classes swapped": lambda self, x: RIGHT(self, x).flip(1)}
RIGHT = Deployed.forward


@pytest.mark.parametrize("slip", SABOTAGES)
def test_a_sabotaged_export_is_refused_with_the_picture_and_the_old_bundle_stays(slip, learn, data, old, monkeypatch):
    before = state(old)
    monkeypatch.setattr(Deployed, "forward", SABOTAGES[slip])
    with pytest.raises(ParityError, match="agree within 0.0001") as e: export_bundle(learn, old, valid(data)[:6], 1.5)
    assert e.value.table["difference"][0] > 1e-4 and str(e.value.table["path"][0]) in str(e.value)
    out = io.BytesIO()
    e.value.figure.savefig(out)
    assert len(out.getvalue()) > 1000 and state(old) == before and [p.name for p in old.parent.iterdir()] == ["bundle"]


def test_labels_in_another_order_are_refused(learn, data, old, quick):
    with pytest.raises(ParityError): export_bundle(learn, old, valid(data)[:6], 1.5, facts={"labels": LABELS[::-1]})


def test_a_network_of_nan_is_refused(learn, data, tmp_path):
    import copy
    broken = learner(copy.deepcopy(learn.model))
    with torch.no_grad(): [p.fill_(float("nan")) for p in broken.model.parameters()]
    with pytest.raises(InputError): export_bundle(broken, tmp_path / "bundle", valid(data)[:2])
    assert not list(tmp_path.iterdir())


def test_another_networks_labels_are_no_case_for_parity(learn, tiny_bundle, data, tmp_path):
    other = write_tiny_bundle(tmp_path / "b", size=SIZE, labels=("fox", "owl"))
    with pytest.raises(InputError, match="fox, owl"): parity(learn, Predictor(other), valid(data)[:2])


def test_the_figure_shows_what_each_says(learn, made, data):
    fig = plot_parity(parity(learn, Predictor(made), valid(data)[:6]), 3)
    assert len(fig.axes) == 3 and all("Learner" in ax.get_title() and "bundle" in ax.get_title() for ax in fig.axes)


# ---- whole or not at all

def killed(code, seconds):
    "Start Python on `code`, wait for its first line, kill it after some seconds."
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    p = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=env)
    assert p.stdout.readline() == "ready\n"
    time.sleep(seconds)
    p.send_signal(signal.SIGKILL)
    p.wait()
    p.stdout.close()


SWAPPING = """
import os, sys
from pathlib import Path
from dlpipe_nb.export import _put
here, n = Path({here!r}), 0
def kid():
    n = 0
    while True:
        new = here / f".new-{{os.getpid()}}-{{n}}"
        new.mkdir()
        for name in ("one", "two"): (new / name).write_text(str(n))
        _put(new, here / "bundle")
        n += 1
print("ready", flush=True)
import signal, time, random
for i in range(10):
    pid, gone = os.fork(), 0
    if not pid: kid()
    end = time.perf_counter() + 0.1 + 0.05 * random.random()
    while time.perf_counter() < end: gone += not os.path.isdir(here / "bundle")
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    whole = (here / "bundle").is_dir() and len({{(here / "bundle" / name).read_text() for name in ("one", "two")}}) == 1
    print("whole" if whole and not gone else f"BROKEN ({{gone}} times not there)", flush=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="two folders change places in one step on Linux only")
def test_at_no_moment_while_folders_change_places_is_there_none(tmp_path):
    "A kill leaves what a look at that moment sees: so one process looks all the time, and kills the other ten times."
    (tmp_path / "bundle").mkdir()
    for name in ("one", "two"): (tmp_path / "bundle" / name).write_text("old")
    code = SWAPPING.format(here=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=120)
    assert done.stdout.split() == ["ready"] + ["whole"] * 10, done.stdout + done.stderr[-800:]


EXPORTING = """
import shutil, sys
from pathlib import Path
from dlpipe_nb import export
from dlpipe_nb.inference import Predictor
made, old = Path({made!r}), Path({old!r})
export.export_onnx = lambda learn, path, temperature=1.0: shutil.copy(made / "model.onnx", path)
export._agreement = lambda *a: {{"parity": 0.0}}
class Learn: record = Predictor(made).info | {{"arch": "small", "pretrained": False}}
print("ready", flush=True)
n = 0
while True:
    export.export_bundle(Learn, old, {paths!r}, 1.5, (n % 50) / 100)
    n += 1
"""


@pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
def test_a_kill_while_exporting_leaves_a_whole_bundle(made, old, data):
    for seconds in (0.31, 0.83):
        killed(EXPORTING.format(made=str(made), old=str(old), paths=valid(data)[:3]), seconds)
        assert Predictor(old).predict(valid(data)[0]).label in LABELS


@pytest.mark.parametrize("code, words", [(errno.ENOSPC, "a full disk"), (errno.EROFS, "a read-only disk"), (errno.EACCES, "no permission")])
def test_a_disk_that_takes_no_more_is_said_in_words_and_the_old_bundle_stays(code, words, learn, data, old, monkeypatch):
    def full(*a): raise OSError(code, os.strerror(code))
    before = state(old)
    monkeypatch.setattr(export, "export_onnx", full)
    with pytest.raises(InputError, match=words): export_bundle(learn, old, valid(data)[:2])
    assert state(old) == before and [p.name for p in old.parent.iterdir()] == ["bundle"]


def test_a_link_to_a_folder_stays_a_link(learn, data, old, quick):
    link = old.parent / "link"
    link.symlink_to(old, target_is_directory=True)
    export_bundle(learn, link, valid(data)[:2], 1.5, 0.25)
    assert link.is_symlink() and Predictor(old).threshold == 0.25


# ---- what can't be exported

def test_a_file_or_a_folder_of_documents_is_not_replaced(learn, data, tmp_path, quick):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="a file at"): export_bundle(learn, tmp_path / "file", valid(data)[:2], 1.5)
    (tmp_path / "papers").mkdir(), (tmp_path / "papers" / "thesis.docx").write_text("mine")
    with pytest.raises(InputError, match="thesis.docx"): export_bundle(learn, tmp_path / "papers", valid(data)[:2], 1.5)
    assert (tmp_path / "file").read_text() == (tmp_path / "papers" / "thesis.docx").read_text() == "mine"


@pytest.mark.parametrize("change, words", [({"paths": []}, "some pictures"), ({"temperature": 0}, "temperature above 0"),
    ({"temperature": float("nan")}, "temperature above 0"), ({"threshold": 2}, "between 0 and 1"), ({"learn": nn.Linear(1, 1)}, "`.record`")])
def test_what_makes_no_sense_is_refused_before_anything_is_written(change, words, learn, data, tmp_path):
    given = {"learn": learn, "dest": tmp_path / "bundle", "paths": valid(data)[:2], "temperature": 1.0, "threshold": 0.0} | change
    with pytest.raises(InputError, match=words): export_bundle(**given)
    assert not list(tmp_path.iterdir())


class Moody(nn.Module):
    def __init__(self): super().__init__(); self.layer = nn.Linear(3, 2)
    def forward(self, x):
        x = x.mean((2, 3))
        return self.layer(x) if float(x.sum()) > 0 else self.layer(-x)


def test_an_operation_that_onnx_has_not_is_said_in_words(data, tmp_path):
    with pytest.raises(InputError, match="operations that ONNX has"): export_bundle(learner(Moody()), tmp_path / "b", valid(data)[:2])
    assert not list(tmp_path.iterdir())


def test_a_network_with_too_many_outputs_is_said_in_words(learn, data, tmp_path):
    with pytest.raises(InputError, match="a network with 2"): export_onnx(learner(learn.model, labels=["cat", "dog", "owl"]), tmp_path / "m.onnx")


# ---- a whole run

@pytest.fixture
def run(learn, data, tmp_path):
    "A run as chapters 01 to 08 would leave it, made by hand."
    run = Run(tmp_path / "run")
    save_learner(learn, run / "learner")
    model = sha256_of(run / "learner" / "model.safetensors")
    run.save_manifest(data)
    run.write_json("problem.json", {"question": "Cat or dog?", "labels": LABELS, "out_of_scope": ["a fox", "a person"], "confidence": 0.95})
    score = {"rule": {"name": "recall of dog", "unit": "", "highest": 1.0}, "value": 0.9, "low": 0.6, "high": 0.98, "right": 9, "total": 10}
    run.write_json("evaluation.json", {"accuracy": 0.875, "interval": [0.69, 0.957], "n": 24, "labels": LABELS, "temperature": 1.5,
                                       "threshold": 0.6, "score": score, "slices": []})
    run.write_json("test.json", {"result": "pass", "sentence": "5 of 6 right.", "accuracy": 5 / 6, "low": 0.4365, "high": 0.97, "total": 6,
                                 "labels": LABELS, "model": model, "opened": 1, "score": score, "coverage": 0.5, "kept_accuracy": 1.0, "threshold": 0.6})
    return run


def test_a_run_becomes_a_bundle_with_its_own_metric(run, quick):
    info = check_bundle(export_into(run))
    assert info["metrics"]["test"]["score"] == {"metric": "recall of dog", "unit": "", "value": 0.9, "low": 0.6, "high": 0.98, "right": 9, "total": 10}
    assert info["metrics"]["valid"]["interval"] == [0.69, 0.957] and info["threshold"] == 0.6 and len(info["data_sha256"]) == 64
    assert info["learner_sha256"] == sha256_of(run / "learner" / "model.safetensors")
    for words in ("a fox, a person", "recall of dog", "90.0 %", "60.0–98.0 %", "83.3 %", "5 of 6 right", "drawn", "onnxruntime", "| train |"):
        assert words in info["card"], words


@pytest.mark.parametrize("spoil, words", [
    (lambda r: (r / "test.json").unlink(), "a tested learner"), (lambda r: (r / "evaluation.json").unlink(), "an evaluated learner"),
    (lambda r: shutil.rmtree(r / "learner"), "a trained learner"),
    (lambda r: r.write_json("test.json", r.read_json("test.json") | {"model": "other"}), "a test of another one"),
    (lambda r: r.write_json("problem.json", r.read_json("problem.json") | {"labels": ["dog", "cat"]}), "dog, cat in problem.json"),
    (lambda r: r.write_json("evaluation.json", r.read_json("evaluation.json") | {"labels": ["a", "b"]}), "a, b in evaluation.json")])
def test_a_run_that_does_not_fit_together_is_refused(spoil, words, run, quick):
    spoil(run)
    with pytest.raises(InputError, match=words): export_into(run)
    assert not run.has("bundle")


# ---- the card

def test_a_folder_with_a_number_in_its_name_is_no_unmeasured_number(run, tmp_path, quick):
    other = Run(shutil.copytree(run.path, tmp_path / "other"))
    other.save_manifest(run.manifest().assign(source="photos-4711"))
    assert "photos-4711" in read_json(export_into(other) / "model.json")["card"]


def test_a_card_says_nothing_unmeasured(run, monkeypatch, quick):
    facts = [run.read_json(f"{n}.json") for n in ("problem", "evaluation", "test")]
    card = model_card(facts[0], RECORD, facts[2], facts[1], run.manifest())
    assert unmeasured(card, *facts, RECORD, [40, 24, 6, *run.manifest().value_counts(["split", "label"])]) == []
    assert unmeasured(card.replace("83.3 %", "93.3 %"), *facts, RECORD, [40, 24, 6, *run.manifest().value_counts(["split", "label"])]) == ["93.3"]
    monkeypatch.setattr(export, "_card_made", lambda record: "Right in 99.7 % of cases.")
    with pytest.raises(InputError, match="99.7"): export_into(run)


@pytest.mark.parametrize("text, fact, strange", [("1,170 pictures", 1170, []), ("98.6 %", 0.98611, []), ("98.7 %", 0.98611, ["98.7"]),
    ("12 of 13.", "12 of 13", []), ("0.81", {"a": [0.8099]}, []), ("```\n7\n``` 8", 8, []), ("5", True, ["5"]), ("3", [None, float("nan")], ["3"])])
def test_numbers_are_found_in_facts(text, fact, strange):
    assert unmeasured(text, fact) == strange


def test_a_card_of_an_untested_network_says_so():
    card = model_card({}, RECORD, {}, data=pd.DataFrame({"label": ["cat"], "split": "train", "source": "drawn"}))
    assert "Not tested on sealed pictures" in card and "not known" in card and "%" not in card.partition("```")[0]


# ---- a smaller copy

@pytest.fixture(scope="module")
def small(made, data, tmp_path_factory):
    return quantize_bundle(made, tmp_path_factory.mktemp("small") / "bundle", data, n=16, max_loss=100)


def test_int8_is_a_bundle_of_its_own_and_says_what_it_cost(small, made):
    info, parent = check_bundle(small.path), read_json(made / "model.json")
    assert (small.path / "model.onnx").stat().st_size < 0.4 * (made / "model.onnx").stat().st_size
    assert info["precision"] == "int8" and info["parent_sha256"] == parent["sha256"] and info["calibration"] == {
        "pictures": 16, "split": "train", "way": small.way}
    assert info["cost"]["n"] == 24 and info["cost"]["lost"] == pytest.approx(small.lost) and info["cost"]["low"] <= info["cost"]["high"]
    assert info["metrics"] == {"parent": parent.get("metrics", {})} and "not tested" in info["card"] and "parity" not in info
    weights = {t.data_type for t in onnx.load(small.path / "model.onnx").graph.initializer if len(t.dims) == 4}
    assert onnx.TensorProto.INT8 in weights


def test_the_plain_predictor_answers_from_it(small, made, data):
    a, b = (Predictor(p).predict_many(valid(data)) for p in (made, small.path))
    assert {p.model for p in a} != {p.model for p in b} and all(p.error is None for p in b)
    gap = [abs(x.probability - y.probability) for x, y in zip(a, b) if x.label == y.label]
    assert 0 < max(gap) and np.median(gap) < 0.1


def test_every_way_is_in_the_table_and_the_best_was_taken(small):
    assert list(small.table.index) == ["full", "minmax", "minmax, ends in fp32", "entropy, ends in fp32"]
    tried = small.table.iloc[1:]
    assert small.table.loc[small.way, "changed"] == tried["changed"].min() and (tried["MB"] < 0.4 * small.table["MB"]["full"]).all()
    equals = tried[tried["changed"] == tried["changed"].min()]
    assert equals["ms"].idxmin() == small.way and (small.table[["ms", "times"]] > 0).all(axis=None)


def test_calibration_and_choice_take_training_pictures_only(made, data):
    train = set(data.loc[data["split"] == "train", "path"])
    opened = []
    whole = export.squares
    try:
        export.squares = lambda paths, size: opened.extend(paths) or whole(paths, size)
        x, others, rows = export._pictures_for(data, Predictor(made), 16, 1)
    finally: export.squares = whole
    assert len(x) == 16 and len(others) == 24 and set(opened) <= train and len(set(opened)) == 40 and set(rows["split"]) == {"valid"}


def spoiled(src, dst, way, x):
    "The same network with its last layer turned round: every answer changes."
    model = onnx.load(src)
    last = [n for n in model.graph.node if n.op_type == "Gemm"][-1]
    for t in model.graph.initializer:
        if t.name in last.input[1:]: t.CopyFrom(onnx.numpy_helper.from_array(-onnx.numpy_helper.to_array(t), t.name))
    onnx.save(model, dst)


def test_a_copy_that_costs_too_much_is_refused_and_the_old_one_stays(made, data, old, monkeypatch):
    before = state(old)
    monkeypatch.setitem(export._WAYS, "int8", (spoiled, ("spoiled",)))
    with pytest.raises(TooCostly, match="at most 1 point;") as e: quantize_bundle(made, old, data)
    assert e.value.tried.lost == pytest.approx(100) and e.value.tried.changed == 24 and state(old) == before
    assert quantize_bundle(made, old, data, max_loss=100).lost == pytest.approx(100)


def test_sixteen_bits_are_half_the_size_and_the_same_answers(made, data, tmp_path):
    got = quantize_bundle(made, tmp_path / "b", data, precision="fp16", n=8)
    assert 0.45 < got.table["MB"]["weights"] / got.table["MB"]["full"] < 0.56 and got.changed == 0 and got.lost == 0
    assert Predictor(tmp_path / "b").info["precision"] == "fp16"


def test_a_slower_copy_is_called_slower():
    assert "SLOWER" in export._pace({"times": 0.5}) and "2.0" in export._pace({"times": 0.5}) and "1.5 times as fast" == export._pace({"times": 1.5})
    assert export._pace({"times": 0.97}) == export._pace({"times": 1.04}) == "about as fast"


def test_a_race_is_run_by_turns():
    class Clock:
        def __init__(self, name, wait): self.name, self.wait = name, wait
        def probabilities(self, x): turns.append(self.name), time.sleep(self.wait)
    turns = []
    got = race(Clock("a", 0.02), Clock("b", 0.005), np.zeros((2, 1)), 4)
    assert turns == list("abbaabba" "ab") or turns == list("baabbaabba")
    assert got["times"] > 2 and got["a"] == pytest.approx(10, rel=0.5) and got["times"] == pytest.approx(got["a"] / got["b"])


@pytest.mark.parametrize("change, words", [({"precision": "int2"}, "int8, fp16"), ({"df": "no valid"}, "validation pictures"),
    ({"df": "no train"}, "training pictures"), ({"dest": "itself"}, "another folder"), ({"bundle": "small"}, "precision fp32"), ({"df": "fox"}, "fox")])
def test_a_copy_asked_for_wrongly_is_said_in_words(change, words, made, small, data, tmp_path):
    frames = {"no valid": data[data["split"] != "valid"], "no train": data[data["split"] != "train"], "fox": data.assign(label="fox")}
    given = {"bundle": made, "dest": tmp_path / "b", "df": data} | change
    given |= {"df": frames.get(change.get("df"), data), "dest": made if "dest" in change else tmp_path / "b",
              "bundle": small.path if "bundle" in change else made}
    with pytest.raises(InputError, match=words): quantize_bundle(**given)
    assert not (tmp_path / "b").exists()


# ---- for others

def test_the_recipe_needs_nothing_of_ours_and_answers_the_same(made, data, tmp_path):
    for file in variants(valid(data)[1], tmp_path)[:5:2]:
        done = subprocess.run([sys.executable, "-I", "-c", RECIPE + "print('torch' in sys.modules, 'dlpipe_nb' in sys.modules)", str(file)],
                              cwd=made, capture_output=True, text=True)
        said, loaded = done.stdout.splitlines()
        want = Predictor(made).predict(file).probabilities if "cut out" not in file.name else None
        assert loaded == "False False" and list(json.loads(said)) == LABELS
        assert want is None or all(abs(json.loads(said)[k] - want[k]) < 1e-5 for k in LABELS)
    assert len(RECIPE.strip().splitlines()) <= 12 and RECIPE in model_card({}, RECORD, {})


# ---- the exercises

def softened(z, t): e = np.exp(z / t); return e / e.sum(1, keepdims=True)
def eight(w): s = np.abs(w).max(1, keepdims=True) / 127; return (w / s).round().astype(np.int8), s


def called(data):
    texts, found = [], []
    for op, arg, _ in pickletools.genops(data):
        if op.name == "SHORT_BINUNICODE": texts.append(arg)
        if op.name == "STACK_GLOBAL": found.append(".".join(texts[-2:]))
    return found


def lost(t, a, b): return 100 * float((a == t).mean() - (b == t).mean())
def texts(data): return [arg for op, arg, _ in pickletools.genops(data) if op.name == "SHORT_BINUNICODE"]


WRONG = {
    "09.1": [lambda z, t: softened(z, 1 / t), lambda z, t: softened(z, 1), lambda z, t: np.exp(z / t), lambda z, t: softened(z, t)[:, 0]],
    "09.2": [lambda w: (eight(w)[0], eight(w)[1].max()), lambda w: ((w / eight(w)[1]).astype(np.int8), eight(w)[1]),
             lambda w: (eight(w)[0], w.max(1, keepdims=True) / 127), lambda w: ((w / eight(w)[1]).round(), eight(w)[1]), lambda w: w],
    "09.3": [texts, lambda d: [x.split(".")[-1] + "." + x.split(".")[0] for x in called(d)], lambda d: called(d)[:1], lambda d: ", ".join(called(d))],
    "09.4": [lambda t, a, b: -lost(t, a, b), lambda t, a, b: lost(t, a, b) / 100, lambda t, a, b: 100 * float((a != b).mean()),
             lambda t, a, b: 100 * float(((a == t) & (b != t)).mean()), lambda t, a, b: "20"]}


@pytest.mark.parametrize("number, right", [("09.1", softened), ("09.2", eight), ("09.3", called), ("09.4", lost)])
def test_exercises_know_right_from_wrong(number, right):
    assert check(number, right).passed and check(number, lambda *a: None).passed is None
    said = [check(number, wrong) for wrong in WRONG[number]]
    assert not any(s.passed for s in said) and len({s.message for s in said}) == len(said) >= 3, said
    assert not any("your code raised" in s.message for s in said)
