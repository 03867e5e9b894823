"""What it costs to begin: imports, the first call and the second, each process a fresh one.

    python -m bench.run --suite cold       # writes cold.json, cold.md and cold.png

Every process (bench/cold_child.py) imports torch, then this library, then calls once and again, forward or forward and
backward; torch's scaled_dot_product_attention and compiled FlexAttention do the same. Peers take turns, so that what
slows a machine for a while slows all. Compilers' caches lie in a folder of the process, empty at first; what compiles
is then begun once more in a process that finds them filled. Files are in the system's cache: one process of each peer
goes before those that count.

On a CPU nothing of ours is compiled. On a GPU the first call compiles its kernels, which has not yet been timed on one.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench import record as records
from bench.cases import Case, square
from bench.measure import ROOT, quantiles
from bench.peers import FLEX, OURS, PEERS, SDPA, refusal

COLD_PEERS = (OURS, SDPA, FLEX)
PASSES = ("forward", "both")
PROCESSES = 9
CHILD_SECONDS = 300  # of a process: compiling included
CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
FILLED = ", caches filled"


class Job(NamedTuple):
    """What a process is asked for."""

    peer: str
    what: str


def case_of(device: torch.device, quick: bool = False) -> Case:
    """The call that is made: causal, as decoders make it."""
    source = "our own choice: what a small decoder calls first"
    heads, seqlen, head_dim = (2, 64, 16) if quick else (8, 1024, 64)
    dtype = "bfloat16" if device.type == "cuda" else "float32"
    return square("cold", source, heads, seqlen, head_dim, True, batch=1, dtype=dtype, series="cold")


def compiles(peer: str, device: torch.device) -> bool:
    """Whether a peer's first call compiles something."""
    return peer == FLEX or (peer == OURS and device.type == "cuda")


def process(told: dict[str, Any], caches: str) -> dict[str, float]:
    """Milliseconds of the steps of one fresh process, with compilers' caches in a folder.

    Raises:
        RuntimeError: it failed, with the last line it wrote, or took too long.
    """
    environment = os.environ | {name: str(Path(caches, name.lower())) for name in CACHES}
    try:
        child = subprocess.run(
            [sys.executable, "-m", "bench.cold_child", json.dumps(told)],
            cwd=ROOT, env=environment, capture_output=True, text=True, timeout=CHILD_SECONDS, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"not begun within {CHILD_SECONDS} s") from None
    if child.returncode == 0:
        return dict(json.loads(child.stdout.splitlines()[-1]))
    last = (child.stderr.strip().splitlines() or [f"exit status {child.returncode}"])[-1]
    raise RuntimeError(refusal(RuntimeError(last)) or last)


def started(told: dict[str, Any], twice: bool) -> Iterator[tuple[str, float]]:
    """Steps and milliseconds of a process, and with `twice` those that change in one that finds its caches."""
    with tempfile.TemporaryDirectory() as caches:
        yield from process(told, caches).items()
        if twice:
            yield from ((step + FILLED, took) for step, took in process(told, caches).items() if "first" in step)


def measured(
    device: torch.device, case: Case, seed: int = 0, threads: int = 2, processes: int = PROCESSES,
    peers: Sequence[str] = COLD_PEERS,
) -> dict[str, Any]:  # fmt: skip
    """All that is measured: of each peer and step median and spread over processes, or the reason for none."""
    took: dict[str, dict[str, list[float]]] = {peer: {} for peer in peers}
    without: dict[str, dict[str, str]] = {peer: {} for peer in peers}
    machine = records.machine(device, threads)
    for number in range(processes + 1):
        for job in (Job(peer, what) for peer in peers for what in PASSES):
            if job.what in without[job.peer]:
                continue
            if reason := PEERS[job.peer].absent(case, device):
                without[job.peer][job.what] = reason
                continue
            print(f"process {number} of {processes}: {job.peer}, {job.what}", file=sys.stderr, flush=True)
            told = {**job._asdict(), "case": asdict(case), "device": device.type, "threads": threads, "seed": seed}
            try:
                found = list(started(told, twice=compiles(job.peer, device)))
            except RuntimeError as error:
                without[job.peer][job.what] = str(error)
                continue
            for step, milliseconds in found if number else ():
                took[job.peer].setdefault(step, []).append(milliseconds)
    return {
        "machine": machine,
        "settings": {
            "suite": "cold",
            "seed": seed,
            "processes": processes,
            "statistics": "median, 20th and 80th percentile over processes",
            "timer": "time.perf_counter in a fresh process",
            "caches": f"{' and '.join(CACHES)} in a fresh folder of each process",
            "peers": {peer: PEERS[peer].what for peer in peers},
        },
        "case": asdict(case),
        "milliseconds": {
            peer: {step: asdict(quantiles(times)) for step, times in steps.items()} for peer, steps in took.items()
        },
        "without": without,
        "load_average_after": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def run(out: Path, device: torch.device, seed: int, threads: int, quick: bool) -> int:
    """Measure, write and draw; 1 where ours has no number. Quick: one process, short, and no FlexAttention."""
    from bench import cold_report

    processes, peers = (1, COLD_PEERS[:2]) if quick else (PROCESSES, COLD_PEERS)
    content = measured(device, case_of(device, quick), seed, threads, processes, peers)
    unwritten = cold_report.write(content, out)
    return int(bool(content["without"][OURS])) or unwritten
