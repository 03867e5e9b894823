"""Which attention weights dropout keeps, in torch integers: Philox4x32-10 (Salmon et al. 2011).

The counter of a weight is (key, query, head, batch), all its own, so that any tile finds it without the others. Only
the first of the four output words is used. A round multiplies words 0 and 2 and mixes them into all four:

    word 0 = high(M1 * word 2) ^ word 1 ^ key 0        word 1 = low(M1 * word 2)
    word 2 = high(M0 * word 0) ^ word 3 ^ key 1        word 3 = low(M0 * word 0)

After two rounds only word 2 depends on both the query and the key, so that most of those rounds' work is O(n). Products
of 32-bit words wrap around in int64 without harm: a shift and LOW find the high half, and the low half goes on as the
whole product, as it meets a LOW before it is multiplied again. The rest runs in buffers small enough for a cache.
"""

import torch
from torch import Tensor

M0, M1 = 0xD2511F53, 0xCD9E8D57
WEYL0, WEYL1 = 0x9E3779B9, 0xBB67AE85
LOW = 0xFFFFFFFF
ROUNDS = 10
CHUNK = 2**16  # counters at once on each thread: fewer, and calls cost more than they do; more leave the cache


def kept(seed: int, dropout_p: float, b: int, h: Tensor, i: Tensor, j: Tensor, dtype: torch.dtype) -> Tensor:
    """1 where the weight of a batch, head, query and key stays, else 0: dtype [heads, rows, cols].

    Args:
        seed: 64 bits, the low half is key 0.
        dropout_p: probability of 0.
        b: batch element, or packed sequence.
        h, i, j: int64 [heads, 1, 1], [1, rows, 1] and [1, 1, cols].
        dtype: of the answer.
    """
    heads, rows, cols = len(h), i.shape[1], j.shape[2]
    keep = torch.empty(heads, rows, cols, dtype=dtype, device=j.device)
    step = min(rows, max(1, CHUNK * torch.get_num_threads() // (heads * cols)))
    buffers = torch.empty(6, heads * step * cols, dtype=torch.int64, device=j.device)
    for start in range(0, rows, step):
        at = i[:, start : start + step]
        shape = heads, at.shape[1], cols
        words = [x[: heads * at.shape[1] * cols].view(shape) for x in buffers]
        word = first_word(seed, j, at, h, b, words)
        word -= round(dropout_p * 2**32)
        word >>= 63  # -1 where dropped
        keep[:, start : start + step] = word
    return keep.add_(1)


def first_word(seed: int, c0: Tensor, c1: Tensor, c2: Tensor, c3: int, buffers: list[Tensor]) -> Tensor:
    """Word 0 of Philox4x32-10 in one of six int64 buffers, whose shape c0 (keys), c1 (queries) and c2 broadcast to."""
    keys = [((seed & LOW) + turn * WEYL0 & LOW, (seed >> 32 & LOW) + turn * WEYL1 & LOW) for turn in range(ROUNDS)]
    word0, word2, p0, p1, old0, old1 = buffers
    # rounds 1 and 2, up to word 2
    k0, k1 = keys[0]
    product0, product1 = c0 * M0, c2 * M1
    by_row = (product1 >> 32 ^ c1 ^ k0) & LOW
    by_col = (product0 >> 32 ^ c3 ^ k1) & LOW
    k0, k1 = keys[1]
    row_product, col_product = by_row * M0, by_col * M1
    by_col = (col_product >> 32 ^ product1 ^ k0) & LOW
    torch.bitwise_xor((row_product >> 32 ^ k1) & LOW, product0 & LOW, out=word2)
    # round 3
    k0, k1 = keys[2]
    product0 = by_col * M0
    torch.mul(word2, M1, out=old1)
    high(old1, word0).bitwise_xor_(col_product).bitwise_xor_(k0).bitwise_and_(LOW)
    torch.bitwise_xor((product0 >> 32 ^ k1) & LOW, row_product & LOW, out=word2)
    older: Tensor = product0
    for k0, k1 in keys[3:-2]:
        torch.mul(word0, M0, out=p0)
        torch.mul(word2, M1, out=p1)
        high(p1, word0).bitwise_xor_(old1).bitwise_xor_(k0).bitwise_and_(LOW)
        high(p0, word2).bitwise_xor_(older).bitwise_xor_(k1).bitwise_and_(LOW)
        p0, p1, old0, old1 = old0, old1, p0, p1
        older = old0
    # the last round needs words 1 and 2 alone
    torch.mul(word0, M0, out=p0)
    torch.mul(word2, M1, out=p1)
    high(p0, word2).bitwise_xor_(older).bitwise_xor_(keys[-2][1]).bitwise_and_(LOW)
    torch.mul(word2, M1, out=p0)
    return high(p0, word0).bitwise_xor_(p1).bitwise_xor_(keys[-1][0]).bitwise_and_(LOW)


def high(product: Tensor, out: Tensor) -> Tensor:
    """The high half of a product, its sign's copies above, in out."""
    return torch.bitwise_right_shift(product, 32, out=out)
