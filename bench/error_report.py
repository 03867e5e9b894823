"""The errors as tables, and where a peer's are smaller than ours.

python -m bench.error_report bench/results/<machine>/error.json      # writes and draws again what a run measured
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import record as records
from bench.cases import Case
from bench.peers import OURS, OURS_ALL, PEERS, STANDARD
from bench.report import table

LEAST = 1.05  # times; less than that is no difference between two rms


def cases_of(content: dict[str, Any]) -> list[Case]:
    """The cases in the order they were measured."""
    return [Case(**case) for case in content["cases"]]


def rows_of(content: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    """{(case, peer): row}."""
    return {(row["case"], row["peer"]): row for row in content["rows"]}


def peers_of(content: dict[str, Any], cases: Sequence[Case]) -> list[str]:
    """The peers that have an error in these cases, in the order of PEERS."""
    names = {case.name for case in cases}
    there = {row["peer"] for row in content["rows"] if row["errors"] and row["case"] in names}
    return [name for name in PEERS if name in there] + sorted(there - set(PEERS))


def rms_of(content: dict[str, Any], case: str, peer: str, output: str) -> float | None:
    """The median rms of an output's error, None where there is none."""
    found = rows_of(content).get((case, peer), {"errors": {}})["errors"].get(output)
    return None if found is None else float(found["rms"]["median"])


def less_exact(content: dict[str, Any], case: str, output: str) -> dict[str, float]:
    """{peer: our rms over its rms} of other people's peers whose rms is clearly smaller than ours."""
    own = rms_of(content, case, OURS, output)
    theirs = {row["peer"]: rms_of(content, case, row["peer"], output) for row in content["rows"] if row["case"] == case}
    if own is None:
        return {}
    ratios = {peer: own / rms if rms else math.inf for peer, rms in theirs.items() if rms is not None and own > 0}
    return {peer: ratio for peer, ratio in ratios.items() if peer not in OURS_ALL and ratio >= LEAST}


def cell(content: dict[str, Any], case: str, peer: str, output: str) -> str:
    """rms, half its p20-p80 spread, and max; nothing where there is no error."""
    found = rows_of(content).get((case, peer), {"errors": {}})["errors"].get(output)
    if found is None:
        return ""
    rms, largest = found["rms"], found["max"]["median"]
    spread = 50 * (rms["p80"] - rms["p20"]) / rms["median"] if rms["median"] else 0.0
    more = " <" if peer == OURS and less_exact(content, case, output) else ""
    return f"{rms['median']:.1e} ±{spread:.0f}% {largest:.1e}{more}"


def tables(content: dict[str, Any]) -> list[str]:
    """A table for each dtype: cases and outputs down, peers across."""
    from bench.error import DTYPES, OUTPUTS

    found = []
    for dtype in DTYPES:
        cases = [case for case in cases_of(content) if case.dtype == dtype]
        peers = peers_of(content, cases)
        if not peers:
            continue
        lines = [
            [
                f"{case.name.removeprefix(dtype).strip()}, {output}",
                *(cell(content, case.name, p, output) for p in peers),
            ]
            for case in cases
            for output in OUTPUTS
        ]
        found.append(f"## {dtype}\n\n{table(['case, output', *peers], lines)}")
    return found


def against_standard(content: dict[str, Any]) -> str:
    """Our rms over standard attention's, least, median and largest over cases: dtypes down, outputs across."""
    from bench.error import DTYPES, OUTPUTS

    lines = []
    for dtype in DTYPES:
        line = [dtype]
        for output in OUTPUTS:
            pairs = [
                (rms_of(content, case.name, OURS, output), rms_of(content, case.name, STANDARD, output))
                for case in cases_of(content)
                if case.dtype == dtype
            ]
            ratios = sorted(ours / theirs for ours, theirs in pairs if ours is not None and theirs)
            line.append(f"{ratios[0]:.2g} {ratios[len(ratios) // 2]:.2g} {ratios[-1]:.2g}" if ratios else "")
        lines.append(line)
    about = "Least, median and largest over the cases of a dtype; below 1 flash is the more exact one."
    return f"## rms of flash over rms of standard attention\n\n{about}\n\n{table(['dtype', *OUTPUTS], lines)}"


def worse(content: dict[str, Any]) -> str:
    """The rows where a peer's rms is smaller than ours."""
    from bench.error import OUTPUTS

    lines = []
    for case in cases_of(content):
        for output in OUTPUTS:
            if found := less_exact(content, case.name, output):
                peer, ratio = max(found.items(), key=lambda each: each[1])
                how = f"rms {ratio:.2f}x that of {peer}" if math.isfinite(ratio) else f"{peer} has no error"
                lines.append(f"- {case.name}, {output}: {how}")
    return "## Where flash is less exact (marked <)\n\n" + "\n".join(lines) if lines else ""


def reasons(content: dict[str, Any]) -> str:
    """Why a peer has no number, each reason once with how many cases it holds for."""
    why: dict[tuple[str, str, str], list[str]] = {}
    for row in content["rows"]:
        for output, reason in row["without"].items():
            why.setdefault((row["peer"], output, reason), []).append(row["case"])
        if row["outcome"] != "ok":
            why.setdefault((row["peer"], row["outcome"], row["reason"]), []).append(row["case"])
    merged: dict[tuple[str, str, tuple[str, ...]], list[str]] = {}
    for (peer, what, reason), where in why.items():
        merged.setdefault((peer, reason, tuple(where)), []).append(what)
    lines = []
    for (peer, reason, where), whats in merged.items():
        places = "every case" if len(where) == len(content["cases"]) else f"{len(where)} cases, {where[0]} first"
        lines.append(f"- {peer}: {', '.join(whats)}: {reason} ({places})")
    return "## Without a number\n\n" + "\n".join(lines) if lines else ""


def environment(content: dict[str, Any]) -> str:
    """The machine, the versions and how it was measured."""
    machine, settings = content["machine"], content["settings"]
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items() if number != "absent")
    lines = [f"# Errors against float64: {records.title(machine)}", "", f"- {machine['system']}; {machine['date']}"]
    lines += [f"- versions: {versions}"]
    lines += [f"- seeds {settings['seed']} to {settings['seed'] + settings['seeds'] - 1}; {settings['statistics']}"]
    lines += [f"- oracle: {settings['oracle']}"]
    if machine["device"] == "cpu":
        lines += ['- "flash" is the torch backend, "flash-triton" the kernels: ' + settings["kernels"]]
        lines += ["- no GPU was used: exp2 and the products of a GPU round in their own ways"]
    lines += ["- lse: of standard attention in its dtype; of ours and of FlexAttention float32, or float64 of float64"]
    lines += ["- float64: the oracle rounds as much as what it judges, and what rounds just as it does has no error"]
    return "\n".join(lines)


def report(content: dict[str, Any]) -> str:
    """The whole run as Markdown."""
    legend = "Cells: median rms of the error, ± half its p20-p80 spread, median of the largest error; < = a peer's rms"
    legend += f" is smaller by {100 * (LEAST - 1):.0f}% or more."
    found = (legend, *tables(content), worse(content), reasons(content))
    parts = [environment(content), against_standard(content), *found]
    return "\n\n".join(part for part in parts if part) + "\n"


def write(content: dict[str, Any], out: Path) -> int:
    """Write error.json, error.md and error.png, and print the text; the exit code."""
    from bench.error_plot import draw

    return records.leave(content, out, "error", report, draw)


if __name__ == "__main__":
    records.again(__doc__ or "", write)
