"""Masks as pictures: which keys each query sees, found by calling the library, not by drawing the rules again.

    python -m bench.gallery                      # draws docs/gallery/*.png

A row is a query, a column a key. Values are the identity matrix, so that o_i = sum_j p_ij e_j is the row of weights: a
cell is orange where the weight is above 0, the darker the larger its share of the row's largest. Grey cells are loaded
and hidden: of a tile of TILE queries the torch backend walks over these keys too. White ones are never loaded.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flash import flash_attention, flash_attention_varlen, mods
from flash.problem import Problem
from flash.tiling import Call, keys_of, offsets_of, sequences

SIDE = 32  # queries and keys, where a picture does not say otherwise
TILE = 8  # queries, and the side of a block
CELL, GAP = 8, 1  # pixels
SEEN, PALE, HIDDEN, NOTHING, LINES = ("#D55E00", "#FBE3D3", "#C9CDD2", "#FFFFFF", "#EDEFF1")


class Picture(NamedTuple):
    """A call of attention to look at: keywords of flash_attention, or with cu_seqlens_q those of the varlen one."""

    keywords: dict[str, Any]
    seqlen_q: int = SIDE
    seqlen_k: int = SIDE


def documents() -> Tensor:
    """The document of each position: 5, 11, 3 and 13 positions long."""
    return torch.repeat_interleave(torch.arange(4), torch.tensor([5, 11, 3, 13]))


def block_mask() -> Any:
    """torch's BlockMask of a causal window of 10 keys beside 4 keys that every query sees."""
    from torch.nn.attention.flex_attention import create_block_mask

    def rule(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & ((i - j < 10) | (j < 4))

    side = 2 * SIDE
    return create_block_mask(rule, None, None, side, side, device="cpu", BLOCK_SIZE=16)


def sequences_in_a_row() -> dict[str, Any]:
    """Three sequences one after the other, one of them without keys of its own, and rows that nobody owns."""
    starts_q, starts_k = torch.tensor([[0, 9, 13, 29], [0, 12, 12, 30]], dtype=torch.int32)
    return dict(cu_seqlens_q=starts_q, cu_seqlens_k=starts_k, max_seqlen_q=16, max_seqlen_k=18, causal=True)


def steps() -> Tensor:
    """A bias [seqlen_q, seqlen_k] that hides one corner by -inf and favours the keys of every fourth column."""
    bias = torch.zeros(SIDE, SIDE)
    bias[:, ::4] = 2.0
    bias[: SIDE // 2, SIDE // 2 :] = float("-inf")
    return bias


def pictures() -> dict[str, Picture]:
    """Every picture by its name."""
    keys = torch.arange(SIDE)
    distances = torch.linspace(-1.0, 1.0, 25).square().neg().mul(4.0)
    return {
        "full": Picture({}),
        "causal": Picture(dict(causal=True)),
        "causal-last-queries": Picture(dict(causal=True), seqlen_q=12),
        "causal-q-offset": Picture(dict(causal=True, q_offset=6), seqlen_q=12),
        "window": Picture(dict(causal=True, window=(6, 0))),
        "window-two-sided": Picture(dict(window=(3, 5))),
        "padding": Picture(dict(mask=(keys < 21)[None, None, None])),
        "padding-left": Picture(dict(mask=(keys >= 9)[None, None, None], causal=True)),
        "mask": Picture(dict(mask=(keys[:, None] * keys) % 5 < 3)),
        "bias": Picture(dict(bias=steps())),
        "alibi-slopes": Picture(dict(alibi_slopes=torch.tensor([0.2]), causal=True)),
        "varlen": Picture(sequences_in_a_row()),
        "block-mask": Picture(dict(block_mask=block_mask()), 2 * SIDE, 2 * SIDE),
        "document": Picture(dict(mask_mod=mods.document(documents()))),
        "document-causal": Picture(dict(mask_mod=mods.document(documents()), causal=True)),
        "prefix-lm": Picture(dict(mask_mod=mods.prefix_lm(torch.tensor([11])))),
        "dilated-window": Picture(dict(mask_mod=mods.dilated_window(3, dilation=3))),
        "neighborhood-2d": Picture(dict(mask_mod=mods.neighborhood_2d(4, 8, radius=1))),
        "alibi": Picture(dict(score_mod=mods.alibi(torch.tensor([0.2])))),
        "relative-position": Picture(dict(score_mod=mods.relative_position(distances, 12))),
        "tanh-softcap": Picture(dict(alibi_slopes=torch.tensor([0.2]), score_mod=mods.tanh_softcap(1.5))),
    }


def weights(picture: Picture, attend: Callable[..., Any] = flash_attention, varlen: Any = None) -> Tensor:
    """p [seqlen_q, seqlen_k] of a picture: q is 0, so that only what the keywords say makes a difference."""
    q, k = torch.zeros(picture.seqlen_q, 1), torch.zeros(picture.seqlen_k, 1)
    v = torch.eye(picture.seqlen_k)
    if "cu_seqlens_q" in picture.keywords:
        return (varlen or flash_attention_varlen)(q[:, None], k[:, None], v[:, None], **picture.keywords)[:, 0]
    return attend(q[None, None], k[None, None], v[None, None], **picture.keywords)[0, 0]


def visited(picture: Picture) -> Tensor:
    """bool [seqlen_q, seqlen_k]: the keys that the torch backend loads for each tile of TILE queries."""
    q, k = torch.zeros(1, 1, picture.seqlen_q, 1), torch.zeros(1, 1, picture.seqlen_k, 1)
    packed = "cu_seqlens_q" in picture.keywords
    given = [x[0, 0, :, None] for x in (q, k, k)] if packed else [q, k, k]
    problem = Problem.of(*given, **picture.keywords)
    whole = Call(problem.q, problem.k, problem.v, problem.mods, problem.spec, problem.scale, problem.positions)
    everything = slice(0, picture.seqlen_q), slice(0, picture.seqlen_k)
    parts = [part[:3] for part in sequences(whole)] if packed else [(whole, *everything)]
    found = torch.zeros(picture.seqlen_q, picture.seqlen_k, dtype=torch.bool)
    for call, rows, keys in parts:
        (offset,) = offsets_of(call)
        own = found[rows, keys]
        for start in range(0, len(own), TILE):
            tile = slice(start, min(start + TILE, len(own)))
            own[tile, keys_of(call, 0, tile, offset)[0]] = True
    return found


def rgb(colour: str) -> Tensor:
    """ "#D55E00" as float [3]."""
    return torch.tensor([int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)])


def pixels(picture: Picture) -> Tensor:
    """The picture, float [height, width, 3]; cells of long sequences are half as wide."""
    p, loaded = weights(picture), visited(picture)
    share = (p / p.amax(-1, keepdim=True).clamp(min=1e-9))[..., None]
    cells = torch.where(loaded[..., None], rgb(HIDDEN), rgb(NOTHING))
    cells = torch.where(p[..., None] > 0, rgb(PALE) + share * (rgb(SEEN) - rgb(PALE)), cells)
    cell = CELL * SIDE // max(SIDE, picture.seqlen_k)
    step = cell + GAP
    drawn = rgb(LINES).expand(step * picture.seqlen_q + GAP, step * picture.seqlen_k + GAP, 3).clone()
    for y in range(cell):
        for x in range(cell):
            drawn[GAP + y :: step, GAP + x :: step][: picture.seqlen_q, : picture.seqlen_k] = cells
    return drawn


def main(argv: Sequence[str] | None = None) -> int:
    """Draws them all."""
    parser = argparse.ArgumentParser(prog="python -m bench.gallery", description=(__doc__ or "").splitlines()[0])
    folder = Path(__file__).parents[1] / "docs" / "gallery"
    parser.add_argument("--output", type=Path, default=folder, help="a folder; default: docs/gallery")
    options = parser.parse_args(argv)
    from matplotlib.image import imsave

    options.output.mkdir(parents=True, exist_ok=True)
    for name, picture in pictures().items():
        imsave(options.output / f"{name}.png", pixels(picture).clamp(0, 1).numpy(), metadata={"Software": None})
        print(options.output / f"{name}.png")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
