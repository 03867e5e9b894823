"""A decoding call made before is made again at once: its kernels are launched on the new tensors as they were launched.

A generation loop makes the same call for each token and layer, with other tensors. A replay is found by all that the
launches depend on: of each tensor its shape, strides, dtype, device and whether 16 bytes divide its address, and the
other arguments as they are; lengths are on the device. What comes where torch watches, or asks for a gradient, takes
the ordinary way, as does what a launch would not be the same for. The result is the same to the bit.
"""

from collections.abc import Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from . import dispatch, dispatch_step
from .cache_ops import ORDINARY, attend, written
from .ops import watching
from .step import Step

if TYPE_CHECKING:
    from .kernels.launch import Launched

SERVED = attrgetter("is_cuda")  # where launching costs: elsewhere no kernel is compiled
TRITONS = ((3, 6), (3, 9))  # first and last whose launch is known
MOST = 4096  # replays kept; then all are forgotten
ALIGNED = 16  # bytes of an address that Triton compiles other code for
NEW: Any = object()

Tensors = Sequence[torch.Tensor | None]
Key = tuple[Any, ...]


class Replay(NamedTuple):
    """The launches of a call, less its tensors.

    Args:
        launches: in order; their Slots count the call's tensors, None left out, and then those that were made.
        made: size, stride and dtype of each tensor that the call allocates, o and lse first.
        device: of all of them.
        written: the positions among the call's tensors of those that it writes to.
    """

    launches: list["Launched"]
    made: list[tuple[torch.Size, tuple[int, ...], torch.dtype]]
    device: torch.device
    written: tuple[int, ...]


replays: dict[Key, Replay | None] = {}  # None of a call that takes the ordinary way


def key_of(tensors: Tensors, options: tuple[Any, ...]) -> Key | None:
    """What a replay is found by; None where torch asks for more than values, or tensors are not ordinary ones."""
    if torch.compiler.is_compiling() or watching():
        return None
    grad = torch.is_grad_enabled()
    # 1 == True == 1.0, and not all of them are right
    types = [tuple(map(type, x)) for x in (options, *options) if isinstance(x, tuple)]
    parts: list[Any] = [options, *types]
    addresses = set()
    count = 0
    try:
        for x in tensors:
            if x is None:
                parts.append(None)
                continue
            if type(x) not in ORDINARY or not SERVED(x) or x.is_neg() or (grad and x.requires_grad):
                return None
            address = x.data_ptr()
            parts.append((x.shape, x.stride(), x.dtype, x.get_device(), address % ALIGNED == 0))
            addresses.add(address)
            count += 1
        if len(addresses) < count:  # which of them a launch was given could not be told
            return None
        key = tuple(parts)
        hash(key)
    except (RuntimeError, TypeError):  # tensors without addresses or strides, options that no call takes
        return None
    return key


def again(key: Key, tensors: Tensors) -> tuple[torch.Tensor, torch.Tensor] | None:
    """(o, lse) of a call by its replay; None, and nothing done, where there is none or Triton wants to be asked."""
    replay = replays.get(key)
    if replay is None:
        return None
    given = [x for x in tensors if x is not None]
    made = [torch.empty_strided(size, stride, dtype=dtype, device=replay.device) for size, stride, dtype in replay.made]
    given += made
    first, *others = replay.launches
    if not first.again(given):
        return None
    for launch in others:
        if not launch.again(given):
            raise RuntimeError("Triton's settings changed between two launches of one call: change them between calls")
    if replay.written:
        written(*(given[n] for n in replay.written))
    return made[0], made[1]


def remembered(key: Key, tensors: Tensors, step: Step) -> tuple[torch.Tensor, torch.Tensor]:
    """(o, lse) of a Step the ordinary way, its launches kept as the key's replay where they can be made again."""
    release, s = dispatch.triton_release(), step
    known = not isinstance(release, str) and TRITONS[0] <= release <= TRITONS[1]
    if key in replays or not known or s.q.dtype == torch.float32:  # a setting of torch's makes another kernel of that
        return attend(s)
    if dispatch_step.chosen(s.backend, s.q.device, s.q.dtype, s.cache) != "triton":
        keep(key, None)
        return attend(s)
    launches = []
    if s.k is not None and s.v is not None:
        appended = dispatch_step.append(s.k, s.v, s.cache, s.rotary, s.backend)
        assert appended is not None  # by Triton, as was chosen
        launches.append(appended)
        written(s.cache.k, s.cache.v)
    made, more = dispatch_step.launched_decode(s)
    launches += more
    given = [x for x in tensors if x is not None]
    found = [launch.without(given + made) for launch in launches]
    whole = [launch for launch in found if launch is not None]
    aligned = all(x.data_ptr() % ALIGNED == 0 for x in made)
    replay = None
    if aligned and len(whole) == len(found):
        shapes = [(x.shape, x.stride(), x.dtype) for x in made]
        places = [n for n, x in enumerate(given) if x is s.cache.k or x is s.cache.v] if s.k is not None else ()
        replay = Replay(whole, shapes, s.q.device, tuple(places))
    keep(key, replay)
    return made[0], made[1]


def keep(key: Key, replay: Replay | None) -> None:
    """Remember a replay, or that there is none."""
    if len(replays) >= MOST:
        replays.clear()
    replays[key] = replay
