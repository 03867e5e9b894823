"""The scale suite as pictures: measured against predicted, and of GPUs, simulated, crossovers and tokens that fit."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.plot import figure
from bench.scale import Job, Link, Step, computing, crossover, steps_of, transfer
from bench.scale_memory import STANDARD
from bench.scale_report import H200, LAYERS, LINKS, LLAMA, OFF, SHARE, WORLD, thousands, where

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which colour-blind readers can tell apart.
COLOURS = {"ring": "#D55E00", "all_gather": "#0072B2", "ulysses": "#009E73", STANDARD: "#000000"}
LINES = {"ring": "o-", "all_gather": "s--", "ulysses": "^:", STANDARD: "x-"}
NAMES = {
    "ring": "ring, zigzag", "all_gather": "all_gather", "ulysses": "ulysses (32 heads)",
    STANDARD: "standard attention, scores held",
}  # fmt: skip
LINK_COLOURS = ("#009E73", "#0072B2", "#CC79A7")
RANKS = {1: "*", 2: "o", 4: "^"}
SPAN = tuple(2**n for n in range(8, 17))  # tokens of a device
TRAVELS = {"forward": "keys and values travel", "backward": "float32 gradients travel behind keys and values"}
PASSES = {"forward": "forward", "both": "forward + backward"}


def simulated(drawn: "Figure", title: str, about: str, path: Path) -> Path:
    """Titles a figure that shows nothing measured, says so, and writes it."""
    drawn.suptitle(f"{title}\nSimulated, not measured: {about}", fontsize=11)
    drawn.savefig(path)
    return path


def devices_axis(axes: "Axes", devices: list[int]) -> None:
    """A logarithmic axis that names each number of devices."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(devices, [str(n) for n in devices])
    axes.minorticks_off()
    axes.set_xlabel("devices")


def draw_tokens(content: dict[str, Any], path: Path) -> Path:
    """Tokens that fit against devices, a panel for each size of memory."""
    found = content["simulated"]["tokens"]
    memories = sorted({x["memory"] for x in found})
    drawn, (panels,) = figure(1, len(memories), 5.6, 4.8)
    for axes, memory in zip(panels, memories, strict=True):
        for curve in found:
            points = [(int(n), y) for n, y in curve["tokens"].items() if y is not None]
            if curve["memory"] == memory and points:
                method = curve["method"]
                axes.plot(*zip(*points, strict=True), LINES[method], color=COLOURS[method], label=NAMES[method], ms=5)
                above = method in ("ring", STANDARD)
                axes.annotate(
                    thousands(points[-1][1]), points[-1], (0, 7 if above else -14), textcoords="offset points",
                    ha="center", fontsize=8, color=COLOURS[method],
                )  # fmt: skip
        devices_axis(axes, sorted({int(n) for curve in found for n in curve["tokens"]}))
        axes.set_yscale("log")
        axes.set_ylabel("tokens of one sequence")
        axes.set_title(f"{memory / 1e9:.0f} GB a device, {SHARE:.0%} of it for attention", fontsize=10)
        axes.grid(alpha=0.3)
        axes.margins(x=0.08, y=0.08)
        axes.legend(fontsize=8, loc="upper left")
    about = f"bytes read off the code; bfloat16, {LAYERS} layers' q, k, v, o and lse kept, one layer at work"
    return simulated(drawn, "Tokens that fit against devices: Llama-3-8B's attention, causal", about, path)


def draw_crossovers(path: Path, world_size: int = WORLD) -> Path:
    """A hop's transfer and the products beside it against length, a panel for each pass."""
    drawn, (panels,) = figure(1, 2, 6.0, 4.8)
    for axes, what in zip(panels, ("forward", "backward"), strict=True):
        job = Job(world_size, 0, "ring", "zigzag", True, **LLAMA)
        for causal, style, text in ((False, "-", "products of a hop, full"), (True, "--", "the same, causal zigzag")):
            own = replace(job, causal=causal)
            times = [1e3 * max(computing(own, step_at(own, n, what), what, H200, merging=False)) for n in SPAN]
            axes.plot(SPAN, times, style, color="#333333", lw=2, label=text)
        for link, colour in zip(LINKS, LINK_COLOURS, strict=True):
            times = [1e3 * transfer(step_at(job, n, what), link) for n in SPAN]
            axes.plot(SPAN, times, "-", color=colour, label=f"transfer: {link.name}, {link.bandwidth / 1e9:g} GB/s")
            for causal, mark in ((False, "o"), (True, "D")):
                mark_crossover(axes, replace(job, causal=causal), what, link, colour, mark)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(SPAN, [f"{n // 1024}k" if n >= 1024 else str(n) for n in SPAN])
        axes.minorticks_off()
        axes.set_xlabel("tokens of a device")
        axes.set_ylabel("milliseconds of a hop")
        axes.set_title(f"{what}: {TRAVELS[what]}", fontsize=10)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, loc="upper left")
    rate = H200.points[0]
    about = (
        f"{rate.forward / 1e12:g} / {rate.backward / 1e12:g} TFLOP/s assumed, nominal bandwidths of a direction, "
        "assumed latencies"
    )
    title = f"From where on the ring's hops are hidden: Llama-3-8B's attention, bfloat16, H200, {world_size} devices"
    return simulated(drawn, title, about, path)


def step_at(job: Job, rows: int, what: str) -> Step:
    """A step in the middle of a ring, where keys travel and backward gradients as well."""
    return steps_of(replace(job, keys=rows * job.world_size), what)[3]


def mark_crossover(axes: "Axes", job: Job, what: str, link: Link, colour: str, mark: str) -> None:
    """A mark, and the number of tokens, where the formula says that a job's hops begin to be hidden."""
    rows = crossover(job, what, H200, link)
    at = 1e3 * transfer(step_at(job, 2 * round(rows / 2), what), link)
    axes.plot([rows], [at], mark, color=colour, mec="white", ms=8, zorder=5)
    offset = (7, -12) if mark == "D" else (-7, 6)
    side = "left" if mark == "D" else "right"
    axes.annotate(thousands(rows), (rows, at), offset, textcoords="offset points", fontsize=8, color=colour, ha=side)


def draw_check(content: dict[str, Any], path: Path) -> Path:
    """Measured against predicted, a panel for each pass; whiskers from p20 to p80."""
    drawn, (panels,) = figure(1, 2, 5.0, 5.4)
    for axes, (what, title) in zip(panels, PASSES.items(), strict=True):
        ends = []
        for name, world in content["worlds"].items():
            for row in world["jobs"]:
                found, method = row[what], row["job"]["method"] if name != "1" else "one process"
                x, y = 1e3 * found["predicted"], 1e3 * found["median"]
                bars = [[y - 1e3 * found["p20"]], [1e3 * found["p80"] - y]]
                full = "full" if row["job"]["causal"] else "none"
                colour, mark = COLOURS.get(method, "#000000"), RANKS.get(int(name), "o")
                axes.errorbar([x], [y], yerr=bars, fmt=mark, color=colour, ms=7, lw=1, fillstyle=full)
                ends += [x, y]
        low, high = min(ends) / 1.6, max(ends) * 1.6
        axes.plot([low, high], [low, high], "-", color="#333333", lw=1, zorder=0)
        axes.fill_between(
            [low, high], [low / OFF, high / OFF], [low * OFF, high * OFF], color="#333333", alpha=0.08, lw=0
        )
        axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high), aspect="equal")
        ticks = [n * 10.0**power for power in range(-2, 5) for n in (1, 2, 5) if low <= n * 10.0**power <= high]
        axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
        axes.set_yticks(ticks, [f"{x:g}" for x in ticks])
        axes.minorticks_off()
        axes.set_xlabel("model, milliseconds")
        axes.set_ylabel("measured, milliseconds")
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.3)
    legend(drawn, [int(name) for name in content["worlds"]])
    machine = content["machine"]
    about = f"{where(machine)}, torch {machine['versions']['torch']}, {machine['date'][:10]}"
    drawn.suptitle(f"ring_attention between processes over gloo: measured against the model\n{about}", fontsize=11)
    drawn.savefig(path)
    return path


def legend(drawn: "Figure", worlds: list[int]) -> None:
    """What colours, shapes and fillings mean."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    def mark(text: str, marker: str = "s", colour: str = "#000000", fill: Any = "full") -> Line2D:
        return Line2D([], [], color=colour, marker=marker, ls="", label=text, fillstyle=fill)

    handles: list[Any] = [mark(method, colour=COLOURS[method]) for method in ("ring", "all_gather", "ulysses")]
    handles += [mark("one process" if n == 1 else f"{n} processes", RANKS.get(n, "o")) for n in worlds]
    handles += [mark("causal"), mark("full", fill="none"), Patch(color="#333333", alpha=0.15, label=f"within {OFF:g}x")]
    drawn.legend(handles=handles, loc="outside lower center", ncols=5, fontsize=8)


def draw(content: dict[str, Any], out: Path) -> list[Path]:
    """Writes every picture, and returns their paths."""
    return [
        draw_check(content, out / "scale-check.png"),
        draw_crossovers(out / "scale-crossover.png"),
        draw_tokens(content, out / "scale-tokens.png"),
    ]
