"""Latency and peak memory of one call.

Latency: `triton.testing.do_bench` on a GPU (which flushes the L2 cache), `torch.utils.benchmark.Timer` on a CPU; the
median and the 20th and 80th percentile of many samples after a warm-up.

Peak memory: what a pass needs beyond its inputs, its output and its gradients; a mask that stands for a feature counts,
the feature's own operand (bias, sinks) is an input. On a GPU the allocator says it. On a CPU it is VmHWM, the largest
resident set, of a process started for one measurement:

    python -m bench.measure '{"case": {...}, "peer": "flash", "what": "both", "threads": 2, "seed": 0}'

The libraries are loaded and warmed on a tiny shape and the inputs written before the baseline is taken, so that
imports, thread pools and the operands do not count; the mark is then put back to the present by /proc/self/clear_refs.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch

from bench.cases import Case, inputs
from bench.peers import PEERS, Attention

ROOT = Path(__file__).resolve().parents[1]
WARMUP_SHAPE = 32  # queries and keys of the call that warms the libraries
CHILD_SECONDS = 120
STATUS = Path("/proc/self/status")


class OutOfMemory(RuntimeError):
    """A measurement that ended for want of memory."""


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one call: median, 20th and 80th percentile, and how many samples they come from."""

    median: float
    p20: float
    p80: float
    samples: int


class Effort(NamedTuple):
    """How long a latency is measured.

    Args:
        warmup: seconds of calls before the first sample (on a CPU: at least one call).
        seconds: seconds of samples.
        samples: samples at least, however long they take.
    """

    warmup: float
    seconds: float
    samples: int


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or on a CPU."""
    text = str(error)
    cpu = "can't allocate memory" in text or "not enough memory" in text
    return isinstance(error, torch.OutOfMemoryError | MemoryError | OutOfMemory) or cpu


def passes(attention: Attention, *tensors: torch.Tensor) -> dict[str, Callable[[], tuple[torch.Tensor, ...]]]:
    """The calls that are timed: "forward" without a graph -> (o,), "backward" -> (dq, ..), "both" -> (o, dq, ..).

    tensors are q, k, v, the feature's operand if there is one, and do; gradients are those of what requires one.
    """
    *operands, do = tensors
    differentiated = [x for x in operands if x.requires_grad]
    graph: list[torch.Tensor] = []  # o of the forward that "backward" is repeated on, made on first use

    def forward() -> tuple[torch.Tensor, ...]:
        with torch.no_grad():
            return (attention(*operands),)

    def backward() -> tuple[torch.Tensor, ...]:
        if not graph:
            graph.append(attention(*operands))
        return torch.autograd.grad(graph[0], differentiated, do, retain_graph=True)

    def both() -> tuple[torch.Tensor, ...]:
        o = attention(*operands)
        return (o, *torch.autograd.grad(o, differentiated, do))

    return {"forward": forward, "backward": backward, "both": both}


def quantiles(times: Sequence[float]) -> Latency:
    """Median and spread of samples."""
    asked = torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64)
    median, p20, p80 = torch.quantile(torch.tensor(times, dtype=torch.float64), asked).tolist()
    return Latency(median, p20, p80, len(times))


def latency(call: Callable[[], object], device: torch.device, effort: Effort) -> Latency:
    """Median and spread of call()."""
    if device.type == "cuda":
        from triton.testing import do_bench

        times = do_bench(call, warmup=1e3 * effort.warmup, rep=1e3 * effort.seconds, return_mode="all")
        if len(times) < effort.samples:  # it ends with the time, however few they are
            times = do_bench(call, warmup=0, rep=1.2 * effort.samples * max(times), return_mode="all")
    else:
        from timeit import repeat

        from torch.utils.benchmark import Timer

        (warm_up,) = repeat(call, number=1, repeat=1)
        if warm_up > effort.seconds:
            times = [1e3 * t for t in repeat(call, number=1, repeat=effort.samples)]  # Timer runs such a call thrice
        else:
            timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
            times = [1e3 * t for t in timer.blocked_autorange(min_run_time=effort.seconds).times]
            while len(times) < effort.samples:
                times += [1e3 * t for t in timer.timeit(1).times]
    return quantiles(times)


def gpu_peak(call: Callable[[], tuple[torch.Tensor, ...]]) -> int:
    """Bytes the allocator held at most during call(), above what it held before and what call() returned."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    returned = sum(x.nbytes for x in call())
    torch.cuda.synchronize()
    return max(torch.cuda.max_memory_allocated() - before - returned, 0)


def resident(field: str) -> int:
    """Bytes of a field of /proc/self/status: VmRSS, the resident set, or VmHWM, the largest it has been."""
    for line in STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return 1024 * int(line.split()[1])
    raise KeyError(field)


def forget_peak() -> bool:
    """VmHWM = VmRSS; False where that is not ours to set: a peak below that of the imports is then read as 0."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def cpu_peak(case: Case, peer: str, what: str, seed: int) -> int:
    """Bytes resident at most during one pass, above the baseline and the outputs; in a process of its own."""
    device = torch.device("cpu")
    tiny = replace(case, seqlen_q=min(case.seqlen_q, WARMUP_SHAPE), seqlen_k=min(case.seqlen_k, WARMUP_SHAPE))
    for shape in (tiny, case):
        tensors = inputs(shape, device, seed)
        before = resident("VmRSS" if forget_peak() else "VmHWM")
        with PEERS[peer].prepare(shape, device) as attention:
            call = passes(attention, *tensors)[what]
            forget_peak()  # of making masks; the masks stay
            returned = sum(x.nbytes for x in call())
            peak = resident("VmHWM") - before - returned
    return max(peak, 0)


def available_memory() -> int | None:
    """Bytes that can be allocated without swapping, None where the system has no /proc/meminfo."""
    path = Path("/proc/meminfo")
    for line in path.read_text().splitlines() if path.exists() else ():
        if line.startswith("MemAvailable:"):
            return 1024 * int(line.split()[1])
    return None


def cpu_peak_in_child(case: Case, peer: str, what: str, threads: int, seed: int) -> int:
    """cpu_peak in a fresh process (started, not forked: a forked one begins at its parent's peak).

    Raises:
        OutOfMemory: the child was killed or could not allocate.
        RuntimeError: it failed otherwise, with the last line it wrote.
    """
    job = {"case": asdict(case), "peer": peer, "what": what, "threads": threads, "seed": seed}
    child = subprocess.run(
        [sys.executable, "-m", "bench.measure", json.dumps(job)],
        cwd=ROOT, capture_output=True, text=True, timeout=CHILD_SECONDS, check=False,
    )  # fmt: skip
    if child.returncode == 0:
        return int(json.loads(child.stdout.splitlines()[-1])["peak_bytes"])
    last = (child.stderr.strip().splitlines() or [f"exit status {child.returncode}"])[-1]
    error = RuntimeError(last)
    # -9 is the kernel's out-of-memory killer; nobody else sends it here.
    if child.returncode == -9 or out_of_memory(error):
        raise OutOfMemory(last)
    raise error


def main(argument: str) -> None:
    """One measurement of peak memory, printed as JSON."""
    job = json.loads(argument)
    torch.set_num_threads(job["threads"])
    peak = cpu_peak(Case(**job["case"]), job["peer"], job["what"], job["seed"])
    print(json.dumps({"peak_bytes": peak}))


if __name__ == "__main__":
    main(sys.argv[1])
