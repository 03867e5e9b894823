"""Problem -> implementation, with reasons: which backend serves a call, which refuse it and why, and with which tiles.

    hopper   Gluon kernels for sm_90             not built yet
    triton   plain kernels                       GPUs, and CPU tensors under Triton's interpreter
    torch    block-wise torch                    everything

"auto" takes the first that serves. One asked for by name serves or raises, and never falls back.
"""

from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import torch

from . import fallback
from ._version import __version__
from .autotune import tables
from .kernels.spec import Configs, Mods, Spec
from .problem import KERNELS, MAX_HEAD_DIM, Problem, name_of

Gradients = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


@lru_cache(maxsize=1)
def triton_version() -> tuple[int, int] | None:
    """Triton's (major, minor), or None where it cannot be imported."""
    if find_spec("triton") is None:
        return None
    try:
        major, minor = version("triton").split(".")[:2]
    except PackageNotFoundError:
        import triton

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
    o, _ = kernel(x, x, x, Mods(), Spec(), 1.0, 0, config)
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


def triton_refuses(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the Triton kernels do not serve a device and dtype, or None where they do."""
    release = triton_version()
    if release is None:
        return "Triton is not installed (it exists for Linux only)"
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


def refusals(device: torch.device, dtype: torch.dtype) -> dict[str, str | None]:
    """For each backend, in order of preference, why it does not serve a device and dtype, or None where it does."""
    return {"hopper": "not built yet", "triton": triton_refuses(device, dtype), "torch": None}


def choose(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """The backend that serves a call.

    Raises:
        NotImplementedError: the backend asked for by name does not serve it.
    """
    reasons = refusals(device, dtype)
    if backend == "auto":
        # the interpreter is for tests: CPU tensors go there only when asked
        skipped = ("triton",) if device.type == "cpu" else ()
        return next(name for name, reason in reasons.items() if reason is None and name not in skipped)
    if reasons[backend] is not None:
        raise NotImplementedError(
            f"backend {backend!r} does not serve {name_of(dtype)} on {device}: {reasons[backend]}; "
            f"use backend='auto', which takes {choose('auto', device, dtype)!r}"
        )
    return backend


def tuned(problem: Problem, kernel: str) -> tables.Choice:
    """The Config of a kernel for a Problem, the user's or the table's, and why."""
    given = problem.configs[KERNELS.index(kernel)]
    if given is not None:
        return tables.Choice(given, "given by the caller")
    q, v = problem.q, problem.v
    head_dim, seqlen = max(q.shape[3], v.shape[3]), problem.k.shape[2]
    return tables.lookup(target_of(q.device), kernel, name_of(q.dtype), head_dim, seqlen, problem.spec.causal)


def forward(problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    """(o, lse) of a Problem from the backend that serves it."""
    p = problem
    call = (p.q, p.k, p.v, p.mods, p.spec, p.scale, p.q_offset)
    if choose(p.backend, p.q.device, p.q.dtype) == "torch":
        return fallback.forward(*call)
    from .kernels import forward as kernels

    return kernels.forward(*call, tuned(p, "forward").config)


def backward(
    problem: Problem,
    do: torch.Tensor,
    dlse: torch.Tensor | None,
    o: torch.Tensor,
    lse: torch.Tensor,
    needs: tuple[bool, bool, bool],
) -> Gradients:
    """The wanted gradients of q, k and v from the backend that serves a Problem."""
    p = problem
    call = (do, dlse, p.q, p.k, p.v, o, lse, p.mods, p.spec, p.scale, p.q_offset)
    if choose(p.backend, p.q.device, p.q.dtype) == "torch":
        return fallback.backward(*call, needs)
    from .kernels import backward as kernels

    configs = Configs(*(tuned(p, kernel).config for kernel in KERNELS))
    return kernels.backward(*call, configs, needs)


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
        version, torch, triton (versions), device, head_dim (the range served), backends {name: "served" or why not, for
        the dtype of q or float16} and, with q, backend (the one that would run) and configs {kernel: {config, reason}},
        empty for the torch backend, which has no tiles.
    """
    device = q.device if q is not None else torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float16 if q is None else q.dtype
    found: dict[str, Any] = {
        "version": __version__,
        "torch": torch.__version__,
        "triton": None if triton_version() is None else version("triton"),
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "head_dim": f"1 to {MAX_HEAD_DIM}",
        "backends": {name: reason or "served" for name, reason in refusals(device, dtype).items()},
    }
    if q is not None:
        k = q if k is None else k
        problem = Problem.of(q, k, k if v is None else v, **keywords)
        found["backend"] = choose(problem.backend, problem.q.device, problem.q.dtype)
        choices = {} if found["backend"] == "torch" else {kernel: tuned(problem, kernel) for kernel in KERNELS}
        found["configs"] = {kernel: choice._asdict() for kernel, choice in choices.items()}
    else:
        found["backend"] = choose("auto", device, dtype)
    return found
