"""The benchmark: checks, times, weighs, writes and draws.

    python -m bench.run                    # what `make bench` runs: a set that suits the machine
    python -m bench.run --suite sweep --cases d128 --peers standard flash sdpa-cudnn
    python -m bench.run --suite features   # what a mask, a bias, dropout .. cost: features.json, .md and .png
    python -m bench.run --suite long       # windows and documents in long sequences: long.json, .md, long-context.png

Nothing is timed before its result matched the float64 oracle (bench/check.py). Every combination of case, peer and pass
leaves a row, whatever became of it: ok, wrong, oom, absent, skipped or error, with the reason.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from bench import cases as shapes
from bench import measure as meter
from bench import record as records
from bench.cases import Case, passes_of
from bench.check import DROPOUT_SEED, Expected, compare, expect, names
from bench.measure import Effort, OutOfMemory, out_of_memory
from bench.peers import FEATURE_PEERS, OURS, PEERS, SDPA, STANDARD, Peer, refusal
from bench.record import Record, Row

RESULTS = Path(__file__).parent / "results"
MEMORY_PASSES = ("forward", "both")
MATRICES = {"forward": 2, "both": 3}  # of scores, that standard attention holds at once
SCORES_BYTES_LIMIT = 2**30  # on a CPU: above it standard attention alone would take most of the time there is
CPU_EFFORT, GPU_EFFORT, QUICK_EFFORT = Effort(0.0, 0.06, 5), Effort(0.025, 0.1, 5), Effort(0.0, 0.01, 3)
LONG_EFFORT = Effort(0.0, 0.12, 3)
CPU_LIMIT, CPU_PATIENCE = 225.0, 0.5
MEMORY_SHARE = 0.3  # of the time limit, so that a busy machine still times something
FEATURE_SUITES = ("features", "long")  # each with files of its own, few peers, and patience for all of them

LATE = "the time limit was over"

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """How a run is made.

    Args:
        device: "cpu" or "cuda".
        seed: of the operands.
        threads: of a CPU.
        effort: how long a latency is measured.
        memory: whether peak memory is measured.
        patience: seconds; a peer whose check takes longer is not timed, standard and ours excepted.
        deadline: of time.monotonic(); what is not begun by then is skipped, and says so.
        memory_deadline: likewise, for peak memory on a CPU.
    """

    device: torch.device
    seed: int = 0
    threads: int = 2
    effort: Effort = CPU_EFFORT
    memory: bool = True
    patience: float = float("inf")
    deadline: float = float("inf")
    memory_deadline: float = float("inf")


def failure(row: Row, error: BaseException) -> Row:
    """The row of a call that raised."""
    if out_of_memory(error):
        return replace(row, outcome="oom", reason=str(error).splitlines()[0] if str(error) else "out of memory")
    if reason := refusal(error):
        return replace(row, outcome="absent", reason=reason)
    return replace(row, outcome="error", reason=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")


def gate(case: Case, row: Row, call: Callable[[], tuple[torch.Tensor, ...]], expected: Expected) -> Row:
    """The row with its errors; its outcome is "ok" where every result is within its bound."""
    try:
        torch.manual_seed(DROPOUT_SEED)
        results = call()
        verdict = compare(case, expected, dict(zip(names(case), results, strict=False)), row.peer)
    except Exception as error:  # whatever a peer raises is its result, and is written down
        return failure(row, error)
    row = replace(row, errors=verdict.errors, bounds=verdict.bounds)
    if verdict.ok:
        return replace(row, outcome="ok")
    worst = ", ".join(
        f"{name} {error:.1e} > {verdict.bounds[name]:.1e}"
        for name, error in verdict.errors.items()
        if not error <= verdict.bounds[name]
    )
    return replace(row, outcome="wrong", reason=f"error above its bound: {worst}")


def weigh(row: Row, call: Callable[[], tuple[torch.Tensor, ...]], masks: int) -> Row:
    """The row with its peak memory on a GPU, `masks` bytes that were made before included."""
    try:
        return replace(row, peak_bytes=meter.gpu_peak(call) + masks, peak_outcome="ok")
    except Exception as error:
        failed = failure(row, error)
        return replace(row, peak_outcome=failed.outcome, peak_reason=failed.reason)


def measure(
    case: Case, peer: Peer, tensors: tuple[torch.Tensor, ...], expected: Expected, settings: Settings
) -> list[Row]:
    """Checks a peer on a case, then times what was right: one row a pass."""
    blank = {what: Row(case.name, peer.name, what) for what in passes_of(case, settings.device)}
    if reason := peer.absent(case, settings.device):
        return [replace(row, outcome="absent", reason=reason) for row in blank.values()]
    if time.monotonic() > settings.deadline:
        return [replace(row, outcome="skipped", reason=LATE) for row in blank.values()]
    if settings.device.type == "cpu" and case.series == "long" and (reason := too_long(case, peer.name)):
        return [replace(row, outcome="skipped", reason=reason) for row in blank.values()]
    before = allocated(settings.device)
    try:
        with peer.prepare(case, settings.device) as attention:
            calls = meter.passes(attention, *tensors)
            start = time.monotonic()
            checked = {what: gate(case, blank[what], calls[what], expected) for what in MEMORY_PASSES if what in blank}
            took = time.monotonic() - start
            if "backward" in blank:
                checked["backward"] = replace(checked["both"], what="backward")
            rows = [checked[what] for what in blank]
            if took > settings.patience and peer.name not in (STANDARD, OURS):
                reason = f"one forward and one backward took {took:.1f} s, more than {settings.patience:g} s"
                return [replace(row, outcome="skipped", reason=reason) if row.outcome == "ok" else row for row in rows]
            masks = allocated(settings.device) - before
            return [timed(case, row, calls[row.what], settings, masks) for row in rows]
    except Exception as error:  # prepare itself may fail: to import, to compile, to allocate
        return [failure(row, error) for row in blank.values()]


def allocated(device: torch.device) -> int:
    """Bytes of tensors on a GPU; 0 on a CPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def too_long(case: Case, peer: str) -> str:
    """Why standard attention is not run on a CPU; "" where it is."""
    scores = shapes.score_bytes(case)
    if peer != STANDARD or scores <= SCORES_BYTES_LIMIT:
        return ""
    return f"a matrix of scores takes {scores / 1e9:.1f} GB, and too much of the time there is"


def timed(
    case: Case, row: Row, call: Callable[[], tuple[torch.Tensor, ...]], settings: Settings, masks: int = 0
) -> Row:
    """The row with its latency, if it passed the gate, and on a GPU its peak memory."""
    if settings.device.type == "cuda" and settings.memory and row.what in MEMORY_PASSES:
        if row.outcome == "oom":
            row = replace(row, peak_outcome="oom", peak_reason=row.reason)
        elif row.outcome == "ok":
            row = weigh(row, call, masks)
    if row.outcome != "ok":
        return row
    if time.monotonic() > settings.deadline:
        return replace(row, outcome="skipped", reason=LATE)
    try:
        found = meter.latency(call, settings.device, settings.effort)
    except Exception as error:
        return failure(row, error)
    return replace(row, latency=found, tflops=shapes.flops(case, row.what) / found.median / 1e9)


def weigh_in_child(case: Case, peer: str, what: str, settings: Settings) -> Row:
    """A row that holds peak memory on a CPU alone."""
    row = Row(case.name, peer, what, reason="measured for memory alone")
    if time.monotonic() > settings.memory_deadline:
        return replace(row, peak_outcome="skipped", peak_reason=LATE)
    if not meter.STATUS.exists():
        return replace(row, peak_outcome="skipped", peak_reason="this system has no /proc to read it from")
    if peer == STANDARD:
        scores, available = shapes.score_bytes(case), meter.available_memory()
        # Two children run at a time.
        if available is not None and 2 * MATRICES[what] * scores > available:
            needed, free = MATRICES[what] * scores / 1e9, available / 1e9
            reason = f"not started: it needs {needed:.1f} GB, and {free:.1f} GB are free for two processes"
            return replace(row, peak_outcome="oom", peak_reason=reason)
        if reason := too_long(case, peer):
            return replace(row, peak_outcome="skipped", peak_reason=reason)
    try:
        peak = meter.cpu_peak_in_child(case, peer, what, settings.threads, settings.seed)
    except OutOfMemory as error:
        return replace(row, peak_outcome="oom", peak_reason=str(error))
    except Exception as error:
        return replace(row, peak_outcome="error", peak_reason=str(error))
    return replace(row, peak_bytes=peak, peak_outcome="ok")


def weigh_all(record: Record, cases: Sequence[Case], peers: Sequence[str], settings: Settings, step: Progress) -> None:
    """Peak memory of cases on a CPU, two processes at a time: nothing is timed meanwhile."""
    jobs = [
        (case, peer, what)
        for case in cases
        for peer in peers
        for what in passes_of(case, settings.device)
        if what in MEMORY_PASSES
    ]
    with ThreadPoolExecutor(max_workers=2) as pool:
        futures = {pool.submit(weigh_in_child, *job, settings): job for job in jobs}
        for future in as_completed(futures):
            case, peer, what = futures[future]
            record.cases.setdefault(case.name, case)
            record.add([future.result()])
            step(f"memory: {case.name}, {peer}, {what}")


def time_all(
    record: Record, cases: Sequence[Case], peers: Sequence[Peer], settings: Settings, step: Progress,
    finished: Callable[[], None],
) -> None:  # fmt: skip
    """Every peer on every case; finished() is called after each case. Rows that have a timing already are kept."""
    for case in cases:
        record.cases.setdefault(case.name, case)
        missing = [peer for peer in peers if not done(record, case, peer, settings.device)]
        if not missing:
            continue
        tensors = shapes.inputs(case, settings.device, settings.seed)
        expected = Expected([], "")  # not looked at when the deadline is over
        if time.monotonic() <= settings.deadline:
            expected = expect(case, *tensors, backward="both" in passes_of(case, settings.device))
            record.checked[case.name] = expected.extent
        for peer in missing:
            record.add(measure(case, peer, tensors, expected, settings))
            step(f"{case.name}, {peer.name}")
        finished()


def done(record: Record, case: Case, peer: Peer, device: torch.device) -> bool:
    """Whether a record has all the rows of a case and a peer, from an earlier run."""
    rows = [record.row(case.name, peer.name, what) for what in passes_of(case, device)]
    return all(row is not None and row.outcome not in ("untimed", "skipped") for row in rows)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.run", description=(__doc__ or "").splitlines()[0])
    option = parser.add_argument
    option("--suite", default="auto", help="auto, cpu, sweep, models, all, quick, features or long (default: auto)")
    option("--quick", action="store_true", help="seconds instead of minutes: the quick suite, few samples")
    option("--cases", nargs="*", default=[], metavar="TEXT", help="only cases whose name contains one of these")
    option("--peers", nargs="*", default=[], choices=list(PEERS), help="only these (default: all that suit)")
    option("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    option("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"], help="of the GPU suites")
    option("--out", type=Path, help="folder of the results (default: bench/results/<machine>)")
    option("--seed", type=int, default=0, help="of the operands (default: 0)")
    option("--threads", type=int, default=min(2, torch.get_num_threads()), help="of a CPU (default: 2)")
    option("--limit", type=float, help=f"seconds after which nothing is begun (default: {CPU_LIMIT:g} on a CPU)")
    option("--patience", type=float, help=f"of a peer's check, in seconds (default: {CPU_PATIENCE:g} on a CPU)")
    option("--no-memory", action="store_true", help="do not measure peak memory")
    option("--resume", action="store_true", help="keep the rows that the folder's results.json has")
    return parser.parse_args(argv)


def suite_of(args: argparse.Namespace) -> str:
    """The suite's name; --quick makes a feature suite small, and stands for "quick" with any other."""
    return "quick" if args.quick and args.suite not in FEATURE_SUITES else str(args.suite)


def weighed_cases(args: argparse.Namespace, settings: Settings, wanted: Sequence[Case]) -> list[Case]:
    """The cases whose peak memory is measured apart, on a CPU: the suite's curve, or long sequences, longest first."""
    if not settings.memory or settings.device.type == "cuda" or suite_of(args) == "features":
        return []
    if suite_of(args) == "long":
        return list(reversed(wanted))
    curve = [] if args.cases else shapes.memory(settings.device)
    return [case for case in curve if not args.quick or case.seqlen_q <= 512]


def settings_of(args: argparse.Namespace) -> Settings:
    """What the command line asks for, with the defaults of the device."""
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    cpu = device.type == "cpu"
    never = float("inf")
    limit = args.limit if args.limit is not None else (CPU_LIMIT if cpu else never)
    patient = not cpu or args.suite in FEATURE_SUITES
    patience = args.patience if args.patience is not None else (never if patient else CPU_PATIENCE)
    effort = CPU_EFFORT if cpu else GPU_EFFORT
    effort = QUICK_EFFORT if args.quick else LONG_EFFORT if cpu and args.suite == "long" else effort
    now = time.monotonic()
    return Settings(
        device, args.seed, args.threads, effort, not args.no_memory, patience, now + limit, now + MEMORY_SHARE * limit
    )


def described(args: argparse.Namespace, settings: Settings) -> dict[str, object]:
    """The settings as they are written down."""
    return {
        "suite": suite_of(args),
        "quick": args.quick,
        "only_cases": args.cases,
        "only_peers": args.peers,
        "seed": settings.seed,
        "threads": settings.threads,
        "effort": settings.effort._asdict(),
        "timer": "triton.testing.do_bench"
        if settings.device.type == "cuda"
        else "timeit, and torch.utils.benchmark.Timer for calls shorter than effort.seconds",
        "statistics": "median, 20th and 80th percentile",
        "memory": "torch.cuda.max_memory_allocated" if settings.device.type == "cuda" else "VmHWM of a fresh process",
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "peers": {peer.name: peer.what for peer in PEERS.values()},
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; 0, or 1 where our own result was wrong or raised."""
    args = parse(argv)
    settings = settings_of(args)
    try:
        import matplotlib  # noqa: F401
        from tqdm import tqdm
    except ImportError as error:
        print(f"the benchmark needs {error.name}: pip install 'flash-triton[bench]'", file=sys.stderr)
        return 2
    from bench.plot import draw
    from bench.report import report

    torch.set_num_threads(settings.threads)
    name = suite_of(args)
    suite = shapes.suite(name, settings.device, args.dtype, args.quick)
    wanted = [case for case in suite if not args.cases or any(text in case.name for text in args.cases)]
    suited = FEATURE_PEERS if name in FEATURE_SUITES else tuple(peer for peer in PEERS if peer != SDPA)
    peers = [PEERS[peer] for peer in args.peers or suited]
    machine = records.machine(settings.device, settings.threads)
    out = args.out or RESULTS / records.slug(machine)
    out.mkdir(parents=True, exist_ok=True)
    stem, page = (name, f"{name}.md") if name in FEATURE_SUITES else ("results", "report.md")
    path = out / f"{stem}.json"
    record = Record(machine, described(args, settings), {}, {}, {})
    if args.resume and path.exists():
        earlier = records.load(path)
        record.cases, record.checked, record.rows = earlier.cases, earlier.checked, earlier.rows
    weighed = weighed_cases(args, settings, wanted)
    weighed_peers = [peer.name for peer in peers if peer.name in (STANDARD, OURS, SDPA)]

    passes = sum(what in MEMORY_PASSES for case in weighed for what in passes_of(case, settings.device))
    total = passes * len(weighed_peers) + len(wanted) * len(peers)
    with tqdm(total=total, unit="", dynamic_ncols=True, mininterval=0.5) as bar:

        def step(text: str) -> None:
            bar.set_description_str(text)
            bar.update()

        weigh_all(record, weighed, weighed_peers, settings, step)
        time_all(record, wanted, peers, settings, step, lambda: record.save(path))
    records.compare_peers(record)
    record.save(path)
    text = report(record)
    (out / page).write_text(text)
    print(text)
    for picture in draw(record, out):
        print(picture)
    ours = [row for row in record.rows.values() if row.peer == OURS]
    return int(any(row.outcome in ("wrong", "error") or row.peak_outcome == "error" for row in ours))


if __name__ == "__main__":
    sys.exit(main())
