"""The cold suite as a table and a picture.

python -m bench.cold_report bench/results/<machine>/cold.json      # writes and draws again what a run measured
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import record as records
from bench.cases import Case
from bench.cold import FILLED
from bench.peers import OURS, SDPA
from bench.plot import COLOURS, figure, finish, label
from bench.record import Record
from bench.report import NAMES, digits, table, where

if TYPE_CHECKING:
    from matplotlib.axes import Axes

IMPORTS = ("import torch", "import flash", "import flash.attention")
CALLS = ("first", f"first{FILLED}", "second")


def steps() -> list[str]:
    """The steps in the order they are shown."""
    return [*IMPORTS, *(f"{what}, {call}" for what in ("forward", "both") for call in CALLS)]


def cell(found: dict[str, Any] | None) -> str:
    """Median milliseconds and half the p20-p80 spread; nothing where there are none."""
    if found is None:
        return ""
    return f"{digits(found['median'])} ±{50 * (found['p80'] - found['p20']) / found['median']:.0f}%"


def above_torch(content: dict[str, Any]) -> float | None:
    """Milliseconds that this library's imports add to that of torch."""
    own = content["milliseconds"].get(OURS, {})
    return sum(own[step]["median"] for step in IMPORTS[1:]) if all(step in own for step in IMPORTS) else None


def slower(content: dict[str, Any]) -> str:
    """The steps in which a peer is faster than ours."""
    own, lines = content["milliseconds"].get(OURS, {}), []
    for step in steps()[len(IMPORTS) :]:
        for peer, found in content["milliseconds"].items():
            if peer != OURS and step in own and step in found and found[step]["median"] < own[step]["median"]:
                ratio = own[step]["median"] / found[step]["median"]
                lines.append(f"- {step}: {ratio:.2f}x the time of {peer}")
    return "## Where flash is slower\n\n" + "\n".join(lines) if lines else ""


def report(content: dict[str, Any]) -> str:
    """The whole run as Markdown."""
    machine, settings, case = content["machine"], content["settings"], Case(**content["case"])
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items() if number != "absent")
    head = [
        f"# Beginning: {records.title(machine)}",
        "",
        f"- {machine['system']}; {machine['date']}; load average {machine['load_average']}",
        f"- versions: {versions}",
        f"- seed {settings['seed']}; {settings['processes']} fresh processes; {settings['timer']}; "
        f"{settings['statistics']}; {settings['caches']}",
        f"- the call: length {case.seqlen_k}, causal, {where(case)}; its result was held to the float64 oracle",
    ]
    if machine["device"] == "cpu":
        head += ["- no GPU was used: on one the first call compiles kernels, which has not been timed"]
    if (more := above_torch(content)) is not None:
        head += [f"- this library's imports add {digits(more)} ms to that of torch"]
    peers = list(content["milliseconds"])
    lines = [
        [step, *(cell(content["milliseconds"][peer].get(step)) for peer in peers)]
        for step in steps()
        if any(step in content["milliseconds"][peer] for peer in peers)
    ]
    reasons = [
        f"- {peer}, {NAMES[what]}: {reason}"
        for peer, found in content["without"].items()
        for what, reason in found.items()
    ]
    parts = ["\n".join(head), "Cells: median milliseconds, ± half the p20-p80 spread.", table(["step", *peers], lines)]
    parts += [slower(content), "## Without a number\n\n" + "\n".join(reasons) if reasons else ""]
    return "\n\n".join(part for part in parts if part) + "\n"


def bars(axes: "Axes", rows: list[tuple[str, str, dict[str, Any]]]) -> None:
    """Horizontal bars (name, peer, milliseconds), whiskers from p20 to p80, numbers beside."""
    for y, (_, peer, found) in enumerate(rows):
        low, time, high = found["p20"], found["median"], found["p80"]
        axes.barh(y, time, color=COLOURS.get(peer, "#777777"))
        axes.errorbar(time, y, xerr=[[time - low], [high - time]], color="#333333", lw=1, capsize=2)
        axes.annotate(f"{digits(time)} ms", (high, y), (4, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), [name for name, _, _ in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.margins(x=0.25)
    axes.set_xlabel("milliseconds (less is better)")


def named(found: dict[str, Any], what: str, call: str) -> str:
    """A call as the picture names it: of caches only where there is something to compile."""
    if call == "first" and f"{what}, first{FILLED}" in found:
        return "first call, caches empty"
    return call.replace(",", " call,") if "," in call else f"{call} call"


def draw(content: dict[str, Any], path: Path) -> Path:
    """Imports, then first and second calls of each pass."""
    found, case = content["milliseconds"], Case(**content["case"])
    base = SDPA if SDPA in found else OURS  # a process that imports torch alone
    panels = {"Imports": [(step, OURS if step in IMPORTS[1:] else "", found[OURS][step]) for step in IMPORTS]}
    panels["Imports"][0] = (IMPORTS[0], "", found[base][IMPORTS[0]])
    for what in ("forward", "both"):
        panels[NAMES[what].capitalize()] = [
            (f"{label(peer)}\n{named(found[peer], what, call)}", peer, found[peer][f"{what}, {call}"])
            for peer in found
            for call in CALLS
            if f"{what}, {call}" in found[peer]
        ]
    drawn, (line,) = figure(1, len(panels), 5.0, 4.2)
    for axes, (title, rows) in zip(line, panels.items(), strict=True):
        bars(axes, rows)
        if title != "Imports":  # which may be nothing at all, and have no logarithm
            axes.set_xscale("log")
        axes.set_title(title, fontsize=10)
    return finish(
        drawn, f"Beginning in a fresh process: length {case.seqlen_k}, causal, {where(case)}; "
        f"median and p20-p80 of {content['settings']['processes']}",
        Record(content["machine"], content["settings"], {}, {}, {}), path,
    )  # fmt: skip


def write(content: dict[str, Any], out: Path) -> int:
    """Write cold.json, cold.md and cold.png, and print the text; the exit code."""
    return records.leave(content, out, "cold", report, draw)


if __name__ == "__main__":
    records.again(__doc__ or "", write)
