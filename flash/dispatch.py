"""Problem -> implementation, with reasons: which backend serves a call, which refuse it and why, and with which tiles.

    hopper   Gluon kernels for sm_90             float16 and bfloat16, what TMA can address, the common features
    triton   plain kernels                       GPUs, and CPU tensors under Triton's interpreter
    torch    block-wise torch                    everything

"auto" takes the Hopper kernels, forward and backward each for itself, where a table says that they are faster: where
both have been timed. Else it takes the first of the others that serves. A backend asked for by name serves or raises.
"""

import warnings
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch

from . import fallback
from ._version import __version__
from .autotune import tables
from .kernels.spec import Configs, Gradients, Mods, Positions, Spec, Unfit
from .problem import KERNELS, MAX_HEAD_DIM, PACKING, Options, Problem, check_flag, name_of

PREFERENCE = ("hopper", "triton", "torch")
HOPPER = {"forward": "hopper_forward", "backward": "hopper_backward"}
ALL = Gradients(True, True, True)


@lru_cache(maxsize=1)
def triton_release() -> tuple[int, int] | str:
    """Triton's (major, minor), or why there is none."""
    if find_spec("triton") is None:
        return "Triton is not installed (it exists for Linux only)"
    try:
        import triton
    except ImportError as error:
        return f"Triton cannot be imported: {error}"
    major, minor = triton.__version__.split(".")[:2]
    return int(major), int(minor)


@lru_cache(maxsize=1)
def interpreted() -> bool:
    """Whether the kernels were imported under Triton's interpreter, which runs them on CPU tensors."""
    from triton.runtime.jit import JITFunction

    from .kernels.forward import forward_kernel

    return not isinstance(forward_kernel, JITFunction)


@lru_cache(maxsize=1)
def interprets_bfloat16() -> bool:
    """Whether the interpreter multiplies bfloat16: stock ones multiply its bit patterns (triton-lang/triton#11584).

    Attention to one key returns that key's value, whatever the score.
    """
    from .kernels.forward import forward as kernel

    x = torch.full((1, 1, 1, 16), 3.0, dtype=torch.bfloat16)
    config = tables.lookup("interpreter", "forward", "bfloat16", 16, 1, False).config
    o, _ = kernel(x, x, x, Mods(), Spec(), 1.0, Positions(), config)
    return torch.equal(o, x)


@lru_cache(maxsize=64)
def target_of(device: torch.device) -> str:
    """What a device compiles for, as the tables name it: cuda:90, hip:gfx942 or interpreter."""
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip:
        return f"hip:{torch.cuda.get_device_properties(device).gcnArchName.split(':')[0]}"
    major, minor = torch.cuda.get_device_capability(device)
    return f"cuda:{major}{minor}"


@lru_cache(maxsize=64)
def gpu_of(device: torch.device) -> str | None:
    """The name of a GPU, as a sweep on it writes it into its table; None for other devices."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


def triton_refuses(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the Triton kernels do not serve a device and dtype, or None where they do."""
    release = triton_release()
    if isinstance(release, str):
        return release
    if release < (3, 6):
        return f"Triton 3.6 or newer is needed, got {release[0]}.{release[1]}"
    if device.type == "cpu":
        if not interpreted():
            return "CPU tensors run on Triton only under its interpreter (TRITON_INTERPRET=1)"
        wrong = dtype == torch.bfloat16 and not interprets_bfloat16()
        return "Triton's interpreter multiplies bfloat16 wrongly (triton-lang/triton#11584)" if wrong else None
    if device.type != "cuda":
        return f"no Triton kernels for device type {device.type}"
    if interpreted():
        return None
    if torch.version.hip:
        if dtype == torch.float64 and release < (3, 9):
            return "float64 on AMD needs Triton 3.9 or newer"
    elif dtype == torch.bfloat16 and torch.cuda.get_device_capability(device) < (8, 0):
        return "bfloat16 needs compute capability 8.0 or newer"
    return None


def refusal(backend: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why a backend does not serve a device, dtype and head dimension, or None where it does."""
    if backend == "hopper":
        return hopper_refuses(device, dtype)
    if backend == "torch":
        return None
    return triton_refuses(device, dtype) or too_wide(device, dtype, head_dim)


def hopper_refuses(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the Hopper kernels serve no call on a device, or None where they serve some."""
    if device.type != "cuda" or torch.version.hip:
        return f"the Hopper kernels need a GPU of compute capability 9.0, {device} is none"
    if reason := triton_refuses(device, dtype):
        return reason
    if (found := torch.cuda.get_device_capability(device)) != (9, 0):
        return f"the Hopper kernels need compute capability 9.0, {device} has {found[0]}.{found[1]}"
    return "the Hopper kernels are written in Gluon, which Triton does not interpret" if interpreted() else None


def hopper_lacks(problem: Problem, part: str, needs: Gradients = ALL) -> str | None:
    """Why the Hopper kernel of a part, "forward" or "backward", does not serve a Problem, or None where it does."""
    call = (problem.q, problem.k, problem.v, problem.mods, problem.spec)
    if reason := hopper_refuses(problem.q.device, problem.q.dtype):
        return reason
    if part == "forward":
        from .kernels.hopper_forward import unserved

        return unserved(*call)
    from .kernels.hopper_backward import unserved as unserved_backward

    return unserved_backward(*call, needs, problem.deterministic)


def hopper_is_faster(problem: Problem, part: str) -> bool:
    """Whether the Hopper kernel of a part has been timed on this kind of GPU, and beat the plain ones."""
    if problem.q.device.type != "cuda":
        return False
    kernels = ("forward",) if part == "forward" else ("dkdv", "dq")
    return tables.is_faster(HOPPER[part], kernels, *table_key(problem))


def table_key(problem: Problem) -> tuple[str, str, int, int, bool, str | None]:
    """How tables tell calls apart: target, dtype, head_dim, seqlen, causal, GPU."""
    q, k, v = problem.q, problem.k, problem.v
    head_dim, seqlen = max(q.shape[3], v.shape[3]), max(q.shape[2], k.shape[2])
    return target_of(q.device), name_of(q.dtype), head_dim, seqlen, problem.spec.causal, gpu_of(q.device)


def too_wide(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why no tile of a head dimension fits a device's shared memory, or None where one does."""
    return None if device.type != "cuda" else tables.too_wide(target_of(device), name_of(dtype), head_dim)


def choose(backend: str, device: torch.device, dtype: torch.dtype, head_dim: int = 64) -> str:
    """The backend that serves a call whose larger head dimension is head_dim.

    Raises:
        NotImplementedError: the backend asked for by name does not serve it.
    """
    if backend == "auto":
        # the interpreter is for tests: CPU tensors go there only when asked
        order = ("torch",) if device.type == "cpu" else ("triton", "torch")
        return next(name for name in order if refusal(name, device, dtype, head_dim) is None)
    if reason := refusal(backend, device, dtype, head_dim):
        raise NotImplementedError(
            f"backend {backend!r} does not serve {name_of(dtype)} with head_dim {head_dim} on {device}: {reason}; "
            f"use backend='auto', which takes {choose('auto', device, dtype, head_dim)!r}"
        )
    return backend


def chosen(problem: Problem, part: str = "forward", needs: Gradients = ALL) -> str:
    """The backend that serves a part, "forward" or "backward", of a Problem.

    Raises:
        NotImplementedError: the backend asked for by name does not serve it.
        TypeError: a user function lacks the twin that this backend runs.
    """
    backend = problem.backend
    given = problem.configs[:1] if part == "forward" else problem.configs[1:]  # those of the plain kernels, with "auto"
    if backend == "hopper" or (
        backend == "auto" and given.count(None) == len(given) and hopper_is_faster(problem, part)
    ):
        reason = hopper_lacks(problem, part, needs)
        if reason is None:
            return "hopper"
        if backend == "hopper":
            raise NotImplementedError(f"backend 'hopper' does not serve this {part}: {reason}; use backend='auto'")
    return plain(problem)


def plain(problem: Problem) -> str:
    """The backend, Hopper kernels left aside, that serves a Problem.

    Raises:
        NotImplementedError: the backend asked for by name does not serve it.
        TypeError: a user function lacks the twin that this backend runs.
    """
    q, v = problem.q, problem.v
    backend = choose(problem.backend, q.device, q.dtype, max(q.shape[3], v.shape[3]))
    for mod in (problem.mods.score_mod, problem.mods.mask_mod):
        if mod is not None:
            mod.require(backend)
    return backend


def tuned(problem: Problem, kernel: str, formula: bool = False) -> tables.Choice:
    """The Config of a kernel for a Problem, the user's or the table's (or the formula's in its place), and why.

    Raises:
        ValueError: the user's tiles do not divide the blocks of a block mask.
    """
    if kernel in HOPPER.values():
        return tuned_for_hopper(problem, kernel)
    given = problem.configs[KERNELS.index(kernel)]
    blocks = problem.spec.blocks if problem.mods.bad is None else None  # of packed sequences no tile keeps to them
    if given is not None:
        if blocks is not None and (blocks[0] % given.block_m or blocks[1] % given.block_n):
            tile = given.block_m, given.block_n
            raise ValueError(f"config[{kernel!r}] must have tiles that divide block_mask's {blocks}, got {tile}")
        return tables.Choice(given, "given by the caller")
    target, dtype, head_dim, seqlen, causal, gpu = table_key(problem)
    if formula:
        found = tables.by_formula(target, kernel, dtype, head_dim)
    else:
        found = tables.lookup(target, kernel, dtype, head_dim, seqlen, causal, gpu)
    if problem.spec.hides or problem.spec.blocks is not None or problem.spec.dropout_p > 0:
        found = tables.narrowed(found, kernel)
    if blocks is None:
        return found
    config = found.config
    # the largest power of two in each; a block is a multiple of 16
    fits = [min(block & -block, tile) for block, tile in zip(blocks, (config.block_m, config.block_n), strict=True)]
    if fits == [config.block_m, config.block_n]:
        return found
    cut = config._replace(block_m=fits[0], block_n=fits[1])
    return tables.Choice(cut, f"{found.reason}; cut to divide block_mask's blocks {blocks}")


def tuned_for_hopper(problem: Problem, kernel: str) -> tables.Choice:
    """The Config of a Hopper kernel: the user's (the backward's is that of dkdv), a timed one, or the first shipped.

    Tables do not tell a window: a Config that was timed on other calls counts where it is shipped for this one too.
    """
    given = problem.configs[KERNELS.index("forward" if kernel == "hopper_forward" else "dkdv")]
    if given is not None and problem.backend == "hopper":
        return tables.Choice(given, "given by the caller")
    if kernel == "hopper_forward":
        from .kernels.hopper_forward import candidates
    else:
        from .kernels.hopper_backward import candidates
    spec = problem.spec
    shipped = candidates(max(problem.q.shape[3], problem.v.shape[3]), spec.causal or spec.left or spec.right)
    target, dtype, head_dim, seqlen, causal, gpu = table_key(problem)
    found = tables.timed(target, kernel, dtype, head_dim, seqlen, causal, gpu)
    if found is not None and found.config in shipped:
        return found
    return tables.Choice(shipped[0], "compiled and simulated, untimed")


def replace(problem: Problem, error: Unfit, formula: bool) -> None:
    """Warn that a table's Config does not fit this device, and that the formula's will be taken; or raise.

    Raises:
        Unfit: it was the caller's Config, or the formula's own.
    """
    if formula or any(config is not None for config in problem.configs):
        raise error
    warnings.warn(f"{error}; a formula's tiles are taken in place of the table's", RuntimeWarning, stacklevel=2)


def as_given(q: torch.Tensor) -> AbstractContextManager[Any]:
    """A context in which torch's own operations leave dtypes alone: what autocast asks of a call, Problem has done."""
    device = q.device.type
    asked = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if asked else nullcontext()


def forward(problem: Problem, formula: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """(o, lse) of a Problem from the backend that serves it; with the formula's tiles where a table's do not fit."""
    p = problem
    call = (p.q, p.k, p.v, p.mods, p.spec, p.scale, p.positions)
    backend = chosen(p)
    if backend == "torch":
        with as_given(p.q):
            return fallback.forward(*call)
    if backend == "hopper":
        from .kernels import hopper_forward

        return hopper_forward.forward(*call, tuned(p, "hopper_forward").config)
    from .kernels import forward as kernels

    try:
        return kernels.forward(*call, tuned(p, "forward", formula).config)
    except Unfit as error:
        replace(p, error, formula)
    return forward(p, formula=True)


def backward(
    problem: Problem,
    do: torch.Tensor,
    dlse: torch.Tensor | None,
    o: torch.Tensor,
    lse: torch.Tensor,
    needs: Gradients,
    formula: bool = False,
) -> Gradients:
    """The wanted gradients of a Problem from the backend that serves it; tiles as in `forward`."""
    p = problem
    call = (do, dlse, p.q, p.k, p.v, o, lse, p.mods, p.spec, p.scale, p.positions)
    backend = chosen(p, "backward", needs)
    if backend == "torch":
        with as_given(p.q):
            return fallback.backward(*call, needs)
    if backend == "hopper":
        from .kernels import hopper_backward

        # dq's tiles cut delta, as in the plain backward
        config = tuned(p, "hopper_backward").config
        return hopper_backward.backward(*call, Configs(config, config, tuned(p, "dq").config), needs)
    if p.mods.score_mod is not None:
        p.mods.score_mod.require("derivative")
    from .kernels import backward as kernels

    configs = Configs(*(tuned(p, kernel, formula).config for kernel in KERNELS))
    try:
        return kernels.backward(*call, configs, needs)
    except Unfit as error:
        replace(p, error, formula)
    return backward(p, do, dlse, o, lse, needs, formula=True)


def jvp(
    problem: Problem, tangents: Gradients, o: torch.Tensor, lse: torch.Tensor, formula: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """The tangents of o and lse of a Problem from the backend that serves it; tiles as in `forward`."""
    p = problem
    call = (tangents, p.q, p.k, p.v, o, lse, p.mods, p.spec, p.scale, p.positions)
    if p.backend == "hopper":
        raise NotImplementedError("backend 'hopper' has no forward mode; use backend='auto'")
    if plain(p) == "torch":
        with as_given(p.q):
            return fallback.jvp(*call)
    if p.mods.score_mod is not None:
        p.mods.score_mod.require("derivative")
    from .kernels import jvp as kernels

    try:
        return kernels.jvp(*call, tuned_for_tangents(p, formula).config)
    except Unfit as error:
        replace(p, error, formula)
    return jvp(p, tangents, o, lse, formula=True)


def tuned_for_tangents(problem: Problem, formula: bool = False) -> tables.Choice:
    """The Config of the kernel of forward mode, made of dq's."""
    target, dtype, head_dim, *_ = table_key(problem)
    return tables.for_tangents(tuned(problem, "dq", formula), target, dtype, head_dim)


def kernels_of(backend: str, behind: str) -> tuple[str, ...]:
    """The kernels with tiles to choose that a forward by one backend and a backward by another would run."""
    forward = {"triton": ("forward",), "hopper": ("hopper_forward",)}
    backward = {"triton": ("dkdv", "dq"), "hopper": ("hopper_backward",)}
    return (*forward.get(backend, ()), *backward.get(behind, ()))


def info(
    q: torch.Tensor | None = None, k: torch.Tensor | None = None, v: torch.Tensor | None = None, **keywords: Any
) -> dict[str, Any]:
    """What this machine serves, and how a call would run on it.

    Args:
        q: query of the call, as flash.attention.flash_attention takes it. Default: no call, only the machine.
        k: key of the call. Default: like q.
        v: value of the call. Default: like k.
        **keywords: the call's other keywords.

    Returns:
        version, torch, triton (versions, "" for a Triton that is not there), device, device_name, head_dim (the range
        served), backends {name: "served" or why not, for this call or for float16 and head_dim 64}, backend (the one
        that would run the forward) and, with q, backward {backend (that would run it for all gradients, "" for none),
        hopper ("served" or why not)} and configs {kernel: {config, reason}} of both, empty for the torch backend, which
        has no tiles.

    Raises:
        ValueError: as the call itself would, or a part of a call came without q.
        NotImplementedError: as the call itself would.
    """
    if q is None:
        if k is not None or v is not None or keywords:
            raise ValueError("q must be given where any other argument of a call is, got None")
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype, head_dim = torch.float16, 64
        backend, configs, hopper = choose("auto", device, dtype), {}, hopper_refuses(device, dtype)
    else:
        check_flag("return_lse", keywords.pop("return_lse", False))
        for name in keywords.keys() - {*Options._fields, *PACKING}:
            raise TypeError(f"flash_attention has no keyword {name!r}")
        k = q if k is None else k
        problem = Problem.of(q, k, k if v is None else v, **keywords)
        device, dtype, head_dim = problem.q.device, problem.q.dtype, max(problem.q.shape[3], problem.v.shape[3])
        backend, hopper = chosen(problem), hopper_lacks(problem, "forward")
        if hopper is None and backend != "hopper":
            hopper = "served by name; it has not been timed to be faster here"
        refused = hopper_lacks(problem, "backward")
        behind = "" if problem.backend == "hopper" and refused else chosen(problem, "backward")
        kernels = kernels_of(backend, behind)
        configs = {
            "backward": {"backend": behind, "hopper": refused or "served"},
            "configs": {kernel: tuned(problem, kernel)._asdict() for kernel in kernels},
        }
    return {
        "version": __version__,
        "torch": torch.__version__,
        "triton": tables.triton_version() or "",
        "device": str(device),
        "device_name": gpu_of(device) or device.type,
        "head_dim": f"1 to {MAX_HEAD_DIM}",
        "backends": {
            "hopper": hopper or "served",
            **{name: refusal(name, device, dtype, head_dim) or "served" for name in PREFERENCE[1:]},
        },
        "backend": backend,
        **configs,
    }
