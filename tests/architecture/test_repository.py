"""The repository itself: the gate, the commands, the package's metadata and pins, the notebooks as they are stored."""
from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import zipfile
from configparser import ConfigParser
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import gate
import notebooks as runner
from dlpipe_nb.core import CHAPTERS

ROOT = Path(__file__).resolve().parents[2]
NBS = ROOT / "nbs"
TOOLS = ROOT / ".nbdev" / "bin"
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
LARGEST = 1_500_000         # bytes that a file in git may have
LARGEST_OUTPUT = 400_000    # characters that one stored output may have: a plot of modest size

needs_nbdev = pytest.mark.skipif(not (TOOLS / "nbdev_export").exists(), reason="the build tool isn't there: make setup")
needs_make = pytest.mark.skipif(not shutil.which("make") or os.name == "nt", reason="no make here")
needs_git = pytest.mark.skipif(not shutil.which("git"), reason="no git here")
each_notebook = pytest.mark.parametrize("path", sorted(NBS.glob("*.ipynb")), ids=lambda p: p.stem)
each_chapter = pytest.mark.parametrize("path", sorted(NBS.glob("[0-9][0-9]_*.ipynb")), ids=lambda p: p.stem)


def settings():
    cfg = ConfigParser(delimiters=["="], interpolation=None)
    cfg.read(ROOT / "settings.ini", encoding="utf-8")
    return cfg["DEFAULT"]


def sh(*command, cwd=ROOT, ok=True, **env):
    "Run a command; gives what it printed, and stops where it fails though it should not, or the other way round."
    made = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env={**os.environ, **env}, timeout=120)
    assert (made.returncode == 0) is ok, f"{command} gave {made.returncode}:\n{made.stdout}{made.stderr}"
    return made.stdout + made.stderr


def tracked() -> list[Path]:
    "The files in git, or those that would be."
    if not (ROOT / ".git").exists() or not shutil.which("git"): pytest.skip("this is no clone")
    names = sh("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")
    return [ROOT / n for n in names if n and (ROOT / n).is_file()]


def cells(path): return json.loads(path.read_text("utf-8"))["cells"]


# ---- the gate

@pytest.fixture
def copy(tmp_path) -> Path:
    "What the gate looks at, to be broken."
    shutil.copy(ROOT / "settings.ini", tmp_path)
    for name in ("nbs", "dlpipe_nb"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", ".*", "runs"))
    return tmp_path


@needs_nbdev
def test_the_gate_is_open():
    assert gate.differences() == []


@needs_nbdev
def test_the_gate_names_a_module_edited_by_hand(copy):
    path = copy / "dlpipe_nb" / "core.py"
    path.write_text(path.read_text("utf-8").replace("import hashlib\n", "import hashlib, uuid\n"), "utf-8")
    said = gate.differences(copy)
    assert len(said) == 1 and "dlpipe_nb/core.py" in said[0] and "uuid" in said[0] and "nbs/00_core.ipynb" in said[0]


@needs_nbdev
def test_the_gate_names_modules_too_many_and_too_few(copy):
    (copy / "dlpipe_nb" / "core.py").rename(copy / "dlpipe_nb" / "extra.py")
    said = gate.differences(copy)
    assert len(said) == 2 and "extra.py comes from no notebook" in said[0] and "core.py is missing" in said[1]


@needs_nbdev
def test_the_gate_names_a_notebook_that_is_not_clean(copy):
    path = copy / "nbs" / "00_core.ipynb"
    nb = json.loads(path.read_text("utf-8"))
    next(c for c in nb["cells"] if c["cell_type"] == "code")["execution_count"] = 7
    path.write_text(json.dumps(nb, indent=1, sort_keys=True, ensure_ascii=False) + "\n", "utf-8")
    before = path.read_bytes()
    said = gate.differences(copy)
    assert len(said) == 1 and "nbs/00_core.ipynb is not clean" in said[0] and "7" in said[0]
    assert path.read_bytes() == before, "the gate only looks"


@needs_nbdev
def test_the_gate_names_an_exported_cell_that_was_not_exported(copy):
    path = copy / "nbs" / "00_core.ipynb"
    nb = json.loads(path.read_text("utf-8"))
    cell = next(c for c in nb["cells"] if "#| export\n" in c["source"] and len(c["source"]) > 1)
    cell["source"] += ["\nnew_name = 1"]
    path.write_text(json.dumps(nb, indent=1, sort_keys=True, ensure_ascii=False) + "\n", "utf-8")
    assert any("new_name" in line and "dlpipe_nb/core.py" in line and "make export" in line for line in gate.differences(copy))


# ---- make, and git's help with notebooks

def makefile(tmp_path, *names) -> Path:
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("mine")
    return tmp_path


@needs_make
def test_make_alone_lists_its_targets_and_makes_nothing(tmp_path):
    said = sh("make", cwd=makefile(tmp_path))
    listed = re.findall(r"^  (\S+) +\S", said, re.M)
    phony = re.search(r"^\.PHONY: (.*)", (ROOT / "Makefile").read_text("utf-8"), re.M)[1].split()
    assert sorted(listed) == sorted(phony) and {"course", "test", "lab", "export", "clean"} <= set(listed)
    assert [p.name for p in tmp_path.iterdir()] == ["Makefile"]


@needs_make
def test_clean_never_takes_what_the_learner_made(tmp_path):
    keep = ["runs/course/manifest.csv", "runs/course/__pycache__/a", "my_course/00_core.ipynb", "my_course/.ipynb_checkpoints/a",
            "data/drawn/cat.png", "registry/v0001/model.json", "store.db", ".venv/__pycache__/a", ".nbdev/a", "nbs/00_core.ipynb"]
    go = ["build/a", "dist/a.whl", "x.egg-info/a", "dlpipe_nb/__pycache__/a", "nbs/.ipynb_checkpoints/a", ".pytest_cache/a"]
    sh("make", "clean", cwd=makefile(tmp_path, *keep, *go))
    left = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()}
    assert left == {*keep, "Makefile"}


@needs_make
@pytest.mark.parametrize("python", ["", "PYTHON=oldpython"])
def test_no_python_that_is_new_enough_is_said_in_words(tmp_path, python):
    bin = makefile(tmp_path, "bin/oldpython") / "bin"
    for name in ("oldpython", "python", "python3", *(f"python3.{n}" for n in range(8, 20))):
        (bin / name).write_text("#!/bin/sh\nexit 1\n")
        (bin / name).chmod(0o755)
    said = sh("make", ".venv/bin/python", *filter(None, [python]), cwd=tmp_path, ok=False, PATH=f"{bin}{os.pathsep}{os.environ['PATH']}")
    assert "Expected Python 3.10 or newer" in said and "Next: install one" in said and not (tmp_path / ".venv").exists()


@pytest.fixture
def clone(tmp_path) -> Path:
    "A repository with one notebook and this one's way of treating it."
    work = tmp_path / "a clone"
    (work / "nbs").mkdir(parents=True)
    for name in (".gitattributes", ".gitconfig", "settings.ini", ".ci"):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, work / name)
    (work / ".nbdev").symlink_to(ROOT / ".nbdev")
    write(work, [f"x = {n}" for n in range(5)])
    git(work, "init", "-q", "-b", "main")
    git(work, "config", "--local", "--add", "include.path", "../.gitconfig")
    commit(work, "one")
    return work


def git(work, *args, ok=True):
    who = {f"GIT_{r}_{k}": v for r in ("AUTHOR", "COMMITTER") for k, v in (("NAME", "t"), ("EMAIL", "t@t.example"))}
    return sh("git", *args, cwd=work, ok=ok, GIT_CONFIG_GLOBAL=os.devnull, **who)


def commit(work, message): git(work, "add", "nbs", ".gitattributes", "settings.ini"), git(work, "commit", "-qm", message)


def write(work, sources, count=None):
    "The notebook with these cells, as Jupyter leaves it after a run: with counts and its own metadata."
    code = [{"cell_type": "code", "id": f"cell{n}", "execution_count": count, "metadata": {"x": 1} if count else {}, "outputs": [],
             "source": [s]} for n, s in enumerate(sources)]
    nb = {"cells": code, "metadata": {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}},
          "nbformat": 4, "nbformat_minor": 5}
    (work / "nbs" / "a.ipynb").write_text(json.dumps(nb, indent=1, sort_keys=True) + "\n", "utf-8")


def sources(work): return ["".join(c["source"]) for c in cells(work / "nbs" / "a.ipynb")]


def branches(work, ours: dict, theirs: dict):
    "Two branches that change some cells, ours checked out; run with other counts each."
    for branch, changes, count in (("theirs", theirs, 7), ("ours", ours, 9)):
        git(work, "checkout", "-q", "-b", branch, "main")
        write(work, [changes.get(n, f"x = {n}") for n in range(5)], count)
        commit(work, branch)


@needs_git
@needs_nbdev
def test_git_stores_notebooks_without_counts(clone):
    write(clone, [f"x = {n}" for n in range(5)], count=3)
    git(clone, "add", "nbs")
    assert git(clone, "status", "--short", "nbs") == ""
    assert '"execution_count": 3' in (clone / "nbs" / "a.ipynb").read_text()


@needs_git
@needs_nbdev
def test_git_merges_what_two_people_did_in_other_cells(clone):
    branches(clone, {0: "x = 'ours'"}, {4: "x = 'theirs'"})
    git(clone, "merge", "theirs", "-m", "both")
    assert sources(clone) == ["x = 'ours'", "x = 1", "x = 2", "x = 3", "x = 'theirs'"]


@needs_git
@needs_nbdev
def test_a_conflict_leaves_a_notebook_that_opens(clone):
    branches(clone, {2: "x = 'ours'"}, {2: "x = 'theirs'"})
    assert "CONFLICT" in git(clone, "merge", "theirs", "-m", "both", ok=False)
    assert git(clone, "status", "--short", "nbs").startswith("UU")
    left = sources(clone)
    assert [s for s in left if "x = '" in s] == ["x = 'ours'", "x = 'theirs'"] and "<<<<<<<" in left[2] and len(left) == 9


@needs_git
def test_without_the_build_tool_git_does_what_it_always_does(clone):
    (clone / ".nbdev").unlink()
    branches(clone, {2: "x = 'ours'"}, {2: "x = 'theirs'"})
    git(clone, "merge", "theirs", "-m", "both", ok=False)
    text = (clone / "nbs" / "a.ipynb").read_text()
    assert "<<<<<<<" in text and "'ours'" in text and "'theirs'" in text


@needs_git
def test_what_is_no_notebook_is_stored_as_it_is(clone):
    (clone / "nbs" / "b.ipynb").write_text('{"broken')
    git(clone, "add", "nbs")
    assert git(clone, "show", ":nbs/b.ipynb") == '{"broken'


def test_what_continuous_integration_runs_is_a_script():
    path = ROOT / ".ci" / "run"
    assert path.read_text("utf-8").startswith("#!/usr/bin/env bash\n") and "make" in path.read_text("utf-8")
    if os.name != "nt": assert os.access(path, os.X_OK)
    if shutil.which("bash"): sh("bash", "-n", str(path))


# ---- metadata and pins

def test_two_places_that_must_agree_with_settings():
    text, cfg = (ROOT / "pyproject.toml").read_text("utf-8"), settings()
    assert f'name = "{cfg["lib_name"]}"' in text and f'requires-python = ">={cfg["min_python"]}"' in text
    assert f'__version__ = "{cfg["version"]}"' in (ROOT / "dlpipe_nb" / "__init__.py").read_text("utf-8")


@needs_nbdev
def test_a_wheel_holds_the_package_and_its_metadata(tmp_path):
    for name in ("setup.py", "pyproject.toml", "settings.ini", "README.md", "LICENSE", "MANIFEST.in"): shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "dlpipe_nb", tmp_path / "dlpipe_nb", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("nbs", "tests", "runs", "benchmarks"): makefile(tmp_path, f"{name}/a.py")
    sh(str(TOOLS / "python"), "-m", "build", "--no-isolation", "--wheel", cwd=tmp_path)
    wheel = zipfile.ZipFile(next((tmp_path / "dist").glob("*.whl")))
    info = f"dlpipe_nb-{settings()['version']}.dist-info"
    names = {n for n in wheel.namelist() if not n.startswith(info)}
    assert names == {f"dlpipe_nb/{p.name}" for p in (ROOT / "dlpipe_nb").glob("*.py")}
    said = Parser().parsestr(wheel.read(f"{info}/METADATA").decode())
    assert said["Version"] == settings()["version"] and said["Requires-Python"] == ">=3.10"
    assert said["License-Expression"] == "Apache-2.0" and said["Description-Content-Type"] == "text/markdown"
    assert said.get_payload().strip() == (ROOT / "README.md").read_text("utf-8").strip()
    assert "dlpipe = dlpipe_nb.pipeline:main" in wheel.read(f"{info}/entry_points.txt").decode()


def requirements() -> list[Requirement]:
    return [Requirement(r) for key in ("requirements", "course_requirements", "dev_requirements") for r in settings()[key].split()]


def pins(python: str, **environment) -> dict[str, str]:
    "What constraints.txt pins for a Python on 64-bit Linux."
    found = {}
    env = {"python_version": python, "python_full_version": f"{python}.9", "sys_platform": "linux", "platform_machine": "x86_64",
           "os_name": "posix", "platform_system": "Linux", "implementation_name": "cpython",
           "platform_python_implementation": "CPython", **environment}
    for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines():
        if not line.strip() or line.startswith("#"): continue
        r = Requirement(line)
        if r.marker and not r.marker.evaluate(env): continue
        assert r.name not in found, f"{r.name} has two pins for Python {python}"
        found[r.name.lower().replace("_", "-")] = re.fullmatch("==(.*)", str(r.specifier))[1]
    return found


@pytest.mark.parametrize("python", PYTHONS)
def test_every_requirement_has_a_pin_within_its_range(python):
    have = pins(python)
    for r in requirements():
        if r.marker and not r.marker.evaluate({"python_version": python}): continue
        assert r.name.lower() in have, f"{r.name} has no pin for Python {python}. Next: make pins"
        assert r.specifier.contains(have[r.name.lower()]), f"{r.name} is pinned outside {r.specifier}. Next: make pins"


def test_the_pins_are_names_and_versions_only():
    for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines():
        assert line.startswith("#") or re.fullmatch(r"[a-z0-9.-]+==[a-z0-9.+]+( ; [a-z0-9_ .*=<>!'()-]+)?", line, re.I), line


# ---- the files as they are stored

def test_every_chapter_has_a_notebook_and_a_module():
    assert [p.stem for p in sorted(NBS.glob("[0-9]*.ipynb"))] == [f"{n:02}_{c}" for n, c in enumerate(CHAPTERS)]
    assert {p.stem for p in (ROOT / "dlpipe_nb").glob("[a-z]*.py")} == set(CHAPTERS)


def test_no_file_in_git_is_large():
    large = [f"{p.relative_to(ROOT)} ({p.stat().st_size:,} bytes)" for p in tracked() if p.stat().st_size > LARGEST]
    assert not large, f"at most {LARGEST:,}: {', '.join(large)}"


def test_no_file_in_git_tells_of_somebodys_machine():
    marks = re.compile("|".join(("/ho" "me/[a-z]", "/Us" "ers/[a-z]", "/ro" "ot/", r"[A-Z]:\\Us" "ers", "file:" "///[a-z]", "/t" "mp/[a-z]")))
    texts = [p for p in tracked() if p.suffix in (".py", ".ipynb", ".md", ".ini", ".toml", ".txt", "") and "tests" not in p.parts]
    found = [f"{p.relative_to(ROOT)}: {m[0]}" for p in texts for m in [marks.search(p.read_text("utf-8", "replace"))] if m]
    assert not found, "; ".join(found)


@each_notebook
def test_stored_outputs_are_small_and_plain(path):
    for n, cell in enumerate(cells(path)):
        if cell["cell_type"] != "code": continue
        assert cell["execution_count"] is None, f"cell {n} has an execution count"
        for out in cell["outputs"]:
            data = out.get("data", {})
            assert out["output_type"] != "error", f"cell {n} stores an error"
            assert out.get("name") != "stderr", f"cell {n} stores a log"
            assert not any("widget" in kind for kind in data), f"cell {n} stores a widget"
            assert len(json.dumps(out)) < LARGEST_OUTPUT, f"cell {n} stores {len(json.dumps(out)):,} characters"
    assert path.stat().st_size < LARGEST


@each_notebook
def test_links_lead_somewhere(path):
    text = "\n".join("".join(c["source"]) for c in cells(path) if c["cell_type"] == "markdown")
    assert dead_links(text, path.parent) == []


def test_links_in_the_readmes_lead_somewhere():
    for path in [ROOT / "README.md", *ROOT.glob("data/README.md")]: assert dead_links(path.read_text("utf-8"), path.parent) == []


def dead_links(text, base) -> list[str]:
    "The relative links of a markdown text that lead to no file."
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.S))
    return [t for t in links if not re.match(r"[a-z]+:|attachment:", t) and not (base / t).exists()]


def test_the_readme_lists_every_chapter_in_order():
    found = re.findall(r"\]\(nbs/(\d\d_\w+)\.ipynb\)", (ROOT / "README.md").read_text("utf-8"))
    assert found == [f"{n:02}_{c}" for n, c in enumerate(CHAPTERS)]


# ---- exercises, and the learner's copies

@each_chapter
def test_a_chapter_has_exercises_that_can_be_checked(path):
    texts = {t: ["".join(c["source"]) for c in cells(path) if c["cell_type"] == t] for t in ("markdown", "code")}
    number = path.stem[:2]
    titles = dict(re.findall(rf"^### Exercise {number}\.(\d+) (★+)", "\n".join(texts["markdown"]), re.M))
    asked = [m for s in texts["code"] if "### BEGIN SOLUTION" in s for m in re.findall(rf"""check\(["']{number}\.(\d+)["']""", s)]
    closed = {n for n, stars in titles.items() if stars != "★★★"}  # three stars: open-ended, a check is welcome but not asked
    assert asked and closed <= set(asked) <= set(titles), f"exercises {sorted(titles)}, checked {asked}"
    module = (ROOT / "dlpipe_nb" / f"{path.stem[3:]}.py").read_text("utf-8")
    assert all(f"def _check_{n}(" in module for n in asked)


@each_notebook
def test_a_learners_copy_holds_no_solution_and_is_still_python(path):
    import nbformat
    for cell in runner.learner_copy(nbformat.read(path, as_version=4)).cells:
        if cell.cell_type != "code": continue
        assert "SOLUTION" not in cell.source
        if "# your code here" in cell.source: ast.parse(cell.source)


def test_copies_never_take_the_place_of_a_learners_work(tmp_path):
    names = sorted(p.stem for p in NBS.glob("0*.ipynb"))[:2]
    (tmp_path / f"{names[0]}.ipynb").write_text("mine")
    assert runner.copies(names, tmp_path) == (names[1:], names[:1])
    assert (tmp_path / f"{names[0]}.ipynb").read_text() == "mine"
    assert runner.copies(names, tmp_path) == ([], names)
    with pytest.raises(SystemExit): runner.copies(names, NBS)
