"""How a kernel is started: its arguments, its grid, the device guard, and a clear word when a Config does not fit."""

from contextlib import nullcontext
from typing import Any, NamedTuple, TypeVar

import torch
import triton
from triton import knobs
from triton.runtime import driver
from triton.runtime.errors import OutOfResources, PTXASError

from .spec import Blocks, Config, Mods, Operands, Positions, Shape, Sizes, Spec, Unfit, View

Numbers = TypeVar("Numbers", bound=tuple[Any, ...])


def coded(numbers: Numbers) -> Numbers:
    """Numbers that change from call to call, in a NamedTuple, as one kernel argument; `tile.number` reads them there.

    Triton (3.6 to 3.9) compiles a kernel anew for an integer that is 1, that 16 divides, or that needs 64 bits, and in
    a tuple whatever do_not_specialize says. So each number, of 32 bits, is the upper half of one that always needs 64
    and is neither: a new length compiles nothing, nor does a new offset.
    """
    return type(numbers)(*[(n << 32) + (2 if n < 0 else 2**31 + 2) for n in numbers])


def shape_of(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Shape:
    """The compile-time sizes of a call."""
    head_dim, head_dim_v = q.shape[3], v.shape[3]
    # a matrix product's inner dimension is at least 16
    padded = [max(16, triton.next_power_of_2(d)) for d in (head_dim, head_dim_v)]
    return Shape(q.shape[1] // max(k.shape[1], 1), head_dim, head_dim_v, *padded)


def sizes_of(q: torch.Tensor, k: torch.Tensor, mods: Mods, positions: Positions) -> Sizes:
    """The lengths of a call."""
    batch = q.shape[0] if mods.bad is None else mods.bad.shape[0]
    return Sizes(q.shape[1], q.shape[2], k.shape[2], batch, *positions)


def view(x: torch.Tensor, packed: bool = False) -> View:
    """A 4-D tensor as one kernel argument; of packed sequences, each starts in the same batch element."""
    stride_b, stride_h, stride_s, stride_d = x.stride()
    return View(x, 0 if packed else stride_b, stride_h, stride_s, stride_d)


def spread(x: torch.Tensor) -> View:
    """A 4-D tensor whose axes of size 1 stand for any number of indices."""
    return View(x, *(0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True)))


def prepare(mods: Mods, spec: Spec) -> tuple[Operands, Spec]:
    """What kernels are given of Mods, and the Spec with what follows from them."""
    mask = None if mods.mask is None else mods.mask.view(torch.uint8)
    slopes = None if mods.alibi_slopes is None else mods.alibi_slopes[:, :, None, None]
    sinks = None if mods.sinks is None else mods.sinks[None, :, None, None]
    mask_axes, bias_axes = (
        (False, False) if x is None else (x.shape[2] > 1, x.shape[3] > 1) for x in (mods.mask, mods.bias)
    )
    spec = spec._replace(
        part=False,  # which only launchers ask: no kernel is compiled for it
        mask_rows=mask_axes[0],
        mask_cols=mask_axes[1],
        bias_rows=bias_axes[0],
        bias_cols=bias_axes[1],
        threshold=min(round(spec.dropout_p * 2**32), 2**32 - 1),
    )
    return Operands(
        q_offset=mods.q_offset,
        mask=None if mask is None else spread(mask),
        bias=None if mods.bias is None else spread(mods.bias),
        slopes=None if slopes is None else spread(slopes),
        sinks=None if sinks is None else spread(sinks),
        seed=mods.seed,
        starts_q=mods.starts_q,
        starts_k=mods.starts_k,
        bad=None if mods.bad is None else mods.bad.view(torch.uint8),
        origin=None if mods.origin is None else spread(mods.origin[:, None, None]),
        **({} if mods.blocks is None else views_of(mods.blocks)),
        **({} if mods.spans is None else {name: spread(x.unsqueeze(3)) for name, x in mods.spans._asdict().items()}),
        score_fn=None if mods.score_mod is None else mods.score_mod.fn,
        score_derivative=None if mods.score_mod is None else mods.score_mod.derivative,
        score_args=None if mods.score_mod is None else mods.score_mod.args,
        mask_fn=None if mods.mask_mod is None else mods.mask_mod.fn,
        mask_args=None if mods.mask_mod is None else mods.mask_mod.args,
    ), spec


def views_of(blocks: Blocks) -> dict[str, Any]:
    """A block mask as kernels read it."""
    return {name: x if name == "bits" else spread(x) for name, x in blocks._asdict().items()}


def cut(x: torch.Tensor, mods: Mods, operands: Operands, by_key: bool, block: int) -> tuple[int, Operands]:
    """How many programs own tiles of `block` queries, or keys, of x, and the operands that tell them which.

    Packed sequences are cut one by one, so that a long one has many programs and an empty one none. How many tiles that
    makes is known on the device alone: there are as many programs as there can be tiles, and the spare ones do nothing.
    """
    batch, heads, seqlen, _ = x.shape
    if mods.bad is None:
        return triton.cdiv(seqlen, block) * heads * batch, operands
    starts = mods.starts_k if by_key else mods.starts_q
    counts = (starts.diff() + (block - 1)) // block
    tiles = torch.nn.functional.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
    return (seqlen // block + len(mods.bad)) * heads, operands._replace(tiles=tiles)


def launch(kernel: Any, programs: int, device: torch.device, config: Config, *args: Any, **options: Any) -> Any:
    """Run `programs` programs of a kernel on `device`, on its current stream; none is a launch of nothing.

    Args:
        kernel: a @triton.jit function whose last two parameters are BLOCK_M and BLOCK_N.
        programs: size of the one-dimensional grid.
        device: where the tensors are; the caller's current device is left as it was.
        config: tile sizes, warps and stages.
        *args: the kernel's other arguments.
        **options: of the compiler, in place of the configuration's or beside them.

    Returns:
        Triton's CompiledKernel; None where nothing was launched, or was interpreted.

    Raises:
        Unfit: the configuration needs more shared memory or registers than the device has.
    """
    if programs == 0:
        return None
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages} | options
    try:
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            return kernel[(programs,)](*args, BLOCK_M=config.block_m, BLOCK_N=config.block_n, **options)
    except (OutOfResources, PTXASError) as error:
        raise Unfit(f"config must fit {device}, got {config} for {kernel.__name__}: {error}") from error


def launch_again(compiled: Any, kernel: Any, programs: int, device: torch.device, args: tuple[Any, ...]) -> bool:
    """Run a kernel as `launch` compiled it, without Triton's search for it; False, and nothing, where it cannot.

    Triton finds a compiled kernel by what it specialises: types, addresses and numbers that 16 divides, numbers that
    are 1, what is None or constant, the device, warps and stages, and some of its settings. Whoever calls this answers
    for all of them but the settings: each argument must be specialised as the one in its place was at `launch`.

    Args:
        compiled: what `launch` returned.
        kernel: what it was given.
        programs: size of the one-dimensional grid, at least 1.
        device: where the tensors are; nothing is launched where it is not the current one.
        args: the kernel's arguments, BLOCK_M and BLOCK_N included.

    Returns:
        Whether it was launched, on the device's current stream.
    """
    runtime = knobs.runtime
    if runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls or kernel.pre_run_hooks:
        return False
    if runtime.debug or runtime.add_stages_inspection_hook is not None or knobs.compilation.instrumentation_mode:
        return False
    current = driver.active.get_current_device()
    if current != (device.index or 0):
        return False
    stream = driver.active.get_current_stream(current)
    compiled.run(programs, 1, 1, stream, compiled.function, compiled.packed_metadata, None, None, None, *args)
    return True


class Slot(NamedTuple):
    """Stands in a launch's arguments for tensor n of a call."""

    n: int


class Launched(NamedTuple):
    """A launch that was made, so that it can be made again with other tensors.

    Args:
        compiled: what `launch` returned.
        kernel: what it was given, and so on.
        programs: how many.
        device: of the tensors.
        args: the kernel's arguments, BLOCK_M and BLOCK_N included.
    """

    compiled: Any
    kernel: Any
    programs: int
    device: torch.device
    args: tuple[Any, ...]

    @classmethod
    def by(
        cls, kernel: Any, programs: int, device: torch.device, config: Config, *args: Any, **options: Any
    ) -> "Launched":
        """Launch a kernel as `launch` does."""
        compiled = launch(kernel, programs, device, config, *args, **options)
        return cls(compiled, kernel, programs, device, (*args, config.block_m, config.block_n))

    def without(self, tensors: list[torch.Tensor]) -> "Launched | None":
        """The launch with a Slot for each tensor, told by its address; None where it cannot be made again."""
        places = {x.data_ptr(): Slot(n) for n, x in enumerate(tensors)}
        if self.programs > 0 and self.compiled is None or len(places) < len(tensors):
            return None
        try:
            return self._replace(args=tuple(emptied(x, places) for x in self.args))
        except KeyError:  # a tensor that the call made and filled
            return None

    def again(self, tensors: list[torch.Tensor]) -> bool:
        """Launch it on other tensors, specialised as the first ones; False, and nothing, where it cannot be."""
        if self.programs == 0:
            return True
        args = tuple([filled(x, tensors) for x in self.args])
        return launch_again(self.compiled, self.kernel, self.programs, self.device, args)


class Holes(tuple[Any, ...]):
    """A tuple of arguments with Slots in it, or in a tuple in it."""


def emptied(x: Any, places: dict[int, Slot]) -> Any:
    """An argument with Slots for tensors."""
    if isinstance(x, torch.Tensor):
        return places[x.data_ptr()]
    if not isinstance(x, tuple):
        return x
    parts = [emptied(y, places) for y in x]
    return Holes(parts) if any(type(y) in (Slot, Holes) for y in parts) else x


def filled(x: Any, tensors: list[torch.Tensor]) -> Any:
    """An argument with tensors for Slots."""
    if type(x) is Slot:
        return tensors[x.n]
    return tuple([filled(y, tensors) for y in x]) if type(x) is Holes else x
