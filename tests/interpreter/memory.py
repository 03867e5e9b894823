"""Exact memory checker for interpreted kernels: every lane of every load and store, and how much work a launch did.

Each tensor argument of a launch, also inside NamedTuples, gets a tag in the upper 16 bits of its pointers, which no
user-space address needs. A lane is right when its address is an element of the very tensor its pointer came from: a key
tile that runs into the value half of a packed projection is as wrong as one that leaves the allocation. Caught, by name
of the argument:

    out of bounds            a lane outside its tensor's own elements, or between two of them
    race                     an element written by one program and read or written by another
    duplicate                two lanes of one store at the same element
    never written            a load of an element the library allocated and nobody stored to
    left unwritten           such an element still there after the launch

"Never written" is told by value (poison.py): tests fill what the library allocates with a NaN that no arithmetic makes.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import triton.runtime.interpreter as interpreter
from numpy.typing import NDArray
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle
from triton.tools.tensor_descriptor import TensorDescriptor

from tests.interpreter.poison import POISON, is_poisoned

Array = NDArray[Any]

TAG_SHIFT = np.uint64(48)
ADDRESS = np.uint64((1 << 48) - 1)
NOBODY, MANY = -1, -2  # program ids of an element's readers and writer


class MemoryFault(AssertionError):
    """A kernel touched memory it must not touch, or did not write what it must write."""


@dataclass
class Launch:
    """What one launch did.

    Args:
        kernel: name of the kernel function.
        grid: programs along each axis.
        dots: number of tl.dot executed by all programs.
        loads: elements loaded, by argument name.
        stores: elements stored, by argument name.
    """

    kernel: str
    grid: tuple[int, ...] = ()
    dots: int = 0
    loads: Counter[str] = field(default_factory=Counter)
    stores: Counter[str] = field(default_factory=Counter)


def tensors_in(arg: Any, name: str) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of an argument with their names: `q` for a View q, `mods.q_offset` for a field of a NamedTuple."""
    if isinstance(arg, torch.Tensor):
        yield name, arg
    elif isinstance(arg, TensorDescriptor):
        yield name, arg.base
    elif isinstance(arg, tuple):
        for key, value in zip(getattr(arg, "_fields", range(len(arg))), arg, strict=True):
            yield from tensors_in(value, name if key == "ptr" else f"{name}.{key}")


class Region:
    """The elements of one tensor as sorted runs of consecutive bytes, at most one run for each element."""

    def __init__(self, name: str, tensor: torch.Tensor) -> None:
        self.name, self.tensor, self.itemsize = name, tensor, tensor.element_size()
        axes = sorted((s, n) for n, s in zip(tensor.shape, tensor.stride(), strict=True) if n > 1 and s > 0)
        length, outer = 1, []
        for stride, size in axes:
            if stride == length:  # the axis continues the run
                length *= size
            else:
                outer.append((stride, size))
        starts = np.zeros(1 if tensor.numel() else 0, dtype=np.int64)
        for stride, size in outer:
            starts = np.add.outer(np.arange(size, dtype=np.int64) * stride, starts).ravel()
        starts = np.unique(starts) * self.itemsize + tensor.data_ptr()
        self.starts, self.ends = _merged(starts, starts + length * self.itemsize)
        self.cells = np.zeros(0, dtype=np.int64)  # cell of each run's first byte, set by Checker

    def find(self, address: Array) -> tuple[Array, Array]:
        """For each address the run at or before it, and whether an element of the tensor starts there."""
        run = np.searchsorted(self.starts, address, side="right") - 1
        if not len(self.starts):
            return run, np.zeros(address.shape, dtype=bool)
        inside = (run >= 0) & (address < self.ends[run]) & ((address - self.starts[run]) % self.itemsize == 0)
        return run, inside


Touched = tuple[Region, Array, Array]  # an argument, which lanes are its own, their cells


def _merged(starts: Array, ends: Array) -> tuple[Array, Array]:
    """Sorted intervals with those that overlap or touch joined."""
    if not len(starts):
        return starts, ends
    order = np.argsort(starts, kind="stable")
    starts, ends = starts[order], np.maximum.accumulate(ends[order])
    first = np.concatenate(([True], starts[1:] > ends[:-1]))
    last = np.concatenate((first[1:], [True]))
    return starts[first], ends[last]


class Checker:
    """The memory of one launch: where each argument lies, and which program read and wrote each element."""

    def __init__(self, kernel: str) -> None:
        self.launch = Launch(kernel)
        self.regions: list[Region] = []
        self.tagged: set[int] = set()
        self.program = 0
        self.where: tuple[int, ...] = ()

    def register(self, name: str, tensor: torch.Tensor) -> None:
        self.regions.append(Region(name, tensor))

    def lay_out(self) -> None:
        """One cell of state for each element, shared by arguments that share memory."""
        self.granule = min((r.itemsize for r in self.regions), default=1)
        starts, ends = _merged(
            np.concatenate([np.zeros(0, np.int64), *(r.starts for r in self.regions)]),
            np.concatenate([np.zeros(0, np.int64), *(r.ends for r in self.regions)]),
        )
        sizes = (ends - starts) // self.granule
        offsets = np.concatenate(([0], np.cumsum(sizes)))
        for region in self.regions:
            segment = np.searchsorted(starts, region.starts, side="right") - 1
            region.cells = offsets[segment] + (region.starts - starts[segment]) // self.granule
        self.writer = np.full(int(offsets[-1]), NOBODY, dtype=np.int64)
        self.reader = np.full(int(offsets[-1]), NOBODY, dtype=np.int64)

    def tag(self, tensor: torch.Tensor) -> int:
        """The tag of an argument; the interpreter hands over another object for the same view."""
        views = [(r.tensor.data_ptr(), r.tensor.shape, r.tensor.stride()) for r in self.regions]
        same = [i for i, view in enumerate(views) if view == (tensor.data_ptr(), tensor.shape, tensor.stride())]
        if not same:
            raise self.fault(f"a tensor argument the checker did not find, shape {tuple(tensor.shape)}")
        i = next((i for i in same if i not in self.tagged), same[0])
        self.tagged.add(i)
        return i + 1

    def fault(self, text: str) -> MemoryFault:
        return MemoryFault(f"{self.launch.kernel}, program {self.where}: {text}")

    def touched(self, pointers: Array, what: str) -> list[Touched]:
        """The cells that lanes touch, argument by argument; raises on lanes out of bounds."""
        tags = pointers >> TAG_SHIFT
        found = []
        for tag in (tags[:1] if (tags == tags[0]).all() else np.unique(tags)).tolist():
            if not 1 <= tag <= len(self.regions):
                raise self.fault(f"{what} out of bounds: a pointer that belongs to no argument")
            region, lanes = self.regions[tag - 1], tags == tag
            address = (pointers[lanes] & ADDRESS).astype(np.int64)
            run, inside = region.find(address)
            if not inside.all():
                x, stray = region.tensor, address[~inside]
                raise self.fault(
                    f"{what} out of bounds: {stray.size} of {address.size} lanes are not elements of {region.name} "
                    f"{tuple(x.shape)} with strides {x.stride()}, the first at byte {int(stray[0]) - x.data_ptr()}"
                )
            found.append((region, lanes, region.cells[run] + (address - region.starts[run]) // self.granule))
        return found

    def load(self, touched: list[Touched], bits: Array) -> None:
        """Check lanes that load; bits holds the values they got."""
        for region, lanes, cells in touched:
            self.launch.loads[region.name] += cells.size
            writer = self.writer[cells]
            if ((writer != NOBODY) & (writer != self.program)).any():
                raise self.fault(f"race: load of {region.name}, which another program writes")
            reader = self.reader[cells]
            self.reader[cells] = np.where((reader == NOBODY) | (reader == self.program), self.program, MANY)
            dtype = region.tensor.dtype
            if dtype in POISON and bits.dtype.itemsize == region.itemsize:
                unwritten = bits[lanes].view(f"i{region.itemsize}") == POISON[dtype][1]
                if unwritten.any():
                    raise self.fault(f"never written: load of {int(unwritten.sum())} elements of {region.name}")

    def store(self, pointers: Array) -> None:
        for region, _, cells in self.touched(pointers, "store"):
            self.launch.stores[region.name] += cells.size
            if np.unique(cells).size != cells.size:
                raise self.fault(f"duplicate: two lanes of one store hit the same element of {region.name}")
            for other, verb in ((self.writer[cells], "writes"), (self.reader[cells], "reads")):
                if ((other != NOBODY) & (other != self.program)).any():
                    raise self.fault(f"race: store to {region.name}, which another program {verb}")
            self.writer[cells] = self.program

    def finish(self) -> None:
        for region in self.regions:
            left = int(is_poisoned(region.tensor).sum())
            if left:
                raise MemoryFault(
                    f"{self.launch.kernel}: {left} of {region.tensor.numel()} elements of {region.name} left unwritten"
                )


launches: list[Launch] = []  # of the running test, oldest first; emptied by the fixture in tests/conftest.py
_current: Checker | None = None


def _lanes(pointers: Any, mask: Any) -> tuple[Array, Array]:
    """The pointers under the mask, flat, and the mask broadcast over all pointers."""
    keep = np.broadcast_to(np.asarray(mask.data, dtype=bool), pointers.data.shape)  # a scalar condition comes as int32
    return pointers.data[keep], keep


def _untagged(pointers: Any) -> Any:
    return TensorHandle(pointers.data & ADDRESS, pointers.dtype)


def _hook_memory() -> None:
    stock_load, stock_store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    stock_dot, stock_grid_idx = InterpreterBuilder.create_dot, InterpreterBuilder.set_grid_idx

    def load(self: Any, ptrs: Any, mask: Any, other: Any, *options: Any, **named: Any) -> Any:
        if _current is None:
            return stock_load(self, ptrs, mask, other, *options, **named)
        lanes, keep = _lanes(ptrs, mask)
        touched = _current.touched(lanes, "load") if lanes.size else []  # before any memory is read
        value = stock_load(self, _untagged(ptrs), mask, other, *options, **named)
        _current.load(touched, value.data[keep])
        return value

    def store(self: Any, ptrs: Any, value: Any, mask: Any, *options: Any, **named: Any) -> Any:
        if _current is None:
            return stock_store(self, ptrs, value, mask, *options, **named)
        lanes, _ = _lanes(ptrs, mask)
        if lanes.size:
            _current.store(lanes)
        return stock_store(self, _untagged(ptrs), value, mask, *options, **named)

    def atomic(name: str) -> Callable[..., Any]:
        def method(self: Any, *args: Any) -> Any:
            raise MemoryFault(f"{name}: kernels here use no atomics, they would not be repeatable bit by bit")

        return method

    def dot(self: Any, *args: Any) -> Any:
        if _current is not None:
            _current.launch.dots += 1
        return stock_dot(self, *args)

    def grid_idx(self: Any, x: int, y: int, z: int) -> None:
        stock_grid_idx(self, x, y, z)
        if _current is not None:
            _, ny, nz = self.grid_dim
            _current.program, _current.where = (x * ny + y) * nz + z, (x, y, z)
            _current.launch.grid = tuple(self.grid_dim)

    InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = load, store
    InterpreterBuilder.create_dot, InterpreterBuilder.set_grid_idx = dot, grid_idx
    for name in ("create_atomic_rmw", "create_atomic_cas"):
        setattr(InterpreterBuilder, name, atomic(name))


def _hook_launch() -> None:
    stock_call, stock_cvt = GridExecutor.__call__, interpreter._implicit_cvt

    def convert(arg: Any) -> Any:
        value = stock_cvt(arg)
        if _current is not None and isinstance(arg, torch.Tensor):
            value.handle.data = value.handle.data | (np.uint64(_current.tag(arg)) << TAG_SHIFT)
        return value

    def call(self: Any, *args: Any, **kwargs: Any) -> None:
        global _current
        checker = Checker(self.fn.__name__)
        named = {**dict(zip(self.arg_names, args, strict=False)), **kwargs}
        for name, arg in named.items():
            if name in self.arg_names and name not in self.constexprs:
                for path, tensor in tensors_in(arg, name):
                    checker.register(path, tensor)
        checker.lay_out()
        launches.append(checker.launch)
        _current = checker
        try:
            stock_call(self, *args, **kwargs)
        except interpreter.InterpreterError as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, MemoryFault):
                cause = cause.__cause__
            raise cause or error from None
        finally:
            _current = None
        checker.finish()

    interpreter._implicit_cvt, GridExecutor.__call__ = convert, call


def install() -> None:
    """Check every launch of this process; call it once, after `repair.install` and before a kernel runs."""
    if getattr(GridExecutor, "checked", False):
        return
    _hook_memory()
    _hook_launch()
    GridExecutor.checked = True
