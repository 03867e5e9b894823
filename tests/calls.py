"""Calls of the kernels' launchers on random inputs: small tiles, so that short sequences have many; strides to try."""

from collections.abc import Callable
from typing import Any

import torch

from flash.kernels import backward as backward_module
from flash.kernels import forward as forward_module
from flash.kernels.spec import Config, Configs, Gradients
from flash.problem import Problem
from tests.bounds import Inputs, Outputs

Place = Callable[[torch.Tensor], torch.Tensor]

SMALL = Config(block_m=32, block_n=16, num_warps=4, num_stages=1)
CONFIGS = Configs(forward=SMALL, dkdv=Config(16, 32, 4, 1), dq=SMALL)


def random_inputs(
    place: Place,
    *,
    batch: int = 1,
    heads: int = 2,
    heads_k: int = 2,
    seqlen_q: int = 63,
    seqlen_k: int | None = None,
    head_dim: int = 32,
    head_dim_v: int | None = None,
    dtype: torch.dtype = torch.float32,
    sigma: float = 1.0,
    **options: Any,
) -> Inputs:
    """Normal inputs with standard deviation sigma, gradients of o and of lse with 1; options as in flash_attention."""
    seqlen_k = seqlen_q if seqlen_k is None else seqlen_k
    head_dim_v = head_dim if head_dim_v is None else head_dim_v
    q = sigma * torch.randn(batch, heads, seqlen_q, head_dim)
    k = sigma * torch.randn(batch, heads_k, seqlen_k, head_dim)
    v = sigma * torch.randn(batch, heads_k, seqlen_k, head_dim_v)
    do = torch.randn(batch, heads, seqlen_q, head_dim_v)
    dlse = torch.randn(batch, heads, seqlen_q, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    return Inputs(*(place(t.to(dtype)) for t in (q, k, v, do)), place(dlse), options)


def forward(x: Inputs, config: Config = SMALL) -> Outputs:
    """Run the forward kernel."""
    p = Problem.of(x.q, x.k, x.v, **x.options)
    return Outputs(*forward_module.forward(p.q, p.k, p.v, p.mods, p.spec, p.scale, p.positions, config))


def backward(
    x: Inputs,
    configs: Configs = CONFIGS,
    needs: tuple[bool, ...] = (True, True, True),
    found: Outputs | None = None,
) -> Outputs:
    """Run the forward kernel, unless its outputs are given, and the backward kernels; `needs` as in Gradients."""
    p = Problem.of(x.q, x.k, x.v, **x.options)
    found = forward(x, configs.forward) if found is None else found
    wanted = Gradients(*needs, *[False] * (len(Gradients._fields) - len(needs)))
    gradients = backward_module.backward(
        x.do, x.dlse, p.q, p.k, p.v, found.o, found.lse, p.mods, p.spec, p.scale, p.positions, configs, wanted
    )
    return Outputs(found.o, found.lse, *gradients)


def strided(place: Place, shape: tuple[int, int, int, int], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Empty [batch, heads, seqlen, head_dim] tensors with strides of every kind."""
    b, h, s, d = shape

    def base(*sizes: int) -> torch.Tensor:
        return place(torch.zeros(sizes, dtype=dtype))

    return {
        "batch, seqlen, heads, head_dim": base(b, s, h, d).transpose(1, 2),
        "a slice of packed q, k and v": base(b, s, 3, h, d)[:, :, 1].transpose(1, 2),
        "head_dim outermost": base(d, s, h, b).permute(3, 2, 1, 0),
        "seqlen innermost": base(b, h, d, s).transpose(2, 3),
        "padded rows": base(b, h, s, d + 1)[..., :d],
        "every other element": base(b, h, s, 2 * d)[..., ::2],
        "one element into the allocation": base(b * h * s * d + 1)[1:].view(shape),
    }


def far_apart(x: torch.Tensor, axis: str, device: torch.device) -> torch.Tensor:
    """x with elements of one axis so far apart that the last lie past 2^31; memory nobody touches is never real.

    For "row" the lanes of one tile are far apart, for "tile" only its start is far from the beginning.
    """
    far, near = 2**30 + 2**9, 2**26 + 2**9
    strides = {"batch": (far, 1024, 16, 1), "head": (1024, far, 16, 1), "row": (0, 0, far, 1), "tile": (0, 0, near, 1)}
    span = sum((n - 1) * s for n, s in zip(x.shape, strides[axis], strict=True))
    virtual = torch.empty(span + 1, dtype=x.dtype, device=device)
    return virtual.as_strided(x.shape, strides[axis]).copy_(x)


def far_inputs(place: Place, axis: str) -> Inputs:
    """Inputs whose tensors `far_apart` can spread along an axis."""
    sizes = {"batch": (3, 3, 7), "head": (3, 3, 7), "row": (1, 1, 3), "tile": (1, 1, 36)}
    batch, heads, seqlen = sizes[axis]
    return random_inputs(
        place,
        batch=batch,
        heads=heads,
        heads_k=heads,
        seqlen_q=seqlen,
        head_dim=16,
        dtype=torch.bfloat16,
        causal=True,
    )


def tiles_seen(seqlen_q: int, seqlen_k: int, offset: int, block_m: int, block_n: int) -> int:
    """Tiles that at least one query sees under the causal rule, counted one by one."""
    visible = torch.arange(seqlen_k) <= torch.arange(seqlen_q)[:, None] + offset
    return visible_tiles(visible, block_m, block_n)


def visible_tiles(visible: torch.Tensor, block_m: int, block_n: int) -> int:
    """Tiles of a bool [seqlen_q, seqlen_k] in which some query sees some key, counted one by one."""
    rows, cols = (range(0, n, step) for n, step in zip(visible.shape, (block_m, block_n), strict=True))
    return sum(bool(visible[i : i + block_m, j : j + block_n].any()) for i in rows for j in cols)
