"""The mark of memory nobody has written: a NaN whose bits no arithmetic makes, told by value and not by bookkeeping."""

import torch

POISON = {  # dtype: (integer dtype of its size, bits); an integer gets a value that no length or index takes
    torch.float16: (torch.int16, 0x7E5B),
    torch.bfloat16: (torch.int16, 0x7FDB),
    torch.float32: (torch.int32, 0x7FDEAD5B),
    torch.float64: (torch.int64, 0x7FFDEAD5BDEAD5B1),
    torch.int32: (torch.int32, 0x7B5DEAD5),
    torch.int64: (torch.int64, 0x7B5DEAD57B5DEAD5),
}


def poison(x: torch.Tensor) -> torch.Tensor:
    """Fill x with the mark; dtypes that have none are left alone."""
    if x.numel() and x.dtype in POISON:
        dtype, bits = POISON[x.dtype]
        x.view(dtype).fill_(bits)
    return x


def is_poisoned(x: torch.Tensor) -> torch.Tensor:
    """Which elements of x still carry the mark: bool, x's shape."""
    if x.dtype not in POISON:
        return torch.zeros(x.shape, dtype=torch.bool, device=x.device)
    dtype, bits = POISON[x.dtype]
    return x.view(dtype) == bits
