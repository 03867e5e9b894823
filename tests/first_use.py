"""What a first use does: import, a call forward and backward held against the formula, and what serves it.

Run by path, outside the checkout, by a Python that has flash-triton installed; it prints what it found, as JSON.
"""

import json
from importlib.util import find_spec
from pathlib import Path

import torch

import flash
import flash.autotune.tables
import flash.kernels.spec


def call() -> None:
    """A causal call of a grouped head and a window, against the formula; AssertionError where they differ."""
    shapes = ((1, 4, 33, 40), (1, 2, 45, 40), (1, 2, 45, 24))
    q, k, v = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    o = flash.flash_attention(q, k, v, causal=True, window=(20, 0))
    ahead = torch.arange(45) - (torch.arange(33)[:, None] + 12)
    scores = q @ k.repeat_interleave(2, 1).mT * 40**-0.5
    expected = scores.masked_fill((ahead > 0) | (ahead < -20), -torch.inf).softmax(-1) @ v.repeat_interleave(2, 1)
    torch.testing.assert_close(o, expected)
    do = torch.randn_like(o)
    gradients = torch.autograd.grad(o, (q, k, v), do)
    for got, want in zip(gradients, torch.autograd.grad(expected, (q, k, v), do), strict=True):
        torch.testing.assert_close(got, want)


def found() -> dict[str, object]:
    """Where the package lies, and what it says of this machine."""
    package = Path(flash.__file__).parent
    return {
        "package": str(package),
        "version": flash.__version__,
        "tables": len(list((package / "autotune" / "tables").glob("*.json"))),
        "typed": (package / "py.typed").is_file(),
        "triton": find_spec("triton") is not None,
        "info": flash.info(),
    }


if __name__ == "__main__":
    call()
    print(json.dumps(found()))
