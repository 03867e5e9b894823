"""ring_attention between processes of this machine: one of one thread for each rank, gloo between them.

What the cost model is fed and what it is held to are measured in turn, several rounds long, so that other load on the
machine meets both alike. Kernels and links are measured while as many processes do the same as there are ranks, since
they share the machine's cores. A time is from a barrier to the end of the last rank; run_check is off, as the model
knows no words between hosts. Nothing is timed before o and every gradient matched attention of one process in float64.

    python -m bench.scale_ranks task.json rank        # one rank, as `ranks` starts it
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bench import measure as meter
from bench.check import FLOOR
from bench.scale import FLOPS, Job, steps_of
from flash.attention import flash_attention
from flash.links import Links
from flash.ring import ring_attention, shard

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT = timedelta(seconds=120)  # of the group: a rank that waits longer fails
DEADLINE = 600.0  # seconds after which what is left of the ranks is killed
SIZES = (4096, 65536, 2**20, 2**23)  # bytes of a message
MERGED = 2**19  # numbers of the tensors whose merging is timed, 2 MiB: those of a rank here
PACKED = (2**22, 2**25)  # bytes of copies that are timed: those of a ring here, and of all_gather where keys are many
LEAST = 0.06  # seconds that a round spends on one thing, or one call
MOST_CALLS = 12  # in a round
RETURNED = 65536  # bytes of an allocation that is given back when freed
TINY = 32  # positions of a rank in the call that warms the libraries

Shape = tuple[int, int, int, int, bool]  # heads, heads_k, rows, keys, causal: of a point


def ranks(task: dict[str, Any], world_size: int, deadline: float = DEADLINE) -> list[dict[str, Any]]:
    """Start a process for each rank, wait for all, and kill what is left of them.

    Where memory is weighed, what is freed goes back to the system at once: glibc otherwise keeps it for later.

    Raises:
        RuntimeError: a rank failed, with the last line that it wrote, or the deadline came.
    """
    env = os.environ | ({"MALLOC_MMAP_THRESHOLD_": str(RETURNED)} if task["kind"] == "peak" else {})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "task.json")
        path.write_text(json.dumps(task | {"world_size": world_size, "folder": folder}))
        started = []
        try:
            for rank in range(world_size):
                command = [sys.executable, "-m", "bench.scale_ranks", str(path), str(rank)]
                with Path(folder, f"{rank}.log").open("w") as log:
                    process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env=env)
                    started.append(process)
            wait(started, Path(folder), time.monotonic() + deadline)
        finally:
            for process in started:
                process.kill()
                process.wait()
        return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(world_size)]


def wait(started: Sequence["subprocess.Popen[bytes]"], folder: Path, deadline: float) -> None:
    """Until all have ended well."""
    left = dict(enumerate(started))
    while left:
        for rank, process in list(left.items()):
            if (status := process.poll()) is None:
                continue
            if status:
                lines = Path(folder, f"{rank}.log").read_text().strip().splitlines() or [f"exit status {status}"]
                raise RuntimeError(f"rank {rank} of {len(started)}: {lines[-1]}")
            del left[rank]
        if time.monotonic() > deadline:
            raise RuntimeError(f"ranks {sorted(left)} of {len(started)} had not ended in time")
        time.sleep(0.02)


def points_of(jobs: Sequence[Job]) -> list[Shape]:
    """The shapes of the kernels' calls whose rates jobs need; all_gather's are near those of the others."""
    found: dict[Shape, None] = {}
    for job in jobs:
        blocks = [b for step in steps_of(job, "forward") for own in step.blocks for b in own]
        for b in blocks if job.method != "all_gather" else ():
            if b.shared:
                found[b.heads, b.heads_k, b.rows, b.shared, False] = None
            if b.pairs > b.rows * b.shared:
                found[b.heads, b.heads_k, b.rows, b.rows, True] = None
    return list(found)


# one rank


def normal(seed: int, heads: int, rows: int, head_dim: int) -> Tensor:
    """Standard normal [1, heads, rows, head_dim], alike on all ranks."""
    return torch.randn(1, heads, rows, head_dim, generator=torch.Generator().manual_seed(seed))


def whole(job: Job, seed: int) -> list[Tensor]:
    """q, k, v and do of all ranks."""
    sizes = [(job.heads, job.rows), (job.heads_k, job.keys), (job.heads_k, job.keys), (job.heads, job.rows)]
    return [normal(seed + n, *size, job.head_dim) for n, size in enumerate(sizes)]


def passes(
    attention: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, do: Tensor
) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """A forward pass without autograd, and both passes: o, dq, dk and dv."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]

    def both() -> tuple[Tensor, ...]:
        o = attention(*leaves)
        return o.detach(), *torch.autograd.grad(o, leaves, do)

    return {"forward": lambda: (attention(q, k, v),), "both": both}


def ringed(job: Job) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """ring_attention as a job says."""
    kind = {"causal": job.causal, "sharding": job.sharding, "method": job.method}
    return lambda q, k, v: ring_attention(q, k, v, run_check=False, **kind)  # type: ignore[return-value,arg-type]


class Truth:
    """Attention of one process to the whole, in float64, and how far float32 is from it; rank 0 computes it for all."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.found: dict[Job, tuple[list[Tensor], Tensor]] = {}

    def of(self, job: Job) -> tuple[list[Tensor], Tensor]:
        """o, dq, dk and dv, and the bound of each one's error: twice that of a single process, and a floor."""
        key = replace(job, world_size=1, method="", sharding="")
        if key not in self.found:
            tensors = whole(job, self.seed)
            expected = [x.double() for x in (tensors[3], *tensors[:3])]  # of these shapes
            bounds = torch.zeros(4, dtype=torch.float64)
            if dist.get_rank() == 0:
                attention = lambda q, k, v: flash_attention(q, k, v, causal=job.causal)  # noqa: E731
                expected = list(passes(attention, *(x.double() for x in tensors))["both"]())
                own = passes(attention, *tensors)["both"]()
                floor = FLOOR * max(float(x.abs().max()) for x in tensors)
                errors = [float((x - y).abs().max()) for x, y in zip(own, expected, strict=True)]
                bounds = torch.tensor([2 * error + floor for error in errors], dtype=torch.float64)
            for x in (*expected, bounds):
                dist.broadcast(x, 0)
            self.found[key] = expected, bounds
        return self.found[key]


def checked(job: Job, call: Callable[[], tuple[Tensor, ...]], truth: Truth) -> dict[str, float]:
    """The largest error of each result of this rank as a part of its bound.

    Raises:
        RuntimeError: one is beyond its bound.
    """
    expected, bounds = truth.of(job)
    found = {}
    for name, x, right, bound in zip(("o", "dq", "dk", "dv"), call(), expected, bounds.tolist(), strict=True):
        error = float((x - shard(right, sharding=job.sharding)).abs().max()) if x.numel() else 0.0
        found[name] = error / bound
        if not error <= bound:
            raise RuntimeError(f"{job}: {name} is off by {error:.3g}, {bound:.3g} allowed")
    return found


def repeats(seconds: float) -> int:
    """How many calls of a round, alike on all ranks."""
    slowest = torch.tensor([seconds])
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return max(1, min(MOST_CALLS, round(LEAST / float(slowest))))


def timed(call: Callable[[], object]) -> float:
    """Seconds of one call that all ranks begin together."""
    dist.barrier()
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def mean(call: Callable[[], object], calls: int) -> float:
    """Seconds of a call, of several one after the other: a process without a core of its own runs by turns."""
    dist.barrier()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls


def calls_of(task: dict[str, Any]) -> dict[str, tuple[bool, Callable[[], object]]]:
    """What is timed, by name: whether call by call, and the call."""
    links, seed, head_dim = Links.named(dist.group.WORLD.group_name), task["seed"], task["head_dim"]  # type: ignore[union-attr]
    found: dict[str, tuple[bool, Callable[[], object]]] = {}
    o, more, weight = (torch.zeros(MERGED) for _ in "omw")
    found["merging"] = False, lambda: o.lerp_(more, weight)
    for size in PACKED:
        half = torch.zeros(size // 8)
        found[f"packing {size}"] = False, lambda half=half: torch.cat([half, half])  # type: ignore[misc]
    following, before = (links.rank + 1) % links.world_size, (links.rank - 1) % links.world_size
    for size in SIZES if links.world_size > 1 else ():
        out = torch.zeros(size // 4)
        call = lambda out=out: links.exchange([(following, out)], [(before, torch.empty_like(out))])  # noqa: E731
        found[f"link {size}"] = True, call
    for shape in task["points"]:
        heads, heads_k, rows, keys, causal = shape
        q, k, v = normal(seed, heads, rows, head_dim), *(normal(seed, heads_k, keys, head_dim) for _ in "kv")
        attention = lambda q, k, v, causal=causal: flash_attention(q, k, v, causal=causal)  # noqa: E731
        for what, call in passes(attention, q, k, v, q).items():
            found[f"point {what} {shape}"] = False, call
    return found


def measure_times(task: dict[str, Any]) -> dict[str, Any]:
    """Seconds of this rank, by name: kernels, links, merging, and the jobs; and the jobs' errors."""
    errors, truth, found = {}, Truth(task["seed"]), calls_of(task)
    for n, job in enumerate(Job(**x) for x in task["jobs"]):
        operands = [shard(x, sharding=job.sharding).contiguous() for x in whole(job, task["seed"])]
        calls = passes(ringed(job), *operands)
        errors[str(n)] = checked(job, calls["both"], truth)
        found |= {f"job {n} {what}": (True, call) for what, call in calls.items()}
    truth.found.clear()
    times: dict[str, list[float]] = {name: [] for name in found}
    counts, worked = {}, dict.fromkeys(found, 0.0)
    for name, (_, call) in found.items():
        timed(call)
        counts[name] = repeats(timed(call))
    for _ in range(task["rounds"]):
        for name, (alone, call) in found.items():
            start = time.process_time()
            times[name] += [timed(call) for _ in range(counts[name])] if alone else [mean(call, counts[name])]
            worked[name] += time.process_time() - start
    return {"times": times, "errors": errors, "worked": worked}


def measure_peak(task: dict[str, Any]) -> dict[str, Any]:
    """Bytes that this process held at most during one pass, above what it held with the libraries and its inputs."""
    wanted = Job(**task["job"])
    tiny = replace(wanted, keys=TINY * wanted.world_size)
    for job in (tiny, wanted):
        lengths = job.keys // job.world_size
        sizes = ((n, lengths, job.head_dim) for n in (job.heads, job.heads_k, job.heads_k, job.heads))
        call = passes(ringed(job), *(normal(task["seed"], *size) for size in sizes))[task["what"]]
        dist.barrier()
        before = meter.resident("VmRSS" if meter.forget_peak() else "VmHWM")
        kept = call()
        peak = meter.resident("VmHWM") - before
        del kept
    return {"peak": max(peak, 0)}


def main(path: str, rank: int) -> None:
    """One rank."""
    task = json.loads(Path(path).read_text())
    torch.set_num_threads(1)
    where = f"file://{task['folder']}/rendezvous"
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=task["world_size"], timeout=TIMEOUT)
    with torch.enable_grad():
        found = {"times": measure_times, "peak": measure_peak}[task["kind"]](task)
    Path(task["folder"], f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    with suppress(RuntimeError):  # a peer may be gone already, and nothing is left to say
        dist.destroy_process_group()


# all of them


def latest(found: Sequence[dict[str, Any]], name: str) -> list[float]:
    """The samples of a thing, each by the rank that took longest."""
    return [max(each) for each in zip(*(x["times"][name] for x in found), strict=True)]


def quantiles(seconds: Sequence[float]) -> dict[str, Any]:
    """Median and spread."""
    return asdict(meter.quantiles(seconds))


def times_of(jobs: Sequence[Job], rounds: int, seed: int) -> dict[str, Any]:
    """What jobs of one world size took, and what the model needs to know of the machine."""
    world_size, head_dim, points = jobs[0].world_size, jobs[0].head_dim, points_of(jobs)
    task = {"kind": "times", "jobs": [asdict(job) for job in jobs], "rounds": rounds, "seed": seed, "points": points}
    start = time.monotonic()
    found = ranks(task | {"head_dim": head_dim}, world_size)
    measured: dict[str, Any] = {"seconds": time.monotonic() - start, "points": [], "links": [], "jobs": []}
    everyone = lambda name: [sum(x) / world_size for x in zip(*(r["times"][name] for r in found), strict=True)]  # noqa: E731
    measured["merging"] = 12 * MERGED / meter.quantiles(everyone("merging")).median
    measured["packing"] = [(size, 2 * size / meter.quantiles(everyone(f"packing {size}")).median) for size in PACKED]
    for shape in points:
        heads, _, rows, keys, causal = shape
        pairs = heads * head_dim * (rows * (rows + 1) // 2 if causal else rows * keys)
        forward, both = (everyone(f"point {what} {list(shape)}") for what in ("forward", "both"))
        behind = [b - f for b, f in zip(both, forward, strict=True)]
        rates = {
            what: FLOPS[what] * pairs / meter.quantiles(x).median
            for what, x in (("forward", forward), ("backward", behind))
        }
        measured["points"].append(
            {"heads": heads, "rows": rows, "keys": keys, "causal": causal, **rates, "forward_s": quantiles(forward)}
        )
    for size in SIZES if world_size > 1 else ():
        worked, took = (
            sum(x)
            for x in zip(*((r["worked"][f"link {size}"], sum(r["times"][f"link {size}"])) for r in found), strict=True)
        )
        measured["links"].append({"bytes": size, **quantiles(latest(found, f"link {size}")), "work": worked / took})
    for n, job in enumerate(jobs):
        error = {name: max(x["errors"][str(n)][name] for x in found) for name in ("o", "dq", "dk", "dv")}
        times = {what: quantiles(latest(found, f"job {n} {what}")) for what in ("forward", "both")}
        measured["jobs"].append({"job": asdict(job), "error_of_bound": error, **times})
    return measured


def peaks_of(jobs: Sequence[Job], seed: int) -> list[dict[str, Any]]:
    """The peak of the rank that holds most, of both passes and of the ring's forward, each in processes of its own."""
    found = []
    for job in jobs:
        for what in ("forward", "both") if job.method == "ring" else ("both",):
            task = {"kind": "peak", "job": asdict(job), "what": what, "seed": seed}
            peak = max(x["peak"] for x in ranks(task, job.world_size))
            found.append({"job": asdict(job), "what": what, "peak": peak})
    return found


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
