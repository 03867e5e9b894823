"""Attention to some keys and attention to others, put together: what attention to all of them would have been.

Where keys lie apart (a shared prefix and the rest, several devices, parts of a long cache) each part is attended to by
itself, and (o, lse) of the parts is all that it takes.
"""

import torch


def merge(
    o1: torch.Tensor, lse1: torch.Tensor, o2: torch.Tensor, lse2: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention to two sets of keys at once, from attention of the same queries to each.

        lse = log(exp(lse1) + exp(lse2))
        o   = exp(lse1 - lse) o1 + exp(lse2 - lse) o2

    A part without keys (lse = -inf, where flash-attn's functions say +inf) counts for nothing, whatever its o; where
    both have none, o = 0 and lse = -inf. A sink must be in one of the parts only. Merging more than two is merging
    again; the order changes the rounding alone.

    Args:
        o1: [..., head_dim_v], any float dtype, as flash_attention returns it.
        lse1: [...], natural logarithm, as flash_attention returns it: the shape of o1 less its last axis.
        o2: like o1.
        lse2: like lse1.

    Returns:
        o, of o1's shape and dtype, and lse, of lse1's shape and dtype; differentiable with respect to all four.

    Raises:
        ValueError: shapes, dtypes or devices do not go together.

    Source: Dao 2023, "Flash-Decoding", https://pytorch.org/blog/flash-decoding/.
    """
    check_parts(o1, lse1, o2, lse2)
    none1, none2 = lse1 == float("-inf"), lse2 == float("-inf")
    # a constant factor of both weights, which drops out; -inf - -inf would be NaN
    top = torch.maximum(lse1, lse2).detach().masked_fill(none1 & none2, 0.0)
    w1, w2 = (lse1 - top).exp(), (lse2 - top).exp()
    total = (w1 + w2).masked_fill(none1 & none2, 1.0)
    parts = [
        o.to(w.dtype).masked_fill(none.unsqueeze(-1), 0.0) * (w / total).unsqueeze(-1)
        for o, w, none in ((o1, w1, none1), (o2, w2, none2))
    ]
    lse = (total.log() + top).masked_fill(none1 & none2, float("-inf"))
    return (parts[0] + parts[1]).to(o1.dtype), lse


def check_parts(o1: torch.Tensor, lse1: torch.Tensor, o2: torch.Tensor, lse2: torch.Tensor) -> None:
    """Check that two parts are attention of the same queries."""
    for name, x in (("o1", o1), ("lse1", lse1), ("o2", o2), ("lse2", lse2)):
        if not isinstance(x, torch.Tensor):
            raise ValueError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
        if not x.is_floating_point():
            raise ValueError(f"{name} must be of a float dtype, got {x.dtype}")
        if x.device != o1.device:
            raise ValueError(f"{name} must be on device {o1.device} like o1, got {x.device}")
    if o2.shape != o1.shape or o2.dtype != o1.dtype:
        raise ValueError(f"o2 must be {o1.dtype} {list(o1.shape)} like o1, got {o2.dtype} {list(o2.shape)}")
    if lse1.shape != o1.shape[:-1]:
        raise ValueError(f"lse1 must have shape {list(o1.shape[:-1])}, o1's less head_dim, got {list(lse1.shape)}")
    if lse2.shape != lse1.shape or lse2.dtype != lse1.dtype:
        raise ValueError(f"lse2 must be {lse1.dtype} {list(lse1.shape)} like lse1, got {lse2.dtype} {list(lse2.shape)}")


def join(o: torch.Tensor, lse: torch.Tensor, o_more: torch.Tensor, lse_more: torch.Tensor) -> None:
    """`merge` in place, without gradients: o and lse take in attention to other keys, of their dtypes."""
    # exp(lse_more) / (exp(lse) + exp(lse_more)); where there are no other keys -inf - -inf would be NaN
    weight = torch.sigmoid(lse_more - lse).masked_fill_(lse_more == float("-inf"), 0.0)
    o.lerp_(o_more, weight.unsqueeze(-1))
    torch.logaddexp(lse, lse_more, out=lse)
