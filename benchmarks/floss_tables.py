"""The README's two tables on FLOSS, in Markdown, from the records of `floss_world.py`.

python benchmarks/floss_tables.py [RECORD ...]
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results"
DEFAULT = ["2026-11-21-cpu-floss-world.json", "2026-11-21-cpu-floss-world-clip-dinoiser.json"]
SHOWN = ("smoothness", "margin", "confidence", "entropy", "consensus", "shrunk-entropy")


def gains(rows: list[dict[str, Any]], mean_gain: dict[str, dict[str, float]]) -> str:
    """Returns host and FLOSS (entropy) by domain, and the mean gain over the street world."""
    domains = list(dict.fromkeys(row["domain"] for row in rows))
    lines = ["| host | " + " | ".join(domains) + " | mean gain, street world |", "|---" * (len(domains) + 2) + "|"]
    for host, mean in mean_gain.items():
        own = {row["domain"]: row for row in rows if row["host"] == host}
        cells = [
            f"{own[d]['host_miou']:.1f} \u2192 {own[d]['entropy']['miou']:.1f} ({own[d]['entropy']['gain']:+.2f})"
            for d in domains
        ]
        lines.append(f"| {host} | " + " | ".join(cells) + f" | {mean['entropy']:+.2f} |")
    return "\n".join(lines)


def correlations(rows: list[dict[str, Any]], hosts: list[str]) -> str:
    """Returns each criterion's rank correlation with the true IoU, mean over classes and over domains."""
    lines = ["| host | " + " | ".join(SHOWN) + " |", "|---" * (len(SHOWN) + 1) + "|"]
    for host in hosts:
        found: dict[str, list[float]] = {name: [] for name in SHOWN}
        for entry in (entry for row in rows if row["host"] == host for entry in row.get("criteria", [])):
            if entry["criterion"] in found:
                found[entry["criterion"]].append(entry["correlation"])
        lines.append(f"| {host} | " + " | ".join(f"{np.mean(values):+.2f}" for values in found.values()) + " |")
    return "\n".join(lines)


def main() -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("records", nargs="*", type=Path, default=[RESULTS / name for name in DEFAULT])
    records = [json.loads(path.read_text(encoding="utf-8")) for path in parser.parse_args().records]
    rows = [row for record in records for row in record["rows"]]
    mean_gain = {host: mean for record in records for host, mean in record["mean_gain"].items()}
    print(gains(rows, mean_gain))
    print()
    print(correlations(rows, list(mean_gain)))


if __name__ == "__main__":
    main()
