"""Makes Triton's interpreter do once what it does at every operation of a tile; no result changes.

Tiles in tests are small, so that an addition costs what is done around it: its types are compared by name, its dtype is
looked up in a table built for the purpose, its shape is wrapped anew, and each sum of integers is computed again in 64
bits, by six more operations of the interpreter, to see whether it overflowed, which then nobody is told. Without that
tests/test_backward.py takes half the time. tests/test_interpreter.py holds what is replaced here to what it replaces.
"""

from typing import Any

import triton.language as tl
import triton.runtime.interpreter as interpreter


def _install_dtypes() -> None:
    """The numpy dtype of a Triton type, from a table built once; the stock function builds it at every call."""
    stock = interpreter._get_np_dtype
    known: dict[str, Any] = {}

    def dtype_of(kind: Any) -> Any:
        name = kind.scalar.name
        if name not in known:
            known[name] = stock(kind)
        return known[name]

    interpreter._get_np_dtype = dtype_of


def _install_overflow() -> None:
    """No second sum in 64 bits: it ends in a device_assert, which is left out, as InterpreterOptions.debug is off.

    Addresses that overflow are memory.py's to find; lanes that nothing reads may wrap, and kernels/float8.py wraps on
    purpose.
    """
    interpreter.interpreter_semantic.binary_op_sanitize_overflow_impl = lambda lhs, rhs, operation: None


def _install_shapes() -> None:
    """Block types and the shapes of tensors, wrapped once for each shape."""
    block_type, tensor, constexpr = tl.core.block_type, tl.core.tensor, tl.core.constexpr
    new_type, new_tensor = block_type.__init__, tensor.__init__
    types: dict[Any, Any] = {}
    shapes: dict[Any, Any] = {}

    def init_type(self: Any, element_ty: Any, shape: Any) -> None:
        key = (element_ty.name, *[n.value if isinstance(n, constexpr) else n for n in shape])
        if key in types:
            self.element_ty = element_ty
            self.shape, self.numel, self.name = types[key]
        else:
            new_type(self, element_ty, shape)
            types[key] = self.shape, self.numel, self.name

    def init_tensor(self: Any, handle: Any, type: Any) -> None:
        key = tuple(type.shape) if type.is_block() else ()
        if key in shapes:
            self.handle, self.type, self.dtype = handle, type, type.scalar
            self.shape, self.numel = shapes[key]
        else:
            new_tensor(self, handle, type)
            shapes[key] = self.shape, self.numel

    block_type.__init__ = init_type
    tensor.__init__ = init_tensor


def _install_equality() -> None:
    """A type is itself: the names of two are compared where they are two."""
    for kind in (tl.core.dtype, tl.core.block_type, tl.core.pointer_type):
        stock = kind.__eq__
        hashed = kind.__hash__
        kind.__eq__ = lambda self, other, stock=stock: self is other or stock(self, other)
        kind.__hash__ = hashed


def install() -> None:
    """Hasten the interpreter of this process; call it once, after repair.install."""
    if getattr(interpreter.GridExecutor, "hastened", False):
        return
    _install_dtypes()
    _install_overflow()
    _install_shapes()
    _install_equality()
    interpreter.GridExecutor.hastened = True
