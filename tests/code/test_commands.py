"""The commands of the circle: what they ask for, what they hand on, and the one line in which each refuses."""
from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pandas as pd
import pytest
from command import dlpipe, refused
from conftest import BLUE, RED, picture, write_tiny_bundle
from mosquitto import broker  # noqa: F401, a fixture

from dlpipe_nb import monitoring, pipeline
from dlpipe_nb.core import InputError, Run, sha256_of
from dlpipe_nb.inference import Predictor, Store, destination
from dlpipe_nb.pipeline import _broker, register


@pytest.fixture
def said(capsys):
    "Calls the command in this process: its status, and what it printed on each stream."
    def call(*args):
        capsys.readouterr()
        with pytest.raises(SystemExit) as e: pipeline.main([str(a) for a in args])
        out = capsys.readouterr()
        return e.value.code, out.out, out.err
    return call


@pytest.fixture
def no(said):
    "The one line in which a command refuses."
    def call(*args):
        status, out, err = said(*args)
        assert status == 1 and out == "" and err.startswith("dlpipe: Expected ") and " Next: " in err and err.count("\n") == 1, err
        return err
    return call


def a_run(path: Path, result="pass") -> Run:
    "What a finished run leaves, as far as the registry looks at it; nothing was trained."
    run = Run(path)
    write_tiny_bundle(path / "bundle")
    run.write_json("problem.json", {"labels": ["cat", "dog"]})
    run.write_json("evaluation.json", {"accuracy": 0.9})
    run.write_json("test.json", {"result": result, "sentence": f"18 of 20 right: it {result}es."})
    run.save_manifest(pd.DataFrame({"path": ["a.png"], "label": ["cat"], "split": ["test"], "sha256": ["0" * 64], "source": ["x"]}))
    run.write_json("run.json", {"settings": {"margin": 0.07, "at_least": 9}, "phases": {}})
    return run


@pytest.fixture
def seen(tmp_path, tiny_bundle) -> Path:
    "A store with two predictions, made by the command, and the pictures kept beside it."
    for name, colour in (("red.png", RED), ("blue.png", BLUE)): (tmp_path / name).write_bytes(picture(colour))
    store = tmp_path / "seen.db"
    with pytest.raises(SystemExit): pipeline.main(["predict", str(tiny_bundle), str(tmp_path / "red.png"), str(tmp_path / "blue.png"),
                                                   "--store", str(store), "--keep"])
    return store


# ---- the registry

def test_from_a_run_to_a_champion_and_back_in_real_processes(tmp_path):
    from dlpipe_nb.retraining import Registry
    run, registry = a_run(tmp_path / "runs" / "first"), tmp_path / "registry"
    done = dlpipe("register", run.path, registry)
    assert done.returncode == 0 and done.stdout == "v0001 is the champion. 18 of 20 right: it passes.\n", done.stdout + done.stderr
    assert "an earlier champion" in refused(dlpipe("rollback", registry))
    said = str(Registry(registry).versions().iloc[0].to_dict())
    assert "'champion': True" in said and "run first" in said
    lineage = json.loads((registry / "v0001" / "lineage.json").read_text("utf-8"))
    assert lineage["settings"]["margin"] == 0.07 and (registry / lineage["run"]).resolve() == run.path.resolve()


def test_the_list_of_versions_names_each_parent(tmp_path, tiny_bundle, said):
    from dlpipe_nb.retraining import Registry
    registry = Registry(tmp_path / "registry")
    for lineage in ({"note": "run first"}, {"parent": "v0001"}): registry.add(tiny_bundle, lineage)
    assert [line.split("  from ")[1].split()[0] for line in said("versions", registry.path)[1].splitlines()] == ["nothing", "v0001"]


def test_a_run_that_failed_its_test_is_not_put_into_service(tmp_path, said, no):
    registry = tmp_path / "registry"
    assert "v0001 was added; the champion is nobody" in register(a_run(tmp_path / "bad", "fail"), registry)
    other = a_run(tmp_path / "other")
    info = json.loads((other / "bundle" / "model.json").read_text("utf-8"))
    assert "v0001" in no("register", other.path, registry), "the same bundle twice"
    from dlpipe_nb.inference import seal_of
    info["created"] = "2026-02-02T00:00:00+00:00"
    info["sha256"] = seal_of(info)
    (other / "bundle" / "model.json").write_text(json.dumps(info), "utf-8")
    assert said("register", other.path, registry, "--no-promote")[1].startswith("v0002 was added; the champion is nobody")
    assert said("promote", registry, "v0001")[1] == "The champion is now v0001.\n"
    assert said("promote", registry)[1] == "The champion is now v0002.\n", "the newest"
    assert [line[:7] for line in said("versions", registry)[1].splitlines()] == ["  v0001", "* v0002"]
    assert said("rollback", registry)[1] == "The champion is now v0001.\n"
    assert "v0009" in no("promote", registry, "v0009")


def test_what_is_no_registry_and_no_run_is_refused(tmp_path, no):
    for command in ("versions", "promote", "rollback"): assert "dlpipe register" in no(command, tmp_path / "nothing")
    assert "no bundle" not in no("promote", tmp_path) and not (tmp_path / "nothing").exists()
    assert "none in" in no("register", tmp_path, tmp_path / "registry")
    run, store = a_run(tmp_path / "run"), tmp_path / "none.db"
    for command in ("retrain", "round"):
        assert "no test.json" in no(command, tmp_path, "--store", store, "--registry", tmp_path)
        assert "no file" in no(command, run.path, "--store", store, "--registry", tmp_path)
    assert not store.exists(), "looking at a store that isn't there must not make one"


def test_retrain_refuses_with_too_few_labels(tmp_path, seen, no):
    run = a_run(tmp_path / "run")
    register(run, tmp_path / "registry")
    args = ("retrain", run.path, "--store", seen, "--registry", tmp_path / "registry", "--start", "scratch")
    assert "at least 9 new labelled pictures" in no(*args), "the run's own setting counts"
    assert "at least 4 new labelled pictures" in no(*args, "--at-least", 4)


# ---- answering

def test_predict_keeps_pictures_only_when_asked(tmp_path, tiny_bundle, seen, no):
    store = Store(seen, seen.with_suffix("") / "images")
    assert store.n == 2 and all(store.picture(s) for s in store.predictions()["sha256"])
    with pytest.raises(SystemExit): pipeline.main(["predict", str(tiny_bundle), str(tmp_path / "red.png"), "--store", str(tmp_path / "b.db")])
    assert Store(tmp_path / "b.db").n == 1 and not (tmp_path / "b").exists()
    assert "--store" in no("predict", tiny_bundle, tmp_path / "red.png", "--keep")


def test_a_registry_answers_with_its_champion(tmp_path, said):
    register(a_run(tmp_path / "run"), tmp_path / "registry")
    (tmp_path / "red.png").write_bytes(picture(RED))
    status, out, _ = said("predict", tmp_path / "registry", tmp_path / "red.png")
    assert status == 0 and "red.png: cat" in out


@pytest.mark.parametrize("to", ["store.db", "seen.csv", "seen.jsonl"])
def test_watch_answers_for_what_is_there_and_what_arrives(tmp_path, tiny_bundle, said, to):
    inbox, to = tmp_path / "inbox", tmp_path / to
    inbox.mkdir()
    (inbox / "red.png").write_bytes(picture(RED))
    def later():
        time.sleep(0.7)
        (inbox / "blue.png").write_bytes(picture(BLUE))
    threading.Thread(target=later).start()
    status, out, _ = said("watch", tiny_bundle, inbox, "--to", to, "--seconds", 3)
    assert status == 0 and "red.png: cat" in out and "blue.png: dog" in out and "2 new, 0 known" in out
    status, out, _ = said("watch", tiny_bundle, inbox, "--to", to, "--seconds", 1.5)
    assert "red.png" not in out and "0 new, 2 known" in out and destination(to).n == 2, "what is known isn't said again"


def test_watch_two_folders_and_keep(tmp_path, tiny_bundle, said, no):
    for name, colour in (("door", RED), ("yard", BLUE)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_bytes(picture(colour))
    store = tmp_path / "seen.db"
    assert "2 new" in said("watch", tiny_bundle, tmp_path / "door", tmp_path / "yard", "--to", store, "--keep", "--seconds", 1.5)[1]
    rows, kept = Store(store).predictions(), Store(store, tmp_path / "seen" / "images")
    assert set(rows["source"]) == {(tmp_path / n).as_posix() for n in ("door", "yard")} and all(kept.picture(s) for s in rows["sha256"])
    assert "--to store.db" in no("watch", tiny_bundle, tmp_path / "door", "--to", tmp_path / "a.csv", "--keep")
    assert "a folder to watch" in no("watch", tiny_bundle, tmp_path / "none", "--to", store)
    assert "at least one source" in no("watch", tiny_bundle, "--to", store)
    assert "a broker at" in no("watch", tiny_bundle, "--mqtt", "mqtt://127.0.0.1:9/pets/+/picture", "--to", store)


def test_watch_a_broker(tmp_path, tiny_bundle, said, broker):  # noqa: F811
    import paho.mqtt.client as mqtt
    store, args = tmp_path / "seen.db", ("--mqtt", f"mqtt://127.0.0.1:{broker.port}/pets/+/picture")
    assert "0 new" in said("watch", tiny_bundle, *args, "--to", store, "--seconds", 2)[1], "the broker knows us now"
    client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2)
    client.connect("127.0.0.1", broker.port)
    client.loop_start()
    for device, colour in (("door", RED), ("yard", BLUE)): client.publish(f"pets/{device}/picture", picture(colour), qos=1).wait_for_publish(10)
    client.disconnect(), client.loop_stop()
    assert "2 new" in said("watch", tiny_bundle, *args, "--to", store, "--keep", "--seconds", 3)[1]
    rows, kept = Store(store).predictions(), Store(store, tmp_path / "seen" / "images")
    assert dict(zip(rows["source"], rows["label"])) == {"door": "cat", "yard": "dog"} and all(kept.picture(s) for s in rows["sha256"])


def test_a_broker_is_written_as_an_address():
    assert _broker("mqtt://pi/pets/+/picture") == dict(host="pi", port=1883, topic="pets/+/picture", tls=False)
    assert _broker("mqtts://me:a%40b@pi:99/pets/+") == dict(host="pi", port=99, topic="pets/+", tls=True, user="me", password="a@b")
    for wrong in ("pi/pets/+", "mqtt://pi/pets", "http://pi/pets/+", "mqtt:///pets/+", "mqtt://pi:many/pets/+"):
        with pytest.raises(InputError, match="mqtt://HOST") as e: _broker(wrong)
    with pytest.raises(InputError) as e: _broker("mqtt://me:secret@pi/pets")
    assert "secret" not in str(e.value)


# ---- looking, and saying what is there: the functions of chapters 13 and 14 are stood in for, and their arguments looked at

class Noted:
    "Stands in for a function: notes what it is called with."
    def __init__(self, gives=None): self.calls, self.gives = [], gives
    def __call__(self, *args, **named):
        self.calls.append((args, named))
        return self.gives


def test_monitor_reports_on_the_store(tiny_bundle, seen, said, no, tmp_path):
    status, out, _ = said("monitor", seen, "--bundle", tiny_bundle)
    assert status == 0 and f"Model {Predictor(tiny_bundle).version}: 2 recent pictures" in out
    assert "a time, such as" in no("monitor", seen, "--bundle", tiny_bundle, "--since", "yesteryear")
    assert "no file" in no("monitor", tmp_path / "none.db", "--bundle", tiny_bundle)
    assert "model.json" in no("monitor", seen, "--bundle", tmp_path)


def test_monitor_writes_a_page_and_may_fail(tiny_bundle, seen, said, tmp_path, monkeypatch):
    page = Noted(tmp_path / "page.html")
    monkeypatch.setattr(monitoring, "write_dashboard", page, raising=False)
    assert f"Page     {(tmp_path / 'page.html').as_posix()}" in said("monitor", seen, "--bundle", tiny_bundle, "--out", tmp_path / "page.html")[1]
    (store, bundle, out), _ = page.calls[0]
    assert isinstance(store, Store) and bundle == tiny_bundle and out == tmp_path / "page.html"
    assert said("monitor", seen, "--bundle", tiny_bundle, "--fail")[0] == 0
    class Alarm: alarm = True
    monkeypatch.setattr(monitoring, "monitor", Noted(Alarm()))
    assert said("monitor", seen, "--bundle", tiny_bundle, "--fail")[0] == 2 and said("monitor", seen, "--bundle", tiny_bundle)[0] == 0


@pytest.fixture
def circle(monkeypatch):
    "Chapter 14's functions, stood in for."
    from dlpipe_nb import retraining
    queue = pd.DataFrame([{"sha256": "ab" * 32, "name": "red.png", "label": "cat", "probability": 0.5, "unsure": True, "why": "unsure, 0.50",
                           "image": "kept/ab", "said": ""}])
    fakes = dict(review_queue=Noted(queue), give_label=Noted("stored"), serve_review=Noted(), go_round=Noted(), retrain=Noted("a round"))
    for name, fake in fakes.items(): monkeypatch.setattr(retraining, name, fake, raising=False)
    return fakes


def test_review_lists_labels_and_shows_a_page(circle, seen, said, no, tmp_path):
    status, out, _ = said("review", seen, "--n", 5)
    (store,), named = circle["review_queue"].calls[0]
    assert status == 0 and out.startswith("abababababab  unsure, 0.50") and "kept/ab" in out and "cat" not in out
    assert named == {"n": 5} and store.images == seen.with_suffix("") / "images"
    shas = Store(seen).predictions()["sha256"].tolist()
    assert said("review", seen, "--label", f"{shas[0][:8]}=dog", "--label", f"{shas[1]} = cat", "--by", "ann")[1] == "stored\nstored\n"
    assert [a[1:] for a, _ in circle["give_label"].calls] == [(shas[0][:8], "dog", "ann"), (shas[1], "cat", "ann")]
    assert "--by NAME" in no("review", seen, "--label", "ab=cat") and "SHA=LABEL" in no("review", seen, "--label", "ab", "--by", "ann")
    said("review", seen, "--page", "--port", 9, "--no-browser", "--token", "t", "--by", "ann")
    (_,), named = circle["serve_review"].calls[0]
    assert {k: named[k] for k in ("host", "port", "token", "browser", "by")} == dict(host="127.0.0.1", port=9, token="t", browser=False, by="ann")
    assert len(circle["give_label"].calls) == 2


def test_review_takes_a_file_of_labels(circle, seen, said, no, tmp_path):
    shas, file = Store(seen).predictions()["sha256"].tolist(), tmp_path / "labels.csv"
    pd.DataFrame({"sha256": [*shas, "f" * 64], "label": ["cat", "dog", "cat"]}).to_csv(file, index=False)
    out = said("review", seen, "--labels", file, "--by", "ann")[1]
    assert len(circle["give_label"].calls) == 2 and "1 of other pictures were passed over" in out
    file.write_text("a,b\n1,2\n")
    assert "the columns sha256 and label" in no("review", seen, "--labels", file, "--by", "ann")
    assert "No such file" in said("review", seen, "--labels", tmp_path / "none.csv", "--by", "ann")[2]


def test_retrain_and_round_hand_on_what_was_asked(circle, seen, said, tmp_path):
    run, registry = a_run(tmp_path / "run"), tmp_path / "registry"
    register(run, registry)
    args = (run.path, "--store", seen, "--registry", registry)
    assert said("retrain", *args, "--epochs", 2, "--out", tmp_path / "child", "--images", tmp_path / "kept")[1] == "a round\n"
    (r, store, there, out), named = circle["retrain"].calls[0]
    assert (r.path, store.images, there.champion, out) == (run.path, tmp_path / "kept", "v0001", tmp_path / "child")
    assert named == dict(start="champion", epochs=2, margin=0.07, at_least=9)
    assert said("round", *args, "--force", "--at-least", 5)[0] == 0
    (r, store, there), named = circle["go_round"].calls[0]
    assert r.path == run.path and named.pop("say") and named == dict(at_least=5, margin=0.07, force=True)


def test_draw_writes_the_answers_beside_the_pictures(tmp_path, said):
    assert "6 pictures in" in said("draw", tmp_path / "night", "--n", 6, "--night", 1, "--seed", 5)[1]
    answers = pd.read_csv(tmp_path / "night_labels.csv")
    drawn = {sha256_of(p): p.parent.name for p in (tmp_path / "night").rglob("*.jpg")}
    assert dict(zip(answers["sha256"], answers["label"])) == drawn and len(drawn) == 6
    assert said("draw", tmp_path / "night", "--n", 6, "--night", 1, "--seed", 5)[0] == 0, "the same set once more"


def test_help_is_quick_and_loads_nothing_heavy():
    import os, subprocess, sys
    from conftest import ROOT
    code = ("import sys\nfrom dlpipe_nb.pipeline import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
            "print('LOADED', [m for m in ('torch', 'fastai', 'pandas', 'sqlalchemy', 'matplotlib', 'mlflow', 'scipy', 'onnxruntime', 'fastapi') if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert "LOADED []" in done.stdout and all(f"  {c} " in done.stdout for c in ("run", "settings", "compare", "predict", "watch", "register",
        "versions", "promote", "rollback", "monitor", "review", "retrain", "round", "serve", "app"))
