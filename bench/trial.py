"""One peer on one case: held to the oracle, then timed, and its memory read; whatever becomes of it is a row.

Peers that are timed in turn take a sample each before anyone takes the next: on a machine that others use too, speeds
change within minutes, and what is compared must have met the same ones.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from timeit import timeit

import torch

from bench import cases as shapes
from bench import measure as meter
from bench.cases import Case, passes_of
from bench.check import DROPOUT_SEED, Expected, compare, names, poison
from bench.measure import Effort, Latency, out_of_memory
from bench.peers import OURS, STANDARD, Peer, refusal
from bench.record import Row

MEMORY_PASSES = ("forward", "both")
SCORES_BYTES_LIMIT = 2**30  # on a CPU: above it standard attention alone would take most of the time there is
CPU_EFFORT = Effort(0.0, 0.06, 5)
LATE = "the time limit was over"


@dataclass(frozen=True)
class Settings:
    """How a run is made.

    Args:
        device: "cpu" or "cuda".
        seed: of the operands.
        threads: of a CPU.
        effort: how long a latency is measured.
        memory: whether peak memory is measured.
        patience: seconds; a peer whose check takes longer is not timed, standard and ours excepted.
        deadline: of time.monotonic(); what is not begun by then is skipped, and says so.
        memory_deadline: likewise, for peak memory on a CPU.
        few: whether two key heads, and some queries of every head, are held to the oracle, however short the case.
        in_turn: whether the peers of a case are timed in turn.
    """

    device: torch.device
    seed: int = 0
    threads: int = 2
    effort: Effort = CPU_EFFORT
    memory: bool = True
    patience: float = float("inf")
    deadline: float = float("inf")
    memory_deadline: float = float("inf")
    few: bool = False
    in_turn: bool = False


def failure(row: Row, error: BaseException) -> Row:
    """The row of a call that raised."""
    if out_of_memory(error):
        return replace(row, outcome="oom", reason=str(error).splitlines()[0] if str(error) else "out of memory")
    if reason := refusal(error):
        return replace(row, outcome="absent", reason=reason)
    return replace(row, outcome="error", reason=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")


def gate(case: Case, row: Row, call: Callable[[], tuple[torch.Tensor, ...]], expected: Expected) -> Row:
    """The row with its errors; its outcome is "ok" where every result is within its bound."""
    try:
        torch.manual_seed(DROPOUT_SEED)
        results = call()
        verdict = compare(case, expected, dict(zip(names(case), results, strict=False)), row.peer)
    except Exception as error:  # whatever a peer raises is its result, and is written down
        return failure(row, error)
    row = replace(row, errors=verdict.errors, bounds=verdict.bounds)
    if verdict.ok:
        return replace(row, outcome="ok")
    worst = ", ".join(
        f"{name} {error:.1e} > {verdict.bounds[name]:.1e}"
        for name, error in verdict.errors.items()
        if not error <= verdict.bounds[name]
    )
    return replace(row, outcome="wrong", reason=f"error above its bound: {worst}")


def weigh(row: Row, call: Callable[[], tuple[torch.Tensor, ...]], masks: int) -> Row:
    """The row with its peak memory on a GPU, `masks` bytes that were made before included."""
    try:
        return replace(row, peak_bytes=meter.gpu_peak(call) + masks, peak_outcome="ok")
    except Exception as error:
        failed = failure(row, error)
        return replace(row, peak_outcome=failed.outcome, peak_reason=failed.reason)


def measure(
    case: Case, peer: Peer, tensors: tuple[torch.Tensor, ...], expected: Expected, settings: Settings,
    only: Sequence[str] = shapes.PASSES,
) -> list[Row]:  # fmt: skip
    """Checks a peer on a case, then times what was right: one row a pass, `only` these."""
    before = allocated(settings.device)
    with ExitStack() as stack:
        rows, calls = checked(case, peer, tensors, expected, settings, stack, only)
        masks = allocated(settings.device) - before
        return [timed(case, row, calls[row.what], settings, masks) if row.what in calls else row for row in rows]


def measure_in_turn(
    case: Case, peers: Sequence[Peer], tensors: tuple[torch.Tensor, ...], expected: Expected, settings: Settings
) -> list[Row]:
    """`measure` of several peers on a CPU, in turn."""
    with ExitStack() as stack:
        found = [checked(case, peer, tensors, expected, settings, stack) for peer in peers]
        rows = {(row.peer, row.what): row for own, _ in found for row in own}
        calls = {(row.peer, row.what): calls[row.what] for own, calls in found for row in own if row.what in calls}
        times: dict[tuple[str, str], list[float]] = {key: [] for key in calls if rows[key].outcome == "ok"}
        for _ in range(settings.effort.samples):
            for key, taken in times.items():
                if rows[key].outcome == "ok" and time.monotonic() <= settings.deadline:
                    try:
                        taken.append(1e3 * timeit(calls[key], number=1))
                    except Exception as error:
                        rows[key] = failure(rows[key], error)
    for key, taken in times.items():
        if rows[key].outcome == "ok":
            rows[key] = with_latency(case, rows[key], meter.quantiles(taken)) if taken else late(rows[key])
    return list(rows.values())


def checked(
    case: Case, peer: Peer, tensors: tuple[torch.Tensor, ...], expected: Expected, settings: Settings,
    stack: ExitStack, only: Sequence[str] = shapes.PASSES,
) -> tuple[list[Row], dict[str, Callable[[], tuple[torch.Tensor, ...]]]]:  # fmt: skip
    """Rows of a peer that was held to the oracle, and its calls, which the stack keeps prepared; none where it is not
    to be timed."""
    blank = {what: Row(case.name, peer.name, what) for what in passes_of(case, settings.device) if what in only}
    if reason := peer.absent(case, settings.device):
        return [replace(row, outcome="absent", reason=reason) for row in blank.values()], {}
    if time.monotonic() > settings.deadline:
        return [late(row) for row in blank.values()], {}
    if settings.device.type == "cpu" and case.series == "long" and (reason := too_long(case, peer.name)):
        return [replace(row, outcome="skipped", reason=reason) for row in blank.values()], {}
    try:
        calls = meter.passes(stack.enter_context(peer.prepare(case, settings.device)), *tensors)
        start = time.monotonic()
        poison(tensors)
        found = {what: gate(case, blank[what], calls[what], expected) for what in MEMORY_PASSES if what in blank}
        took = time.monotonic() - start
    except Exception as error:  # prepare itself may fail: to import, to compile, to allocate
        return [failure(row, error) for row in blank.values()], {}
    if "backward" in blank:
        found["backward"] = replace(found["both"], what="backward")
    rows = [found[what] for what in blank]
    if took > settings.patience and peer.name not in (STANDARD, OURS):
        reason = f"one forward and one backward took {took:.1f} s, more than {settings.patience:g} s"
        return [replace(row, outcome="skipped", reason=reason) if row.outcome == "ok" else row for row in rows], {}
    return rows, calls


def late(row: Row) -> Row:
    """The row of what the time limit did not let begin."""
    return replace(row, outcome="skipped", reason=LATE)


def with_latency(case: Case, row: Row, latency: Latency) -> Row:
    """The row with its latency, and what that makes of arithmetic."""
    return replace(row, latency=latency, tflops=shapes.flops(case, row.what) / latency.median / 1e9)


def allocated(device: torch.device) -> int:
    """Bytes of tensors on a GPU; 0 on a CPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def too_long(case: Case, peer: str) -> str:
    """Why standard attention is not run on a CPU; "" where it is."""
    scores = shapes.score_bytes(case)
    if peer != STANDARD or scores <= SCORES_BYTES_LIMIT:
        return ""
    return f"a matrix of scores takes {scores / 1e9:.1f} GB, and too much of the time there is"


def timed(
    case: Case, row: Row, call: Callable[[], tuple[torch.Tensor, ...]], settings: Settings, masks: int = 0
) -> Row:
    """The row with its latency, if it passed the gate, and on a GPU its peak memory."""
    if settings.device.type == "cuda" and settings.memory and row.what in MEMORY_PASSES:
        if row.outcome == "oom":
            row = replace(row, peak_outcome="oom", peak_reason=row.reason)
        elif row.outcome == "ok":
            row = weigh(row, call, masks)
    if row.outcome != "ok":
        return row
    if time.monotonic() > settings.deadline:
        return late(row)
    try:
        return with_latency(case, row, meter.latency(call, settings.device, settings.effort))
    except Exception as error:
        return failure(row, error)
