"""Masks by block, and every rule that leaves whole tiles out: what is visited, counted against what is visible."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from flash.kernels.spec import Config, Configs
from flash.mods import dilated_window, document, prefix_lm
from tests import calls, features
from tests.bounds import check
from tests.calls import Place, random_inputs
from tests.features import Sizes

BOTH = pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.interpret)])
COUNTED = pytest.mark.interpret(gpu=False)  # the interpreter counts the work
Rule = Callable[[Any, Any, Any, Any], Any]

RULES: dict[str, Rule] = {
    "causal": lambda b, h, i, j: i >= j,
    "document": lambda b, h, i, j: i // 37 == j // 37,
    "stairs": features.staircase,
    "nothing": lambda b, h, i, j: i < 0,
    "all": lambda b, h, i, j: i >= 0,
    "by head": lambda b, h, i, j: (i + 20 * h >= j) & (j >= 10 * b),
    "checkers": lambda b, h, i, j: (i // 16 + j // 16) % 2 == 0,
}


def blocks_of(
    place: Place,
    rule: Rule,
    seqlen_q: int,
    seqlen_k: int,
    size: Any = 16,
    batch: int | None = None,
    heads: int | None = None,
) -> BlockMask:
    device = str(place(torch.zeros(1)).device)
    return create_block_mask(rule, batch, heads, seqlen_q, seqlen_k, device=device, BLOCK_SIZE=size)


SLOWLY = pytest.mark.slow  # beside the ragged one, every rule takes minutes where it is interpreted


@pytest.mark.sampled(6)
@BOTH
@pytest.mark.parametrize("size", [32, *(pytest.param(size, marks=SLOWLY) for size in (16, 128, (32, 64)))], ids=str)
@pytest.mark.parametrize(
    "lengths", [(63, 90), *(pytest.param(lengths, marks=SLOWLY) for lengths in ((64, 64), (90, 50)))], ids=str
)
@pytest.mark.parametrize("rule", RULES)
def test_a_block_mask_equals_its_rule(
    place: Place, backend: str, rule: str, lengths: tuple[int, int], size: Any
) -> None:
    axes = (2, 4) if rule == "by head" else (None, None)
    x = features.call_of(place, ["groups"], Sizes(seqlen_q=lengths[0], seqlen_k=lengths[1]))
    b, h = torch.arange(2)[:, None, None, None], torch.arange(4)[:, None, None]
    i, j = torch.arange(lengths[0])[:, None], torch.arange(lengths[1])
    x.options["block_mask"] = blocks_of(place, RULES[rule], *lengths, size, *axes)
    got = features.run(x, backend, {name: Config(16, 16, 4, 1) for name in features.TILES})
    visible = RULES[rule](b, h, i, j) & (i >= 0) & (j >= 0)
    check(got, x._replace(options={"mask": visible.to(x.q.device)}))


@pytest.mark.sampled(12)
@BOTH
@pytest.mark.parametrize(
    "more", [["causal"], ["window"], ["bias", "alibi_slopes"], ["mask_mod"], ["padding", "sinks"]], ids=str
)
def test_a_block_mask_beside_other_rules(place: Place, backend: str, more: list[str]) -> None:
    x = features.call_of(place, ["block_mask", *more], Sizes(seqlen_q=63, seqlen_k=90))
    check(features.run(x, backend), features.known(x))


@BOTH
def test_a_block_mask_made_by_hand_is_seen_whole(place: Place, backend: str) -> None:
    count, index = torch.tensor([[[1, 2]]]), torch.tensor([[[[1, 0], [1, 0]]]])
    mask = BlockMask.from_kv_blocks(torch.zeros_like(count), torch.zeros_like(index), count, index, BLOCK_SIZE=32)
    x = features.call_of(place, [], Sizes(seqlen_q=64, seqlen_k=64))
    visible = (torch.arange(64) >= 32) | (torch.arange(64) >= 32)[:, None]
    x.options["block_mask"] = mask.to(x.q.device)
    check(features.run(x, backend), x._replace(options={"mask": visible.to(x.q.device)}))


@pytest.mark.sampled(5)
@BOTH
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_keys_of_blocks_left_out_never_show(place: Place, backend: str, poison: float) -> None:
    x = features.call_of(place, [], Sizes(seqlen_q=50, seqlen_k=90))
    x.options["block_mask"] = blocks_of(place, lambda b, h, i, j: (j < 40) | (j >= 72), 50, 90)
    want = features.run(x, backend)
    for t in (x.k, x.v):
        t[:, :, 40:72] = poison
    got = features.run(x, backend)
    for name, a, b in zip(got._fields, got, want, strict=True):
        assert a is None or torch.allclose(a, b, rtol=1e-12, atol=1e-12), name


TILES = Configs(forward=Config(32, 16, 4, 1), dkdv=Config(16, 32, 4, 1), dq=Config(16, 16, 4, 1))
DOTS = {"forward": 2, "dkdv": 4, "dq": 3}


def hold(launches: list[Any], visible: torch.Tensor, sizes: tuple[int, int] | None = None) -> None:
    """Hold the work of the launches to the tiles, or blocks cut into tiles, in which somebody sees something."""
    for name, dots in DOTS.items():
        config = getattr(TILES, name)
        (launch,) = (launch for launch in launches if launch.kernel.startswith(name))
        found = 0
        for b in range(visible.shape[0]):
            for h in range(visible.shape[1]):
                if sizes is None:
                    found += calls.visible_tiles(visible[b, h], config.block_m, config.block_n)
                else:  # a block is visited whole, as far as the lengths go
                    found += calls.visible_tiles(whole_blocks(visible[b, h], sizes), config.block_m, config.block_n)
        assert launch.dots == dots * found, name


def whole_blocks(visible: torch.Tensor, sizes: tuple[int, int]) -> torch.Tensor:
    """Every pair of a block in which some pair is visible."""
    seen = torch.zeros_like(visible)
    for row in range(0, visible.shape[0], sizes[0]):
        for col in range(0, visible.shape[1], sizes[1]):
            cut = slice(row, row + sizes[0]), slice(col, col + sizes[1])
            seen[cut] = visible[cut].any()
    return seen


@pytest.mark.sampled(3, all=True)
@COUNTED
@pytest.mark.parametrize("rule", RULES)
def test_blocks_left_out_are_never_loaded(place: Place, launches: list[Any], rule: str) -> None:
    x = random_inputs(place, heads=1, heads_k=1, seqlen_q=96, seqlen_k=128, head_dim=16)
    x.options["block_mask"] = blocks_of(place, RULES[rule], 96, 128, 32)
    calls.backward(x, TILES)
    i, j = torch.arange(96)[:, None], torch.arange(128)
    visible = RULES[rule](torch.tensor(0), torch.tensor(0), i, j) & (i >= 0) & (j >= 0)
    hold(launches, visible[None, None], (32, 32))
    (forward,) = (launch for launch in launches if launch.kernel.startswith("forward"))
    rows = whole_blocks(visible, (32, 32)).unflatten(0, (3, 32)).any(1).sum()
    assert forward.loads["k"] == forward.loads["v"] == int(rows) * 16


@pytest.mark.sampled(6)
@COUNTED
@pytest.mark.parametrize("kept", [0, 1, 16, 40, 63, 64])
@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_is_never_loaded(place: Place, launches: list[Any], kept: int, side: str) -> None:
    x = random_inputs(place, batch=2, heads=1, heads_k=1, seqlen_q=50, seqlen_k=64, head_dim=16)
    j = torch.arange(64)
    keep = torch.stack([j < kept if side == "right" else j >= 64 - kept, j < 64])
    x.options["mask"] = place(keep[:, None, None])
    calls.backward(x, TILES)
    hold(launches, keep[:, None, None].expand(2, 1, 50, 64))


@pytest.mark.sampled(3, all=True)
@COUNTED
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("ends", [[20, 50, 90], [16, 32, 96], [1, 2, 90], [90]], ids=str)
def test_other_documents_are_never_loaded(place: Place, launches: list[Any], ends: list[int], causal: bool) -> None:
    ids = torch.bucketize(torch.arange(ends[-1]), torch.tensor(ends), right=True)
    x = random_inputs(place, heads=1, heads_k=1, seqlen_q=ends[-1], head_dim=16, causal=causal)
    x.options["mask_mod"] = document(place(ids))
    calls.backward(x, TILES)
    visible = ids[:, None] == ids
    hold(launches, (visible & torch.ones_like(visible).tril() if causal else visible)[None, None])


@COUNTED
def test_what_the_shipped_rules_leave_out_is_never_loaded(place: Place, launches: list[Any]) -> None:
    i, j = torch.arange(90)[:, None], torch.arange(90)
    for mod, visible in (
        (prefix_lm(place(torch.tensor([30]))), (j < 30) | (j <= i)),
        (dilated_window(7, 2), ((i - j).abs() <= 14) & ((i - j) % 2 == 0)),
    ):
        x = random_inputs(place, heads=1, heads_k=1, seqlen_q=90, head_dim=16)
        x.options["mask_mod"] = mod
        launches.clear()
        calls.backward(x, TILES)
        hold(launches, visible[None, None])
