"""Makes Triton's interpreter compute what a GPU computes (Triton 3.6.0, 3.7.1 and 3.9.0).

The stock interpreter stores bfloat16 as uint16 and does integer arithmetic on the bits, keeps a Python float argument
in 64 bits where the compiler types it fp32, ignores `input_precision`, and on Triton 3.6.0 with numpy >= 2.4 cannot run
a loop whose bound is a tensor. Each workaround below names its bug; tests/test_interpreter.py holds every one to torch,
bit by bit.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton.language as tl
import triton.runtime.interpreter as interpreter
from numpy.typing import NDArray
from triton._C.libtriton import ir
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, ReduceOps, TensorHandle
from triton.runtime.jit import _normalize_ty

Array = NDArray[Any]


def bfloat16_to_float32(bits: Array) -> Array:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def float32_to_bfloat16(x: Array) -> Array:
    """Round to nearest, ties to even; NaN becomes the quiet NaN that torch writes."""
    x = np.ascontiguousarray(x, dtype=np.float32).reshape(np.shape(x))  # ascontiguousarray turns 0-d into 1-d
    bits = x.view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1)))) >> 16
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded.astype(np.uint16))


def float32_to_tf32(x: Array) -> Array:
    """Keep 10 bits of mantissa, to nearest with ties away from zero, as cvt.rna.tf32.f32 does."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)
    return np.where(np.isfinite(x), rounded, x)


def _is_bfloat16(handle: Any) -> bool:
    return handle.dtype.scalar.name == "bf16"


def _widen(handle: Any) -> Any:
    return TensorHandle(bfloat16_to_float32(handle.data), tl.float32) if _is_bfloat16(handle) else handle


def _narrow(data: Array) -> Any:
    return TensorHandle(float32_to_bfloat16(data), tl.bfloat16)


def _install_bfloat16() -> None:
    """bfloat16 as torch computes it: in float32, rounded once to nearest even.

    https://github.com/triton-lang/triton/issues/11584, present in 3.6.0, 3.7.1 and 3.9.0: arithmetic and comparison act
    on the raw bits, casts to bfloat16 truncate or garble.
    """
    cast_impl, fp_to_fp = InterpreterBuilder.cast_impl, InterpreterBuilder.create_fp_to_fp
    reduce_impl = ReduceOps.apply_impl

    def cast(self: Any, src: Any, dst_type: Any) -> Any:
        to_bfloat16 = dst_type.scalar == tl.bfloat16
        if _is_bfloat16(src) == to_bfloat16:
            return cast_impl(self, src, dst_type)
        if to_bfloat16:
            return TensorHandle(float32_to_bfloat16(src.data.astype(np.float32)), tl.bfloat16)
        return cast_impl(self, _widen(src), dst_type)

    def convert(self: Any, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        if dst_type.scalar == tl.bfloat16 and src.dtype.scalar.primitive_bitwidth >= 16:
            if rounding_mode != ir.ROUNDING_MODE.RTZ:
                return cast(self, src, dst_type)
            bits = src.data.astype(np.float32).view(np.uint32)
            return TensorHandle((bits >> 16).astype(np.uint16), tl.bfloat16)
        if _is_bfloat16(src) and dst_type.scalar.primitive_bitwidth < 16:
            return fp_to_fp(self, _widen(src), dst_type, rounding_mode)
        return fp_to_fp(self, src, dst_type, rounding_mode)

    def rounded_once(name: str) -> Callable[..., Any]:
        stock = getattr(InterpreterBuilder, name)

        def method(self: Any, *args: Any) -> Any:
            if not any(isinstance(x, TensorHandle) and _is_bfloat16(x) for x in args):
                return stock(self, *args)
            wide = stock(self, *(_widen(x) if isinstance(x, TensorHandle) else x for x in args))
            return wide if wide.data.dtype == np.bool_ else _narrow(wide.data)

        return method

    for name in ("binary_op", "unary_op", "create_fma", "create_clampf", "create_rsqrt", "create_erf"):
        setattr(InterpreterBuilder, name, rounded_once(name))

    def reduce(self: Any, inputs: Any) -> Any:
        if not any(x.dtype == tl.bfloat16 for x in inputs):
            return reduce_impl(self, inputs)
        wide = tuple(self.to_tensor(_widen(x.handle).data, _widen(x.handle).dtype) for x in inputs)
        outputs = reduce_impl(self, wide)
        outputs = list(outputs) if isinstance(outputs, (list, tuple)) else [outputs]
        for i, x in enumerate(inputs):
            if x.dtype == tl.bfloat16:
                outputs[i] = self.to_tensor(float32_to_bfloat16(outputs[i].handle.data), tl.bfloat16)
        return outputs

    def get_bf16(self: Any, value: float) -> Any:
        return TensorHandle(float32_to_bfloat16(np.array([value], dtype=np.float32)), tl.bfloat16)

    InterpreterBuilder.cast_impl = cast
    InterpreterBuilder.create_fp_to_fp = convert
    InterpreterBuilder.get_bf16 = get_bf16  # absent before 3.9.0: tl.full of a bfloat16 raised AttributeError
    ReduceOps.apply_impl = reduce


def _install_float8() -> None:
    """float8 (e4m3fn) as torch converts it, through float32.

    https://github.com/triton-lang/triton/issues/8322 and its pull request 11897, present in 3.6.0, 3.7.1 and 3.9.0:
    rounding up to a power of two may halve the number, ties go up, and NaN becomes 480.
    """
    convert = InterpreterBuilder.create_fp_to_fp

    def of_float8(self: Any, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        if src.dtype.scalar == tl.float8e4nv:
            wide = torch.from_numpy(src.data.copy()).view(torch.float8_e4m3fn).float().numpy()
            wide = TensorHandle(wide, tl.float32)
            return wide if dst_type.scalar == tl.float32 else self.cast_impl(wide, dst_type)
        if dst_type.scalar == tl.float8e4nv:
            data = np.array(_widen(src).data, dtype=np.float32)
            return TensorHandle(torch.from_numpy(data).to(torch.float8_e4m3fn).view(torch.uint8).numpy(), tl.float8e4nv)
        return convert(self, src, dst_type, rounding_mode)

    InterpreterBuilder.create_fp_to_fp = of_float8


def tree_matmul(a: Array, b: Array) -> Array:
    """a [M, K] @ b [K, N] in float32, summed over K as a binary tree (K a power of two, as in every Triton tile)."""
    terms = np.multiply(a[:, :, None], b[None, :, :], dtype=np.float32)
    while terms.shape[1] > 1:
        half = terms.shape[1] // 2
        terms = terms[:, :half] + terms[:, half:]
    return terms[:, 0]


def _install_dot() -> None:
    """Dots of bfloat16 tiles, float32 dots at the precision they ask for, and one sum for q.k and k.q.

    Up to 3.9.0 the stock one multiplies the bits of bfloat16 (https://github.com/triton-lang/triton/issues/11584) and
    ignores `input_precision`: a dot that forgot to say "ieee" would look exact here and lose 13 bits on a GPU.

    It leaves the order of a float32 sum to BLAS, which chooses by shape, so that q @ k.T and (k @ q.T).T differ in
    their last bits. A GPU sums both in one order, and a backward pass that recomputes exp(s - lse) from the transposed
    product relies on it: at scores of 1000 the difference alone would cost four digits.
    """
    create_dot = InterpreterBuilder.create_dot

    def dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        a, b, acc = _widen(a), _widen(b), _widen(d)
        if input_precision == ir.INPUT_PRECISION.TF32 and a.dtype.scalar == b.dtype.scalar == tl.float32:
            a, b = (TensorHandle(float32_to_tf32(x.data), tl.float32) for x in (a, b))
        floats = a.data.dtype in (np.float16, np.float32) and b.data.dtype in (np.float16, np.float32)
        if floats and acc.data.dtype == np.float32 and a.data.ndim == 2:
            acc = TensorHandle(tree_matmul(a.data, b.data) + acc.data, tl.float32)
        else:
            acc = create_dot(self, a, b, acc, input_precision, max_num_imprecise_acc)
        return _narrow(acc.data) if _is_bfloat16(d) else acc

    InterpreterBuilder.create_dot = dot


def _install_comparison() -> None:
    """Comparisons yield int1.

    Up to 3.9.0 the result keeps the dtype of the operands, so a scalar condition makes the mask it joins int32,
    which 3.9.0's own store refuses ("mask has unsupported dtype").
    """
    binary_op = InterpreterBuilder.binary_op

    def compare(self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
        result = binary_op(self, lhs, rhs, op)
        return TensorHandle(result.data, tl.int1) if result.data.dtype == np.bool_ else result

    InterpreterBuilder.binary_op = compare


def _install_float_arguments() -> None:
    """A Python float argument becomes an fp32 scalar, and an fp64 one where the parameter is annotated "fp64".

    The compiler types it so (`triton.runtime.jit.mangle_type(0.125) == "fp32"`), also inside tuples; the interpreter of
    3.6.0, 3.7.1 and 3.9.0 hands the kernel the Python float, which hides a scale that lost 29 bits.
    """
    implicit_cvt, call = interpreter._implicit_cvt, GridExecutor.__call__

    def convert(arg: Any) -> Any:
        if isinstance(arg, float):
            return tl.tensor(TensorHandle(np.array([arg], dtype=np.float32), tl.float32), tl.float32)
        return implicit_cvt(arg)

    def keep_double(self: Any, name: str, arg: Any) -> Any:
        annotation = _normalize_ty(self.fn.__annotations__.get(name, "")).strip("'\"")
        if isinstance(arg, float) and annotation in ("fp64", "float64"):
            return tl.tensor(TensorHandle(np.array([arg], dtype=np.float64), tl.float64), tl.float64)
        return arg

    def executor_call(self: Any, *args: Any, **kwargs: Any) -> None:
        args = tuple(keep_double(self, name, arg) for name, arg in zip(self.arg_names, args, strict=False))
        call(self, *args, **{name: keep_double(self, name, arg) for name, arg in kwargs.items()})

    interpreter._implicit_cvt = convert
    GridExecutor.__call__ = executor_call


def _install_index() -> None:
    """Loop bounds that are tensors: numpy >= 2.4 refuses int() of a one-element array.

    https://github.com/triton-lang/triton/issues/9171: Triton 3.6.0; mended in 3.7.
    """
    patch_lang_tensor = interpreter._patch_lang_tensor

    def patch(tensor: Any, scope: Any) -> None:
        patch_lang_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch


def _install_patching_once() -> None:
    """Replace the names in triton.language once a launch, not once a call of a device function.

    Up to 3.9.0 every such call walks the whole language module again, which takes several times as long as the
    arithmetic of a small tile.
    """
    patch_lang, call = interpreter._patch_lang, GridExecutor.__call__
    done: set[frozenset[int]] = set()
    names: dict[int, frozenset[int]] = {}  # by the module of a function, while a launch lasts
    running = False

    def patch(fn: Any) -> Any:
        module = fn.__globals__
        languages = names.get(id(module))
        if languages is None:
            languages = frozenset(id(value) for value in module.values() if value is tl or value is tl.core)
            names[id(module)] = languages
        if running and languages in done:
            return interpreter._LangPatchScope()
        done.add(languages)
        return patch_lang(fn)

    def executor_call(self: Any, *args: Any, **kwargs: Any) -> None:
        nonlocal running
        running = True
        try:
            call(self, *args, **kwargs)
        finally:
            running = False
            done.clear()
            names.clear()

    interpreter._patch_lang = patch
    GridExecutor.__call__ = executor_call


def install() -> None:
    """Repair the interpreter of this process; call it once, before a kernel runs."""
    if getattr(GridExecutor, "repaired", False):
        return
    _install_bfloat16()
    _install_float8()
    _install_dot()
    _install_comparison()
    _install_float_arguments()
    _install_index()
    _install_patching_once()
    GridExecutor.repaired = True
