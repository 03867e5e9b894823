"""The decode suite as pictures: share of a copy's rate, and microseconds, against keys; a panel a batch and group."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.cases import Case
from bench.decode_peers import PEERS
from bench.decode_report import SHARE, caches, ordered, rate_of_copy, share
from bench.peers import OURS
from bench.plot import COLOURS, MARKS, figure, finish, label, seqlen_axis, short
from bench.record import Record

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

SHADES = {"dense": COLOURS[OURS], "paged 16": "#8B0000", "paged 256": "#F4A582", "fp8": "#6A3D9A"}  # of ours
STYLES = {"dense": "o-", "paged 16": "^--", "paged 256": "s:", "fp8": "D-."}
Quantity = Callable[[Record, Case, str], float | None]


def percent(record: Record, case: Case, peer: str) -> float | None:
    """A peer's share of a copy's rate, in percent."""
    found = share(record, case, peer)
    return None if found is None else 100 * found


def microseconds(record: Record, case: Case, peer: str) -> float | None:
    """A peer's median time."""
    row = record.row(case.name, peer, "forward")
    return None if row is None or row.latency is None else 1e3 * row.latency.median


def curves(record: Record) -> dict[tuple[int, int], dict[str, list[Case]]]:
    """(batch, group) -> the cases of each kind of cache, by length."""
    found: dict[tuple[int, int], dict[str, list[Case]]] = {}
    for cache in caches(record):
        for case in ordered(record, cache):
            found.setdefault((case.batch, case.group), {}).setdefault(cache, []).append(case)
    return found


def lines(axes: "Axes", record: Record, panel: dict[str, list[Case]], quantity: Quantity) -> None:
    """A line for each peer and kind of cache; words where one failed."""
    for cache, curve in panel.items():
        for peer in PEERS:
            values = [(case.seqlen_k, quantity(record, case, peer)) for case in curve]
            points = [(n, y) for n, y in values if y is not None]
            if points:
                own, plain = peer == OURS, cache == "dense"
                colour = SHADES[cache] if own else COLOURS.get(peer)
                # Lines of one height are told apart: ours on a dense cache is the widest and lies below.
                width, above = (3.0, 2) if own and plain else (1.4, 3)
                style: dict[str, Any] = {"color": colour, "linewidth": width, "markersize": 4, "zorder": above}
                text = label(peer) if plain else f"{label(peer)}, {cache}"
                axes.plot(*zip(*points, strict=True), STYLES[cache], label=text, **style)
    words = failures(record, panel)
    axes.annotate("\n".join(words), (0.98, 0.03), xycoords="axes fraction", ha="right", va="bottom", fontsize=6)


def failures(record: Record, panel: dict[str, list[Case]]) -> list[str]:
    """Which peers failed, on which cache, how, and at which lengths."""
    found: dict[str, list[str]] = {}
    for cache, curve in panel.items():
        for case in curve:
            for peer in PEERS:
                row = record.row(case.name, peer, "forward")
                if row is not None and row.outcome in MARKS:
                    found.setdefault(f"{peer}, {cache}: {MARKS[row.outcome]}", []).append(short(case.seqlen_k))
    return [f"{word} at {', '.join(lengths)}" for word, lengths in found.items()]


def draw_panels(
    record: Record, quantity: Quantity, each: Callable[["Axes", Sequence[float]], None], title: str, path: Path
) -> Path | None:
    """A figure: batches down, groups across; each(axes, values) finishes a panel."""
    found = curves(record)
    values = [y for panel in found.values() for curve in panel.values() for case in curve for peer in PEERS
              if (y := quantity(record, case, peer)) is not None]  # fmt: skip
    if not values:
        return None
    batches, groups = sorted({key[0] for key in found}), sorted({key[1] for key in found})
    drawn, panels = figure(len(batches), len(groups), 4.6, 3.4)
    handles: dict[str, Artist] = {}
    for line, batch in zip(panels, batches, strict=True):
        for axes, group in zip(line, groups, strict=True):
            panel = found.get((batch, group))
            if panel is None:
                axes.set_axis_off()
                continue
            lines(axes, record, panel, quantity)
            first = next(iter(panel.values()))[0]
            heads = f"{first.heads} heads, {first.heads_k} of keys"
            axes.set_title(f"batch {batch}, {heads}, head_dim {first.head_dim}, {first.dtype}", fontsize=9)
            each(axes, values)
            seqlen_axis(axes, sorted({case.seqlen_k for curve in panel.values() for case in curve}))
            axes.set_xlabel("keys of a sequence")
            axes.grid(alpha=0.3)
            handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    columns = min(len(handles), 5)
    drawn.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=columns, fontsize=9)
    return finish(drawn, title, record, path)


def share_axis(axes: "Axes", values: Sequence[float], aim: bool) -> None:
    """From nothing to the highest share, and on a GPU to a whole copy's, with the aim."""
    if aim:
        axes.axhline(100 * SHARE, color="#333333", lw=1, ls="--", label=f"aim: {SHARE:.0%}")
    axes.set_ylim(0, 1.1 * max([*values, 100.0] if aim else values))
    axes.set_ylabel("% of a copy's rate (more is better)")


def time_axis(axes: "Axes", values: Sequence[float]) -> None:
    """From the shortest to the longest time, logarithmic."""
    axes.set_yscale("log")
    axes.set_ylim(min(values) / 1.5, max(values) * 1.5)
    axes.set_ylabel("microseconds (less is better)")


def draw(record: Record, out: Path, stem: str = "decode") -> list[Path]:
    """Writes every picture that the record has numbers for, named after the stem, and returns their paths."""
    top = rate_of_copy(record)
    beside = "" if top is None else f" ({top:.0f} GB/s here)"
    about = f"Decoding one token: keys and values read once, beside a copy{beside}"
    shares = partial(share_axis, aim=record.machine["device"] == "cuda")
    drawn = [
        draw_panels(record, percent, shares, about, out / f"{stem}-bandwidth.png"),
        draw_panels(record, microseconds, time_axis, "Decoding one token: time of a call", out / f"{stem}-latency.png"),
    ]
    return [path for path in drawn if path is not None]
