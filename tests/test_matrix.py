"""{eager, compiled} x what torch does with a function x features: each cell has the oracle's values, or one exception.

No cell is content with having run: a derivative that is lost comes back as zeros, in silence.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch._dynamo.exc import Unsupported
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from flash import reference
from flash.attention import flash_attention, flash_attention_varlen
from flash.ops import PLAIN
from tests import bounds, features, philox, transforms
from tests.bounds import Inputs
from tests.calls import Place

COMBINATIONS: dict[str, list[str]] = {
    "plain": [],
    "causal-window-groups": ["causal", "window", "groups"],
    "mask-bias-softcap": ["mask", "bias", "softcap"],
    "alibi_slopes-sinks": ["alibi_slopes", "sinks"],
    "dropout": ["dropout_p"],
    "score_mod-mask_mod": ["score_mod", "mask_mod"],
    "block_mask": ["block_mask"],
    "packed": ["packed"],
}


class Raises(NamedTuple):
    """The exception of a cell."""

    kind: type[Exception]
    message: str


RIGHT = None
ONCE = Raises(NotImplementedError, "differentiable once")
LOST = Raises(RuntimeError, "would be lost")  # ops.guarded, in dynamo's wrapping where that traces
TORCH_BATCHED = Raises(RuntimeError, "compiled backward function within vmap")
TORCH_ONCE = Raises(RuntimeError, "does not currently support double backward")

MODES = ["eager", "whole", "alone"]  # what torch.compile gets: nothing, a transform and all in it, the attention in it
CELLS: dict[str, tuple[Raises | None, Raises | None, Raises | None]] = {
    "forward": (RIGHT, RIGHT, RIGHT),
    "backward": (RIGHT, RIGHT, RIGHT),
    "checkpoint": (RIGHT, RIGHT, RIGHT),
    "vmap": (RIGHT, RIGHT, RIGHT),
    "backward of vmap": (RIGHT, LOST, RIGHT),
    "batched backward": (RIGHT, TORCH_BATCHED, TORCH_BATCHED),
    "grad": (RIGHT, LOST, RIGHT),
    "vmap(grad)": (RIGHT, LOST, RIGHT),
    "jacrev": (RIGHT, LOST, RIGHT),
    "jvp": (RIGHT, LOST, RIGHT),
    "dual": (RIGHT, LOST, LOST),
    "jacfwd": (RIGHT, LOST, RIGHT),
    "backward of o beside jvp": (RIGHT, LOST, RIGHT),
    "grad of o beside jvp": (RIGHT, LOST, RIGHT),
    "double backward": (ONCE, TORCH_ONCE, TORCH_ONCE),
    "grad(jvp)": (ONCE, LOST, ONCE),
    "jvp(grad)": (ONCE, LOST, ONCE),
}
BY_LEAVES = (
    "backward",
    "checkpoint",
    "backward of vmap",
    "batched backward",
    "backward of o beside jvp",
    "double backward",
)  # senseless under no_grad


def cells(modes: list[str], slow: Callable[[str, bool], bool] = lambda combination, no_grad: False) -> Any:
    """Parametrize over the cells of modes, with and without no_grad where that makes sense."""
    return pytest.mark.parametrize(
        "combination, name, mode, no_grad",
        [
            pytest.param(
                combination, name, mode, no_grad,
                id=" ".join([combination, name, *(modes[1:] and [mode]), *(["no_grad"] if no_grad else [])]),
                marks=[pytest.mark.slow] if slow(combination, no_grad) else [],
            )
            for combination in COMBINATIONS
            for name in CELLS
            for mode in modes
            for no_grad in ((False,) if name in BY_LEAVES else (False, True))
        ],
    )  # fmt: skip


def meet(x: Inputs, call: transforms.Call) -> None:
    """Show a block mask to a call outside of torch.compile, as its docstring asks."""
    if "block_mask" in x.options:
        call.function(*call.operands)


def judge(x: Inputs, name: str, no_grad: bool, mode: str, backend: str = "torch") -> None:
    """Hold a cell to the table."""
    expected = CELLS[name][MODES.index(mode)]
    call = transforms.ours(x, backend)
    meet(x, call)
    fullgraph = expected is RIGHT and (mode == "whole" or name in ("forward", "backward", "checkpoint"))
    compiled = functools.partial(torch.compile, backend="aot_eager", fullgraph=fullgraph)
    whole: Callable[..., Any] = compiled if mode == "whole" else lambda function: function
    if mode == "alone":
        call = call._replace(function=compiled(call.function))
    torch._dynamo.reset()
    torch.manual_seed(features.SEED)
    with torch.set_grad_enabled(not no_grad):
        if expected is not RIGHT:
            with pytest.raises(expected.kind, match=expected.message):
                transforms.TRANSFORMS[name](call, whole)
            return
        got = transforms.TRANSFORMS[name](call, whole)
    want = transforms.WANTED[name](transforms.oracle(x))
    for ours, theirs in zip(got, want, strict=True):
        assert ours.shape == theirs.shape and theirs.any()
        assert (ours - theirs).abs().max() <= 1e-12 * (1 + theirs.abs().max())


@pytest.mark.sampled(20, all=True)
@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.interpret)])
@cells(["eager"])
def test_eager(place: Place, backend: str, combination: str, name: str, mode: str, no_grad: bool) -> None:
    judge(features.call_of(place, COMBINATIONS[combination]), name, no_grad, mode, backend)


@pytest.mark.sampled(4, all=True)
@cells(["whole", "alone"], slow=lambda combination, no_grad: combination != "plain" or no_grad)
def test_compiled(combination: str, name: str, mode: str, no_grad: bool) -> None:
    judge(features.call_of(torch.Tensor.clone, COMBINATIONS[combination]), name, no_grad, mode)


@pytest.mark.parametrize("name", [name for name in CELLS if name not in ("forward", "dual", *BY_LEAVES)])
def test_torch_takes_no_fullgraph_function_into_a_transform(name: str) -> None:
    """Without fullgraph it goes back to eager, and the values are right: "alone" in the table."""
    call = transforms.ours(features.call_of(torch.Tensor.clone, []), "torch")
    torch._dynamo.reset()
    call = call._replace(function=torch.compile(call.function, backend="aot_eager", fullgraph=True))
    with pytest.raises(Unsupported, match="functorch"):
        transforms.TRANSFORMS[name](call, lambda function: function)


def under(mode: str, function: Callable[..., Any]) -> Callable[..., Any]:
    torch._dynamo.reset()
    return function if mode == "eager" else torch.compile(function, backend="aot_eager", fullgraph=True)


@pytest.mark.parametrize("combination", COMBINATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", ["eager", pytest.param("whole", marks=pytest.mark.slow)])
def test_autocast_casts_q_k_and_v_and_gradients_back(combination: str, dtype: torch.dtype, mode: str) -> None:
    """The result is that of q, k and v in the lower precision; gradients arrive in the leaves' own."""
    x = features.call_of(torch.Tensor.clone, COMBINATIONS[combination], dtype=torch.float32)

    def attention(*args: torch.Tensor, **options: Any) -> Any:
        with torch.autocast("cpu", dtype):
            return public(*args, return_lse=True, backend="torch", **options)

    public: Any = flash_attention_varlen if combination == "packed" else flash_attention
    if "block_mask" in x.options:
        attention(*x[:3], **x.options)  # met before torch.compile, as its docstring asks
    torch.manual_seed(features.SEED)
    got = bounds.differentiate(under(mode, attention), x)
    lower = Inputs(*(t.to(dtype) for t in x[:4]), x.dlse, x.options)
    gradients = {name: getattr(got, name) for name in ("dq", "dk", "dv")}
    assert got.o.dtype == dtype and all(t.dtype == torch.float32 for t in gradients.values())
    bounds.check(got._replace(**{name: t.to(dtype) for name, t in gradients.items()}), features.known(lower))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_derivatives_under_autocast_are_those_of_operands_in_the_lower_precision(dtype: torch.dtype) -> None:
    """Tangents, and gradients that are taken where autocast is still on: bit for bit."""
    x = features.call_of(torch.Tensor.clone, ["bias", "softcap", "groups"], dtype=torch.float32)
    call = transforms.ours(x, "torch")
    lower = [tuple(t.to(dtype) for t in of[:3]) + of[3:] for of in (call.operands, call.along)]
    want = torch.func.jvp(call.function, *lower)
    leaves = tuple(t.requires_grad_() for t in lower[0])
    gradients = torch.autograd.grad(call.curved(*leaves), leaves)
    with torch.autocast("cpu", dtype):
        assert_close(torch.func.jvp(call.function, call.operands, call.along), want, rtol=0, atol=0)
        leaves = call.leaves()
        found = torch.autograd.grad(call.curved(*leaves), leaves)
    assert_close(found, [g.to(t.dtype) for g, t in zip(gradients, leaves, strict=True)], rtol=0, atol=0)


class Module(torch.nn.Module):
    """A call as a module."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *operands: torch.Tensor) -> Any:
        return self.function(*operands)


@pytest.mark.parametrize("combination", COMBINATIONS)
@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("no_grad", [False, True])
def test_export_keeps_one_node(combination: str, strict: bool, no_grad: bool) -> None:
    x = features.call_of(torch.Tensor.clone, COMBINATIONS[combination])
    call = transforms.ours(x, "torch")
    meet(x, call)
    with torch.set_grad_enabled(not no_grad):
        program = torch.export.export(Module(call.function), call.operands, strict=strict)
        nodes = [
            str(node.target)
            for node in program.graph.nodes
            if node.op == "call_function" and "flash" in str(node.target)
        ]
        assert nodes == ["flash.forward.default"]
        torch.manual_seed(features.SEED)
        got = program.module()(*call.operands)
    assert_close(got, transforms.WANTED["forward"](transforms.oracle(x)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", ["eager", "whole"])
def test_dropout_under_vmap_is_the_same_for_all_or_each_one_s_own_or_refused(mode: str) -> None:
    """torch.func.vmap's `randomness` decides."""
    x = features.call_of(torch.Tensor.clone, ["dropout_p"])
    call = transforms.ours(x, "torch")
    torch.manual_seed(features.SEED)
    seeds = torch.randint(0, 2**63 - 1, (transforms.SEVERAL, 1))
    torch.manual_seed(features.SEED)
    got, _ = under(mode, torch.func.vmap(call.function, randomness="different"))(*call.several)
    p = x.options["dropout_p"]
    sizes = (*x.q.shape[:3], x.k.shape[2])
    for o, seed, *operands in zip(got, seeds, *call.several, strict=True):
        known = {"dropout_mask": philox.dropout_mask(int(seed), p, *sizes)}
        assert_close(o, reference.attention(*operands, **known), rtol=1e-12, atol=1e-12)
    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(call.function)(*call.several)


@pytest.mark.parametrize("mode", ["eager", pytest.param("whole", marks=pytest.mark.slow)])
@pytest.mark.parametrize("combination", ["mask-bias-softcap", "alibi_slopes-sinks", "packed"])
@pytest.mark.parametrize("batch", [1, 2])
def test_any_operand_may_be_mapped_over_any_axis(combination: str, batch: int, mode: str) -> None:
    """Each alone, then all but it; forward and gradient."""
    x = features.call_of(torch.Tensor.clone, COMBINATIONS[combination], features.SIZES._replace(batch=batch))
    call, expected = transforms.ours(x, "torch"), transforms.oracle(x)
    every = range(len(call.operands))
    for chosen in [*({i} for i in every), *({*every} - {i} for i in every)]:
        axes = tuple((i % 3 if call.operands[i].dim() > 2 else -1) if i in chosen else None for i in every)
        given = tuple(
            xs[0] if axis is None else xs.movedim(0, axis) for xs, axis in zip(call.several, axes, strict=True)
        )
        one = expected._replace(
            several=tuple(
                xs[:1].expand(xs.shape) if axis is None else xs for xs, axis in zip(call.several, axes, strict=True)
            )
        )
        found = {"vmap": under(mode, torch.func.vmap(call.function, axes))(*given)}
        if mode == "eager":
            found["vmap(grad)"] = torch.func.vmap(torch.func.grad(call.curved, call.every()), axes)(*given)
        for name, got in found.items():
            for ours, theirs in zip(got, transforms.WANTED[name](one), strict=True):
                assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


class Masks(TorchDispatchMode):
    """Where the mask and bias of each call lie, and how many batch elements it has."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, int, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.flash.forward.default:
            mask, bias = (args[3][PLAIN.index(name)] for name in ("mask", "bias"))
            self.seen.append((args[0].shape[0], mask.data_ptr(), bias.data_ptr()))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("batch", [1, 2])
def test_a_mask_that_is_alike_for_all_is_not_copied_under_vmap(batch: int) -> None:
    """Of one batch element it is broadcast over the joined batch; else there is a call for each."""
    q = torch.randn(transforms.SEVERAL, batch, 2, 9, 8)
    mask, bias = torch.rand(batch, 1, 9, 9) < 0.8, torch.randn(batch, 1, 9, 9)
    with Masks() as masks:
        torch.vmap(lambda x: flash_attention(x, x, x, mask=mask, bias=bias))(q)
    sizes = [transforms.SEVERAL] if batch == 1 else [batch] * transforms.SEVERAL
    assert masks.seen == [(size, mask.data_ptr(), bias.data_ptr()) for size in sizes]


@pytest.mark.parametrize("output", [0, 1], ids=["o", "lse"])
def test_either_output_alone_has_per_sample_gradients(output: int) -> None:
    x = features.call_of(torch.Tensor.clone, ["groups", "bias", "sinks"])
    ours, theirs = transforms.ours(x, "torch"), transforms.oracle(x)
    got = torch.vmap(torch.func.grad(lambda *xs: ours.function(*xs)[output].square().sum(), ours.every()))(
        *ours.several
    )

    def gradients(c: transforms.Call) -> Any:
        leaves = c.leaves()
        return torch.autograd.grad(c.function(*leaves)[output].square().sum(), leaves, materialize_grads=True)

    assert_close(got, transforms.one_by_one(theirs, gradients), rtol=1e-12, atol=1e-12)
