"""Files and databases that predictions go to: one interface, nothing twice, readable after a kill."""
from __future__ import annotations

import json
import subprocess
import sys

import pandas as pd
import pytest
from conftest import BLUE, GREY, RED, ROOT, picture
from postgres import postgres_server  # noqa: F401, a fixture

from dlpipe_nb.core import InputError
from dlpipe_nb.inference import CsvFile, JsonLines, ParquetFolder, Predictor, Rule, Store, append_to, classify, destination


@pytest.fixture(scope="module")
def predictor(tiny_bundle): return Predictor(tiny_bundle)


ITEMS = [("red, \"and\" more.png", picture(RED), "door"), ("a\nb\0=1+1.png", picture(BLUE)), ("gr\udcffy", picture(GREY)), ("猫", b"x", "yard")]
KINDS = {"said.csv": CsvFile, "said.jsonl": JsonLines, "said.parquet": ParquetFolder, "said.db": Store}
each_kind = pytest.mark.parametrize("name", KINDS)


def many(n): return [(f"{i}", picture((50 + i % 200, 10, i // 200))) for i in range(n)]


def place(folder, name):
    if name.endswith("parquet"): pytest.importorskip("pyarrow", reason="pyarrow isn't installed")
    return destination(folder / name)


def table(where):
    if isinstance(where, Store): return where.predictions()[::-1].reset_index(drop=True)
    if isinstance(where, ParquetFolder): return pd.read_parquet(where.path)
    if isinstance(where, JsonLines): return pd.read_json(where.path, lines=True, dtype={"name": str})
    return pd.read_csv(where.path, dtype={"name": str})


@each_kind
def test_all_destinations_are_used_alike(predictor, tmp_path, name):
    said, there = list(predictor.predict_iter(ITEMS)), place(tmp_path, name)
    assert type(there) is KINDS[name] and there.known(said) == set()
    report = classify(ITEMS, predictor, there, source="otherwise")
    assert (report.new, report.known, report.errors) == (4, 0, 1) and there.n == 4
    assert there.known(said) == {(p.sha256, p.model) for p in said}
    assert classify(ITEMS, predictor, there).known == 4 and there.n == 4
    again = place(tmp_path, name)
    assert again.n == 4 and again.known(said) == there.known(said) and classify(ITEMS, predictor, again).new == 0
    rows = table(again)
    assert rows["name"].tolist() == [p.name for p in said] and rows["source"].tolist() == ["door", "otherwise", "otherwise", "yard"]
    assert rows["probability"].tolist() == pytest.approx([p.probability for p in said])
    assert pd.isna(rows["label"].iloc[3]) and "Expected" in rows["error"].iloc[3] and pd.isna(rows["error"].iloc[0])
    given = rows["probabilities"].iloc[0]
    assert (given if isinstance(given, dict) else json.loads(given)) == pytest.approx(said[0].probabilities)
    assert pd.to_datetime(rows["seen_at"], utc=True).notna().all()


@each_kind
def test_the_same_picture_twice_in_a_batch_is_one_record(predictor, tmp_path, name):
    there = place(tmp_path, name)
    classify([("a", picture(RED)), ("b", picture(RED))], predictor, there)
    assert there.n == 1 == len(table(there))


@pytest.mark.parametrize("name", ["said.csv", "said.jsonl"])
@pytest.mark.parametrize("cut", [1, 20, 90])
def test_half_a_last_line_is_taken_off_and_written_anew(predictor, tmp_path, name, cut):
    classify(many(5), predictor, place(tmp_path, name))
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[:-cut])
    there = place(tmp_path, name)
    assert there.n == 4 and classify(many(5), predictor, there).new == 1
    assert len(table(there)) == 5 and table(there)["sha256"].nunique() == 5


def test_a_head_that_was_cut_is_begun_again(predictor, tmp_path):
    (tmp_path / "a.csv").write_text("sha256,mod")
    assert classify(many(2), predictor, CsvFile(tmp_path / "a.csv")).new == 2 and len(pd.read_csv(tmp_path / "a.csv")) == 2


@pytest.mark.parametrize("kind", [CsvFile, JsonLines])
def test_somebody_elses_file_is_refused_and_untouched(tmp_path, kind):
    (tmp_path / "mine").write_text("name,age\nAnna,7\nhalf a li")
    for bad in (tmp_path / "mine", tmp_path):
        with pytest.raises(InputError): kind(bad)
    assert (tmp_path / "mine").read_text().endswith("half a li")


def test_small_parquet_parts_become_large_ones(predictor, tmp_path):
    there = place(tmp_path, "said.parquet")
    classify(many(150), predictor, there, bs=1)
    assert len(list(there.path.iterdir())) < 64 and len(table(there)) == 150
    classify(many(160), predictor, again := place(tmp_path, "said.parquet"), bs=1)
    assert again.n == 160 == len(table(again)) == table(again)["sha256"].nunique()


def test_parts_that_a_killed_merge_left_are_removed(predictor, tmp_path):
    there = place(tmp_path, "said.parquet")
    classify(many(6), predictor, there, bs=2)
    kept = {p: p.read_bytes() for p in there.path.iterdir()}
    t = __import__("pyarrow").concat_tables([there._pa.parquet.read_table(p) for p in sorted(kept)])
    there._save(t, 1, 3)
    assert len(table(there)) == 12, "the small ones are still there, and the large one too"
    assert len(table(place(tmp_path, "said.parquet"))) == 6


def test_parquet_is_a_folder(tmp_path):
    pytest.importorskip("pyarrow")
    (tmp_path / "x.parquet").write_text("a file")
    with pytest.raises(InputError, match="folder"): ParquetFolder(tmp_path / "x.parquet")


def test_without_pyarrow_parquet_says_what_to_install(tmp_path):
    code = ("import sys; sys.modules['pyarrow'] = None\nfrom dlpipe_nb.inference import destination\n"
            f"try: destination({str(tmp_path / 'a.parquet')!r})\nexcept ValueError as e: print(e)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert "dlpipe_nb[fast]" in done.stdout, done.stderr


def test_postgresql_keeps_records_and_actions_once(predictor, postgres_server, tmp_path):  # noqa: F811
    store = Store(postgres_server.new_database().replace("postgresql:", "postgresql+psycopg:"))
    rule = Rule("list", lambda p: True, append_to(tmp_path / "list.jsonl"))
    for _ in range(2): classify([*ITEMS, *many(40)], predictor, store, source="otherwise", actions=[rule], bs=8)
    assert store.n == 44 == len((tmp_path / "list.jsonl").read_text("utf-8").splitlines())
    assert set(store.actions()["state"]) == {"done"} and store.predictions()["source"].value_counts().to_dict() == {"otherwise": 42, "door": 1, "yard": 1}
    i = store.add(predictor.predict_many([picture(RED)]))[0]
    store.add_feedback(i, "dog", by="anna")
    assert len(store.feedback()) == 1
    store.close()


def test_flows_at_once_share_postgresql(predictor, postgres_server, tmp_path):  # noqa: F811
    import threading
    url = postgres_server.new_database().replace("postgresql:", "postgresql+psycopg:")
    def flow():
        store = Store(url)
        classify(many(60), predictor, store, actions=[Rule("list", lambda p: True, append_to(tmp_path / "list.jsonl"))], bs=4)
        store.close()
    threads = [threading.Thread(target=flow) for _ in range(3)]
    [t.start() for t in threads], [t.join() for t in threads]
    store = Store(url)
    assert store.n == 60 == len((tmp_path / "list.jsonl").read_text().splitlines())
    store.close()
