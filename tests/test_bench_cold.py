"""The cold suite: fresh processes, each step timed once, and a result that is right."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import cold, cold_report
from bench.cold import FILLED, Job
from bench.peers import FLEX, OURS, SDPA

CPU = torch.device("cpu")
TINY = cold.case_of(CPU, quick=True)
TOLD = {"case": asdict(TINY), "device": "cpu", "threads": 1, "seed": 0}


def test_import_and_first_call_are_timed_in_fresh_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Job, str]] = []

    def process(told: dict[str, Any], caches: str) -> dict[str, float]:
        job, number = Job(told["peer"], told["what"]), float(len(asked))
        asked.append((job, caches))
        return {"import torch": number, f"{job.what}, first": number, f"{job.what}, second": number}

    monkeypatch.setattr(cold, "process", process)
    content = cold.measured(CPU, TINY, processes=3, peers=(OURS, SDPA))
    jobs = [Job(peer, what) for peer in (OURS, SDPA) for what in cold.PASSES]
    assert [job for job, _ in asked] == 4 * jobs  # in turn, and one of each before those that count
    assert len({caches for _, caches in asked}) == len(asked)
    found = content["milliseconds"][OURS]
    assert found["import torch"]["samples"] == 6 and found["both, first"]["samples"] == 3
    assert found["both, first"]["median"] == 9.0  # of 5, 9 and 13: the process with 1 does not count


@pytest.mark.slow
def test_a_process_times_every_step_and_begins_fresh(tmp_path: Path) -> None:
    found = cold.process({"peer": OURS, "what": "both", **TOLD}, str(tmp_path))
    assert set(found) == {"import torch", "import flash", "import flash.attention", "both, first", "both, second"}
    assert all(0 < milliseconds < 60000 for milliseconds in found.values())
    assert found["import torch"] > 50  # what had been imported before takes no time


def test_a_child_imports_nothing_large_before_it_is_timed() -> None:
    code = "import sys, bench.cold_child; sys.exit(bool({'torch', 'triton', 'numpy', 'flash'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=cold.ROOT).returncode == 0


def test_what_compiles_is_begun_again_with_its_caches_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def process(told: dict[str, Any], caches: str) -> dict[str, float]:
        seen.append(caches)
        return {"import torch": 1.0, "forward, first": float(len(seen)), "forward, second": 0.5}

    monkeypatch.setattr(cold, "process", process)
    assert dict(cold.started({}, twice=True)) == {
        "import torch": 1.0, "forward, first": 1.0, "forward, second": 0.5, f"forward, first{FILLED}": 2.0,
    }  # fmt: skip
    assert seen[0] == seen[1]
    assert [cold.compiles(peer, torch.device("cuda")) for peer in (OURS, SDPA, FLEX)] == [True, False, True]
    assert [cold.compiles(peer, CPU) for peer in (OURS, SDPA, FLEX)] == [False, False, True]


def test_caches_of_a_process_are_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given: dict[str, Any] = {}

    def run(command: list[str], **options: Any) -> Any:
        given.update(options)
        return subprocess.CompletedProcess(command, 0, '{"import torch": 1}', "")

    monkeypatch.setattr(subprocess, "run", run)
    assert cold.process({}, str(tmp_path)) == {"import torch": 1}
    assert {Path(given["env"][name]).parent for name in cold.CACHES} == {tmp_path}


def test_a_process_that_fails_or_hangs_is_a_reason_and_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    def process(told: dict[str, Any], caches: str) -> dict[str, float]:
        if told["what"] == "both":
            raise RuntimeError("compiled FlexAttention has no backward on a CPU")
        return {"import torch": 1.0, "forward, first": 2.0, "forward, second": 1.0}

    monkeypatch.setattr(cold, "process", process)
    content = cold.measured(CPU, TINY, processes=1, peers=(FLEX,))
    assert content["without"][FLEX] == {"both": "compiled FlexAttention has no backward on a CPU"}
    assert "both, first" not in content["milliseconds"][FLEX]
    assert "no backward on a CPU" in report_of(content)

    def hangs(*_: Any, **__: Any) -> Any:
        raise subprocess.TimeoutExpired("python", cold.CHILD_SECONDS)

    monkeypatch.undo()
    monkeypatch.setattr(subprocess, "run", hangs)
    with pytest.raises(RuntimeError, match=f"within {cold.CHILD_SECONDS} s"):
        cold.process({}, "caches")


def report_of(content: dict[str, Any]) -> str:
    content["milliseconds"].setdefault(OURS, {step: number(1.0) for step in cold_report.IMPORTS})
    return cold_report.report(content)


def number(median: float) -> dict[str, float]:
    return {"median": median, "p20": median, "p80": median, "samples": 3}


def test_the_report_names_machine_versions_and_where_ours_is_slower(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = {step: number(10.0) for step in cold_report.steps() if FILLED not in step}
    theirs = {"import torch": number(9.0), "forward, first": number(20.0), "forward, second": number(5.0)}
    content = cold.measured(CPU, TINY, processes=0, peers=())
    content["milliseconds"] |= {OURS: ours, SDPA: theirs}
    assert cold_report.write(content, tmp_path) == 0
    text = capsys.readouterr().out
    assert f"torch {torch.__version__}" in text and "seed 0" in text
    assert "this library's imports add 20 ms to that of torch" in text
    assert "- forward, second: 2.00x the time of sdpa" in text and "first: " not in text.split("slower")[1]
    assert json.loads((tmp_path / "cold.json").read_text()) == content
    assert (tmp_path / "cold.png").stat().st_size > 10000


@pytest.mark.slow
def test_a_wrong_result_has_no_time() -> None:
    code = """
import json, sys
from bench import cold_child, peers
from contextlib import contextmanager
from dataclasses import replace

@contextmanager
def prepare(case, device):
    with peers.PEERS["sdpa-math"].prepare(case, device) as right:
        yield lambda *x: 1.01 * right(*x)

peers.PEERS["sdpa"] = replace(peers.PEERS["sdpa"], prepare=prepare)
cold_child.steps_of(json.loads(sys.argv[1]))
"""
    told = json.dumps({"peer": SDPA, "what": "both", **TOLD})
    done = subprocess.run([sys.executable, "-c", code, told], cwd=cold.ROOT, capture_output=True, text=True)
    assert done.returncode != 0 and "ArithmeticError: wrong" in done.stderr
