"""Runs Gluon kernels for sm_90 on a CPU: the Python source of a @gluon.jit kernel, with stand-ins for the machine.

    kernel = Simulated(module.some_kernel)      kernel[(programs,)](*args, **constants)

Triton's interpreter refuses Gluon. Here every partition of a program is a thread, and one runs at a time: it hands over
where it waits and after it arrives at a barrier, so that whatever it allowed the others to do happens at once. The
machine is mean, so that an error of protocol shows every time:

    TMA load    poisons its target with NaN when issued, fills it when no thread can go on without
    TMA store   reads its source when it is awaited, and finds NaN where that changed meanwhile
    wgmma       reads its operands when issued and when awaited; where the two differ the product is NaN; until a wait
                completes it nobody can touch its result
    mbarrier    counts arrivals and bytes; a wait asks for a parity, as the machine's does
    fence       a wgmma or a TMA store of memory that threads wrote without a fence raises
    the end     of a partition with a wgmma or a TMA store that was never awaited raises, as a deadlock does at once
                (TimeoutError, naming who waits)

Plain @triton.jit functions run as Python too, those that are interpreted (TRITON_INTERPRET=1) and those that are not,
with a `tl` that makes no tensor: what creates one without a layout cannot be shared with Gluon.

It knows no layouts, no swizzles, no registers and no speed: the compiler does (flash.autotune.resources). Fences are
only asked for, not placed: one that comes before the store that it should follow counts as missing, one too many is
not seen. Threads of one partition are one: a race between warps of a partition is not seen.
"""

import inspect
import itertools
import random
import textwrap
import threading
import types
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from triton.runtime import JITFunction
from triton.runtime.interpreter import InterpretedFunction

from tests.interpreter.values import LANGUAGE as SHARED
from tests.interpreter.values import TYPES, Pointer, Tensor, Type, steps

OPTIONS = {"num_warps", "num_stages", "num_ctas", "maxnreg"}


class Stop(BaseException):
    """Ends a thread whose program has failed elsewhere."""


class Thread:
    """A partition, or the program before it is parted."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.turn = threading.Semaphore(0)
        self.ready: Callable[[], bool] = lambda: True
        self.waits_for = ""
        self.done = False
        self.products: list[Product] = []  # wgmma in flight, oldest first
        self.stores: list[TmaStore] = []


class Program:
    """One program of the grid: its threads, of which one runs at a time, and its TMA loads in flight."""

    def __init__(self, place: tuple[int, ...], grid: tuple[int, ...], seed: int | None) -> None:
        self.place, self.grid = place, grid
        self.random = None if seed is None else random.Random(f"{seed} {place}")
        self.loads: list[Callable[[], None]] = []
        self.threads = [Thread("the program")]
        self.memories: list[Memory] = []
        self.numbers = itertools.count()
        self.error: BaseException | None = None

    def wait_until(self, ready: Callable[[], bool], what: str) -> None:
        me = here.thread
        me.ready, me.waits_for = ready, what
        self.hand_over()

    def pause(self) -> None:
        """Let the others go on, as far as they can."""
        here.thread.ready = lambda: True
        self.hand_over()

    def hand_over(self) -> None:
        me = here.thread
        following = self.next_after(me)
        if following is not me:
            following.turn.release()
            if not me.done:
                me.turn.acquire()
        if self.error is not None and not me.done:
            raise Stop

    def next_after(self, me: Thread) -> Thread:
        at = self.threads.index(me)
        while self.error is None:
            order = self.threads[at + 1 :] + self.threads[: at + 1]
            able = [thread for thread in order if not thread.done and thread.ready()]
            if self.random is not None and self.loads and (not able or self.random.random() < 0.3):
                self.loads.pop(self.random.randrange(len(self.loads)))()
            elif able:
                return able[0] if self.random is None else self.random.choice(able)
            elif self.loads:
                self.loads.pop(0)()
            else:
                waiting = "; ".join(f"{t.name} waits for {t.waits_for}" for t in self.threads if not t.done)
                self.error = TimeoutError(f"deadlock of program {self.place}: {waiting}")
        for thread in self.threads:  # all are to end; who holds a turn finds the error
            thread.turn.release()
        return me

    def run(self, thread: Thread, function: Callable[..., Any], args: Sequence[Any]) -> None:
        """The life of a thread."""
        here.thread, here.program = thread, self
        thread.turn.acquire()
        try:
            if self.error is None:
                function(*args)
                check_nothing_is_left(thread)
        except Stop:
            pass
        except BaseException as error:
            self.error = self.error or error
        thread.done = True
        self.hand_over()

    def part(self, partitions: Sequence[tuple[Callable[..., Any], Sequence[Any]]]) -> None:
        """Run partitions, each a thread, and wait for all of them."""
        made = [Thread(f"partition {n} ({function.__name__})") for n, (function, _) in enumerate(partitions)]
        self.threads += made
        for thread, (function, args) in zip(made, partitions, strict=True):
            threading.Thread(target=self.run, args=(thread, function, args), daemon=True).start()
        self.wait_until(lambda: all(thread.done for thread in made), "its partitions")


here = threading.local()  # .program and .thread of whoever runs


def check_nothing_is_left(thread: Thread) -> None:
    assert not thread.products, f"{len(thread.products)} wgmma of {thread.name} were never awaited"
    assert not thread.stores, f"{len(thread.stores)} TMA stores of {thread.name} were never awaited"


class Barrier:
    """An mbarrier: a phase ends when all arrivals and all bytes are there."""

    def __init__(self, name: str) -> None:
        self.name, self.count, self.pending, self.bytes, self.phases = name, 0, 0, 0, 0

    def init(self, count: int) -> None:
        assert int(count) > 0, f"{self.name} is initialised for {count} arrivals"
        self.count = self.pending = int(count)
        self.bytes = self.phases = 0

    def update(self, arrivals: int, more: int) -> None:
        assert self.count, f"{self.name} was never initialised"
        self.pending -= arrivals
        self.bytes += more
        assert self.pending >= 0, f"{self.name} counts {self.count} arrivals a phase, got more"
        if self.pending == 0 and self.bytes == 0:
            self.phases, self.pending = self.phases + 1, self.count

    def wait(self, parity: int) -> None:
        assert self.count, f"{self.name} was never initialised"
        assert parity in (0, 1), f"a phase has parity 0 or 1, not {parity}"
        missing = f"phase {self.phases} of {self.name}"
        here.program.wait_until(lambda: self.phases % 2 != parity, f"parity {parity}, in {missing}")


class Barriers:
    """Shared memory that holds mbarriers."""

    def __init__(self, items: list[Barrier]) -> None:
        self.items = items

    def index(self, i: Any) -> "Barriers":
        return Barriers([self.items[within(i, len(self.items))]])


def barrier_of(x: Barriers) -> Barrier:
    (only,) = x.items
    return only


class Memory:
    """An allocation of shared memory, and who wrote to it without a fence."""

    def __init__(self) -> None:
        self.writers: set[Thread] = set()


class Shared:
    """A view of shared memory."""

    def __init__(self, memory: Memory, data: torch.Tensor) -> None:
        self.memory, self.data = memory, data

    shape = property(lambda self: list(self.data.shape))
    dtype = property(lambda self: Type(self.data.dtype))
    layout = property(lambda self: None)

    def index(self, i: Any) -> "Shared":
        return Shared(self.memory, self.data[within(i, self.data.shape[0])])

    def slice(self, start: Any, length: Any, dim: Any = 0) -> "Shared":
        return Shared(self.memory, self.data.narrow(int(dim), int(start), int(length)))

    def reshape(self, shape: Sequence[Any]) -> "Shared":
        return Shared(self.memory, self.data.view([int(n) for n in shape]))

    def permute(self, order: Sequence[Any]) -> "Shared":
        return Shared(self.memory, self.data.permute([int(n) for n in order]))

    def load(self, layout: Any = None) -> Tensor:
        return Tensor(self.data.clone())

    def store(self, value: Tensor) -> None:
        assert value.data.dtype == self.data.dtype, f"a {self.dtype} memory takes no {value.dtype}"
        assert value.shape == self.shape, f"a block of {value.shape} does not fill memory of {self.shape}"
        self.data.copy_(value.data)
        self.memory.writers.add(here.thread)

    def fenced(self, what: str) -> torch.Tensor:
        """The memory as the asynchronous proxy sees it."""
        late = [thread.name for thread in self.memory.writers]
        assert not late, f"{what} of memory that {', '.join(late)} wrote without fence_async_shared"
        return self.data


def within(i: Any, length: int) -> int:
    assert 0 <= int(i) < length, f"slot {int(i)} of {length}"
    return int(i)


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.view({2: torch.int16, 4: torch.int32}[x.element_size()])


class Held:
    """Memory that something asynchronous reads, seen when it was issued and again at its end."""

    def __init__(self, source: Shared, what: str) -> None:
        self.data = source.fenced(what)
        self.before = self.data.clone()

    def now(self) -> torch.Tensor:
        return torch.where(bits(self.before) == bits(self.data.contiguous()), self.data, float("nan"))


class Descriptor:
    """A TMA descriptor of the host's: zero is read outside the tensor, and nothing is written there."""

    def __init__(self, host: Any) -> None:
        self.base = host.base
        self.strides = [int(n) for n in host.strides]
        self.shape, self.block_shape = ([int(n) for n in x] for x in (host.shape, host.block_shape))
        assert all(n > 0 for n in self.shape) and self.strides[-1] == 1
        assert all(n * self.base.element_size() % 16 == 0 for n in self.strides[:-1])
        self.tensor = torch.as_strided(host.base, self.shape, self.strides)
        self.dtype, self.layout = Type(host.base.dtype), None
        nbytes = torch.Size(self.block_shape).numel() * host.base.element_size()
        self.nbytes_per_cta = nbytes
        self.block_type = types.SimpleNamespace(shape=self.block_shape, nbytes=nbytes, element_ty=self.dtype)

    def window(self, coordinates: Sequence[Any]) -> tuple[torch.Tensor, tuple[slice, ...]]:
        """What a block has of the tensor, and where it lies in the block."""
        source, block = [], []
        for at, size, length in zip(map(int, coordinates), self.block_shape, self.shape, strict=True):
            begin, end = min(max(at, 0), length), min(max(at + size, 0), length)
            source.append(slice(begin, end))
            block.append(slice(begin - at, end - at) if begin < end else slice(0, 0))
        return self.tensor[tuple(source)], tuple(block)


def tma_load(desc: Descriptor, coord: Sequence[Any], barrier: Barriers, result: Shared, pred: Any = True) -> None:
    if not bool(pred):
        return
    assert result.shape == desc.block_shape, f"a block of {desc.block_shape} does not fill {result.shape}"
    assert len(coord) == len(desc.shape)
    coordinates, target = [int(n) for n in coord], barrier_of(barrier)
    result.data.fill_(float("nan"))

    def arrive() -> None:
        source, where = desc.window(coordinates)
        result.data.zero_()
        result.data[where].copy_(source)
        target.update(0, -desc.block_type.nbytes)

    here.program.loads.append(arrive)


class TmaStore:
    def __init__(self, desc: Descriptor, coord: Sequence[Any], src: Shared, adds: bool) -> None:
        assert src.shape == desc.block_shape, f"a block of {desc.block_shape} is not {src.shape}"
        self.desc, self.coordinates, self.adds = desc, [int(n) for n in coord], adds
        self.held = Held(src, "a TMA store")

    def run(self) -> None:
        target, where = self.desc.window(self.coordinates)
        block = self.held.now()[where]
        target.copy_(target + block if self.adds else block)


def tma_store(adds: bool = False) -> Callable[..., None]:
    return lambda desc, coord, src, **_: here.thread.stores.append(TmaStore(desc, coord, src, adds))


def store_wait(pendings: Any = 0, **_: Any) -> None:
    while len(here.thread.stores) > int(pendings):
        here.thread.stores.pop(0).run()


class Product:
    """A wgmma in flight; its value can be had from the wait that completes it."""

    def __init__(self, a: Any, b: Shared, acc: Any, use_acc: bool) -> None:
        assert isinstance(b, Shared), "the right operand of a wgmma lies in shared memory"
        assert isinstance(a, (Shared, Tensor)) and isinstance(acc, (Tensor, Product)), "a wgmma of something else"
        shapes = [list(x.shape) for x in (a, b)]
        assert [shapes[0][0], shapes[1][1]] == acc.shape and shapes[0][1] == shapes[1][0], f"{shapes} into {acc.shape}"
        assert shapes[0][0] % 64 == 0 and shapes[0][1] % 16 == 0 and a.dtype == b.dtype, f"no wgmma of {shapes}"
        self.a, self.b = (Held(x, "a wgmma") if isinstance(x, Shared) else x for x in (a, b))
        self.acc, self.use_acc, self.shape = acc, use_acc, acc.shape
        self.value: Tensor | None = None

    def run(self) -> None:
        a, b = (x.now() if isinstance(x, Held) else x.data for x in (self.a, self.b))
        acc = self.acc.value if isinstance(self.acc, Product) else self.acc
        product = a.float() @ b.float()
        self.value = Tensor(product + acc.data if self.use_acc else product)

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"the result of a wgmma is touched before its wait ({name})")


def _untouchable(name: str) -> Callable[..., Any]:
    def touch(self: Product, *_: Any) -> Any:
        raise AssertionError(f"the result of a wgmma is touched before its wait ({name})")

    return touch


for _name in ("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "neg", "getitem", "lt", "gt", "bool"):
    setattr(Product, f"__{_name}__", _untouchable(_name))


def warpgroup_mma(a: Any, b: Any, acc: Any, *, use_acc: Any = True, is_async: Any = False, **_: Any) -> Any:
    product = Product(a, b, acc, bool(use_acc))
    here.thread.products.append(product)
    return product if bool(is_async) else warpgroup_mma_wait(0, (product,))


def warpgroup_mma_wait(num_outstanding: Any = 0, deps: Sequence[Any] = ()) -> Any:
    while len(here.thread.products) > int(num_outstanding):
        here.thread.products.pop(0).run()
    values = [x.value if isinstance(x, Product) and x.value is not None else x for x in deps]
    return values[0] if len(values) == 1 else tuple(values)


def fence_async_shared(**_: Any) -> None:
    for memory in here.program.memories:
        memory.writers.discard(here.thread)


def allocate_shared_memory(dtype: Type, shape: Sequence[Any], layout: Any = None, value: Any = None) -> Any:
    sizes = [int(n) for n in shape]
    if dtype == TYPES["int64"]:
        return allocate_mbarrier(batch=torch.Size(sizes).numel())
    shared = Shared(Memory(), torch.full(sizes, float("nan"), dtype=dtype.torch))
    here.program.memories.append(shared.memory)
    if value is not None:
        shared.store(value)
    return shared


def allocate_mbarrier(batch: Any = None, **_: Any) -> Barriers:
    number = next(here.program.numbers)
    return Barriers([Barrier(f"barrier {i} of allocation {number}") for i in range(1 if batch is None else int(batch))])


def arrive(barrier: Barriers, *, count: Any = 1, pred: Any = True) -> None:
    if bool(pred):
        barrier_of(barrier).update(int(count), 0)
        here.program.pause()


def expect(barrier: Barriers, bytes_per_cta: Any = 0, pred: Any = True) -> None:
    if bool(pred):
        barrier_of(barrier).update(1, int(bytes_per_cta))


def wait(barrier: Barriers, phase: Any, pred: Any = True, deps: Sequence[Any] = ()) -> None:
    if bool(pred):
        barrier_of(barrier).wait(int(phase))


def warp_specialize(partitions: Any, worker_num_warps: Any, worker_num_regs: Any = None) -> None:
    assert len(worker_num_warps) == len(partitions) - 1
    assert worker_num_regs is None or len(worker_num_regs) == len(partitions) - 1
    here.program.part(partitions)


class Namespace:
    """A module as kernels see it; what the simulator lacks says so where it is used."""

    def __init__(self, name: str, members: dict[str, Any], hint: str = "") -> None:
        self.__dict__.update(members)
        self._name, self._hint = name, hint

    def __getattr__(self, member: str) -> Any:
        raise NotImplementedError(f"the simulator has no {self._name}.{member}{self._hint}")


def _layout(*_: Any, **__: Any) -> None:
    return None


def _full(shape: Sequence[Any], value: Any, dtype: Type, layout: Any = None) -> Tensor:
    return Tensor(torch.full([int(n) for n in shape], float(value), dtype=torch.float64).to(dtype.torch))


_layout.get_default_for = _layout
LAYOUTS = ("NVMMADistributedLayout", "DotOperandLayout", "SliceLayout", "BlockedLayout", "NVMMASharedLayout")
TMA = {
    "async_copy_global_to_shared": tma_load,
    "async_load": tma_load,
    "async_copy_shared_to_global": tma_store(),
    "async_store": tma_store(),
    "async_atomic_add": tma_store(adds=True),
    "store_wait": store_wait,
}
MBARRIER = {
    "MBarrierLayout": _layout,
    "allocate_mbarrier": allocate_mbarrier,
    "init": lambda barrier, *, count: barrier_of(barrier).init(int(count)),
    "invalidate": lambda barrier: None,
    "expect": expect,
    "arrive": arrive,
    "wait": wait,
}
HOPPER = {
    "fence_async_shared": fence_async_shared,
    "warpgroup_mma": warpgroup_mma,
    "warpgroup_mma_wait": warpgroup_mma_wait,
    "warpgroup_mma_init": lambda x: x,
}
LANGUAGE = SHARED | {
    "program_id": lambda axis: Tensor(torch.tensor(here.program.place[int(axis)], dtype=torch.int32)),
    "num_programs": lambda axis: Tensor(torch.tensor(here.program.grid[int(axis)], dtype=torch.int32)),
}
GLUON = {
    **LANGUAGE,
    **dict.fromkeys(LAYOUTS, _layout),
    "arange": lambda start, end, layout=None: Tensor(torch.arange(int(start), int(end), dtype=torch.int32)),
    "full": _full,
    "zeros": lambda shape, dtype, layout=None: _full(shape, 0, dtype),
    "full_like": lambda x, value: _full(x.shape, value, x.dtype),
    "zeros_like": lambda x: _full(x.shape, 0, x.dtype),
    "convert_layout": lambda x, layout, assert_trivial=False: Tensor(x.data),
    "set_auto_layout": lambda x, layout: Tensor(x.data),
    "allocate_shared_memory": allocate_shared_memory,
    "warp_specialize": warp_specialize,
    "barrier": lambda **_: None,
    "thread_barrier": lambda: None,
}
MODULES = {
    "triton.language": Namespace("tl", LANGUAGE, ", or it makes a tensor, which Gluon gives no layout"),
    "triton.experimental.gluon.language": Namespace("gl", GLUON),
    "triton.experimental.gluon.language.nvidia.hopper": Namespace("hopper", HOPPER),
    "triton.experimental.gluon.language.nvidia.hopper.tma": Namespace("tma", TMA),
    "triton.experimental.gluon.language.nvidia.hopper.mbarrier": Namespace("mbarrier", MBARRIER),
}
FUNCTIONS = TMA | HOPPER | MBARRIER  # names that kernels import one by one


class Simulated:
    """A @gluon.jit kernel that runs on the CPU.

    Args:
        kernel: the kernel.
        seed: None hands over in turn and fills memory as late as can be, which finds most; a number draws both, for
            orders that a right kernel must stand.
        edits: (name of a function, text of its source, what stands there instead): mutants.
    """

    def __init__(self, kernel: Any, seed: int | None = None, edits: Iterable[tuple[str, str, str]] = ()) -> None:
        self.kernel, self.seed = kernel, seed
        self.edits = list(edits)
        self.scopes: dict[int, dict[str, Any]] = {}
        self.made: dict[Any, Callable[..., Any]] = {}
        self.edited: set[str] = set()
        self.function = self.python(kernel)
        names = {name for name, _, _ in self.edits}
        assert self.edited == names, f"the kernel calls no {', '.join(names - self.edited)}"

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *args, **kwargs: self.launch(tuple(map(int, grid)), args, kwargs)

    def launch(self, grid: tuple[int, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        signature = inspect.signature(self.kernel.fn)
        given = {name: value for name, value in kwargs.items() if name in signature.parameters}
        assert kwargs.keys() - given.keys() <= OPTIONS, f"{set(kwargs)} are neither parameters nor options"
        bound = signature.bind(*args, **given)
        bound.apply_defaults()
        values = {
            name: value if is_constant(signature.parameters[name]) else self.argument(value, signature.parameters[name])
            for name, value in bound.arguments.items()
        }
        for place in itertools.product(*map(range, grid)):
            self.run((*place, 0, 0)[:3], (*grid, 1, 1)[:3], values)

    def run(self, place: tuple[int, ...], grid: tuple[int, ...], values: dict[str, Any]) -> None:
        program = Program(place, grid, self.seed)
        here.program, (here.thread,) = program, program.threads
        try:
            self.function(**values)
            check_nothing_is_left(here.thread)
            assert not program.loads, f"{len(program.loads)} TMA loads were never awaited"
        except Stop:
            assert program.error is not None
            raise program.error from None
        finally:
            del here.program, here.thread

    def argument(self, value: Any, parameter: inspect.Parameter | None = None) -> Any:
        """What a launch makes of an argument: numbers become tensors, tensors pointers."""
        if value is None:
            return None
        if isinstance(value, (JITFunction, InterpretedFunction)):
            return self.python(value)
        if isinstance(value, torch.Tensor):
            return Pointer(value)
        if hasattr(value, "block_shape"):
            return Descriptor(value)
        if isinstance(value, tuple):
            members = [self.argument(member) for member in value]
            return type(value)(*members) if hasattr(value, "_fields") else tuple(members)
        if isinstance(value, float):
            wide = parameter is not None and "64" in str(parameter.annotation)
            return Tensor(torch.tensor(value, dtype=torch.float64 if wide else torch.float32))
        if isinstance(value, bool):
            return Tensor(torch.tensor(value))
        return Tensor(torch.tensor(value, dtype=torch.int32 if -(2**31) <= value < 2**31 else torch.int64))

    def python(self, jitted: Any) -> Callable[..., Any]:
        """A jitted function as a Python function whose globals are stand-ins."""
        function = jitted.fn
        if function not in self.made:
            scope = self.scopes.setdefault(id(function.__globals__), {"range": steps, "__name__": function.__module__})
            code = function.__code__
            for name, old, new in self.edits:
                if name == function.__name__:
                    code = self.rewritten(function, old, new)
            made = types.FunctionType(code, scope, function.__name__, function.__defaults__)
            made.__kwdefaults__ = function.__kwdefaults__
            self.made[function] = made
            for name in names_in(code):
                if name in function.__globals__ and name not in scope:
                    scope[name] = self.stand_in(function.__globals__[name], name)
        return self.made[function]

    def rewritten(self, function: Any, old: str, new: str) -> types.CodeType:
        source = textwrap.dedent(inspect.getsource(function))
        assert source.count(old) == 1, f"{function.__name__} has {source.count(old)} times {old!r}"
        self.edited.add(function.__name__)
        body = "\n" * (function.__code__.co_firstlineno - 1) + source[source.index("def ") :].replace(old, new)
        compiled = compile(body, function.__code__.co_filename, "exec")
        return next(c for c in compiled.co_consts if isinstance(c, types.CodeType) and c.co_name == function.__name__)

    def stand_in(self, value: Any, name: str) -> Any:
        """What a kernel finds in place of a global of its module."""
        if isinstance(value, (JITFunction, InterpretedFunction)):
            return self.python(value)
        if isinstance(value, types.ModuleType):
            return MODULES.get(value.__name__) or Lazy(self, value)
        if type(value).__name__ == "constexpr":
            return value.value
        if getattr(value, "__module__", "").startswith("triton."):
            missing = NotImplementedError(f"the simulator has no {value!r}")
            return FUNCTIONS.get(getattr(value, "__name__", name)) or _raiser(missing)
        return value


class Lazy:
    """A module of kernels: its members get their stand-ins when they are asked for."""

    def __init__(self, simulated: Simulated, module: types.ModuleType) -> None:
        self._simulated, self._module = simulated, module

    def __getattr__(self, name: str) -> Any:
        return self._simulated.stand_in(getattr(self._module, name), name)


def _raiser(error: Exception) -> Callable[..., Any]:
    def function(*_: Any, **__: Any) -> Any:
        raise error

    return function


def is_constant(parameter: inspect.Parameter) -> bool:
    return "constexpr" in str(parameter.annotation)


def names_in(code: types.CodeType) -> set[str]:
    """The names that a function looks up, those of its inner functions and comprehensions included."""
    inner = (names_in(c) for c in code.co_consts if isinstance(c, types.CodeType))
    return set(code.co_names).union(*inner)
