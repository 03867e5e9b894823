"""Time the tiles on this machine's GPU, and write the table that later calls run with.

    python -m flash.autotune.sweep                                     all there is to time, for the GPU here
    python -m flash.autotune.sweep --dtype bfloat16 --head-dim 128     a part of it
    python -m flash.autotune.sweep --offline cuda:90                   choose by compiling alone, without a GPU

Every candidate is compiled, and compared with the float64 oracle before it may win, in processes of their own. A killed
sweep goes on where it was when it is started again. The table goes beside Triton's cache, or where --output says.

Exit codes: 0 done; 1 nothing compiles for the target; 2 wrong arguments; 3 the GPU went away, and what was found is
kept; 4 there is no GPU, or no Triton; 5 the table cannot be written. What lies in its place and is no table is put
aside as .bad with a warning, and stops nothing: there is no strict mode.
"""

import argparse
import itertools
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from flash.kernels.spec import Config, check_limits

from . import gluon, offline, store, tables
from .journal import Journal
from .measure import Job
from .space import candidates
from .worker import NotStarted, Outcome, Worker

RUNNER, COMPILER, PROBE = "flash.autotune.measure:run", "flash.autotune.resources:run", "flash.autotune.measure:answer"
TIMEOUT = 180.0  # seconds for one candidate, its compilation included
COMPILE_TIMEOUT = 120.0  # for one call of a candidate
PROBE_TIMEOUT = 60.0
SURVIVORS = 8  # candidates of a row that are timed
LOSSES = 3  # crashes or hangs in a row: the GPU is asked if it is still there
Run = Callable[[Job], Outcome]


class Cell(NamedTuple):
    """A row to fill: what it needs, and the calls it is timed on."""

    need: offline.Need
    causal: bool
    seqlen: int


class Gone(Exception):
    """The GPU does not answer any more, or no process can be started; `table` has what was found before."""

    table = tables.Table("", "", "", "", False, ())


class Tries:
    """What becomes of candidates, each tried once. Crashes and hangs are written down when the GPU is still there.

    Args:
        run: Job -> Outcome, whatever becomes of the job.
        journal: where outcomes are kept.
        answers: whether the GPU still does something.
    """

    def __init__(self, run: Run, journal: Journal, answers: Callable[[], bool]) -> None:
        self.run = run
        self.journal = journal
        self.answers = answers
        self.lost: dict[str, Outcome] = {}  # that crashed or hung, in a row

    def outcome(self, key: str, job: Job) -> Outcome:
        """The outcome of a job, from the journal where it has one.

        Raises:
            Gone: the GPU does not answer, or there is no process to try it in.
        """
        if key in self.journal and is_outcome(self.journal[key]):
            known: Outcome = self.journal[key]
            return known
        try:
            found = self.run(job)
        except NotStarted as error:
            raise Gone(f"{error}; the last candidate was {job}") from error
        if not is_outcome(found):
            found = {"status": "error", "note": f"no time: {found!s:.200}"}
        if found["status"] not in ("crash", "timeout"):
            self.settle()
            self.journal.write(key, found)
            return found
        self.lost[key] = found
        if len(self.lost) == LOSSES:
            if not self.answers():
                raise Gone(f"{LOSSES} candidates in a row were lost, the last was {job}: {found['note']}")
            self.settle()
        return found

    def settle(self) -> None:
        """Write down those that were lost: it was not the GPU."""
        for key, found in self.lost.items():
            self.journal.write(key, found)
        self.lost.clear()


def is_outcome(found: Any) -> bool:
    """Whether something is what a worker gives; a time is a number that a table may hold."""
    if not isinstance(found, dict) or not isinstance(found.get("status"), str):
        return False
    ms = found.get("ms")
    timed = isinstance(ms, int | float) and not isinstance(ms, bool) and 0 < ms < 1e9  # NaN is no time
    return found["status"] != "ok" or timed


def compile_apart(worker: Worker) -> offline.Compile:
    """Compile in a child process, so that a compiler that hangs or dies costs one candidate."""

    def compile(*arguments: Any, **options: Any) -> Any:
        try:
            outcome = worker.run((arguments, options))
        except NotStarted as error:
            raise Gone(f"{error}; the last candidate was {arguments}") from error
        if outcome["status"] != "ok":
            raise RuntimeError(f"{outcome['status']}: {outcome['note']}")
        return outcome["report"]

    return compile


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
    answers: Callable[[], bool] = lambda: False,
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
        answers: whether the GPU still does something, asked when candidates are lost one after another.

    Returns:
        The timed rows; cells without a right candidate have none.

    Raises:
        Gone: several candidates in a row crashed or hung and the GPU does not answer, or no process starts; the journal
            keeps what was found before, and the exception the rows of finished cells.
    """
    triton = tables.triton_version() or ""
    made = f"{target} {gpu} {triton} {tables.kernel_hash()}"
    tries = Tries(run, journal, answers)
    rows: list[tables.Row] = []

    def table() -> tables.Table:
        return tables.Table(target, gpu, triton, tables.kernel_hash(), bool(rows), tuple(rows))

    try:
        for cell in wanted:
            key = f"{made} {cell.need}"
            found = remembered(journal, key, cell.need)
            if found is None:
                found = survivors(target, cell.need, compile)
                journal.write(key, [[config, figures] for config, figures in found.items()])
            best: tables.Row | None = None
            for config, figures in found.items():
                job = Job(target, *cell.need[:4], cell.causal, cell.seqlen, config)
                outcome = tries.outcome(f"{made} {job}", job)
                if outcome["status"] == "ok" and (best is None or outcome["ms"] < best.ms):
                    about = (figures.shared, figures.spill_bytes, outcome["ms"])
                    best = tables.Row(*cell.need[:4], cell.causal, cell.seqlen, config, *about)
                if progress is not None:
                    progress.set_postfix_str(_words(cell, best, outcome))
            rows += [] if best is None else [best]
            if progress is not None:
                progress.update()
    except Gone as gone:
        gone.table = table()
        raise
    tries.settle()
    return table()


def remembered(journal: Journal, key: str, need: offline.Need) -> dict[Config, offline.Figures] | None:
    """The survivors of a row that a journal has; None where it has none, or what no sweep writes."""
    try:
        found = {Config(*config): offline.Figures(*figures) for config, figures in journal[key]}
        for config, figures in found.items():
            check_limits(need.kernel, config)
            if not all(type(count) is int and 0 <= count < 2**31 for count in figures[:2]):
                return None
    except (KeyError, TypeError, ValueError):
        return None
    return found


def _words(cell: Cell, best: tables.Row | None, last: Outcome) -> str:
    """Where a sweep is: the cell, the best so far, and what became of the last candidate."""
    where = f"{' '.join(map(str, cell.need[:3]))} {'causal' if cell.causal else 'full'} {cell.seqlen}"
    so_far = "none yet" if best is None else f"{best.ms:.3f} ms {tuple(best.config)}"
    return f"{where}: best {so_far}, last {last['status']}"


@contextmanager
def bar(total: int) -> Iterator[Any]:
    """A progress bar, or None where tqdm is not installed; what is printed after it has a line of its own."""
    try:
        from tqdm import tqdm
    except ImportError:
        yield None
        return
    with tqdm(total=total, dynamic_ncols=True) as progress:
        yield progress


def journal_of(path: Path) -> Path:
    """The journal of a table, whatever the table is called."""
    return path.with_name(path.name + ".journal")


def summary(journal: Journal) -> str:
    """How many candidates ended how."""
    ends: dict[str, int] = {}
    for value in journal.entries.values():
        if is_outcome(value):
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
    if options.offline and not re.fullmatch(r"cuda:\d+|hip:gfx[0-9a-f]+", options.offline):
        parser.error(f"--offline must be a target like cuda:90 or hip:gfx942, got {options.offline!r}")
    return _offline(options) if options.offline else _here(options)


def _offline(options: argparse.Namespace) -> int:
    target = options.offline
    if tables.triton_version() is None:
        return _say("no Triton here: nothing to compile with", 4)
    path = options.output or Path(__file__).parent / "tables" / tables.table_name(target)
    wanted = list(offline.needs(target, options.dtype or tuple(tables.ITEMSIZE), options.head_dim or tables.HEAD_DIMS))
    wanted = [need for need in wanted if need.kernel in options.kernel]
    if not _writable(path, private=False):
        return 5
    journal, worker = Journal(journal_of(path)), Worker(COMPILER, COMPILE_TIMEOUT)
    compile, triton = compile_apart(worker), tables.triton_version() or ""
    try:
        with bar(len(wanted)) as progress:
            table = offline.build_table(target, wanted, compile, journal, triton, progress)
    except Gone as error:
        return _say(f"stopped: {error}; start again to go on from here", 3)
    finally:
        worker.close()
    if not table.rows:
        return _say(f"no candidate compiles for {target} and fits it: no table is written", 1)
    if not _written(path, table, private=False):
        return 5
    journal.remove()
    print(f"{path}: {len(table.rows)} of {len(wanted)} rows, none of them timed")
    return 0


def _here(options: argparse.Namespace) -> int:
    import torch

    if not torch.cuda.is_available():
        return _say("no GPU here: --offline cuda:90 chooses without one", 4)
    folder = tables.user_folder()
    if options.output is None and folder is None:
        return _say("no Triton here: nothing to time", 4)
    try:
        gpu, target = torch.cuda.get_device_name(), _target()
    except RuntimeError as error:  # it is there, and cannot be used
        return _say(f"no GPU that works here: {error}", 4)
    path, private = options.output or Path(str(folder)) / tables.user_table_name(target, gpu), options.output is None
    wanted = list(
        cells(target, options.dtype or ("bfloat16", "float16"), options.head_dim or (64, 128, 256), options.seqlen)
    )
    if not _writable(path, private):
        return 5
    journal = Journal(journal_of(path))
    compiler, worker = Worker(COMPILER, COMPILE_TIMEOUT), Worker(RUNNER, TIMEOUT)
    compile, stopped = compile_apart(compiler), ""
    try:
        with bar(len(wanted)) as progress:
            table = sweep(target, gpu, wanted, compile, worker.run, journal, progress, answers)
    except Gone as error:
        table, stopped = error.table, str(error)
    finally:
        compiler.close()
        worker.close()
    if (table.rows or not stopped) and not _written(path, table, private):
        return 5
    if stopped:
        return _say(f"stopped: {stopped}; what was found is kept, start again to go on from here", 3)
    print(f"{path}: {len(table.rows)} of {len(wanted)} rows timed on {gpu}; candidates: {summary(journal)}")
    journal.remove()
    return 0


def answers() -> bool:
    """Whether the GPU does something in a fresh process."""
    worker = Worker(PROBE, PROBE_TIMEOUT)
    try:
        return bool(worker.run(None)["status"] == "ok")
    except NotStarted:
        return False
    finally:
        worker.close()


def _say(words: str, code: int) -> int:
    """Tell in one line why a sweep ends, with its exit code."""
    print(" ".join(words.split()), file=sys.stderr)
    return code


def _writable(path: Path, private: bool) -> bool:
    """Whether a table can be written, asked before hours go into it."""
    try:
        with store.locked(path, private):
            return True
    except OSError as error:
        return not _say(f"cannot write {path}: {error}", 1)


def _written(path: Path, table: tables.Table, private: bool) -> bool:
    """Write a table; one that cannot be written is printed, so that it is not lost."""
    try:
        store.save(path, table, private)
    except (OSError, ValueError) as error:
        print(tables.dump(table))
        return not _say(f"cannot write {path}: {error}; the table is printed, and the journal kept", 1)
    return True


def _target() -> str:
    import torch

    if torch.version.hip:
        return f"hip:{torch.cuda.get_device_properties(0).gcnArchName.partition(':')[0]}"
    major, minor = torch.cuda.get_device_capability()
    return f"cuda:{major}{minor}"


if __name__ == "__main__":
    sys.exit(main())
