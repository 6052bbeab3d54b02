"""The house: what the root holds, which folder imports which, and no circle."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import ROOT

from simla.configs.schema import TABLES

SCRIPTS = set(TABLES)
FOLDERS = {
    "models": "networks",
    "dataset": "data",
    "optim": "",
    "scheduler": "",
    "configs": "",
    "checkpoint": "",
    "evaluation": "",
    "engine": "",
    "simla": "",
    "demo": "",
}
# Folder -> what its modules may import beside themselves; `utils` all of them, `__main__` files anything.
MAY_IMPORT = {
    "utils": set(),
    "models": set(),
    "optim": {"models"},
    "scheduler": set(),
    "configs": {"models", "optim"},
    "evaluation": {"models"},
    "dataset": {"evaluation.vqa", "evaluation.alignment.rows", "models.bert_config", "configs"},
    "checkpoint": {"models", "configs"},
    "engine": {"models", "optim", "scheduler", "configs", "evaluation", "dataset", "checkpoint"},
    "simla": {"models", "dataset", "checkpoint", "evaluation", "configs"},
}


def tracked() -> list[Path]:
    """Return the files that a clone has, links among them."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", check=True).stdout
    return [Path(line) for line in listed.splitlines() if (ROOT / line).exists() and line != ".venv"]


def module_name(path: Path) -> str:
    """Return the name in the package: models.bert of models/bert.py, "" of the package itself."""
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def modules() -> dict[str, Path]:
    files = (p for p in tracked() if p.suffix == ".py" and not (ROOT / p).is_symlink())
    folders = {*FOLDERS, "utils.py"}
    return {module_name(p): p for p in files if p.parts[0] in folders}


def imports_of(path: Path, known: set[str]) -> set[str]:
    """Return the modules of ours that a file imports, at its top, in functions and for types alike."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        for name in names:
            inner = name.removeprefix("simla.")
            if name.startswith("simla.") and inner not in known:
                inner = f"simla.{inner}"
            if inner in known:
                found.add(inner)
    return found


def graph(types: bool = True):
    known = modules()
    return {name: imports_of(path, set(known)) - {name} for name, path in known.items()}


def test_rules():
    wrong = []
    for name, targets in graph().items():
        folder = name.partition(".")[0]
        if name.endswith("__main__") or folder == "demo":
            continue
        for target in targets:
            to = target.partition(".")[0]
            if to in (folder, "utils") or to in MAY_IMPORT[folder] or target in MAY_IMPORT[folder]:
                continue
            wrong.append(f"{name} imports {target}")
    assert not wrong, "\n".join(sorted(wrong))


def test_no_circle():
    edges = graph()
    done, circles = set(), []

    def visit(name, chain):
        if name in chain:
            circles.append(" -> ".join([*chain[chain.index(name) :], name]))
            return
        if name in done:
            return
        for target in sorted(edges[name]):
            visit(target, [*chain, name])
        done.add(name)

    for name in edges:
        visit(name, [])
    assert not circles, "\n".join(circles)


def test_the_root_holds_the_scripts_and_the_projects_own_files_alone():
    in_root = {path.parts[0] for path in tracked()}
    folders = {*FOLDERS, "tests", "benchmarks", "docs", "scripts", ".ci"}
    files = {
        *(f"{script}.py" for script in SCRIPTS),
        "utils.py",
        "Makefile",
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "CITATION.cff",
        "CONTRIBUTING.md",
        ".gitignore",
    }
    requirements = {name for name in in_root if name.startswith("requirements")}
    assert in_root - requirements == folders | files


def test_links_lead_to_every_folder_and_no_import_needs_them(tmp_path):
    names = {*FOLDERS, "utils.py"} - {"simla"}
    links = {path.name for path in (ROOT / "simla").iterdir() if path.is_symlink()}
    assert links == names
    for path in tracked():  # a checkout without links has small text files in their place
        if path.parts[0] in ("simla", "models", "utils.py") and path.suffix != ".yaml":
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            if (ROOT / path).is_symlink():
                (tmp_path / path).write_text(f"../{path.name}")
            else:
                (tmp_path / path).write_bytes((ROOT / path).read_bytes())
    code = "import simla; from simla.models.bert import BertModel; assert simla.UserError"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr


def test_no_module_is_loaded_under_two_names():
    names = [f"simla.{name}".replace("simla.simla", "simla") for name in modules()]
    names = [name for name in names if "__main__" not in name and not name.startswith("simla.web")]
    code = f"""
import importlib, os, sys
for name in {sorted(names) + sorted(SCRIPTS)}:
    importlib.import_module(name)
seen = {{}}
for name, module in list(sys.modules.items()):
    file = getattr(module, "__file__", None)
    if file and os.path.realpath(file).startswith({str(ROOT)!r} + os.sep) and "/.venv/" not in file:
        first = seen.setdefault(os.path.realpath(file), name)
        assert first == name, (first, name)
assert len(seen) >= {len(names)}
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", sorted(SCRIPTS))
def test_scripts_import_one_another_for_three_functions_alone(name):
    """And nothing of the package imports a script, as `imports_of` knows no bare names."""
    tree = ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module in SCRIPTS:
            assert {alias.name for alias in node.names} <= {"losses", "evaluate", "report"}, ast.unparse(node)


def test_nothing_of_the_package_imports_a_script():
    for path in modules().values():
        for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not SCRIPTS & set(names), path


def test_below_the_scripts_flags_are_read_in_one_function_alone():
    """What is there takes plain values, so that anybody can call it; commands have flags of their own."""
    takes_flags = set()
    for name, path in modules().items():
        if name.endswith("__main__") or name.startswith(("demo.", "dataset.prepare.")):
            continue
        for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                arguments = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
                types = [ast.unparse(a.annotation) for a in arguments if a.annotation]
                if any("Namespace" in kind for kind in types):
                    takes_flags.add(f"{name}.{node.name}")
    assert takes_flags == {"engine.launch.start"}


def test_every_script_has_its_steps_in_one_order():
    steps = ["start", "data", "model", "optimiser and schedule", "resume", "train", "report"]
    for name in SCRIPTS:
        text = (ROOT / f"{name}.py").read_text(encoding="utf-8")
        main = text[text.index("\ndef main(args") :]
        marks = [line.strip()[2:] for line in main.splitlines() if line.strip().startswith("# ")]
        steps_here = [step for mark in marks for step in steps if mark.startswith(step)]
        assert steps_here == [step for step in steps if step in steps_here], (name, steps_here)
        if name != "zero_shot_retrieval":  # which trains nothing
            assert steps_here[:6] == steps[:6], (name, steps_here)
        names = [node.name for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)]
        assert names[-2:] == ["main", "parse_and_run"], (name, names)
        assert len(text.splitlines()) <= 180, name


NO_SENTENCE = (
    "As At By For From How In Into Its Of On That Their Those To What When Where Which Whether With UserError"
)


def test_docstrings_say_first_what_is_returned_or_done():
    """No machine sees whether a sentence has a verb; those that open with one of these words have none."""
    wrong = []
    for path in [*modules().values(), *(Path(f"{name}.py") for name in SCRIPTS)]:
        for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
                text, name = ast.get_docstring(node), getattr(node, "name", "the module")
                if text and text.split()[0].strip(",.:;`") in NO_SENTENCE.split():
                    wrong.append(f"{path}: {name}: {text.splitlines()[0]}")
    assert not wrong, "\n".join(wrong)
