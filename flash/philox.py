"""Which attention weights dropout keeps, in torch integers: Philox4x32-10 (Salmon et al. 2011).

The counter of a weight is (key, query, head, batch), all its own, so that any tile finds it without the others. Only
the first of the four output words is used. A round multiplies words 0 and 2 and mixes them into all four:

    word 0 = high(M1 * word 2) ^ word 1 ^ key 0        word 1 = low(M1 * word 2)
    word 2 = high(M0 * word 0) ^ word 3 ^ key 1        word 3 = low(M0 * word 0)

After two rounds only word 2 depends on both the query and the key, so that most of those rounds' work is O(n). Products
of 32-bit words wrap around in int64 without harm: a shift and LOW find the high half, and the low half goes on as the
whole product, as it meets a LOW before it is multiplied again. The rest runs in place, in buffers small enough for a
cache.
"""

from itertools import product

import torch
from torch import Tensor

M0, M1 = 0xD2511F53, 0xCD9E8D57
WEYL0, WEYL1 = 0x9E3779B9, 0xBB67AE85
LOW = 0xFFFFFFFF
ROUNDS = 10
CHUNK = 2**18  # counters at once, 10 MB: with fewer, calls cost more than they do; more leave the cache


def kept(seed: int, dropout_p: float, b: int, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """Whether the weight of a batch, head, query and key stays: bool [heads, rows, cols].

    Args:
        seed: 64 bits, the low half is key 0.
        dropout_p: probability of False.
        b: batch element, or packed sequence.
        h, i, j: int64 [heads, 1, 1], [1, rows, 1] and [1, 1, cols].
    """
    heads, rows, cols = len(h), i.shape[1], j.shape[2]
    keep = torch.empty(heads, rows, cols, dtype=torch.bool, device=j.device)
    step_h = min(heads, max(1, CHUNK // cols))
    step = min(rows, max(1, CHUNK // (step_h * cols)))
    buffers = torch.empty(5, step_h * step * cols, dtype=torch.int64, device=j.device)
    for head, start in product(range(0, heads, step_h), range(0, rows, step)):
        at = slice(head, head + step_h), slice(start, start + step)
        part = keep[at]
        words = [x[: part.numel()].view(part.shape) for x in buffers]
        word = first_word(seed, j, i[:, at[1]], h[at[0]], b, words)
        torch.ge(word, round(dropout_p * 2**32), out=part)
    return keep


def first_word(seed: int, c0: Tensor, c1: Tensor, c2: Tensor, c3: int, buffers: list[Tensor]) -> Tensor:
    """Word 0 of Philox4x32-10 in one of five int64 buffers, whose shape c0 (keys), c1 (queries) and c2 broadcast to."""
    keys = [((seed & LOW) + turn * WEYL0 & LOW, (seed >> 32 & LOW) + turn * WEYL1 & LOW) for turn in range(ROUNDS)]
    word0, word2, old0, old1, shifted = buffers  # old: the products of the round before

    def high(product: Tensor) -> Tensor:  # with copies of its sign above
        return torch.bitwise_right_shift(product, 32, out=shifted)

    # rounds 1 and 2, up to word 2
    k0, k1 = keys[0]
    product0, product1 = c0 * M0, c2 * M1
    by_row = (product1 >> 32 ^ c1 ^ k0) & LOW
    by_col = (product0 >> 32 ^ c3 ^ k1) & LOW
    k0, k1 = keys[1]
    row_product, col_product = by_row * M0, by_col * M1
    by_col = (col_product >> 32 ^ product1 ^ k0) & LOW
    torch.bitwise_xor((row_product >> 32 ^ k1) & LOW, product0 & LOW, out=old1).mul_(M1)
    # round 3
    k0, k1 = keys[2]
    product0 = by_col * M0
    torch.bitwise_xor(high(old1), col_product ^ k0, out=word0).bitwise_and_(LOW)
    torch.bitwise_xor((product0 >> 32 ^ k1) & LOW, row_product & LOW, out=word2)
    old0.copy_(product0.expand_as(old0))
    for k0, k1 in keys[3:-2]:
        word0.mul_(M0)
        word2.mul_(M1)
        old1.bitwise_xor_(high(word2)).bitwise_xor_(k0).bitwise_and_(LOW)
        old0.bitwise_xor_(high(word0)).bitwise_xor_(k1).bitwise_and_(LOW)
        word0, word2, old0, old1 = old1, old0, word0, word2
    # the last round needs words 1 and 2 alone
    word0.mul_(M0)
    word2.mul_(M1)
    old0.bitwise_xor_(high(word0)).bitwise_xor_(keys[-2][1]).bitwise_and_(LOW).mul_(M1)
    return word2.bitwise_xor_(high(old0)).bitwise_xor_(keys[-1][0]).bitwise_and_(LOW)
