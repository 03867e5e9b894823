"""Trains a small model on one long text that no rank has whole, and compares the losses with those of one process.

    python -m examples.sharded_sequence --ranks 2                        # starts its own processes
    torchrun --nproc-per-node 2 -m examples.sharded_sequence             # or lets torchrun do so

Each rank has a zigzag shard of the text, its own rows of every layer, and all parameters; attention alone needs the
keys of the others. Everything else of the model is as on one device, down to the positions, which are sharded like the
text. Gradients of parameters are each rank's share, so that summing them, as DDP would but for its mean, is all.
"""

import argparse
import os
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing
import torch.nn.functional as F

from examples.train_char_lm import text_of_python
from flash.attention import flash_attention
from flash.ring import info, ring_attention, shard

SHARDING = "zigzag"


class Layer(torch.nn.Module):
    """Pre-norm attention, its keys wherever they are, and a perceptron."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = torch.nn.LayerNorm(width), torch.nn.LayerNorm(width)
        self.qkv, self.out = torch.nn.Linear(width, 3 * width), torch.nn.Linear(width, width)
        self.up, self.down = torch.nn.Linear(width, 4 * width), torch.nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor, sharded: bool) -> torch.Tensor:
        """x [batch, rows of this rank, width] -> the same."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if sharded:
            o = ring_attention(q, k, v, causal=True, sharding=SHARDING)
        else:
            o = flash_attention(q, k, v, causal=True)
        x = x + self.out(o.transpose(1, 2).flatten(-2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Model(torch.nn.Module):
    """Characters and positions in, characters out."""

    def __init__(self, alphabet: int, seqlen: int, width: int = 64, heads: int = 4, layers: int = 2) -> None:
        super().__init__()
        self.tokens, self.positions = torch.nn.Embedding(alphabet, width), torch.nn.Embedding(seqlen, width)
        self.layers = torch.nn.ModuleList([Layer(width, heads) for _ in range(layers)])
        self.head = torch.nn.Linear(width, alphabet)

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor, sharded: bool) -> torch.Tensor:
        """Logits [batch, rows, alphabet] of tokens [batch, rows] at positions [rows]."""
        x = self.tokens(tokens) + self.positions(positions)
        for layer in self.layers:
            x = layer(x, sharded)
        return self.head(x)


def train(data: torch.Tensor, alphabet: int, steps: int, sharded: bool) -> list[float]:
    """The losses of some steps on data [1, seqlen + 1], of this rank's part of it where it is sharded."""
    seqlen = data.shape[1] - 1
    torch.manual_seed(0)
    model = Model(alphabet, seqlen)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    tokens, targets, positions = data[:, :-1], data[:, 1:], torch.arange(seqlen)
    if sharded:
        tokens, targets = (shard(x, sharding=SHARDING, dim=1) for x in (tokens, targets))
        positions = shard(positions, sharding=SHARDING, dim=0)
    losses = []
    for _ in range(steps):
        logits = model(tokens, positions, sharded)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum") / seqlen
        optimizer.zero_grad()
        loss.backward()
        if sharded:
            loss = loss.detach()
            dist.all_reduce(loss)
            for p in model.parameters():
                dist.all_reduce(p.grad)
        optimizer.step()
        losses.append(loss.item())
    return losses


def work(rank: int, ranks: int, store: str, args: argparse.Namespace) -> None:
    """One rank."""
    torch.set_num_threads(1)
    if store:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    else:
        dist.init_process_group("gloo")
    text = text_of_python()
    alphabet = sorted(set(text))
    data = torch.tensor([[alphabet.index(character) for character in text[: args.seqlen + 1]]])
    losses = train(data, len(alphabet), args.steps, sharded=True)
    part = shard(torch.zeros(1, 4, args.seqlen, 16), sharding=SHARDING)
    how = info(part, part, part, causal=True, sharding=SHARDING)
    if dist.get_rank() == 0:
        print(f"{dist.get_world_size()} ranks with {how['lengths_q']} of {args.seqlen} characters")
        print(f"method: {how['method']}, as {how['reason']}")
        alone = train(data, len(alphabet), args.steps, sharded=False)
        for step, (ours, theirs) in enumerate(zip(losses, alone, strict=True)):
            print(f"step {step:3}  loss {ours:.6f}  of one process {theirs:.6f}")
        print(f"largest difference: {max(abs(a - b) for a, b in zip(losses, alone, strict=True)):.2e}")
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    """Starts the ranks, or is one of those that torchrun has started."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2, help="processes to start, without torchrun")
    parser.add_argument("--seqlen", type=int, default=2001, help="characters; need not divide by the ranks")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--device", default="cpu", choices=["cpu"], help="gloo runs on a CPU")
    args = parser.parse_args()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        work(0, 0, "", args)
        return
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(work, (args.ranks, f"{folder}/store", args), nprocs=args.ranks)


if __name__ == "__main__":
    main()
