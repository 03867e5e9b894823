"""Where attention meets torch: derivatives are right or raise, ops are opaque, fakes tell the truth about strides."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from flash import mods
from flash.attention import flash_attention

INTERPRETED = pytest.param("triton", marks=pytest.mark.interpret)


def qkv(dtype: torch.dtype = torch.float64, grad: bool = True) -> list[torch.Tensor]:
    shapes = ((2, 4, 9, 8), (2, 2, 11, 8), (2, 2, 11, 5))
    return [torch.randn(*shape, dtype=dtype, requires_grad=grad) for shape in shapes]


@pytest.fixture
def tensors(place: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
    return [place(x).requires_grad_() for x in qkv(grad=False)]


@pytest.mark.sampled(3, all=True)
@pytest.mark.parametrize("backend", ["torch", INTERPRETED])
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)])
def test_gradients_are_computed_only_where_asked_for(backend: str, wanted: tuple[int, ...], tensors: Any) -> None:
    q, k, v = tensors
    everything = torch.autograd.grad(flash_attention(q, k, v, causal=True, backend=backend).sum(), (q, k, v))
    some = [x.detach().requires_grad_(i in wanted) for i, x in enumerate((q, k, v))]
    flash_attention(*some, causal=True, backend=backend).sum().backward()
    for i, x in enumerate(some):
        assert (x.grad is not None) == (i in wanted)
        if x.grad is not None:
            assert_close(x.grad, everything[i], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("backend", ["torch", INTERPRETED])
def test_o_alone_lse_alone_and_both_have_gradients(backend: str, tensors: Any) -> None:
    q, k, v = tensors
    o, lse = flash_attention(q, k, v, backend=backend, return_lse=True)
    of_o = torch.autograd.grad(o.sum(), (q, k, v), retain_graph=True)
    of_lse = torch.autograd.grad(lse.sum(), (q, k, v), retain_graph=True, materialize_grads=True)
    of_both = torch.autograd.grad(o.sum() + lse.sum(), (q, k, v))
    assert of_lse[2].abs().max() == 0  # lse does not know v
    for one, other, both in zip(of_o, of_lse, of_both, strict=True):
        assert_close(one + other, both, rtol=1e-12, atol=1e-13)


def test_no_graph_is_built_where_no_gradient_is_asked_for() -> None:
    q, k, v = qkv()
    with torch.no_grad():
        assert flash_attention(q, k, v).grad_fn is None
    with torch.inference_mode():
        assert flash_attention(q, k, v).grad_fn is None
    assert flash_attention(*qkv(grad=False)).grad_fn is None


@pytest.mark.parametrize("through", ["q", "do"])
def test_a_second_derivative_raises(through: str) -> None:
    q, k, v = qkv()
    do = torch.ones(2, 4, 9, 5, dtype=torch.float64, requires_grad=through == "do")
    o = flash_attention(q, k, v)
    (dq,) = torch.autograd.grad(o, q, do, create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiable once"):
        torch.autograd.grad(dq.pow(2).sum() + o.sum(), do if through == "do" else k)


@pytest.mark.sampled(3, all=True)
@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.interpret(gpu=False))])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_has_no_graph_break_and_the_same_values(dynamic: bool, backend: str) -> None:
    def loss(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        o, lse = flash_attention(q, k, v, causal=True, return_lse=True, backend=backend)
        return o.pow(2).sum() + lse.clamp(min=-9).sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for _ in range(2):
        q, k, v = qkv()
        expected = torch.autograd.grad(loss(q, k, v), (q, k, v))
        assert_close(torch.autograd.grad(compiled(q, k, v), (q, k, v)), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.sampled(3, all=True)
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (2, 0, 1, 3), (1, 0, 2, 3)])
@pytest.mark.parametrize("head_dim_v", [8, 5])
def test_o_is_dense_in_the_axis_order_of_q(order: tuple[int, ...], head_dim_v: int) -> None:
    sizes = (2, 4, 9, 8)
    q = torch.randn([sizes[axis] for axis in order]).permute([order.index(axis) for axis in range(4)])
    k, v = torch.randn(2, 2, 11, 8), torch.randn(2, 2, 11, head_dim_v)
    o = flash_attention(q, k, v)
    assert o.permute(order).is_contiguous()
    fake_strides = torch.compile(flash_attention, backend="aot_eager", fullgraph=True)(q, k, v).stride()
    assert fake_strides == o.stride()


@pytest.mark.parametrize("backend", ["torch", INTERPRETED])
def test_an_operand_that_is_negated_lazily_is_read_as_it_is(
    backend: str, place: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    bias = place(torch.randn(1, 1, 9, 11, dtype=torch.complex64)).conj().imag
    assert bias.is_neg()
    q, k, v = (place(x) for x in qkv(torch.float32, grad=False))
    got = flash_attention(q, k, v, bias=bias, backend=backend)
    assert torch.equal(got, flash_attention(q, k, v, bias=bias.clone(), backend=backend))  # type: ignore[arg-type]


def test_compile_takes_the_same_tensor_twice() -> None:
    def loss(x: torch.Tensor) -> torch.Tensor:
        ids = torch.arange(9)[None] // 4
        o = flash_attention(x, x, x, mask_mod=mods.document(ids))
        assert isinstance(o, torch.Tensor)
        return o.square().sum()

    x = torch.randn(1, 2, 9, 8, dtype=torch.float64, requires_grad=True)
    (want,) = torch.autograd.grad(loss(x), x)  # and makes the mod's functions known
    (got,) = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(x), x)
    assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["torch", INTERPRETED])
def test_without_query_heads_keys_get_zero_gradients(backend: str) -> None:
    q, k = torch.randn(1, 0, 8, 16, requires_grad=True), torch.randn(1, 2, 8, 16, requires_grad=True)
    flash_attention(q, k, k, backend=backend).sum().backward()  # type: ignore[union-attr]
    assert k.grad is not None and not k.grad.any()
