"""User functions of a score: a `@triton.jit` function beside its torch twin, and how both cross a torch op.

    ScoreMod    s_ij <- fn(s_ij, b, h, i, j, args), and its derivative d out / d s_ij
    MaskMod     key j is visible to query i where fn(b, h, i, j, args)

i and j are the raw indices of a call (in packed calls, within their sequence), whatever q_offset is. They come as tiles
that broadcast against each other in either order; the torch twin gets integer tensors that broadcast. Functions are
told apart by identity, never by name: one that was defined again under its old name is another function.
"""

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import torch

from .kernels.spec import Spans

SCORE = "s, b, h, i, j, args"
MASK = "b, h, i, j, args"
CHECK = "batch, heads, seqlen_q, seqlen_k, args"

_lock = Lock()
_handles: dict[tuple[int, ...], str] = {}
_mods: dict[str, Any] = {}  # holds the functions, so that no id in a key of _handles is ever used again


class _Mod:
    """What both kinds of mod do."""

    def require(self, twin: str) -> None:
        """Raise TypeError where a twin is missing: "triton", "torch" or, for a ScoreMod, "derivative"."""
        name = {"triton": "fn", "torch": "torch_fn", "derivative": "derivative"}[twin]
        if getattr(self, name) is None:
            what = "a Python function of tensors" if twin == "torch" else "a @triton.jit function"
            need = "a gradient on the triton backend" if twin == "derivative" else f"the {twin} backend"
            raise TypeError(f"{type(self).__name__}.{name} must be {what} for {need}, got None")

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy with args of its own and the same functions."""
        return changed(self, args=copy.deepcopy(getattr(self, "args"), memo))  # noqa: B009

    def __reduce__(self) -> Any:
        raise TypeError(
            f"{type(self).__name__} cannot be pickled, as its functions are known by identity: save its args, and make "
            "it again from them"
        )

    def fit(self, batch: int, heads: int, seqlen_q: int, seqlen_k: int) -> None:
        """Raise ValueError where args do not fit a call of these sizes."""
        check, args = getattr(self, "check"), getattr(self, "args")  # noqa: B009  fields of the dataclasses below
        if check is not None:
            check(batch, heads, seqlen_q, seqlen_k, args)


@dataclass(frozen=True, eq=False)
class ScoreMod(_Mod):
    """A change of the score, after scale, softcap, bias and ALiBi and before keys are hidden.

        s_ij <- fn(s_ij, b, h, i, j, args)

    Args:
        fn: `@triton.jit` function (s, b, h, i, j, args) -> s, elementwise, in natural logarithm units and s's dtype.
            None: the Triton backend does not serve it.
        torch_fn: the same as a Python function of tensors. None: the torch backend does not serve it.
        derivative: `@triton.jit` function (s, b, h, i, j, args) -> d out / d s. None: no gradient on Triton.
        args: tensors that the functions read, contiguous and on q's device. Default: none.
        check: (batch, heads, seqlen_q, seqlen_k, args) -> None, which raises ValueError where args do not fit a call.
            Default: args fit every call.

    Raises:
        TypeError: a function is of the wrong kind or takes another number of arguments, there is neither fn nor
            torch_fn, or args is no tuple of tensors.

    Source: Dong et al. 2024, "Flex Attention", https://arxiv.org/abs/2412.05496.
    """

    fn: Any
    torch_fn: Any
    derivative: Any
    args: tuple[torch.Tensor, ...] = ()
    check: Callable[..., None] | None = None
    handle: str = field(init=False, repr=False, default="")

    def __post_init__(self) -> None:
        _finish(self, {"fn": SCORE, "derivative": SCORE}, {"torch_fn": SCORE, "check": CHECK})


@dataclass(frozen=True, eq=False)
class MaskMod(_Mod):
    """A rule of which keys a query sees; all other rules of the call hold beside it.

        key j is visible to query i where fn(b, h, i, j, args)

    Args:
        fn: `@triton.jit` function (b, h, i, j, args) -> bool. None: the Triton backend does not serve it.
        torch_fn: the same as a Python function of integer tensors. None: the torch backend does not serve it.
        args: tensors that the functions read, contiguous and on q's device. Default: none.
        spans: (seqlen_q, seqlen_k, args) -> flash.kernels.spec.Spans, bounds of what is visible, so that tiles beyond
            them are never loaded; they may be wide, never narrow. Default: unknown, so that every tile is visited.
        check: as in ScoreMod.

    Raises:
        TypeError: as in ScoreMod.

    Source: Dong et al. 2024, "Flex Attention", https://arxiv.org/abs/2412.05496.
    """

    fn: Any
    torch_fn: Any
    args: tuple[torch.Tensor, ...] = ()
    spans: Callable[..., Spans] | None = None
    check: Callable[..., None] | None = None
    handle: str = field(init=False, repr=False, default="")

    def __post_init__(self) -> None:
        _finish(self, {"fn": MASK}, {"torch_fn": MASK, "spans": "seqlen_q, seqlen_k, args", "check": CHECK})


def handle_of(mod: ScoreMod | MaskMod) -> str:
    """The name under which a mod's functions cross a torch op; its args travel beside it."""
    return mod.handle


def from_handle(handle: str, args: tuple[torch.Tensor, ...]) -> Any:
    """The mod of a handle, with these args."""
    if handle not in _mods:
        raise ValueError(f"handle must name a mod of this process, got {handle!r}")
    return changed(_mods[handle], args=tuple(args))


def changed(mod: Any, **fields: Any) -> Any:
    """A copy of a mod with other args, spans or check; nothing is checked again, and the handle stays."""
    other = object.__new__(type(mod))
    other.__dict__.update(mod.__dict__, **fields)
    return other


def _finish(mod: Any, triton_fns: dict[str, str], torch_fns: dict[str, str]) -> None:
    """Check a mod, its functions only where they are new, and give it the handle of its functions."""
    kind = type(mod).__name__
    if mod.fn is None and mod.torch_fn is None:
        raise TypeError(f"{kind} must have fn, torch_fn or both, got neither")
    if not isinstance(mod.args, tuple) or not all(isinstance(x, torch.Tensor) for x in mod.args):
        got = tuple(type(x).__name__ for x in mod.args) if isinstance(mod.args, tuple) else type(mod.args).__name__
        raise TypeError(f"{kind}.args must be a tuple of tensors, got {got}")
    key = (id(type(mod)), *(id(getattr(mod, name)) for name in (*triton_fns, *torch_fns)))
    handle = _handles.get(key)
    if handle is None:
        if torch.compiler.is_compiling():  # what it enters into a table it enters when it has done tracing
            raise RuntimeError(
                "new functions of a mod must be met before torch.compile traces: make the mod once outside"
            )
        for name, parameters in triton_fns.items():
            _check_triton(f"{kind}.{name}", getattr(mod, name), parameters)
        for name, parameters in torch_fns.items():
            _check_python(f"{kind}.{name}", getattr(mod, name), parameters)
        handle = _enter(mod, key)
    object.__setattr__(mod, "handle", handle)


def _enter(mod: Any, key: tuple[int, ...]) -> str:
    """The handle of functions that were not known; of two threads that bring the same ones, the first decides."""
    with _lock:
        if key not in _handles:
            name = getattr(mod.torch_fn if mod.fn is None else mod.fn, "__name__", type(mod).__name__)
            handle = f"{name.strip('_')}:{len(_handles)}"
            _mods[handle] = changed(mod, args=())
            object.__setattr__(_mods[handle], "handle", handle)
            _handles[key] = handle
        return _handles[key]


def _is_jit(fn: Any) -> bool:
    """Whether fn came from @triton.jit, compiled or interpreted."""
    return type(fn).__module__.startswith("triton.runtime.") and hasattr(fn, "fn")


def _check_triton(name: str, fn: Any, parameters: str) -> None:
    """Raise TypeError unless fn is None or a @triton.jit function of these parameters."""
    if fn is None:
        return
    if not _is_jit(fn):
        raise TypeError(f"{name} must be a @triton.jit function ({parameters}), got {type(fn).__name__} {fn!r}")
    found = list(inspect.signature(fn.fn).parameters)
    if len(found) != parameters.count(",") + 1:
        raise TypeError(f"{name} must take {parameters.count(',') + 1} arguments ({parameters}), got {found}")


def _check_python(name: str, fn: Any, parameters: str) -> None:
    """Raise TypeError unless fn is None or a Python callable that can be called with these parameters."""
    if fn is None:
        return
    if _is_jit(fn) or not callable(fn):
        raise TypeError(f"{name} must be a Python function ({parameters}), got {type(fn).__name__} {fn!r}")
    try:
        signature = inspect.signature(fn)
    except ValueError:  # some built-in functions do not tell
        return
    try:
        signature.bind(*parameters.split(", "))
    except TypeError as error:
        count = parameters.count(",") + 1
        raise TypeError(f"{name} must take {count} arguments ({parameters}), got {signature}") from error
