"""An argument of a kernel as the compiler sees it: its type, and what it may take for granted of it."""

from typing import Any, NamedTuple

from flash.kernels.spec import View

TYPES = {  # Triton's name of a dtype
    "float16": "fp16",
    "bfloat16": "bf16",
    "float32": "fp32",
    "float64": "fp64",
    "float8_e4m3fn": "fp8e4nv",
    "uint8": "u8",
}


class Leaf(NamedTuple):
    """One number of a kernel's arguments: its type, or the constant it is."""

    type: str
    constant: Any = None
    divisible: bool = False  # by 16, as addresses and most strides are


NONE = Leaf("constexpr")


def pointer(type: str) -> Leaf:
    """The address of a tensor."""
    return Leaf(f"*{type}", divisible=True)


def view(type: str, aligned: bool) -> View:
    """A dense tensor as a View; aligned: its rows start at multiples of 16 elements."""
    stride = Leaf("i32", divisible=aligned)
    return View(pointer(type), stride, stride, stride, Leaf("constexpr", 1))
