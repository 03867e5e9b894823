"""How a kernel is started: views, sizes, the device guard, and a clear word when a configuration does not fit."""

from contextlib import nullcontext
from typing import Any

import torch
import triton
from triton.runtime.errors import OutOfResources

from .spec import Config, Shape, Sizes, View

# Lengths are never specialised, so that a new one compiles nothing. They reach a kernel one by one and become a Sizes
# there, since Triton (3.6 to 3.9) specialises the members of a tuple whatever do_not_specialize says.
LENGTHS = list(Sizes._fields)


def view(x: torch.Tensor) -> View:
    """A 4-D tensor as one kernel argument."""
    return View(x, *x.stride())


def shape_of(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Shape:
    """The compile-time sizes of a call."""
    head_dim, head_dim_v = q.shape[3], v.shape[3]
    # a matrix product's inner dimension is at least 16
    padded = [max(16, triton.next_power_of_2(d)) for d in (head_dim, head_dim_v)]
    return Shape(q.shape[1] // max(k.shape[1], 1), head_dim, head_dim_v, *padded)


def sizes_of(q: torch.Tensor, k: torch.Tensor, q_offset: int) -> Sizes:
    """The lengths of a call."""
    return Sizes(q.shape[1], q.shape[2], k.shape[2], q_offset)


def launch(kernel: Any, programs: int, device: torch.device, config: Config, *args: Any) -> None:
    """Run `programs` programs of a kernel on `device`, on its current stream; none is a launch of nothing.

    Args:
        kernel: a @triton.jit function whose last two parameters are BLOCK_M and BLOCK_N.
        programs: size of the one-dimensional grid.
        device: where the tensors are; the caller's current device is left as it was.
        config: tile sizes, warps and stages.
        *args: the kernel's other arguments.

    Raises:
        ValueError: the configuration needs more shared memory or registers than the device has.
    """
    if programs == 0:
        return
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    try:
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            kernel[(programs,)](*args, BLOCK_M=config.block_m, BLOCK_N=config.block_n, **options)
    except OutOfResources as error:
        raise ValueError(f"config must fit {device}, got {config} for {kernel.__name__}: {error}") from error
