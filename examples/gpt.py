"""A small decoder in the manner of GPT and Llama, written to be read; its attention is a switch.

    python -m examples.gpt --preset tiny --device cpu

builds a preset, checks that flash and standard attention give the same logits, and prints its size. In your own code:

    model = GPT(PRESETS["small"], attention="flash")
    loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    text = generate(model, tokens, 100)                             # caches that grow by concatenation
    text = generate(model, tokens, 100, pages=Pages(model, 64))     # one cache in pages, appended to in place

It holds no process groups and no device of its own, so it is wrapped as it is: DistributedDataParallel(model), or
fully_shard(block) for each of model.blocks and then fully_shard(model).
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flash
from flash.nn import KeyValueCache, rotary
from flash.paged import Batch, PagedCache


@dataclass(frozen=True)
class Options:
    """What a model is made of. Without rope_base positions are learned, up to max_seqlen of them."""

    layers: int
    width: int
    heads: int
    heads_k: int  # key and value heads, each shared by heads // heads_k query heads
    vocabulary: int = 50304
    max_seqlen: int = 1024
    rope_base: float | None = 10000.0
    dropout: float = 0.0
    config: flash.Config | None = None  # block sizes of the flash forward; None: the tuned ones


PRESETS = {
    "tiny": Options(layers=2, width=128, heads=4, heads_k=2),
    "small": Options(layers=12, width=768, heads=12, heads_k=12),  # GPT-2's sizes
    "medium": Options(layers=24, width=1024, heads=16, heads_k=8, max_seqlen=2048),
    "large": Options(layers=24, width=2048, heads=32, heads_k=8, max_seqlen=4096),
}


def standard(q: Tensor, k: Tensor, v: Tensor, dropout_p: float, config: flash.Config | None) -> Tensor:
    """Attention as it is written in papers: every score is in memory, for the forward and for the backward."""
    group = q.shape[1] // k.shape[1]
    if group > 1:
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = (q * q.shape[-1] ** -0.5) @ k.mT
    future = torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1 + k.shape[2] - q.shape[2])
    return F.dropout(scores.masked_fill(future, float("-inf")).softmax(-1), dropout_p) @ v


def tiled(q: Tensor, k: Tensor, v: Tensor, dropout_p: float, config: flash.Config | None) -> Tensor:
    """The same function, without the scores in memory and without repeated keys."""
    return flash.flash_attention(q, k, v, causal=True, dropout_p=dropout_p, config=config)


ATTENTIONS: dict[str, Callable[..., Tensor]] = {"standard": standard, "flash": tiled}


@dataclass(frozen=True)
class PagedLayer:
    """One block's part of a paged cache, for one step."""

    k: Tensor  # [pages, heads_k, page_size, head_dim]
    v: Tensor
    batch: Batch  # where the step's sequences lie
    cos: Tensor | None  # [positions, head_dim / 2]; None with learned positions
    sin: Tensor | None

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Append k and v, then attend to all keys of each sequence; keys and queries turn by their own positions."""
        return flash.flash_attention_decode(
            q, self.k, self.v, k=k, v=v, rotary_cos=self.cos, rotary_sin=self.sin, **self.batch._asdict()
        )


class Block(nn.Module):
    """Attention, then a two-layer perceptron, each normalised first and added to its input."""

    def __init__(self, options: Options, attention: str) -> None:
        super().__init__()
        self.options, self.attention = options, ATTENTIONS[attention]
        width, self.head_dim = options.width, options.width // options.heads
        self.norm_attention, self.norm_mlp = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv = nn.Linear(width, (options.heads + 2 * options.heads_k) * self.head_dim, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor, cache: KeyValueCache | PagedLayer | None = None) -> Tensor:
        """x [batch, seqlen, width] -> the same shape; with a cache, seqlen positions after those that it holds."""
        o = self.options
        dropout = o.dropout if self.training else 0.0
        # Views, not copies: flash_attention takes any strides.
        heads = self.qkv(self.norm_attention(x)).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        q, k, v = heads.split([o.heads, o.heads_k, o.heads_k], 1)
        if isinstance(cache, PagedLayer):
            y = cache.attend(q, k, v)
        else:
            if o.rope_base is not None:
                start = 0 if cache is None else len(cache)
                q, k = rotary(q, start, o.rope_base), rotary(k, start, o.rope_base)
            if cache is not None:
                k, v = cache.append(k, v)
            y = self.attention(q, k, v, dropout, o.config)
        x = x + F.dropout(self.out(y.transpose(1, 2).flatten(2)), dropout)
        return x + F.dropout(self.down(F.gelu(self.up(self.norm_mlp(x)))), dropout)


class GPT(nn.Module):
    """A decoder-only transformer."""

    def __init__(self, options: Options, attention: str = "flash") -> None:
        super().__init__()
        self.options = options
        self.token = nn.Embedding(options.vocabulary, options.width)
        self.position = nn.Embedding(options.max_seqlen, options.width) if options.rope_base is None else None
        self.blocks = nn.ModuleList(Block(options, attention) for _ in range(options.layers))
        self.norm = nn.RMSNorm(options.width)
        self.head = nn.Linear(options.width, options.vocabulary, bias=False)
        self.head.weight = self.token.weight
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                # what is added to the residual stream keeps its variance at any depth (GPT-2)
                depth = 2 * options.layers if name.endswith(("out.weight", "down.weight")) else 1
                nn.init.normal_(parameter, std=0.02 * depth**-0.5)

    def forward(self, tokens: Tensor, caches: Sequence[KeyValueCache | PagedLayer] | None = None) -> Tensor:
        """tokens [batch, seqlen] -> logits [batch, seqlen, vocabulary]; with caches, one a block, of what follows."""
        x = self.token(tokens)
        if self.position is not None:
            first = None if caches is None else caches[0]
            start = first.batch.cache_seqlens[:, None] if isinstance(first, PagedLayer) else len(first or ())
            x = x + self.position(start + torch.arange(tokens.shape[1], device=tokens.device))
        for i, block in enumerate(self.blocks):
            x = block(x, None if caches is None else caches[i])
        return self.head(self.norm(x))


class Pages:
    """A PagedCache for a model, beside the tables of its rotary positions.

    Args:
        model: whose keys and values it holds.
        pages: how many pages there are, for all sequences together.
        page_size: positions in a page.
    """

    def __init__(self, model: GPT, pages: int, page_size: int = 16) -> None:
        o, like = model.options, model.token.weight
        head_dim = o.width // o.heads
        self.cache = PagedCache(
            pages, page_size, layers=o.layers, heads_k=o.heads_k, head_dim=head_dim, dtype=like.dtype,
            device=like.device,
        )  # fmt: skip
        self.cos = self.sin = None
        if o.rope_base is not None:
            made = dict(dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)
            frequencies = o.rope_base ** (-torch.arange(0, head_dim, 2, **made) / head_dim)
            angles = torch.arange(pages * page_size, **made)[:, None] * frequencies
            self.cos, self.sin = angles.cos(), angles.sin()

    def layers(self, sequences: Sequence[int], new: int) -> list[PagedLayer]:
        """The caches of a step that gives each sequence so many tokens more."""
        batch = self.cache.prepare(sequences, new)
        return [PagedLayer(k, v, batch, self.cos, self.sin) for k, v in zip(self.cache.k, self.cache.v, strict=True)]


@torch.no_grad()
def generate(
    model: GPT, tokens: Tensor, count: int, temperature: float = 0.0, pages: Pages | None = None
) -> Tensor:  # fmt: skip
    """tokens [batch, seqlen] and `count` more, the likeliest each time, or drawn at a temperature above 0.

    The prompt goes through the model once; then each new token alone, and the caches, or the pages, hold what it
    attends to.
    """
    training = model.training
    model.eval()
    caches: Sequence[KeyValueCache | PagedLayer] = [KeyValueCache() for _ in model.blocks]
    sequences = [] if pages is None else [pages.cache.allocate() for _ in tokens]
    new = tokens
    for _ in range(count):
        if pages is not None:
            caches = pages.layers(sequences, new.shape[1])
        logits = model(new, caches)[:, -1]
        if temperature > 0:
            new = torch.multinomial((logits / temperature).softmax(-1), 1)
        else:
            new = logits.argmax(-1, keepdim=True)
        tokens = torch.cat([tokens, new], 1)
    for sequence in sequences:
        pages.cache.free(sequence)
    model.train(training)
    return tokens


def main() -> None:
    """Builds a preset twice from one seed and compares the attentions."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--preset", choices=list(PRESETS), default="tiny")
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--learned-positions", action="store_true", help="in place of rotary ones")
    parser.add_argument("--block", type=int, nargs=2, metavar=("M", "N"), help="queries and keys of a tile, on a GPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    options = PRESETS[args.preset]
    if args.learned_positions:
        options = replace(options, rope_base=None)
    if args.block:
        options = replace(options, config=flash.Config(*args.block))

    logits, losses = [], []
    for attention in ATTENTIONS:
        torch.manual_seed(0)
        model = GPT(options, attention).to(args.device)
        tokens = torch.randint(options.vocabulary, (1, args.seqlen + 1), device=args.device)
        logits.append(model(tokens[:, :-1]))
        losses.append(F.cross_entropy(logits[-1].flatten(0, 1), tokens[:, 1:].flatten()))
        losses[-1].backward()
    print(f"{args.preset}: {options}")
    print(f"parameters: {sum(p.numel() for p in model.parameters()):,}")
    print(f"largest difference of the logits: {(logits[0] - logits[1]).abs().max():.1e}")
    print(f"loss {losses[0]:.4f} (standard), {losses[1]:.4f} (flash)")


if __name__ == "__main__":
    main()
