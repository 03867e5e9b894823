"""The scale suite as text: the model beside what was measured, and what it says of GPUs that nobody measured.

python -m bench.scale_report bench/results/<machine>/scale.json     # writes and draws again what a run measured
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.record import write_whole
from bench.report import digits, table
from bench.scale import Device, Job, Link, Point, crossover, efficiency, found_crossover, predicted
from bench.scale_memory import STANDARD, peak, tokens_that_fit

OFF = 1.5  # measured over predicted, or the other way around, that has to be explained
# Assumed: no kernel of this library has run on a GPU. The rate that others report of such kernels on an H100 or H200.
H200 = Device("H200, bfloat16, assumed", (Point(1, 1, False, 600e12, 450e12),), 4.8e12, ((1, 4.8e12),))
# Bandwidths are the vendors' nominal ones, of one direction; latencies are assumed.
LINKS = (
    Link("NVLink 4, H100 or H200", 450e9, 10e-6),
    Link("PCIe 5.0 x16", 64e9, 10e-6),
    Link("400 Gb/s network", 50e9, 20e-6),
)
LLAMA: dict[str, Any] = {"heads": 32, "heads_k": 8, "head_dim": 128, "itemsize": 2}  # Llama-3-8B's attention
LAYERS = 32
KINDS = (("contiguous", False), ("contiguous", True), ("zigzag", True))
WORLD = 8  # ranks of the crossovers and efficiencies
LENGTHS = (1024, 4096, 16384, 65536)  # rows of a rank
MEMORIES = (80e9, 141e9)
SHARE = 0.5  # of the memory, for attention's activations
DEVICES = (1, 2, 4, 8, 16, 32, 64)
METHODS = ("ring", "all_gather", "ulysses", STANDARD)


def job_of(found: dict[str, Any]) -> Job:
    """The Job that was written down."""
    return Job(**found)


def device_of(content: dict[str, Any], world_size: int) -> Device:
    """What was measured of this machine while so many processes were busy."""
    world, cores = content["worlds"][str(world_size)], content["machine"]["cores"]
    names = ("rows", "keys", "causal", "forward", "backward")
    points = tuple(Point(*(point[name] for name in names)) for point in world["points"])
    device, calls = (
        Device(f"{world_size} processes", points, world["merging"], tuple(map(tuple, world["packing"])), cores),
        {},
    )
    link = link_of(content, world_size)
    for row in world["calls"]:
        job, before = job_of(row["job"]), 0.0
        for name, what in (("forward", "forward"), ("backward", "both")):
            own = row[what]["median"] - predicted(job, what, device, link) - before
            calls[job.method, name] = before = max(0.0, own)
    return device._replace(calls=tuple(calls.items()))


def link_of(content: dict[str, Any], world_size: int) -> Link:
    """The link between as many processes: the shortest message's time, and what the longest adds to it."""
    found = content["worlds"][str(world_size)]["links"]
    if not found:
        return Link("none", float("inf"), 0.0)
    short, long = found[0], found[-1]
    bandwidth = (long["bytes"] - short["bytes"]) / (long["median"] - short["median"])
    return Link("gloo", bandwidth, short["median"], long["work"])


def finish(content: dict[str, Any]) -> None:
    """Write what the model says into what was measured."""
    for name, world in content["worlds"].items():
        device, link = device_of(content, int(name)), link_of(content, int(name))
        world["link"] = link._asdict()
        world["own_cost"] = {f"{method}, {what}": seconds for (method, what), seconds in device.calls}
        for row in world["jobs"]:
            for what in ("forward", "both"):
                row[what]["predicted"] = predicted(job_of(row["job"]), what, device, link)
                row[what]["ratio"] = row[what]["median"] / row[what]["predicted"]
                row[what]["efficiency"] = measured_efficiency(content, row, what)
    for row in content["peaks"]:
        row["predicted"] = peak(job_of(row["job"]), row["what"])
    content["simulated"] = {
        "device": {"name": H200.name, **H200.points[0]._asdict(), "memory": H200.memory},
        "links": [link._asdict() for link in LINKS],
        "crossovers": crossovers(),
        "efficiencies": efficiencies(),
        "tokens": tokens(),
    }


def measured_efficiency(content: dict[str, Any], row: dict[str, Any], what: str) -> float | None:
    """One process's time over that of all; None where one process was not timed."""
    own = row["job"]
    same = ("keys", "queries", "causal")
    for other in content["worlds"].get("1", {}).get("jobs", []):
        if all(other["job"][name] == own[name] for name in same):
            return float(other[what]["median"] / (own["world_size"] * row[what]["median"]))
    return None


def crossovers() -> list[dict[str, Any]]:
    """From how many rows of a rank on the ring is hidden, by formula and by the model's steps."""
    found = []
    for link in LINKS:
        for sharding, causal in KINDS:
            job = Job(WORLD, 0, "ring", sharding, causal, **LLAMA)
            for what in ("forward", "backward"):
                pair = crossover(job, what, H200, link), found_crossover(job, what, H200, link)
                about = {"link": link.name, "sharding": sharding, "causal": causal, "what": what}
                found.append(about | {"formula": pair[0], "rows": pair[1], "total": pair[1] and WORLD * pair[1]})
    return found


def efficiencies() -> list[dict[str, Any]]:
    """Of WORLD GPUs, forward and backward, causal."""
    found = []
    for link in LINKS:
        for method, sharding in (("ring", "contiguous"), *((method, "zigzag") for method in METHODS[:3])):
            job = Job(WORLD, 0, method, sharding, True, **LLAMA)
            by_length = {n: efficiency(replace(job, keys=WORLD * n), "both", H200, link) for n in LENGTHS}
            found.append({"link": link.name, "method": method, "sharding": sharding, "by_rows": by_length})
    return found


def tokens() -> list[dict[str, Any]]:
    """Tokens that fit in all devices' memory, by how many they are."""
    return [
        {"memory": memory, "method": method, "tokens": {
            n: tokens_that_fit(Job(n, 0, method, "zigzag", True, **LLAMA), SHARE * memory, LAYERS) for n in DEVICES
        }}
        for memory in MEMORIES
        for method in METHODS
    ]  # fmt: skip


# text


def where(machine: dict[str, Any]) -> str:
    """The machine in a few words."""
    return f"{machine['cpu']}, {machine['cores']} cores, one thread a process"


def named(job: dict[str, Any]) -> list[str]:
    """A job as cells: ranks, tokens, method, sharding, mask."""
    total = str(job["keys"]) if job["queries"] is None else f"{job['queries']} x {job['keys']}"
    return [str(job["world_size"]), total, job["method"], job["sharding"], "causal" if job["causal"] else "full"]


def spread(found: dict[str, Any]) -> str:
    """Median milliseconds and half the spread."""
    return f"{digits(1e3 * found['median'])} ±{50 * (found['p80'] - found['p20']) / found['median']:.0f}%"


def check_table(content: dict[str, Any]) -> str:
    """Measured beside predicted."""
    lines = []
    for world in content["worlds"].values():
        for row in world["jobs"]:
            cells = []
            for what in ("forward", "both"):
                found = row[what]
                cells += [spread(found), digits(1e3 * found["predicted"]), f"{found['ratio']:.2f}"]
            efficient = row["both"]["efficiency"]
            lines.append([*named(row["job"]), *cells, "" if efficient is None else f"{efficient:.0%}"])
    header = [
        "ranks",
        "tokens",
        "method",
        "sharding",
        "mask",
        "forward ms",
        "model",
        "ratio",
        "both ms",
        "model",
        "ratio",
    ]
    return table([*header, "efficiency"], lines)


def off(content: dict[str, Any]) -> list[str]:
    """The rows that the model misses by more than OFF, in words."""
    found = []
    for world in content["worlds"].values():
        for row in world["jobs"]:
            for what in ("forward", "both"):
                ratio = row[what]["ratio"]
                if not 1 / OFF <= ratio <= OFF:
                    found.append(
                        f"{', '.join(named(row['job'])[1:])} on {row['job']['world_size']}, {what}: {ratio:.2f}"
                    )
    return found


def ratios(content: dict[str, Any]) -> str:
    """In how many rows the model is how near."""
    every = sorted(
        row[what]["ratio"] for w in content["worlds"].values() for row in w["jobs"] for what in ("forward", "both")
    )
    near = sum(1 / OFF <= x <= OFF for x in every)
    middle = every[len(every) // 2]
    return (
        f"Measured over predicted: median {middle:.2f}, from {every[0]:.2f} to {every[-1]:.2f}; within {OFF:g}x in "
        f"{near} of {len(every)}."
    )


def fed(content: dict[str, Any]) -> str:
    """What the model was fed: rates and links."""
    points, links = [], []
    for name, world in content["worlds"].items():
        for point in world["points"]:
            shape = [
                name,
                str(point["heads"]),
                f"{point['rows']} x {point['keys']}",
                "causal" if point["causal"] else "full",
            ]
            points.append(
                [*shape, *(digits(point[what] / 1e9) for what in ("forward", "backward")), spread(point["forward_s"])]
            )
        for link in world["links"]:
            links.append([name, str(link["bytes"]), spread(link), digits(link["bytes"] / link["median"] / 1e9)])
        if world["links"]:
            fit = world["link"]
            latency = f"latency {digits(1e3 * fit['latency'])}"
            links.append([name, "the model's", latency, digits(fit["bandwidth"] / 1e9)])
    rates = table(["processes", "heads", "rows x keys", "mask", "forward GFLOP/s", "backward", "forward ms"], points)
    copies, calls = [], []
    for name, world in content["worlds"].items():
        packing = (f"{digits(rate / 1e9)} of {size / 1e6:.0f} MB" for size, rate in world["packing"])
        copies.append([name, digits(world["merging"] / 1e9), ", ".join(packing)])
        for method in dict.fromkeys(row["job"]["method"] for row in world["calls"]):
            own = (1e3 * world["own_cost"][f"{method}, {what}"] for what in ("forward", "backward"))
            calls.append([name, method, *map(digits, own)])
    copied = table(["processes", "merging GB/s", "copying what travels, GB/s"], copies)
    called = table(["processes", "a call by itself", "forward ms", "backward ms"], calls)
    sent = table(["processes", "bytes", "ms", "GB/s"], links)
    return "\n\n".join([rates, copied, called, sent])


def peak_table(content: dict[str, Any]) -> str:
    """Peak memory beside the model."""
    lines = [
        [*named(row["job"]), row["what"], f"{row['peak'] / 1e6:.1f}", f"{row['predicted'] / 1e6:.1f}",
         f"{row['peak'] / row['predicted']:.2f}"]
        for row in content["peaks"]
    ]  # fmt: skip
    return table(["ranks", "tokens", "method", "sharding", "mask", "pass", "MB of a rank", "model", "ratio"], lines)


def gpu_tables(content: dict[str, Any]) -> list[str]:
    """What the model says of GPUs."""
    simulated = content["simulated"]
    crossed = [
        [
            x["link"],
            x["sharding"],
            "causal" if x["causal"] else "full",
            x["what"],
            f"{x['formula']:.0f}",
            str(x["rows"]),
            str(x["total"]),
        ]
        for x in simulated["crossovers"]
    ]
    efficient = [
        [x["link"], x["method"], x["sharding"], *(f"{y:.0%}" for y in x["by_rows"].values())]
        for x in simulated["efficiencies"]
    ]
    fitting = [
        [
            f"{x['memory'] / 1e9:.0f} GB",
            x["method"],
            *("not served" if n is None else thousands(n) for n in x["tokens"].values()),
        ]
        for x in simulated["tokens"]
    ]
    header = ["link", "sharding", "mask", "pass", "tokens a device, formula", "by the steps", f"of {WORLD}"]
    return [
        f"From these lengths on no hop of {WORLD} devices takes longer than the products beside it. Backward, the "
        "gradients' last way home has none beside it and is not hidden at any length.",
        table(header, crossed),
        f"Efficiency of {WORLD} devices, causal, forward and backward, by tokens of a device:",
        table(["link", "method", "sharding", *map(thousands, LENGTHS)], efficient),
        f"Tokens that fit, by devices: q, k, v, o and lse of {LAYERS} layers kept for the backward pass, and what one "
        f"layer works with, in {SHARE:.0%} of the memory (the rest is for weights and other layers' activations). "
        f"Standard attention keeps its weights of every layer; its rows are sharded and all keys are fetched.",
        table(["memory", "method", *map(str, DEVICES)], fitting),
    ]


def thousands(n: float) -> str:
    """A number of tokens in a few characters."""
    if n < 1e3:
        return f"{n:.0f}"
    return f"{n / 1e6:.3g}M" if n >= 1e6 else f"{n / 1e3:.3g}k"


def simulated(content: dict[str, Any]) -> str:
    """What was run and what was not, plainly."""
    worlds = ", ".join(content["worlds"])
    links = "; ".join(f"{x.name} {x.bandwidth / 1e9:g} GB/s a direction" for x in LINKS)
    latencies = ", ".join(f"{1e6 * x.latency:g}" for x in LINKS)
    point = H200.points[0]
    return (
        f"Run, and measured: {worlds} processes of one thread each on the CPU named above, over gloo on one host. "
        "Those rows and the peaks of memory say that the model counts steps, bytes and balance as the code does; they "
        "say nothing of a GPU.\n\n"
        "Simulated, which is arithmetic and nothing else: every figure for a GPU, NVLink, PCIe or the network. A rate "
        f"of {point.forward / 1e12:g} TFLOP/s forward and {point.backward / 1e12:g} backward, of an H200 in bfloat16, "
        "is assumed, not measured: no kernel here has run on a GPU. Bandwidths are the vendors' nominal figures "
        f"({links}; {H200.memory / 1e12:g} TB/s of memory), which no message reaches; latencies ({latencies} us) are "
        "assumed. No two GPUs have run ring_attention, nor two hosts."
    )


def report(content: dict[str, Any]) -> str:
    """The whole suite as Markdown."""
    machine, load, settings = content["machine"], content["load_average"], content["settings"]
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items() if number != "absent")
    shape = next(iter(content["worlds"].values()))["jobs"][0]["job"]
    about = [
        f"# Sharding a sequence: {where(machine)}", "",
        f"- {machine['date']}; {machine['system']}; {machine['cpu_clock']}; versions: {versions}",
        "- load average " + ", ".join(f"{x:.1f} {when}" for when, x in load.items())
        + ": what is above the ranks' own number is other people's work on the same cores",
        f"- seed {settings['seed']}; {settings['rounds']} rounds; median, ± half the p20-p80 spread",
        f"- float32, batch 1, {shape['heads']} heads, {shape['heads_k']} of keys, head_dim {shape['head_dim']}",
        "- every timed call's o, dq, dk and dv were first held to attention of one process in float64",
    ]  # fmt: skip
    missed = off(content)
    listed = (
        f"Further off than {OFF:g}x: " + "; ".join(missed) + "." if missed else f"No row is further off than {OFF:g}x."
    )
    return "\n\n".join(
        [
            "\n".join(about), "## What is simulated", simulated(content),
            "## The model beside 1, 2 and 4 processes", ratios(content), check_table(content), listed, WHY,
            "## What the model was fed", fed(content),
            *(["## Peak memory of a rank, beyond its inputs", peak_table(content)] if content["peaks"] else []),
            "## GPUs, simulated: Llama-3-8B's attention (32 heads, 8 of keys, head_dim 128, bfloat16)",
            *gpu_tables(content),
        ]
    ) + "\n"  # fmt: skip


WHY = """Efficiency is one process's time over ranks times theirs: 4 ranks on 2 cores cannot exceed 50%.

The model knows three things of a CPU that a GPU has not: ranks share its cores, gloo's messages take the same cores
(`work`, measured), and a call costs something by itself, measured on 16 tokens of a rank, which are in no row above. It
does not know other people's work on these cores, which slows now the kernels' own timing and now a call's (the load
average and the spread tell how much), that a rank without a core waits for its turn when a message has come (4 ranks on
2 cores, most of all at 1024 tokens), nor that a zigzag's pieces are copied before the CPU's kernels take them. Where
queries are few, all_gather moves tens of MB of keys through new memory, which the table below shows to be many times as
dear as memory used before; the model counts that for the copies, and not for the buffers that messages arrive in: most
likely what it lacks there."""


def write(content: dict[str, Any], out: Path) -> str:
    """Write scale.json and scale.md, and return the text."""
    text = told(content)
    write_whole(out / "scale.json", json.dumps(content, indent=1) + "\n")
    (out / "scale.md").write_text(text, encoding="utf-8")
    return text


def told(content: dict[str, Any]) -> str:
    """The text of what was measured, the rest of the content filled in."""
    finish(content)
    return report(content)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: write and draw again."""
    from bench.scale_plot import draw

    parser = argparse.ArgumentParser(prog="python -m bench.scale_report", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("path", type=Path, help="bench/results/<machine>/scale.json, of --suite scale")
    path = parser.parse_args(argv).path
    content = json.loads(path.read_text())
    write(content, path.parent)
    for picture in draw(content, path.parent):
        print(picture)


if __name__ == "__main__":
    main()
