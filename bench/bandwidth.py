"""What memory gives at best, measured in the run that it is compared with, and the time of a call that memory bounds.

    rate = 2 bytes / median time of a copy        each byte is read and written

The fraction of it is what decoding can be blamed for: it does little but read its keys and values once.
"""

from collections.abc import Callable, Sequence
from itertools import cycle
from typing import Any

import torch

from bench.ceiling import clocks_under, now
from bench.measure import Effort, Latency, latency, quantiles

COPIED = {"cuda": 2**31, "cpu": 2**28}  # bytes
COPY_EFFORT = {"cuda": Effort(0.1, 0.4, 5), "cpu": Effort(0.0, 0.5, 5)}
# What is read before the same bytes come again: more than an L2 (50 MB of an H200), than AMD's Infinity Cache, than L3.
APART = {"cuda": 2**30, "cpu": 2**27}
MOST = 1024  # copies, of caches so small that nobody asks
REPLAY = 20.0  # milliseconds of a replay


def copy(device: torch.device, nbytes: int | None = None) -> dict[str, Any]:
    """The rate of a copy from memory to memory.

    Args:
        device: "cuda" or "cpu".
        nbytes: of the tensor that is copied, absent = far more than any cache holds.

    Returns:
        {"gbps": median rate in 1e9 bytes a second, "low", "high", "bytes", "date", "clocks"}.
    """
    nbytes = nbytes or COPIED[device.type]
    source = torch.ones(nbytes // 4, device=device)
    target = torch.zeros_like(source)

    def call() -> torch.Tensor:
        return target.copy_(source)

    took = latency(call, device, COPY_EFFORT[device.type])
    rates = {"gbps": took.median, "low": took.p80, "high": took.p20}
    moved = {name: 2 * source.nbytes / time / 1e6 for name, time in rates.items()}
    return moved | {"bytes": source.nbytes, "date": now(), "clocks": clocks_under(call, device)}


def copies(nbytes: int, device: torch.device) -> int:
    """How many copies of operands a call takes in turn, so that none finds its own in a cache."""
    return min(-(-APART[device.type] // nbytes), MOST)


def in_turn(calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
    """A call that makes the next of the calls each time, from the first again after the last."""
    turn = cycle(calls)
    return lambda: next(turn)()


def replayed(call: Callable[[], object], device: torch.device, effort: Effort) -> Latency:
    """Median and spread of call(): on a GPU by replays of a CUDA graph of many, so that launching does not count."""
    if device.type != "cuda":
        return latency(call, device, effort)
    from triton.testing import do_bench_cudagraph

    return quantiles(do_bench_cudagraph(call, rep=REPLAY, return_mode="all"))
