"""The shipped user functions: each Triton function says what its torch twin says, and spans miss no visible pair."""

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from flash import mods
from flash.mods import MaskMod
from tests.calls import Place

triton = pytest.importorskip("triton")
tl = triton.language

BATCH, HEADS = 2, 3
IDS = [
    [0, 0, 0, 1, 1, 1, 1, 5, 5, 5, 5, 5, 2, 2, 2, 2, 2, 2, 9],
    [4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 7, 7, 7, 7, 7, 7, 7, 7],
]
LENGTH = len(IDS[0])

Make = Callable[[Place], Any]
MASKS: dict[str, Make] = {
    "document": lambda place: mods.document(place(torch.tensor(IDS))),
    "document of all": lambda place: mods.document(place(torch.tensor(IDS[0], dtype=torch.int32))),
    "documents out of order": lambda place: mods.document(place(torch.randint(0, 4, (BATCH, LENGTH)))),
    "keys of their own": lambda place: mods.document(
        place(torch.randint(0, 5, (BATCH, 13))), place(torch.randint(1, 6, (BATCH, LENGTH)))
    ),
    "prefix": lambda place: mods.prefix_lm(place(torch.tensor([5, 0]))),
    "long prefix": lambda place: mods.prefix_lm(place(torch.tensor([100]))),
    "window": lambda place: mods.dilated_window(3, device=place(torch.empty(1)).device),
    "dilated": lambda place: mods.dilated_window(2, 3, device=place(torch.empty(1)).device),
    "only itself": lambda place: mods.dilated_window(0, 2**40, device=place(torch.empty(1)).device),
    "everything": lambda place: mods.dilated_window(2**40, 1, device=place(torch.empty(1)).device),
    "pixels": lambda place: mods.neighborhood_2d(4, 5, 1, device=place(torch.empty(1)).device),
    "small image": lambda place: mods.neighborhood_2d(3, 5, 1, device=place(torch.empty(1)).device),
    "its own pixel": lambda place: mods.neighborhood_2d(5, 4, 0, device=place(torch.empty(1)).device),
    "whole image": lambda place: mods.neighborhood_2d(4, 5, 2**40, device=place(torch.empty(1)).device),
}
SCORES: dict[str, Make] = {
    "relative position": lambda place: mods.relative_position(place(torch.randn(HEADS, 9)), 4),
    "in bfloat16": lambda place: mods.relative_position(place(torch.randn(HEADS, 9).bfloat16()), 4),
    "in float64": lambda place: mods.relative_position(place(torch.randn(HEADS, 9).double()), 4),
    "one for all heads": lambda place: mods.relative_position(place(torch.randn(9)), 4),
    "no distance": lambda place: mods.relative_position(place(torch.randn(HEADS, 1)), 0),
    "alibi": lambda place: mods.alibi(place(torch.rand(HEADS))),
    "alibi of each": lambda place: mods.alibi(place(torch.rand(BATCH, HEADS).double())),
    "cap": lambda place: mods.tanh_softcap(3.7, device=place(torch.empty(1)).device),
    "high cap": lambda place: mods.tanh_softcap(50, device=place(torch.empty(1)).device),
}


@triton.jit
def indices(seqlen_q, seqlen_k, M: tl.constexpr, N: tl.constexpr, TURNED: tl.constexpr):
    """Indices of a tile in either order, held within the lengths, and where they lie within them."""
    i, j = tl.arange(0, M), tl.arange(0, N)
    if TURNED:
        i, j = i[None, :], j[:, None]
    else:
        i, j = i[:, None], j[None, :]
    return tl.minimum(i, seqlen_q - 1), tl.minimum(j, seqlen_k - 1), (i < seqlen_q) & (j < seqlen_k)


@triton.jit
def mask_kernel(
    fn, args, out, heads, seqlen_q, seqlen_k, M: tl.constexpr, N: tl.constexpr, TURNED: tl.constexpr
):  # fmt: skip
    pid = tl.program_id(0)
    i, j, inside = indices(seqlen_q, seqlen_k, M, N, TURNED)
    at = pid * seqlen_q * seqlen_k + i * seqlen_k + j
    tl.store(out + at, fn(pid // heads, pid % heads, i, j, args).to(tl.int8), mask=inside)


@triton.jit
def score_kernel(
    fn, derivative, args, s, out, slope, heads, seqlen_q, seqlen_k,
    M: tl.constexpr, N: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    i, j, inside = indices(seqlen_q, seqlen_k, M, N, TURNED)
    at = pid * seqlen_q * seqlen_k + i * seqlen_k + j
    score = tl.load(s + at, mask=inside, other=0.0)
    tl.store(out + at, fn(score, pid // heads, pid % heads, i, j, args), mask=inside)
    tl.store(slope + at, derivative(score, pid // heads, pid % heads, i, j, args), mask=inside)


def tile(seqlen_q: int, seqlen_k: int, turned: bool) -> dict[str, Any]:
    return {"M": triton.next_power_of_2(seqlen_q), "N": triton.next_power_of_2(seqlen_k), "TURNED": turned}


def grid(seqlen_q: int, seqlen_k: int, device: Any = None) -> tuple[torch.Tensor, ...]:
    """b, h, i, j of a call, as they reach a torch twin."""
    shape = (BATCH, HEADS, seqlen_q, seqlen_k)
    return tuple(
        torch.arange(n, device=device).view([n if at == axis else 1 for at in range(4)]) for axis, n in enumerate(shape)
    )


def seen(mod: MaskMod, seqlen_q: int, seqlen_k: int) -> torch.Tensor:
    """What the torch twin makes visible: bool [batch, heads, seqlen_q, seqlen_k]."""
    found = mod.torch_fn(*grid(seqlen_q, seqlen_k, mod.args[0].device), mod.args)
    return found.cpu().expand(BATCH, HEADS, seqlen_q, seqlen_k)


def lengths_of(mod: MaskMod) -> list[tuple[int, int]]:
    """Lengths that a mask is tried at."""
    if mod.torch_fn is mods._document_torch:
        return [(mod.args[0].shape[1], mod.args[1].shape[1])]
    return [(20, 20), (13, 20), (19, 7), (1, 1)]


@pytest.mark.sampled(3, all=True)
@pytest.mark.interpret
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("turned", [False, True])
def test_masks_are_what_their_torch_twins_are(place: Place, name: str, turned: bool) -> None:
    mod = MASKS[name](place)
    for seqlen_q, seqlen_k in lengths_of(mod):
        out = place(torch.full((BATCH, HEADS, seqlen_q, seqlen_k), 7, dtype=torch.int8))
        mask_kernel[(BATCH * HEADS,)](
            mod.fn, mod.args, out, HEADS, seqlen_q, seqlen_k, **tile(seqlen_q, seqlen_k, turned)
        )
        assert torch.equal(out.cpu(), seen(mod, seqlen_q, seqlen_k).to(torch.int8))


@pytest.mark.interpret
@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("turned", [False, True])
def test_scores_are_what_their_torch_twins_are(place: Place, name: str, dtype: torch.dtype, turned: bool) -> None:
    mod, (seqlen_q, seqlen_k) = SCORES[name](place), (13, 20)
    scale = torch.logspace(-6, 2, 20)  # both branches of tanh, to where it is 1
    s = place((torch.randn(BATCH, HEADS, seqlen_q, seqlen_k) * scale).to(dtype))
    out, slope = place(torch.zeros_like(s)), place(torch.zeros_like(s))
    score_kernel[(BATCH * HEADS,)](
        mod.fn, mod.derivative, mod.args, s, out, slope, HEADS, seqlen_q, seqlen_k, **tile(seqlen_q, seqlen_k, turned)
    )
    x = s.cpu().double().requires_grad_()
    args = tuple(a.cpu() for a in mod.args)
    want = mod.torch_fn(x, *grid(seqlen_q, seqlen_k), args)
    (gradient,) = torch.autograd.grad(want.sum(), x)
    # tanh is good to 3 units in the last place here and in torch; a quotient, a product or a sum adds half a unit each
    # of what enters it: what is added to s, at most |s| + |out|
    unit = torch.finfo(dtype).eps
    added = torch.zeros_like(x) if "cap" in name else x.detach().abs()
    error = (out.cpu().double() - want.detach()).abs()
    assert (error <= 4 * unit * (want.detach().abs() + added)).all()
    assert (slope.cpu().double() - gradient).abs().max() <= 8 * unit


@pytest.mark.interpret
def test_capped_infinities_and_nan_stay_what_they_are(place: Place) -> None:
    mod = mods.tanh_softcap(2.0, device=place(torch.empty(1)).device)
    s = place(torch.tensor([math.inf, -math.inf, math.nan, 0.0]).view(1, 4))
    out, slope = place(torch.zeros_like(s)), place(torch.ones_like(s))
    score_kernel[(1,)](mod.fn, mod.derivative, mod.args, s, out, slope, 1, 1, 4, M=1, N=4, TURNED=False)
    torch.testing.assert_close(out.cpu(), torch.tensor([[2.0, -2.0, math.nan, 0.0]]), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(slope.cpu(), torch.tensor([[0.0, 0.0, math.nan, 1.0]]), rtol=0, atol=0, equal_nan=True)


@pytest.mark.interpret
@pytest.mark.parametrize("name", ["document", "document of all", "prefix", "relative position", "alibi of each"])
def test_no_index_beyond_a_table_is_read(place: Place, name: str) -> None:
    mod, (batch, heads, seqlen_q, seqlen_k) = {**MASKS, **SCORES}[name](place), (4, 5, 30, 31)
    sizes = heads, seqlen_q, seqlen_k
    shape = (batch, *sizes)
    programs = (batch * heads,)
    i, j = (torch.arange(n) for n in (seqlen_q, seqlen_k))
    b, h = torch.arange(batch).view(-1, 1, 1, 1), torch.arange(heads).view(-1, 1, 1)
    args = tuple(a.cpu() for a in mod.args)
    if isinstance(mod, MaskMod):
        out = place(torch.zeros(shape, dtype=torch.int8))
        mask_kernel[programs](mod.fn, mod.args, out, *sizes, **tile(seqlen_q, seqlen_k, False))
        assert torch.equal(out.cpu().bool(), mod.torch_fn(b, h, i[:, None], j, args).expand(shape))
    else:
        s = place(torch.zeros(shape))
        out, slope = place(torch.zeros_like(s)), place(torch.zeros_like(s))
        score_kernel[programs](
            mod.fn, mod.derivative, mod.args, s, out, slope, *sizes, **tile(seqlen_q, seqlen_k, False)
        )
        torch.testing.assert_close(out.cpu(), mod.torch_fn(torch.zeros(shape), b, h, i[:, None], j, args))


def hull(dense: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """First and past the last True of each row of [.., n]; n and 0 where there is none."""
    n = dense.shape[-1]
    at = torch.arange(n)
    return at.where(dense, n).amin(-1), (at + 1).where(dense, 0).amax(-1)


@pytest.mark.parametrize("name", MASKS)
def test_spans_are_the_first_and_last_of_what_is_visible(name: str) -> None:
    mod = MASKS[name](lambda x: x)
    for seqlen_q, seqlen_k in lengths_of(mod):
        if name in ("pixels", "small image", "whole image") and seqlen_q != seqlen_k:
            continue  # an image cut short: the next test
        spans = mod.spans(seqlen_q, seqlen_k, mod.args)
        dense = seen(mod, seqlen_q, seqlen_k).any(1, keepdim=True)
        for found, want in zip(spans, (*hull(dense), *hull(dense.mT)), strict=True):
            assert found.dtype == torch.int32 and found.shape[:2] in ((1, 1), (BATCH, 1))
            assert torch.equal(found.expand(want.shape).long(), want)


@pytest.mark.parametrize("name", ["pixels", "small image", "whole image"])
@pytest.mark.parametrize("lengths", [(13, 20), (20, 13), (7, 9), (33, 21)])
def test_spans_of_an_image_cut_short_miss_nothing(name: str, lengths: tuple[int, int]) -> None:
    mod = MASKS[name](lambda x: x)
    spans = mod.spans(*lengths, mod.args)
    i, j = (torch.arange(n) for n in lengths)
    within_keys = (spans.key_begin.mT <= j) & (j < spans.key_end.mT)
    within_queries = (spans.query_begin.mT <= i) & (i < spans.query_end.mT)
    dense = seen(mod, *lengths)
    assert not (dense & ~within_keys).any() and not (dense.mT & ~within_queries).any()
    assert spans.key_end.max() <= lengths[1] and spans.query_end.max() <= lengths[0]


def test_masks_mean_what_they_say() -> None:
    i, j = torch.arange(20)[:, None], torch.arange(20)
    formulas = {
        "prefix": torch.stack([(j < 5) | (j <= i), j <= i]),
        "dilated": ((i - j).abs() <= 6) & ((i - j) % 3 == 0),
        "pixels": ((i // 5 - j // 5).abs() <= 1) & ((i % 5 - j % 5).abs() <= 1),
        "small image": ((i // 5 - j // 5).abs() <= 1) & ((i % 5 - j % 5).abs() <= 1) & (i < 15) & (j < 15),
    }
    for name, want in formulas.items():
        found = seen(MASKS[name](lambda x: x), 20, 20)[:, 0]
        assert torch.equal(found, want.expand(found.shape)), name
    ids = torch.tensor(IDS)
    assert torch.equal(seen(mods.document(ids), LENGTH, LENGTH)[:, 1], ids[:, :, None] == ids[:, None])


def test_scores_mean_what_they_say() -> None:
    s, (b, h, i, j) = torch.randn(BATCH, HEADS, 9, 11), grid(9, 11)
    table, slopes = torch.randn(HEADS, 7), torch.rand(BATCH, HEADS)
    distance = torch.arange(9)[:, None] - torch.arange(11)
    formulas = [
        (mods.relative_position(table, 3), s + table[:, distance.clamp(-3, 3) + 3]),
        (mods.alibi(slopes), s - slopes[:, :, None, None] * distance.abs()),
        (mods.alibi(slopes[0]), s - slopes[0, :, None, None] * distance.abs()),
        (mods.tanh_softcap(2), 2 * (s / 2).tanh()),
    ]
    for mod, want in formulas:
        torch.testing.assert_close(mod.torch_fn(s, b, h, i, j, mod.args), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: mods.document(torch.rand(3)), "q_ids must be a tensor of ints, got torch.float32"),
        (lambda: mods.document([1, 2]), "q_ids must be a tensor of ints, got list"),
        (lambda: mods.document(torch.zeros(3, dtype=torch.bool)), "q_ids must be a tensor of ints, got torch.bool"),
        (lambda: mods.document(torch.zeros(1, 2, 3, dtype=torch.int)), r"q_ids must have 1 or 2 axes, got"),
        (lambda: mods.document(torch.zeros(2, 3).int(), torch.zeros(3, 3).int()), "k_ids must share .* got 3"),
        (lambda: mods.document(torch.zeros(3).int(), torch.zeros(3).long()), "k_ids must share .* got 1, torch.int64"),
        (lambda: mods.prefix_lm(torch.zeros(2, 2).int()), r"lengths must have 1 axes, got shape \(2, 2\)"),
        (lambda: mods.dilated_window(-1), "width must be an int >= 0, got -1"),
        (lambda: mods.dilated_window(1, 0), "dilation must be an int >= 1, got 0"),
        (lambda: mods.dilated_window(True), "width must be an int >= 0, got True"),
        (lambda: mods.neighborhood_2d(2, 3, 1.5), "radius must be an int >= 0, got 1.5"),
        (lambda: mods.neighborhood_2d(0, 3, 1), "height must be an int >= 1, got 0"),
        (lambda: mods.neighborhood_2d(2**20, 2**20, 1), "height . width must be at most"),
        (lambda: mods.relative_position(torch.zeros(2, 8), 4), "table must hold .* = 9 distances, got 8"),
        (lambda: mods.relative_position(torch.zeros(2, 9).int(), 4), "table must be a tensor of floats, got"),
        (lambda: mods.alibi(torch.rand(1, 2, 3)), "slopes must have 1 or 2 axes"),
        (lambda: mods.tanh_softcap(0), "cap must be a finite number > 0, got 0"),
        (lambda: mods.tanh_softcap(math.inf), "cap must be a finite number > 0, got inf"),
        (lambda: mods.tanh_softcap(math.nan), "cap must be a finite number > 0, got nan"),
    ],
)  # fmt: skip
def test_wrong_numbers_and_tables_are_named(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "make, sizes, message",
    [
        (lambda: mods.document(torch.zeros(3, 9).int()), (2, 1, 9, 9), None),
        (lambda: mods.document(torch.zeros(9).int()), (2, 1, 9, 9), None),
        (lambda: mods.document(torch.zeros(2, 9).int()), (3, 1, 9, 9), "ids must reach all 3 of batch, got 2"),
        (lambda: mods.document(torch.zeros(2, 9).int()), (2, 1, 10, 9), "q_ids must reach all 10 of seqlen_q, got 9"),
        (lambda: mods.document(torch.zeros(2, 9).int()), (2, 1, 9, 10), "k_ids must reach all 10 of seqlen_k, got 9"),
        (lambda: mods.prefix_lm(torch.zeros(2).int()), (3, 1, 9, 9), "lengths must reach all 3 of batch, got 2"),
        (lambda: mods.prefix_lm(torch.zeros(1).int()), (3, 1, 9, 9), None),
        (lambda: mods.dilated_window(3), (3, 1, 9, 9), None),
        (lambda: mods.relative_position(torch.zeros(2, 3), 1), (1, 4, 9, 9), "table must reach all 4 of heads, got 2"),
        (lambda: mods.alibi(torch.zeros(1)), (1, 4, 9, 9), "slopes must reach all 4 of heads, got 1"),
        (lambda: mods.alibi(torch.zeros(2, 4)), (3, 4, 9, 9), "slopes must reach all 3 of batch, got 2"),
    ],
)
def test_tables_too_small_for_a_call_are_named(make: Callable[[], Any], sizes: Any, message: str | None) -> None:
    if message is None:
        make().fit(*sizes)
    else:
        with pytest.raises(ValueError, match=message):
            make().fit(*sizes)


def test_mods_are_made_in_compiled_code() -> None:
    b, _, i, j = grid(LENGTH, LENGTH)

    def visible(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mod = mods.document(ids)
        return mod.torch_fn(b, b, i, j, mod.args), mod.spans(LENGTH, LENGTH, mod.args).key_end

    want = visible(torch.tensor(IDS))
    found = torch.compile(visible, backend="aot_eager", fullgraph=True)(torch.tensor(IDS))
    assert all(map(torch.equal, found, want))


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX paths")
def test_torch_twins_serve_where_triton_cannot_be_imported() -> None:
    code = """
import sys
sys.modules["triton"] = None
import torch
from flash import mods
mod = mods.document(torch.tensor([0, 0, 1]))
assert mod.fn is None and mods.from_handle(mods.handle_of(mod), mod.args).args == mod.args
i = torch.arange(3)
assert mod.torch_fn(i[:1], i[:1], i[:, None], i, mod.args).tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 1]]
mod.require("torch")
for mod in (mod, mods.alibi(torch.rand(2))):
    try:
        mod.require("triton")
    except TypeError as error:
        print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    want = "{}.fn must be a @triton.jit function for the triton backend, got None"
    assert done.stdout.splitlines() == [want.format("MaskMod"), want.format("ScoreMod")]


@pytest.mark.aot
@pytest.mark.slow
@pytest.mark.parametrize("name", [*MASKS, *SCORES])
def test_functions_compile_for_targets_that_need_not_be_present(name: str) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    mod = {**MASKS, **SCORES}[name](lambda x: x)
    names = {torch.int32: "*i32", torch.int64: "*i64", torch.float64: "*fp64", torch.float32: "*fp32"}
    args = tuple(names.get(a.dtype, "*bf16") for a in mod.args)
    sizes = {"heads": "i32", "seqlen_q": "i32", "seqlen_k": "i32"}
    shape = {"M": 16, "N": 32, "TURNED": True}
    fixed = dict.fromkeys(shape, "constexpr")
    for target in (GPUTarget("cuda", 90, 32), GPUTarget("cuda", 80, 32)):
        if isinstance(mod, MaskMod):
            signature = {"fn": "constexpr", "args": args, "out": "*i8", **sizes, **fixed}
            source = ASTSource(
                mask_kernel, signature, {(0,): mod.fn, **{(6 + n,): x for n, x in enumerate(shape.values())}}
            )
        else:
            signature = {"fn": "constexpr", "derivative": "constexpr", "args": args, "s": "*fp32", "out": "*fp32"}
            signature = {**signature, "slope": "*fp32", **sizes, **fixed}
            given = {(0,): mod.fn, (1,): mod.derivative, **{(9 + n,): x for n, x in enumerate(shape.values())}}
            source = ASTSource(score_kernel, signature, given)
        made = triton.compile(source, target=target)
        assert f".target sm_{target.arch}" in made.asm["ptx"]
