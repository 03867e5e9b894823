"""Candidates of every bad kind, in real processes: one costs itself alone, and none outlives the sweep."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from flash.autotune import measure, offline, sweep, worker
from flash.autotune.journal import Journal
from flash.autotune.measure import Job
from flash.autotune.resources import Report
from flash.kernels.spec import Config
from tests import kills
from tests.test_sweep import GPU

ROOT = Path(__file__).parents[1]


NEED = offline.Need("forward", "float32", 16, False)
CELL = sweep.Cell(NEED, False, 64)
KINDS = (
    "hangs in the compiler", "kills the compiler", "does not compile", "out of memory", "hangs", "crashes", "exits",
    "wrong and fast", "right",
)  # fmt: skip
TRIED = dict(zip(sweep.tried(kills.TARGET, NEED), KINDS, strict=False))


def compiled(job: Any) -> dict[str, Any]:
    """Runs in the compiler's process."""
    (target, kernel, variant, config), options = job
    kind = TRIED.get(config, "does not compile")
    if kind == "hangs in the compiler":
        time.sleep(600)
    if kind == "kills the compiler":
        os.kill(os.getpid(), signal.SIGSEGV)
    if kind == "does not compile":
        raise RuntimeError("PassManager::run failed")
    return {"status": "ok", "report": Report(target, 100, 0, 1000, 2000, 0, (), ())}


def candidate(job: Job) -> dict[str, Any]:
    """Runs in the GPU's process: checks by `measure.check` where a result is computed at all."""
    kind = TRIED[job.config]
    if kind == "out of memory":
        raise torch.OutOfMemoryError("CUDA out of memory")
    if kind == "hangs":
        time.sleep(600)
    if kind == "crashes":
        os.abort()
    if kind == "exits":
        raise SystemExit(7)
    job = job._replace(target="interpreter", config=Config(16, 16, 4, 1))
    right = measure.outputs
    if kind == "wrong and fast":
        measure.outputs = lambda *call: {name: 1.01 * x for name, x in right(*call).items()}  # type: ignore[assignment]
    try:
        fault = measure.check(job, torch.device("cpu"))
    finally:
        measure.outputs = right
    return {"status": "wrong", "note": fault} if fault else {"status": "ok", "ms": 1.0}


@pytest.mark.slow
@pytest.mark.interpret(gpu=False)
def test_bad_candidates_of_every_kind_are_recorded_and_passed_over_in_real_processes(tmp_path: Path) -> None:
    compiler = worker.Worker("tests.test_worker:compiled", timeout=20)
    timer = worker.Worker("tests.test_worker:candidate", timeout=60)
    journal, asked = Journal(tmp_path / "journal"), []

    def run(job: Job) -> worker.Outcome:
        timer.timeout = 2 if TRIED[job.config] == "hangs" else 60
        return timer.run(job)

    def compile(*job: Any, **options: Any) -> Report:
        compiler.timeout = 2 if TRIED.get(job[3]) == "hangs in the compiler" else 60
        made: Report = sweep.compile_apart(compiler)(*job, **options)
        return made

    def answers() -> bool:
        asked.append(1)
        return True

    try:
        made = sweep.sweep(kills.TARGET, GPU, [CELL], compile, run, journal, answers=answers)
    finally:
        compiler.close()
        timer.close()
    found = {
        kind: value["status"]
        for config, kind in TRIED.items()
        for key, value in journal.entries.items()
        if repr(config) in key and isinstance(value, dict)
    }
    assert found == {
        "out of memory": "oom", "hangs": "timeout", "crashes": "crash", "exits": "crash", "wrong and fast": "wrong",
        "right": "ok",
    }  # fmt: skip
    (best,) = made.rows
    assert TRIED[best.config] == "right" and asked == [1]


def orphan() -> None:
    """Start a child that hangs, tell its id, and be killed."""
    child = worker.Worker("tests.test_sweep:runner", timeout=0.1)
    child._start()
    print(child._child and child._child.pid, flush=True)
    assert child._pipe is not None
    child._pipe.send("sleep")
    time.sleep(0.2)
    os.kill(os.getpid(), signal.SIGKILL)


def is_running(pid: int) -> bool:
    """Whether a process is there, and has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc, for what runs")
def test_a_job_that_hangs_ends_with_a_sweep_that_was_killed() -> None:
    command = [sys.executable, "-c", "from tests.test_worker import orphan; orphan()"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
    assert parent.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 20
    while is_running(child):
        assert time.monotonic() < deadline, "it goes on"
        time.sleep(0.05)
