"""The decode suite as numbers and text: microseconds, bytes read a second, and their share of a copy's rate.

    python -m bench.decode_report bench/results/<machine>/decode.json     # writes and draws again what a run measured

Every figure compares medians of the same run on the same machine; spreads are from the 20th to the 80th percentile.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import record as records
from bench.cases import DECODE_CACHES, Case
from bench.decode import cache_bytes, gigabytes_per_second
from bench.decode_peers import PEERS
from bench.peers import FLEX, OURS
from bench.record import Record, Row
from bench.report import SHOUTED, Figure, digits, environment, figure_table, reasons, table

# What this project wants to reach on an H200 in bfloat16.
SHARE = 0.9
RIVALS = (FLEX, "flash-attn-2")


def rate_of_copy(record: Record) -> float | None:
    """The best rate of a copy that the run, and those it resumed, measured, in 1e9 bytes a second."""
    rates = [found["gbps"] for found in record.speed.get("copies", [])]
    return max(rates) if rates else None


def share(record: Record, case: Case, peer: str) -> float | None:
    """The part of a copy's rate at which a peer read its cache; None without a timing."""
    row, top = record.row(case.name, peer, "forward"), rate_of_copy(record)
    rate = gigabytes_per_second(case, row) if row else None
    return rate / top if rate is not None and top else None


def ordered(record: Record, cache: str) -> list[Case]:
    """The cases of a cache by group, batch and length."""
    found = [case for case in record.cases.values() if case.cache == cache]
    return sorted(found, key=lambda c: (c.group, c.batch, c.seqlen_k))


def caches(record: Record) -> list[str]:
    """The kinds of cache of a record."""
    return [cache for cache in DECODE_CACHES if ordered(record, cache)]


def present(record: Record, cases: Sequence[Case]) -> list[str]:
    """The peers with a number, or with a failure that is no absence, in the order of PEERS."""
    rows = [row for case in cases for peer in PEERS if (row := record.row(case.name, peer, "forward"))]
    shown = {row.peer for row in rows if row.outcome not in ("absent", "skipped")}
    return [peer for peer in PEERS if peer in shown]


def best_peer(record: Record, case: Case) -> tuple[str, float] | None:
    """The fastest peer that is not ours and how many times as fast as it ours is; None where one is missing."""
    rows = {peer: record.row(case.name, peer, "forward") for peer in PEERS}
    times = {peer: row.latency.median for peer, row in rows.items() if row and row.latency}
    own = times.pop(OURS, None)
    if own is None or not times:
        return None
    best = min(times, key=lambda peer: times[peer])
    return best, times[best] / own


def standing(record: Record, case: Case) -> dict[str, Any]:
    """One case: bytes, and every peer's time and rate, or why it has none."""
    peers: dict[str, dict[str, Any]] = {}
    for peer in PEERS:
        row = record.row(case.name, peer, "forward")
        if row is not None and row.latency is not None:
            rate = gigabytes_per_second(case, row)
            took = {"microseconds": 1e3 * row.latency.median, "gbps": rate}
            peers[peer] = took | {"of_copy": share(record, case, peer)}
        elif row is not None:
            peers[peer] = {"outcome": row.outcome, "reason": row.reason}
    best = best_peer(record, case)
    found = {"case": case.name, "bytes": cache_bytes(case), "peers": peers}
    return found | {"best_peer": best and best[0], "over_best": best and best[1]}


def finish(record: Record) -> None:
    """Write the rates into the record."""
    record.speed["decode"] = [standing(record, case) for cache in caches(record) for case in ordered(record, cache)]


def cell(record: Record, case: Case, row: Row | None) -> str:
    """Microseconds with half their spread in percent, GB/s, share of a copy's rate; or the outcome."""
    if row is None or row.latency is None:
        return SHOUTED.get(row.outcome, row.outcome) if row else ""
    spread = 50 * (row.latency.p80 - row.latency.p20) / row.latency.median
    part = share(record, case, row.peer)
    rate = gigabytes_per_second(case, row) or 0.0
    return f"{digits(1e3 * row.latency.median)} ±{spread:.0f}% {digits(rate)} {'' if part is None else f'{part:.0%}'}"


def rates(record: Record, cache: str) -> str:
    """The table of a kind of cache: cases down, peers across, then the best peer and ours over it."""
    cases = ordered(record, cache)
    peers = present(record, cases)
    if not peers:
        return ""
    lines = []
    for case in cases:
        cells = [cell(record, case, record.row(case.name, peer, "forward")) for peer in peers]
        best = best_peer(record, case)
        beside = [best[0], f"{best[1]:.2f}x"] if best else ["", ""]
        shape = [f"{case.heads} / {case.heads_k}", str(case.batch), str(case.seqlen_k)]
        lines.append([*shape, f"{cache_bytes(case) / 1e6:.4g}", *cells, *beside])
    header = ["heads / of keys", "batch", "keys", "MB read", *peers, "best peer", f"{OURS} / best"]
    first = cases[0]
    return f"## Cache: {cache}; q {first.dtype}, head_dim {first.head_dim}\n\n{table(header, lines)}"


def copied(record: Record) -> str:
    """The copies, and the clocks under them."""
    lines = []
    for found in record.speed.get("copies", []):
        clocks = found["clocks"]
        told = clocks.get("absent") or ", ".join(f"{name} {value}" for name, value in clocks.items())
        rate = [digits(found[name]) for name in ("gbps", "low", "high")]
        lines.append([found["date"], f"{found['bytes'] / 1e6:.0f}", *rate, told])
    if not lines:
        return ""
    header = ["measured", "MB copied", "median GB/s", "p80 time", "p20 time", "clocks"]
    return f"## A copy from memory to memory, bytes read and written\n\n{table(header, lines)}"


def figures(record: Record) -> list[Figure]:
    """The figures to reach on a GPU, as far as the run measured them; none on a CPU."""
    if record.machine["device"] != "cuda":
        return []
    found = []
    for cache in caches(record):
        shares = {case.name: part for case in ordered(record, cache) if (part := share(record, case, OURS)) is not None}
        worst = min(shares, key=lambda name: shares[name], default="")
        note = f"{worst}; {sum(part >= SHARE for part in shares.values())} of {len(shares)} reach it" if shares else ""
        found.append(Figure(f"lowest share of a copy's rate, {cache}", SHARE, shares.get(worst), True, note))
    for rival in RIVALS:
        over = {}
        for case in record.cases.values():
            own, other = (record.row(case.name, peer, "forward") for peer in (OURS, rival))
            if own and other and own.latency and other.latency:
                over[case.name] = other.latency.median / own.latency.median
        worst = min(over, key=lambda name: over[name], default="")
        note = f"{worst}; ahead in {sum(ratio > 1 for ratio in over.values())} of {len(over)}" if over else ""
        found.append(Figure(f"least times as fast as {rival}", 1.0, over.get(worst), True, note))
    return found


def report(record: Record) -> str:
    """The whole suite as Markdown; the figures to reach come last, where a terminal shows them."""
    legend = (
        "Cells: median microseconds, ± half the p20-p80 spread, GB/s of keys and values, share of the copy's rate. A "
        "copy writes as much as it reads, and decoding hardly writes: a share above 100% is no error."
    )
    parts = [environment(record), copied(record), legend]
    parts += [rates(record, cache) for cache in caches(record)]
    parts += [reasons(record), figure_table(figures(record))]
    if record.machine["device"] != "cuda":
        parts.append("No GPU speed is measured here: a CPU says that the suite works, and nothing of the kernels.")
    return "\n\n".join(part for part in parts if part) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: write and draw again."""
    from bench.decode_plot import draw

    parser = argparse.ArgumentParser(prog="python -m bench.decode_report", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("path", type=Path, help="bench/results/<machine>/decode.json, of --suite decode")
    path = parser.parse_args(argv).path
    record = records.load(path)
    finish(record)
    record.save(path)
    path.with_suffix(".md").write_text(report(record))
    for picture in draw(record, path.parent, path.stem):
        print(picture)


if __name__ == "__main__":
    main()
