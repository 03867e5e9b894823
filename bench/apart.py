"""Peers in processes of their own, so that one that hangs, faults or spoils the GPU's context costs itself alone.

The parent makes the oracle once for a case and leaves it in a file; a child makes the same operands from the same seed,
checks its peer against the file and times it. The forward is one job and the backward another: a backward that never
comes back leaves the forward's numbers. Children are kept from case to case, with what they have compiled; only one
works at a time.
"""

import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench.cases import Case, inputs, passes_of
from bench.check import Expected, Part, Sample, Slice
from bench.peers import PEERS, Peer
from bench.record import Record, Row
from bench.trial import LATE, Settings, measure

STOPPED = "stopped: "  # begins the reason of a row whose process was ended, or ended by itself
CHANCES = 2  # jobs of one peer and kind that may be stopped before the peer is passed over
GRACE = 20.0  # seconds that a job begun before the deadline may take beyond it
START_TIMEOUT = 120.0
FAULTS = ("CUDA error", "HIP error", "illegal memory access", "AcceleratorError", "unspecified launch failure")
KINDS = (("forward",), ("backward", "both"))  # of jobs, by the passes they bring
SHARED_MEMORY, ROOM = Path("/dev/shm"), 2**32


class Apart:
    """Measures a peer as bench.trial.measure does, in another process.

    Args:
        folder: where the oracle's file is kept.
        patience: seconds that one job may take, compiling included.
        runner: what the children run; others are for tests.
    """

    def __init__(self, folder: Path, patience: float, runner: str = "bench.apart:serve") -> None:
        self.folder = folder
        self.patience = patience
        self.runner = runner
        self.stops: Counter[tuple[str, str]] = Counter()  # (peer, first pass of the job)
        self.workers: dict[str, Any] = {}
        self.written: Expected | None = None

    def recall(self, record: Record) -> None:
        """Count what an earlier run had to stop."""
        for row in record.rows.values():
            if row.outcome == "error" and row.reason.startswith(STOPPED):
                self.stops[row.peer, row.what] += 1

    def begin(self, peers: Iterable[str]) -> None:
        """Start the processes of peers side by side: each loads its libraries before anything is timed."""
        homes = {home(peer) for peer in peers}
        jobs = [(self.worker(name), {"hello": True}) for name in homes]
        with ThreadPoolExecutor(max_workers=max(len(jobs), 1)) as pool:
            list(pool.map(lambda job: attempt(*job), jobs))

    def worker(self, name: str) -> Any:
        """The process of that name, started when it gets its first job."""
        from flash.autotune.worker import Worker

        if name not in self.workers:
            self.workers[name] = Worker(self.runner, self.patience, START_TIMEOUT)
        return self.workers[name]

    def close(self) -> None:
        """End the processes."""
        for worker in self.workers.values():
            worker.close()

    def measure(
        self, case: Case, peer: Peer, tensors: tuple[torch.Tensor, ...], expected: Expected, settings: Settings
    ) -> list[Row]:
        """One row a pass, as bench.trial.measure gives them."""
        wanted = passes_of(case, settings.device)
        if reason := peer.absent(case, settings.device):
            return [Row(case.name, peer.name, what, "absent", reason) for what in wanted]
        rows: list[Row] = []
        for kind in KINDS:  # the forward first: nothing else comes back where it does not
            passes = [what for what in kind if what in wanted]
            blank = [Row(case.name, peer.name, what) for what in passes]
            if not blank:
                continue
            if any(row.reason.startswith(STOPPED) for row in rows):
                rows += [
                    replace(row, outcome="error", reason="not tried: its forward had to be stopped") for row in blank
                ]
                continue
            if self.stops[peer.name, kind[0]] >= CHANCES:
                reason = f"passed over: it had to be stopped {self.stops[peer.name, kind[0]]} times before"
                rows += [replace(row, outcome="skipped", reason=reason) for row in blank]
                continue
            remaining = settings.deadline - time.monotonic()
            if remaining < 0:
                rows += [replace(row, outcome="skipped", reason=LATE) for row in blank]
                continue
            path = self.write(expected)
            job = {"case": case, "peer": peer.name, "passes": passes, "expected": str(path)}
            job["settings"] = replace(settings, patience=float("inf"))
            worker = self.worker(home(peer.name))
            worker.timeout = min(self.patience, remaining + GRACE)
            rows += self.judged(blank, attempt(worker, job), worker.timeout < self.patience)
        return rows

    def judged(self, blank: Sequence[Row], outcome: dict[str, Any], cut_short: bool) -> list[Row]:
        """The rows that a child sent, or what its end makes of the blank ones."""
        if "rows" in outcome:
            return list(outcome["rows"])
        if outcome["status"] == "oom":
            return [replace(row, outcome="oom", reason=outcome["note"]) for row in blank]
        if outcome["status"] == "timeout" and cut_short:
            return [replace(row, outcome="skipped", reason="the time limit ended it") for row in blank]
        self.stops[blank[0].peer, blank[0].what] += 1
        return [replace(row, outcome="error", reason=f"{STOPPED}{outcome['note']}") for row in blank]

    def write(self, expected: Expected) -> Path:
        """The file that holds what results are held to, written once for a case."""
        path = self.folder / "expected.pt"
        if self.written is not expected:
            torch.save(expected, path)
            self.written = expected
        return path


def home(peer: str) -> str:
    """The process that serves a peer: PyTorch's own backends share one."""
    return "sdpa" if peer.startswith("sdpa") else peer


def attempt(worker: Any, job: dict[str, Any]) -> dict[str, Any]:
    """The outcome of a job, also where the process does not start."""
    try:
        outcome: dict[str, Any] = worker.run(job)
    except RuntimeError as error:
        return {"status": "crash", "note": str(error)}
    return outcome


def folder() -> "tempfile.TemporaryDirectory[str]":
    """A folder for the oracle's file, in memory where the system has such a place of that size."""
    roomy = SHARED_MEMORY.is_dir() and shutil.disk_usage(SHARED_MEMORY).free > ROOM
    return tempfile.TemporaryDirectory(prefix="bench-", dir=SHARED_MEMORY if roomy else None)


def serve(job: dict[str, Any]) -> dict[str, Any]:
    """A job in the child: {"status": "ok" or "crash", "rows"}; after a fault on the GPU the process is not kept."""
    if "hello" in job:
        if torch.cuda.is_available():
            torch.zeros(1, device="cuda")
        return {"status": "ok", "note": ""}
    case, settings = job["case"], job["settings"]
    torch.set_num_threads(settings.threads)
    tensors = inputs(case, settings.device, settings.seed)
    with torch.serialization.safe_globals([Expected, Part, Sample, Slice]):
        expected = torch.load(job["expected"], map_location=settings.device, weights_only=True)
    rows = measure(case, PEERS[job["peer"]], tensors, expected, settings, only=job["passes"])
    if settings.device.type == "cuda":
        del tensors, expected
        try:
            torch.cuda.empty_cache()
        except RuntimeError:  # the context is gone, and the rows say so
            return {"status": "crash", "rows": rows, "note": ""}
    spoiled = any(fault in row.reason for row in rows for fault in FAULTS)
    return {"status": "crash" if spoiled else "ok", "rows": rows, "note": ""}
