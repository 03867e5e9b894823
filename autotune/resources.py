"""What a kernel costs on a target that need not be present: registers, spills, shared memory, and its inner loops.

    python -m flash.autotune.resources forward --dtype bfloat16 --head-dim 128 --target cuda:90 --target hip:gfx942

The kernel is compiled with Triton from its source for an explicit target, as a launch would specialise it. These
figures rule out what does not fit, spills, or whose wgmma ptxas serialises. They do not rank the rest.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch

from flash.kernels.spec import Blocks, Config, Gradients, Operands, Shape, Sizes, Spans, Spec, Tangents, View

from . import cached, gluon
from .leaf import NONE, TYPES, Leaf, pointer, view
from .listing import Loop, length, matrix_loops
from .space import FEATURES, Variant
from .tables import HEAD_DIMS, ITEMSIZE, for_tangents, lookup, shared_limit

POINTER_OF = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64"} | {
    torch.int32: "i32",
    torch.int64: "i64",
}
TENSOR_MEMORY = 512  # columns that one program may have on sm_100
KERNELS = ("forward", "delta", "dkdv", "dq", "dbias", "jvp", *cached.KERNELS, *gluon.KERNELS)
EMPTY_KERNEL = 16  # a kernel of fewer registers than this has lost its body


class Report(NamedTuple):
    """What a compiled kernel takes.

    Args:
        target: what it was compiled for.
        registers: of one thread.
        spill_bytes: that one thread spills.
        shared: bytes of shared memory of one program.
        limit: bytes of shared memory that the target gives.
        tensor_memory: columns of tensor memory, of 512 (sm_100).
        warnings: what ptxas complains of, as of serialised wgmma.
        loops: the innermost matrix loops; () where no listing was asked for.
        instructions: of the whole kernel; 0 likewise.
    """

    target: str
    registers: int
    spill_bytes: int
    shared: int
    limit: int
    tensor_memory: int
    warnings: tuple[str, ...]
    loops: tuple[Loop, ...]
    instructions: int = 0

    @property
    def hidden(self) -> float | None:
        """Share of exponentials issued under a wgmma in the shortest loop, that over full tiles; None without one."""
        shares = [(loop.instructions, loop.hidden) for loop in self.loops if loop.hidden is not None]
        return min(shares)[1] if shares else None

    @property
    def faults(self) -> tuple[str, ...]:
        """Why a launch would fail, or mean nothing; () where it would not. Spills are no fault."""
        found = []
        if self.shared > self.limit:
            found.append(f"{self.shared} B of shared memory, of {self.limit}")
        if self.tensor_memory > TENSOR_MEMORY:
            found.append(f"{self.tensor_memory} columns of tensor memory, of {TENSOR_MEMORY}")
        if self.registers < EMPTY_KERNEL:
            found.append(f"an empty kernel of {self.registers} registers")
        return tuple(found)

    @property
    def serialized(self) -> bool:
        """Whether ptxas gave up on overlapping the wgmma of a loop."""
        return any("serializ" in warning for warning in self.warnings)


def report(target: str, kernel: str, variant: Variant, config: Config, listing: bool = False) -> Report:
    """Compile a kernel for a target and say what it takes.

    Args:
        target: "cuda:80", "cuda:90", "cuda:100", "hip:gfx942", ...
        kernel: one of KERNELS.
        variant: the call.
        config: the tiles.
        listing: whether to read the loops out of the disassembled kernel too.

    Returns:
        The report.

    Raises:
        RuntimeError: the kernels are interpreted in this process, or the compiler fails.
    """
    compiled = build(target, kernel, variant, config)
    shared = int(compiled.metadata.shared)
    backend = target.partition(":")[0]
    read = _read_cuda if backend == "cuda" else _read_hip
    registers, spill_bytes, warnings, text = read(compiled, target, listing)
    loops, instructions = (matrix_loops(text), length(text)) if listing else ((), 0)
    columns = int(getattr(compiled.metadata, "tmem_size", None) or 0)
    return Report(target, registers, spill_bytes, shared, shared_limit(target), columns, warnings, loops, instructions)


def build(target: str, kernel: str, variant: Variant, config: Config) -> Any:
    """Compile a kernel for a target, as a launch of the variant would; Triton's CompiledKernel.

    Args:
        target: "cuda:90", "hip:gfx942".
        kernel: one of KERNELS.
        variant: the call.
        config: the tiles.

    Returns:
        What triton.compile returns.

    Raises:
        RuntimeError: the kernels are interpreted in this process, or the compiler fails.
    """
    import triton
    from triton.backends.compiler import GPUTarget

    function = _function(kernel)
    if not isinstance(function, triton.runtime.JITFunction):
        raise RuntimeError("kernels are interpreted in this process: unset TRITON_INTERPRET to compile them")
    backend, _, arch = target.partition(":")
    if kernel in gluon.KERNELS and target != "cuda:90":  # the compiler aborts the process
        raise RuntimeError(f"{kernel} is for cuda:90 alone, got {target}")
    signature, constants, attributes = _specialise(kernel, function, target, variant, config)
    source = gluon.source(function)(fn=function, signature=signature, constexprs=constants, attrs=attributes)
    wave = 64 if arch.startswith("gfx9") else 32
    gpu = GPUTarget(backend, int(arch) if backend == "cuda" else arch, wave)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    if kernel in gluon.KERNELS:
        options |= gluon.options(kernel, config)
    if kernel in cached.KERNELS:
        options |= cached.options(kernel, backend, variant)
    try:
        compiled = triton.compile(source, target=gpu, options=options)
    except Exception as error:  # passes, LLVM and ptxas each have exceptions of their own
        raise RuntimeError(f"{kernel} {config} does not compile for {target}: {error!s:.300}") from error
    made_for = _target_of(compiled, backend)
    if made_for.rstrip("af") != arch:
        raise RuntimeError(f"{kernel} was to be compiled for {target}, got code for {made_for}")
    return compiled


def _function(kernel: str) -> Any:
    from flash.kernels import backward, bias, forward, jvp

    if kernel in gluon.KERNELS:
        return gluon.function(kernel)
    if kernel in cached.KERNELS:
        return cached.function(kernel)
    functions = {
        "dbias": bias.dbias_kernel,
        "forward": forward.forward_kernel,
        "delta": backward.delta_kernel,
        "dkdv": backward.dkdv_kernel,
        "dq": backward.dq_kernel,
        "jvp": jvp.jvp_kernel,
    }
    return functions[kernel]


def _specialise(
    kernel: str, function: Any, target: str, variant: Variant, config: Config
) -> tuple[dict[str, Any], dict[tuple[int, ...], Any], dict[tuple[int, ...], Any]]:
    """(types, constants, divisibilities) of a kernel's arguments, as the launcher would find them for dense tensors."""
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}

    def types_of(value: Any, path: tuple[int, ...]) -> Any:
        if isinstance(value, Leaf):
            if value.type == "constexpr":
                constants[path] = value.constant
            elif value.divisible:
                attributes[path] = [["tt.divisibility", 16]]
            return value.type
        members = [types_of(member, (*path, place)) for place, member in enumerate(value)]
        return type(value)(*members) if hasattr(value, "_fields") else tuple(members)

    values = _arguments(kernel, target, variant, config)
    signature = {name: types_of(values[name], (at,)) for at, name in enumerate(function.arg_names)}
    return signature, constants, attributes


def _arguments(kernel: str, target: str, variant: Variant, config: Config) -> dict[str, Any]:
    """What each parameter of the kernels is given, as a tree of Leaf."""
    from flash.kernels.bias import Sums

    dtype, acc = TYPES[variant.dtype], "fp64" if variant.dtype == "float64" else "fp32"
    wide, wide_v = (view(dtype, head_dim % 16 == 0) for head_dim in (variant.head_dim, variant.head_dim_v))
    one, stride = Leaf("constexpr", 1), Leaf("i32")
    number: Any = Leaf("i64")  # as `launch.coded` makes it
    rows = pointer(acc)
    precision = "tf32x3" if variant.dtype == "float32" and target.startswith("cuda:") else "ieee"
    padded: Any = [max(16, 1 << (d - 1).bit_length()) for d in (variant.head_dim, variant.head_dim_v)]
    if kernel in gluon.KERNELS:
        padded = gluon.padded(variant)
    operands, chosen = _features(variant)
    if kernel == "jvp":  # whatever has a tangent brings one
        tangents = {f"{name}_tangent": getattr(operands, name) for name in ("bias", "slopes", "sinks")}
        operands = operands._replace(**tangents)
    spec = Spec(causal=variant.causal, raw=variant.raw, precision=precision)._replace(**chosen)
    shape = Shape(variant.group, variant.head_dim, variant.head_dim_v, *padded)
    constants = {"spec": spec, "shape": shape, "AHEAD": config.ahead}
    constants |= {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n}
    shares = rows if "alibi" in variant.features else NONE
    keys = Gradients(NONE, wide, wide_v, NONE, NONE, NONE)
    queries = Gradients(wide, NONE, NONE, NONE, shares, NONE)
    own = {} if variant.stored is None else cached.arguments(target, kernel, variant, variant.stored)
    if kernel in gluon.KERNELS:
        own = gluon.arguments(kernel, config, wide, wide_v, constants)
        own |= {name: Leaf(type) for name, type in gluon.descriptors(kernel, variant, config).items()}
    return {
        **dict.fromkeys(("q", "k", "dq"), wide),
        **dict.fromkeys(("v", "o", "do"), wide_v),
        **dict.fromkeys(("lse", "delta"), rows),
        "sums": Sums(view(acc, True), *6 * [number]) if kernel == "dbias" else rows,
        "grads": keys if kernel == "dkdv" else queries,
        "tangents": Tangents(wide, wide, wide_v, wide_v, rows),
        "dlse": View(rows, stride, stride, one, one) if variant.dlse else NONE,
        "mods": operands,
        "sizes": Sizes(*len(Sizes._fields) * [number]),
        "scale": Leaf("fp64"),
        **{name: Leaf("constexpr", value) for name, value in constants.items()},
        **own,
    }


def _features(variant: Variant) -> tuple[Operands, dict[str, Any]]:
    """The operands that a variant's features bring, and what they change in Spec."""
    from flash import mods

    dtype, integer = TYPES[variant.dtype], pointer("i32")
    operands: dict[str, Any] = dict.fromkeys(Operands._fields, NONE)
    spec: dict[str, Any] = {}
    if variant.q_offset:
        operands["q_offset"] = integer
    for feature in variant.features:
        if feature == "window":
            spec |= {"left": True, "right": not variant.causal}
        elif feature == "mask":
            operands["mask"] = view("u8", False)
            spec |= {"hides": True, "mask_rows": True, "mask_cols": True}
        elif feature == "padding":
            operands["mask"] = view("u8", False)
            operands |= dict.fromkeys(
                Spans._fields, View(integer, Leaf("i32"), Leaf("i32"), *2 * [Leaf("constexpr", 1)])
            )
            spec |= {"hides": True, "mask_cols": True}
        elif feature == "bias":
            operands["bias"] = view(dtype, True)
            spec |= {"hides": True, "bias_rows": True, "bias_cols": True, "raw": False}
        elif feature == "alibi":
            operands["slopes"] = view("fp32", False)
            spec |= {"raw": False}
        elif feature == "softcap":
            spec |= {"softcap": 50.0, "raw": False}
        elif feature == "sinks":
            operands["sinks"] = view(dtype, False)
        elif feature == "dropout":
            operands["seed"] = pointer("i64")
            spec |= {"dropout_p": 0.1, "threshold": round(0.1 * 2**32)}
        elif feature == "score_mod":
            mod = mods.tanh_softcap(50.0)
            operands |= {
                "score_fn": Leaf("constexpr", mod.fn),
                "score_derivative": Leaf("constexpr", mod.derivative),
                "score_args": tuple(pointer(POINTER_OF[x.dtype]) for x in mod.args),
            }
            spec |= {"raw": False}
        elif feature == "mask_mod":
            mask_mod = mods.dilated_window(4, 2)
            operands |= {
                "mask_fn": Leaf("constexpr", mask_mod.fn),
                "mask_args": tuple(pointer(POINTER_OF[x.dtype]) for x in mask_mod.args),
            }
            spec |= {"hides": True}
        elif feature == "blocks":
            operands |= dict.fromkeys(Blocks._fields, view("i32", False)) | {"bits": integer}
            spec |= {"blocks": (128, 128)}
        elif feature == "packed":
            names = ("q_offset", "starts_q", "starts_k", "tiles")
            operands |= dict.fromkeys(names, integer) | {"bad": pointer("u8")}
        elif feature == "origin":
            operands["origin"] = view("i32", False)
        else:
            raise ValueError(f"features must be among {', '.join(FEATURES)}, got {feature!r}")
    return Operands(**operands), spec


def run(job: tuple[tuple[Any, ...], dict[str, Any]]) -> dict[str, Any]:
    """The outcome of compiling, for a `worker.Worker`: {"status": "ok", "report": what `report` says of a job}."""
    arguments, options = job
    return {"status": "ok", "report": report(*arguments, **options)}


def _target_of(compiled: Any, backend: str) -> str:
    """The architecture that the machine code is for: "90a", "gfx942"."""
    text, pattern = (
        (compiled.asm["ptx"], r"^\.target\s+sm_(\w+)")
        if backend == "cuda"
        else (compiled.asm["amdgcn"], r"amdhsa--(gfx\w+)")
    )
    found = re.search(pattern, text, re.MULTILINE)
    return found[1] if found else "nothing known"


def _read_cuda(compiled: Any, target: str, listing: bool) -> tuple[int, int, tuple[str, ...], str]:
    """(registers, spilled bytes, warnings, SASS): ptxas runs once more for the words that Triton throws away."""
    from triton.backends.nvidia.compiler import get_ptxas

    ptx = compiled.asm["ptx"]
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(ptx)
        ptxas = get_ptxas(int(target.partition(":")[2])).path
        arch = f"--gpu-name=sm_{_target_of(compiled, 'cuda')}"
        words = _run(ptxas, "-v", arch, source, "-o", cubin).stderr
        text = _disassemble(cubin) if listing else ""
    registers = int(_number(r"Used (\d+) registers", words))
    spill_bytes = max(_number(r"(\d+) bytes spill stores", words), _number(r"(\d+) bytes spill loads", words))
    complaints = [line for line in words.splitlines() if re.search(r"serializ|potential|warning", line, re.IGNORECASE)]
    warnings = {re.sub(r"^ptxas \w+\s*:\s*|\s*in (?:the )?function.*$", "", line).strip() for line in complaints}
    return registers, spill_bytes, tuple(sorted(warnings)), text


def _disassemble(cubin: Path) -> str:
    import triton

    nvdisasm = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    return _run(nvdisasm, "-c", cubin).stdout


def _run(*command: str | Path) -> "subprocess.CompletedProcess[str]":
    """Run a tool of Triton's; its failure is a failure to compile."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{Path(command[0]).name} exited with {done.returncode}: {done.stderr.strip()[:400]}")
    return done


def _read_hip(compiled: Any, target: str, listing: bool) -> tuple[int, int, tuple[str, ...], str]:
    text = compiled.asm["amdgcn"]
    return _number(r"\.vgpr_count:\s*(\d+)", text), 4 * _number(r"\.vgpr_spill_count:\s*(\d+)", text), (), text


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    return int(found[1]) if found else 0


def describe(what: str, made: Report) -> str:
    """A report in words, for the terminal."""
    lines = [
        f"{what} on {made.target}: {made.registers} registers, {made.spill_bytes} B spilled, "
        f"{made.shared} of {made.limit} B of shared memory"
        + (f", {made.tensor_memory} of {TENSOR_MEMORY} columns of tensor memory" if made.tensor_memory else "")
        + (f", {made.instructions} instructions" if made.instructions else "")
    ]
    for loop in made.loops:
        share = "" if loop.hidden is None else f", {loop.hidden:.0%} of exponentials under a wgmma"
        kinds = ", ".join(f"{number} {kind}" for kind, number in loop.counts.items())
        lines.append(f"  loop of {loop.instructions} instructions: {kinds}{share}")
    lines += [f"  ptxas: {warning}" for warning in made.warnings]
    lines += [f"  will not launch: {fault}" for fault in made.faults]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Command line: report on one kernel for one or more targets; 1 where one would not launch."""
    parser = argparse.ArgumentParser(prog="python -m flash.autotune.resources", description=__doc__.split("\n")[0])
    parser.add_argument("kernel", choices=KERNELS)
    parser.add_argument(
        "--target", action="append", help="cuda:80, cuda:90 (default), cuda:100, hip:gfx942; may repeat"
    )
    parser.add_argument("--dtype", choices=tuple(ITEMSIZE), default="bfloat16")
    parser.add_argument("--head-dim", type=int, default=128, help=f"1 to {HEAD_DIMS[-1]}")
    parser.add_argument("--head-dim-v", type=int, help="head_dim of v, where it differs")
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--group", type=int, default=1, help="query heads that share a key head")
    parser.add_argument("--q-offset", action="store_true", help="offsets read from a tensor")
    parser.add_argument("--dlse", action="store_true", help="with a gradient of lse (delta)")
    parser.add_argument("--feature", action="append", choices=FEATURES, help="of the score; may repeat")
    cached.add_options(parser)
    parser.add_argument("--config", help="block_m,block_n,num_warps,num_stages[,ahead 0 or 1]; absent = the tables'")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(argv)
    head_dim_v = options.head_dim_v or options.head_dim
    variant = Variant(
        options.dtype, options.head_dim, head_dim_v, options.causal, options.group,
        q_offset=options.q_offset, dlse=options.dlse, features=tuple(options.feature or ()),
        stored=cached.stored_of(options) if options.kernel in cached.KERNELS else None,
    )  # fmt: skip
    status = 0
    for target in options.target or ["cuda:90"]:
        if options.config:
            *numbers, ahead = map(int, f"{options.config},0".split(",")[:5])
            config = Config._make((*numbers, bool(ahead)))
        elif options.kernel in gluon.KERNELS:
            config = gluon.config(options.kernel, variant)
        elif variant.stored is not None:
            config = cached.config(options.kernel, target, variant, variant.stored)
        else:
            name = "dq" if options.kernel in ("delta", "dbias", "jvp") else options.kernel
            head_dim = max(options.head_dim, head_dim_v)
            choice = lookup(target, name, options.dtype, head_dim, 8192, options.causal)
            if options.kernel == "jvp":
                choice = for_tangents(choice, target, options.dtype, head_dim)
            config = choice.config
        made = report(target, options.kernel, variant, config, listing=True)
        if options.json:
            print(json.dumps({"kernel": options.kernel, "config": config._asdict(), **made._asdict()}))
        else:
            print(describe(f"{options.kernel} {config}", made))
        status |= bool(made.faults)
    return status


if __name__ == "__main__":
    sys.exit(main())
