"""What a call is said to take of memory, beside what it takes."""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from bench.measure import gpu_peak
from flash.attention import flash_attention
from flash.nn import MultiheadAttention, TransformerBlock, memory_estimate
from tests import calls
from tests.calls import Place, random_inputs


def allocated(call: Callable[[], Any]) -> int:
    """Bytes that call() held on the CPU at most, opaque ops' own included, less those of the tensors it returned."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        returned = call()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most - sum(x.nbytes for x in returned)


def standard(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = (q * q.shape[-1] ** -0.5) @ k.mT
    p = s.softmax(-1)
    return p @ v


def step(attention: Callable[..., Any], inputs: list[Tensor]) -> tuple[Tensor, ...]:
    """o and the gradients, do made beforehand."""
    *leaves, do = inputs
    o = attention(*leaves)
    return o, *torch.autograd.grad(o, leaves, do)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("seqlen", "seqlen_k"), [(256, 256), (128, 384)])
def test_the_memory_estimate_is_what_is_measured(seqlen: int, seqlen_k: int, dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(2, 3, n, 16, dtype=dtype) for n in (seqlen, seqlen_k, seqlen_k))
    estimate = memory_estimate(2, seqlen, 3, 16, dtype, seqlen_k=seqlen_k)
    assert abs(allocated(lambda: (standard(q, k, v),)) - estimate.standard_forward) <= 64
    leaves = [x.requires_grad_() for x in (q, k, v)]
    measured = allocated(lambda: step(standard, [*leaves, torch.randn_like(q)]))
    assert abs(measured - q.nbytes - estimate.standard_backward) <= max(q.nbytes, k.nbytes) + 64  # do is new here


class Made(TorchDispatchMode):
    """Bytes of all tensors that the launchers make; the interpreter's own do not count."""

    nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.__name__.startswith(("empty", "new_empty", "zeros", "new_zeros")):
            frame, around = sys._getframe(1), ("torch.", "conftest", "tests.conftest")
            while frame.f_globals["__name__"].startswith(around):
                frame = frame.f_back  # type: ignore[assignment]
            self.nbytes += out.nbytes if frame.f_globals["__name__"].startswith("flash.") else 0
        return out


@pytest.mark.interpret
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_the_memory_estimate_is_what_the_kernels_take(dtype: torch.dtype, place: Place) -> None:
    x = random_inputs(place, heads=2, seqlen_q=48, seqlen_k=64, head_dim=16, dtype=dtype)
    estimate = memory_estimate(1, 48, 2, 16, dtype, seqlen_k=64)
    with Made() as forward:
        found = calls.forward(x)
    assert forward.nbytes - found.o.nbytes == estimate.flash_forward
    with Made() as backward:
        grads = calls.backward(x, found=found)
    both = forward.nbytes + backward.nbytes
    returned = sum(g.nbytes for g in (found.o, grads.dq, grads.dk, grads.dv) if g is not None)
    assert both - returned == estimate.flash_backward


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_memory_estimate_is_what_a_gpu_measures(dtype: torch.dtype) -> None:
    q, k, v, do = torch.randn(4, 2, 3, 512, 64, dtype=dtype, device="cuda")
    estimate = memory_estimate(2, 512, 3, 64, dtype)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    for attention, forward, both in (
        (standard, estimate.standard_forward, estimate.standard_backward),
        (partial(flash_attention, backend="triton"), estimate.flash_forward, estimate.flash_backward),
    ):
        step(attention, [*leaves, do])  # compiles
        with torch.no_grad():
            assert abs(gpu_peak(lambda attention=attention: (attention(q, k, v),)) - forward) <= 4096 + 0.02 * forward
        measured = gpu_peak(lambda attention=attention: step(attention, [*leaves, do]))
        assert abs(measured - both) <= q.nbytes + 4096 + 0.02 * both


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_torch_backend_takes_no_more_than_its_estimate_says(dtype: torch.dtype) -> None:
    shares = []
    for seqlen in (512, 1024):
        inputs = [torch.randn(1, 2, seqlen, 64, dtype=dtype) for _ in range(4)]
        leaves = [x.requires_grad_() for x in inputs[:3]]
        with torch.no_grad():
            forward = allocated(lambda inputs=inputs: (flash_attention(*inputs[:3]),))
        both = allocated(lambda leaves=leaves, do=inputs[3]: step(flash_attention, [*leaves, do]))
        copy = 4 * inputs[0].numel()
        assert forward <= 6 * copy and both <= 15 * copy
        shares.append(both / copy)
    assert shares[1] <= 1.25 * shares[0]  # it grows with the length, in parts of it
    q, k, v = (torch.randn(1, 2, 4096, 64) for _ in range(3))
    scores = memory_estimate(1, 4096, 2, 64, torch.float32).standard_forward
    dropout = partial(flash_attention, dropout_p=0.1)
    assert allocated(lambda: (dropout(q, k, v),)) <= 40e6 < scores
    leaves = [x.requires_grad_() for x in (q, k, v)]
    assert allocated(lambda: step(dropout, [*leaves, torch.ones_like(q)])) <= 40e6 + 4 * q.nbytes < scores
    few = [torch.randn(1, 16, n, 8) for n in (1, 2**17, 2**17)]
    assert allocated(lambda: (dropout(*few),)) <= 40e6


def test_modules_estimate_their_own_attention() -> None:
    want = memory_estimate(2, 64, 4, 6, torch.float64)
    for module in (MultiheadAttention(24, 4), TransformerBlock(24, 4, heads_k=2)):
        assert module.double().memory_estimate(2, 64) == want


def test_an_estimate_of_nothing_that_can_be_is_refused() -> None:
    for heads in (-1, 1.5, "2"):
        with pytest.raises(ValueError, match=f"heads must be a whole number, at least 0, got {heads!r}"):
            memory_estimate(1, 8, heads, 4)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"dtype must be a torch\.dtype of floats, got torch\.int32"):
        memory_estimate(1, 8, 1, 4, torch.int32)
