"""Runs the slice of tests on every mutant of the kernels, and holds the survivors to a list.

    python -m tests.mutation.run                          every mutant
    python -m tests.mutation.run --sample 100 --seed 3    some of them
    python -m tests.mutation.run --only score.visible     those whose name holds a text

One process imports everything and runs the slice once, noting which statements each case reaches; one that none reaches
is a gap of its own. A mutant is a fork of it: the change is compiled in place of the function, and cases that reach it
are run until one fails. A crash or a time-out is a failure too. Survivors must be in survivors.txt, each with the
reason that no test could tell it from the original.
"""

import argparse
import ast
import gc
import importlib
import itertools
import json
import math
import os
import random
import signal
import sys
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
LIST = Path(__file__).with_name("survivors.txt")
SOURCES = ("kernels/[!h]*.py", "flash/mods.py")  # Hopper kernels are simulated, with mutants of their own
LEAST = 0.97  # of the mutants that are not equivalent
PATIENCE = 5.0  # seconds, and ten times what a case takes unchanged
ENOUGH = 2.0  # seconds of cases for a mutant that is listed as equivalent


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

    from tests.interpreter import haste, memory, repair
    from tests.mutation import slice

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    repair.install()
    haste.install()
    memory.install()
    slice.watch_allocations()


def slice_of(case: Any) -> Any:
    """The module that runs a case: those of decoding have one of their own."""
    from tests.mutation import cases_decode, slice, slice_decode

    return slice_decode if isinstance(case, cases_decode.Case) else slice


def prepare(case: Any) -> Any:
    """Run a case unchanged, and keep what mutants are compared with; raises where it is wrong."""
    return slice_of(case).prepare(case)


def check(prepared: Any) -> str:
    """What is wrong with a prepared case by the kernels as they now are; empty where nothing is."""
    return slice_of(prepared.case).check(prepared)  # type: ignore[no-any-return]


def interpreted(path: str, name: str) -> Any:
    """A @triton.jit function of a source file, as callers hold it."""
    path = path if path.startswith(("flash/", "tests/")) else f"flash/{path}"
    return getattr(importlib.import_module(path[:-3].replace("/", ".")), name)


class Trial:
    """The slice, run once unchanged: what each case needs, and where it goes.

    Args:
        sources: the text of each mutated file, by its path from the root.
        cases: calls, each with a name and with the change that it is made for, if any (`tells`).
        prepare: makes of a case what `check` takes, with the case in it; raises where the case is wrong.
        check: what is wrong with a prepared case by the kernels as they now are.
        equivalent: names of mutants that are listed: no test can kill them, and they are shown a few cases only.
        limit: seconds of cases that a mutant is shown.
        verbose: print each case with its seconds.
    """

    def __init__(
        self,
        sources: Mapping[str, str],
        cases: Iterable[Any],
        prepare: Callable[[Any], Any],
        check: Callable[[Any], str],
        equivalent: Iterable[str] = (),
        limit: float = math.inf,
        verbose: bool = False,
    ) -> None:
        self.sources, self.check, self.equivalent = sources, check, frozenset(equivalent)
        self.limit = limit
        self.prepared: list[Any] = []
        self.reached: list[Counter[tuple[str, int]]] = []
        self.seconds: list[float] = []
        self.calls: dict[tuple[str, int], str] = {}
        self.cases_at: dict[tuple[str, int], list[int]] = defaultdict(list)
        self.killers: dict[str, Counter[int]] = defaultdict(Counter)
        self.counts: Counter[tuple[str, int]] = Counter()
        self.mark()
        for i, case in enumerate(cases):
            self.prepared.append(prepare(case))
            self.counts.clear()
            start = time.process_time()
            complaint = check(self.prepared[i])
            self.seconds.append(time.process_time() - start)
            if complaint:
                raise AssertionError(f"{case.name}: a second run differs: {complaint}")
            self.reached.append(Counter(self.counts))
            if case.tells:
                self.killers[case.tells][i] += 1
            for statement in self.counts:
                self.cases_at[statement].append(i)
            if verbose:
                print(f"  {self.seconds[i]:.2f} s  {case.name}", flush=True)

    def mark(self) -> None:
        """Let every function count the statements that it comes to."""
        from tests.mutation.mutator import REACHED, install, jit_functions, marked

        for path, source in self.sources.items():
            for function in jit_functions(ast.parse(source)):
                self.calls[path, function.body[0].lineno] = f"{path}:{function.name}"
                body = marked(function, path)
                install(interpreted(path, function.name), body, str(ROOT / path), **{REACHED: self.counts})

    def miscounted(self, i: int, mutant: Any) -> str:
        """The function, other than the mutated one, that a case has called more or less often than it must."""
        for entry, name in self.calls.items():
            if name != f"{mutant.path}:{mutant.function}" and self.counts[entry] != self.reached[i][entry]:
                return f"{name} is called {self.counts[entry]} times, not {self.reached[i][entry]}"
        return ""

    def unreached(self) -> list[str]:
        """The statements that no case comes to, as "path:line"."""
        from tests.mutation.mutator import jit_functions, places

        missed = []
        for path, source in self.sources.items():
            for function in jit_functions(ast.parse(source)):
                lines = sorted({statement.lineno for *_, statement in places(function)})
                missed += [f"{path}:{line}" for line in lines if not self.cases_at.get((path, line))]
        return missed

    def order(self, mutant: Any) -> list[int]:
        """The cases that are shown to a mutant, of those that reach it.

        First come those made for its change, and those that killed others of its function or with its change; then
        those that reach the most statements that no earlier one has reached, for their time.
        """
        kills = self.killers[mutant.function] + self.killers[mutant.change]
        waiting = set(self.cases_at[mutant.path, mutant.statement])
        order: list[int] = [i for i, _ in kills.most_common() if i in waiting]
        waiting.difference_update(order)
        seen: set[tuple[str, int]] = set()
        for i in order:
            seen.update(self.reached[i])
        while waiting:
            best = max(waiting, key=lambda i: ((1 + len(self.reached[i].keys() - seen)) / self.seconds[i], -i))
            order.append(best)
            waiting.remove(best)
            seen.update(self.reached[best])
        spent = itertools.accumulate(self.seconds[i] for i in order)
        limit = min(self.limit, ENOUGH if mutant.name in self.equivalent else math.inf)
        return [i for i, seconds in zip(order, spent, strict=True) if seconds <= limit]

    def attempt(self, mutant: Any, order: list[int], pipe: int) -> None:
        """In a fork: run the cases on a mutant; write the number of the one that fails, and why, into the pipe."""
        from tests.mutation.mutator import install, mutated

        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        try:
            body = mutated(self.sources[mutant.path], mutant)
            install(interpreted(mutant.path, mutant.function), body, str(ROOT / mutant.path))
        except SyntaxError as error:
            os.write(pipe, f"-1 {error}".encode())
            return
        for i in order:
            signal.setitimer(signal.ITIMER_PROF, PATIENCE + 10 * self.seconds[i])
            try:
                self.counts.clear()
                complaint = self.check(self.prepared[i]) or self.miscounted(i, mutant)
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
            if int(i) >= 0:
                self.killers[mutant.function][int(i)] += 1
                self.killers[mutant.change][int(i)] += 1
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
            if process in running:
                mutant, pipe, start = running.pop(process)
                yield self.collect(mutant, status, pipe, time.perf_counter() - start)


def verdict(results: Sequence[Result], equivalent: Mapping[str, str]) -> tuple[int, int, int, float]:
    """How many mutants were killed, survived as listed, survived otherwise; and the rate of those not equivalent."""
    killed = sum(bool(result.killer) for result in results)
    same = sum(not result.killer and result.mutant.name in equivalent for result in results)
    return killed, same, len(results) - killed - same, killed / max(1, len(results) - same)


def told(results: Sequence[Result], equivalent: Mapping[str, str]) -> dict[str, Any]:
    """What became of the mutants: counts, for each file how many it has, and who survived unlisted."""
    import torch

    from bench.record import machine
    from flash.autotune.tables import kernel_hash

    killed, same, _, rate = verdict(results, equivalent)
    return {
        "machine": machine(torch.device("cpu"), 1),
        "kernels": kernel_hash(),
        "mutants": len(results),
        "killed": killed,
        "equivalent": same,
        "rate": round(rate, 4),
        "files": dict(sorted(Counter(result.mutant.path for result in results).items())),
        "survived": sorted(r.mutant.name for r in results if not r.killer and r.mutant.name not in equivalent),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutation.run", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--sample", type=int, metavar="N", help="try N mutants drawn at random; default: all")
    parser.add_argument("--seed", type=int, default=0, help="of the draw; default: 0")
    parser.add_argument("--only", nargs="+", default=[""], metavar="TEXT", help="try those whose name holds a TEXT")
    parser.add_argument("--seconds", type=float, default=math.inf, help="of cases for each; default: all that reach it")
    parser.add_argument("--jobs", type=int, default=2, help="processes; default: 2")
    parser.add_argument("--verbose", action="store_true", help="print every case, and what killed each mutant")
    parser.add_argument("--report", type=Path, help="where to write what became of them, as JSON")
    options = parser.parse_args(arguments)
    watch()
    from tests.mutation import cases, cases_decode

    every_case = [*cases.CASES, *cases_decode.CASES]
    equivalent = listed(LIST.read_text(encoding="utf-8"))
    mutants = [mutant for mutant in every_mutant() if any(text in mutant.name for text in options.only)]
    names = {mutant.name for mutant in every_mutant()}
    gone = [name for name in equivalent if name not in names]
    if options.sample is not None:
        mutants = random.Random(options.seed).sample(mutants, min(options.sample, len(mutants)))
        print(f"{len(mutants)} mutants, drawn with --seed {options.seed}")
    start = time.perf_counter()
    trial = Trial(sources(), every_case, prepare, check, equivalent, options.seconds, options.verbose)
    print(f"{len(every_case)} cases run unchanged in {time.perf_counter() - start:.0f} s", flush=True)

    missed = trial.unreached()
    if missed:
        print(f"no case reaches {', '.join(missed)}")
    start, results = time.perf_counter(), []
    for result in trial.results(mutants, options.jobs):
        results.append(result)
        mutant, is_listed = result.mutant, result.mutant.name in equivalent
        line = f"{mutant.path}:{mutant.line}  {mutant.name}"
        if options.verbose:
            print(f"{result.seconds:.2f} s  {line}  <-  {result.killer or 'survived'}", flush=True)
        if result.killer and is_listed:
            print(f"listed as equivalent, but killed: {line}\n    by {result.killer}", flush=True)
        elif not result.killer and not is_listed:
            print(f"survived: {line}{'' if trial.order(mutant) else '  (no case reaches it)'}", flush=True)
    for name in gone:
        print(f"listed, but there is no such mutant: {name}")
    killed, same, new, rate = verdict(results, equivalent)
    print(
        f"{len(results)} mutants in {time.perf_counter() - start:.0f} s: {killed} killed, {same} equivalent, "
        f"{new} survived; {100 * rate:.1f} % of those not equivalent killed"
    )
    if options.report is not None:
        options.report.write_text(json.dumps(told(results, equivalent), indent=1) + "\n", encoding="utf-8")
    return 1 if new or gone or missed or rate < LEAST else 0


if __name__ == "__main__":
    sys.exit(main())
