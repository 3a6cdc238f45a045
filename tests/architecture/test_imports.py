"""The import table of the design, and the rules for what a notebook exports."""
from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE, NBS = ROOT / "dlpipe_nb", ROOT / "nbs"

#: Who may import whom: the design's table. An edge is one word here.
MAY_IMPORT = {
    "core":          "",
    "problem":       "core",
    "collection":    "core",
    "preprocessing": "core",
    "features":      "core preprocessing",
    "training":      "core preprocessing",
    "evaluation":    "core problem collection training",
    "tuning":        "core problem preprocessing training",
    "testing":       "core problem collection preprocessing training evaluation",
    "export":        "core preprocessing training testing inference",
    "inference":     "core",
    "app":           "core inference",
    "api":           "core inference",
    "monitoring":    "core inference",
    "retraining":    "core problem collection preprocessing features training evaluation tuning testing export inference app monitoring",
    "pipeline":      "core problem collection preprocessing features training evaluation tuning testing export inference app api "
                     "monitoring retraining",
}
#: The modules that run where no torch is, and what they may not import, at any depth.
PRODUCTION = ("core", "inference", "app", "api", "monitoring")
WORKSHOP_TOOLS = ("torch", "torchvision", "fastai", "fastcore", "safetensors", "onnx", "onnxscript", "optuna")
#: What importing `dlpipe_nb.inference` may not load, be it for weight or for time.
NOT_LOADED = ("torch", "torchvision", "fastai", "fastcore", "pandas", "sqlalchemy", "matplotlib", "sklearn", "scipy")
#: Only the command's module talks to the terminal.
MAY_PRINT = ("pipeline",)
#: Only core finds modules by name: `Run.ensure` and `check`.
MAY_IMPORT_BY_NAME = ("core",)
LONGEST_CELL = 30

modules = sorted(p for p in PACKAGE.glob("*.py") if not p.stem.startswith("_"))
notebooks = sorted(NBS.glob("[0-9][0-9]_*.ipynb"))
each_module = pytest.mark.parametrize("path", modules, ids=lambda p: p.stem)
each_notebook = pytest.mark.parametrize("path", notebooks, ids=lambda p: p.stem)


def imports(source: str) -> list[tuple[str, bool]]:
    "Each module that `source` imports, at any depth, with siblings as `dlpipe_nb.name`, and whether by a star."
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import): found += [(a.name, False) for a in node.names]
        if not isinstance(node, ast.ImportFrom): continue
        assert node.level < 2, f"line {node.lineno} leaves the package"
        base = ".".join(filter(None, ["dlpipe_nb" if node.level else "", node.module]))
        if base == "dlpipe_nb": found += [(f"dlpipe_nb.{a.name}", a.name == "*") for a in node.names]
        else: found += [(base, a.name == "*") for a in node.names]
    return found


def siblings(path: Path) -> set[str]:
    "The modules of this package that a module imports."
    return {name.split(".")[1] for name, _ in imports(path.read_text("utf-8")) if name.startswith("dlpipe_nb.")}


def calls(source: str, *names: str) -> list[int]:
    "The lines of `source` where something of one of these `names` is called: a function's or a method's."
    return [n.lineno for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Call)
            and (getattr(n.func, "id", None) in names or getattr(n.func, "attr", None) in names)]


def cycle(graph: dict[str, set[str]]) -> list[str]:
    "The modules of one cycle of `graph`, or none."
    done = set()
    def walk(node, trail):
        if node in trail: return trail[trail.index(node):] + [node]
        if node in done: return []
        for nxt in sorted(graph.get(node, ())):
            if found := walk(nxt, trail + [node]): return found
        done.add(node)
        return []
    for node in graph:
        if found := walk(node, []): return found
    return []


def exported(path: Path) -> list[tuple[int, str]]:
    "The exported cells of a notebook, directives taken off: the cell's number and its code."
    cells = json.loads(path.read_text("utf-8"))["cells"]
    found = []
    for n, cell in enumerate(cells):
        source = "".join(cell["source"])
        if cell["cell_type"] != "code" or not re.search(r"^#\s*\|\s*(export|exporti|exports)\b", source, re.M): continue
        found.append((n, re.sub(r"^#\s*\|.*\n?", "", source, flags=re.M).strip("\n")))
    return found


# ---- the modules

def test_the_table_has_every_module_and_no_cycle():
    assert modules and {p.stem for p in modules} <= MAY_IMPORT.keys()
    table = {m: set(allowed.split()) for m, allowed in MAY_IMPORT.items()}
    assert set().union(*table.values()) <= table.keys()
    assert cycle(table) == []


@each_module
def test_a_module_imports_only_what_the_table_allows(path):
    extra = siblings(path) - set(MAY_IMPORT[path.stem].split())
    assert not extra, f"{path.stem} imports {', '.join(sorted(extra))}; it may import {MAY_IMPORT[path.stem] or 'none of the others'}"


def test_the_modules_import_in_no_circle():
    assert cycle({p.stem: siblings(p) for p in modules}) == []


@each_module
def test_a_module_has_no_star_import(path):
    assert [name for name, star in imports(path.read_text("utf-8")) if star] == []


@each_module
def test_a_name_is_defined_once(path):
    names = [n.name for n in ast.parse(path.read_text("utf-8")).body if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
    patches = {"_", "__repr__", "_repr_mimebundle_"} # methods that are added to a class by name
    assert not {n for n in names if names.count(n) > 1} - patches


@each_module
def test_a_module_names_what_it_imports(path):
    if path.stem in MAY_IMPORT_BY_NAME: return
    assert calls(path.read_text("utf-8"), "import_module", "__import__", "exec", "run_path", "run_module") == []


@each_module
def test_a_module_is_written_for_the_oldest_python(path):
    ast.parse(path.read_text("utf-8"), feature_version=(3, 10))
    newer = {"tomllib", "datetime.UTC", "enum.StrEnum", "typing.Self", "typing.override", "itertools.batched"}
    named = {f"{n.module}.{a.name}" for n in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(n, ast.ImportFrom)
             for a in n.names} | {name for name, _ in imports(path.read_text("utf-8"))}
    if "tomli" in named: newer.remove("tomllib") # where Python has no tomllib, the package takes its place
    assert not newer & named


@pytest.mark.parametrize("name", PRODUCTION)
def test_production_names_no_workshop_tool(name):
    path = PACKAGE / f"{name}.py"
    found = {m.split(".")[0] for m, _ in imports(path.read_text("utf-8"))} & set(WORKSHOP_TOOLS)
    assert not found, f"{name} imports {', '.join(sorted(found))}"


def loaded_by(statement: str, names) -> list[str]:
    "Which of the modules `names` a fresh Python has loaded after `statement`."
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); {statement}; print(*(m for m in {list(names)!r} if m in sys.modules))"
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert made.returncode == 0, made.stderr
    return made.stdout.split()


@pytest.mark.parametrize("name", PRODUCTION)
def test_production_loads_no_torch(name):
    assert loaded_by(f"import dlpipe_nb.{name}", ["torch", "torchvision", "fastai"]) == []


def test_inference_loads_nothing_heavy():
    assert loaded_by("import dlpipe_nb.inference", NOT_LOADED) == []


def test_the_package_itself_imports_nothing():
    assert imports((PACKAGE / "__init__.py").read_text("utf-8")) == []


@each_module
def test_public_functions_and_classes_have_docstrings(path):
    body = ast.parse(path.read_text("utf-8")).body
    bare = [n.name for n in body if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
            and not n.name.startswith("_") and not ast.get_docstring(n)]
    assert not bare, f"no docstring: {', '.join(bare)}"


# ---- the notebooks they come from

@each_notebook
def test_a_notebook_exports_the_module_of_its_name(path):
    found = re.findall(r"^#\s*\|\s*default_exp\s+(\S+)", "\n".join(_code(path)), re.M)
    assert found == [path.stem[3:]]


def _code(path): return ["".join(c["source"]) for c in json.loads(path.read_text("utf-8"))["cells"] if c["cell_type"] == "code"]


@each_notebook
def test_exported_cells_are_short(path):
    long = [f"cell {n} has {len(code.splitlines())} lines" for n, code in exported(path) if len(code.splitlines()) > LONGEST_CELL]
    assert not long, f"at most {LONGEST_CELL}: {'; '.join(long)}"


@each_notebook
def test_exported_cells_print_and_show_nothing(path):
    if path.stem[3:] in MAY_PRINT: return
    found = [f"cell {n}, line {line}" for n, code in exported(path) for line in calls(code, "print", "pprint", "display", "show")]
    assert not found, f"return the value or the figure instead: {'; '.join(found)}"
