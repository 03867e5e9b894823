"""Where the figures in README and docs come from: words of a page, and the line in which a command wrote the numbers.

A fact is a quote with its numbers in {braces}, and the line they are found in: part of it, after the heading it stands
under where the line is in the file more than once. Under bench/results the line was written by a command, which the
page has to name beside the quote; elsewhere it is a limit that the code sets. A fact holds on every page. Tables that
are copied from a report need none: their rows are looked up as they are.
"""

from typing import NamedTuple

RESULTS = "bench/results/"
CPU = RESULTS + "cpu-2-cores-amd-epyc/"
COMPILED = RESULTS + "compiled/"


class Fact(NamedTuple):
    """A quote from a page, and what proves it.

    Args:
        quote: words as they stand on the page, each number that is proved in braces.
        file: the file, from the root of the repository.
        line: a part of exactly one line of it, or "heading > part" of exactly one below that heading.
    """

    quote: str
    file: str
    line: str


# Numbers with a unit that measure nothing here, and why.
NOT_MEASURED = {
    r"(takes|take) up to 4 minutes": "the limit at which `make bench` ends by itself, in minutes",
    r"some 1 GB": "what pip downloads, other people's packages",
}

REPORT, FEATURES, LONG = CPU + "report.md", CPU + "features.md", CPU + "long.md"
COLD, DECODE, OVERHEAD, SCALE = CPU + "cold.md", CPU + "decode.md", CPU + "overhead.md", CPU + "scale.md"
FORWARD_COSTS = "Cost of features: forward, length 4096, batch 1, 8 heads, head_dim 64, float32"
WINDOWS = "Long sequences: window 1024, causal, forward, batch 1, 8 heads, head_dim 64, float32"
PLAIN = "Triton 3.7.1: python -m flash.autotune.resources forward --head-dim"
OLDER = "Triton 3.6.0: python -m flash.autotune.resources forward --head-dim"
SLOWER = "Where flash is slower (marked <) > "
ERROR, RATIOS = CPU + "error.md", "rms of flash over rms of standard attention"
DENSE = "Cache: dense; q float32, head_dim 128 > "
PAGES = "Cache: paged 16; q float32, head_dim 128 > "
MODEL = "The model beside 1, 2 and 4 processes > "
EXPONENTIALS = COMPILED + "exponentials.txt"

FACTS = (
    # limits that the code sets
    Fact("begins nothing new after {500} seconds", "bench/run.py", "SPEED_LIMIT, SPEED_PATIENCE ="),
    Fact("{1.25} times that of standard attention", "tests/bounds.py", "RMS = "),
    Fact("the Hopper forward at least {90} %", "tests/test_hopper_compiled.py", "assert all(loop.hidden >="),
    Fact("The project set itself {2.5}x", REPORT, "| forward speed-up at 4096, full"),
    # memory
    Fact("standard attention takes {118}x the memory forward ({1076} MB against {9.1} MB)",
         REPORT, "| memory of standard over flash at 4096, forward |"),
    Fact("{52}x forward and backward ({1604} MB against {30.6} MB)",
         REPORT, "| memory of standard over flash at 4096, forward + backward |"),
    # throughput
    Fact("ours is {2.76}x as fast as standard attention forward", REPORT, "| forward speed-up at 4096, full |"),
    Fact("{5.44}x with a causal mask", REPORT, "| forward speed-up at 4096, causal |"),
    Fact("forward and backward, {1.70}x and", REPORT, "| forward + backward speed-up at 4096, full |"),
    Fact("1.70x and {3.78}x", REPORT, "| forward + backward speed-up at 4096, causal |"),
    Fact("up to {15} % forward and backward", REPORT, SLOWER + "- d64 full 2048, forward + backward:"),
    Fact("up to {112} % forward", REPORT, SLOWER + "- d128 full 512, forward:"),
    Fact("ViT-B/16 (197 positions) {64} % forward", REPORT, SLOWER + "- ViT-B/16, forward:"),
    Fact("64 % forward and {82} % forward and backward", REPORT, SLOWER + "- ViT-B/16, forward + backward:"),
    Fact("ViT-H/14 {42} % and", REPORT, SLOWER + "- ViT-H/14, forward:"),
    Fact("ViT-H/14 42 % and {32} %", REPORT, SLOWER + "- ViT-H/14, forward + backward:"),
    Fact("BERT-base {17} % and", REPORT, SLOWER + "- BERT-base, forward:"),
    Fact("BERT-base 17 % and {32} %", REPORT, SLOWER + "- BERT-base, forward + backward:"),
    Fact("models' shapes: GPT-2 {26}% forward", REPORT, SLOWER + "- GPT-2, forward: 26% slower than sdpa-flash"),
    Fact("shape at 512 positions {15} % and", REPORT, SLOWER + "- DeepSeek-V3 /32, forward:"),
    Fact("shape at 512 positions 15 % and {42} %", REPORT, SLOWER + "- DeepSeek-V3 /32, forward + backward:"),
    # features
    Fact("a window of 512 takes {0.33}x", FEATURES, f"{FORWARD_COSTS} > | window 512"),
    Fact("documents as packed sequences {0.18}x", FEATURES, f"{FORWARD_COSTS} > | varlen 512"),
    Fact("a bias {1.77}x", FEATURES, f"{FORWARD_COSTS} > | bias |"),
    Fact("a soft cap {2.57}x", FEATURES, f"{FORWARD_COSTS} > | softcap"),
    Fact("ALiBi {2.09}x", FEATURES, f"{FORWARD_COSTS} > | alibi"),
    Fact("Dropout costs {7.22}x", FEATURES, f"{FORWARD_COSTS} > | dropout"),
    Fact("ALiBi by {90} % forward", FEATURES, "- d64 alibi, forward:"),
    Fact("90 % forward and {54} %", FEATURES, "- d64 alibi, forward + backward:"),
    Fact("a bias by {62} % and", FEATURES, "- d64 bias, forward:"),
    Fact("a bias by 62 % and {40} %", FEATURES, "- d64 bias, forward + backward:"),
    Fact("padding by {29} % and", FEATURES, "- d64 padding, forward:"),
    Fact("padding by 29 % and {20} %", FEATURES, "- d64 padding, forward + backward:"),
    Fact("the rest by at most {15} %", FEATURES, "- d64 causal, forward:"),
    # long sequences
    Fact("a window takes {16.4} MB, where *sdpa* with its mask takes {1344} MB", LONG, f"{WINDOWS} > | 16384"),
    Fact("by {46} % for a window at 8192", LONG, "- window 1024, length 8192, forward:"),
    Fact("{27} % at 4096", LONG, "- window 1024, length 4096, forward:"),
    Fact("{21} % for documents at 4096", LONG, "- document 2048, length 4096, forward:"),
    # decoding
    Fact("a copy from memory to memory in the same run: {31.7} GB/s", DECODE, "| 2026-12-01T06:01:27+00:00 |"),
    Fact("{36} % of it at best with a dense cache", DECODE, DENSE + "| 2 / 2 | 4 | 8192 |"),
    Fact("and {25} % with pages", DECODE, PAGES + "| 2 / 2 | 1 | 8192 |"),
    Fact("up to {2.69}x (batch 4, 16 heads", DECODE, DENSE + "| 16 / 2 | 4 | 8192 |"),
    Fact("down to {0.24}x of *sdpa*'s speed (batch 1, 2 heads, 512 keys)", DECODE, DENSE + "| 2 / 2 | 1 | 512 |"),
    Fact("as many heads of keys as of queries, {0.81}x", DECODE, DENSE + "| 2 / 2 | 4 | 8192 |"),
    # a call in Python
    Fact("A plain call made before takes {8.8} µs, {1.9}x", OVERHEAD, "flash_attention"),
    Fact("one that is not plain, takes {150.3} µs", OVERHEAD, "without a plan"),
    Fact("one with gradients {196.2} µs", OVERHEAD, "flash: with gradients"),
    Fact("where torch's takes {7.4} µs", OVERHEAD, "SDPA: with gradients"),
    Fact("a call costs some {196} µs before its kernel runs", OVERHEAD, "flash: with gradients"),
    Fact("attention costs {7} ([measured]", OVERHEAD, "SDPA: with gradients"),
    # beginning
    Fact("imports add {224} ms to that of", COLD, "imports add"),
    Fact("the first call takes {1.18}x of its time forward", COLD, "forward, first:"),
    Fact("and {1.22}x forward", COLD, "both, first:"),
    Fact("the second {1.06}x and", COLD, "forward, second: 1.06x"),
    Fact("and {1.12}x. Compiled", COLD, "both, second:"),
    Fact("takes {14420} ms to its first result", COLD, "| forward, first  "),
    # several processes
    Fact("measured times are {0.77} to {1.43} of the model's", SCALE, "Measured over predicted:"),
    Fact("Measured times are from {0.77} to {1.43} of the model's", SCALE, "Measured over predicted:"),
    Fact("reach at most {88} %", SCALE, MODEL + "| 2 | 4096 | ring | contiguous | full |"),
    Fact("({41} % to", SCALE, MODEL + "| 2 | 1024 | ulysses | contiguous | full |"),
    Fact("(41 % to {65} % at 1024 tokens)", SCALE, MODEL + "| 2 | 1024 | ring | contiguous | full |"),
    # errors
    Fact("the error of o is {0.14}x to {0.51}x that of standard attention", ERROR, f"{RATIOS} > | bfloat16 |"),
    Fact("and of dv {0.15}x to {0.52}x", ERROR, f"{RATIOS} > | bfloat16 |"),
    Fact("{3.03}x in dq of bfloat16 with large scores", ERROR, "- bfloat16 scores x8, dq:"),
    Fact("in o of float32: up to {2.63}x", ERROR, "- float32 scores x8, o:"),
    Fact("in float32: up to {1.25}x in dq", ERROR, "- float32 causal, dq:"),
    Fact("at the last bits, up to {1.87}x in o", ERROR, "- float64 causal 4096, o:"),
    # compiled kernels
    Fact("costs the compiled kernel {1} to 4 % more instructions", COMPILED + "clamps.txt", "cuda:90, pages of 128"),
    Fact("costs the compiled kernel 1 to {4} % more instructions", COMPILED + "clamps.txt", "hip:gfx942, pages of 1:"),
    Fact("{0.9} % to 4.4 % more", COMPILED + "clamps.txt", "cuda:90, pages of 128"),
    Fact("0.9 % to {4.4} % more", COMPILED + "clamps.txt", "hip:gfx942, pages of 1:"),
    Fact("{100} % at head_dim 128 without a causal mask", EXPONENTIALS, f"{PLAIN} 128 > loop of 376"),
    Fact("{82} % at head_dim 64", EXPONENTIALS, f"{PLAIN} 64 > loop of 321"),
    Fact("82 % at head_dim 64 ({76} % with Triton 3.6", EXPONENTIALS, f"{OLDER} 64 > loop of 315"),
)  # fmt: skip
