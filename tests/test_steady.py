"""Runs of the suite in a row: `python -m tests.steady` on folders of a test or two."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from tests import steady

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


def folder_with(test: str, folder: Path) -> Path:
    """A checkout whose `make test` runs one test file, in orders that are drawn and told as ours are."""
    (folder / "tests").mkdir(parents=True)
    (folder / "tests" / "test_toy.py").write_text(test)
    command = f"PYTHONPATH={steady.ROOT} {sys.executable} -m pytest -q -p tests.conftest --rootdir=. tests/test_toy.py"
    (folder / "Makefile").write_text(f"test:\n\t{command} -k first\n\t{command} -k second\n")
    return folder


def test_what_pytest_prints_last_is_counted() -> None:
    output = """the order of tests: --order 17
....                                                          [100%]
3 passed, 1 skipped, 2 deselected in 1.20s
the order of tests: --order 4
====== 1 failed, 2 passed, 1 xfailed in 70.00s (0:01:10) ======
"""
    counts = {"passed": 5, "skipped": 1, "deselected": 2, "failed": 1, "xfailed": 1}
    assert steady.read(output) == {"orders": [17, 4], "commands": 2, "counts": counts}


@pytest.mark.slow
def test_runs_are_written_down_one_by_one_and_go_on(tmp_path: Path) -> None:
    toy = folder_with("def test_first(): pass\ndef test_second(): pass\n", tmp_path / "toy")
    report = tmp_path / "steady.json"
    words = ["--folder", str(toy), "--report", str(report)]
    assert steady.main([*words, "--runs", "2"]) == 0
    assert steady.main([*words, "--runs", "1"]) == 0
    found = json.loads(report.read_text())
    assert found["command"] == "make test JOBS=2" and found["machine"]["versions"]["python"]
    assert [(run["exit_code"], run["commands"], run["counts"]["passed"]) for run in found["runs"]] == [(0, 2, 2)] * 3
    orders = [order for run in found["runs"] for order in run["orders"]]
    assert len(orders) == len(set(orders)) == 6
    (toy / "tests" / "test_toy.py").write_text("def test_first(): pass\ndef test_second(): assert False, 'told'\n")
    assert steady.main([*words, "--runs", "1"]) == 1
    (run,) = json.loads(report.read_text())["runs"]  # of other sources: a new report
    assert run["exit_code"] and run["counts"]["failed"] == 1 and "told" in run["tail"]


def test_sources_are_told_apart(tmp_path: Path) -> None:
    toy = folder_with("def test_first(): pass\n", tmp_path)
    before = steady.source_hash(toy)
    assert steady.source_hash(toy) == before
    with open(toy / "tests" / "test_toy.py", "a") as file:
        file.write("# changed\n")
    assert steady.source_hash(toy) != before
