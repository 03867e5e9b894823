"""A run as text: tables in Markdown that read well on a terminal, and the figures this project wants to reach.

Features and long sequences have tables of their own, beside those of the sweep and the models.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from bench import record as records
from bench.cases import PASSES, Case
from bench.features import FEATURES, find
from bench.peers import OURS, PEERS, STANDARD
from bench.record import Record, Row

NAMES = {"forward": "forward", "backward": "backward", "both": "forward + backward"}
SHOUTED = {"wrong": "WRONG", "oom": "OOM", "error": "ERROR", "skipped": "skipped", "absent": "absent", "untimed": ""}
MILLION = 1e6


@dataclass(frozen=True)
class Figure:
    """One figure to reach.

    Args:
        name: what it is.
        target: the number to reach.
        reached: the measured number, None where the run did not measure it.
        at_least: whether more is better (a speed-up) or less (a slope, a share).
        note: what is measured in, the spread.
    """

    name: str
    target: float
    reached: float | None
    at_least: bool
    note: str = ""

    @property
    def met(self) -> bool:
        """Whether the measured number is on the right side of the target."""
        if self.reached is None:
            return False
        return self.reached >= self.target if self.at_least else self.reached <= self.target


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table, first column to the left, the others to the right, aligned."""
    widths = [max(len(line[i]) for line in [header, *lines]) for i in range(len(header))]

    def row(cells: Sequence[str]) -> str:
        sized = zip(cells, widths, strict=True)
        return "| " + " | ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(sized)) + " |"

    rule = "|" + "|".join("-" * (w + 1) + (":" if i else "-") for i, w in enumerate(widths)) + "|"
    return "\n".join([row(header), rule, *map(row, lines)])


def slope(points: Sequence[tuple[float, float]]) -> float | None:
    """Slope of the least-squares line through (log x, log y); None with fewer than two points above zero."""
    logs = [(math.log(x), math.log(y)) for x, y in points if y > 0]
    if len(logs) < 2:
        return None
    mean_x, mean_y = (sum(column) / len(logs) for column in zip(*logs, strict=True))
    rise: float = sum((x - mean_x) * (y - mean_y) for x, y in logs)
    run: float = sum((x - mean_x) ** 2 for x, _ in logs)
    return rise / run


def curves(record: Record) -> dict[tuple[int, bool], list[Case]]:
    """The sweep's cases by (head_dim, causal), by increasing length."""
    found: dict[tuple[int, bool], list[Case]] = {}
    for case in sorted(record.cases.values(), key=lambda c: (c.head_dim, c.causal, c.seqlen_k)):
        if case.series == "sweep":
            found.setdefault((case.head_dim, case.causal), []).append(case)
    return found


def ordered(record: Record) -> list[Case]:
    """The cases in the order they are shown: curve by curve, then the models."""
    models = [case for case in record.cases.values() if case.series == "model"]
    return [case for curve in curves(record).values() for case in curve] + models


def memory_points(record: Record, curve: Sequence[Case], peer: str, what: str) -> list[tuple[int, float]]:
    """(seqlen, peak bytes of one sequence) where it was measured."""
    rows = [(case, record.row(case.name, peer, what)) for case in curve]
    return [(c.seqlen_k, r.peak_bytes / c.batch) for c, r in rows if r is not None and r.peak_bytes is not None]


def memory_curves(record: Record) -> list[list[Case]]:
    """The curves that have peak memory of standard attention and of ours."""
    return [
        curve
        for curve in curves(record).values()
        if all(memory_points(record, curve, peer, "both") for peer in (STANDARD, OURS))
    ]


def throughput_unit(record: Record) -> tuple[str, float]:
    """The unit that gives numbers of a readable size, and its part of a TFLOP/s."""
    return ("TFLOP/s", 1.0) if record.machine["device"] == "cuda" else ("GFLOP/s", 1e3)


def digits(x: float) -> str:
    """Three significant digits, never an exponent for what is measured here."""
    return f"{x:.0f}" if x >= 100 else f"{x:.3g}"


def timing_cell(row: Row | None, scale: float) -> str:
    """Median milliseconds, half the p20-p80 spread in percent, throughput; or the outcome."""
    if row is None:
        return ""
    if row.latency is None or row.tflops is None:
        return SHOUTED.get(row.outcome, row.outcome)
    spread = 50 * (row.latency.p80 - row.latency.p20) / row.latency.median
    slower = " <" if row.peer == OURS and row.slower_than else ""
    return f"{digits(row.latency.median)} ±{spread:.0f}% {digits(scale * row.tflops)}{slower}"


def timings(record: Record, what: str) -> str:
    """One table of a pass: cases down, peers across."""
    timed = {key for key in record.rows if key[2] == what and record.rows[key].outcome != "untimed"}
    present = {key[1] for key in timed if record.rows[key].outcome not in ("absent", "skipped")}
    peers = [name for name in PEERS if name in present] + sorted(present - set(PEERS))
    names = [case.name for case in ordered(record) if any(key[0] == case.name for key in timed)]
    if not names or not peers:
        return ""
    _, scale = throughput_unit(record)
    lines = [[name, *(timing_cell(record.row(name, peer, what), scale) for peer in peers)] for name in names]
    return f"## {NAMES[what].capitalize()}\n\n" + table(["case", *peers], lines)


def shares(record: Record, curve: Sequence[Case], what: str) -> str:
    """The memory-savings table of the flash-attention guides for one curve and one pass."""

    def median(row: Row | None) -> str:
        if row is None:
            return ""
        return digits(row.latency.median) if row.latency else SHOUTED.get(row.outcome, row.outcome)

    lines = []
    for case in curve:
        theirs, ours = (record.row(case.name, peer, what) for peer in (STANDARD, OURS))
        known = theirs and ours and theirs.peak_bytes is not None and ours.peak_bytes is not None
        ratio = f"{(theirs.peak_bytes or 0) / max(ours.peak_bytes or 0, 1):.0f}x" if known and theirs and ours else ""
        gain = f"{ours.speedup['median']:.2f}x" if ours and ours.speedup else ""
        memory = [megabytes(theirs), megabytes(ours), ratio]
        lines.append([str(case.seqlen_k), *memory, median(theirs), median(ours), gain])
    header = ["sequence length", "standard MB", "flash MB", "ratio", "standard ms", "flash ms", "speed-up"]
    first = curve[0]
    mask = "causal" if first.causal else "full"
    caption = f"## Memory saved: {NAMES[what]}, {mask}, head_dim {first.head_dim}, {first.dtype}"
    return f"{caption}\n\n{table(header, lines)}"


def shapes_of(record: Record, series: str) -> list[list[Case]]:
    """The cases of a series, one list for each shape but for its feature, its mask and its length."""
    found: dict[tuple[int, int, str], list[Case]] = {}
    for case in record.cases.values():
        if case.series == series:
            found.setdefault((case.heads, case.head_dim, case.dtype), []).append(case)
    return list(found.values())


def long_curves(record: Record) -> list[list[Case]]:
    """Long sequences by feature, each by increasing length."""
    found: dict[tuple[str, int], list[Case]] = {}
    for shape in shapes_of(record, "long"):
        for case in sorted(shape, key=lambda c: c.seqlen_k):
            found.setdefault((case.feature, case.head_dim), []).append(case)
    return list(found.values())


def present(record: Record, cases: Sequence[Case], what: str) -> list[str]:
    """The peers that have a number or ran into something in these cases, in the order of PEERS."""
    rows = [row for case in cases for name in PEERS if (row := record.row(case.name, name, what))]
    there = {row.peer for row in rows if row.outcome not in ("absent", "skipped", "untimed") or row.peak_outcome}
    return [name for name in PEERS if name in there]


def factor(record: Record, shape: Sequence[Case], case: Case, peer: str, what: str) -> float | None:
    """A peer's time on a case over its own time on the plain one of that shape; None where one is missing."""
    plain = next((c for c in shape if c.label == "plain"), None)
    own, base = (record.row(c.name, peer, what) if c else None for c in (case, plain))
    if own is None or base is None or own.latency is None or base.latency is None:
        return None
    return own.latency.median / base.latency.median


def where(case: Case) -> str:
    """A case's shape for a heading."""
    return f"batch {case.batch}, {case.heads} heads, head_dim {case.head_dim}, {case.dtype}"


def milliseconds(row: Row | None) -> str:
    """Median and half the p20-p80 spread, or the outcome."""
    if row is None or row.latency is None:
        return SHOUTED.get(row.outcome, row.outcome) if row else ""
    spread = 50 * (row.latency.p80 - row.latency.p20) / row.latency.median
    return f"{digits(row.latency.median)} ±{spread:.0f}%"


def costs(record: Record, shape: Sequence[Case], what: str) -> str:
    """One table of a pass: features down, peers across, with the cost over the plain call of the same peer."""
    peers = present(record, shape, what)
    if not peers:
        return ""

    def cell(case: Case, peer: str) -> str:
        row = record.row(case.name, peer, what)
        cost = factor(record, shape, case, peer, what)
        slower = " <" if row and peer == OURS and row.slower_than else ""
        return milliseconds(row) + (f" {cost:.2f}x" if cost is not None else "") + slower

    lines = [[case.label, *(cell(case, peer) for peer in peers)] for case in shape]
    caption = f"## Cost of features: {NAMES[what]}, length {shape[0].seqlen_k}, {where(shape[0])}"
    legend = (
        "Cells: median milliseconds, ± half the p20-p80 spread, times the same peer's plain call; < = a peer is faster."
    )
    return f"{caption}\n\n{legend}\n\n{table(['feature', *peers], lines)}"


def bias_gradients(record: Record) -> str:
    """What the gradient of a bias costs, of a number for each pair and of one for each key."""
    lines = []
    for shape in shapes_of(record, "feature"):
        by_label = {case.label: case for case in shape}
        for label, size in (("bias", "[1, heads, seqlen_q, seqlen_k]"), ("key bias", "[batch, 1, 1, seqlen_k]")):
            pair = [by_label.get(name) for name in (label, f"{label} gradient")]
            for peer in present(record, shape, "both"):
                rows = [record.row(case.name, peer, "both") if case else None for case in pair]
                times = [row.latency.median for row in rows if row and row.latency]
                if len(times) == 2:
                    ratio = f"{times[1] / times[0]:.2f}x"
                    lines.append([f"{size}, head_dim {shape[0].head_dim}", peer, *map(milliseconds, rows), ratio])
    if not lines:
        return ""
    header = ["bias", "peer", "without its gradient, ms", "with it, ms", "cost"]
    return f"## Gradient of the bias: {NAMES['both']}\n\n{table(header, lines)}"


def megabytes(row: Row | None) -> str:
    """Peak memory, or the outcome; nothing where it was not asked for."""
    if row is None or not row.peak_outcome:
        return ""
    return f"{row.peak_bytes / MILLION:.1f}" if row.peak_bytes is not None else SHOUTED[row.peak_outcome]


def stretch(record: Record, curve: Sequence[Case], what: str) -> str:
    """One table of a feature over long sequences: lengths down, time and peak memory of each peer across."""
    peers = present(record, curve, what)
    if not peers:
        return ""
    rows = [(peer, record.row(case.name, peer, what)) for peer in peers for case in curve]
    weighed = [peer for peer in peers if any(row and row.peak_outcome for name, row in rows if name == peer)]
    lines = []
    for case in curve:
        times, peaks = ([record.row(case.name, peer, what) for peer in who] for who in (peers, weighed))
        lines.append([str(case.seqlen_k), *map(milliseconds, times), *map(megabytes, peaks)])
    header = ["sequence length", *(f"{peer} ms" for peer in peers), *(f"{peer} MB" for peer in weighed)]
    return f"## Long sequences: {curve[0].label}, causal, {NAMES[what]}, {where(curve[0])}\n\n{table(header, lines)}"


def reasons(record: Record) -> str:
    """Why a peer has no number, each reason once with the cases it holds for."""
    why: dict[tuple[str, str, str], list[str]] = {}
    for row in record.rows.values():
        for outcome, reason in ((row.outcome, row.reason), (row.peak_outcome, row.peak_reason)):
            if outcome not in ("ok", "untimed", ""):
                why.setdefault((row.peer, SHOUTED.get(outcome, outcome), reason), []).append(f"{row.case} {row.what}")
    if not why:
        return ""
    timed = {(row.case, row.what) for row in record.rows.values() if row.outcome != "untimed"}
    lines = []
    for (peer, outcome, reason), where in why.items():
        everywhere = len(where) == len(timed)
        places = "every case" if everywhere else ", ".join(where[:3])
        more = f" and {len(where) - 3} more" if not everywhere and len(where) > 3 else ""
        lines.append(f"- {peer}: {outcome}: {reason} ({places}{more})")
    return "## Without a number\n\n" + "\n".join(lines)


def slower(record: Record) -> str:
    """The rows where ours is not the fastest."""
    lines = []
    for row in record.rows.values():
        if row.peer != OURS or not row.slower_than or row.latency is None:
            continue
        best = min(
            (r for name in row.slower_than if (r := record.row(row.case, name, row.what)) and r.latency),
            key=lambda r: r.latency.median if r.latency else math.inf,
        )
        if best.latency:
            percent = 100 * (row.latency.median / best.latency.median - 1)
            lines.append(f"- {row.case}, {NAMES[row.what]}: {percent:.0f}% slower than {best.peer}")
    return "## Where flash is slower (marked <)\n\n" + "\n".join(lines) if lines else ""


def figures(record: Record) -> list[Figure]:
    """The figures to reach on a CPU, as far as this run measured them; none on a GPU, none of features."""
    if record.machine["device"] != "cpu" or not curves(record):
        return []
    found = []
    for what in ("forward", "both"):
        for mask in ("full", "causal"):
            row = record.row(f"d64 {mask} 4096", OURS, what)
            gain = row.speedup if row else None
            note = f"p20 to p80: {gain['low']:.2f} to {gain['high']:.2f}" if gain else ""
            reached = gain["median"] if gain else None
            found.append(Figure(f"{NAMES[what]} speed-up at 4096, {mask}", 2.5, reached, True, note))
    for what, target in (("forward", 100.0), ("both", 30.0)):
        rows = [record.row("d64 full 4096", peer, what) for peer in (STANDARD, OURS)]
        peaks = [row.peak_bytes for row in rows if row and row.peak_bytes is not None]
        ratio = peaks[0] / max(peaks[1], 1) if len(peaks) == 2 else None
        note = f"{peaks[0] / MILLION:.0f} MB against {peaks[1] / MILLION:.1f} MB" if len(peaks) == 2 else ""
        found.append(Figure(f"memory of standard over flash at 4096, {NAMES[what]}", target, ratio, True, note))
    curve = curves(record).get((64, False), [])
    for what in ("forward", "both"):
        points = memory_points(record, curve, OURS, what)
        note = f"{points[0][0]} to {points[-1][0]}" if points else ""
        found.append(Figure(f"slope of flash's memory, {NAMES[what]}", 1.1, slope(points), False, note))
    return found


def figure_lines(record: Record) -> str:
    """The figures as a table."""
    return figure_table(figures(record))


def figure_table(found: Sequence[Figure]) -> str:
    """Figures with their targets."""
    if not found:
        return ""
    lines = []
    for figure in found:
        reached = "not measured" if figure.reached is None else f"{figure.reached:.2f}"
        state = "" if figure.reached is None else "reached" if figure.met else "MISSED"
        sign = ">=" if figure.at_least else "<="
        lines.append([figure.name, f"{sign} {figure.target:g}", reached, state, figure.note])
    return "## Figures to reach\n\n" + table(["figure", "target", "measured", "", "spread or range"], lines)


def environment(record: Record) -> str:
    """The machine, the versions and how it was measured."""
    machine, settings = record.machine, record.settings
    versions: dict[str, str] = machine["versions"]
    lines = [f"# Benchmark: {records.title(machine)}", ""]
    shown = ("cpu", "cpu_clock", "cores", "threads", "load_average", "gpu", "gpu_clocks", "system", "date")
    lines += [f"- {name.replace('_', ' ')}: {machine[name]}" for name in shown if machine.get(name) is not None]
    installed = (f"{name} {number}" for name, number in versions.items() if number != "absent")
    lines.append("- versions: " + ", ".join(installed))
    effort = settings["effort"]
    lines.append(f"- seed {settings['seed']}; {settings['timer']}, {effort} (seconds); {settings['statistics']}")
    if settings["memory"]:
        lines.append(f"- peak memory: {settings['memory']}, above inputs, output and gradients")
    lines.append("- every timed result was first held to the float64 oracle: o and every gradient that is timed")
    extents: dict[str, list[str]] = {}
    for name, extent in record.checked.items():
        extents.setdefault(extent, []).append(name)
    lines += [f"  - {extent}: {', '.join(names)}" for extent, names in extents.items()]
    if machine["device"] == "cpu":
        lines.append("- no GPU was used: nothing here says anything about one")
    named = {find(case.feature)[0] for case in record.cases.values() if case.feature}
    lines += ["- features:"] * bool(named)
    lines += [f"  - {name}: {about.what}" for name, about in FEATURES.items() if name in named]
    return "\n".join(lines)


def report(record: Record) -> str:
    """The whole run as Markdown."""
    parts = [environment(record)]
    tables = [table for what in PASSES if (table := timings(record, what))]
    if tables:
        unit = throughput_unit(record)[0]
        parts.append(f"Cells: median milliseconds, ± half the p20-p80 spread, {unit}; < = a peer is faster.")
    parts += tables
    parts += [costs(record, shape, what) for shape in shapes_of(record, "feature") for what in ("forward", "both")]
    parts += [bias_gradients(record)]
    parts += [stretch(record, curve, what) for curve in long_curves(record) for what in ("forward", "both")]
    parts += [shares(record, curve, what) for curve in memory_curves(record) for what in ("forward", "both")]
    parts += [slower(record), reasons(record), figure_lines(record)]
    return "\n\n".join(part for part in parts if part) + "\n"
