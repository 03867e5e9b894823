"""The speed suite as pictures: rates beside the ceiling of a matrix product, and ours over the best peer."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.cases import PASSES, Case
from bench.peers import OURS
from bench.plot import bars, figure, finish, seqlen_axis, short, shown_peers
from bench.race import ceiling, race
from bench.record import Record
from bench.report import NAMES, curves, throughput_unit

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

MASKS = ("full", "causal")
SHADES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")  # of Okabe and Ito: one a head_dim


def panels_of(record: Record) -> list[list[tuple[str, list[Case]]]]:
    """Lines of panels, full and causal: a line for each head_dim, then one for heads that share keys."""
    lines = []
    sweep = curves(record)
    for head_dim in sorted({key[0] for key in sweep}):
        pair = [(f"head_dim {head_dim}, {mask}", sweep.get((head_dim, mask == "causal"), [])) for mask in MASKS]
        lines.append(pair)
    shared = sorted((case for case in record.cases.values() if case.series == "model"), key=lambda c: c.seqlen_k)
    if shared:
        first = shared[0]
        about = f"{first.heads} heads, {first.heads_k} of keys, head_dim {first.head_dim}"
        lines.append([(f"{about}, {mask}", [c for c in shared if c.causal == (mask == "causal")]) for mask in MASKS])
    return lines


def tick(case: Case) -> str:
    """A case on the axis of lengths; a published model's by its name too."""
    generated = case.series == "sweep" or case.name.startswith("gqa")
    return short(case.seqlen_k) + ("" if generated else f"\n{case.name}")


def draw_rates(record: Record, what: str, path: Path) -> Path | None:
    """Grouped bars of a pass: a panel for each head_dim and mask, the ceiling dashed."""
    lines = panels_of(record)
    cases = [case for line in lines for _, curve in line for case in curve]
    peers = shown_peers(record, cases, what)
    if not any((row := record.row(case.name, peer, what)) and row.latency for case in cases for peer in peers):
        return None
    longest = max(len(curve) for line in lines for _, curve in line)
    width = max(1.2 + 0.11 * longest * (len(peers) + 1.5), 5.5)
    drawn, panels = figure(len(lines), 2, width, 3.5)
    unit, scale = throughput_unit(record)
    top = ceiling(record)
    handles: dict[str, Artist] = {}
    for axes_of_line, line in zip(panels, lines, strict=True):
        for axes, (title, curve) in zip(axes_of_line, line, strict=True):
            if not curve:
                axes.set_axis_off()
                continue
            bars(axes, record, curve, peers, what)
            axes.set_xticks(range(len(curve)), [tick(case) for case in curve])
            if top is not None:
                axes.axhline(scale * top, color="#333333", lw=1, ls="--", label="matrix product of this run")
                axes.set_ylim(0, max(axes.get_ylim()[1], 1.08 * scale * top))
            axes.set_title(f"{title}, {curve[0].dtype}", fontsize=10)
            axes.set_xlabel("sequence length")
            axes.set_ylabel(f"{unit} (more is better)")
            found, names = axes.get_legend_handles_labels()
            handles |= dict(zip(names, found, strict=True))
    columns = min(len(handles), 6)
    drawn.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=columns, fontsize=9)
    return finish(drawn, f"Attention side by side, {NAMES[what]}", record, path)


def draw_ratio(record: Record, path: Path) -> Path | None:
    """Ours over the best peer against length: a panel for each pass, a line for each head_dim and mask."""
    over = {(each["case"], each["pass"]): each["over_best"] for each in race(record) if each["over_best"]}
    if not over:
        return None
    drawn, panels = figure(1, len(PASSES), 5.2, 4.6)
    handles: dict[str, Artist] = {}
    for axes, what in zip(panels[0], PASSES, strict=True):
        lengths = ratio_lines(axes, record, over, what)
        axes.axhline(1, color="#000000", lw=1, ls="--")
        if lengths:
            seqlen_axis(axes, sorted(lengths))
        axes.set_ylim(0, 1.15 * max([1.0, *(ratio for (_, of), ratio in over.items() if of == what)]))
        axes.set_ylabel("times as fast as the best peer (dashed = 1)")
        axes.set_title(NAMES[what], fontsize=10)
        axes.grid(alpha=0.3)
        handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    drawn.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=4, fontsize=9)
    return finish(drawn, f"{OURS} over the best peer of each case (more is better)", record, path)


def ratio_lines(axes: "Axes", record: Record, over: dict[tuple[str, str], float], what: str) -> set[int]:
    """Draws the lines of a pass; the lengths that they have points at."""
    lengths: set[int] = set()
    for shade, line in enumerate(panels_of(record)):
        for mask, (title, curve) in zip(MASKS, line, strict=True):
            points = {case.seqlen_k: over[case.name, what] for case in curve if (case.name, what) in over}
            if points:
                style = "o-" if mask == "full" else "^:"
                shown: dict[str, Any] = {"color": SHADES[shade % len(SHADES)], "label": title, "markersize": 4}
                axes.plot(list(points), list(points.values()), style, **shown)
                lengths |= points.keys()
    return lengths


def draw(record: Record, out: Path, stem: str = "speed") -> list[Path]:
    """Writes every picture that the record has numbers for, named after the stem, and returns their paths."""
    drawn = [draw_rates(record, what, out / f"{stem}-{what}.png") for what in PASSES]
    drawn.append(draw_ratio(record, out / f"{stem}-ratio.png"))
    return [path for path in drawn if path is not None]
