"""How long does the demo take, and how much memory?

    python benchmarks/demo.py --out benchmarks/results/cpu-demo.json

Runs `fmda demo` from the start in a new folder, in a process of its own: seconds from the command to the path of the
report, the largest resident memory, and the seconds of each run of its pipeline.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

from sides.record import record, write_record
from sides.usage import run_measured

from fmda.data import data_root
from fmda.errors import UserError
from fmda.weights.files import read_json


def main() -> None:
    """Runs the demo and prints its record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    load = os.getloadavg()[0] / len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(prefix="fmda-demo-") as folder:
        work = Path(folder) / "demo"
        used = run_measured([sys.executable, "-m", "fmda", "demo", "--work-dir", str(work)])
        if used.returncode:
            raise UserError(f"fmda demo ended with {used.returncode}; see above")
        marks = {path.parent.name: read_json(path) for path in work.glob("*/stage.json")}
        size = sum(path.stat().st_size for path in work.rglob("*") if path.is_file())
    write_record(
        record(
            "demo",
            seconds=round(used.seconds, 1),
            peak_bytes=used.peak_bytes,
            runs={name: mark["seconds"] for name, mark in sorted(marks.items())},
            work_bytes=size,
            photographs=bool(data_root()) and (data_root() / "camvid").is_dir(),
            load_per_core=round(load, 3),
        ),
        options.out,
    )


if __name__ == "__main__":
    main()
