"""One process of the cold suite: imports and the first calls of a peer, each timed, printed as JSON.

    python -m bench.cold_child '{"case": {...}, "peer": "flash", "what": "both", "device": "cpu", ...}'

Above, nothing is imported but small parts of the standard library: `import torch` is one of the things timed. Operands
are written before the first call, so that on a GPU making the context is none of it. What the calls returned is held to
the float64 oracle afterwards.
"""

import json
import sys
from collections.abc import Callable
from contextlib import ExitStack
from importlib import import_module
from time import perf_counter
from typing import Any

OURS = ("flash", "flash-triton", "flash-hopper")


def steps_of(job: dict[str, Any]) -> dict[str, float]:
    """Milliseconds of each step.

    Raises:
        ArithmeticError: the result is not within the gate's bound.
    """
    took: dict[str, float] = {}

    def timed(name: str, call: Callable[[], Any]) -> Any:
        start = perf_counter()
        found = call()
        took[name] = 1e3 * (perf_counter() - start)
        return found

    torch = timed("import torch", lambda: import_module("torch"))
    if job["peer"] in OURS:
        timed("import flash", lambda: import_module("flash"))
        timed("import flash.attention", lambda: import_module("flash.attention"))

    from bench.cases import Case, inputs
    from bench.check import compare, expect, names
    from bench.measure import passes
    from bench.peers import PEERS

    import_module("torch.nn.attention.bias")  # which the harness needs, and users of SDPA do not
    torch.set_num_threads(job["threads"])
    case, device, what = Case(**job["case"]), torch.device(job["device"]), job["what"]
    tensors = inputs(case, device, job["seed"])
    finished = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    finished()
    with ExitStack() as stack:

        def first() -> Any:
            attention = stack.enter_context(PEERS[job["peer"]].prepare(case, device))
            call = passes(attention, *tensors)[what]
            call()
            finished()
            return call

        def again() -> Any:
            results = call()
            finished()
            return results

        call = timed(f"{what}, first", first)
        results = timed(f"{what}, second", again)
    expected = expect(case, *tensors, backward=what == "both")
    verdict = compare(case, expected, dict(zip(names(case), results, strict=False)), job["peer"])
    if not verdict.ok:
        raise ArithmeticError(f"wrong: {verdict.errors} above {verdict.bounds}")
    return took


if __name__ == "__main__":
    print(json.dumps(steps_of(json.loads(sys.argv[1]))))
