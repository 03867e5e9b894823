"""Runs the slice of tests on every mutant of the kernels, and holds the survivors to a list.

    python -m tests.mutation.run                          every mutant
    python -m tests.mutation.run --sample 100 --seed 3    some of them
    python -m tests.mutation.run --only score.visible     those whose name holds a text

One process imports everything and runs the slice once, noting which lines each case reaches. A mutant is a fork of it:
the change is compiled in place of the function, and the cases that reach its line are run until one fails. A crash or
a time-out is a failure too. Survivors must be in survivors.txt, each with the reason that no test could tell it from
the original.
"""

import argparse
import gc
import importlib
import os
import random
import signal
import sys
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
LIST = Path(__file__).with_name("survivors.txt")
SOURCES = ("kernels/*.py", "flash/mods.py")
LEAST = 0.97  # of the mutants that are not equivalent
PATIENCE = 5.0  # seconds, and ten times what the cases take unchanged


class Result(NamedTuple):
    """What became of a mutant.

    Args:
        mutant: the change.
        killer: the case that failed, and how; empty for a survivor.
        seconds: of the fork.
    """

    mutant: Any
    killer: str
    seconds: float


def sources() -> dict[str, str]:
    """The files that are mutated."""
    paths = [path for pattern in SOURCES for path in sorted(ROOT.glob(pattern))]
    return {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in paths}


def every_mutant() -> list[Any]:
    from tests.mutation.mutator import mutants

    return [mutant for path, source in sources().items() for mutant in mutants(path, source)]


def listed(text: str) -> dict[str, str]:
    """The equivalent mutants of a list, with the reason: `# reason` lines, then the names that they are true of."""
    reasons: dict[str, str] = {}
    reason: list[str] = []
    named = False
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("#"):
            reason = [] if named else reason
            reason.append(line[1:].strip())
            named = False
        elif line.strip():
            if not reason:
                raise ValueError(f"{LIST.name}:{number}: no reason stands above {line}")
            if line in reasons:
                raise ValueError(f"{LIST.name}:{number}: listed twice: {line}")
            reasons[line] = " ".join(reason)
            named = True
        elif not named:
            reason = []
    return reasons


def watch() -> None:
    """Make this process a place to test kernels in; before anything imports them."""
    os.environ["TRITON_INTERPRET"] = "1"
    import torch

    from tests.interpreter import memory, repair
    from tests.mutation import slice

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    repair.install()
    memory.install()
    slice.watch_allocations()


class Lines:
    """Notes which lines of the mutated files a call reaches."""

    def __init__(self, paths: Iterable[str]) -> None:
        self.names = {path: str((ROOT / path).resolve()) for path in paths}
        self.known: dict[str, str | None] = {}
        self.reached: set[tuple[str, int]] = set()

    def path_of(self, filename: str) -> str | None:
        """The mutated file that code was compiled from, also through a link."""
        if filename not in self.known:
            real = os.path.realpath(filename)
            self.known[filename] = next((path for path, name in self.names.items() if name == real), None)
        return self.known[filename]

    def trace(self, frame: FrameType, event: str, arg: Any) -> Any:
        path = self.path_of(frame.f_code.co_filename)
        if path is None:
            return None

        def local(frame: FrameType, event: str, arg: Any) -> Any:
            if event == "line":
                self.reached.add((path, frame.f_lineno))
            return local

        return local

    def of(self, call: Callable[[], Any]) -> Any:
        self.reached = set()
        sys.settrace(self.trace)
        try:
            return call()
        finally:
            sys.settrace(None)


class Trial:
    """The slice, run once unchanged: what each case needs, and where it goes."""

    def __init__(self, cases: Iterable[Any], verbose: bool = False) -> None:
        from tests.mutation import slice

        self.sources = sources()
        self.check = slice.check
        self.prepared: list[Any] = []
        self.seconds: list[float] = []
        self.cases_at: dict[tuple[str, int], list[int]] = defaultdict(list)
        lines = Lines(self.sources)
        for i, case in enumerate(cases):
            self.prepared.append(slice.prepare(case, lines.of))
            start = time.perf_counter()
            complaint = self.check(self.prepared[-1])
            self.seconds.append(time.perf_counter() - start)
            if complaint:
                raise AssertionError(f"{case.name}: a second run differs: {complaint}")
            for place in lines.reached:
                self.cases_at[place].append(i)
            if verbose:
                print(f"  {self.seconds[-1]:.2f} s  {case.name}", flush=True)
        self.killers: dict[str, Counter[int]] = defaultdict(Counter)

    def order(self, mutant: Any) -> list[int]:
        """The cases that reach a mutant: first those that killed others of its function, then the quickest."""
        first, last = mutant.lines
        reach = {i for line in range(first, last + 1) for i in self.cases_at[mutant.path, line]}
        return sorted(reach, key=lambda i: (-self.killers[mutant.function][i], self.seconds[i]))

    def attempt(self, mutant: Any, order: list[int], pipe: int) -> None:
        """In a fork: run the cases on a mutant; write the number of the one that fails, and why, into the pipe."""
        from tests.mutation.mutator import install, mutated

        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, PATIENCE + 10 * sum(self.seconds[i] for i in order))
        module = importlib.import_module("flash." + mutant.path.removeprefix("flash/")[:-3].replace("/", "."))
        function = getattr(module, mutant.function)
        try:
            install(function, mutated(self.sources[mutant.path], mutant), str(ROOT / mutant.path))
        except SyntaxError as error:
            os.write(pipe, f"-1 {error}".encode())
            return
        for i in order:
            try:
                complaint = self.check(self.prepared[i])
            except BaseException as error:
                complaint = f"{type(error).__name__}: {error}"
            if complaint:
                os.write(pipe, f"{i} {complaint[:400]}".encode())
                return

    def fork(self, mutant: Any) -> tuple[int, int]:
        """(process, pipe) of a fork that tries a mutant."""
        order = self.order(mutant)
        read, write = os.pipe()
        process = os.fork()
        if process == 0:
            code = 1
            try:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
                self.attempt(mutant, order, write)
                code = 0
            finally:
                os._exit(code)
        os.close(write)
        return process, read

    def collect(self, mutant: Any, status: int, pipe: int, seconds: float) -> Result:
        """What a fork found."""
        with os.fdopen(pipe, "rb") as stream:
            text = stream.read().decode(errors="replace")
        if text:
            i, _, complaint = text.partition(" ")
            self.killers[mutant.function][int(i)] += 1
            case = self.prepared[int(i)].case.name if int(i) >= 0 else "compile"
            return Result(mutant, f"{case}: {complaint}", seconds)
        if os.WIFSIGNALED(status):
            return Result(mutant, f"signal {os.WTERMSIG(status)}", seconds)
        if os.WEXITSTATUS(status):
            raise RuntimeError(f"the test of {mutant.name} itself failed")
        return Result(mutant, "", seconds)

    def results(self, mutants: Iterable[Any], jobs: int) -> Iterable[Result]:
        """Try mutants, `jobs` at a time."""
        gc.collect()
        gc.freeze()  # or each fork would copy what its collector touches
        waiting = iter(mutants)
        running: dict[int, tuple[Any, int, float]] = {}
        while True:
            while len(running) < jobs and (mutant := next(waiting, None)) is not None:
                process, pipe = self.fork(mutant)
                running[process] = mutant, pipe, time.perf_counter()
            if not running:
                return
            process, status = os.wait()
            mutant, pipe, start = running.pop(process)
            yield self.collect(mutant, status, pipe, time.perf_counter() - start)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutation.run", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--sample", type=int, metavar="N", help="try N mutants drawn at random; default: all")
    parser.add_argument("--seed", type=int, default=0, help="of the draw; default: 0")
    parser.add_argument("--only", default="", metavar="TEXT", help="try those whose name holds TEXT")
    parser.add_argument("--jobs", type=int, default=2, help="processes; default: 2")
    parser.add_argument("--verbose", action="store_true", help="print every case, and what killed each mutant")
    options = parser.parse_args(arguments)
    watch()
    from tests.mutation.slice import CASES

    equivalent = listed(LIST.read_text(encoding="utf-8"))
    mutants = [mutant for mutant in every_mutant() if options.only in mutant.name]
    names = {mutant.name for mutant in every_mutant()}
    gone = [name for name in equivalent if name not in names]
    if options.sample is not None:
        mutants = random.Random(options.seed).sample(mutants, min(options.sample, len(mutants)))
        print(f"{len(mutants)} mutants, drawn with --seed {options.seed}")
    start = time.perf_counter()
    trial = Trial(CASES, options.verbose)
    print(f"{len(CASES)} cases run unchanged in {time.perf_counter() - start:.0f} s", flush=True)

    killed, same, new = 0, 0, []
    start = time.perf_counter()
    for result in trial.results(mutants, options.jobs):
        mutant = result.mutant
        place = f"{mutant.path}:{mutant.line}"
        if options.verbose:
            print(f"{result.seconds:.2f} s  {place}  {mutant.name}  <-  {result.killer or 'survived'}", flush=True)
        if result.killer:
            killed += 1
            if mutant.name in equivalent:
                print(f"listed as equivalent, but killed: {place}  {mutant.name}\n    by {result.killer}", flush=True)
        elif mutant.name in equivalent:
            same += 1
        else:
            new.append(mutant)
            reached = "" if trial.order(mutant) else "  (no case reaches it)"
            print(f"survived: {place}  {mutant.name}{reached}", flush=True)
    for name in gone:
        print(f"listed, but there is no such mutant: {name}")
    seconds = time.perf_counter() - start
    rate = killed / max(1, len(mutants) - same)
    print(
        f"{len(mutants)} mutants in {seconds:.0f} s: {killed} killed, {same} equivalent, {len(new)} survived; "
        f"{100 * rate:.1f} % of those not equivalent killed"
    )
    return 1 if new or gone or rate < LEAST else 0


if __name__ == "__main__":
    sys.exit(main())
