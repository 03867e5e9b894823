"""Which attention weights dropout keeps, once more and independently: Philox4x32-10 in numpy, from its paper.

    counter (c0, c1, c2, c3) = (key, query, head, batch)      key (k0, k1) = the seed's low and high half

A weight is kept where the first output word is at least dropout_p * 2**32; kept weights are multiplied by
1 / (1 - dropout_p). In packed calls the batch is the sequence, and query and key are counted from its start.

Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", https://doi.org/10.1145/2063384.2063405.
"""

import numpy as np
import torch

MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
WEYL = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)  # the golden ratio, and sqrt(3) - 1
LOW, BITS = np.uint64(0xFFFFFFFF), np.uint64(32)

Words = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def philox(counter: Words, key: tuple[np.ndarray, np.ndarray]) -> Words:
    """The four words of Philox4x32-10, as uint64 below 2**32; counter and key words broadcast."""
    c0, c1, c2, c3 = (np.asarray(word, dtype=np.uint64) for word in counter)
    k0, k1 = (np.asarray(word, dtype=np.uint64) for word in key)
    for _ in range(10):
        product0, product1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = (product1 >> BITS) ^ c1 ^ k0, product1 & LOW, (product0 >> BITS) ^ c3 ^ k1, product0 & LOW
        k0, k1 = (k0 + WEYL[0]) & LOW, (k1 + WEYL[1]) & LOW
    return c0, c1, c2, c3


def keep_mask(
    seed: int | torch.Tensor, dropout_p: float, batch: int, heads: int, seqlen_q: int, seqlen_k: int
) -> torch.Tensor:
    """bool [batch, heads, seqlen_q, seqlen_k], True where dropout keeps the weight."""
    seed = int(seed) % 2**64
    b, h, i, j = np.ogrid[:batch, :heads, :seqlen_q, :seqlen_k]
    first = philox((j, i, h, b), (np.uint64(seed % 2**32), np.uint64(seed // 2**32)))[0]
    return torch.from_numpy(first >= np.uint64(round(dropout_p * 2**32)))


def dropout_mask(
    seed: int | torch.Tensor, dropout_p: float, batch: int, heads: int, seqlen_q: int, seqlen_k: int
) -> torch.Tensor:
    """What dropout multiplies each weight by, 0 or 1 / (1 - dropout_p): float64, the `dropout_mask` of the oracle."""
    return keep_mask(seed, dropout_p, batch, heads, seqlen_q, seqlen_k).double() / (1 - dropout_p)
