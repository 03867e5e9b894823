"""The speed suite as numbers and text: ours beside each peer, beside the best of them, beside a matrix product.

    python -m bench.race bench/results/<machine>/speed.json     # compiles, writes and draws again what a run measured

Every figure compares medians of the same run on the same machine; spreads are from the 20th to the 80th percentile.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from bench import overlap
from bench import record as records
from bench.cases import PASSES, Case
from bench.peers import FLEX, OURS, OURS_ALL, PEERS, TUTORIAL
from bench.record import Record, Row
from bench.report import (
    NAMES,
    SHOUTED,
    Figure,
    digits,
    environment,
    figure_table,
    ordered,
    reasons,
    table,
    throughput_unit,
)

COMPILE_GRACE = 25.0  # seconds beyond the deadline for the compile report
# What this project wants to reach on an H200 in bfloat16, TFLOP/s.
TARGETS = (
    ("d128 full 8192", "forward", 610.0),
    ("d128 causal 8192", "forward", 580.0),
    ("d64 full 8192", "forward", 480.0),
    ("d256 causal 8192", "forward", 600.0),
    ("d128 full 8192", "backward", 470.0),
    ("d128 causal 8192", "backward", 430.0),
)
LEAD = 1.3  # over attention written in Triton
RIVALS = (TUTORIAL, FLEX)
LEAD_CASES = ("d128 full 8192", "d128 causal 8192", "d64 full 8192", "d64 causal 8192")


def ceiling(record: Record) -> float | None:
    """The best rate of a matrix product that the run, and those it resumed, measured, in TFLOP/s."""
    rates = [found["tflops"] for found in record.speed.get("ceilings", [])]
    return max(rates) if rates else None


def rivals(record: Record, case: Case, what: str) -> dict[str, Row]:
    """The rows of peers that are not ours and have a timing."""
    rows = {peer: record.row(case.name, peer, what) for peer in PEERS if peer not in OURS_ALL}
    return {peer: row for peer, row in rows.items() if row is not None and row.latency is not None}


def outcome(row: Row, top: float | None) -> dict[str, Any]:
    """A row in short: its rate with its spread and its share of the ceiling, or why it has none."""
    if row.latency is None or row.tflops is None:
        return {"outcome": row.outcome, "reason": row.reason}
    low, high = (row.tflops * row.latency.median / t for t in (row.latency.p80, row.latency.p20))
    share = row.tflops / top if top else None
    return {"outcome": row.outcome, "tflops": row.tflops, "low": low, "high": high, "of_ceiling": share}


def standing(record: Record, case: Case, what: str) -> dict[str, Any]:
    """One case and pass: every peer's outcome, and ours over each and over the best; None where one has no timing."""
    rows = {peer: row for peer in PEERS if (row := record.row(case.name, peer, what))}
    ours, others = rows.get(OURS), rivals(record, case, what)
    best = min(others, key=lambda peer: others[peer].latency.median, default=None)  # type: ignore[union-attr]
    ratios: dict[str, float] = {}
    if ours is not None and ours.latency is not None:
        timed = {peer: row.latency for peer, row in rows.items() if peer != OURS and row.latency is not None}
        ratios = {peer: took.median / ours.latency.median for peer, took in timed.items()}
    return {
        "case": case.name,
        "pass": what,
        "peers": {peer: outcome(row, ceiling(record)) for peer, row in rows.items()},
        "best_peer": best,
        "over_best": ratios.get(best) if best else None,
        "over_each": ratios,
    }


def race(record: Record) -> list[dict[str, Any]]:
    """Every case and pass that has a row."""
    return [
        standing(record, case, what)
        for what in PASSES
        for case in ordered(record)
        if any(record.row(case.name, peer, what) for peer in PEERS)
    ]


def finish(record: Record, deadline: float = float("inf")) -> None:
    """Compile what was timed and write the comparison into the record."""
    overlap.compile_all(record, deadline + COMPILE_GRACE)
    record.speed["race"] = race(record)


def racers(record: Record, what: str) -> list[str]:
    """The peers with a number, or with a failure that is no absence, in the order of PEERS."""
    silent = ("absent", "skipped", "untimed")
    shown = {row.peer for row in record.rows.values() if row.what == what and row.outcome not in silent}
    return [peer for peer in PEERS if peer in shown]


def rate(found: dict[str, Any] | None, scale: float) -> str:
    """A rate and half its spread in percent, or the outcome."""
    if found is None:
        return ""
    if "tflops" not in found:
        return SHOUTED.get(found["outcome"], str(found["outcome"]))
    return f"{digits(scale * found['tflops'])} ±{50 * (found['high'] - found['low']) / found['tflops']:.0f}%"


def times(ratio: float | None) -> str:
    """A ratio as tables have it."""
    return "" if ratio is None else f"{ratio:.2f}x"


def rates(record: Record, found: Sequence[dict[str, Any]], what: str) -> str:
    """The table of a pass: cases down, rates of the peers across, then the best peer, ours over it, and the ceiling."""
    peers = racers(record, what)
    lines = []
    unit, scale = throughput_unit(record)
    for each in found:
        if each["pass"] != what:
            continue
        share = each["peers"].get(OURS, {}).get("of_ceiling")
        cells = [rate(each["peers"].get(peer), scale) for peer in peers]
        best = [each["best_peer"] or "", times(each["over_best"]), "" if share is None else f"{share:.0%}"]
        lines.append([each["case"], *cells, *best])
    if not lines or not peers:
        return ""
    header = ["case", *peers, "best peer", f"{OURS} / best", f"{OURS} of the ceiling"]
    return f"## {NAMES[what].capitalize()}, {unit}\n\n{table(header, lines)}"


def ratios(record: Record, found: Sequence[dict[str, Any]], what: str) -> str:
    """The table of a pass: how many times as fast as each peer ours is."""
    peers = [peer for peer in racers(record, what) if peer != OURS]
    lines = [
        [each["case"], *(times(each["over_each"].get(peer)) for peer in peers)]
        for each in found
        if each["pass"] == what and each["over_each"]
    ]
    if not lines or not peers:
        return ""
    return f"## {OURS} over each, {NAMES[what]}\n\n{table(['case', *peers], lines)}"


def ceilings(record: Record) -> str:
    """The matrix products, and the clocks under them."""
    unit, scale = throughput_unit(record)
    lines = [
        [found["date"], found["dtype"], n, *(digits(scale * product[name]) for name in ("tflops", "low", "high"))]
        for found in record.speed.get("ceilings", [])
        for n, product in found["sizes"].items()
    ]
    if not lines:
        return ""
    header = ["measured", "dtype", "n", f"median {unit}", "p80 time", "p20 time"]
    told = [f"{found['date']}: {read(found['clocks'])}" for found in record.speed["ceilings"]]
    told += [f"after {case}: {read(found)}" for case, found in record.speed.get("clocks", {}).items()]
    told = [line for line in told if ": not read: " not in line] or [told[0]]
    clocks = "Clocks, power, temperature:\n\n" + "\n".join(f"- {line}" for line in told)
    return f"## The ceiling: an n x n x n matrix product\n\n{table(header, lines)}\n\n{clocks}"


def read(clocks: dict[str, str]) -> str:
    """Clocks in words."""
    if "absent" in clocks:
        return f"not read: {clocks['absent']}"
    return ", ".join(f"{name} {value}" for name, value in clocks.items())


def schedules(record: Record) -> str:
    """What the compiler made of our tiles: one line for kernels that are the same, with the lengths they ran at."""
    lengths: dict[tuple[str, ...], list[str]] = {}
    for each in overlap.of(record):
        case, found = each.case, each.found
        if "absent" in found:
            told = ["", "", "", found["absent"]]
        else:
            hidden = "none in a wgmma loop" if found["hidden"] is None else f"{found['hidden']:.0%}"
            note = "ptxas serialises wgmma" if found["serialized"] else ""
            told = [hidden, str(found["registers"]), str(found["spill_bytes"]), note]
        group = f", {case.group} heads a key head" if case.group > 1 else ""
        shape = f"d{case.head_dim} {'causal' if case.causal else 'full'}{group}"
        key = (each.backend, each.kernel, shape, " ".join(map(str, each.config.values())), *told)
        lengths.setdefault(key, []).append(str(case.seqlen_k))
    if not lengths:
        return ""
    lines = [[*key[:4], " ".join(sorted(set(at), key=int)), *key[4:]] for key, at in lengths.items()]
    header = ["backend", "kernel", "shape", "tiles", "lengths", "hidden", "registers", "spilled bytes", "note"]
    about = "Hidden: exponentials issued under a matrix product, by the compiled code; not a measurement."
    return f"## Overlap, from the compile report\n\n{about}\n\n{table(header, lines)}"


def summary(record: Record, found: Sequence[dict[str, Any]]) -> str:
    """Ours over the best peer of each case, in a line a pass."""
    lines = []
    for what in PASSES:
        over = {each["case"]: each["over_best"] for each in found if each["pass"] == what and each["over_best"]}
        if over:
            worst, best = min(over, key=lambda name: over[name]), max(over, key=lambda name: over[name])
            lines.append(
                f"- {NAMES[what]}: median {median(over.values()):.2f}x, from {over[worst]:.2f}x ({worst}) "
                f"to {over[best]:.2f}x ({best}); ahead in {sum(x > 1 for x in over.values())} of {len(over)}"
            )
    return f"## {OURS} over the best peer of each case\n\n" + "\n".join(lines) if lines else ""


def cost(record: Record) -> str:
    """Where the time of the run went, checks and compiling included, so that the next one can be planned."""
    seconds: dict[str, list[float]] = {}
    for spent in record.speed.get("seconds", {}).values():
        for peer, took in spent.items():
            seconds.setdefault(peer, []).append(took)
    told = [f"{peer} {sum(took):.0f} s in {len(took)} cases" for peer, took in seconds.items() if sum(took) >= 1]
    return f"Time spent, compiling and checks included: {', '.join(told)}." if told else ""


def figures(record: Record) -> list[Figure]:
    """The figures to reach on a GPU, as far as the run measured them; none on a CPU."""
    if record.machine["device"] != "cuda":
        return []
    found, top = [], ceiling(record)
    for case, what, target in TARGETS:
        row = record.row(case, OURS, what)
        reached = row.tflops if row else None
        share = f"{reached / top:.0%} of the ceiling" if reached and top else row.reason if row else ""
        found.append(Figure(f"{case}, {NAMES[what]}, TFLOP/s", target, reached, True, share))
    for rival in RIVALS:
        for what in ("forward", "backward"):
            for case in LEAD_CASES:
                ours, theirs = (record.row(case, peer, what) for peer in (OURS, rival))
                ratio, note = None, theirs.reason if theirs else ""
                if ours and theirs and ours.latency and theirs.latency:
                    ratio = theirs.latency.median / ours.latency.median
                found.append(Figure(f"{case}, {NAMES[what]}, times {rival}", LEAD, ratio, True, note[:60]))
    return found


def report(record: Record) -> str:
    """The whole race as Markdown; the figures to reach come last, where a terminal shows them."""
    found = race(record)
    parts = [environment(record), ceilings(record)]
    parts += [part for what in PASSES for part in (rates(record, found, what), ratios(record, found, what))]
    parts += [schedules(record), reasons(record), cost(record), summary(record, found), figure_table(figures(record))]
    if record.machine["device"] != "cuda":
        parts.append("No GPU speed is measured here: a CPU says that the suite works, and nothing of the kernels.")
    return "\n\n".join(part for part in parts if part) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: compile what is missing, write and draw again."""
    from bench.race_plot import draw

    parser = argparse.ArgumentParser(prog="python -m bench.race", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("path", type=Path, help="bench/results/<machine>/speed.json, of --suite speed")
    path = parser.parse_args(argv).path
    record = records.load(path)
    finish(record)
    record.save(path)
    path.with_suffix(".md").write_text(report(record))
    for picture in draw(record, path.parent, path.stem):
        print(picture)


if __name__ == "__main__":
    main()
