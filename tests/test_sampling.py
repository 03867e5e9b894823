"""Which sets of parameters a run takes of each test: `--share N` and the mark `sampled(n)`."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.conftest import drawn

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


@pytest.mark.slow
def test_half_a_run_has_every_test_and_half_the_parameters() -> None:
    found = []
    for share in (1, 2):
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "--collect-only",
            "--share",
            str(share),
            "tests/test_bounds.py",
        ]
        found.append(subprocess.run(command, capture_output=True, text=True, cwd=ROOT).stdout.split())
    whole, half = ([name for name in names if "::" in name] for names in found)
    assert set(half) < set(whole)
    assert {name.partition("[")[0] for name in half} == {name.partition("[")[0] for name in whole}
