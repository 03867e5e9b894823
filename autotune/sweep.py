"""Time the tiles on this machine's GPU, and write the table that later calls run with.

    python -m flash.autotune.sweep                                     all there is to time, for the GPU here
    python -m flash.autotune.sweep --dtype bfloat16 --head-dim 128     a part of it
    python -m flash.autotune.sweep --offline cuda:90                   choose by compiling alone, without a GPU

Every candidate is compared with the float64 oracle before it may win. A killed sweep goes on where it was when it is
started again. The table goes beside Triton's cache, or where --output says.

Exit codes: 0 done; 2 wrong arguments; 3 the GPU went away, and what was found is kept; 4 there is no GPU.
"""

import argparse
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from flash.kernels.spec import Config

from . import gluon, offline, store, tables
from .journal import Journal
from .measure import Job
from .space import candidates
from .worker import Outcome, Worker

RUNNER = "flash.autotune.measure:run"
TIMEOUT = 180.0  # seconds for one candidate, its compilation included
SURVIVORS = 8  # candidates of a row that are timed
CRASHES = 3  # in a row: the GPU is gone
Run = Callable[[Job], Outcome]


class Cell(NamedTuple):
    """A row to fill: what it needs, and the calls it is timed on."""

    need: offline.Need
    causal: bool
    seqlen: int


class Gone(Exception):
    """The GPU does not answer any more."""


def cells(target: str, dtypes: Iterable[str], head_dims: Iterable[int], seqlens: Iterable[int]) -> Iterator[Cell]:
    """The rows that a sweep fills, in order; those for ragged head dimensions stay as they are."""
    kernels = tables.KERNELS + (tables.HOPPER if target == "cuda:90" else ())
    for dtype, head_dim, kernel, causal, seqlen in itertools.product(
        dtypes, head_dims, kernels, (False, True), seqlens
    ):
        need = offline.Need(kernel, dtype, head_dim, False, causal if kernel in tables.HOPPER else None)
        if kernel in tables.KERNELS or tried(target, need):
            yield Cell(need, causal, seqlen)


def tried(target: str, need: offline.Need) -> tuple[Config, ...]:
    """The candidates of a row; Gluon kernels bring their own, for two dtypes, and others for causal calls."""
    if need.kernel in tables.KERNELS:
        return candidates(target, need.kernel, need.dtype, need.head_dim)
    half = need.dtype in ("float16", "bfloat16")
    return gluon.candidates(need.kernel, need.head_dim, bool(need.causal)) if half else ()


def survivors(
    target: str, need: offline.Need, compile: offline.Compile, limit: int = SURVIVORS
) -> dict[Config, offline.Figures]:
    """The candidates worth timing: they fit, and none of them spills where another does not.

    Of a Gluon kernel all that fit are timed: it brings one or two, and what those spill lies outside their main loops.

    Args:
        target: "cuda:90".
        need: the row.
        compile: (target, kernel, variant, config) -> Report.
        limit: how many at most.

    Returns:
        Their figures, the most promising first.
    """
    kept: dict[Config, offline.Figures] = {}
    for config in tried(target, need):
        figures = offline.measure(target, need, config, compile)
        if not figures.fault:
            kept[config] = figures
        if sum(each.spill_bytes == 0 for each in kept.values()) >= limit:
            break
    if need.kernel in tables.HOPPER:
        return kept
    least = min((each.spill_bytes for each in kept.values()), default=0)
    return dict(itertools.islice(((c, f) for c, f in kept.items() if f.spill_bytes == least), limit))


def sweep(
    target: str,
    gpu: str,
    wanted: Iterable[Cell],
    compile: offline.Compile,
    run: Run,
    journal: Journal,
    progress: Any = None,
) -> tables.Table:
    """Time the survivors of every cell, going on where the journal ends, and let the fastest right one win.

    Args:
        target: what the GPU compiles for, "cuda:90".
        gpu: its name.
        wanted: the cells.
        compile: (target, kernel, variant, config) -> Report.
        run: Job -> Outcome, whatever becomes of the job.
        journal: where outcomes are kept.
        progress: a tqdm bar, or None.

    Returns:
        The timed rows; cells without a right candidate have none.

    Raises:
        Gone: several candidates in a row brought the process down; the journal keeps what was found before.
    """
    triton = tables.triton_version() or ""
    made = f"{target} {gpu} {triton} {tables.kernel_hash()}"
    rows: list[tables.Row] = []
    crashes = 0
    for cell in wanted:
        key = f"{made} {cell.need}"
        if key not in journal:
            found = survivors(target, cell.need, compile)
            journal.write(key, [[config, figures] for config, figures in found.items()])
        best: tables.Row | None = None
        for config, (spill_bytes, shared, _) in ((Config(*c), f) for c, f in journal[key]):
            job = Job(target, *cell.need[:4], cell.causal, cell.seqlen, config)
            entry = f"{made} {job}"
            if entry not in journal:
                outcome = run(job)
                crashes = crashes + 1 if outcome["status"] == "crash" else 0
                if crashes >= CRASHES:
                    raise Gone(f"{crashes} candidates in a row crashed, the last was {job}: {outcome['note']}")
                journal.write(entry, outcome)
            outcome = journal[entry]
            if outcome["status"] == "ok" and (best is None or outcome["ms"] < best.ms):
                best = tables.Row(*cell.need[:4], cell.causal, cell.seqlen, config, shared, spill_bytes, outcome["ms"])
            if progress is not None:
                progress.set_postfix_str(_words(cell, best, outcome))
        rows += [] if best is None else [best]
        if progress is not None:
            progress.update()
    return tables.Table(target, gpu, triton, tables.kernel_hash(), bool(rows), tuple(rows))


def _words(cell: Cell, best: tables.Row | None, last: Outcome) -> str:
    """Where a sweep is: the cell, the best so far, and what became of the last candidate."""
    where = f"{' '.join(map(str, cell.need[:3]))} {'causal' if cell.causal else 'full'} {cell.seqlen}"
    so_far = "none yet" if best is None else f"{best.ms:.3f} ms {tuple(best.config)}"
    return f"{where}: best {so_far}, last {last['status']}"


def bar(total: int) -> Any:
    """A progress bar, or None where tqdm is not installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm(total=total, dynamic_ncols=True)


def summary(journal: Journal) -> str:
    """How many candidates ended how."""
    ends: dict[str, int] = {}
    for value in journal.entries.values():
        if isinstance(value, dict):
            ends[value["status"]] = ends.get(value["status"], 0) + 1
    return ", ".join(f"{number} {status}" for status, number in sorted(ends.items())) or "nothing to time"


def main(argv: list[str] | None = None) -> int:
    """Command line of the sweep; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m flash.autotune.sweep", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    names = parser.add_argument
    names("--offline", metavar="TARGET", help="cuda:80, cuda:90, hip:gfx942, ...: choose without a GPU")
    names("--dtype", nargs="+", choices=tuple(tables.ITEMSIZE), help="default: bfloat16 float16; offline all")
    names("--kernel", nargs="+", choices=tables.KERNELS, default=tables.KERNELS, help="offline: default all")
    names("--head-dim", nargs="+", type=int, choices=tables.HEAD_DIMS, help="default: 64 128 256; offline all")
    names("--seqlen", nargs="+", type=int, choices=tables.SEQLENS, default=[1024, 8192], help="lengths to time")
    names("--output", type=Path, help="the table (offline: the shipped one; else one beside Triton's cache)")
    options = parser.parse_args(argv)
    return _offline(options) if options.offline else _here(options)


def _offline(options: argparse.Namespace) -> int:
    from .resources import report

    target = options.offline
    path = options.output or Path(__file__).parent / "tables" / tables.table_name(target)
    wanted = list(offline.needs(target, options.dtype or tuple(tables.ITEMSIZE), options.head_dim or tables.HEAD_DIMS))
    wanted = [need for need in wanted if need.kernel in options.kernel]
    journal = Journal(path.with_suffix(".journal"))
    table = offline.build_table(target, wanted, report, journal, tables.triton_version() or "", bar(len(wanted)))
    store.save(path, table, 0o644)
    journal.remove()
    print(f"{path}: {len(table.rows)} of {len(wanted)} rows, none of them timed")
    return 0


def _here(options: argparse.Namespace) -> int:
    import torch

    if not torch.cuda.is_available():
        print("no GPU here: --offline cuda:90 chooses without one", file=sys.stderr)
        return 4
    from .resources import report

    gpu, target = torch.cuda.get_device_name(), _target()
    folder = tables.user_folder()
    if options.output is None and folder is None:
        print("no Triton here: nothing to time", file=sys.stderr)
        return 4
    path = options.output or Path(str(folder)) / tables.user_table_name(target, gpu)
    wanted = list(
        cells(target, options.dtype or ("bfloat16", "float16"), options.head_dim or (64, 128, 256), options.seqlen)
    )
    journal = Journal(path.with_suffix(".journal"))
    worker = Worker(RUNNER, TIMEOUT)
    write = partial(store.save, path, mode=0o644 if options.output else 0o600)
    try:
        table = sweep(target, gpu, wanted, report, worker.run, journal, bar(len(wanted)))
    except (Gone, RuntimeError) as error:
        print(f"stopped: {error}; start again to go on from here", file=sys.stderr)
        return 3
    finally:
        worker.close()
    write(table)
    print(f"{path}: {len(table.rows)} of {len(wanted)} rows timed on {gpu}; candidates: {summary(journal)}")
    journal.remove()
    return 0


def _target() -> str:
    import torch

    if torch.version.hip:
        return f"hip:{torch.cuda.get_device_properties(0).gcnArchName.partition(':')[0]}"
    major, minor = torch.cuda.get_device_capability()
    return f"cuda:{major}{minor}"


if __name__ == "__main__":
    sys.exit(main())
