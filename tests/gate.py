"""The gate: cleaning the notebooks leaves no difference, and exporting them leaves no difference in the package.

    python tests/gate.py

It works in a copy and changes nothing here. Each line it prints names a file and what to do about it.
Needs nothing but Python; the build tool is taken from .nbdev/ (`make setup`).
"""
from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from itertools import zip_longest
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ROOT / ".nbdev" / ("Scripts" if os.name == "nt" else "bin")


def nbdev(tool: str, *args: str, cwd: Path):
    "Run one of nbdev's commands in `cwd`, with a home folder of its own: nobody's settings count, and none are written."
    home = cwd / ".home"
    env = {k: v for k, v in os.environ.items() if not k.startswith(("XDG_", "JUPYTER_", "IPYTHON")) and k != "IN_TEST"}
    env.update(HOME=str(home), USERPROFILE=str(home), JUPYTER_CONFIG_DIR=str(home), JUPYTER_DATA_DIR=str(home))
    home.mkdir(exist_ok=True)
    made = subprocess.run([str(TOOLS / tool), *args], cwd=cwd, env=env, capture_output=True, text=True)
    if made.returncode: raise SystemExit(f"{tool} failed:\n{made.stdout}{made.stderr}")


def first_difference(ours: str, theirs: str) -> str:
    "The first line where two texts differ, as `line N: 'this' instead of 'that'`."
    for n, (a, b) in enumerate(zip_longest(ours.splitlines(), theirs.splitlines()), 1):
        if a != b:
            same = len(os.path.commonprefix([a or "", b or ""]))
            return f"line {n}: {_short(a, same)} instead of {_short(b, same)}"
    return "the end of the file"


def _short(line, at): return "nothing" if line is None else repr(line[max(0, at - 20):at + 60].strip())


def unclean(copy: Path) -> list[str]:
    "A line for each notebook of `copy` that cleaning would change; cleans them."
    before = {p: p.read_bytes() for p in sorted((copy / "nbs").glob("*.ipynb"))}
    nbdev("nbdev_clean", cwd=copy)
    return [f"nbs/{p.name} is not clean ({_changed(old, p)}). Next: make clean-notebooks"
            for p, old in before.items() if p.read_bytes() != old]


def _changed(old: bytes, path: Path): return first_difference(old.decode("utf-8", "replace"), path.read_text("utf-8"))


def unexported(copy: Path, package: Path) -> list[str]:
    "A line for each module of `package` that isn't what the notebooks of `copy` export."
    nbdev("nbdev_export", cwd=copy)
    made = {p.name: p.read_text("utf-8") for p in (copy / "dlpipe_nb").glob("*.py")}
    here = {p.name: p.read_text("utf-8") for p in package.glob("*.py")}
    found = [f"dlpipe_nb/{n} comes from no notebook. Next: delete it, or write it as a notebook in nbs/"
             for n in sorted(here.keys() - made.keys())]
    found += [f"dlpipe_nb/{n} is missing. Next: make export" for n in sorted(made.keys() - here.keys())]
    return found + [f"dlpipe_nb/{n} is not what the notebooks export ({first_difference(here[n], made[n])}). "
                    f"Next: change {_source(made[n])}, not the module, then make export"
                    for n in sorted(here.keys() & made.keys()) if here[n] != made[n]]


def _source(text: str) -> str:
    "The notebook that a module says it was made from."
    mark = "File to edit: ../"
    return text.split(mark, 1)[1].split("\n", 1)[0].rstrip(".") if mark in text else "the notebooks"


def differences(root: Path = ROOT) -> list[str]:
    "Everything the gate has to say about the repository at `root`, a line each."
    if not any((root / "nbs").glob("*.ipynb")): return ["nbs/ holds no notebook. Next: git checkout -- nbs"]
    with tempfile.TemporaryDirectory(prefix="dlpipe-gate-") as tmp:
        copy = Path(tmp)
        shutil.copy(root / "settings.ini", copy)
        shutil.copytree(root / "nbs", copy / "nbs", ignore=shutil.ignore_patterns("[._]*", "runs"))
        return unclean(copy) + unexported(copy, root / "dlpipe_nb")


def main():
    if not list(TOOLS.glob("nbdev_export*")): raise SystemExit("The build tool isn't there. Next: make setup")
    found = differences()
    for line in found: print(line)
    if found: sys.exit(1)
    n = len(list((ROOT / "nbs").glob("*.ipynb")))
    print(f"{n} notebooks are clean, and dlpipe_nb/ is what they export")


if __name__ == "__main__": main()
