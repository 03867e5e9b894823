"""Which weights dropout keeps, once more and by itself: Philox4x32-10 (Salmon et al. 2011) in torch's int64.

The library is not asked, so that its own timing is held to what it promises: word 0 of the counter (key, query, head,
batch) under the seed, kept where it is not below dropout_p 2^32.
"""

from torch import Tensor

MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
WEYL = 0x9E3779B9, 0xBB67AE85
LOW = 0xFFFFFFFF
ROUNDS = 10


def product(x: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of x * multiplier; int64 wraps around, and keeps all 64."""
    whole = x * multiplier
    return (whole >> 32) & LOW, whole & LOW


def first_word(seed: int, words: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
    """Word 0 of the output, int64 within [0, 2^32); the words broadcast."""
    k0, k1 = seed & LOW, seed >> 32 & LOW
    c0, c1, c2, c3 = words
    for _ in range(ROUNDS):
        high0, low0 = product(c0, MULTIPLIERS[0])
        high1, low1 = product(c2, MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + WEYL[0]) & LOW, (k1 + WEYL[1]) & LOW
    return c0


def keep(seed: int, dropout_p: float, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """bool, True where the weight of batch b, head h, query i and key j stays; int64 indices that broadcast."""
    return first_word(seed, (j, i, h, b)) >= round(dropout_p * 2**32)
