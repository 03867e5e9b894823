"""One candidate on this machine: is it right, and how long does it take?

Right is checked first, on a call with full, partial and ragged tiles: the error against the float64 oracle may be twice
that of standard attention in the same dtype, and no more. Only then is the clock started, on 16k tokens of width 2048.

A backward pass computes delta once, for dkdv and dq alike. Its time counts with dq, whose tiles it is cut by, so that
the times of the two add up to one pass.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from flash import reference
from flash.kernels.spec import Config, Configs, Gradients, Mods, Positions, Spec

from .tables import HOPPER, KERNELS, lookup

TOKENS = 16384
WIDTH = 2048  # heads * head_dim
FORWARDS = ("forward", "hopper_forward")
IN_PLACE_OF = {"hopper_forward": "forward", "hopper_backward": "dkdv"}  # whose member of Configs it reads
Clock = Callable[[Callable[[], Any]], tuple[float, float, float]]


class Job(NamedTuple):
    """A candidate and the calls it is tried on.

    Args:
        target: what the machine compiles for, "cuda:90".
        kernel: "forward", "dkdv" or "dq", or a kernel of tables.HOPPER.
        dtype: name of a floating dtype.
        head_dim: 1 to 512.
        ragged: whether the row is for calls whose head_dim is no multiple of 16.
        causal: whether it is tried on causal calls.
        seqlen: of the timed call.
        config: the tiles.
    """

    target: str
    kernel: str
    dtype: str
    head_dim: int
    ragged: bool | None
    causal: bool
    seqlen: int
    config: Config


class Call(NamedTuple):
    """Inputs of a kernel call."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    do: torch.Tensor
    causal: bool


def run(job: Job) -> dict[str, Any]:
    """Check and time a candidate on the GPU.

    Args:
        job: the candidate.

    Returns:
        {"status": "ok", "ms": median, "low", "high": quartiles} in milliseconds, or {"status": "wrong", "note": where}.
    """
    device = torch.device("cuda")
    fault = check(job, device)
    if fault is not None:
        return {"status": "wrong", "note": fault}
    ms, low, high = time(job, device, bench)
    return {"status": "ok", "ms": ms, "low": low, "high": high}


def answer(job: Any) -> dict[str, Any]:
    """Do next to nothing on the GPU, to see that it is there; takes no job."""
    torch.zeros(1, device="cuda").item()
    return {"status": "ok", "note": ""}


def bench(call: Callable[[], Any]) -> tuple[float, float, float]:
    """(median, lower, upper quartile) of a call's milliseconds, L2 cache cold; once more where they lie 5 % apart."""
    from triton.testing import do_bench

    quantiles = [0.5, 0.25, 0.75]
    ms, low, high = do_bench(call, warmup=25, rep=100, quantiles=quantiles)
    if high - low > 0.05 * ms:
        ms, low, high = do_bench(call, warmup=50, rep=300, quantiles=quantiles)
    return ms, low, high


def check(job: Job, device: torch.device) -> str | None:
    """What a candidate gets wrong, in words, or None.

    Args:
        job: the candidate.
        device: where the kernel runs.

    Returns:
        The name of the first output that is too far from the oracle, with both errors.
    """
    longest = 2 * max(job.config.block_m, job.config.block_n)
    call = _inputs(job, 1, 4, 2, longest + 21, longest + 37, device)
    found = outputs(job, call)
    wanted, plain = _differentiated(call, torch.float64), _differentiated(call, call.q.dtype)
    acc = torch.float64 if call.q.dtype == torch.float64 else torch.float32
    largest = max(float(x.abs().max()) for x in call[:4])
    for name, got in found.items():
        want = wanted[name]
        error, allowed = _rms(got.double() - want), 2 * _rms(plain[name].double() - want)
        allowed += 8 * torch.finfo(acc).eps * max(largest, float(want.abs().max()))
        if not error <= allowed:  # NaN is no pass
            return f"{name} has an rms error of {error:.3g}, {allowed:.3g} is allowed"
    return None


def time(job: Job, device: torch.device, clock: Clock) -> tuple[float, float, float]:
    """Time a candidate.

    Args:
        job: the candidate.
        device: where the kernel runs.
        clock: takes a call without arguments; returns (median, lower, upper quartile) in milliseconds.

    Returns:
        What the clock says; of dkdv, less what delta takes.

    Raises:
        ArithmeticError: dkdv took no longer with delta than delta alone.
    """
    heads = max(1, WIDTH // job.head_dim)
    call = _inputs(job, max(1, TOKENS // job.seqlen), heads, heads, job.seqlen, job.seqlen, device)
    forward, backward = _kernels(job, call)
    if job.kernel in FORWARDS:
        return clock(forward)
    o, lse = forward()
    ms, low, high = clock(lambda: backward(o, lse, needs_of(job.kernel)))
    if job.kernel != "dkdv":
        return ms, low, high
    delta, _, _ = clock(lambda: backward(o, lse, Gradients(False, False, False)))
    if delta >= ms:
        raise ArithmeticError(f"delta takes {delta:.3g} ms alone, and {ms:.3g} ms with dkdv")
    return ms - delta, low - delta, high - delta


def needs_of(kernel: str) -> Gradients:
    """The gradients that a kernel of the backward pass computes."""
    every = kernel == "hopper_backward"
    return Gradients(every or kernel == "dq", *[every or kernel == "dkdv"] * 2)


def outputs(job: Job, call: Call) -> dict[str, torch.Tensor]:
    """What the kernel of a job computes, by name."""
    forward, backward = _kernels(job, call)
    o, lse = forward()
    if job.kernel in FORWARDS:
        return {"o": o, "lse": lse}
    found = backward(o, lse, needs_of(job.kernel))
    return {f"d{name}": x for name, x in found._asdict().items() if x is not None}


def _kernels(job: Job, call: Call) -> tuple[Callable[[], Any], Callable[[torch.Tensor, torch.Tensor, Gradients], Any]]:
    """The forward pass, and the backward pass for the gradients that are asked of it."""
    forward, backward = implementations(job.kernel)
    precision = "tf32x3" if job.dtype == "float32" and job.target.startswith("cuda:") else "ieee"
    spec, scale = Spec(causal=job.causal, precision=precision), job.head_dim**-0.5
    positions = Positions(q_offset=call.k.shape[2] - call.q.shape[2])
    others = {k: lookup(job.target, k, job.dtype, job.head_dim, job.seqlen, job.causal).config for k in KERNELS}
    configs = Configs(**{**others, IN_PLACE_OF.get(job.kernel, job.kernel): job.config})
    q, k, v, do, _ = call

    def run_forward() -> Any:
        return forward(q, k, v, Mods(), spec, scale, positions, configs.forward)

    def run_backward(o: torch.Tensor, lse: torch.Tensor, needs: Gradients) -> Any:
        return backward(do, None, q, k, v, o, lse, Mods(), spec, scale, positions, configs, needs)

    return run_forward, run_backward


def implementations(kernel: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The forward and the backward that a kernel is part of."""
    from flash.kernels import backward, forward

    if kernel not in HOPPER:
        return forward.forward, backward.backward
    from flash.kernels import hopper_backward, hopper_forward

    if kernel == "hopper_forward":
        return hopper_forward.forward, backward.backward
    return forward.forward, hopper_backward.backward


def _inputs(job: Job, batch: int, heads: int, heads_k: int, seqlen_q: int, seqlen_k: int, device: torch.device) -> Call:
    generator = torch.Generator(device).manual_seed(0)
    dtype = getattr(torch, job.dtype)

    def draw(heads: int, seqlen: int) -> torch.Tensor:
        shape = (batch, heads, seqlen, job.head_dim)
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(dtype)

    q, k, v, do = (
        draw(h, n) for h, n in ((heads, seqlen_q), (heads_k, seqlen_k), (heads_k, seqlen_k), (heads, seqlen_q))
    )
    return Call(q, k, v, do, job.causal)


def _differentiated(call: Call, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Outputs and gradients of the oracle (float64), or of standard attention in another dtype."""
    q, k, v = (x.detach().to(dtype).requires_grad_() for x in call[:3])
    if dtype == torch.float64:
        o, lse = reference.attention(q, k, v, causal=call.causal, return_lse=True)
    else:
        o, lse = _standard(q, k, v, call.causal)
    dq, dk, dv = torch.autograd.grad(o, (q, k, v), call.do.to(dtype))
    return {"o": o.detach(), "lse": lse.detach(), "dq": dq, "dk": dk, "dv": dv}


def _standard(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> tuple[torch.Tensor, torch.Tensor]:
    group, seqlen_q, seqlen_k = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]
    s = q @ k.repeat_interleave(group, 1).mT * q.shape[3] ** -0.5
    if causal:
        hidden = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool, device=q.device).triu(seqlen_k - seqlen_q + 1)
        s = s.masked_fill(hidden, float("-inf"))
    return s.softmax(-1) @ v.repeat_interleave(group, 1), s.float().logsumexp(-1)


def _rms(x: torch.Tensor) -> float:
    """Root of the mean square; NaN where x has one."""
    return math.sqrt(float(x.double().square().mean()))
