"""Run jobs in a child process, so that one that crashes, hangs or spoils the GPU's context costs itself alone."""

import multiprocessing
import os
import sys
import threading
from collections.abc import Callable
from importlib import import_module
from multiprocessing.connection import Connection
from typing import Any

Outcome = dict[str, Any]  # "status": ok, wrong, oom, compile_error, error, crash or timeout; "note"; of ok, "ms"


class NotStarted(RuntimeError):
    """A child process does not come up."""


class Worker:
    """A child process that runs one job after another, and is replaced when it dies.

    Args:
        runner: "module:function", a function of a job that returns an Outcome; it is imported in the child.
        timeout: seconds that a job may take.
        start_timeout: seconds that the child may take to start.
    """

    def __init__(self, runner: str, timeout: float, start_timeout: float = 120.0) -> None:
        self.runner = runner
        self.timeout = timeout
        self.start_timeout = start_timeout
        self._child: multiprocessing.process.BaseProcess | None = None
        self._pipe: Connection | None = None

    def run(self, job: Any) -> Outcome:
        """The outcome of a job, whatever becomes of the child.

        Args:
            job: what the runner takes; picklable.

        Returns:
            What the runner returned, or status "crash" or "timeout".

        Raises:
            NotStarted: there is no child, and none can be started.
        """
        pipe = self._pipe or self._start()
        try:
            pipe.send(job)
            if not pipe.poll(self.timeout):
                self.close()
                return {"status": "timeout", "note": f"more than {self.timeout:.0f} s"}
            outcome: Outcome = pipe.recv()
        except (EOFError, OSError):
            child = self._child
            if child is not None:
                child.join(10)
            note = f"the process ended with {child.exitcode if child else None}"
            self.close()
            return {"status": "crash", "note": note}
        if outcome["status"] == "crash":  # it lives, but its context does not
            self.close()
        return outcome

    def _start(self) -> Connection:
        context = multiprocessing.get_context("spawn")  # a forked child could not use the GPU
        ours, theirs = context.Pipe()
        child = context.Process(target=_serve, args=(self.runner, theirs), daemon=True)
        child.start()
        theirs.close()
        self._child, self._pipe = child, ours
        if not ours.poll(self.start_timeout):
            self.close()
            raise NotStarted(f"the process for {self.runner} did not start in {self.start_timeout:.0f} s")
        try:
            ours.recv()
        except EOFError:
            self.close()
            raise NotStarted(f"the process for {self.runner} ended as it started") from None
        return ours

    def close(self) -> None:
        """End the child."""
        if self._pipe is not None:
            self._pipe.close()
        if self._child is not None:
            self._child.kill()
            self._child.join(10)
        self._child = self._pipe = None


def _serve(runner: str, pipe: Connection) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    module, _, name = runner.partition(":")
    function: Callable[[Any], Outcome] = getattr(import_module(module), name)
    pipe.send("ready")
    while True:
        try:
            job = pipe.recv()
        except EOFError:  # the parent is gone
            return
        try:
            pipe.send(attempt(function, job))
        except BrokenPipeError:
            return


def _end_with_parent() -> None:
    """A job that hangs does not outlive a parent that was killed, and keeps no GPU from the next one."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)


def attempt(function: Callable[[Any], Outcome], job: Any) -> Outcome:
    """Run a job; an exception becomes an outcome, and lets go of what its frames hold."""
    try:
        return function(job)
    except Exception as error:
        status, note = _status(error), f"{type(error).__name__}: {error!s:.200}"
    if status == "oom" and "torch" in sys.modules:
        sys.modules["torch"].cuda.empty_cache()
    return {"status": status, "note": note}


def _status(error: BaseException) -> str:
    """What kind of failure an exception, or one that it was raised from, is."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__
    names = {kind.__name__ for each in chain for kind in type(each).__mro__}
    words = " ".join(str(each) for each in chain)
    if names & {"OutOfMemoryError", "OutOfResources"}:
        return "oom"
    if names & {"CompilationError", "PTXASError", "CompileTimeAssertionFailure"} or "PassManager" in words:
        return "compile_error"
    if "AcceleratorError" in names or "CUDA error" in words or "HIP error" in words or "illegal memory" in words:
        return "crash"
    return "error"
