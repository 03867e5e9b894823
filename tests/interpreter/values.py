"""What a simulated kernel computes with: tensors and pointers on torch, under Triton's rules and not torch's.

A Tensor is in registers: immutable, its operators promote, divide and round as the compiler does. A Pointer knows which
elements of its torch tensor exist, and raises where a lane that is not masked touches any other.

`LANGUAGE` holds the functions that `triton.language` and Gluon share: they work on tensors that are there already.
"""

import math
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch


class Type:
    """A dtype as kernels see it."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.torch = dtype
        self.primitive_bitwidth = 1 if dtype == torch.bool else 8 * dtype.itemsize

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Type) and self.torch == other.torch

    def __hash__(self) -> int:
        return hash(self.torch)

    def __repr__(self) -> str:
        return str(self.torch).removeprefix("torch.")

    def is_floating(self) -> bool:
        return self.torch.is_floating_point


TYPES = {
    name: Type(getattr(torch, name if name != "int1" else "bool"))
    for name in ("float16", "bfloat16", "float32", "float64", "int1", "int8", "uint8", "int16", "int32", "int64")
}
# torch shifts no unsigned numbers: kernels keep the lower half of what they shift down, where a sign does not show
TYPES["uint64"] = TYPES["int64"]


def promoted(a: Any, b: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Two operands in the type that they meet in: a Python number takes the tensor's, a tensor of any rank counts."""
    x, y = (t.data if isinstance(t, Tensor) else t for t in (a, b))
    if not isinstance(x, torch.Tensor):
        y, x = promoted(b, a)
        return x, y
    if isinstance(y, torch.Tensor):
        dtype = torch.promote_types(x.dtype, y.dtype)
        return x.to(dtype), y.to(dtype)
    dtype = torch.float32 if isinstance(y, float) and not x.is_floating_point() else x.dtype
    if x.dtype == torch.bool and isinstance(y, int) and not isinstance(y, bool):
        dtype = torch.int32
    return x.to(dtype), torch.tensor(y, dtype=dtype)


class Tensor:
    """A block or a scalar in registers."""

    def __init__(self, data: torch.Tensor) -> None:
        self.data = data

    shape = property(lambda self: list(self.data.shape))
    dtype = property(lambda self: Type(self.data.dtype))
    type = property(lambda self: self)
    layout = property(lambda self: None)
    T = property(lambda self: Tensor(self.data.mT))

    def to(self, dtype: Type, **_: Any) -> "Tensor":
        return Tensor(self.data.to(dtype.torch))

    def __getitem__(self, index: Any) -> "Tensor":
        places = index if isinstance(index, tuple) else (index,)
        assert all(place is None or place == slice(None) for place in places), "a block is indexed by None and : alone"
        return Tensor(self.data[index])

    def reshape(self, *shape: Any) -> "Tensor":
        return Tensor(self.data.reshape(_sizes(shape)))

    def permute(self, *order: Any) -> "Tensor":
        return Tensor(self.data.permute(_sizes(order)))

    def trans(self, *order: Any) -> "Tensor":
        return self.permute(*order) if order else self.T

    def split(self) -> tuple["Tensor", "Tensor"]:
        return Tensor(self.data[..., 0]), Tensor(self.data[..., 1])

    def _scalar(self) -> Any:
        assert self.data.numel() == 1, f"a block of shape {self.shape} is no condition and no number"
        return self.data.item()

    def __bool__(self) -> bool:
        return bool(self._scalar())

    def __index__(self) -> int:
        return operator.index(self._scalar())

    __int__ = __index__

    def __hash__(self) -> int:
        return id(self)

    def __neg__(self) -> "Tensor":
        return Tensor(-self.data)

    def __invert__(self) -> "Tensor":
        return Tensor(~self.data)

    def __repr__(self) -> str:
        return f"Tensor({self.data})"


def _sizes(given: tuple[Any, ...]) -> list[int]:
    return [int(n) for n in (given[0] if len(given) == 1 and isinstance(given[0], Sequence) else given)]


def _divided(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return x / y if x.is_floating_point() else x.float() / y.float()


def _whole(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def apply(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        assert not x.is_floating_point(), "integer division of floating numbers"
        return function(x, y)

    return apply


OPERATORS: dict[str, Callable[..., torch.Tensor]] = {
    **{name: getattr(operator, f"__{name}__") for name in ("add", "sub", "mul", "and", "or", "xor")},
    **{name: getattr(operator, f"__{name}__") for name in ("lt", "le", "gt", "ge", "eq", "ne", "lshift", "rshift")},
    "truediv": _divided,
    "floordiv": _whole(lambda x, y: torch.div(x, y, rounding_mode="trunc")),  # towards zero, as the machine divides
    "mod": _whole(torch.fmod),
}


def _install() -> None:
    def method(function: Callable[..., torch.Tensor], swapped: bool) -> Callable[..., Any]:
        def apply(self: Tensor, other: Any) -> Any:
            if isinstance(other, Pointer) or not isinstance(other, (Tensor, int, float)):
                return NotImplemented
            x, y = promoted(self, other)
            return Tensor(function(y, x) if swapped else function(x, y))

        return apply

    for name, function in OPERATORS.items():
        setattr(Tensor, f"__{name}__", method(function, False))
        if name not in ("lt", "le", "gt", "ge", "eq", "ne"):
            setattr(Tensor, f"__r{name}__", method(function, True))


class Pointer:
    """Addresses of elements of a torch tensor: offsets from its first, which may leave it as long as nothing is read.

    dtype.element_ty is what kernels ask of a pointer.
    """

    def __init__(self, tensor: torch.Tensor, offset: Any = 0, elements: torch.Tensor | None = None) -> None:
        self.tensor, self.offset = tensor, offset
        self.elements = _elements(tensor) if elements is None else elements
        self.dtype = self
        self.element_ty = Type(tensor.dtype)

    def __add__(self, more: Any) -> "Pointer":
        offset = more.data.long() if isinstance(more, Tensor) else int(more)
        return Pointer(self.tensor, self.offset + offset, self.elements)

    __radd__ = __add__
    to = None  # a pointer is cast by nobody: kernels that do so are beyond this simulator

    def __getitem__(self, index: Any) -> "Pointer":
        return Pointer(self.tensor, self.offset[index], self.elements)

    @property
    def shape(self) -> list[int]:
        return list(torch.as_tensor(self.offset).shape)

    def places(self, mask: Any, *others: Any) -> tuple[torch.Tensor, ...]:
        """Offsets, mask and other operands spread over each other; every unmasked offset is one of an element."""
        offset = torch.as_tensor(self.offset)
        kept = torch.tensor(True) if mask is None else _data(mask).bool()
        spread = torch.broadcast_tensors(offset, kept, *(_data(x) for x in others))
        touched = spread[0][spread[1]]
        inside = (touched >= 0) & (touched < len(self.elements))
        if not bool(inside.all()) or not bool(self.elements[touched].all()):
            wrong = touched[~inside] if not bool(inside.all()) else touched[~self.elements[touched]]
            raise IndexError(f"element {int(wrong[0])} of {list(self.tensor.shape)} is none of the tensor's")
        return spread

    def flat(self) -> torch.Tensor:
        return torch.as_strided(self.tensor, (max(len(self.elements), 1),), (1,))


def _elements(tensor: torch.Tensor) -> torch.Tensor:
    """Which offsets from a tensor's first element are elements of it."""
    if tensor.numel() == 0:
        return torch.zeros(0, dtype=torch.bool)
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    elements = torch.zeros(last + 1, dtype=torch.bool)
    elements.as_strided(tensor.shape, tensor.stride()).fill_(True)
    return elements


def _data(x: Any) -> torch.Tensor:
    return x.data if isinstance(x, Tensor) else torch.as_tensor(x)


def load(pointer: Pointer, mask: Any = None, other: Any = None, **_: Any) -> Tensor:
    """Masked lanes without `other` hold anything: NaN, or a number that no index takes."""
    dtype = pointer.tensor.dtype
    anything = float("nan") if dtype.is_floating_point else 0 if dtype in (torch.bool, torch.uint8) else 0x5B5B
    places, kept, value = pointer.places(mask, anything if other is None else other)
    result = value.to(dtype).clone()
    result[kept] = pointer.flat()[places[kept]]
    return Tensor(result)


def store(pointer: Pointer, value: Any, mask: Any = None, **_: Any) -> None:
    places, kept, new = pointer.places(mask, value)
    pointer.flat()[places[kept]] = new[kept].to(pointer.tensor.dtype)


def atomic_add(pointer: Pointer, value: Any, mask: Any = None, **_: Any) -> None:
    """Lanes may share an address. Nothing is returned: the sum before is another order's business."""
    places, kept, new = pointer.places(mask, value)
    pointer.flat().index_put_((places[kept],), new[kept].to(pointer.tensor.dtype), accumulate=True)


def unary(function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., Any]:
    return lambda x, **_: Tensor(function(_data(x)))


def where(condition: Any, x: Any, y: Any) -> Any:
    if not any(isinstance(t, Tensor) for t in (condition, x, y)):
        return x if condition else y
    if not any(isinstance(t, Tensor) for t in (x, y)):  # two literals
        floating = any(isinstance(t, float) for t in (x, y))
        x = Tensor(torch.tensor(x, dtype=torch.float32 if floating else torch.int32))
    chosen = promoted(x, y)
    return Tensor(torch.where(_data(condition).bool(), *chosen))


def extreme(name: str) -> Callable[..., Any]:
    """maximum and minimum: of a number and NaN the number, unless NaN is asked to propagate."""
    number, propagating = {"max": (max, torch.maximum), "min": (min, torch.minimum)}[name]
    plain = getattr(torch, f"f{name}")

    def apply(x: Any, y: Any, propagate_nan: Any = None, **_: Any) -> Any:
        if not isinstance(x, Tensor) and not isinstance(y, Tensor):
            return number(x, y)
        pair = promoted(x, y)
        wants_nan = propagate_nan is not None and "ALL" in str(propagate_nan)
        return Tensor((propagating if wants_nan or not pair[0].is_floating_point() else plain)(*pair))

    return apply


def reduced(name: str) -> Callable[..., Tensor]:
    """sum, max and min along an axis or over all; max and min pass over NaN, as the machine's do."""

    def apply(x: Tensor, axis: int | None = None, keep_dims: bool = False, **_: Any) -> Tensor:
        data = x.data
        axes = list(range(data.ndim)) if axis is None else [int(axis)]
        if name == "sum":
            wide = data if data.is_floating_point() or data.dtype == torch.int64 else data.to(torch.int32)
            return Tensor(wide.sum(axes, keepdim=keep_dims, dtype=wide.dtype))
        if data.is_floating_point():
            nothing = float("-inf" if name == "max" else "inf")
            lost = data.isnan().all() if axis is None else data.isnan().all(int(axis), keepdim=keep_dims)
            found = getattr(data.nan_to_num(nothing, math.inf, -math.inf), f"a{name}")(axes, keepdim=keep_dims)
            return Tensor(found.masked_fill(lost, float("nan")))
        return Tensor(getattr(data, f"a{name}")(axes, keepdim=keep_dims))

    return apply


def cast(x: Any, dtype: Type, **_: Any) -> Tensor:
    """A tensor or a number in another type; a number makes a scalar, of no layout."""
    if isinstance(x, float):
        x = Tensor(torch.tensor(x, dtype=torch.float32 if dtype.torch != torch.float64 else torch.float64))
    return Tensor(_data(x).to(dtype.torch))


def steps(*bounds: Any) -> Iterable[Tensor]:
    """range of a loop that is not unrolled: its index is a tensor."""
    return (Tensor(torch.tensor(i, dtype=torch.int32)) for i in range(*map(int, bounds)))


def ceiling(x: Any, y: Any) -> Any:
    return (x + (y - 1)) // y


LANGUAGE: dict[str, Any] = {
    **TYPES,
    "constexpr": lambda x: x,
    "PropagateNan": type("PropagateNan", (), {"ALL": "ALL", "NONE": "NONE"}),
    "static_range": range,
    "range": lambda *bounds, **_: steps(*bounds),
    "static_assert": lambda condition, message="": _assert(condition, message),
    "cdiv": ceiling,
    "cast": cast,
    "where": where,
    "maximum": extreme("max"),
    "minimum": extreme("min"),
    "max": reduced("max"),
    "min": reduced("min"),
    "sum": reduced("sum"),
    "exp2": unary(torch.exp2),
    "exp": unary(torch.exp),
    "log2": unary(torch.log2),
    "log": unary(torch.log),
    "abs": unary(torch.abs),
    "sqrt": unary(torch.sqrt),
    "fma": lambda x, y, z: x * y + z,
    "expand_dims": lambda x, axis: Tensor(x.data.unsqueeze(int(axis))),
    "trans": lambda x, *order: x.trans(*order),
    "permute": lambda x, *order: x.permute(*order),
    "reshape": lambda x, *shape: x.reshape(*shape),
    "join": lambda x, y: Tensor(torch.stack(promoted(x, y), -1)),
    "split": lambda x: x.split(),
    "load": load,
    "store": store,
    "atomic_add": atomic_add,
    "assume": lambda condition: _assert(condition, "an assumption that does not hold"),
    "multiple_of": lambda x, *_: x,
    "max_contiguous": lambda x, *_: x,
}


def _assert(condition: Any, message: str) -> None:
    assert bool(condition), message


_install()
