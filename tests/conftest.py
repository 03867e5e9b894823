"""Where tests run, and what watches them.

On a CPU kernels run interpreted, repaired (interpreter/repair.py) and with every memory access checked
(interpreter/memory.py). On a GPU the same test bodies run compiled, and guard bands around every tensor stand in for
the checker. Triton reads TRITON_INTERPRET when it decorates a kernel, so these are different processes:

    pytest                  kernels interpreted; compile tests are left out
    pytest -m aot           kernels compiled for targets that need not be present
    pytest -m gpu           the interpreted tests' bodies, on this machine's GPU
"""

import hashlib
import importlib.util
import os
import random
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from zlib import crc32

import pytest
import torch

BAND = 4096  # bytes on either side of a tensor, a multiple of every alignment that kernels ask for
EMPTY = torch.empty  # the stock one: fixtures below replace the name


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None


def _asks_for(config: pytest.Config, marker: str) -> bool:
    """Whether `-m` selects a marker, rather than leaving it out."""
    return marker in config.getoption("markexpr", "").replace(f"not {marker}", "")


def pytest_configure(config: pytest.Config) -> None:
    if not (_asks_for(config, "aot") or _asks_for(config, "gpu")):
        os.environ.setdefault("TRITON_INTERPRET", "1")
    if _interpreted():
        from tests.interpreter import haste, memory, repair

        repair.install()
        haste.install()
        memory.install()
    torch.set_num_threads(1)  # xdist brings the processes
    if config.getoption("order") is None:
        told = getattr(config, "workerinput", {})
        config.option.order = told.get("order", random.randrange(1, 10**6))


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Tell a process of xdist what was drawn: all of them must have the same order."""
    node.workerinput["order"] = node.config.getoption("order")


def pytest_sessionstart(session: pytest.Session) -> None:
    """Say which order it is, with -q too: the header does not come then."""
    terminal = session.config.pluginmanager.get_plugin("terminalreporter")
    if terminal is not None and not hasattr(session.config, "workerinput"):
        terminal.write_line(f"the order of tests: --order {session.config.getoption('order')}")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--share",
        type=int,
        default=1,
        metavar="N",
        help="of each test only every N-th set of parameters, drawn by name",
    )
    parser.addoption(
        "--order",
        type=int,
        metavar="N",
        help="seed of the order that tests run in, drawn for each run where it is not given; 0 is as they are written",
    )


def drawn(items: list[pytest.Item], share: int) -> list[pytest.Item]:
    """Every `share`-th of the sets of parameters of one test, at least one: alike in every process."""
    ranked = sorted(items, key=lambda item: crc32(item.name.encode()))
    return ranked[: -(-len(ranked) // share)]


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> Iterator[None]:
    """Marks before `-m` deselects, `--share` and `--order` after it."""
    mark(config, items)
    yield
    if (share := config.getoption("share")) > 1:
        kept = {item.nodeid for function in by_function(items) for item in drawn(function, share)}
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in kept])
        items[:] = [item for item in items if item.nodeid in kept]
    if seed := config.getoption("order"):
        items[:] = shuffled(items, seed)


def shuffled(items: list[pytest.Item], seed: int) -> list[pytest.Item]:
    """Files, and the tests of each, in the order of a seed: alike in every process, whatever else is run."""

    def place(name: str) -> bytes:
        return hashlib.sha256(f"{seed} {name}".encode()).digest()

    return sorted(items, key=lambda item: (place(item.nodeid.partition("::")[0]), place(item.nodeid)))


def by_function(items: list[pytest.Item]) -> Iterable[list[pytest.Item]]:
    """The items of each test, whatever their parameters."""
    found: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        found[item.nodeid.partition("[")[0]].append(item)
    return found.values()


def mark(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A test marked `interpret` runs where kernels are interpreted, and by `-m gpu` on a GPU, unless gpu=False.

    Of one marked `sampled(n)` as well every n-th set of parameters, drawn by name, is for all runs; others are slow's.
    With `sampled(n, all=True)` that is so of sets that interpret nothing, too.
    """
    on_gpu = _asks_for(config, "gpu") and not _interpreted()
    sampled = [
        item
        for item in items
        if (marker := item.get_closest_marker("sampled"))
        and (marker.kwargs.get("all") or item.get_closest_marker("interpret"))
    ]
    for function in by_function(sampled):
        every = function[0].get_closest_marker("sampled")
        assert every is not None
        kept = {item.nodeid for item in drawn(function, every.args[0])}
        for item in function:
            if item.nodeid not in kept:
                item.add_marker(pytest.mark.slow)
    for item in items:
        marks = {mark.name for mark in item.iter_markers()}
        mark = item.get_closest_marker("interpret")
        if on_gpu and mark is not None and mark.kwargs.get("gpu", True):
            item.add_marker(pytest.mark.gpu)
            marks.add("gpu")
        reason = None
        if "gpu" in marks and not (on_gpu and torch.cuda.is_available()):
            reason = "needs a GPU and `-m gpu`"
        elif "interpret" in marks and not (on_gpu or _interpreted()):
            reason = "needs Triton and TRITON_INTERPRET=1 from the start of the process"
        elif "integrations" in marks and importlib.util.find_spec("neuralforecast") is None:
            reason = "needs the packages of `make test-integrations`"
        elif "aot" in marks and _interpreted():
            reason = "needs `pytest -m aot`, without TRITON_INTERPRET: compiles kernels"
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=reason))


class GuardBands:
    """Tensors carved out of buffers with NaN margins: a stray store changes these, a stray load shows in the result.

    Less exact than the interpreter's checker: a stray load whose value is masked afterwards goes unseen.
    """

    def __init__(self) -> None:
        self.buffers: list[tuple[torch.Tensor, int]] = []

    def like(self, x: torch.Tensor, device: torch.device) -> torch.Tensor:
        """An uninitialised tensor with x's shape, strides and dtype, and NaN between its elements."""
        last = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
        nbytes = (last + 1) * x.element_size() if x.numel() else 0
        buffer = EMPTY(nbytes + 2 * BAND + -nbytes % 16, dtype=torch.uint8, device=device).fill_(0xFF)
        self.buffers.append((buffer, nbytes))
        guarded = EMPTY(0, dtype=x.dtype, device=device)
        return guarded.set_(buffer.untyped_storage(), BAND // x.element_size(), x.shape, x.stride())

    def check(self) -> None:
        for buffer, nbytes in self.buffers:
            assert (buffer[:BAND] == 0xFF).all(), "a kernel wrote in front of a tensor"
            assert (buffer[BAND + nbytes :] == 0xFF).all(), "a kernel wrote past the end of a tensor"
        self.buffers.clear()


@pytest.fixture
def device() -> torch.device:
    """Where kernels run: the CPU, interpreted, or the GPU."""
    return torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")


@pytest.fixture(autouse=True)
def seeds() -> None:
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def guard_bands(monkeypatch: pytest.MonkeyPatch) -> Iterator[GuardBands]:
    """Fill what the library allocates with NaN, on a GPU between guard bands; forget the launches of the last test."""
    from tests.interpreter.poison import poison

    bands = GuardBands()

    def watched(stock: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def allocate(*args: Any, **kwargs: Any) -> torch.Tensor:
            x = stock(*args, **kwargs)
            if torch.compiler.is_compiling():
                return x
            module = sys._getframe(1).f_globals.get("__name__", "")
            if not module.startswith("flash.") or type(x) is not torch.Tensor or x.device.type == "meta":
                return x
            return poison(bands.like(x, x.device) if x.device.type == "cuda" else x)

        return allocate

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, watched(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "new_empty", watched(torch.Tensor.new_empty))
    if _interpreted():
        from tests.interpreter import memory

        memory.launches.clear()
    yield bands
    bands.check()


@pytest.fixture
def place(device: torch.device, guard_bands: GuardBands) -> Callable[[torch.Tensor], torch.Tensor]:
    """Move a tensor to where kernels run, strides kept, between guard bands on a GPU."""

    def move(x: torch.Tensor) -> torch.Tensor:
        return x if device.type == "cpu" else guard_bands.like(x, device).copy_(x)

    return move


@pytest.fixture
def launches() -> list[Any]:
    """The launches of this test so far, oldest first (`tests.interpreter.memory.Launch`); interpreted kernels only."""
    from tests.interpreter import memory

    return memory.launches


@pytest.fixture(scope="session")
def teams() -> Iterator[list[Any]]:
    """The teams of this process, the last one at work."""
    found: list[Any] = []
    yield found
    for team in found:
        team.end()


@pytest.fixture
def team(teams: list[Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Four ranks of torch.distributed, all of them well: a `tests.ranks.Team`."""
    from tests.ranks import Team

    if not teams or not teams[-1].alive():
        teams.append(Team(tmp_path_factory.mktemp("ranks")))
    return teams[-1]
