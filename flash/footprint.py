"""How many bytes attention needs before it is run: scores in memory as papers write them, or a tile at a time."""

from typing import NamedTuple

import torch

from .checks import check_floats


class MemoryEstimate(NamedTuple):
    """Bytes at the peak of a pass, beyond q, k, v, the output and the gradients.

    Args:
        standard_forward: standard attention without gradients.
        standard_backward: a training step through it, forward and backward.
        flash_forward: flash_attention without gradients.
        flash_backward: a training step through it.
    """

    standard_forward: int
    standard_backward: int
    flash_forward: int
    flash_backward: int


def memory_estimate(
    batch: int,
    seqlen: int,
    heads: int,
    head_dim: int,
    dtype: torch.dtype = torch.float16,
    *,
    seqlen_k: int | None = None,
) -> MemoryEstimate:
    """Bytes that attention needs beyond its inputs, output and gradients: written down in full, and by flash_attention.

        scores = batch * heads * seqlen * seqlen_k * itemsize
        rows   = batch * heads * seqlen * 4                        (8 for float64)

        standard: forward scores + max(scores, q), the scores and their softmax;
                  backward 3 scores, the softmax, its gradient and that of the scores
        flash:    forward rows, which is lse; backward 2 rows, lse and do . o

    Standard attention is softmax(q * scale @ k^T) @ v by torch's autograd; its backward is right to within the size of
    q. A mask made for it, or keys repeated for grouped heads, come on top; for flash_attention neither is made.
    flash_attention is that of the Triton kernels; the Hopper backward sums its gradient of q in float32 besides. The
    torch backend works in float32 and keeps copies, up to 6 times q in float32 forward and 15 times backward, or tiles
    of at most 40 MB where dropout or a user function leaves torch's own kernels no part. Dropout there keeps bits for
    a backward, whether or not one comes, which take no more bytes than q, k, v and the output.

    Args:
        batch: sequences.
        seqlen: queries of a sequence.
        heads: query heads.
        head_dim: width of a head.
        dtype: of q, k and v. Default: float16.
        seqlen_k: keys of a sequence. Default: seqlen.

    Returns:
        A MemoryEstimate.

    Raises:
        ValueError: a size is negative or no int, or dtype no float.
    """
    seqlen_k = seqlen if seqlen_k is None else seqlen_k
    sizes = dict(batch=batch, seqlen=seqlen, heads=heads, head_dim=head_dim, seqlen_k=seqlen_k)
    for name, size in sizes.items():
        if type(size) is not int or size < 0:
            raise ValueError(f"{name} must be a whole number, at least 0, got {size!r}")
    check_floats(dtype)
    q = batch * heads * seqlen * head_dim * dtype.itemsize
    scores = batch * heads * seqlen * seqlen_k * dtype.itemsize
    rows = batch * heads * seqlen * (8 if dtype == torch.float64 else 4)
    return MemoryEstimate(scores + max(scores, q), 3 * scores, rows, 2 * rows)
