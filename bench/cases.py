"""What is measured: attention shapes of published models, each with its source, and the field's standard sweep.

    forward FLOPs = 2 * batch * heads * visible * (head_dim + head_dim_v)

where `visible` counts the (query, key) pairs that the mask lets through, exactly. As everywhere in the field the
backward counts as 2.5 forwards (five matrix products to two), whatever an implementation recomputes.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from itertools import product

import torch
from torch import Tensor

from bench.features import FEATURES, Feature, Reach, everything, find

PASSES = ("forward", "backward", "both")
ROWS_AT_ONCE = 1024  # queries whose visible pairs are counted in one piece
CPU_CURVE = "the curve of Dao 2023 (arXiv 2307.08691), section 4.1, at batch 1 and hidden size 512"
FORWARDS = {"forward": 1.0, "backward": 2.5, "both": 3.5}
DECODE_CACHES = ("dense", "paged 16", "fp8", "paged 256")  # pages of so many keys; float8_e4m3fn with a scale a head


@dataclass(frozen=True)
class Case:
    """One attention shape.

    Args:
        name: what tables and pictures call it; unique in a suite.
        source: the paper, configuration or benchmark the shape comes from.
        batch: sequences.
        heads: query heads.
        heads_k: key and value heads, a divisor of heads.
        seqlen_q: queries in a sequence.
        seqlen_k: keys in a sequence.
        head_dim: width of a query and of a key.
        head_dim_v: width of a value.
        causal: query i sees key j when j <= i + seqlen_k - seqlen_q.
        dtype: "float32", "bfloat16" or "float16", of the error suite "float64" as well.
        series: "sweep" for a point on a curve over sequence length, "model" for a published model's shape, "feature"
            for one shape with a feature, "long" for a point on a curve of a feature over long sequences, "decode" for a
            new token against a cache, "error" for one whose errors are measured, "cold" for first calls.
        feature: what bench.features.find takes, such as "window 1024"; "" = none.
        cache: how the keys of decoding are held, one of DECODE_CACHES; "" = not decoding.
    """

    name: str
    source: str
    batch: int
    heads: int
    heads_k: int
    seqlen_q: int
    seqlen_k: int
    head_dim: int
    head_dim_v: int
    causal: bool
    dtype: str
    series: str
    feature: str = ""
    cache: str = ""

    @property
    def group(self) -> int:
        """Query heads that share one key head."""
        return self.heads // self.heads_k

    @property
    def traits(self) -> Feature:
        """What the case's feature is."""
        return find(self.feature)[1]

    @property
    def size(self) -> int:
        """The size that goes with the feature; 0 where it has none."""
        return find(self.feature)[2]

    @property
    def label(self) -> str:
        """The feature as charts of features name it."""
        return self.feature or ("causal" if self.causal else "plain")


def passes_of(case: Case, device: torch.device) -> tuple[str, ...]:
    """The passes that are timed: of features forward and training step; of decoding, and of `long` on a CPU, one."""
    if case.series == "decode" or (case.series == "long" and device.type == "cpu"):
        return ("forward",)
    return ("forward", "both") if case.series in ("feature", "long") else PASSES


def reach(case: Case) -> Reach | None:
    """The first key each query sees and one past its last, int64 [seqlen_q]; None where they are no single run."""
    if case.traits.visible is not None:
        return None
    begin, end = (case.traits.reach or everything)(case.seqlen_q, case.seqlen_k, case.size)
    if case.causal:
        end = torch.minimum(end, torch.arange(case.seqlen_q) + (case.seqlen_k - case.seqlen_q + 1))
    return begin, torch.maximum(begin, end)


def visible(case: Case, rows: range, cols: range, device: torch.device) -> Tensor:
    """bool [rows, cols], True where a query of `rows` sees a key of `cols`."""
    i = torch.arange(rows.start, rows.stop, device=device)[:, None]
    j = torch.arange(cols.start, cols.stop, device=device)[None, :]
    if found := reach(case):
        begin, end = (x[rows.start : rows.stop, None].to(device) for x in found)
        return (j >= begin) & (j < end)
    assert case.traits.visible is not None
    seen = case.traits.visible(i, j, case.size)
    return seen & (j <= i + (case.seqlen_k - case.seqlen_q)) if case.causal else seen


@cache
def visible_pairs(case: Case) -> int:
    """(query, key) pairs of one head of one sequence that the mask lets through."""
    if found := reach(case):
        return int((found[1] - found[0]).sum())
    starts = range(0, case.seqlen_q, ROWS_AT_ONCE)
    pieces = (range(start, min(start + ROWS_AT_ONCE, case.seqlen_q)) for start in starts)
    return sum(int(visible(case, rows, range(case.seqlen_k), torch.device("cpu")).sum()) for rows in pieces)


def flops(case: Case, what: str) -> float:
    """Floating point operations of a pass ("forward", "backward", "both")."""
    forward = 2 * case.batch * case.heads * visible_pairs(case) * (case.head_dim + case.head_dim_v)
    return FORWARDS[what] * forward


def score_bytes(case: Case) -> int:
    """Bytes of one matrix of scores of every head, which standard attention holds several of."""
    itemsize: int = getattr(torch, case.dtype).itemsize
    return case.batch * case.heads * case.seqlen_q * case.seqlen_k * itemsize


def inputs(case: Case, device: torch.device, seed: int) -> tuple[Tensor, ...]:
    """Standard normal q, k, v that require grad, the feature's operand if it has one, and do, the gradient of o."""
    generator = torch.Generator(device).manual_seed(seed)
    feature = case.traits

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=getattr(torch, case.dtype))

    def tokens(heads: int, seqlen: int, head_dim: int) -> Tensor:
        if feature.packed:
            return normal(case.batch, seqlen, heads, head_dim).transpose(1, 2)
        return normal(case.batch, heads, seqlen, head_dim)

    q = tokens(case.heads, case.seqlen_q, case.head_dim).requires_grad_()
    k = tokens(case.heads_k, case.seqlen_k, case.head_dim).requires_grad_()
    v = tokens(case.heads_k, case.seqlen_k, case.head_dim_v).requires_grad_()
    do = tokens(case.heads, case.seqlen_q, case.head_dim_v)
    if feature.shape is None:
        return q, k, v, do
    operand = normal(*feature.shape(case.batch, case.heads, case.seqlen_q, case.seqlen_k))
    return q, k, v, operand.requires_grad_(feature.learned), do


def square(
    name: str, source: str, heads: int, seqlen: int, head_dim: int, causal: bool, *,
    batch: int, dtype: str, heads_k: int | None = None, head_dim_v: int | None = None, series: str = "model",
) -> Case:  # fmt: skip
    """A case of self-attention: as many queries as keys."""
    heads_k, head_dim_v = heads_k or heads, head_dim_v or head_dim
    return Case(name, source, batch, heads, heads_k, seqlen, seqlen, head_dim, head_dim_v, causal, dtype, series)


def sweep(
    source: str, dtype: str, tokens: int | None, hidden: int, head_dims: tuple[int, ...], seqlens: tuple[int, ...]
) -> list[Case]:
    """Curves over sequence length: every head_dim, causal and full, with hidden // head_dim heads.

    Args:
        source: as in Case.
        dtype: as in Case.
        tokens: tokens of a batch, so that batch = tokens // seqlen; None = batch 1.
        hidden: heads * head_dim.
        head_dims: one curve each.
        seqlens: points of a curve.
    """
    return [
        square(
            f"d{head_dim} {'causal' if causal else 'full'} {seqlen}",
            source, hidden // head_dim, seqlen, head_dim, causal,
            batch=1 if tokens is None else max(tokens // seqlen, 1), dtype=dtype, series="sweep",
        )
        for seqlen in seqlens
        for head_dim in head_dims
        for causal in (False, True)
    ]  # fmt: skip


def standard_sweep(dtype: str = "bfloat16") -> list[Case]:
    """16k tokens and hidden size 2048, as in Dao 2023, Figures 4 to 6, and in FlashAttention-3's benchmarks."""
    source = "Dao 2023 (arXiv 2307.08691), section 4.1: 16k tokens, hidden size 2048"
    return sweep(source, dtype, 16384, 2048, (64, 128, 256), (512, 1024, 2048, 4096, 8192, 16384))


def models(dtype: str = "bfloat16") -> list[Case]:
    """Published models at the lengths they are trained or run with."""
    vit = "Dosovitskiy et al. 2021 (arXiv 2010.11929), Table 1, 224 px and the class token: "
    llama = "huggingface.co/meta-llama/Meta-Llama-3-8B, config.json: 32 heads, 8 of keys, head_dim 128, 8192 tokens"
    sdxl = "huggingface.co/stabilityai/stable-diffusion-xl-base-1.0, unet/config.json: 10 heads of 640 channels"
    return [
        square("GPT-2", "Radford et al. 2019: huggingface.co/openai-community/gpt2, config.json: 12 heads, 1024 tokens",
               12, 1024, 64, True, batch=16, dtype=dtype),
        square("BERT-base", "Devlin et al. 2019 (arXiv 1810.04805): 12 heads, hidden 768, 512",
               12, 512, 64, False, batch=32, dtype=dtype),
        square("ViT-B/16", vit + "12 heads, hidden 768",
               12, 197, 64, False, batch=128, dtype=dtype),
        square("ViT-H/14", vit + "16 heads, hidden 1280",
               16, 257, 80, False, batch=64, dtype=dtype),
        square("SigLIP-So400m/14",
               "huggingface.co/google/siglip-so400m-patch14-384, config.json: 16 heads, hidden 1152",
               16, 729, 72, False, batch=32, dtype=dtype),
        square("Llama-3-8B", llama, 32, 8192, 128, True, batch=1, dtype=dtype, heads_k=8),
        Case("Llama-3-8B chunk", llama + "; 1024 new tokens after 7168",
             1, 32, 8, 1024, 8192, 128, 128, True, dtype, "model"),
        square("Gemma-2B", "Gemma Team 2024 (arXiv 2403.08295), Table 1: 8 heads, 1 of keys, head size 256, 8192",
               8, 8192, 256, True, batch=2, dtype=dtype, heads_k=1),
        square("Phi-2", "huggingface.co/microsoft/phi-2, config.json: 32 heads, hidden 2560, 2048 tokens",
               32, 2048, 80, True, batch=4, dtype=dtype),
        square("DeepSeek-V3 prefill",
               "DeepSeek-AI 2024 (arXiv 2412.19437), section 4.2: 128 heads of 128 + 64, values 128",
               128, 4096, 192, True, batch=1, dtype=dtype, head_dim_v=128),
        square("SDXL self", sdxl + ", 64 x 64 positions", 10, 4096, 64, False, batch=4, dtype=dtype),
        Case("SDXL cross", sdxl + ", 77 tokens of text", 4, 10, 10, 4096, 77, 64, 64, False, dtype, "model"),
        Case("Whisper cross",
             "Radford et al. 2022 (arXiv 2212.04356): large, 20 heads, 448 tokens of text, 1500 frames",
             8, 20, 20, 448, 1500, 64, 64, False, dtype, "model"),
    ]  # fmt: skip


def small_models() -> list[Case]:
    """The models' shapes at batch 1 in float32, the long ones shortened, the wide ones with a quarter of the heads."""
    small = {case.name: replace(case, batch=1, dtype="float32") for case in models()}
    llama = replace(small["Llama-3-8B"], name="Llama-3-8B /4", heads=8, heads_k=2, seqlen_q=1024, seqlen_k=1024)
    return [
        *(small[name] for name in ("GPT-2", "BERT-base", "ViT-B/16", "ViT-H/14", "SigLIP-So400m/14", "Whisper cross")),
        llama,
        replace(llama, name="Llama-3-8B /4 chunk", seqlen_q=128),
        replace(small["Gemma-2B"], name="Gemma-2B /4", heads=2, seqlen_q=1024, seqlen_k=1024),
        replace(small["Phi-2"], name="Phi-2 /4", heads=8, heads_k=8, seqlen_q=1024, seqlen_k=1024),
        replace(small["DeepSeek-V3 prefill"], name="DeepSeek-V3 /32", heads=4, heads_k=4, seqlen_q=512, seqlen_k=512),
    ]


def cpu() -> list[Case]:
    """What two cores can measure in minutes: float32, batch 1, hidden size 512, and the models' shapes made small.

    What takes longest comes last, so that a slow machine still has a curve and every shape.
    """
    narrow, wide, long = (
        sweep(CPU_CURVE, "float32", None, 512, (head_dim,), seqlens)
        for head_dim, seqlens in ((64, (512, 1024)), (128, (512, 1024)), (64, (2048, 4096)))
    )
    return narrow + wide + small_models() + long


def features(device: torch.device, dtype: str, quick: bool = False) -> list[Case]:
    """One shape with nothing, with a causal mask, and with each feature of bench.features."""
    head_dims: tuple[int, ...] = (64, 128)
    if device.type == "cuda":
        batch, heads, seqlen = 4, 16, 4096
    else:
        batch, heads, seqlen, head_dims, dtype = 1, 8, 4096, (64,), "float32"
    heads, seqlen, head_dims = (2, 128, (16,)) if quick else (heads, seqlen, head_dims)
    sized = ("window", "document", "block mask", "varlen")
    named = [(f"{name} {seqlen // 8}" if name in sized else name, False) for name in FEATURES]
    named.insert(1, ("", True))
    cases = []
    for head_dim in head_dims:
        source = f"our own choice: one shape for every feature, batch {batch}, {heads} heads, {seqlen} tokens"
        for feature, causal in named:
            case = square("", source, heads, seqlen, head_dim, causal, batch=batch, dtype=dtype, series="feature")
            case = replace(case, feature=feature)
            cases.append(replace(case, name=f"d{head_dim} {case.label}"))
    return cases


def long(device: torch.device, dtype: str, quick: bool = False) -> list[Case]:
    """Curves over long sequences whose queries see few keys: a sliding window, and documents packed in one row.

    The longest come last, so that a slow machine still has a curve.
    """
    if device.type == "cuda":
        heads, head_dim, lengths = 16, 128, tuple(2**power for power in range(12, 19))
    else:
        heads, head_dim, lengths, dtype = 8, 64, (2048, 4096, 8192, 16384), "float32"
    heads, head_dim, lengths = (2, 16, (64, 128)) if quick else (heads, head_dim, lengths)
    mistral = "Jiang et al. 2023 (arXiv 2310.06825): causal sliding window, here of 1024 keys"
    packing = "documents of 1024 to 4096 tokens in one causal row, as in Llama 3 (arXiv 2407.21783), section 3.2"
    sources = {"window 1024": mistral, "document 2048": packing}
    if quick:
        sources = {"window 16": mistral, "document 32": packing}
    cases = []
    for seqlen in lengths:
        for feature, source in sources.items():
            name = f"{feature}, length {seqlen}"
            case = square(name, source, heads, seqlen, head_dim, True, batch=1, dtype=dtype, series="long")
            cases.append(replace(case, feature=feature))
    return cases


def speed(device: torch.device, dtype: str, quick: bool = False) -> list[Case]:
    """The race against the best there is, what matters most first: where time runs out, the rest is for the next call.

    The field's sweep as far as 32k, 32 heads that share 8 of keys, and Llama-3-8B; elsewhere than on a GPU a few small
    shapes, to see that it works.
    """
    grouped: tuple[int, ...]
    shared = "our own choice: the sweep's 16k tokens with Llama 3's 32 heads and 8 of keys"
    if device.type == "cuda" and not quick:
        field = "Dao 2023 (arXiv 2307.08691), section 4.1: 16k tokens, hidden size 2048"
        found = sweep(field, dtype, 16384, 2048, (64, 128, 256), (512, 1024, 2048, 4096, 8192, 16384, 32768))
        grouped, heads, tokens = (4096, 8192, 16384), 32, 16384
        found += [case for case in models(dtype) if case.name == "Llama-3-8B"]
    else:
        dtype = dtype if device.type == "cuda" else "float32"
        head_dims, grouped = ((64,), (128,)) if quick else ((64, 128), (512,))
        found = sweep(CPU_CURVE, dtype, None, 512, head_dims, (128, 256) if quick else (512, 1024))
        heads, tokens = 8, 0
    for seqlen in grouped:
        for causal in (False, True):
            name, batch = f"gqa d128 {'causal' if causal else 'full'} {seqlen}", max(tokens // seqlen, 1)
            found.append(square(name, shared, heads, seqlen, 128, causal, batch=batch, dtype=dtype, heads_k=heads // 4))
    return sorted(found, key=importance)


def importance(case: Case) -> tuple[int, int]:
    """Where a case stands in line: head_dim 128 at 8k, 4k and 16k, other heads there, then the other lengths."""
    lengths = (8192, 4096, 16384, 2048, 1024, 512, 32768)
    place = lengths.index(case.seqlen_k) if case.seqlen_k in lengths else len(lengths)
    if place >= 3:
        return 2, place
    return int(case.head_dim != 128 or case.group > 1), place


def decode(device: torch.device, dtype: str, quick: bool = False) -> list[Case]:
    """One new token of each sequence against the keys it has, what matters most first: a diagonal through the grid.

    There are always as many key heads, so that every group of query heads reads the same bytes.
    """
    batches: tuple[int, ...] = (16, 1, 64, 4)
    lengths: tuple[int, ...] = (32768, 131072, 4096, 16384, 65536)
    heads_k, head_dim = 8, 128
    if device.type != "cuda":
        batches, lengths, heads_k, dtype = (1, 4), (2048, 8192, 512), 2, "float32"
    if quick:
        batches, lengths, heads_k, head_dim = (2,), (64, 128), 2, 16
    groups = {
        4: "Llama 3 8B: 32 heads, 8 of keys",
        8: "Llama 3 70B: 64 heads, 8 of keys",
        1: "Llama 2 7B: 32 heads, each with its own keys",
    }
    found: list[tuple[tuple[int, int], Case]] = []
    for (i, held), (j, group), (m, batch), (n, seqlen) in product(
        enumerate(DECODE_CACHES), enumerate(groups), enumerate(batches), enumerate(lengths)
    ):
        source = f"our own grid of batch and keys, {heads_k} key heads of {head_dim}, grouped as in {groups[group]}"
        case = Case(f"b{batch} k{seqlen} gqa{group} {held}", source, batch, group * heads_k, heads_k, 1, seqlen,
                    head_dim, head_dim, True, dtype, "decode", cache=held)  # fmt: skip
        found.append(((i + j, m + n), case))
    return [case for _, case in sorted(found, key=lambda each: each[0])]


def memory(device: torch.device) -> list[Case]:
    """Where peak memory is measured on a CPU, a fresh process each: the timed curve, full, and twice as far."""
    curve = sweep(CPU_CURVE, "float32", None, 512, (64,), (512, 1024, 2048, 4096, 8192))
    # Longest first: where time runs out, the short ones say least.
    return [] if device.type == "cuda" else [case for case in reversed(curve) if not case.causal]


def quick() -> list[Case]:
    """Seconds, not minutes: every kind of shape once, to see that the harness works."""
    vit, whisper = small_models()[2], small_models()[5]
    return sweep(CPU_CURVE, "float32", None, 512, (64,), (128, 256)) + [vit, whisper]


def suite(name: str, device: torch.device, dtype: str = "bfloat16", small: bool = False) -> list[Case]:
    """The cases of a suite, or of the feature suites small ones, to see that the harness works.

    "cpu", "sweep", "models", "all" (sweep and models), "quick", "features", "long", "speed", "decode", or "auto" (cpu
    or all).
    """
    if name == "auto":
        name = "all" if device.type == "cuda" else "cpu"
    made: dict[str, Callable[[], list[Case]]] = {
        "cpu": cpu,
        "quick": quick,
        "sweep": lambda: standard_sweep(dtype),
        "models": lambda: models(dtype),
        "all": lambda: standard_sweep(dtype) + models(dtype),
        "features": lambda: features(device, dtype, small),
        "long": lambda: long(device, dtype, small),
        "speed": lambda: speed(device, dtype, small),
        "decode": lambda: decode(device, dtype, small),
    }
    if name not in made:
        raise ValueError(f"suite must be one of auto, {', '.join(made)}, got {name}")
    return made[name]()
