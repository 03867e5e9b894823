"""Runs Gluon kernels for sm_90 on a CPU: the Python source of a @gluon.jit kernel, with stand-ins for the machine.

    kernel = Simulated(module.some_kernel)      kernel[(programs,)](*args, **constants)

Triton's interpreter refuses Gluon. Here every partition of a program is a thread, and one runs at a time: it hands over
where it waits and after it arrives at a barrier, so that whatever it allowed the others to do happens at once. The
machine is mean, so that an error of protocol shows every time:

    TMA load    poisons its target with NaN when issued, fills it when no thread can go on and one awaits it
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
import textwrap
import types
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from triton.runtime import JITFunction
from triton.runtime.interpreter import InterpretedFunction

from tests.interpreter.machine import (
    HOPPER,
    MBARRIER,
    TMA,
    Descriptor,
    Program,
    Stop,
    allocate_shared_memory,
    check_nothing_is_left,
    here,
    no_layout,
    warp_specialize,
)
from tests.interpreter.values import LANGUAGE, Pointer, Tensor, Type, steps

OPTIONS = {"num_warps", "num_stages", "num_ctas", "maxnreg"}


class Namespace:
    """A module as kernels see it; what the simulator lacks says so where it is used."""

    def __init__(self, name: str, members: dict[str, Any], hint: str = "") -> None:
        self.__dict__.update(members)
        self._name, self._hint = name, hint

    def __getattr__(self, member: str) -> Any:
        raise NotImplementedError(f"the simulator has no {self._name}.{member}{self._hint}")


def _full(shape: Sequence[Any], value: Any, dtype: Type, layout: Any = None) -> Tensor:
    return Tensor(torch.full([int(n) for n in shape], float(value), dtype=torch.float64).to(dtype.torch))


LAYOUTS = ("NVMMADistributedLayout", "DotOperandLayout", "SliceLayout", "BlockedLayout", "NVMMASharedLayout")
PLACE = {
    "program_id": lambda axis: Tensor(torch.tensor(here.program.place[int(axis)], dtype=torch.int32)),
    "num_programs": lambda axis: Tensor(torch.tensor(here.program.grid[int(axis)], dtype=torch.int32)),
}
GLUON = {
    **LANGUAGE,
    **PLACE,
    **dict.fromkeys(LAYOUTS, no_layout),
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
    "triton.language": Namespace("tl", LANGUAGE | PLACE, ", or it makes a tensor, which Gluon gives no layout"),
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
