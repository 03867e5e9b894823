"""Runs `make test` again and again, each time in another order, and writes down what became of every run.

    make steady RUNS=20                     twenty of them, in tests/steady.json
    python -m tests.steady --runs 3         three more, while the sources are those that the report is of

The report is written after each run, so that one which is cut short goes on where it was. It ends with exit code 1
where a run has failed; the end of what that run printed is in the report, and `--order` repeats it.
"""

import argparse
import hashlib
import json
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.record import machine

ROOT = Path(__file__).parents[1]
REPORT = Path(__file__).with_name("steady.json")
SOURCES = (
    "flash",
    "kernels",
    "autotune",
    "bench",
    "examples",
    "tests",
    "pyproject.toml",
    "constraints.txt",
    "Makefile",
)
KEPT = 8000  # characters of what a failed run printed last
ORDER = re.compile(r"^the order of tests: --order (\d+)$", re.MULTILINE)
SUMMARY = re.compile(r"^=* ?((?:\d+ [a-z]+(?:, )?)+) in [\d.]+s\b.*$", re.MULTILINE)


def source_hash(root: Path = ROOT) -> str:
    """Sixteen hexadecimal digits of all that a run of the tests depends on: the Python files, and what sets it up."""
    digest = hashlib.sha256()
    for top in (root / name for name in SOURCES):
        for path in sorted(top.rglob("*.py")) if top.is_dir() else [top] if top.is_file() else []:
            digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def read(output: str) -> dict[str, Any]:
    """The orders and the counts that the commands of a run printed; no order is told for one that never began."""
    counts: dict[str, int] = {}
    summaries = SUMMARY.findall(output)
    for number, word in (each.split() for summary in summaries for each in summary.split(", ")):
        counts[word] = counts.get(word, 0) + int(number)
    return {"orders": [int(order) for order in ORDER.findall(output)], "commands": len(summaries), "counts": counts}


def run_once(command: Sequence[str], folder: Path) -> dict[str, Any]:
    """One run: when, how long, which orders, how many tests ended how; the end of its output where it failed."""
    begun, clock = time.time(), time.monotonic()
    done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    run = {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(begun)),
        "seconds": round(time.monotonic() - clock, 1),
        "exit_code": done.returncode,
        **read(done.stdout),
    }
    return run if done.returncode == 0 else run | {"tail": done.stdout[-KEPT:]}


def steady(runs: int, command: Sequence[str], folder: Path, report: Path) -> dict[str, Any]:
    """Add runs to a report, to a new one where the sources or the command are others than its own."""
    key = {"command": " ".join(command), "sources": source_hash(folder)}
    found: dict[str, Any] = json.loads(report.read_text(encoding="utf-8")) if report.is_file() else {}
    if any(found.get(name) != value for name, value in key.items()):
        found = {**key, "machine": machine(torch.device("cpu"), 1), "runs": []}
    for n in range(runs):
        run = run_once(command, folder)
        found["runs"].append(run)
        report.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        orders = ", ".join(map(str, run["orders"]))
        ends = ", ".join(f"{count} {word}" for word, count in run["counts"].items())
        verdict = "failed" if run["exit_code"] else "passed"
        print(f"run {n + 1} of {runs} {verdict} in {run['seconds']:.0f} s, orders {orders}: {ends}", flush=True)
    return found


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.steady", description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=20, metavar="N", help="how many (20)")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="test processes of each (2)")
    parser.add_argument("--folder", type=Path, default=ROOT, help="checkout whose tests are run")
    parser.add_argument("--report", type=Path, default=REPORT, help="where it is written")
    given = parser.parse_args(words)
    found = steady(given.runs, ["make", "test", f"JOBS={given.jobs}"], given.folder, given.report)
    failed = [run for run in found["runs"] if run["exit_code"]]
    print(f"{len(found['runs'])} runs of these sources, {len(failed)} failed: {given.report}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
