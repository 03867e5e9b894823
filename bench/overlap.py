"""What the compiler made of our tiles that were timed: registers, spills, and how much of the exponentials is hidden.

The tiles are asked for where a case is timed, and compiled for its GPU afterwards, by ptxas and nvdisasm alone: what a
run had no time for is made up on any machine by `python -m bench.race PATH`. Hidden is the share of a loop's
exponentials that are issued while a matrix product of the same warps is in flight (autotune/listing.py): what the
schedule promises, not what the GPU did.
"""

import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from bench.cases import PASSES, Case
from bench.peers import HOPPER, OURS, OURS_ALL, PLAIN, our_info
from bench.record import Record

BACKENDS = {OURS: "auto", PLAIN: "triton", HOPPER: "hopper"}
LATE = "the time limit was over: `python -m bench.race` compiles it on any machine"


class Compiled(NamedTuple):
    """One kernel of one case, as it was compiled: `found` is what `compiled` returns."""

    case: Case
    peer: str
    backend: str
    kernel: str
    config: dict[str, int]
    found: dict[str, Any]


def tiles_of(record: Record, case: Case, device: torch.device) -> dict[str, Any]:
    """The backend and the tiles of each of ours that was timed on a case, as flash.info tells them."""
    from flash.dispatch import target_of

    tiles: dict[str, Any] = {}
    for peer in OURS_ALL:
        rows = [row for what in PASSES if (row := record.row(case.name, peer, what))]
        if not any(row.latency for row in rows):
            continue
        told = our_info(case, device, BACKENDS[peer])
        kernels = {
            name: {"config": choice["config"]._asdict(), "reason": choice["reason"]}
            for name, choice in told.get("configs", {}).items()
        }
        tiles[peer] = {"backend": told["backend"], "target": target_of(device), "kernels": kernels}
    return tiles


def compile_all(record: Record, deadline: float = float("inf")) -> None:
    """Compile what was timed and has no report yet, each distinct kernel once, until the deadline."""
    made: dict[str, dict[str, Any]] = {}
    for case, peer in ((record.cases[name], peer) for name in record.speed.get("tiles", {}) for peer in OURS_ALL):
        told = record.speed["tiles"][case.name].get(peer, {})
        for name, choice in told.get("kernels", {}).items():
            if "registers" in choice.get("compiled", {}):
                continue
            key = f"{told['backend']} {name} {choice['config']} {case.dtype} {case.head_dim} {case.causal} {case.group}"
            if key not in made:
                late = time.monotonic() > deadline
                made[key] = {"absent": LATE} if late else compiled(case, told, name, choice["config"])
            choice["compiled"] = made[key]


def compiled(case: Case, told: dict[str, Any], kernel: str, config: dict[str, int]) -> dict[str, Any]:
    """{"hidden", "registers", "spill_bytes", "shared", "serialized"} of a kernel, or {"absent": reason}."""
    from flash.autotune import resources
    from flash.autotune.space import Variant
    from flash.kernels.spec import Config

    if told["backend"] not in ("triton", "hopper"):
        return {"absent": f"the {told['backend']} backend compiles no kernel"}
    variant = Variant(case.dtype, case.head_dim, case.head_dim_v, case.causal, case.group)
    name = kernel
    if told["backend"] == "hopper":  # some of its calls have a backward of plain kernels
        name = f"hopper_{kernel.removeprefix('hopper_')}"
        if name not in getattr(resources, "KERNELS", ()):
            if kernel not in ("dkdv", "dq"):
                return {"absent": f"the compile report knows no {name}"}
            name = kernel
    try:
        made = resources.report(told["target"], name, variant, Config(**config), listing=True)
    except Exception as error:  # no tool, no such kernel, a compiler's complaint
        return {"absent": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"}
    return {
        "hidden": made.hidden,
        "registers": made.registers,
        "spill_bytes": made.spill_bytes,
        "shared": made.shared,
        "serialized": made.serialized,
    }


def of(record: Record) -> Iterator[Compiled]:
    """What was compiled, case by case; "flash" only where no backend asked for by name was timed."""
    for name, peers in record.speed.get("tiles", {}).items():
        backends = {told["backend"] for peer, told in peers.items() if peer != OURS}
        for peer, told in peers.items():
            if peer == OURS and told["backend"] in backends:
                continue
            for kernel, choice in told["kernels"].items():
                found = choice.get("compiled", {"absent": "not compiled"})
                yield Compiled(record.cases[name], peer, told["backend"], kernel, choice["config"], found)
