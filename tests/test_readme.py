"""What README shows exists: commands, configurations, benchmarks, and the Python example runs."""

import re
from pathlib import Path

import numpy as np
import pytest

from fmda import cli

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_commands_configurations_and_benchmarks_exist():
    assert set(re.findall(r"(?m)(?:^|`)fmda ([a-z][a-z-]*)", TEXT)) <= {verb.split()[0] for verb in cli.VERBS}
    paths = set(re.findall(r"configs/[\w/.-]+\.yaml|benchmarks/\w+\.py", TEXT))
    paths |= {f"benchmarks/{name}.py" for name in re.findall(r"fmda bench (\w+)", TEXT)}
    assert len(paths) > 10
    assert [path for path in sorted(paths) if "..." not in path and not (ROOT / path).is_file()] == []
    assert all((ROOT / path).is_file() for path in re.findall(r"\((docs/[\w.-]+)\)", TEXT))


@pytest.mark.slow
def test_the_python_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    compile(code, "README.md", "exec")
    code = code.replace("openai/clip-vit-base-patch16", "street-clip").replace("steps=20", "steps=2")
    # what follows these paragraphs needs a finished run
    networks = code[: code.index("run = open_run")]
    names: dict = {}
    exec(networks, names)
    assert names["words"].shape[0] == 2 and names["images"].dtype == np.uint8 and names["images"].ndim == 4
