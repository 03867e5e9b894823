"""A run as pictures: memory and throughput against sequence length, speed-up over standard attention, cost of features.

python -m bench.plot bench/results/<machine>/results.json      # draws again what a run measured
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import record as records
from bench.cases import PASSES, Case
from bench.peers import HOPPER, OURS, PEERS, PLAIN, SDPA, STANDARD, TUTORIAL
from bench.record import Record
from bench.report import (
    MILLION,
    NAMES,
    curves,
    factor,
    long_curves,
    memory_curves,
    memory_points,
    ordered,
    present,
    shapes_of,
    slope,
    throughput_unit,
    where,
)

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which colour-blind readers can tell apart; ours is always the same colour.
COLOURS = {
    STANDARD: "#000000", OURS: "#D55E00", SDPA: "#0072B2", "sdpa-flash": "#0072B2",
    "sdpa-efficient": "#56B4E9", "sdpa-cudnn": "#009E73",
    "sdpa-math": "#999999", "flex": "#CC79A7", "flash-attn-2": "#F0E442", "flash-attn-3": "#E69F00",
    "flash-attn-4": "#7A4B1F", PLAIN: "#F4A582", HOPPER: "#8B0000", TUTORIAL: "#6A3D9A",
}  # fmt: skip
DPI = 130
MARKS = {"oom": "OOM", "wrong": "WRONG", "error": "ERROR"}
MISSING = MARKS | {"absent": "absent", "skipped": "not measured"}


def figure(rows: int, columns: int, width: float, height: float) -> "tuple[Figure, list[list[Axes]]]":
    """A figure of width x height inches a panel, without the state pyplot would keep."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(width * columns, height * rows), dpi=DPI, layout="constrained")
    return drawn, drawn.subplots(rows, columns, squeeze=False).tolist()


def finish(drawn: "Figure", title: str, record: Record, path: Path) -> Path:
    """Titles the figure with the machine and the versions and writes it."""
    versions: dict[str, str] = record.machine["versions"]
    software = ", ".join(f"{name} {versions[name]}" for name in ("torch", "triton") if versions[name] != "absent")
    where = f"{records.title(record.machine)}; {software}; {record.machine['date'][:10]}"
    drawn.suptitle(f"{title}\n{where}", fontsize=11)
    drawn.savefig(path)
    return path


def seqlen_axis(axes: "Axes", lengths: Sequence[int]) -> None:
    """A logarithmic axis of sequence lengths that names each one measured."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(lengths), list(map(short, lengths)))
    axes.minorticks_off()
    axes.set_xlabel("sequence length")


def short(seqlen: int) -> str:
    """A length as axes name it: 512, 1k, 16k."""
    return f"{seqlen // 1024}k" if seqlen % 1024 == 0 else str(seqlen)


def label(peer: str) -> str:
    """The name of a peer in a legend."""
    return "flash (this library)" if peer == OURS else peer


def draw_memory(record: Record, path: Path) -> Path | None:
    """Peak memory against sequence length, log-log, the fitted slope in the legend; a panel for each pass.

    The curves of full attention alone where there are any: a causal mask changes the time, hardly the memory.
    """
    found = memory_curves(record)
    found = [curve for curve in found if not curve[0].causal] or found
    if not found:
        return None
    drawn, panels = figure(len(found), 2, 5.2, 4.4)
    for line, curve in zip(panels, found, strict=True):
        for axes, what in zip(line, ("forward", "both"), strict=True):
            for peer in [name for name in PEERS if memory_points(record, curve, name, what)]:
                points = memory_points(record, curve, peer, what)
                fit = slope(points)
                text = label(peer) + (f", slope {fit:.2f}" if fit is not None else "")
                lengths, megabytes = [n for n, _ in points], [b / MILLION for _, b in points]
                # Ours is drawn wide, so that a peer on the same line does not hide it.
                wide = 2 if peer == OURS else 1
                style: dict[str, Any] = {"linewidth": 1.5 * wide, "markersize": 4 * wide, "zorder": 4 - wide}
                axes.plot(lengths, megabytes, "o-", color=COLOURS.get(peer), label=text, **style)
            axes.set_yscale("log")
            axes.margins(x=0.1, y=0.25)
            mark_missing(axes, record, curve, what)
            seqlen_axis(axes, [seqlen for seqlen, _ in memory_points(record, curve, OURS, what)])
            axes.set_ylabel("MB a sequence, beyond inputs and outputs")
            first = curve[0]
            mask = "causal" if first.causal else "full"
            shape = f"{first.heads} heads, head_dim {first.head_dim}, {mask}, {first.dtype}"
            axes.set_title(f"{NAMES[what]}: {shape}", fontsize=10)
            axes.grid(alpha=0.3)
            axes.legend(fontsize=8, loc="upper left" if len(axes.lines) < 4 else "best")
    return finish(drawn, "Peak memory of attention against sequence length", record, path)


def mark_missing(axes: "Axes", record: Record, curve: Sequence[Case], what: str) -> None:
    """Writes OOM or not measured where ours has memory to show and standard attention has not."""
    ours = [seqlen for seqlen, _ in memory_points(record, curve, OURS, what)]
    for case in curve:
        row = record.row(case.name, STANDARD, what)
        if case.seqlen_k in ours and row is not None and row.peak_outcome in ("oom", "skipped"):
            text = {"oom": "OOM", "skipped": "not\nmeasured"}[row.peak_outcome]
            axes.annotate(f"standard\n{text}", (case.seqlen_k, 0.97), xycoords=("data", "axes fraction"),
                          ha="center", va="top", fontsize=7, color=COLOURS[STANDARD])  # fmt: skip


def shown_peers(record: Record, cases: Sequence[Case], what: str) -> list[str]:
    """Peers with a timing or a mark in these cases, in the order of PEERS."""
    rows = [row for case in cases for name in PEERS if (row := record.row(case.name, name, what))]
    seen = {row.peer for row in rows if row.latency is not None or row.outcome in MARKS}
    return [name for name in PEERS if name in seen]


def bars(axes: "Axes", record: Record, curve: Sequence[Case], peers: Sequence[str], what: str) -> None:
    """Grouped bars of throughput, whiskers from p20 to p80, numbers on top; a word where there is no number."""
    width = 0.84 / len(peers)
    _, scale = throughput_unit(record)
    top = 0.0
    for place, peer in enumerate(peers):
        for i, case in enumerate(curve):
            row = record.row(case.name, peer, what)
            x = i + (place - (len(peers) - 1) / 2) * width
            if row is None or row.latency is None or row.tflops is None:
                word = MARKS.get(row.outcome, "") if row else ""
                axes.text(x, 0, word, rotation=90, ha="center", va="bottom", fontsize=7, color=COLOURS.get(peer))
                continue
            height = scale * row.tflops
            slowest, fastest = (height * row.latency.median / t for t in (row.latency.p80, row.latency.p20))
            axes.bar(x, height, width, color=COLOURS.get(peer), label=label(peer))
            axes.errorbar(x, height, [[height - slowest], [fastest - height]], color="#777777", lw=0.8)
            number = f" {height:.2g}" if height < 10 else f" {height:.0f}"
            axes.text(x, fastest, number, rotation=90, ha="center", va="bottom", fontsize=7)
            top = max(top, fastest)
    axes.set_xticks(range(len(curve)), [short(case.seqlen_k) for case in curve])
    axes.set_ylim(0, 1.2 * top or 1)  # room for the numbers


def draw_throughput(record: Record, what: str, path: Path) -> Path | None:
    """Throughput against sequence length: a panel for each head_dim and mask, bars for each peer."""
    timed = {
        key: [case for case in curve if any((r := record.row(case.name, p, what)) and r.latency for p in PEERS)]
        for key, curve in curves(record).items()
    }
    timed = {key: curve for key, curve in timed.items() if curve}
    if not timed:
        return None
    head_dims, masks = sorted({key[0] for key in timed}), sorted({key[1] for key in timed})
    drawn, panels = figure(len(head_dims), len(masks), 5.6, 3.4)
    peers = shown_peers(record, [case for curve in timed.values() for case in curve], what)
    handles: dict[str, Artist] = {}
    for line, head_dim in zip(panels, head_dims, strict=True):
        for axes, causal in zip(line, masks, strict=True):
            curve = timed.get((head_dim, causal), [])
            if not curve:
                axes.set_axis_off()
                continue
            bars(axes, record, curve, peers, what)
            axes.set_title(f"head_dim {head_dim}, {'causal' if causal else 'full'}, {curve[0].dtype}", fontsize=10)
            axes.set_xlabel("sequence length")
            axes.set_ylabel(f"{throughput_unit(record)[0]} (more is better)")
            found, names = axes.get_legend_handles_labels()
            handles |= dict(zip(names, found, strict=True))
    columns = min(len(handles), 6)
    drawn.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=columns, fontsize=9)
    return finish(drawn, f"Throughput of attention, {NAMES[what]}", record, path)


def gains(record: Record, what: str) -> list[tuple[str, dict[str, float], str]]:
    """(case, speed-up, dtype) of every row of ours that has one."""
    rows = [(case, record.row(case.name, OURS, what)) for case in ordered(record)]
    return [(case.name, row.speedup, case.dtype) for case, row in rows if row is not None and row.speedup]


def draw_speedup(record: Record, path: Path) -> Path | None:
    """Speed-up of ours over standard attention, every case, bars with spread."""
    found = {what: gains(record, what) for what in ("forward", "both")}
    count = max(map(len, found.values()))
    if not count:
        return None
    drawn, panels = figure(1, 2, 5.6, 1.6 + 0.22 * count)
    for axes, what in zip(panels[0], found, strict=True):
        found_here = found[what][::-1]
        for y, (_, gain, _) in enumerate(found_here):
            middle, low, high = gain["median"], gain["low"], gain["high"]
            axes.barh(y, middle, color=COLOURS[OURS])
            axes.errorbar(middle, y, xerr=[[middle - low], [high - middle]], color="#333333", lw=1, capsize=2)
            behind = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
            axes.text(high, y, f" {middle:.2f}x", va="center", fontsize=8, bbox=behind)
        axes.axvline(1, color=COLOURS[STANDARD], lw=1, ls="--")
        axes.set_yticks(range(len(found_here)), [name for name, _, _ in found_here], fontsize=8)
        axes.margins(x=0.15, y=0.02)
        axes.set_xlim(left=0)
        axes.set_xlabel("times as fast as standard attention (dashed = 1)")
        axes.set_title(f"{NAMES[what]}, {found[what][0][2] if found[what] else ''}", fontsize=10)
    return finish(drawn, "Speed-up of flash over standard attention, with p20-p80 spread", record, path)


def draw_features(record: Record, path: Path) -> Path | None:
    """Milliseconds of each feature, a bar for each peer, beside it the cost over that peer's plain call."""
    found = shapes_of(record, "feature")
    if not found:
        return None
    count = max(len(shape) * len(present(record, shape, "forward")) for shape in found)
    drawn, panels = figure(len(found), 2, 6.2, 1.4 + 0.17 * count)
    handles: dict[str, Artist] = {}
    for line, shape in zip(panels, found, strict=True):
        for axes, what in zip(line, ("forward", "both"), strict=True):
            feature_bars(axes, record, shape, what)
            axes.set_title(f"{NAMES[what]}: length {shape[0].seqlen_k}, {where(shape[0])}", fontsize=10)
            handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    columns = max(len(handles), 1)
    drawn.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=columns, fontsize=9)
    return finish(drawn, "Cost of features; numbers: times as long as the same library's plain call", record, path)


def feature_bars(axes: "Axes", record: Record, shape: Sequence[Case], what: str) -> None:
    """Grouped horizontal bars of milliseconds, whiskers from p20 to p80, the factor beside; a word without a number."""
    peers = present(record, shape, what)
    height = 0.84 / max(len(peers), 1)
    for place, peer in enumerate(peers):
        for y, case in enumerate(shape):
            row = record.row(case.name, peer, what)
            middle = y + (place - (len(peers) - 1) / 2) * height
            if row is None or row.latency is None:
                word = MISSING.get(row.outcome, "") if row else ""
                axes.text(0, middle, f" {word}", va="center", fontsize=6, color=COLOURS.get(peer))
                continue
            low, time, high = row.latency.p20, row.latency.median, row.latency.p80
            axes.barh(middle, time, height, color=COLOURS.get(peer), label=label(peer))
            axes.errorbar(time, middle, xerr=[[time - low], [high - time]], color="#777777", lw=0.8)
            cost = factor(record, shape, case, peer, what)
            axes.text(high, middle, "" if cost is None else f" {cost:.2f}x", va="center", fontsize=6)
    axes.set_yticks(range(len(shape)), [case.label for case in shape], fontsize=8)
    axes.set_ylim(len(shape) - 0.5, -0.5)
    axes.margins(x=0.12)
    axes.set_xlim(left=0)
    axes.set_xlabel("milliseconds (less is better)")


def draw_long(record: Record, path: Path) -> Path | None:
    """Time and peak memory against length, log-log, a row of panels for each feature and pass."""
    passes = [(curve, what) for curve in long_curves(record) for what in ("forward", "both")]
    passes = [(curve, what) for curve, what in passes if present(record, curve, what)]
    if not passes:
        return None
    drawn, panels = figure(len(passes), 2, 5.4, 3.8)
    for line, (curve, what) in zip(panels, passes, strict=True):
        for axes, memory in zip(line, (False, True), strict=True):
            for peer in present(record, curve, what):
                rows = [(case.seqlen_k, record.row(case.name, peer, what)) for case in curve]
                times = [(n, row.latency.median) for n, row in rows if row and row.latency]
                points = memory_points(record, curve, peer, what) if memory else times
                points = [(n, y / MILLION if memory else y) for n, y in points]
                fit = slope(points[-3:])
                text = label(peer) + (f", slope {fit:.2f}" if fit is not None else "")
                wide = 2 if peer == OURS else 1
                style: dict[str, Any] = {"linewidth": 1.5 * wide, "markersize": 4 * wide, "zorder": 4 - wide}
                if points:
                    axes.plot(*zip(*points, strict=True), "o-", color=COLOURS.get(peer), label=text, **style)
            lost_lengths(axes, record, curve, what, memory)
            axes.set_yscale("log")
            axes.margins(y=0.4)  # room for the words above
            lengths = [case.seqlen_k for case in curve]
            seqlen_axis(axes, lengths)
            axes.set_xlim(lengths[0] / 1.4, lengths[-1] * 1.4)
            axes.set_ylabel("MB, beyond inputs and outputs" if memory else "milliseconds")
            axes.set_title(f"{curve[0].label}, causal, {NAMES[what]}: {where(curve[0])}", fontsize=9)
            axes.grid(alpha=0.3)
            if axes.lines:
                axes.legend(fontsize=7, loc="lower right")
    return finish(drawn, "Long sequences: time and peak memory; slope of the last three lengths", record, path)


def lost_lengths(axes: "Axes", record: Record, curve: Sequence[Case], what: str, memory: bool) -> None:
    """Writes above a length why a peer has no number there, the peers of one reason below its word."""
    for case in curve:
        found: dict[str, list[str]] = {}
        for peer in present(record, curve, what):
            row = record.row(case.name, peer, what)
            outcome = (row.peak_outcome if memory else row.outcome) if row else ""
            if outcome in MISSING:
                found.setdefault(f"{MISSING[outcome]}:", []).append(peer)
        words = [word for reason, peers in found.items() for word in (reason, *peers)]
        axes.annotate("\n".join(words), (case.seqlen_k, 0.98), xycoords=("data", "axes fraction"),
                      ha="center", va="top", fontsize=6)  # fmt: skip


def draw(record: Record, out: Path) -> list[Path]:
    """Writes every picture the record has numbers for and returns their paths."""
    drawn = [draw_memory(record, out / "memory.png"), draw_speedup(record, out / "speedup.png")]
    drawn += [draw_features(record, out / "features.png"), draw_long(record, out / "long-context.png")]
    drawn += [draw_throughput(record, what, out / f"throughput-{what}.png") for what in PASSES]
    return [path for path in drawn if path is not None]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m bench.plot", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("path", type=Path, help="bench/results/<machine>/results.json, features.json or long.json")
    source = parser.parse_args().path
    for picture in draw(records.load(source), source.parent):
        print(picture)
