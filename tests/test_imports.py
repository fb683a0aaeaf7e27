"""The import rule: which room may look into which, and who must do without jax."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fmda

ROOT = Path(fmda.__file__).parent
LEAVES = {"atomic", "errors", "places", "png", "progress", "text"}
RULE = {
    "atomic": set(),
    "errors": set(),
    "places": set(),
    "png": set(),
    "progress": set(),
    "text": set(),
    "config": set(),
    "environment": {"config"},
    "precision": set(),
    "trees": set(),
    "world": set(),
    "mesh": {"trees"},
    "losses": {"trees", "nn"},
    "augment": {"trees", "nn"},
    "runs": {"config"},
    "nn": {"precision", "trees"},
    "models": {"nn", "config"},
    "diffusion": {"nn", "trees", "models", "weights", "mesh", "runs", "config"},
    "data": {"config", "runs"},
    "sam": {"data", "config"},
    "weights": {"trees", "models", "nn", "config"},
    "train": {"mesh", "precision", "trees", "config", "runs", "data", "evaluate", "perf"},
    "evaluate": {"data", "mesh", "trees", "nn", "config", "runs", "perf"},
    "perf": {"mesh", "trees"},
    "__main__": {"cli"},
    "__init__": set(),
}
EVERYTHING_BELOW = set(RULE) - {"__main__", "__init__"}
RULE["methods"] = EVERYTHING_BELOW
RULE["verbs"] = EVERYTHING_BELOW | {"methods"}
RULE["cli"] = {"verbs", "config", "environment"}
# What one method may take from another.
SHARED_METHODS = {
    "class_text", "dense", "endpoint", "generate", "judges", "kinds", "lora", "mask_head", "planning", "refine_labels",
    "render", "resident", "sampling", "segmentation", "supervised", "table", "trainer", "tune", "uda", "zero_shot",
}  # fmt: skip
JAX = {"jax", "jaxlib", "flax", "optax", "orbax"}


def imported(path):
    """Returns [(module, line, whether at the head of the module)] of every import in a file, absolute names."""
    package = ["fmda", *path.relative_to(ROOT).parts[:-1]]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    head = set(ast.walk(ast.Module([n for n in tree.body if not isinstance(n, ast.FunctionDef)], [])))
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # `from fmda import trees` names the room only in the alias.
            names = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        found += [(name, node.lineno, node in head) for name in names]
    return found


def room(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


FILES = sorted(ROOT.rglob("*.py"))


def faults(path):
    """Returns a line for each import in the file that the rule does not allow."""
    here, lines = room(path), []
    for name, line, _ in imported(path):
        parts = name.split(".")
        if parts[0] != "fmda" or len(parts) == 1 or parts[1] == "__version__":
            continue
        there = parts[1]
        if there not in RULE[here] | LEAVES | {here}:
            lines.append(f"{path.relative_to(ROOT)}:{line}: {here} -> {there}")
        if here == there == "methods":
            own = path.relative_to(ROOT).parts[1].removesuffix(".py")
            # A package's own files come in as `fmda.methods.floss.x` or `fmda.methods.floss`.
            if parts[2] not in SHARED_METHODS | {own}:
                lines.append(f"{path.relative_to(ROOT)}:{line}: methods/{own} -> methods/{parts[2]}")
    return lines


def test_every_room_has_a_rule():
    assert {room(path) for path in FILES} <= set(RULE)


def test_no_arrow_outside_the_rule():
    assert [line for path in FILES for line in faults(path)] == []


def test_the_rule_has_no_circle():
    arrows = {name: set(targets) - {name} for name, targets in RULE.items()}
    while arrows:
        ends = {name for name, targets in arrows.items() if not targets & set(arrows)}
        assert ends, f"circle among {sorted(arrows)}"
        arrows = {name: targets for name, targets in arrows.items() if name not in ends}


def test_the_walk_sees_a_forbidden_arrow(tmp_path, monkeypatch):
    bad = tmp_path / "nn" / "layer.py"
    bad.parent.mkdir()
    bad.write_text("def f():\n    from fmda import train\n    from ..data import loader\n    import fmda.errors\n")
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    assert faults(bad) == ["nn/layer.py:2: nn -> train", "nn/layer.py:3: nn -> data"]


@pytest.mark.parametrize("name", ["atomic", "errors", "progress", "config", "data", "sam"])
def test_rooms_without_jax(name):
    paths = [path for path in FILES if room(path) == name]
    found = [f"{path}:{line}: {m}" for path in paths for m, line, _ in imported(path) if m.split(".")[0] in JAX]
    assert found == []


def test_captions_do_without_jax():
    for path in (ROOT / "world" / "captions.py", ROOT / "world" / "names.py"):
        found = [module for module, _, _ in imported(path) if module.split(".")[0] in JAX]
        assert found == [], path


@pytest.mark.parametrize("file", ["cli.py", "verbs.py"])
def test_cli_imports_methods_and_jax_only_when_a_verb_runs(file):
    heads = [module for module, _, head in imported(ROOT / file) if head]
    rooms = {module.split(".")[1] for module in heads if module.startswith("fmda.")}
    assert rooms <= LEAVES | {"config", "environment", "verbs", "__version__"}
    assert not JAX & {module.split(".")[0] for module in heads}


HELP = "import runpy; sys.argv = ['fmda', '--help']; runpy.run_module('fmda', run_name='__main__')"


@pytest.mark.parametrize("code", ["import fmda", "import fmda.cli", "import fmda.world.captions", HELP])
def test_no_jax_is_loaded(code):
    program = f"import atexit, os, sys\natexit.register(lambda: os._exit(77 if 'jax' in sys.modules else 0))\n{code}\n"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT.parent)
    assert done.returncode == 0, done.stderr or "jax was imported"
