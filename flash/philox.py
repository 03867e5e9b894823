"""Which attention weights dropout keeps, in torch integers: Philox4x32-10 (Salmon et al. 2011).

The counter of a weight is (key, query, head, batch), all its own, so that any tile finds it without the others. Only
the first of the four output words is used. A round multiplies words 0 and 2 and mixes them into all four:

    word 0 = high(M1 * word 2) ^ word 1 ^ key 0        word 1 = low(M1 * word 2)
    word 2 = high(M0 * word 0) ^ word 3 ^ key 1        word 3 = low(M0 * word 0)

In the first three rounds most words depend on the query alone or on the key alone, and broadcasting keeps them small.
"""

import torch
from torch import Tensor

M0, M1 = 0xD2511F53, 0xCD9E8D57
WEYL0, WEYL1 = 0x9E3779B9, 0xBB67AE85
LOW = 0xFFFFFFFF
ROUNDS = 10


def kept(seed: int, dropout_p: float, b: int, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """bool, True where the weight of batch b, head h, query i and key j stays; int64 h, i, j broadcast.

    Args:
        seed: 64 bits, the low half is key 0.
        dropout_p: probability of False.
        b, h, i, j: the counter, below 2**32.
    """
    return first_word(seed, j, i, h, b) >= round(dropout_p * 2**32)


def first_word(seed: int, c0: Tensor, c1: Tensor, c2: Tensor, c3: int) -> Tensor:
    """Word 0 of Philox4x32-10, int64 within [0, 2**32).

    Products of 32-bit words wrap around in int64 without harm: a shift and LOW find both halves. The low half needs no
    LOW of its own, as it meets one again before the next product.
    """
    k0, k1 = seed & LOW, seed >> 32 & LOW
    more: Tensor | int = c3
    for turn in range(ROUNDS - 1):
        p0, p1 = c0 * M0, c2 * M1
        c0 = mixed(p1, c1, k0)
        if turn == ROUNDS - 2:  # the last round uses words 1 and 2 alone
            c2 = mixed(p0, more, k1)
            c1 = p1
            break
        c2 = mixed(p0, more, k1)
        c1, more = p1, p0
        k0, k1 = (k0 + WEYL0) & LOW, (k1 + WEYL1) & LOW
    k0 = (k0 + WEYL0) & LOW
    return mixed(c2 * M1, c1, k0)


def mixed(product: Tensor, word: Tensor | int, key: int) -> Tensor:
    """high(product) ^ word ^ key, cut to 32 bits."""
    high = product >> 32
    if isinstance(word, Tensor) and word.dim() and torch.broadcast_shapes(high.shape, word.shape) != high.shape:
        high = high ^ word
    else:
        high ^= word
    high ^= key
    high &= LOW
    return high
