"""What torch's transforms see of a call beside its operands: what user functions read, leaves from outside, nothing."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, jacfwd, jvp, vmap
from torch.nn.attention.flex_attention import create_block_mask
from torch.testing import assert_close

from flash import mods, reference
from flash.attention import flash_attention
from flash.blocks import blocks_of
from tests import features

TABLE = torch.linspace(-1, 2, 10, dtype=torch.float64).view(2, 5)


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def by_table(table: torch.Tensor) -> torch.Tensor:
    """A number that depends on what a score_mod reads."""
    q = torch.linspace(-1, 1, 2 * 3 * 4, dtype=torch.float64).view(1, 2, 3, 4)
    return flash_attention(q, q, q, score_mod=mods.relative_position(table, 2)).square().sum()


def by_dual(table: torch.Tensor) -> Any:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(by_table(forward_ad.make_dual(table, torch.ones_like(table)))).tangent


OF_A_TABLE: dict[str, Callable[[torch.Tensor], Any]] = {
    "grad": grad(by_table),
    "jvp": lambda table: jvp(by_table, (table,), (torch.ones_like(table),)),
    "dual": by_dual,
    "jacfwd": jacfwd(by_table),
    "vmap(grad)": lambda table: vmap(grad(by_table))(table.expand(3, -1, -1)),
    "grad(vmap)": lambda table: grad(lambda tables: vmap(by_table)(tables).sum())(table.expand(3, -1, -1)),
    "jvp(vmap)": lambda table: jvp(vmap(by_table), (table.repeat(3, 1, 1),), (torch.ones(3, 2, 5).double(),)),
    "backward": lambda table: by_table(table.clone().requires_grad_()),
    "backward of vmap": lambda table: vmap(by_table)(table.expand(3, -1, -1).clone().requires_grad_()).sum().backward(),
}


@pytest.mark.parametrize(
    ("name", "no_grad"),
    [(name, no_grad) for name in OF_A_TABLE for no_grad in (False, True) if not (no_grad and "backward" in name)],
)
def test_a_derivative_by_what_a_user_function_reads_raises(name: str, no_grad: bool) -> None:
    """It would be zeros, in silence."""
    with (
        torch.set_grad_enabled(not no_grad),
        pytest.raises(NotImplementedError, match="pass what is\\s+learned as bias"),
    ):
        OF_A_TABLE[name](TABLE)


def test_what_a_user_function_reads_may_be_mapped() -> None:
    tables = draw(3, 2, 5)
    assert_close(vmap(by_table)(tables), torch.stack([by_table(table) for table in tables]), rtol=1e-12, atol=1e-12)


AROUND: dict[str, tuple[Callable[..., torch.Tensor], Callable[[torch.Tensor], Any]]] = {  # and what x comes to
    "grad": (lambda f, x: grad(f)(x).sum(), torch.numel),
    "jvp": (lambda f, x: jvp(f, (x,), (torch.ones_like(x),))[1], torch.numel),
    "vmap": (lambda f, x: vmap(f)(x).sum(), torch.sum),
}


@pytest.mark.parametrize("name", AROUND)
def test_leaves_from_outside_a_transform_get_their_gradients(name: str) -> None:
    """Of a call that the transform's own input does not reach."""
    x, leaves = draw(3), [draw(1, 2, 5, 4).requires_grad_() for _ in range(3)]
    transform, factor = AROUND[name]
    got = transform(lambda x: x.sum() * flash_attention(*leaves).square().sum(), x)
    want = factor(x) * reference.attention(*leaves).square().sum()
    assert_close(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves), rtol=1e-11, atol=1e-11)


def test_gradients_in_a_batch_by_torchs_older_vmap_raise() -> None:
    q = draw(1, 2, 3, 4).requires_grad_()
    o = flash_attention(q, q, q)
    with pytest.raises(NotImplementedError, match="is_grads_batched"):
        torch.autograd.grad(o, q, draw(5, *o.shape), is_grads_batched=True)


@pytest.mark.parametrize("name", AROUND)
def test_what_is_kept_of_a_block_mask_first_met_in_a_transform_is_no_part_of_it(name: str) -> None:
    q, block_mask = (
        draw(1, 2, 40, 4),
        create_block_mask(features.staircase, None, 2, 40, 40, device="cpu", BLOCK_SIZE=16),
    )
    AROUND[name][0](lambda x: x.sum() * flash_attention(q, q, q, block_mask=block_mask).sum(), draw(3))
    assert not any(torch._C._functorch.is_functorch_wrapped_tensor(x) for x in blocks_of(block_mask, 1, 2, 40, 40))


@pytest.mark.parametrize("name", ["plain", "dropout_p", "bias"])
def test_a_mapped_axis_may_be_empty(name: str) -> None:
    q, k = draw(0, 1, 2, 3, 4), draw(1, 2, 5, 4)
    keywords: dict[str, Any] = {"plain": {}, "dropout_p": {"dropout_p": 0.5}, "bias": {"bias": draw(1, 2, 1, 5)}}[name]

    def call(q: torch.Tensor) -> Any:
        return flash_attention(q, k, k, return_lse=True, **keywords)

    o, lse = vmap(call, randomness="different")(q)
    assert o.shape == q.shape and lse.shape == q.shape[:-1]
    found = vmap(grad(lambda q: call(q)[0].sum()), randomness="different")(q)
    assert found.shape == q.shape


class Forces(torch.nn.Module):
    """A module that differentiates, as models of energies do."""

    def forward(self, q: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            q = q.detach().requires_grad_()
            return torch.autograd.grad((q + flash_attention(q, q, q)).square().sum(), q)[0]


def test_export_of_a_gradient_raises() -> None:
    """It would be written down without attention's part."""
    q = draw(1, 2, 3, 4)
    assert Forces()(q).any()
    with pytest.raises(NotImplementedError, match="torch.export keeps no gradient"):
        torch.export.export(Forces(), (q,), strict=False)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("no_grad", [False, True])
def test_a_compiled_call_refuses_dual_tensors_whatever_comes_before_it(backend: str, warm: bool, no_grad: bool) -> None:
    """A compiler may drop the tangent before the op could see it."""
    q, tangent = draw(1, 2, 3, 4), draw(1, 2, 3, 4)
    torch._dynamo.reset()
    compiled = torch.compile(lambda q: flash_attention(q * 2, q, q), backend=backend)
    if warm:
        compiled(q)
    with torch.set_grad_enabled(not no_grad), forward_ad.dual_level():
        with pytest.raises(RuntimeError, match="would be lost"):
            compiled(forward_ad.make_dual(q, tangent))


def test_gradients_inside_a_level_of_forward_mode_raise() -> None:
    q, tangent = draw(1, 2, 3, 4).requires_grad_(), draw(1, 2, 3, 4)
    with forward_ad.dual_level():
        o = forward_ad.unpack_dual(flash_attention(forward_ad.make_dual(q, tangent), q, q)).primal
        with pytest.raises(NotImplementedError, match="differentiable once"):
            torch.autograd.grad(o.sum(), q)
