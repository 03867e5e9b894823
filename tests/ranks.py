"""Processes that are ranks of torch.distributed for the time of a test session, and run functions of the tests.

A `Team` keeps its processes, so that only the first test pays for starting them. A function that runs on ranks is a
module's own, takes the process group first, and returns what can be pickled. Where a rank does not answer in time, or
raises what was not expected, all of them are ended and the next test starts anew.
"""

import importlib
import os
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

PATIENCE = 100.0  # seconds, for an answer


def serve(rank: int, size: int, store: str, timeout: float, pipe: Connection) -> None:
    """A rank: run what comes through the pipe, on groups of the first ranks, until nothing is left to come."""
    torch.set_num_threads(1)
    interpret()
    limit = timedelta(seconds=timeout)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=limit)
    groups = {n: dist.new_group(range(n), timeout=limit) for n in range(1, size + 1)}
    while (order := pipe.recv()) is not None:
        module, name, ranks, args = order
        try:
            pipe.send((getattr(importlib.import_module(module), name)(groups[ranks], *args), None))
        except Exception as error:
            pipe.send((None, (type(error).__name__, str(error), traceback.format_exc())))
    dist.destroy_process_group()


def refusals(calls: Sequence[Callable[[], Any]]) -> list[str]:
    """What is said of calls each of which must raise."""
    found = []
    for call in calls:
        with pytest.raises((ValueError, NotImplementedError, RuntimeError)) as error:
            call()
        found.append(str(error.value))
    return found


def interpret() -> None:
    """Where kernels are interpreted, with the interpreter's repair."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        try:
            from tests.interpreter import repair
        except ImportError:  # no Triton here
            return
        repair.install()


class RankError(AssertionError):
    """What ranks raised: their types and messages by rank, None of those that did not."""

    def __init__(self, errors: list[tuple[str, str, str] | None]) -> None:
        self.errors = [None if error is None else error[:2] for error in errors]
        super().__init__("\n".join(f"rank {rank}: {error[2]}" for rank, error in enumerate(errors) if error))


class Team:
    """`size` ranks with a process group."""

    def __init__(self, folder: Path, size: int = 4, timeout: float = 60.0) -> None:
        folder.mkdir(exist_ok=True)
        context = get_context("spawn")
        self.pipes, self.processes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            args = rank, size, str(folder / "store"), timeout, theirs
            process = context.Process(target=serve, args=args, daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def start(self, function: Callable[..., Any], *args: Any, ranks: int) -> None:
        """Have the first ranks begin with a function."""
        for pipe in self.pipes[:ranks]:
            pipe.send((function.__module__, function.__name__, ranks, args))

    def answer(self, rank: int) -> Any:
        """What a rank returned, or (type, message, trace) of what it raised: (value, error)."""
        if not self.pipes[rank].poll(PATIENCE):
            self.end()
            raise AssertionError(f"rank {rank} does not answer: a deadlock?")
        return self.pipes[rank].recv()

    def run(self, function: Callable[..., Any], *args: Any, ranks: int) -> list[Any]:
        """What a function returns on each of the first ranks.

        Raises:
            RankError: some rank raised; the ranks go on.
        """
        self.start(function, *args, ranks=ranks)
        answers = [self.answer(rank) for rank in range(ranks)]
        if any(error for _, error in answers):
            raise RankError([error for _, error in answers])
        return [value for value, _ in answers]

    def alive(self) -> bool:
        """Whether all processes run."""
        return all(process.is_alive() for process in self.processes)

    def end(self) -> None:
        """End the processes, whatever they do."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
