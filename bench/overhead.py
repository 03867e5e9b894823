"""What a call costs before its kernel runs: Python and launching, in microseconds, torch's own attention beside it.

    python -m bench.overhead [--json]      # also python -m bench.run --suite overhead

Without a GPU a stand-in driver compiles for sm_90 and launches nothing, and CPU tensors pass for a GPU's. Left out are
then the driver's launch itself and CUDA's allocator. torch's scaled_dot_product_attention is timed on CPU tensors of
one element, where it dispatches, allocates and computes next to nothing. Times are those of the thread's CPU clock, the
least of several rounds, so that other processes do not count; beside it the median and the spread of all rounds.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from bench import record as records
from bench.measure import quantiles

WARM = 10  # calls that tell how many make a round
ROUND = 0.008  # seconds of calls whose mean counts as one measurement
ROUNDS = 21
SIZES = (1, 8, 1024, 128)


Call = Callable[[], Any]


def microseconds(ways: dict[str, Call]) -> dict[str, float | None]:
    """The least of rounds_of; None of what is not served."""
    return {name: min(times, default=None) for name, times in rounds_of(ways).items()}


def rounds_of(ways: dict[str, Call]) -> dict[str, list[float]]:
    """Microseconds of CPU time that a call of each takes, the mean of each of several rounds; nothing where not served.

    A machine may be slow for seconds on end, so that rounds of the same call are as far apart as can be.
    """
    found: dict[str, list[float]] = {name: [] for name in ways}
    rounds = {}
    for name, call in ways.items():
        with suppress(NotImplementedError):
            call()  # compiles
            rounds[name] = max(1, round(ROUND / mean(call, WARM)))
    for _ in range(ROUNDS):
        for name, calls in rounds.items():
            found[name].append(1e6 * mean(ways[name], calls))
    return found


def mean(call: Call, calls: int) -> float:
    """Seconds of this thread's CPU time that a call takes, of so many."""
    start = time.thread_time()
    for _ in range(calls):
        call()
    return (time.thread_time() - start) / calls


def stand_in() -> Any:
    """A driver for an sm_90 GPU that is not there: kernels are compiled, and launches do nothing."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase

    class StandIn(DriverBase):
        def __init__(self) -> None:
            limits = {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32, "max_num_regs": 65536}
            self.utils: Any = SimpleNamespace(
                load_binary=lambda *_: (1, 2, 100, 0, 1024), get_device_properties=lambda device: limits
            )
            self.launcher_cls: Any = lambda source, metadata: lambda *args: None

        is_active = classmethod(lambda cls: True)
        map_python_to_cpp_type = lambda self, type: type  # noqa: E731
        get_current_target = lambda self: GPUTarget("cuda", 90, 32)  # noqa: E731
        get_active_torch_device = lambda self: torch.device("cpu")  # noqa: E731
        get_current_device = lambda self: 0  # noqa: E731
        get_current_stream = lambda self, device: 0  # noqa: E731
        get_benchmarker = lambda self: None  # noqa: E731

    return StandIn()


def pretend() -> None:
    """Make CPU tensors pass for those of an sm_90 GPU: kernels are compiled for it, and none is run."""
    from triton.runtime import driver

    from flash import dispatch, dispatch_step, plans, replays

    driver.set_active(stand_in())
    plans.SERVED = replays.SERVED = lambda x: x.is_cpu
    dispatch.choose = dispatch_step.chosen = lambda *_: "triton"
    dispatch.target_of = dispatch_step.target_of = lambda device: "cuda:90"  # type: ignore[assignment]


def rows(device: torch.device) -> dict[str, Call]:
    """{what: the call that is timed}."""
    from torch.nn.functional import scaled_dot_product_attention

    from flash import autograd, dispatch, ops, plans
    from flash.attention import flash_attention
    from flash.kernels.forward import planned_forward
    from flash.problem import Problem

    q, k, v = (torch.zeros(SIZES, dtype=torch.bfloat16, device=device) for _ in range(3))
    flash_attention(q, k, v, causal=True)
    (plan,) = plans.plans.values()
    o, lse = torch.empty_like(q), torch.empty(q.shape[:3], device=device)

    def other_lengths() -> None:
        plans.plans.clear()
        flash_attention(q, k, v, causal=True)

    p = Problem.of(q, k, v, causal=True)
    config = dispatch.tuned(p, "forward").config
    operands, *call = ops.call_of(p)
    few = (1, 1, 1, 1) if device.type == "cpu" else SIZES
    x = torch.zeros(few, dtype=torch.float32 if device.type == "cpu" else torch.bfloat16, device=device)
    ours = paths(lambda q: flash_attention(q, k, v, causal=True), q)
    theirs = paths(lambda x: scaled_dot_product_attention(x, x, x), x)
    return {
        "torch.empty_like": partial(torch.empty_like, q),
        "flash_attention": lambda: flash_attention(q, k, v, causal=True),
        "  what else is asked": partial(plans.watched, q, k, v),
        "  the plan's call": partial(plans.attend, q, k, v, True, None, None, "auto"),
        "    its launch": partial(plan.launch, q, k, v, o, lse),
        "  of other lengths than before": other_lengths,
        "without a plan": lambda: autograd.attend(Problem.of(q, k, v, causal=True)),
        "  checks": lambda: Problem.of(q, k, v, causal=True),
        "  op and dispatch": lambda: torch.ops.flash.forward(q, k, v, operands, *call),
        "    dispatch and kernel": partial(dispatch.forward, p),
        "      backend and tables": lambda: (dispatch.chosen(p), dispatch.tuned(p, "forward")),
        "      arguments and launch": lambda: planned_forward(q, k, v, p.mods, p.spec, p.scale, p.positions, config),
        "scaled_dot_product_attention": lambda: scaled_dot_product_attention(x, x, x),
        **decoding(device),
        **{f"flash: {name}": way for name, way in ours.items()},
        **{f"SDPA: {name}": way for name, way in theirs.items()},
    }


def decoding(device: torch.device) -> dict[str, Call]:
    """A token's call with pages of a cache, its keys split, and the same with new keys that turn and join it."""
    from flash import replays
    from flash.decode import flash_attention_decode

    batch, heads, _, head_dim = SIZES
    half = partial(torch.zeros, dtype=torch.bfloat16, device=device)
    q, (k_cache, v_cache) = half(batch, heads, 1, head_dim), (half(64, heads, 16, head_dim) for _ in "kv")
    new = {name: half(batch, heads, 1, head_dim) for name in "kv"}
    turns = {name: torch.zeros(1024, head_dim // 2, device=device) for name in ("rotary_cos", "rotary_sin")}
    integers = partial(torch.zeros, dtype=torch.int32, device=device)
    whose = {"cache_seqlens": integers(batch), "block_table": integers(batch, 64), "num_splits": 4}
    read = partial(flash_attention_decode, q, k_cache, v_cache, **whose)  # type: ignore[arg-type]

    def ordinary() -> None:
        replays.replays.clear()
        read()

    return {
        "flash_attention_decode": read,
        "  with new keys, turned": partial(read, **new, **turns),  # type: ignore[arg-type]
        "  not made before": ordinary,
    }


def paths(attend: Callable[[torch.Tensor], Any], q: torch.Tensor) -> dict[str, Call]:
    """A call by the ways through torch other than the shortest."""
    leaf, do, batch = q.detach().requires_grad_(), torch.zeros_like(q), torch.stack([q, q])
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    return {
        "with gradients": torch.enable_grad()(lambda: attend(leaf)),
        "forward and backward": torch.enable_grad()(lambda: torch.autograd.grad(attend(leaf), leaf, do)),
        "torch.func.vjp": lambda: torch.func.vjp(attend, q),
        "torch.func.vjp and its backward": lambda: torch.func.vjp(attend, q)[1](do),
        "torch.func.jvp": lambda: torch.func.jvp(attend, (q,), (do,)),
        "torch.vmap over 2": lambda: torch.vmap(attend)(batch),
        "torch.compile": lambda: compiled(q),
    }


def main(argv: list[str] | None = None) -> int:
    """Command line: print the table."""
    parser = argparse.ArgumentParser(prog="python -m bench.overhead", description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print the numbers alone")
    parser.add_argument("--out", type=Path, help="folder of overhead.json and .md (default: none are written)")
    options = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machine = records.machine(device, 1)
    if device.type == "cpu":
        pretend()
    torch.set_num_threads(1)
    with torch.no_grad():
        found = rounds_of(rows(device))
    if options.json:
        print(json.dumps({name: min(times, default=None) for name, times in found.items()}))
        return 0
    text = table(found)
    writing = records.Writing()
    if options.out is not None:
        with writing.attempt(options.out):
            write(options.out, machine, found, text)
    print(text)
    return writing.status()


def write(out: Path, machine: dict[str, Any], found: dict[str, list[float]], text: str) -> None:
    """overhead.json and overhead.md in a folder."""
    out.mkdir(parents=True, exist_ok=True)
    content = {
        "machine": machine,
        "settings": {
            "round_s": ROUND,
            "rounds": ROUNDS,
            "operands": "zeros",
            "statistics": "least, median, 20th and 80th percentile of rounds",
        },
        "microseconds": {
            name: {"least": min(times), **asdict(quantiles(times))} if times else None for name, times in found.items()
        },
    }
    records.write_whole(out / "overhead.json", json.dumps(content, indent=1) + "\n")
    about = f"# What a call costs before its kernel runs: {records.title(machine)}, torch {torch.__version__}"
    note = (__doc__ or "").split("\n\n")[-1].strip()
    (out / "overhead.md").write_text(f"{about}\n\n{note}\n\n```\n{text}\n```\n", encoding="utf-8")


def table(found: dict[str, list[float]]) -> str:
    """Microseconds of each path: the least, its multiple of SDPA's own call, the median ± half the p20-p80 spread."""
    base = min(found["scaled_dot_product_attention"])
    lines = [f"{'path':40} {'least':>10} {'x SDPA':>8} {'median':>16}   (microseconds)"]
    for name, times in found.items():
        if not times:
            lines.append(f"{name:40} {'not served':>10}")
            continue
        all_rounds = quantiles(times)
        spread = f"{50 * (all_rounds.p80 - all_rounds.p20) / all_rounds.median:.0f}%"
        lines.append(
            f"{name:40} {min(times):10.1f} {min(times) / base:8.1f} {f'{all_rounds.median:.1f} ±{spread}':>16}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
