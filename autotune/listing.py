"""What a disassembled kernel says of its schedule: its matrix loops, what they hold and what overlaps in them.

The one figure that speaks of the schedule is the share of a loop's exponentials issued while a wgmma of the same warps
is in flight: at 0 the softmax overlaps nothing but other warps, whatever order the source is in.
"""

import re
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

# NVIDIA's SASS, then AMD's assembly.
OPCODES = {
    "wgmma": r"\bHGMMA\b",
    "tcgen05": r"\bUTC\w*MMA\b",
    "mma": r"\b[HID]MMA\b",
    "mfma": r"\bv_s?mfma\w*",
    "exp2": r"\bMUFU\.EX2\b|\bv_exp_f32\w*",
    "fma": r"\b[FD]FMA2?\b|\bv_(?:pk_)?fma\w*",
    "local": r"\b(?:LDL|STL)\b|\bscratch_(?:load|store)\w*",
    "async_copy": r"\b(?:LDGSTS|UTMALDG)\b|\bbuffer_load\w* .*\blds\b",
    "barrier": r"\bBAR\b|\bs_barrier\b",
}
MATRIX = ("wgmma", "tcgen05", "mma", "mfma")
BRANCH = r"\b(?:BRA|s_c?branch\w*)\b"
LABEL = r"\.L\w+"


class Loop(NamedTuple):
    """An innermost loop that multiplies matrices.

    Args:
        instructions: how many it holds.
        counts: how many of each kind in OPCODES; those it has none of are left out.
        hidden: share of its exponentials issued under a wgmma, 0 to 1; None where it has no wgmma or no exponential.
    """

    instructions: int
    counts: dict[str, int]
    hidden: float | None


def matrix_loops(listing: str) -> tuple[Loop, ...]:
    """The innermost loops with matrix instructions of an nvdisasm or AMDGCN listing, in the order of the text."""
    code, labels = _instructions(listing)
    spans = set()
    for at, text in enumerate(code):
        label = re.search(LABEL, text) if re.search(BRANCH, text) else None
        if label is not None and labels.get(label[0], at + 1) <= at:
            spans.add((labels[label[0]], at + 1))
    innermost = [(a, b) for a, b in spans if not any((c, d) != (a, b) and a <= c and d <= b for c, d in spans)]
    loops = []
    for begin, end in sorted(innermost):
        body = code[begin:end]
        counts = count(body)
        if any(kind in counts for kind in MATRIX):
            loops.append(Loop(len(body), counts, hidden(body)))
    return tuple(loops)


def length(listing: str) -> int:
    """How many instructions a listing has."""
    return len(_instructions(listing)[0])


def _instructions(listing: str) -> tuple[list[str], dict[str, int]]:
    """The instructions of a listing, and at which of them each label stands."""
    code: list[str] = []
    labels: dict[str, int] = {}
    for line in listing.splitlines():
        text = re.sub(r"/\*.*?\*/|//.*|;.*", "", line).strip()
        label = re.match(rf"({LABEL}):", text)
        if label is not None:
            labels[label[1]] = len(code)
        elif text and not text.startswith((".", "#")) and not text.endswith(":"):
            code.append(text)
    return code, labels


def count(code: Iterable[str]) -> dict[str, int]:
    """How many instructions of each kind in OPCODES; absent kinds are left out."""
    found = Counter(kind for text in code for kind, pattern in OPCODES.items() if re.search(pattern, text))
    return {kind: found[kind] for kind in OPCODES if found[kind]}


def hidden(body: list[str]) -> float | None:
    """Share of a loop's exponentials issued while a wgmma of the same warps is in flight.

    The last HGMMA of a group carries gsb0, and WARPGROUP.DEPBAR.LE gsb0, N waits until at most N groups are in flight.
    """
    if not any("HGMMA" in text for text in body):
        return None
    in_flight = total = under = 0
    for lap in range(2):  # the first lap finds what is in flight across the back edge
        for text in body:
            wait = re.search(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x(\w+)", text)
            if wait is not None:
                in_flight = min(in_flight, int(wait[1], 16))
            elif "HGMMA" in text:
                in_flight += "gsb0" in text
            elif "MUFU.EX2" in text and lap == 1:
                total += 1
                under += in_flight > 0
    return under / total if total else None
