"""Prints how much memory attention takes, forward and backward, and how long: standard beside flash_attention.

    python -m examples.flash_attention_demo

Every cell is measured in a fresh process: the largest resident set on a CPU, torch's allocator on a GPU, above what the
inputs and gradients take. Time is the best of three. Whether there is a line for a length is a matter of memory: what
does not fit says so.
"""

import argparse
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import torch

from examples.gpt import ATTENTIONS
from examples.train_char_lm import memory


@dataclass(frozen=True)
class Sizes:
    """What is measured beside the lengths."""

    heads: int
    head_dim: int
    dtype: str
    device: str
    threads: int


def measure(name: str, seqlen: int, sizes: Sizes) -> tuple[int, float]:
    """Bytes of a causal pass forward and backward beyond q, k, v, o and gradients, and milliseconds."""
    torch.set_num_threads(sizes.threads)
    attention = ATTENTIONS[name]
    on_gpu = sizes.device == "cuda"

    def inputs(n: int) -> list[torch.Tensor]:
        shape = (1, sizes.heads, n, sizes.head_dim)
        made = [torch.randn(shape, dtype=getattr(torch, sizes.dtype), device=sizes.device) for _ in range(4)]
        return [x.requires_grad_(i < 3) for i, x in enumerate(made)]

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, do: torch.Tensor) -> int:
        o = attention(q, k, v, 0.0, None)
        returned = sum(x.nbytes for x in (o, *torch.autograd.grad(o, (q, k, v), do)))
        if on_gpu:
            torch.cuda.synchronize()
        return returned

    run(*inputs(32))  # loads and compiles
    tensors = inputs(seqlen)
    before = memory(sizes.device)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far was that of the imports
    returned = run(*tensors)
    after = memory(sizes.device)
    peak = max(after[1] - before[0] - returned, 0) if before and after else 0
    times = []
    for _ in range(3):
        start = time.perf_counter()
        run(*tensors)
        times.append(1e3 * (time.perf_counter() - start))
    return peak, min(times)


def cell(name: str, seqlen: int, sizes: Sizes) -> tuple[int, float] | None:
    """measure() in a started process (a forked one begins with its parent's memory); None where memory ran out."""
    try:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
            return process.submit(measure, name, seqlen, sizes).result()
    except (BrokenProcessPool, MemoryError, torch.OutOfMemoryError):
        return None
    except RuntimeError as error:  # of the CPU's allocator
        if "memory" not in str(error):
            raise
        return None


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[128 * 2**i for i in range(7)])
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtype", choices=["float16", "bfloat16", "float32"], help="float32, on a GPU bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    sizes = Sizes(args.heads, args.head_dim, dtype, args.device, args.threads)
    print(f"{args.heads} heads of {args.head_dim}, {dtype}, causal, forward and backward, {args.device}")
    print(f"{'seqlen':>8} {'standard':>12} {'flash':>12} {'savings':>9} {'standard':>12} {'flash':>12}")
    for seqlen in args.lengths:
        row = [cell(name, seqlen, sizes) for name in ("standard", "flash")]
        peaks = [None if found is None else found[0] for found in row]
        savings = f"{100 * (1 - peaks[1] / peaks[0]):.0f} %" if peaks[0] and peaks[1] is not None else "-"
        mb = ["out of memory" if peak is None else f"{peak / 1e6:.1f} MB" for peak in peaks]
        ms = ["-" if found is None else f"{found[1]:.1f} ms" for found in row]
        print(f"{seqlen:>8} {mb[0]:>12} {mb[1]:>12} {savings:>9} {ms[0]:>12} {ms[1]:>12}", flush=True)


if __name__ == "__main__":
    main()
