"""Which sets of parameters a run takes of each test, and in which order: `--share N`, `sampled(n)`, `--order N`."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.conftest import drawn, shuffled

ROOT = Path(__file__).parents[1]


def items(*names: str) -> list[Any]:
    return [SimpleNamespace(name=name) for name in names]


@pytest.mark.parametrize("share", [1, 2, 3, 7])
def test_a_share_is_every_nth_and_never_none(share: int) -> None:
    names = [f"test_x[{n}]" for n in range(10)]
    kept = [item.name for item in drawn(items(*names), share)]
    assert len(kept) == -(-10 // share) and set(kept) <= set(names)
    assert kept == [item.name for item in drawn(items(*names[::-1]), share)]
    assert len(drawn(items("test_y"), share)) == 1


def collected(*words: str) -> tuple[str, list[str]]:
    """The line that tells the order, and the tests of a file, as a run with these options would take them."""
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", *words, "tests/test_bounds.py"]
    lines = subprocess.run(command, capture_output=True, text=True, cwd=ROOT).stdout.splitlines()
    return lines[0], [line for line in lines if "::" in line]


def test_an_order_keeps_files_together_and_does_not_depend_on_what_else_runs() -> None:
    names = [f"tests/test_{file}.py::test_x[{n}]" for file in "abc" for n in range(9)]
    all_of_them = [SimpleNamespace(nodeid=name) for name in names]
    orders = [[item.nodeid for item in shuffled(all_of_them, seed)] for seed in range(1, 7)]
    for order in orders:
        files = [name.partition("::")[0] for name in order]
        assert len(set(files)) == 1 + sum(a != b for a, b in zip(files, files[1:], strict=False))
        assert sorted(order) == names
    assert len({tuple(order) for order in orders}) == 6
    assert len({order[0].partition("::")[0] for order in orders}) > 1
    assert [item.nodeid for item in shuffled(all_of_them[::-2], 3)] == [n for n in orders[2] if n in names[::2]]


@pytest.mark.slow
def test_the_order_of_tests_is_drawn_and_told() -> None:
    _, written = collected("--order", "0")
    told, drawn_order = collected()
    seed = told.rpartition(" --order ")[2]
    assert int(seed) > 0
    assert sorted(drawn_order) == sorted(written) and drawn_order != written
    assert collected("--order", seed) == (told, drawn_order)
    other, _ = collected()
    assert other != told
    workers = [sys.executable, "-m", "pytest", "-q", "-n", "2", "tests/test_sampling.py", "-k", "share"]
    done = subprocess.run(workers, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout  # xdist refuses processes whose orders differ


@pytest.mark.slow
def test_half_a_run_has_every_test_and_half_the_parameters() -> None:
    (_, whole), (_, half) = collected(), collected("--share", "2")
    assert set(half) < set(whole)
    assert {name.partition("[")[0] for name in half} == {name.partition("[")[0] for name in whole}
