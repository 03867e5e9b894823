"""The machine that simulated Gluon kernels run on: threads that take turns, barriers, shared memory, TMA and wgmma.

Everything asynchronous ends as late as the kernel lets it; what that is for is told in gluon.py.
"""

import itertools
import random
import threading
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch

from tests.interpreter.values import TYPES, Tensor, Type


class Stop(BaseException):
    """Ends a thread whose program has failed elsewhere."""


class Thread:
    """A partition, or the program before it is parted."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.turn = threading.Semaphore(0)
        self.ready: Callable[[], bool] = lambda: True
        self.waits_for = ""
        self.barrier: Barrier | None = None  # that it waits for
        self.done = False
        self.products: list[Product] = []  # wgmma in flight, oldest first
        self.stores: list[TmaStore] = []


class Program:
    """One program of the grid: its threads, of which one runs at a time, and its TMA loads in flight."""

    def __init__(self, place: tuple[int, ...], grid: tuple[int, ...], seed: int | None) -> None:
        self.place, self.grid = place, grid
        self.random = None if seed is None else random.Random(f"{seed} {place}")
        self.loads: list[TmaLoad] = []
        self.threads = [Thread("the program")]
        self.memories: list[Memory] = []
        self.numbers = itertools.count()
        self.error: BaseException | None = None

    def wait_until(self, ready: Callable[[], bool], what: str, barrier: "Barrier | None" = None) -> None:
        me = here.thread
        me.ready, me.waits_for, me.barrier = ready, what, barrier
        self.hand_over()
        me.barrier = None

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
            awaited = [load for load in self.loads if any(load.barrier is t.barrier for t in self.threads)]
            if self.random is not None and self.loads and (not able or self.random.random() < 0.3):
                self.random.choice(self.loads).run()
            elif able:
                return able[0] if self.random is None else self.random.choice(able)
            elif awaited:
                awaited[0].run()
            else:
                waiting = "; ".join(f"{t.name} waits for {t.waits_for}" for t in self.threads if not t.done)
                self.error = TimeoutError(f"deadlock of program {self.place}: {waiting}")
        for thread in self.threads:  # all are to end; who holds a turn finds the error
            thread.turn.release()
        return me

    @torch.no_grad()  # a thread has a mode of its own, and a machine records nothing
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
        here.program.wait_until(lambda: self.phases % 2 != parity, f"parity {parity}, in {missing}", self)


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


class TmaLoad:
    """A copy in flight, of which its target shows nothing yet."""

    def __init__(self, desc: Descriptor, coord: Sequence[Any], barrier: Barrier, target: Shared) -> None:
        assert target.shape == desc.block_shape, f"a block of {desc.block_shape} does not fill {target.shape}"
        assert len(coord) == len(desc.shape), f"{len(coord)} coordinates in a tensor of {desc.shape}"
        self.desc, self.coordinates, self.barrier, self.target = desc, [int(n) for n in coord], barrier, target
        target.data.fill_(float("nan"))

    def run(self) -> None:
        here.program.loads.remove(self)
        source, where = self.desc.window(self.coordinates)
        self.target.data.zero_()
        self.target.data[where].copy_(source)
        self.barrier.update(0, -self.desc.block_type.nbytes)


def tma_load(desc: Descriptor, coord: Sequence[Any], barrier: Barriers, result: Shared, pred: Any = True) -> None:
    if bool(pred):
        here.program.loads.append(TmaLoad(desc, coord, barrier_of(barrier), result))


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


def no_layout(*_: Any, **__: Any) -> None:
    return None


no_layout.get_default_for = no_layout
TMA = {
    "async_copy_global_to_shared": tma_load,
    "async_load": tma_load,
    "async_copy_shared_to_global": tma_store(),
    "async_store": tma_store(),
    "async_atomic_add": tma_store(adds=True),
    "store_wait": store_wait,
}
MBARRIER = {
    "MBarrierLayout": no_layout,
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
