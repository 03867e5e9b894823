"""The scale suite: what sharding a sequence should cost by the model, and what it did between processes of this CPU.

    python -m bench.scale_suite --out FOLDER       # also python -m bench.run --suite scale

Measures ring_attention on 1, 2 and 4 processes (`bench/scale_ranks.py`), asks the model of the same calls
(`bench/scale.py`, `bench/scale_memory.py`), and writes scale.json, scale.md and scale-*.png. GPUs are arithmetic alone.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench import record as records
from bench import scale_plot, scale_ranks, scale_report
from bench.scale import Job

WORLDS = (1, 2, 4)
KINDS = {  # sharding and causal; of ulysses a sharding changes nothing that it computes
    "ring": (("contiguous", False), ("contiguous", True), ("zigzag", True)),
    "all_gather": (("contiguous", False), ("zigzag", True)),
    "ulysses": (("contiguous", False), ("contiguous", True)),
}
SHAPE: dict[str, Any] = {"heads": 8, "heads_k": 4, "head_dim": 64, "itemsize": 4}
TOTALS, ROUNDS, WEIGHED = (1024, 4096), 4, 8192
TINY = 16  # tokens of a rank, of a call that has hardly anything to compute
FEW, KEYS = 16, 16384  # queries of a rank, so few that a hop takes longer than the products over it; keys of all
QUICK: dict[str, Any] = {"worlds": (1, 2), "totals": (256,), "rounds": 1, "weighed": 1024, "few": False}


def timed_jobs(world_size: int, totals: Sequence[int], few: bool) -> list[Job]:
    """What is timed on so many ranks; on one, attention to the whole."""
    if world_size == 1:
        return [Job(1, total, causal=causal, **SHAPE) for total in totals for causal in (False, True)]
    found = [
        Job(world_size, total, method, sharding, causal, **SHAPE)
        for total in totals
        for method, kinds in KINDS.items()
        for sharding, causal in kinds
    ]
    methods = ("ring", "all_gather") if few else ()
    return found + [Job(world_size, KEYS, m, causal=False, queries=FEW * world_size, **SHAPE) for m in methods]


def call_jobs(world_size: int) -> list[Job]:
    """What is timed to learn what a call costs by itself."""
    return [Job(world_size, TINY * world_size, method, causal=False, **SHAPE) for method in KINDS]


def weighed_jobs(world_size: int, total: int) -> list[Job]:
    """What is weighed on so many ranks: one sequence, whatever the ranks."""
    methods = tuple(KINDS) if world_size > 1 else ("ring",)
    return [Job(world_size, total, method, "zigzag", True, **SHAPE) for method in methods]


def measured(
    seed: int, worlds: Sequence[int] = WORLDS, totals: Sequence[int] = TOTALS, rounds: int = ROUNDS,
    weighed: int | None = WEIGHED, few: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """All that is measured: of each world size times, and peak memory."""
    machine = records.machine(torch.device("cpu"), 1)
    content: dict[str, Any] = {"machine": machine, "settings": {"seed": seed, "rounds": rounds, "threads_of_a_rank": 1}}
    content["worlds"], content["peaks"], content["load_average"] = {}, [], {"before": os.getloadavg()[0]}
    for world_size in worlds:
        print(f"{world_size} ranks: times", file=sys.stderr, flush=True)
        jobs, calls = timed_jobs(world_size, totals, few), call_jobs(world_size)
        world = scale_ranks.times_of([*jobs, *calls], rounds, seed)
        world["calls"], world["jobs"] = world["jobs"][len(jobs) :], world["jobs"][: len(jobs)]
        content["worlds"][str(world_size)] = world
        content["load_average"][f"after {world_size} ranks' times"] = os.getloadavg()[0]
    for world_size in worlds if weighed is not None else ():
        print(f"{world_size} ranks: peak memory", file=sys.stderr, flush=True)
        content["peaks"] += scale_ranks.peaks_of(weighed_jobs(world_size, weighed or 0), seed)
    return content


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: measure, write and draw."""
    parser = argparse.ArgumentParser(prog="python -m bench.scale_suite", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of scale.json, scale.md and scale-*.png")
    parser.add_argument("--seed", type=int, default=0, help="of the operands (default: 0)")
    parser.add_argument("--quick", action="store_true", help="two ranks at most, one short length")
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    options = parser.parse_args(argv)
    settings = QUICK if options.quick else {}
    content = measured(options.seed, **settings | ({"weighed": None} if options.no_memory else {}))
    writing, pictures = records.Writing(), []
    text = scale_report.told(content)
    with writing.attempt(options.out):
        options.out.mkdir(parents=True, exist_ok=True)
        scale_report.write(content, options.out)
        pictures = scale_plot.draw(content, options.out)
    print(*pictures, text, sep="\n")
    return writing.status()


if __name__ == "__main__":
    sys.exit(main())
