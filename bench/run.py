"""The benchmark: checks, times, weighs, writes and draws.

    python -m bench.run                    # what `make bench` runs: a set that suits the machine
    python -m bench.run --suite sweep --cases d128 --peers standard flash sdpa-cudnn
    python -m bench.run --suite features   # what a mask, a bias, dropout .. cost: features.json, .md and .png
    python -m bench.run --suite long       # windows and documents in long sequences: long.json, .md, long-context.png
    python -m bench.run --suite speed      # side by side with the best there is: speed.json, .md, speed-*.png
    python -m bench.run --suite decode     # one token against a cache of keys: decode.json, .md, decode-*.png
    python -m bench.run --suite overhead   # what calling costs in Python, without a GPU too: bench/overhead.py
    python -m bench.run --suite scale      # sharded sequences, model and processes of this CPU: bench/scale_suite.py
    python -m bench.run --suite error      # how far results are from float64, ours and peers': bench/error.py
    python -m bench.run --suite cold       # importing and first calls, in fresh processes: bench/cold.py

Nothing is timed before its result matched the float64 oracle (bench/check.py). Every combination of case, peer and pass
leaves a row, whatever became of it: ok, wrong, oom, absent, skipped or error, with the reason.

The speed and the decode suite on a GPU end by themselves within ten minutes; what they did not come to is skipped, and
--resume goes on there. The speed suite there has peers in processes of their own (bench/apart.py).

Exit codes: 0 done; 1 a result of ours was wrong or raised; 2 wrong arguments, or nothing to resume from; 4 a GPU was
asked for and there is none; 5 results could not be written, and are on the screen alone.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench import cases as shapes
from bench import decode, decode_peers
from bench import measure as meter
from bench import record as records
from bench.apart import Apart, folder
from bench.bandwidth import APART, REPLAY
from bench.cases import Case, passes_of
from bench.check import Expected, expect
from bench.measure import Effort, OutOfMemory
from bench.peers import FEATURE_PEERS, OURS, OURS_ALL, PEERS, RACE_ONLY, SDPA, STANDARD, Peer
from bench.record import Record, Row, Writing
from bench.trial import CPU_EFFORT, LATE, MEMORY_PASSES, Settings, measure, measure_in_turn, too_long

RESULTS = Path(__file__).parent / "results"
MATRICES = {"forward": 2, "both": 3}  # of scores, that standard attention holds at once
GPU_EFFORT, QUICK_EFFORT = Effort(0.025, 0.1, 5), Effort(0.0, 0.01, 3)
LONG_EFFORT = Effort(0.0, 0.12, 3)
CPU_LIMIT, CPU_PATIENCE = 225.0, 0.5
LONGER_LIMIT = 1200.0  # of the suites that nobody waits for
MEMORY_SHARE = 0.3  # of the time limit, so that a busy machine still times something
FEATURE_SUITES = ("features", "long")  # each with files of its own, few peers, and patience for all of them
SPEED, DECODE = "speed", "decode"
SUITES = (
    "auto", "cpu", "sweep", "models", "all", "quick", "features", "long", SPEED, DECODE, "overhead", "scale", "error",
    "cold",
)  # fmt: skip
OWN_FILES = (*FEATURE_SUITES, SPEED, DECODE)
SPEED_LIMIT, SPEED_PATIENCE = 500.0, 60.0  # of a call that may take ten minutes; of one peer's job, compiling included

Progress = Callable[[str], None]


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
    """Peak memory of cases on a CPU, two processes at a time: nothing is timed meanwhile. Peaks that are known stay."""
    jobs = [
        (case, peer, what)
        for case in cases
        for peer in peers
        for what in passes_of(case, settings.device)
        if what in MEMORY_PASSES and not has_peak(record, case, peer, what)
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
    finished: Callable[[Case], None], measured: Callable[..., list[Row]] = measure,
) -> None:  # fmt: skip
    """Every peer on every case; finished(case) is called after each. Rows that have a timing already are kept."""
    for case in cases:
        record.cases.setdefault(case.name, case)
        missing = [peer for peer in peers if not done(record, case, peer, settings.device)]
        if not missing:
            continue
        tensors = shapes.inputs(case, settings.device, settings.seed)
        expected = Expected([], "")  # not looked at when the deadline is over
        if time.monotonic() <= settings.deadline:
            expected = expect(case, *tensors, backward="both" in passes_of(case, settings.device), few=settings.few)
            record.checked[case.name] = expected.extent
        if settings.in_turn:
            record.add(measure_in_turn(case, missing, tensors, expected, settings))
            for peer in missing:
                step(f"{case.name}, {peer.name}")
        else:
            for peer in missing:
                record.add(measured(case, peer, tensors, expected, settings))
                step(f"{case.name}, {peer.name}")
        finished(case)


def has_peak(record: Record, case: Case, peer: str, what: str) -> bool:
    """Whether a record has a peak, from an earlier run."""
    row = record.row(case.name, peer, what)
    return row is not None and row.peak_bytes is not None


def done(record: Record, case: Case, peer: Peer, device: torch.device) -> bool:
    """Whether a record has all the rows of a case and a peer, from an earlier run."""
    rows = [record.row(case.name, peer.name, what) for what in passes_of(case, device)]
    return all(row is not None and row.outcome not in ("untimed", "skipped") for row in rows)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    shown = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m bench.run", description=__doc__, formatter_class=shown)
    option = parser.add_argument
    option("--suite", default="auto", choices=SUITES, help="what is measured (default: cpu or sweep, by the device)")
    option("--quick", action="store_true", help="seconds instead of minutes: the quick suite, few samples")
    option("--cases", nargs="*", default=[], metavar="TEXT", help="only cases whose name contains one of these")
    option("--peers", nargs="*", default=[], choices=list(PEERS), help="only these (default: all that suit)")
    option("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    option("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"], help="of the GPU suites")
    option("--out", type=Path, help="folder of the results (default: bench/results/<machine>)")
    option("--seed", type=int, default=0, help="of the operands (default: 0)")
    option("--threads", type=int, default=min(2, torch.get_num_threads()), help="of a CPU (default: 2)")
    limits = f"{CPU_LIMIT:g} on a CPU, {LONGER_LIMIT:g} for features, long, {SPEED_LIMIT:g} for speed, decode on a GPU"
    option("--limit", type=float, help=f"seconds after which nothing is begun (default: {limits})")
    patience = f"{CPU_PATIENCE:g} on a CPU; of its whole job where peers are apart, {SPEED_PATIENCE:g}"
    option("--patience", type=float, help=f"of a peer's check, in seconds (default: {patience})")
    option("--apart", action=argparse.BooleanOptionalAction,
           help="peers in processes of their own, of the speed suite (default: on a GPU)")  # fmt: skip
    option("--no-memory", action="store_true", help="do not measure peak memory")
    option("--resume", action="store_true", help="keep the rows that the folder's results.json, or the suite's, has")
    option("--again", nargs="*", default=[], choices=list(PEERS), help="with --resume: measure these peers anew")
    return parser.parse_args(argv)


def suite_of(args: argparse.Namespace) -> str:
    """The suite's name; --quick makes a suite with files of its own small, and stands for "quick" with any other."""
    return "quick" if args.quick and args.suite not in OWN_FILES else str(args.suite)


def weighed_cases(args: argparse.Namespace, settings: Settings, wanted: Sequence[Case]) -> list[Case]:
    """The cases whose peak memory is measured apart, on a CPU: the suite's curve, or long sequences, longest first."""
    if not settings.memory or settings.device.type == "cuda" or suite_of(args) in ("features", SPEED, DECODE):
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
    speed, ends = args.suite == SPEED, args.suite in (SPEED, DECODE)
    default = LONGER_LIMIT if args.suite in FEATURE_SUITES else CPU_LIMIT
    limit = args.limit if args.limit is not None else default if cpu else SPEED_LIMIT if ends else never
    patient = not cpu or args.suite in OWN_FILES
    patience = args.patience if args.patience is not None else (never if patient else CPU_PATIENCE)
    effort = CPU_EFFORT if cpu else GPU_EFFORT
    effort = QUICK_EFFORT if args.quick else LONG_EFFORT if cpu and args.suite == "long" else effort
    now = time.monotonic()
    memory = not args.no_memory and not ends
    in_turn = cpu and args.suite in FEATURE_SUITES
    return Settings(
        device,
        args.seed,
        args.threads,
        effort,
        memory,
        patience,
        now + limit,
        now + MEMORY_SHARE * limit,
        speed,
        in_turn,
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
        "timer": timer(args, settings),
        "statistics": "median, 20th and 80th percentile",
        "memory": ""
        if args.suite in (SPEED, DECODE)
        else "torch.cuda.max_memory_allocated"
        if settings.device.type == "cuda"
        else "VmHWM of a fresh process",
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "peers": {peer.name: peer.what for peer in peers_of(args.suite).values()},
    }


def timer(args: argparse.Namespace, settings: Settings) -> str:
    """What measures latencies, in words."""
    gpu = settings.device.type == "cuda"
    if settings.in_turn:
        return "timeit, a sample of each peer in turn"
    told = "timeit, and torch.utils.benchmark.Timer for calls shorter than effort.seconds"
    if args.suite != DECODE:
        return "triton.testing.do_bench" if gpu else told
    told = f"triton.testing.do_bench_cudagraph, {REPLAY:g} ms a replay" if gpu else told
    return f"{told}; each call on another copy of its cache, {APART[settings.device.type] / 1e6:.0f} MB of them in turn"


def peers_of(suite: str) -> dict[str, Peer]:
    """Who can be measured in a suite."""
    return decode_peers.PEERS if suite == DECODE else PEERS


def suited(suite: str) -> tuple[str, ...]:
    """The peers of a suite where none are named."""
    if suite == DECODE:
        return tuple(decode_peers.PEERS)
    if suite in FEATURE_SUITES:
        return FEATURE_PEERS
    # SDPA goes backend by backend where it is not features that are timed; standard attention is no rival in a race.
    left_out = (SDPA, STANDARD) if suite == SPEED else (SDPA, *RACE_ONLY)
    return tuple(peer for peer in PEERS if peer not in left_out)


def files_of(suite: str, dtype: str, device: torch.device) -> tuple[str, str]:
    """The stem of a suite's JSON and the name of its page; races in another dtype have files of their own."""
    if suite in (SPEED, DECODE) and device.type == "cuda" and dtype != "bfloat16":
        suite = f"{suite}-{dtype}"
    elif suite not in OWN_FILES:
        return "results", "report.md"
    return suite, f"{suite}.md"


def race_all(
    record: Record, cases: Sequence[Case], peers: Sequence[Peer], settings: Settings, step: Progress,
    save: Callable[[Case], None], args: argparse.Namespace,
) -> None:  # fmt: skip
    """The speed suite: the ceiling of this run, then every peer on every case, on a GPU in processes of their own."""
    from bench.ceiling import ceiling, clocks
    from bench.overlap import tiles_of

    with ExitStack() as stack:
        measured: Callable[..., list[Row]] = measure
        if args.apart if args.apart is not None else settings.device.type == "cuda":
            apart = Apart(Path(stack.enter_context(folder())), args.patience or SPEED_PATIENCE)
            stack.callback(apart.close)
            apart.recall(record)
            apart.begin(peer.name for peer in peers if not all(peer.absent(case, settings.device) for case in cases))
            measured = apart.measure

        def timed(case: Case, peer: Peer, *rest: Any) -> list[Row]:
            start = time.monotonic()
            rows = measured(case, peer, *rest)
            record.speed["seconds"].setdefault(case.name, {})[peer.name] = round(time.monotonic() - start, 2)
            return rows

        dtype = args.dtype if settings.device.type == "cuda" else "float32"
        record.speed.setdefault("ceilings", []).append(ceiling(settings.device, dtype))
        for name in ("clocks", "tiles", "seconds"):
            record.speed.setdefault(name, {})

        def finished(case: Case) -> None:
            try:
                tiles = tiles_of(record, case, settings.device)
            except Exception as error:  # the timings stand without it
                tiles = {}
                step(f"{case.name}: its tiles are not told: {error}")
            if tiles and (time.monotonic() <= settings.deadline or case.name not in record.speed["tiles"]):
                record.speed["clocks"][case.name] = clocks(settings.device)
                record.speed["tiles"][case.name] = tiles
            save(case)

        time_all(record, cases, peers, settings, step, finished, timed)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit code."""
    args = parse(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("no GPU here: --device cpu, or none named, measures this CPU", file=sys.stderr)
        return 4
    if args.suite == "overhead":
        from bench import overhead

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return overhead.main(["--out", str(args.out or RESULTS / records.slug(records.machine(device, 1)))])
    if args.suite == "scale":
        from bench import scale_suite

        out = args.out or RESULTS / records.slug(records.machine(torch.device("cpu"), 1))
        told = ["--quick"] * args.quick + ["--no-memory"] * args.no_memory
        return scale_suite.main(["--out", str(out), "--seed", str(args.seed), *told])
    settings = settings_of(args)
    if args.suite in ("error", "cold"):
        from bench import cold, error

        out = args.out or RESULTS / records.slug(records.machine(settings.device, args.threads))
        begin = error.run if args.suite == "error" else cold.run
        return begin(out, settings.device, settings.seed, settings.threads, args.quick)
    try:
        import matplotlib  # noqa: F401
        from tqdm import tqdm
    except ImportError as error:
        print(f"the benchmark needs {error.name}: pip install 'flash-triton[bench]'", file=sys.stderr)
        return 2
    from bench import decode_plot, decode_report, plot, race, race_plot, report

    torch.set_num_threads(settings.threads)
    name = suite_of(args)
    suite = shapes.suite(name, settings.device, args.dtype, args.quick)
    wanted = [case for case in suite if not args.cases or any(text in case.name for text in args.cases)]
    if unknown := set(args.peers) - set(peers_of(name)):
        print(f"the {name} suite has no peer {', '.join(sorted(unknown))}", file=sys.stderr)
        return 2
    peers = [peers_of(name)[peer] for peer in args.peers or suited(name)]
    machine = records.machine(settings.device, settings.threads)
    out = args.out or RESULTS / records.slug(machine)
    writing = Writing()
    with writing.attempt(out):
        out.mkdir(parents=True, exist_ok=True)
    stem, page = files_of(name, args.dtype, settings.device)
    path = out / f"{stem}.json"
    record = Record(machine, described(args, settings), {}, {}, {})
    if args.resume and path.exists():
        try:
            earlier = records.load(path)
        except (OSError, ValueError, KeyError, TypeError) as error:
            print(f"cannot resume from {path}: {type(error).__name__}: {error}", file=sys.stderr)
            return 2
        record.cases, record.checked, record.speed = earlier.cases, earlier.checked, earlier.speed
        anew = {(case.name, peer) for case in wanted for peer in args.again}
        record.rows = {key: row for key, row in earlier.rows.items() if key[:2] not in anew}
    weighed = weighed_cases(args, settings, wanted)

    def save(case: Case | None = None) -> None:
        with writing.attempt(path):
            record.save(path)

    weighed_peers = [peer.name for peer in peers if peer.name in (STANDARD, OURS, SDPA)]

    passes = sum(what in MEMORY_PASSES for case in weighed for what in passes_of(case, settings.device))
    total = passes * len(weighed_peers) + len(wanted) * len(peers)
    with tqdm(total=total, unit="", dynamic_ncols=True, mininterval=0.5) as bar:

        def step(text: str) -> None:
            bar.set_description_str(text)
            bar.update()

        weigh_all(record, weighed, weighed_peers, settings, step)
        if name == SPEED:
            race_all(record, wanted, peers, settings, step, save, args)
        elif name == DECODE:
            decode.time_all(record, wanted, peers, settings, step, save)
        else:
            time_all(record, wanted, peers, settings, step, save)
    records.compare_peers(record)
    if name == SPEED:
        race.finish(record, settings.deadline)
    elif name == DECODE:
        decode_report.finish(record)
    save()
    text = {SPEED: race, DECODE: decode_report}.get(name, report).report(record)
    pictures: Sequence[Path] = ()
    with writing.attempt(out / page):
        (out / page).write_text(text, encoding="utf-8")
    with writing.attempt(out):
        drawing = {SPEED: race_plot, DECODE: decode_plot}.get(name)
        pictures = drawing.draw(record, out, stem) if drawing else plot.draw(record, out)
    print(*pictures, text, sep="\n")
    ours = [row for row in record.rows.values() if row.peer in OURS_ALL]
    wrong = any(row.outcome in ("wrong", "error") or row.peak_outcome == "error" for row in ours)
    unwritten = writing.status()
    return int(wrong) or unwritten


if __name__ == "__main__":
    sys.exit(main())
