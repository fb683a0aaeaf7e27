"""Which score without labels orders a run's checkpoints as the true mIoU does, and what would it choose?

    fmda run configs/tables/checkpoint-choice.yaml
    python benchmarks/checkpoint_choice.py runs/checkpoint-choice --out benchmarks/results/cpu-checkpoint-choice.json

Reads the logs of a table's cells that were evaluated while they trained. For each score: the mean of Spearman's rank
correlation with the true mIoU on validation images over all cells, and the mean of the true mIoU where the score is
largest, beside that of the last and of the best evaluation.
"""

import argparse
from dataclasses import asdict
from pathlib import Path

import numpy as np
from sides.record import record, write_record

from fmda.errors import UserError
from fmda.evaluate.choice import checkpoint_choices
from fmda.runs.journal import read_rows

TRUTH = "val/miou"


def main() -> None:
    """Prints the record of a table's cells."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path, help="folder of a table")
    parser.add_argument("--out", type=Path, help="file of the record")
    args = parser.parse_args()
    cells, scores = {}, {}
    for log in sorted((args.table / "cells").rglob("train/metrics.jsonl")):
        if choices := [asdict(choice) for choice in checkpoint_choices(read_rows(log), TRUTH)]:
            cells[log.parent.parent.relative_to(args.table / "cells").as_posix()] = choices
        for choice in choices:
            # neither the last nor the best evaluation has a correlation
            if np.isnan(choice["correlation"]):
                choice["correlation"] = None
            scores.setdefault(choice["score"], []).append((choice["correlation"], choice["truth"]))
    if not scores:
        raise UserError(f"{args.table}: no cell was scored while it trained, with {TRUTH} and without labels")
    means = {}
    for score, values in scores.items():
        known = [correlation for correlation, _ in values if correlation is not None]
        means[score] = {
            "correlation": round(float(np.mean(known)), 3) if known else None,
            "miou": round(float(np.mean([truth for _, truth in values])), 4),
        }
    write_record(record("checkpoint-choice", scores=means, runs=cells), args.out)


if __name__ == "__main__":
    main()
