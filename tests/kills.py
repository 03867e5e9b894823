"""Sweeps of a GPU that is not there, run from the command line to the table, and killed on the way.

    python -m tests.kills points FOLDER     20 sweeps killed at random points, each run again to its end
    python -m tests.kills steps FOLDER      a sweep killed at each of its first and last steps with files
    python -m tests.kills crowd FOLDER      60 kills of sweeps that write the same table at the same time

Prints what it found as JSON. Sweeps are forked from this process, which has imported what they need.
"""

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from flash.autotune import sweep, tables
from flash.autotune.journal import Journal
from flash.autotune.measure import Job
from tests.test_sweep import GPU, compile, fast_when_small

TARGET = "cuda:80"  # has no kernels but the plain ones
SMALL = ["--dtype", "bfloat16", "--head-dim", "64", "--seqlen", "1024"]
ROWS = 6  # of a dtype, a head_dim and a length


class Stand:
    """In a Worker's place: compiles and times at once what `compile` and `timed` say.

    Args:
        timed: Job -> Outcome.
        compiled: (target, kernel, variant, config) -> Report.
    """

    def __init__(self, timed: Callable[[Job], Any] = fast_when_small, compiled: Callable[..., Any] = compile) -> None:
        self.timed = timed
        self.compiled = compiled

    def __call__(self, runner: str, timeout: float) -> Any:
        stand = Stand(self.timed, self.compiled)
        stand.run = stand.job if runner == sweep.COMPILER else stand.timed  # type: ignore[attr-defined]
        return stand

    def job(self, job: Any) -> Any:
        return {"status": "ok", "report": self.compiled(*job[0], **job[1])}

    def close(self) -> None:
        """There is no process to end."""


def pretend(patch: pytest.MonkeyPatch, folder: Path, stand: Stand | None = None) -> Path:
    """A GPU, and a folder for its table, which is returned, until the patch is undone."""
    patch.setattr(torch.cuda, "is_available", lambda: True)
    patch.setattr(torch.cuda, "get_device_name", lambda: GPU)
    patch.setattr(sweep, "_target", lambda: TARGET)
    patch.setattr(sweep, "Worker", stand or Stand())
    patch.setattr(sweep, "bar", lambda total: nullcontext())
    patch.setattr(sweep, "answers", lambda: False)
    patch.setattr(tables, "user_folder", lambda: folder)
    return folder / tables.user_table_name(TARGET, GPU)


def forked(arguments: list[str], before: Callable[[], None] = lambda: None) -> int:
    """Start a sweep in a process of its own; its id."""
    child = os.fork()
    if child:
        return child
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    before()
    os._exit(sweep.main(arguments))


def ended(child: int) -> int:
    """The exit code of a process, once it has ended; negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def left(folder: Path) -> list[str]:
    """What a folder holds besides the table and its lock."""
    return sorted(path.name for path in folder.iterdir() if path.suffix not in (".json", ".lock"))


def again(path: Path, whole: bytes) -> dict[str, Any]:
    """Whether a killed sweep, run again, ends in the table of one that was not; how much it had not to do again."""
    kept = len(Journal(sweep.journal_of(path)).entries)
    code = ended(forked(SMALL))
    return {"code": code, "same": path.read_bytes() == whole, "left": left(path.parent), "kept": kept}


def points(folder: Path, kills: int, dice: random.Random) -> Iterator[dict[str, Any]]:
    """Kill sweeps at random points from the first write to the last."""
    with pytest.MonkeyPatch.context() as patch:
        path = pretend(patch, folder / "whole")
        start = time.monotonic()
        assert ended(forked(SMALL)) == 0
        whole, took = path.read_bytes(), time.monotonic() - start
        killed = tried = 0
        while killed < kills and tried < 20 * kills:
            tried += 1
            path = pretend(patch, folder / str(tried))
            child = forked(SMALL)
            while not path.parent.exists():
                time.sleep(0.0001)
            time.sleep(dice.uniform(0, took))
            os.kill(child, signal.SIGKILL)
            if ended(child) == -signal.SIGKILL:  # else it was through
                killed += 1
                yield again(path, whole)


def counted(limit: int, total: list[int]) -> None:
    """Count what this process asks of files from now on, and kill it before it asks for one thing more than `limit`."""
    asked = ("open", "os.mkdir", "os.rename", "os.remove", "os.chmod")

    def hook(event: str, arguments: Any) -> None:
        if event in asked:
            total[0] += 1
            if total[0] > limit:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def steps(folder: Path, first: int = 4, last: int = 12) -> Iterator[dict[str, Any]]:
    """Kill sweeps before each of their first steps with files, and each of their last."""
    with pytest.MonkeyPatch.context() as patch:
        path = pretend(patch, folder / "whole")
        reader, writer = os.pipe()

        def report() -> None:
            total = [0]
            counted(10**9, total)
            stock = os._exit
            patch.setattr(os, "_exit", lambda code: (os.write(writer, str(total[0]).encode()), stock(code)))

        assert ended(forked(SMALL, report)) == 0
        whole, total = path.read_bytes(), int(os.read(reader, 100))
        for limit in (*range(first), *range(total - last, total)):
            path = pretend(patch, folder / str(limit))
            assert ended(forked(SMALL, lambda limit=limit: counted(limit, [0]))) == -signal.SIGKILL  # type: ignore[misc]
            yield again(path, whole)


def crowd(folder: Path, kills: int, dice: random.Random, at_once: int = 3) -> dict[str, Any]:
    """Kill sweeps, of different rows, that write the same table at the same time, and look what is left."""
    calls = list(product(tables.ITEMSIZE, tables.HEAD_DIMS, tables.SEQLENS))
    dice.shuffle(calls)
    found: dict[str, Any] = {"killed": 0, "finished": 0, "corrupt": 0, "lost": 0, "failed": 0}
    done: list[tuple[str, int, int]] = []
    with pytest.MonkeyPatch.context() as patch:
        path = pretend(patch, folder)
        alive: dict[int, tuple[str, int, int]] = {}

        def start(call: tuple[str, int, int]) -> None:
            dtype, head_dim, seqlen = call
            child = forked(["--dtype", dtype, "--head-dim", str(head_dim), "--seqlen", str(seqlen)])
            alive[child] = call

        def reap(flags: int) -> None:
            for child in list(alive):
                pid, status = os.waitpid(child, flags)
                if pid:
                    code, call = os.waitstatus_to_exitcode(status), alive.pop(child)
                    done.extend([call] * (code == 0))
                    found["killed"] += code == -signal.SIGKILL
                    found["failed"] += code not in (0, -signal.SIGKILL)

        begin = time.monotonic()
        start(calls.pop())
        reap(0)
        took = time.monotonic() - begin
        while found["killed"] < kills:
            reap(os.WNOHANG)
            while len(alive) < at_once:
                start(calls.pop())
            time.sleep(dice.uniform(0, took / 2))
            os.kill(dice.choice(list(alive)), signal.SIGKILL)
            found["corrupt"] += path.exists() and not whole(path)
        reap(0)
        start(calls.pop())  # is stopped by nothing that the killed ones have left
        reap(0)
        rows = {(row.dtype, row.head_dim, row.seqlen) for row in tables.parse(path.read_bytes()).rows}
        found["corrupt"] += not whole(path)
        found["lost"] = len(set(done) - rows)
        found |= {"finished": len(done), "left": left(folder)}
    return found


def whole(path: Path) -> bool:
    """Whether a table can be read, and has all rows of each call that it has any of."""
    try:
        rows = tables.parse(path.read_bytes()).rows
    except ValueError:
        return False
    calls = [(row.dtype, row.head_dim, row.seqlen) for row in rows]
    return all(calls.count(call) == ROWS for call in set(calls))


def main() -> None:
    torch.set_num_threads(1)
    what, folder = sys.argv[1], Path(sys.argv[2])
    dice = random.Random(0)
    if what == "crowd":
        print(json.dumps(crowd(folder, 60, dice)))
    else:
        print(json.dumps(list(steps(folder) if what == "steps" else points(folder, 20, dice))))


if __name__ == "__main__":
    main()
