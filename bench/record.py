"""What a run leaves behind: the machine, the settings and one row per case, peer and pass, as JSON."""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from bench.cases import Case
from bench.measure import Latency, available_memory
from bench.peers import STANDARD

PACKAGES = ("torch", "triton", "flash-triton", "flash-attn", "flash-attn-3", "flash-attn-4", "nvidia-cudnn-cu12")
UNWRITTEN = 5  # the exit code of a run whose results are on the screen alone
CLOCKS = "clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"


@dataclass
class Row:
    """One case, one peer, one pass.

    Args:
        case: Case.name.
        peer: Peer.name.
        what: "forward", "backward" or "both".
        outcome: of the timing: "ok", "wrong", "oom", "absent", "skipped", "error" or "untimed" (memory alone).
        reason: why the outcome is not "ok".
        latency: milliseconds; None unless the outcome is "ok".
        tflops: 1e12 floating point operations a second, by the field's formula.
        peak_bytes: memory beyond inputs, output and gradients; None where not measured.
        peak_outcome: "ok", "oom", "skipped" or "error"; "" where it was not asked for.
        peak_reason: why peak_outcome is not "ok".
        errors: largest error against the oracle, by name.
        bounds: what each error had to stay under.
        speedup: standard attention's median over this one; low and high from the 20th and 80th percentiles.
        slower_than: peers whose median is lower.
    """

    case: str
    peer: str
    what: str
    outcome: str = "untimed"
    reason: str = ""
    latency: Latency | None = None
    tflops: float | None = None
    peak_bytes: int | None = None
    peak_outcome: str = ""
    peak_reason: str = ""
    errors: dict[str, float] = field(default_factory=dict)
    bounds: dict[str, float] = field(default_factory=dict)
    speedup: dict[str, float] | None = None
    slower_than: list[str] = field(default_factory=list)

    @property
    def key(self) -> tuple[str, str, str]:
        """What a row is about."""
        return (self.case, self.peer, self.what)


@dataclass
class Record:
    """A run: where, how, on what, with which result."""

    machine: dict[str, Any]
    settings: dict[str, Any]
    cases: dict[str, Case]
    checked: dict[str, str]  # case -> how much of it was compared with the oracle
    rows: dict[tuple[str, str, str], Row]
    speed: dict[str, Any] = field(default_factory=dict)  # of the speed and the decode suite: what beside their rows

    def row(self, case: str, peer: str, what: str) -> Row | None:
        """The row of a case, a peer and a pass, if there is one."""
        return self.rows.get((case, peer, what))

    def add(self, rows: Iterable[Row]) -> None:
        """Adds rows; a timing and a peak of the same case, peer and pass, measured apart, become one row."""
        for row in rows:
            before = self.rows.get(row.key, row)
            timing = before if row.outcome == "untimed" else row
            peak = row if row.peak_outcome else before
            self.rows[row.key] = replace(
                timing, peak_bytes=peak.peak_bytes, peak_outcome=peak.peak_outcome, peak_reason=peak.peak_reason
            )

    def save(self, path: Path) -> None:
        """Writes JSON, whole or not at all."""
        content = asdict(self) | {"cases": [asdict(case) for case in self.cases.values()]}
        content["rows"] = [asdict(row) for row in self.rows.values()]
        if not self.speed:
            del content["speed"]
        write_whole(path, json.dumps(content, indent=1) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Writes a file whole, or leaves the old one as it was."""
    partial = path.with_suffix(".partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


class Writing:
    """Writes results that are worth more than the place for them: what fails is told at the end, and stops nothing."""

    def __init__(self) -> None:
        self.faults: dict[Path, str] = {}

    @contextmanager
    def attempt(self, path: Path) -> Iterator[None]:
        """A block that writes a file, or does not."""
        try:
            yield
            self.faults.pop(path, None)  # a later attempt may have room
        except OSError as error:
            self.faults[path] = f"cannot write {path}: {error.strerror or error}"

    def status(self) -> int:
        """The exit code; the first fault is told in one line."""
        if not self.faults:
            return 0
        print(f"{next(iter(self.faults.values()))}; the results are printed alone", file=sys.stderr)
        return UNWRITTEN


def leave(content: dict[str, Any], out: Path, stem: str, report: Callable[..., str], draw: Callable[..., Path]) -> int:
    """Prints report(content), and writes a suite's STEM.json, STEM.md and STEM.png; the exit code."""
    text, writing = report(content), Writing()
    with writing.attempt(out):
        out.mkdir(parents=True, exist_ok=True)
        write_whole(out / f"{stem}.json", json.dumps(content, indent=1) + "\n")
        (out / f"{stem}.md").write_text(text, encoding="utf-8")
        draw(content, out / f"{stem}.png")
    print(text)
    return writing.status()


def again(about: str, write: Callable[[dict[str, Any], Path], int]) -> None:
    """Command line of a suite's report: writes and draws again what a run measured."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("path", type=Path, help="the suite's JSON in bench/results/<machine>")
    path = parser.parse_args().path
    write(json.loads(path.read_text()), path.parent)


def redraw(
    about: str,
    finish: Callable[["Record"], None],
    report: Callable[["Record"], str],
    draw: Callable[["Record", Path, str], Sequence[Path]],
    argv: Sequence[str] | None,
) -> None:
    """Command line of a report on a Record: finishes it, and writes and draws it again beside it."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("path", type=Path, help="the suite's JSON in bench/results/<machine>")
    path = parser.parse_args(argv).path
    record = load(path)
    finish(record)
    record.save(path)
    path.with_suffix(".md").write_text(report(record), encoding="utf-8")
    print(*draw(record, path.parent, path.stem), sep="\n")


def load(path: Path) -> Record:
    """Reads what Record.save wrote."""
    content = json.loads(path.read_text())
    rows = [Row(**row | {"latency": row["latency"] and Latency(**row["latency"])}) for row in content["rows"]]
    cases = {case["name"]: Case(**case) for case in content["cases"]}
    rows_by_key = {row.key: row for row in rows}
    return Record(
        content["machine"], content["settings"], cases, content["checked"], rows_by_key, content.get("speed", {})
    )


def compare_peers(record: Record) -> None:
    """Fills speedup and slower_than of every timed row."""
    timed = {key: row.latency for key, row in record.rows.items() if row.latency is not None}
    for (case, peer, what), own in timed.items():
        rivals = {key[1]: latency.median for key, latency in timed.items() if (key[0], key[2]) == (case, what)}
        row = record.rows[case, peer, what]
        row.slower_than = [name for name, median in rivals.items() if median < own.median]
        base = timed.get((case, STANDARD, what))
        if base is not None:
            row.speedup = {
                "median": base.median / own.median, "low": base.p20 / own.p80, "high": base.p80 / own.p20,
            }  # fmt: skip


def versions() -> dict[str, str]:
    """Installed versions of what was measured; "absent" where a package is not installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    found["torch"] = torch.__version__  # with the build's suffix
    if torch.version.cuda or torch.version.hip:
        found["cuda or hip"] = str(torch.version.cuda or torch.version.hip)
    return found


def proc_cpuinfo(name: str) -> str | None:
    """A field of the first processor in /proc/cpuinfo, None where there is none."""
    path = Path("/proc/cpuinfo")
    found = re.search(rf"^{name}\s*:\s*(.+)$", path.read_text(), re.MULTILINE) if path.exists() else None
    return found[1].strip() if found else None


def gpu_clocks() -> str:
    """What nvidia-smi says about clocks, power and temperature."""
    try:
        answer = subprocess.run(
            ["nvidia-smi", f"--query-gpu={CLOCKS}", "--format=csv,noheader"], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return "not readable"
    return f"{CLOCKS}: {answer.stdout.strip()}" if answer.returncode == 0 else "not readable"


def machine(device: torch.device, threads: int) -> dict[str, Any]:
    """The machine and the software, as far as they can be read."""
    cpu = proc_cpuinfo("model name") or platform.processor() or platform.machine()
    mhz = proc_cpuinfo("cpu MHz")
    described: dict[str, Any] = {
        "device": device.type,
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": threads,
        "cpu_clock": f"{mhz} MHz" if mhz else "not readable",
        "memory_available_bytes": available_memory(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "system": f"{platform.system()} {platform.machine()}",
        "versions": versions(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        described["gpu"] = properties.name
        described["gpu_memory_bytes"] = properties.total_memory
        described["gpu_processors"] = properties.multi_processor_count
        described["gpu_clocks"] = gpu_clocks()
    return described


def title(described: dict[str, Any]) -> str:
    """The machine in a few words, for titles."""
    if described["device"] == "cuda":
        return str(described["gpu"])
    return f"{described['cpu']}, {described['threads']} of {described['cores']} cores"


def slug(described: dict[str, Any]) -> str:
    """The machine as a folder's name."""
    name = described["gpu"] if described["device"] == "cuda" else f"cpu {described['cores']} cores {described['cpu']}"
    return re.sub(r"[^a-z0-9]+", "-", str(name).lower()).strip("-")
