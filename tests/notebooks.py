"""Run the course's notebooks top to bottom, each in a real Jupyter kernel of its own, in order and without network.

    python tests/notebooks.py                    # all, in a copy that is thrown away: nothing here changes
    python tests/notebooks.py 05_training        # some
    python tests/notebooks.py --store 05_training  # and keep the outputs, trimmed, in nbs/
    python tests/notebooks.py --unfilled         # with every solution taken out, as a learner gets them
    python tests/notebooks.py --copies my_course # runs nothing: a learner's copies, for the notebooks not yet there

The copy has the shape of the repository (nbs/, data/), so that `../runs` and `../data` are in it. `--work DIR` keeps it.
"""
from __future__ import annotations

import argparse
import base64
import io
import os
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from PIL import Image

for name, value in {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "2000"}.items(): os.environ.setdefault(name, value) # as the Makefile has it, for the kernels
ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
WIDGET = "application/vnd.jupyter.widget-view+json"
SOLUTION = re.compile(r"^([ \t]*)### BEGIN SOLUTION\n.*?^[ \t]*### END SOLUTION[ \t]*\n?", re.S | re.M)


def without_solutions(source: str) -> str:
    "A cell as the learner gets it: each solution replaced by a line that asks for one."
    return SOLUTION.sub(lambda m: f"{m[1]}# your code here\n", source)


def learner_copy(nb):
    "The notebook with its solutions and stored outputs taken out."
    for cell in nb.cells:
        if cell.cell_type == "code":
            if "### BEGIN SOLUTION" in cell.source: cell.outputs = []
            cell.source = without_solutions(cell.source)
    return nb


def smaller(png: str, limit: int = 40_000) -> str:
    "A PNG in base64; above `limit` bytes it is kept with 256 colours, which takes a third of the room and looks the same."
    data = base64.b64decode(png)
    if len(data) <= limit: return png.strip()
    with Image.open(io.BytesIO(data)) as im: few = im.convert("RGB").quantize(256)
    few.save(out := io.BytesIO(), "PNG", optimize=True)
    return min(png.strip(), base64.b64encode(out.getvalue()).decode(), key=len)


def trimmed(outputs):
    "What is worth keeping of a cell's outputs: no progress bars, no widget state, no counts, no logs."
    kept = []
    for o in outputs:
        if o.output_type == "stream" and o.name == "stderr": continue
        if o.output_type in ("display_data", "execute_result"):
            if WIDGET in o.data: continue
            if "image/png" in o.data: o.data["image/png"] = smaller(o.data["image/png"])
            o.metadata = {}
            if o.output_type == "execute_result": o.execution_count = None
        kept.append(o)
    return kept


def machine_paths(nb, work: Path) -> list[str]:
    "Lines of the outputs that carry a path of this machine."
    text = "\n".join(str(o.get("text", "")) + str(o.get("data", {}).get("text/plain", ""))
                     for c in nb.cells if c.cell_type == "code" for o in c.outputs)
    marks = (str(work), str(ROOT), tempfile.gettempdir() + os.sep, str(Path.home()) + os.sep)
    return [line for line in text.splitlines() if any(m in line for m in marks)]


def lay_out(work: Path):
    "Give `work` the parts of the repository that notebooks look at."
    (work / "nbs").mkdir(parents=True, exist_ok=True)
    (work / "data").mkdir(exist_ok=True)
    for name in ("README.md", "samples"):
        src, dest = ROOT / "data" / name, work / "data" / name
        if src.is_dir(): shutil.copytree(src, dest, dirs_exist_ok=True)
        elif src.exists(): shutil.copy(src, dest)


def run(path: Path, work: Path, unfilled=False, timeout=600):
    "Run one notebook in a fresh kernel; gives it with its outputs, the seconds it took, and the error or None."
    nb = nbformat.read(path, as_version=4)
    if unfilled: nb = learner_copy(nb)
    env = {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]), "PYTHONWARNINGS": "ignore",
           "JUPYTER_CONFIG_DIR": str(work / ".jupyter"), "IPYTHONDIR": str(work / ".ipython")}
    os.environ.update(env)
    client = NotebookClient(nb, timeout=timeout, kernel_name="python3", resources={"metadata": {"path": str(work / "nbs")}})
    start, error = time.perf_counter(), None
    try: client.execute()
    except CellExecutionError as e: error = str(e)
    return nb, time.perf_counter() - start, error


def copies(names: list[str], dest: Path) -> tuple[list[str], list[str]]:
    "Write a learner's copy of each notebook to `dest`; a file that is there stays as it is. Gives the names made and kept."
    if dest.resolve() == NBS.resolve(): raise SystemExit(f"Expected a folder for copies; found {dest}, the notebooks themselves")
    dest.mkdir(parents=True, exist_ok=True)
    made, kept = [], []
    for name in names:
        path = dest / f"{name}.ipynb"
        if path.exists(): kept.append(name); continue
        text = nbformat.writes(learner_copy(nbformat.read(NBS / path.name, as_version=4)))
        with open(path, "x", encoding="utf-8") as f: f.write(text + "\n")
        made.append(name)
    return made, kept


def answers(nb) -> list[str]:
    "What `check` said, a string an exercise."
    said = (o.data.get("text/plain", "") for c in nb.cells if c.cell_type == "code" and "SOLUTION" in c.source
            or c.cell_type == "code" and "your code here" in c.source for o in c.outputs if "data" in o)
    return [s for s in said if re.match(r"[✓✗–] ", s)]


def store(nb, path: Path):
    "Write the notebook back with its trimmed outputs, as nbdev_clean would leave it."
    import json
    for c in nb.cells:
        c.metadata = {k: v for k, v in c.metadata.items() if k in ("jupyter", "tags")}
        if c.cell_type == "code": c.outputs, c.execution_count = trimmed(c.outputs), None
    nb.metadata = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}
    for c in nb.cells: c.source = c.source
    path.write_text(json.dumps(_split(nb), sort_keys=True, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _split(nb):
    "The notebook as plain data, long texts as lists of lines, the way Jupyter writes them."
    from nbformat.v4.rwbase import split_lines, strip_transient
    return strip_transient(split_lines(nb))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("names", nargs="*", help="notebooks, without .ipynb; all by default")
    p.add_argument("--store", action="store_true", help="keep the trimmed outputs in nbs/")
    p.add_argument("--unfilled", action="store_true", help="take the solutions out first")
    p.add_argument("--copies", type=Path, metavar="DIR", help="write copies without solutions to DIR; never over a file")
    p.add_argument("--work", type=Path, help="the folder to work in, kept afterwards (default: a temporary one)")
    a = p.parse_args()
    if a.store and a.unfilled: p.error("--store keeps the reference notebooks, so it can't go with --unfilled")
    names = a.names or sorted(f.stem for f in NBS.glob("*.ipynb"))
    if a.copies:
        made, kept = copies(names, a.copies)
        print(f"{a.copies}/: {len(made)} notebooks copied, {len(kept)} of yours kept"
              + (" (delete one to get it afresh)" if kept else ""))
        return
    work = (a.work or Path(tempfile.mkdtemp(prefix="dlpipe-nbs-"))).resolve()
    lay_out(work)
    failed, total = [], 0.0
    for name in names:
        nb, seconds, error = run(NBS / f"{name}.ipynb", work, a.unfilled)
        total += seconds
        wrong = [s for s in answers(nb) if s[0] != ("–" if a.unfilled else "✓")]
        print(f"{'FAIL' if error or wrong else 'ok  '} {name:22} {seconds:6.1f} s  {len(answers(nb))} exercises", flush=True)
        for s in wrong: print(f"     {s}")
        if error: print(error[-3000:])
        if error or wrong: failed.append(name)
        elif a.store:
            if found := machine_paths(nb, work): print("     paths of this machine in the outputs, not stored:", *found[:5], sep="\n     "); failed.append(name)
            else: store(nb, NBS / f"{name}.ipynb")
    if not a.work: shutil.rmtree(work, ignore_errors=True)
    print(f"{len(names) - len(failed)} passed, {len(failed)} failed in {total:.0f} s")
    sys.exit(bool(failed))


if __name__ == "__main__": main()
