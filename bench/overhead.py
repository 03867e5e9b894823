"""What a call costs before its kernel runs: Python and launching, in microseconds, torch's own attention beside it.

    python -m bench.overhead [--json]      # also python -m bench.run --suite overhead

Without a GPU a stand-in driver compiles for sm_90 and launches nothing, and CPU tensors pass for a GPU's. Left out are
then the driver's launch itself and CUDA's allocator. torch's scaled_dot_product_attention is timed on CPU tensors of
one element, where it dispatches, allocates and computes next to nothing. Times are those of the thread's CPU clock, the
least of several rounds, so that other processes do not count.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from bench import record as records

CALLS = 1000
ROUNDS = 7
SIZES = (1, 8, 1024, 128)


def microseconds(call: Callable[[], Any]) -> float:
    """The CPU time of one call: the least mean of several rounds."""
    for _ in range(CALLS // 10):
        call()
    best = float("inf")
    for _ in range(ROUNDS):
        start = time.thread_time()
        for _ in range(CALLS):
            call()
        best = min(best, time.thread_time() - start)
    return 1e6 * best / CALLS


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

    from flash import dispatch, plans

    driver.set_active(stand_in())
    plans.SERVED = lambda x: x.is_cpu
    dispatch.choose = lambda *_: "triton"
    dispatch.target_of = lambda device: "cuda:90"  # type: ignore[assignment]


def rows(device: torch.device) -> dict[str, float | None]:
    """{what: microseconds a call}, None for what is not served."""
    from torch.nn.functional import scaled_dot_product_attention

    from flash import autograd, dispatch, ops, plans
    from flash.attention import flash_attention
    from flash.kernels.forward import planned_forward
    from flash.problem import Problem

    q, k, v = (torch.zeros(SIZES, dtype=torch.bfloat16, device=device) for _ in range(3))
    found: dict[str, float | None] = {"torch.empty_like": microseconds(partial(torch.empty_like, q))}
    found["flash_attention"] = microseconds(lambda: flash_attention(q, k, v, causal=True))
    plain = (q, k, v, True, None, None, "auto")
    found["  what else is asked"] = microseconds(partial(plans.watched, q, k, v))
    found["  the plan's call"] = microseconds(partial(plans.attend, *plain))
    (plan,) = plans.plans.values()
    o, lse = torch.empty_like(q), torch.empty(q.shape[:3], device=device)
    found["    its launch"] = microseconds(partial(plan.launch, q, k, v, o, lse))

    def other_lengths() -> None:
        plans.plans.clear()
        flash_attention(q, k, v, causal=True)

    found["  of other lengths than before"] = microseconds(other_lengths)
    problem = Problem.of(q, k, v, causal=True)
    p, config = problem, dispatch.tuned(problem, "forward").config
    operands, *call = ops.call_of(problem)
    dispatched = partial(dispatch.forward, problem)
    ordinary = lambda: autograd.attend(Problem.of(q, k, v, causal=True))  # noqa: E731
    found["without a plan"] = microseconds(ordinary)
    found["  checks"] = microseconds(lambda: Problem.of(q, k, v, causal=True))
    found["  op and dispatch"] = microseconds(lambda: torch.ops.flash.forward(q, k, v, operands, *call))
    found["    dispatch and kernel"] = microseconds(dispatched)
    found["      backend and tables"] = microseconds(lambda: (dispatch.chosen(p), dispatch.tuned(p, "forward")))
    found["      arguments and launch"] = microseconds(
        lambda: planned_forward(q, k, v, p.mods, p.spec, p.scale, p.positions, config)
    )
    few = (1, 1, 1, 1) if device.type == "cpu" else SIZES
    x = torch.zeros(few, dtype=torch.float32 if device.type == "cpu" else torch.bfloat16, device=device)
    found["scaled_dot_product_attention"] = microseconds(lambda: scaled_dot_product_attention(x, x, x))
    found |= {
        f"flash: {name}": value for name, value in paths(lambda q: flash_attention(q, k, v, causal=True), q).items()
    }
    found |= {
        f"SDPA: {name}": value for name, value in paths(lambda x: scaled_dot_product_attention(x, x, x), x).items()
    }
    return found


def paths(attend: Callable[[torch.Tensor], Any], q: torch.Tensor) -> dict[str, float | None]:
    """What a call costs by the ways through torch other than the shortest; None for one that is not served."""
    leaf, do, batch = q.detach().requires_grad_(), torch.zeros_like(q), torch.stack([q, q])
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")

    def both() -> Any:
        return torch.autograd.grad(attend(leaf), leaf, do)

    ways: dict[str, Callable[[], Any]] = {
        "with gradients": lambda: attend(leaf),
        "forward and backward": both,
        "torch.func.vjp": lambda: torch.func.vjp(attend, q),
        "torch.func.vjp and its backward": lambda: torch.func.vjp(attend, q)[1](do),
        "torch.func.jvp": lambda: torch.func.jvp(attend, (q,), (do,)),
        "torch.vmap over 2": lambda: torch.vmap(attend)(batch),
        "torch.compile": lambda: compiled(q),
    }
    found: dict[str, float | None] = dict.fromkeys(ways)
    for name, way in ways.items():
        with torch.set_grad_enabled(way is both or name == "with gradients"), suppress(NotImplementedError):
            found[name] = microseconds(way)
    return found


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
        found = rows(device)
    if options.json:
        print(json.dumps(found))
        return 0
    text = table(found)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        content = {"machine": machine, "settings": {"calls": CALLS, "rounds": ROUNDS}, "microseconds": found}
        (options.out / "overhead.json").write_text(json.dumps(content, indent=1) + "\n")
        about = f"# What a call costs before its kernel runs: {records.title(machine)}, torch {torch.__version__}"
        note = (__doc__ or "").split("\n\n")[-1].strip()
        (options.out / "overhead.md").write_text(f"{about}\n\n{note}\n\n```\n{text}\n```\n")
    print(text)
    return 0


def table(found: dict[str, float | None]) -> str:
    """Microseconds of each path, and as multiples of scaled_dot_product_attention's own call."""
    base = found["scaled_dot_product_attention"]
    assert base is not None
    lines = [f"{'path':40} {'microseconds':>12} {'x SDPA':>8}"]
    for name, value in found.items():
        lines.append(
            f"{name:40} {'not served':>12}" if value is None else f"{name:40} {value:12.1f} {value / base:8.1f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
