"""How far results are from float64: o, lse, dq, dk and dv of ours and of every peer on this device.

    python -m bench.run --suite error                      # error.json, error.md and error.png
    TRITON_INTERPRET=1 python -m bench.run --suite error   # without a GPU: the kernels as well, interpreted

    e = x - oracle      rms(e), max |e|, rms(e) / rms(oracle): median, 20th and 80th percentile over seeds

Inputs are made in the tested dtype and then upcast for the oracle, flash.reference, so that both see the same numbers.
On a CPU "flash" is the torch backend, on a GPU the kernels. In float64 the oracle is no better than what it judges: an
error there is how far two roundings are apart.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench import check
from bench import record as records
from bench.cases import Case, inputs, square
from bench.flex import flex_blocks
from bench.measure import passes, quantiles
from bench.peers import FLEX, HOPPER, OURS, PEERS, PLAIN, SDPA, STANDARD, Peer, seen
from bench.record import Row
from bench.trial import failure

OUTPUTS = ("o", "lse", "dq", "dk", "dv")
DTYPES = ("float16", "bfloat16", "float32", "float64")
SEEDS = 5
INTERPRETED = 128  # keys: an interpreted kernel takes time for each tile of its scores
LOGITS = 8.0
RARE, FAR = 1e-3, 10.0

Draw = Callable[[Tensor, torch.Generator], Tensor]


class Setting(NamedTuple):
    """A case, and what becomes of the standard normal numbers of its q, k and v, in float32."""

    case: Case
    draw: tuple[Draw, Draw, Draw]


def normal(x: Tensor, generator: torch.Generator) -> Tensor:
    """N(0, 1): scores of about one."""
    return x


def large(x: Tensor, generator: torch.Generator) -> Tensor:
    """Of q and of k: scores LOGITS times as large."""
    return LOGITS**0.5 * x


def outliers(x: Tensor, generator: torch.Generator) -> Tensor:
    """N(0, 1) + N(0, 100) in one number of a thousand: Shah et al. 2024 (arXiv 2407.08608), section 4.3."""
    far = torch.randn(x.shape, generator=generator, device=x.device)
    rare = torch.rand(x.shape, generator=generator, device=x.device) < RARE
    return x + FAR * rare * far


def settings(quick: bool = False) -> list[Setting]:
    """What is measured: one shape and what is changed of it, one thing at a time, in every dtype."""
    length, head_dim = (40, 16) if quick else (128, 64)
    source = "our own choice: batch 1, 2 heads, standard normal numbers, and one thing changed at a time"
    plain, far = (normal, normal, normal), (outliers, outliers, outliers)
    shapes = {  # name: (draw, length, head_dim, causal)
        "normal": (plain, length, head_dim, False),
        "causal": (plain, length, head_dim, True),
        f"head_dim {2 * head_dim}": (plain, length, 2 * head_dim, False),
        f"scores x{LOGITS:g}": ((large, large, normal), length, head_dim, False),
        "outliers": (far, length, head_dim, False),
        "causal 1024": (plain, 1024, head_dim, True),
        "causal 4096": (plain, 4096, head_dim, True),
    }
    chosen = list(shapes)[:2] if quick else list(shapes)
    return [
        Setting(square(f"{dtype} {name}", source, 2, seqlen, wide, causal, batch=1, dtype=dtype, series="error"), draw)
        for dtype in (DTYPES[1:3] if quick else DTYPES)
        for name, (draw, seqlen, wide, causal) in shapes.items()
        if name in chosen
    ]


def tensors_of(setting: Setting, device: torch.device, seed: int) -> tuple[Tensor, ...]:
    """q, k, v that require grad, and do, in the case's dtype."""
    generator = torch.Generator(device).manual_seed(seed)
    *normals, do = inputs(replace(setting.case, dtype="float32"), device, seed)
    dtype = getattr(torch, setting.case.dtype)
    drawn = (draw(x.detach(), generator) for draw, x in zip(setting.draw, normals, strict=True))
    return (*(x.to(dtype).requires_grad_() for x in drawn), do.to(dtype))


def oracle(case: Case, tensors: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """OUTPUTS in float64 of a case of batch 1, a head at a time."""
    from flash.reference import attention

    heads = []
    for part in (check.Part(0, h) for h in range(case.heads_k)):
        q, k, v = (check.pick(case, x.detach(), part).double() for x in tensors[:3])
        _, lse = attention(q, k, v, causal=case.causal, return_lse=True)
        heads.append(check.oracle(case, part, tensors) | {"lse": lse})
    return {name: torch.cat([head[name] for head in heads], 1) for name in OUTPUTS}


def standard_lse(case: Case, device: torch.device) -> Callable[..., Tensor]:
    """log sum exp of the scores, in the case's dtype as standard attention holds them."""
    visible = seen(case, device)

    def lse(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = (q * q.shape[-1] ** -0.5) @ k.mT
        return torch.logsumexp(s if visible is None else s.masked_fill(~visible, float("-inf")), -1)

    return lse


def our_lse(case: Case, device: torch.device, backend: str = "auto") -> Callable[..., Tensor]:
    """The lse that flash_attention returns."""
    from flash.attention import flash_attention

    return lambda q, k, v: flash_attention(q, k, v, causal=case.causal, backend=backend, return_lse=True)[1]


def flex_lse(case: Case, device: torch.device) -> Callable[..., Tensor]:
    """The lse that compiled FlexAttention returns."""
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    compiled: Any = torch.compile(flex_attention, dynamic=False)
    told: dict[str, Any] = {"block_mask": flex_blocks(case, device), "return_aux": AuxRequest(lse=True)}
    return lambda q, k, v: compiled(q.detach(), k.detach(), v.detach(), **told)[1].lse


LSE: dict[str, Callable[[Case, torch.device], Callable[..., Tensor]]] = {
    STANDARD: standard_lse,
    OURS: our_lse,
    PLAIN: partial(our_lse, backend="triton"),
    HOPPER: partial(our_lse, backend="hopper"),
    FLEX: flex_lse,
}


def absent(case: Case, peer: Peer, device: torch.device) -> str | None:
    """The reason why a peer is not measured on a case, None where it is."""
    from flash.dispatch import interpreted

    if peer.name == PLAIN and device.type == "cpu" and interpreted():
        if case.seqlen_k > INTERPRETED:
            return f"interpreted kernels are run up to {INTERPRETED} keys, for the time they take"
        if case.dtype == "float64":
            return "Triton's interpreter hands kernels a scale in float32, which a GPU gets in float64"
    return peer.absent(case, device)


def distances(found: list[Tensor], wanted: list[Tensor]) -> dict[str, dict[str, float]]:
    """rms, max and relative of errors, one tensor a seed: median, 20th and 80th percentile."""
    errors = [x.detach().double() - want for x, want in zip(found, wanted, strict=True)]
    rms = [float(e.square().mean().sqrt()) for e in errors]
    numbers = {
        "rms": rms,
        "max": [float(e.abs().max()) for e in errors],
        "relative": [own / float(want.square().mean().sqrt()) for own, want in zip(rms, wanted, strict=True)],
    }
    return {name: asdict(quantiles(values)) for name, values in numbers.items()}


def measure(case: Case, peer: Peer, device: torch.device, draws: list[Any], oracles: list[Any]) -> dict[str, Any]:
    """A peer's row on a case: errors of what it returns, and the reason for what it does not.

    draws are tensors_of the case, oracles what they should give, one a seed.
    """
    row: dict[str, Any] = {"case": case.name, "peer": peer.name, "outcome": "ok", "reason": "", "errors": {}}
    row["without"] = {}
    if reason := absent(case, peer, device):
        return row | {"outcome": "absent", "reason": reason}

    def each(names: Sequence[str], call: Callable[..., Sequence[Tensor]]) -> None:
        try:
            results = [call(*tensors) for tensors in draws]
        except Exception as error:  # whatever a peer raises is its result, and is written down
            reason = failure(Row(case.name, peer.name, ""), error).reason
            row["without"] |= dict.fromkeys(names, reason)
            return
        for i, name in enumerate(names):
            row["errors"][name] = distances([x[i] for x in results], [x[name] for x in oracles])

    try:
        with peer.prepare(case, device) as attention:
            each(("o",), lambda *x: passes(attention, *x)["forward"]())
            each(("dq", "dk", "dv"), lambda *x: passes(attention, *x)["both"]()[1:])
            if peer.name not in LSE:
                row["without"]["lse"] = "it returns none"
            elif "o" in row["errors"]:
                lse = torch.no_grad()(LSE[peer.name](case, device))
                each(("lse",), lambda q, k, v, do: (lse(q, k, v),))
    except Exception as error:  # of importing or preparing
        failed = failure(Row(case.name, peer.name, ""), error)
        return row | {"outcome": failed.outcome, "reason": failed.reason}
    if not row["errors"]:
        return row | {"outcome": "error", "reason": next(iter(row["without"].values()))}
    finite = all(x["max"]["median"] < float("inf") for x in row["errors"].values())
    return row if finite else row | {"outcome": "wrong", "reason": "NaN or infinite where the oracle is not"}


def measured(
    device: torch.device, wanted: Sequence[Setting], peers: Sequence[Peer], seed: int = 0, seeds: int = SEEDS,
    threads: int = 2,
) -> dict[str, Any]:  # fmt: skip
    """All that is measured, as it is written down."""
    from flash.dispatch import interpreted

    ran = "as this GPU runs them" if device.type == "cuda" else "interpreted" if interpreted() else "not run"
    content: dict[str, Any] = {
        "machine": records.machine(device, threads),
        "settings": {
            "suite": "error",
            "seed": seed,
            "seeds": seeds,
            "statistics": "median, 20th and 80th percentile over seeds",
            "oracle": "flash.reference in float64, of inputs made in the tested dtype",
            "kernels": ran,
            "float32_matmul_precision": torch.get_float32_matmul_precision(),
            "peers": {peer.name: peer.what for peer in peers},
        },
        "cases": [asdict(setting.case) for setting in wanted],
        "rows": [],
    }
    for setting in wanted:
        print(setting.case.name, file=sys.stderr, flush=True)
        draws = [tensors_of(setting, device, seed + i) for i in range(seeds)]
        oracles = [oracle(setting.case, tensors) for tensors in draws]
        content["rows"] += [measure(setting.case, peer, device, draws, oracles) for peer in peers]
    return content


def run(out: Path, device: torch.device, seed: int, threads: int, quick: bool) -> int:
    """Measure, write and draw; 1 where ours raised or is not finite. Quick: short sequences, and two seeds."""
    from bench import error_report

    torch.set_num_threads(threads)
    peers = [peer for name, peer in PEERS.items() if name != SDPA]  # which is one of its own backends
    content = measured(device, settings(quick), peers, seed, 2 if quick else SEEDS, threads)
    unwritten = error_report.write(content, out)
    ours = [row for row in content["rows"] if row["peer"] in (OURS, PLAIN, HOPPER)]
    return int(any(row["outcome"] in ("wrong", "error") for row in ours)) or unwritten
