"""What the tests share: a tiny bundle that answers at once, without training anything.

Its network looks at one thing: a picture that is more red than blue is a cat, one that is more blue is a dog, and one
that is as red as blue is neither for sure.
"""
from __future__ import annotations

import hashlib
import io
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

for name, value in {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "2000"}.items(): os.environ.setdefault(name, value) # as the Makefile has it, before torch is loaded
ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path: sys.path.insert(0, str(ROOT))

RED, BLUE, GREY = (200, 40, 40), (40, 40, 200), (120, 120, 120)


def picture(colour=RED, size=(60, 40), kind="PNG", exif=None) -> bytes:
    "The bytes of a picture of one colour."
    out = io.BytesIO()
    Image.new("RGB", size, colour).save(out, kind, **({"exif": exif} if exif else {}))
    return out.getvalue()


def sideways(size=(60, 40)) -> bytes:
    "A JPEG as a phone held upright stores it: lying on its side, with a note to turn it. Upright, its top half is red."
    im = Image.new("RGB", size, BLUE)
    im.paste(RED, (0, 0, size[0] // 2, size[1]))   # the left half is the top after turning by 90 degrees clockwise
    exif = Image.Exif()
    exif[0x0112] = 6
    out = io.BytesIO()
    im.save(out, "JPEG", exif=exif, quality=95)
    return out.getvalue()


def tiny_network(size=32, labels=("cat", "dog"), embedding=False):
    "An ONNX model in the bundle's form: uint8 pictures [n, size, size, 3] in, probabilities [n, labels] out; its embedding is the mean colour."
    from onnx import TensorProto, checker, helper, numpy_helper
    weights = np.zeros((3, len(labels)), np.float32)
    weights[0, 0], weights[2, 1] = 0.04, 0.04          # red speaks for the first label, blue for the second
    nodes = [helper.make_node("Cast", ["pictures"], ["x"], to=TensorProto.FLOAT),
             helper.make_node("ReduceMean", ["x"], ["mean"], axes=[1, 2], keepdims=0),
             helper.make_node("MatMul", ["mean", "weights"], ["scores"]),
             helper.make_node("Softmax", ["scores"], ["probabilities"], axis=1)]
    outputs = [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["n", len(labels)])]
    if embedding:
        nodes.insert(2, helper.make_node("Identity", ["mean"], ["embedding"]))
        outputs.append(helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["n", 3]))
    graph = helper.make_graph(nodes, "tiny", [helper.make_tensor_value_info("pictures", TensorProto.UINT8, ["n", size, size, 3])], outputs,
                              [numpy_helper.from_array(weights, "weights")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    checker.check_model(model)
    return model.SerializeToString()


def write_tiny_bundle(folder: Path, size=32, labels=("cat", "dog"), threshold=0.8, embedding=False, **more) -> Path:
    "A whole bundle made by hand: model.onnx and model.json in the form that chapter 09 writes."
    from dlpipe_nb.inference import seal_of
    folder.mkdir(parents=True, exist_ok=True)
    network = tiny_network(size, labels, embedding)
    (folder / "model.onnx").write_bytes(network)
    info = {"format": "dlpipe_nb bundle", "format_version": 1, "labels": list(labels), "size": size, "threshold": threshold,
            "temperature": 1.0, "metrics": {"accuracy": 1.0}, "card": "Tells red from blue. Made for tests.",
            "reference": {"n": 0, "statistics": {k: [] for k in ("brightness", "contrast", "sharpness", "probability")}, "labels": {}},
            "data_sha256": "0" * 64, "model_sha256": hashlib.sha256(network).hexdigest(), "versions": {},
            "created": "2026-01-01T00:00:00+00:00", **more}
    info["sha256"] = seal_of(info)
    (folder / "model.json").write_text(json.dumps(info), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory) -> Path:
    "A bundle that tells red (cat) from blue (dog); grey is unsure."
    return write_tiny_bundle(tmp_path_factory.mktemp("tiny") / "bundle")


@pytest.fixture(scope="session")
def small_run(tmp_path_factory):
    "A whole run on 240 drawn pets, trained for two epochs: everything is there, nothing is good."
    from dlpipe_nb.pipeline import run_pipeline
    lines = []
    result = run_pipeline("drawn", tmp_path_factory.mktemp("runs") / "small", lines.append, n=240, epochs=2, size=64, pretrained=False)
    result.run.lines = lines
    return result.run


@pytest.fixture(scope="module")
def predictor(tiny_bundle):
    from dlpipe_nb.inference import Predictor
    return Predictor(tiny_bundle)


@pytest.fixture
def store(tmp_path):
    from dlpipe_nb.inference import Store
    store = Store(tmp_path / "store.db")
    yield store
    store.close()
