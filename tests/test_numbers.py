"""Figures in README and docs: each is found where its command wrote it, beside that command, and says what it is of.

A figure is a number with a unit of measure: ms, µs, s, minutes, x, times, MB, GB/s, %, TFLOP/s and their like. Numbers
without one (shapes, versions, dates, counts, error bounds) are none, nor is what stands in code. `tests/figures.py`
ties each figure to a line of a file; rows of tables are looked up in the reports as they are.
"""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.figures import FACTS, NOT_MEASURED, RESULTS, Fact

ROOT = Path(__file__).parents[1]
PAGES = [path for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))] if path.is_file()]
RUNS = sorted((ROOT / RESULTS).glob("*/*.json"))

NUMBER = r"\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?"
UNIT = (
    r"(?:ms|µs|us|s|seconds?|milliseconds?|microseconds?|minutes?|hours?|x|×|times|[kMGT]B(?:/s)?|%|percent|"
    r"[GT]?FLOP/s|tokens/s)"
)
FIGURE = re.compile(rf"(?<![\w.,-])({NUMBER})\s?{UNIT}(?![\w/])")
MEASURES = re.compile(r"\b(ms|MB|GB/s|GFLOP/s|TFLOP/s|microseconds|ratio|speed-up|rms)\b")  # in the head of a table

# Who wrote what, by the beginning of a file's name; the longest that fits counts.
COMMANDS = {
    "": ("make bench", "python -m bench.run"),
    "features": ("--suite features",),
    "long": ("--suite long",),
    "decode": ("--suite decode",),
    "overhead": ("--suite overhead", "python -m bench.overhead"),
    "scale": ("--suite scale",),
    "speed": ("--suite speed",),
    "speedup": ("make bench", "python -m bench.run"),
    "error": ("--suite error",),
    "cold": ("--suite cold",),
    "clamps": ("python -m bench.clamps",),
    "exponentials": ("python -m flash.autotune.resources",),
    "train_char_lm": ("python -m examples.train_char_lm",),
}

DONE = r"(ran|run|runs|timed|tried|measured|used|done)"
NEVER = re.compile(
    rf"(?i)\b(no|not|never|none|nothing)\b[^.]*\b{DONE}\b[^.]*\b(GPUs?|one|there)\b"
    rf"|\b(no|not|never|none|nothing)\b[^.]*\bGPUs?\b[^.]*\b{DONE}\b"
    rf"|test-gpu[^.]*\bnot\b[^.]*\b{DONE}\b"
)
OF_GPUS = re.compile(r"Hopper|TFLOP/s|NVLink|H100|H200|cuDNN")


def commands_of(file: str) -> tuple[str, ...]:
    """What writes a file, each way of calling it."""
    name = Path(file).name
    return COMMANDS[max((stem for stem in COMMANDS if name.startswith(stem)), key=len)]


def squeezed(text: str) -> str:
    return " ".join(text.split())


def sections(text: str) -> Iterator[str]:
    """A page's text from heading to heading."""
    lines: list[str] = []
    code = False
    for line in text.splitlines(keepends=True):
        code ^= line.startswith("```")
        if not code and re.match(r"#+ ", line):
            yield "".join(lines)
            lines = []
        lines.append(line)
    yield "".join(lines)


def without_code(section: str) -> str:
    return re.sub(r"^```.*?^```$", "", section, flags=re.DOTALL | re.MULTILINE)


def cells(line: str) -> tuple[str, ...]:
    return tuple(cell.strip() for cell in line.strip().strip("|").split("|"))


def rows_of(text: str) -> list[tuple[str, ...]]:
    """The rows of all tables of a text, heads included."""
    return [cells(line) for line in text.splitlines() if line.startswith("|")]


def found_in(number: str, line: str) -> bool:
    """Whether a line has a number that is this one, when rounded to the digits it is written with."""
    mantissa, _, exponent = number.replace(",", "").partition("e")
    value, power = float(f"{mantissa}e{exponent or 0}"), int(exponent or 0)
    if "." in mantissa:
        unit = 10.0 ** (power - len(mantissa.partition(".")[2]))
    else:
        unit = 10.0 ** (power + len(mantissa) - len(mantissa.rstrip("0") or "0"))
        unit = min(unit, 0.1 * abs(value) or 1.0) if unit > 1 else unit
    others = (float(other.replace(",", "")) for other in re.findall(NUMBER, line))
    return any(abs(value - other) <= 0.5001 * unit for other in others)


def evidence(fact: Fact, root: Path = ROOT) -> str:
    """The line that proves a fact."""
    lines = (root / fact.file).read_text(encoding="utf-8").splitlines()
    heading, _, part = fact.line.rpartition(" > ")
    if heading:
        starts = [i for i, line in enumerate(lines) if line.startswith("#") and line.lstrip("# ") == heading]
        assert len(starts) == 1, f"{fact.file} has {len(starts)} headings {heading!r}"
        after = lines[starts[0] + 1 :]
        stop = next((i for i, line in enumerate(after) if line.startswith("#")), len(after))
        lines = after[:stop]
    own = squeezed(part)
    found = [line for line in lines if f"{squeezed(line)} ".startswith(f"{own} ")]
    found = found or [line for line in lines if own in squeezed(line)]
    assert len(found) == 1, f"{fact.file} has {len(found)} lines with {fact.line!r}"
    return found[0]


def spans(text: str, fact: Fact) -> Iterator[tuple[int, int]]:
    """Where the proved numbers of a fact stand in a text, squeezed."""
    parts = re.split(rf"\{{({NUMBER})\}}", squeezed(fact.quote))
    pattern = "".join(f"({re.escape(part)})" if i % 2 else re.escape(part) for i, part in enumerate(parts))
    for match in re.finditer(pattern, text):
        yield from (match.span(group) for group in range(1, len(parts) // 2 + 1))


def prose(section: str, known_rows: set[tuple[str, ...]]) -> str:
    """A section without code, links' targets, pictures, and rows of tables that a report has."""
    kept, head = [], ""
    for line in section.splitlines():
        in_table = line.startswith("|")
        head = line if in_table and not head else head if in_table else ""
        if not (in_table and cells(line) in known_rows):
            kept.append(line)
    text = re.sub(r"`[^`]*`|!\[[^]]*\]\([^)]*\)|<!--.*?-->", "", "\n".join(kept), flags=re.DOTALL)
    return squeezed(re.sub(r"\]\([^)]*\)", "]", text))


def unknown_rows(section: str, known_rows: set[tuple[str, ...]]) -> Iterator[tuple[str, ...]]:
    """Rows with numbers of tables that measure something, which no report has."""
    head: tuple[str, ...] = ()
    for line in section.splitlines():
        if not line.startswith("|"):
            head = ()
            continue
        row = cells(line)
        if not head:
            head = row
        elif MEASURES.search(" ".join(head)) and re.search(r"\d", "".join(row[1:])) and row not in known_rows:
            yield row


def reports(root: Path = ROOT) -> dict[tuple[str, ...], set[str]]:
    """Rows of tables of all reports, and the files that have them."""
    known: dict[tuple[str, ...], set[str]] = {}
    for path in sorted((root / RESULTS).glob("*/*.md")):
        for row in rows_of(path.read_text(encoding="utf-8")):
            known.setdefault(row, set()).add(path.name)
    return known


def faults(text: str, facts: Iterable[Fact] = FACTS, root: Path = ROOT) -> list[str]:
    """What is wrong with a page: figures tied to nothing, or standing without the command that wrote them."""
    known, found = reports(root), []
    for section in sections(text):
        used: set[str] = set()
        shown = without_code(section)
        said = prose(shown, set(known))
        proved = []
        for fact in facts:
            if places := list(spans(said, fact_on(said, fact))):
                proved += places
                if fact.file.startswith(RESULTS):
                    used.add(fact.file)
        allowed = [match.span() for pattern in NOT_MEASURED for match in re.finditer(pattern, said)]
        for match in FIGURE.finditer(said):
            start, stop = match.span(1)
            if not any(a <= start and stop <= b for a, b in proved + allowed):
                found.append(f"{match[0]!r} is tied to nothing: ..{said[max(0, start - 50) : stop + 20]}..")
        found += [f"no report has the row {' | '.join(row)}" for row in unknown_rows(shown, set(known))]
        for line in shown.splitlines():
            names = known.get(cells(line), set()) if line.startswith("|") else set()
            if names and re.search(r"\d", line) and not any(beside(section, name) for name in names):
                found.append(f"{sorted(names)} has the row {line.strip()}, whose command is not beside it")
        pictures = re.findall(r"!\[[^]]*\]\(([^)]*(?:bench/results|examples)/[^)]*)\)", shown)
        for file in sorted(used) + pictures:
            if not beside(section, file):
                found.append(f"{file}: none of {commands_of(file)} is beside it")
    return found


def fact_on(said: str, fact: Fact) -> Fact:
    """The fact as the prose has it: without what is left out of prose."""
    return fact._replace(quote=prose(fact.quote, set()))


def beside(section: str, file: str) -> bool:
    """Whether a section names a command that writes a file."""
    return any(command in squeezed(section) for command in commands_of(file))


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_figure_is_found_in_what_its_command_wrote(path: Path) -> None:
    assert not faults(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("fact", FACTS, ids=lambda fact: fact.quote)
def test_every_fact_is_what_its_line_says(fact: Fact) -> None:
    line = evidence(fact)
    if "%" in fact.quote and not fact.file.startswith(RESULTS):  # code has shares for percents
        line = re.sub(r"\b0\.\d+", lambda share: f"{100 * float(share[0]):g}", line)
    numbers = re.findall(rf"\{{({NUMBER})\}}", fact.quote)
    assert numbers, "no number is in braces"
    assert [number for number in numbers if not found_in(number, line)] == [], line


def test_a_figure_that_is_invented_is_seen(tmp_path: Path) -> None:
    folder = tmp_path / RESULTS / "machine"
    folder.mkdir(parents=True)
    shell = "```sh\n# from a clone\npython -m bench.run --suite features\n```"
    table = "| feature | flash ms |\n|--|--|\n| bias | {} |\n"
    (folder / "features.md").write_text("# F\n\n" + table.format(12.5) + "\n- window: 41% slower\n")
    right = Fact("a window costs {41} %", RESULTS + "machine/features.md", "window:")
    wrong = Fact("a window costs {42} %", RESULTS + "machine/features.md", "window:")
    told = "`python -m bench.run --suite features`"

    def of(text: str, *facts: Fact) -> list[str]:
        return faults(text, facts, tmp_path)

    assert not of(f"## A\n\n{told}: a window costs 41 %.", right)
    assert "tied to nothing" in of(f"## A\n\n{told}: a window costs 41 %.")[0]
    assert "tied to nothing" in of(f"## A\n\n{told}: a window costs 43 %.", right)[0]
    assert "beside" in of("## A\n\na window costs 41 %.", right)[0]
    assert "beside" in of(f"## A\n\na window costs 41 %.\n\n## B\n\n{told}", right)[0]
    assert not of(f"## A\n\n{shell}\n\na window costs 41 %.", right)
    assert not of(f"## A\n\n{told}\n\n" + table.format(12.5))
    assert "no report has the row" in of(f"## A\n\n{told}\n\n" + table.format(12.6))[0]
    assert "whose command is not beside it" in of("## A\n\n" + table.format(12.5))[0]
    assert "beside" in of("## A\n\n![p](../bench/results/machine/features.png)")[0]
    for unit in ("ms", "s", "x", "×", "GB", "MB", "GB/s", "%", "TFLOP/s", "seconds", "µs", "times as fast"):
        assert of(f"It takes 3.7 {unit}."), unit
    for text in ("head_dim 64", "torch 2.13.0", "in 2026-11-21", "`takes 3 ms`", "sm_90", "1e-12", "see 5 pages"):
        assert not of(text), text
    assert found_in("41", evidence(right, tmp_path)) and not found_in("42", evidence(wrong, tmp_path))


def test_numbers_are_compared_as_they_are_rounded() -> None:
    assert found_in("170", "x 167.2 40.9") and found_in("1.7", "1.74") and found_in("2.1e-03", "| 2.13e-03 |")
    assert found_in("1,604", "1604.4") and found_in("4", "(+4.4%)")
    assert not found_in("170", "160") and not found_in("1.7", "1.76") and not found_in("100", "140")
    assert not found_in("2.1e-03", "2.2e-03") and not found_in("17", "1.7")


def medians(content: Any) -> Iterator[dict[str, Any]]:
    """Everything in a run's JSON that is a median of samples."""
    if isinstance(content, dict):
        if "median" in content:
            yield content
        for value in content.values():
            yield from medians(value)
    elif isinstance(content, list):
        for value in content:
            yield from medians(value)


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.name)
def test_every_run_says_machine_versions_seed_median_and_spread(path: Path) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    machine, settings = content["machine"], content["settings"]
    assert machine["device"] in ("cpu", "cuda") and machine["cpu"] and machine["cores"] >= 1
    assert re.match(r"\d{4}-\d\d-\d\dT", machine["date"])
    assert {"python", "torch", "triton"} <= set(machine["versions"])
    assert isinstance(settings.get("seed"), int) or settings.get("operands") == "zeros"
    found = list(medians(content))
    assert found
    for each in found:
        assert {"p20", "p80"} <= set(each) or {"low", "high"} <= set(each), each
        low, high = (each.get("p20", each.get("low")), each.get("p80", each.get("high")))
        assert low <= each["median"] <= high, each


def ran_on_a_gpu() -> bool:
    return any(json.loads(path.read_text(encoding="utf-8"))["machine"]["device"] == "cuda" for path in RUNS)


@pytest.mark.skipif(ran_on_a_gpu(), reason="needs results without a run on a GPU")
@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_what_never_ran_on_a_gpu_says_so(path: Path) -> None:
    text = without_code(path.read_text(encoding="utf-8"))
    assert NEVER.search(squeezed(text)) or not OF_GPUS.search(text), "it speaks of GPUs, not of what never ran"


def test_a_page_that_claims_a_gpu_is_told_from_one_that_does_not() -> None:
    for text in ("No kernel here has run on a GPU yet.", "The Hopper kernels were not timed on one.",
                 "`make test-gpu`, which has not been done yet", "None of this was measured there."):  # fmt: skip
        assert NEVER.search(text), text
    for text in ("The Hopper kernels are fast.", "It ran on a GPU.", "Not all heads fit. It ran on a GPU."):
        assert not NEVER.search(text), text


def test_reports_of_a_cpu_say_that_no_gpu_was_used() -> None:
    for path in RUNS:
        report = path.with_name("report.md") if path.name == "results.json" else path.with_suffix(".md")
        if json.loads(path.read_text(encoding="utf-8"))["machine"]["device"] == "cpu":
            assert re.search(r"(?i)no GPU|without a GPU|nothing of a GPU", squeezed(report.read_text())), report
