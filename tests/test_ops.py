"""The raw ops: opcheck, the guard, FLOPs by hand, and a smoke test of each private name of torch that flash/ uses."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.autograd import forward_ad
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from flash import mods
from flash.attention import flash_attention, flash_attention_varlen
from flash.ops import call_of, problem_of
from flash.problem import Problem
from tests import features


def qkv(dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    return [torch.randn(*shape, dtype=dtype) for shape in ((2, 4, 9, 8), (2, 2, 11, 8), (2, 2, 11, 5))]


def permuted(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "dense": torch.Tensor.clone,
    "permuted": permuted,
    "every other row": lambda x: x[:, :, ::2],
    "every other element": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "expanded heads": lambda x: x[:, :1].expand(x.shape),
    "expanded batch": lambda x: x[:1].expand(x.shape),
    "one head": lambda x: x[:, :1],
}


def opcheck(problem: Problem, every_need: list[list[bool]], layout: Callable[..., Any] = torch.Tensor.clone) -> None:
    """Check forward, backward for each list of needs, and jvp with the same tangents, on what is laid out so."""
    q, k, v = problem.q, problem.k, problem.v
    operands, *call = call_of(problem)
    o, lse = torch.ops.flash.forward(q, k, v, operands, *call)
    torch.library.opcheck(torch.ops.flash.forward.default, (q, k, v, operands, *call))
    do, dlse = layout(torch.randn_like(o)), torch.randn_like(lse)
    if do.shape != o.shape:
        do = torch.randn_like(o)
    named = (q, k, v, problem.mods.bias, problem.mods.alibi_slopes, problem.mods.sinks)
    for needs in every_need:
        args = (do, dlse, q, k, v, o, lse, operands, *call, needs)
        torch.library.opcheck(torch.ops.flash.backward.default, args)
        tangents = [torch.randn_like(x) if need else None for x, need in zip(named, needs, strict=True)]
        torch.library.opcheck(torch.ops.flash.jvp.default, (*tangents, q, k, v, o, lse, operands, *call))


@pytest.mark.sampled(3, all=True)
@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(layout, id=name, marks=[pytest.mark.slow] if name.startswith(("expanded", "one")) else [])
        for name, layout in LAYOUTS.items()
    ],
)
def test_opcheck_passes_whatever_the_strides(layout: Callable[[torch.Tensor], torch.Tensor]) -> None:
    q, k, v = (layout(x) for x in qkv())
    nothing = [False] * 3
    opcheck(Problem.of(q, k, v, causal=True), [[True] * 3 + nothing, [False, True, False] + nothing], layout)


def test_opcheck_passes_with_every_operand() -> None:
    q, k, v = qkv()
    batch, heads, seqlen_q, seqlen_k = *q.shape[:3], k.shape[2]
    problem = Problem.of(
        q, k, v, window=(3, 2), mask=torch.rand(batch, 1, 1, seqlen_k) > 0.2, softcap=5.0,
        bias=torch.randn(heads, seqlen_q, 1), alibi_slopes=torch.rand(heads), sinks=torch.randn(heads),
        score_mod=mods.tanh_softcap(3.0), mask_mod=mods.dilated_window(4, 2), dropout_p=0.3,
    )  # fmt: skip
    problem = replace(problem, mods=problem.mods._replace(seed=torch.tensor([7])))
    operands, *call = call_of(problem)
    back = problem_of(q, k, v, operands, *call)
    again, *rest = call_of(back)
    assert rest == call and all(x is y for x, y in zip(operands, again, strict=True))
    # opcheck's tensors lack storage under torch.func, which differentiates a score_mod's twin
    problem = replace(problem, mods=problem.mods._replace(score_mod=None))
    opcheck(problem, [[True] * 6, [False] * 4 + [True] * 2])


@pytest.mark.parametrize("name", ["packed", "block_mask", "q_offset"])
def test_opcheck_passes_with_the_operands_of_other_calls(name: str) -> None:
    x = features.call_of(torch.Tensor.clone, [name])
    opcheck(Problem.of(x.q, x.k, x.v, **x.options), [[True] * 3 + [False] * 3])


@pytest.mark.parametrize("op", ["forward", "backward", "jvp"])
def test_a_raw_op_refuses_to_lose_a_gradient(op: str) -> None:
    args = arguments(op)
    for number, x in enumerate(args):
        if isinstance(x, torch.Tensor):
            watched = [*args[:number], x.detach().requires_grad_(), *args[number + 1 :]]
            with pytest.raises(RuntimeError, match="would be lost"):
                getattr(torch.ops.flash, op)(*watched)
            with torch.no_grad():
                getattr(torch.ops.flash, op)(*watched)


@pytest.mark.parametrize("op", ["forward", "backward", "jvp"])
@pytest.mark.parametrize("no_grad", [False, True])
def test_a_raw_op_refuses_to_lose_a_tangent_even_under_no_grad(op: str, no_grad: bool) -> None:
    args = arguments(op)
    for number, x in enumerate(args):
        if isinstance(x, torch.Tensor):
            with forward_ad.dual_level(), torch.set_grad_enabled(not no_grad):
                dual = forward_ad.make_dual(x, torch.ones_like(x))
                with pytest.raises(RuntimeError, match="would be lost"):
                    getattr(torch.ops.flash, op)(*args[:number], dual, *args[number + 1 :])


def arguments(op: str) -> list[Any]:
    """Arguments of an op."""
    q, k, v = qkv()
    call = call_of(Problem.of(q, k, v))
    o, lse = torch.ops.flash.forward(q, k, v, *call)
    before = {"forward": [], "backward": [o, lse], "jvp": [q, k, v, None, None, None]}[op]
    after = {"forward": [], "backward": [[True] * 3 + [False] * 3], "jvp": []}[op]
    return [*before, q, k, v, *([] if op == "forward" else [o, lse]), *call, *after]


PAIRS = 2 * 4 * 9 * 11  # of queries and keys, of two batch elements and four heads; a score of head_dim is 2 * 8 FLOPs


def counted(function: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return int(counter.get_total_flops())


def test_flops_of_a_dense_call_are_those_of_its_matrix_products() -> None:
    q, k, v = qkv()
    shapes = q.shape, (2, 4, 11, 8), (2, 4, 11, 5)
    forward = counted(lambda: flash_attention(q, k, v, causal=True))
    assert forward == 2 * PAIRS * (8 + 5) == 20592 == sdpa_flop_count(*shapes)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    o = flash_attention(*leaves)
    assert isinstance(o, torch.Tensor)
    backward = counted(lambda: o.sum().backward())
    assert backward == 2 * PAIRS * (3 * 8 + 2 * 5) == 53856 == sdpa_backward_flop_count(o.shape, *shapes)


@pytest.mark.parametrize("moved, widths", [("qkv", 3 * 8 + 2 * 5), ("q", 2 * 8 + 5), ("v", 8 + 2 * 5)])
def test_flops_of_tangents_are_those_of_the_operands_that_move(moved: str, widths: int) -> None:
    given = dict(zip("qkv", qkv(), strict=True))
    along = tuple(torch.randn_like(given[name]) for name in moved)

    def function(*tensors: torch.Tensor) -> Any:
        return flash_attention(*(given | dict(zip(moved, tensors, strict=True))).values())

    found = counted(lambda: torch.func.jvp(function, tuple(given[name] for name in moved), along))
    assert found == 2 * PAIRS * (8 + 5) + 2 * PAIRS * widths


def test_flops_of_packed_sequences_are_the_sum_of_theirs() -> None:
    q, k = torch.randn(12, 4, 8, requires_grad=True), torch.randn(14, 2, 8)
    starts = [torch.tensor(x, dtype=torch.int32) for x in ([0, 3, 3, 12], [0, 5, 7, 14])]
    pairs = 4 * (3 * 5 + 0 * 2 + 9 * 7)

    def loss() -> torch.Tensor:
        o = flash_attention_varlen(
            q, k, k, cu_seqlens_q=starts[0], cu_seqlens_k=starts[1], max_seqlen_q=9, max_seqlen_k=7
        )
        assert isinstance(o, torch.Tensor)
        return o.sum()

    assert counted(loss) == 2 * pairs * 16 == 9984
    out = loss()
    assert counted(out.backward) == 2 * pairs * 40 == 24960


def test_private_forward_ad_current_level() -> None:
    levels = []

    def function(x: torch.Tensor) -> torch.Tensor:
        levels.append(forward_ad._current_level)
        return x

    function(torch.ones(1))
    with forward_ad.dual_level():
        function(torch.ones(1))
    torch.func.jvp(function, (torch.ones(1),), (torch.ones(1),))
    assert levels == [-1, 0, 0]


def seen_inside(transform: Callable[..., Any], look: Callable[[torch.Tensor], Any]) -> Any:
    """What a function under a transform sees of its argument."""
    found = []

    def function(x: torch.Tensor) -> torch.Tensor:
        found.append(look(x))
        return x.sum()

    transform(function)(torch.ones(2))
    return found[0]


WRAPPED = torch._C._functorch.is_functorch_wrapped_tensor
TRACKED = torch._C._functorch.is_gradtrackingtensor


@pytest.mark.parametrize("transform", [torch.func.grad, torch.vmap], ids=["grad", "vmap"])
def test_private_functorch_names(transform: Any) -> None:
    active = torch._C._are_functorch_transforms_active
    assert not active() and seen_inside(transform, lambda x: active())
    assert not WRAPPED(torch.ones(1)) and seen_inside(transform, WRAPPED)
    assert seen_inside(transform, TRACKED) == (transform is torch.func.grad)


def test_private_temporarily_clear_interpreter_stack() -> None:
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

    def made_inside(x: torch.Tensor) -> bool:
        with temporarily_clear_interpreter_stack():
            return WRAPPED(torch.ones(1))

    assert seen_inside(torch.func.grad, lambda x: WRAPPED(torch.ones(1)))
    assert not seen_inside(torch.func.grad, made_inside)


def test_private_forward_mode_switch() -> None:
    assert torch._C._is_fwd_grad_enabled()
    with forward_ad._set_fwd_grad_enabled(False):
        assert not torch._C._is_fwd_grad_enabled()


def test_private_dispatch_below_autograd() -> None:
    x = torch.ones(1, requires_grad=True)
    with torch._C._AutoDispatchBelowAutograd():
        assert not (x * 2).requires_grad
    assert (x * 2).requires_grad


def test_private_states_that_plans_ask_for() -> None:
    from torch.overrides import TorchFunctionMode
    from torch.utils._python_dispatch import TorchDispatchMode

    states = {
        "dispatch modes": torch._C._len_torch_dispatch_stack,
        "function modes": torch._C._len_torch_function_stack,
        "tracing": lambda: torch._C._get_tracing_state() is not None,
        "autocast": torch._C._is_any_autocast_enabled,
    }
    assert not any(state() for state in states.values())
    with TorchDispatchMode():
        assert states["dispatch modes"]() == 1
    with TorchFunctionMode():
        assert states["function modes"]() == 1
    with torch.autocast("cpu", torch.bfloat16):
        assert states["autocast"]()
    found = []
    torch.jit.trace(lambda x: (found.append(states["tracing"]()), x * 2)[1], torch.ones(1), check_trace=False)
    assert found == [True]


def test_private_fake_tensor() -> None:
    from torch._subclasses import FakeTensor
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        assert isinstance(torch.ones(1), FakeTensor)


def test_private_disable_dynamo() -> None:
    from torch._compile import _disable_dynamo

    traced = []

    @_disable_dynamo
    def aside(x: torch.Tensor) -> torch.Tensor:
        traced.append(torch.compiler.is_compiling())
        return x * 2

    torch._dynamo.reset()
    found = torch.compile(lambda x: aside(x + 1), backend="eager")(torch.ones(1))
    assert traced == [False] and found == 4


def test_private_getitem_of_a_vmapped_index() -> None:
    from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

    table = torch.arange(5)
    with TransformGetItemToIndex():
        assert torch.equal(torch.vmap(lambda i: table[i])(torch.tensor([3, 1])), torch.tensor([3, 1]))


def test_private_fused_attention_of_a_cpu() -> None:
    """`_scaled_dot_product_flash_attention_for_cpu` and its `_backward`: o, lse in natural logarithm, gradients."""
    q, k, v = torch.randn(3, 2, 2, 9, 8, dtype=torch.float64).unbind()
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    s = leaves[0] @ leaves[1].mT * 0.5
    want = s.softmax(-1) @ leaves[2]
    do = torch.randn_like(want)
    o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, False, attn_mask=None, scale=0.5)
    assert_close(o, want)
    assert_close(lse, s.logsumexp(-1), check_stride=False)
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    got = backward(do, q, k, v, o, lse, 0.0, False, attn_mask=None, scale=0.5)
    assert_close(got, torch.autograd.grad(want, leaves, do))


def names_and_broadcasts(group: Any) -> tuple[bool, int]:
    """`_resolve_process_group` and `broadcast` of torch's functional collectives."""
    from torch.distributed import distributed_c10d
    from torch.distributed._functional_collectives import broadcast

    found = distributed_c10d._resolve_process_group(group.group_name)
    return found is group, int(broadcast(torch.tensor([7 + group.rank()]), 0, group))


def test_private_names_of_process_groups(team: Any) -> None:
    assert team.run(names_and_broadcasts, ranks=2) == [(True, 7), (True, 7)]
