"""Each feature in each dtype against the oracle, operands of every shape and stride, and what is never expanded."""

import importlib.util
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flash import dispatch
from flash.attention import flash_attention
from flash.kernels.spec import Config, Gradients
from flash.mods import MaskMod, ScoreMod
from flash.problem import Problem
from tests import features
from tests.bounds import OPERANDS, check
from tests.calls import Place, random_inputs, strided
from tests.features import Sizes

BOTH = pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.interpret)])
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
GRADIENTS = ("dq", "dk", "dv", "dbias", "dalibi_slopes", "dsinks")

pytestmark = BOTH


@pytest.mark.sampled(14)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", features.NAMES)
def test_a_feature_is_within_the_bounds_of_every_dtype(
    place: Place, backend: str, name: str, dtype: torch.dtype
) -> None:
    sizes = Sizes(batch=1, seqlen_q=33, seqlen_k=37, head_dim=32, head_dim_v=24)
    x = features.call_of(place, [name], sizes, dtype)
    got = features.run(x, backend)
    check(got, features.known(x))
    for operand in ("bias", "alibi_slopes", "sinks"):
        gradient = getattr(got, f"d{operand}")
        assert (gradient is not None) == (operand == name)
        if gradient is not None:
            assert gradient.shape == x.options[name].shape and gradient.dtype == x.options[name].dtype


@pytest.mark.sampled(3, all=True)
@pytest.mark.parametrize("own", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["bias", "alibi_slopes", "sinks"])
def test_an_operand_keeps_its_own_dtype(place: Place, backend: str, name: str, own: torch.dtype) -> None:
    x = features.call_of(place, [name], dtype=torch.float32)
    x.options[name] = x.options[name].to(own)
    got = features.run(x, backend)
    assert getattr(got, f"d{name}").dtype == own
    check(got, x)


@pytest.mark.sampled(12)
@pytest.mark.parametrize("full", list(itertools.product([False, True], repeat=4)), ids=str)
def test_a_bias_of_any_broadcast_shape_has_a_gradient_of_its_shape(
    place: Place, backend: str, full: tuple[bool, bool, bool, bool]
) -> None:
    sizes = Sizes(batch=2, heads=2, heads_k=1, seqlen_q=33, seqlen_k=20)
    shape = [n if whole else 1 for n, whole in zip((2, 2, 33, 20), full, strict=True)]
    for dtype in (torch.float64, torch.float32)[: 2 if full[0] == full[3] else 1]:
        x = features.call_of(place, ["causal"], sizes, dtype)
        x.options["bias"] = place(torch.randn(shape, dtype=dtype))
        got = features.run(x, backend)
        assert got.dbias is not None and list(got.dbias.shape) == shape
        check(got, x)


@pytest.mark.sampled(10)
@pytest.mark.parametrize("shape", [(20,), (1,), (), (33, 20), (33, 1), (2, 1, 20), (2, 33, 20)], ids=str)
@pytest.mark.parametrize("name", ["bias", "mask"])
def test_an_operand_may_leave_out_leading_axes(place: Place, backend: str, name: str, shape: tuple[int, ...]) -> None:
    x = features.call_of(place, [], Sizes(seqlen_q=33, seqlen_k=20))
    operand = torch.randn(shape, dtype=torch.float64)
    x.options[name] = place(operand if name == "bias" else operand > 0)
    got = features.run(x, backend)
    assert name == "mask" or got.dbias is not None and got.dbias.shape == shape
    check(got, x)


@pytest.mark.sampled(6)
@pytest.mark.parametrize("full", list(itertools.product([False, True], repeat=4)), ids=str)
def test_a_mask_of_any_broadcast_shape(place: Place, backend: str, full: tuple[bool, bool, bool, bool]) -> None:
    sizes = Sizes(batch=2, heads=2, heads_k=1, seqlen_q=33, seqlen_k=20)
    shape = [n if whole else 1 for n, whole in zip((2, 2, 33, 20), full, strict=True)]
    x = features.call_of(place, ["causal"], sizes)
    x.options["mask"] = place(torch.rand(shape) < 0.6)
    check(features.run(x, backend), x)


@pytest.mark.sampled(16)
@pytest.mark.parametrize("kind", range(7))
@pytest.mark.parametrize("name", ["bias", "mask"])
def test_strides_of_an_operand_change_no_bit(place: Place, backend: str, name: str, kind: int) -> None:
    x = features.call_of(place, [name, "causal"], Sizes(seqlen_q=20, seqlen_k=33))
    operand = x.options[name].expand(2, 2, 20, 33).contiguous()
    x.options[name] = operand
    want = features.run(x, backend)
    x.options[name] = list(strided(place, (2, 2, 20, 33), operand.dtype).values())[kind].copy_(operand)
    got = features.run(x, backend)
    for output in (*GRADIENTS[:4], "o", "lse"):
        if getattr(want, output) is not None:
            assert torch.equal(getattr(got, output), getattr(want, output)), output


def test_an_expanded_operand_equals_the_narrow_one(place: Place, backend: str) -> None:
    x = features.call_of(place, ["bias", "padding"], Sizes(seqlen_q=20, seqlen_k=50))
    want = features.run(x, backend)
    x.options["mask"] = x.options["mask"].expand(2, 2, 20, 50)
    got = features.run(x, backend)
    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(got, want, strict=True) if a is not None)


@pytest.mark.sampled(3, all=True)
@pytest.mark.parametrize("slopes", [(2,), (3, 2)], ids=str)
@pytest.mark.parametrize("q_offset", [None, -4, 9])
def test_slopes_of_heads_or_of_each_batch_element(
    place: Place, backend: str, slopes: tuple[int, ...], q_offset: int | None
) -> None:
    x = features.call_of(place, ["causal"], Sizes(batch=3))
    x.options.update(alibi_slopes=place(torch.randn(slopes, dtype=torch.float64)), q_offset=q_offset)
    got = features.run(x, backend)
    assert got.dalibi_slopes is not None and got.dalibi_slopes.shape == slopes
    check(got, x)


@pytest.mark.sampled(3, all=True)
@pytest.mark.parametrize("softcap", [0.01, 1.0, 50.0, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_any_softcap(place: Place, backend: str, softcap: float, dtype: torch.dtype) -> None:
    x = features.call_of(place, ["causal"], dtype=dtype, sigma=2.0)
    x.options["softcap"] = softcap
    check(features.run(x, backend), x)


@pytest.mark.parametrize("sink", [-1e4, -3.0, 0.0, 30.0, float("-inf")])
def test_any_sink(place: Place, backend: str, sink: float) -> None:
    x = features.call_of(place, ["causal"], Sizes(seqlen_q=23, seqlen_k=19))
    x.options["sinks"] = place(torch.tensor([sink, 0.5], dtype=torch.float64))
    check(features.run(x, backend), x)


def test_only_the_gradients_asked_for_come(place: Place, backend: str) -> None:
    x = features.call_of(place, ["bias", "alibi_slopes", "sinks"])
    named = features.differentiable(x)
    want = features.run(x, backend)
    call = features.attention(backend)
    for chosen in named:
        given = {name: t.detach().requires_grad_(name == chosen) for name, t in named.items()}
        q, k, v = (given.pop(name) for name in "qkv")
        o, lse = call(q, k, v, **x.options | given)
        torch.autograd.backward([o, lse], [x.do, x.dlse])
        found = {"q": q, "k": k, "v": v, **given}
        assert [name for name, t in found.items() if t.grad is not None] == [chosen]
        assert torch.equal(found[chosen].grad, getattr(want, f"d{chosen}")), chosen  # type: ignore[arg-type]


@pytest.mark.sampled(3)
def test_every_gradient_repeats_bit_for_bit(place: Place, backend: str) -> None:
    names = ["bias", "alibi_slopes", "sinks", "groups", "dropout_p", "padding"]
    x = features.call_of(place, names, Sizes(seqlen_q=63, seqlen_k=71), torch.float32)
    first, second = features.run(x, backend), features.run(x, backend)
    for name, a, b in zip(first._fields[:8], first, second, strict=False):  # those that a backward pass finds
        assert a is not None and b is not None and torch.equal(a, b), name


class Allocations(TorchDispatchMode):
    """The largest tensor that any operation of torch made, in bytes of its storage."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        mine = [x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in mine:
                self.largest = max(self.largest, x.untyped_storage().nbytes())
        return out


@pytest.mark.sampled(12)
@pytest.mark.parametrize("name", ["padding", "bias", "alibi_slopes", "window", "mask_mod"])
def test_nothing_is_expanded_to_the_square_of_the_length(place: Place, backend: str, name: str) -> None:
    batch, heads, n = (2, 8, 2048) if backend == "torch" else (4, 4, 128)
    sizes = Sizes(batch, heads, heads, n, n, 1, 1)
    x = features.call_of(place, [name] if name != "bias" else [], sizes, torch.float32)
    if name == "bias":
        x.options["bias"] = place(torch.randn(batch, 1, 1, n))
    tile = Config(128, 128, 4, 1)
    with Allocations() as seen:  # not through the op, which hides what it does
        p = Problem.of(x.q, x.k, x.v, **x.options, backend=backend, config=dict.fromkeys(features.TILES, tile))
        o, lse = dispatch.forward(p)
        dispatch.backward(p, x.do, x.dlse, o, lse, Gradients(True, True, True, *(n in x.options for n in OPERANDS)))
    assert batch * heads * n <= seen.largest < batch * heads * n * n
    with Allocations() as seen:  # the test sees what it looks for
        (x.q @ x.k.mT).softmax(-1)
    assert seen.largest >= batch * heads * n * n


SCORE = """
import triton
import triton.language as tl

@triton.jit
def shift(s, b, h, i, j, args):
    return s + {slope} * j

@triton.jit
def one(s, b, h, i, j, args):
    return s * 0.0 + 1.0

def twin(s, b, h, i, j, args):
    return s + {slope} * j

@triton.jit
def rule(b, h, i, j, args):
    return j % {step} == 0

def rule_twin(b, h, i, j, args):
    return j % {step} == 0
"""


def module_of(folder: Path, **numbers: Any) -> Any:
    """The functions above with these numbers, under the names that they always have."""
    path = folder / "functions.py"
    path.write_text(SCORE.format(**numbers))
    spec = importlib.util.spec_from_file_location("functions", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_function_defined_anew_under_its_old_name_is_the_one_that_runs(
    place: Place, backend: str, tmp_path: Path
) -> None:
    x = features.call_of(place, [])
    for slope, step in ((0.1, 2), (-0.7, 3), (0.1, 2)):
        (tmp_path / f"{slope}{step}").mkdir(exist_ok=True)
        functions = module_of(tmp_path / f"{slope}{step}", slope=slope, step=step)
        for options in (
            {"score_mod": ScoreMod(functions.shift, functions.twin, functions.one)},
            {"mask_mod": MaskMod(functions.rule, functions.rule_twin)},
        ):
            named = x._replace(options=options)
            check(features.run(named, backend), named)


def test_three_axes_are_one_head(place: Place, backend: str) -> None:
    x = features.call_of(place, ["bias", "mask", "window"], Sizes(heads=1, heads_k=1))
    want = features.run(x, backend)
    options = {name: value.squeeze(1) if name in ("bias", "mask") else value for name, value in x.options.items()}
    q, k, v = (t.squeeze(1) for t in x[:3])
    o, lse = flash_attention(q, k, v, return_lse=True, backend=backend, config=features.TILES, **options)
    assert torch.equal(o, want.o.squeeze(1)) and torch.equal(lse, want.lse.squeeze(1))


@pytest.mark.sampled(3, all=True)
@pytest.mark.parametrize("sizes", [(0, 2, 5, 5), (2, 2, 0, 5), (2, 2, 5, 0), (2, 2, 1, 1)], ids=str)
@pytest.mark.parametrize("name", [name for name in features.NAMES if name not in ("packed", "block_mask", "groups")])
def test_empty_calls_are_served(place: Place, backend: str, name: str, sizes: tuple[int, int, int, int]) -> None:
    batch, heads, seqlen_q, seqlen_k = sizes
    x = features.call_of(place, [name], Sizes(batch, heads, heads, seqlen_q, seqlen_k))
    check(features.run(x, backend), features.known(x))


def test_plain_inputs_need_no_feature(place: Place, backend: str) -> None:
    x = random_inputs(place, seqlen_q=33, dtype=torch.float64)
    check(features.run(x, backend), x)
