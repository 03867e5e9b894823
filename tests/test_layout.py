"""The layout as a test: who may import whom, what a source file may not hold, what `import flash` may not do."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHIPPED = ("flash", "flash/kernels", "flash/autotune")

KERNEL_PARTS = tuple(f"flash.kernels.{name}" for name in ("spec", "launch", "tile", "score", "band", "softmax"))

# Module: what of this library it may import. The first pattern that fits a module counts; "x.*" covers x too.
ARROWS = {
    "flash._version": (),
    "flash._checkout": (),
    "flash.kernels.spec": (),
    "flash.kernels.launch": ("flash.kernels.spec",),
    "flash.kernels.tile": ("flash.kernels.spec",),
    "flash.kernels.score": ("flash.kernels.spec", "flash.kernels.tile"),
    "flash.kernels.band": ("flash.kernels.spec", "flash.kernels.tile"),
    "flash.kernels.softmax": ("flash.kernels.spec", "flash.kernels.tile", "flash.kernels.score"),
    "flash.kernels.cache": (*KERNEL_PARTS, "flash.kernels.float8"),
    "flash.kernels.bias": KERNEL_PARTS,
    "flash.kernels.forward": KERNEL_PARTS,
    "flash.kernels.hopper_backward": (*KERNEL_PARTS, "flash.kernels.backward", "flash.kernels.hopper_forward"),
    **dict.fromkeys(
        ("flash.kernels.append", "flash.kernels.decode"),
        (*KERNEL_PARTS, "flash.kernels.cache", "flash.kernels.rotary", "flash.kernels.float8"),
    ),
    "flash.kernels.*": (*KERNEL_PARTS, "flash.kernels.bias"),
    "flash.twins": ("flash.kernels.spec",),
    "flash.mods": ("flash.kernels.spec", "flash.twins"),
    "flash.blocks": ("flash.kernels.spec",),
    "flash.keep_bits": (),
    "flash.philox": (),
    "flash.reference": ("flash.mods",),
    "flash.reference_cache": ("flash.reference",),
    "flash.autotune.leaf": ("flash.kernels.spec",),
    "flash.autotune.form": ("flash.kernels.spec",),
    "flash.autotune.owned": (),
    "flash.autotune.tables": ("flash.kernels.spec", "flash.autotune.form", "flash.autotune.owned"),
    "flash.autotune.decoding": ("flash.kernels.spec", "flash.autotune.form", "flash.autotune.tables"),
    "flash.autotune.space": ("flash.kernels.spec", "flash.autotune.tables"),
    "flash.autotune.resources": ("flash.kernels.*", "flash.autotune.*", "flash.mods"),
    "flash.autotune.*": ("flash.kernels.*", "flash.autotune.*", "flash.reference"),  # tools: no call passes through
    "flash.checks": ("flash.kernels.spec", "flash.twins", "flash.mods", "flash.blocks"),
    "flash.problem": ("flash.kernels.spec", "flash.checks", "flash.mods", "flash.twins", "flash.blocks"),
    "flash.tiling": ("flash.kernels.spec", "flash.mods"),
    "flash.scoring": ("flash.keep_bits", "flash.kernels.spec", "flash.philox", "flash.tiling"),
    "flash.fused": ("flash.kernels.spec", "flash.tiling", "flash.scoring"),
    "flash.fallback": ("flash.kernels.spec", "flash.problem", "flash.tiling", "flash.scoring", "flash.fused"),
    "flash.dispatch": (
        "flash._version",
        "flash.kernels.*",
        "flash.autotune.tables",
        "flash.mods",
        "flash.problem",
        "flash.fallback",
    ),
    "flash.ops": ("flash.kernels.spec", "flash.mods", "flash.twins", "flash.problem", "flash.dispatch"),
    "flash.functorch": ("flash.kernels.spec", "flash.ops"),
    "flash.autograd": ("flash.kernels.spec", "flash.problem", "flash.dispatch", "flash.ops", "flash.functorch"),
    "flash.plans": (
        "flash.kernels.spec",
        "flash.kernels.forward",
        "flash.autotune.tables",
        "flash.checks",
        "flash.problem",
        "flash.dispatch",
        "flash.ops",
    ),
    # what DTensors shard is alone, or meets in a ring
    "flash.dtensor": (
        "flash.kernels.spec",
        "flash.blocks",
        "flash.checks",
        "flash.problem",
        "flash.parts",
        "flash.autograd",
        "flash.ring",
    ),
    "flash.attention": (
        "flash.kernels.spec",
        "flash.dtensor",
        "flash.mods",
        "flash.problem",
        "flash.dispatch",
        "flash.autograd",
        "flash.plans",
    ),
    "flash.step": ("flash.kernels.spec", "flash.checks", "flash.problem"),
    "flash.rotary": ("flash.kernels.spec",),
    "flash.copied": (),
    "flash.gathered": ("flash.kernels.spec", "flash.tiling", "flash.fallback", "flash.rotary", "flash.copied"),
    "flash.dispatch_step": (
        "flash.kernels.*",
        "flash.autotune.tables",
        "flash.autotune.decoding",
        "flash.checks",
        "flash.step",
        "flash.dispatch",
        "flash.gathered",
    ),
    "flash.cache_ops": ("flash.kernels.spec", "flash.step", "flash.dispatch_step", "flash.ops"),
    "flash.replays": (
        "flash.kernels.launch",
        "flash.step",
        "flash.dispatch",
        "flash.dispatch_step",
        "flash.ops",
        "flash.cache_ops",
    ),
    "flash.decode": (
        "flash.kernels.spec",
        "flash.checks",
        "flash.step",
        "flash.ops",
        "flash.cache_ops",
        "flash.replays",
    ),
    "flash.merge": (),
    "flash.parts": ("flash.kernels.spec", "flash.checks", "flash.problem", "flash.twins"),
    "flash.shards": (),
    "flash.links": ("flash.shards",),
    # a call of ring_attention, what serves it, as torch sees it, and what the user calls
    "flash.ring_call": (
        "flash.kernels.spec",
        "flash.dispatch",
        "flash.checks",
        "flash.problem",
        "flash.parts",
        "flash.twins",
        "flash.shards",
    ),
    "flash.ring_methods": (
        "flash.kernels.spec",
        "flash.problem",
        "flash.dispatch",
        "flash.merge",
        "flash.parts",
        "flash.shards",
        "flash.links",
        "flash.ring_call",
    ),
    "flash.ulysses": (
        "flash.kernels.spec",
        "flash.problem",
        "flash.dispatch",
        "flash.parts",
        "flash.shards",
        "flash.links",
        "flash.ring_call",
        "flash.ring_methods",
    ),
    "flash.ring_ops": (
        "flash.kernels.spec",
        "flash.ops",
        "flash.autograd",
        "flash.shards",
        "flash.links",
        "flash.ring_call",
        "flash.ring_methods",
        "flash.ulysses",
    ),
    "flash.ring": (
        "flash.kernels.spec",
        "flash.blocks",
        "flash.checks",
        "flash.problem",
        "flash.shards",
        "flash.links",
        "flash.ring_call",
        "flash.ring_ops",
    ),
    # what attention_weights shows is the torch backend's own score
    "flash.weights": ("flash.kernels.spec", "flash.mods", "flash.problem", "flash.tiling", "flash.scoring"),
    "flash.footprint": ("flash.checks",),
    "flash.paged": ("flash.checks",),
    "flash.nn": (
        "flash.checks",
        "flash.mods",
        "flash.problem",
        "flash.attention",
        "flash.decode",
        "flash.ring",
        "flash.weights",
        "flash.footprint",
    ),
    # its two halves: what is asked for a mask, and what reads the answer
    "flash.integrations.transformers": (
        "flash.mods",
        "flash.attention",
        "flash.integrations",
        "flash.integrations.transformers_masks",
    ),
    # its parts: what all of its functions are called with, and the one that has a cache
    "flash.integrations.flash_attn_arguments": (),
    "flash.integrations.flash_attn_kvcache": (
        "flash.kernels.spec",
        "flash.rotary",
        "flash.step",
        "flash.decode",
        "flash.integrations.flash_attn_arguments",
    ),
    "flash.integrations.flash_attn": (
        "flash.attention",
        "flash.integrations.flash_attn_arguments",
        "flash.integrations.flash_attn_kvcache",
    ),
    "flash.integrations.onnx": ("flash.problem", "flash.ops"),  # writes out the raw op that torch.export leaves
    "flash.integrations.sdpa_registry": ("flash.kernels.spec", "flash.problem", "flash.dispatch"),  # below autograd
    "flash.integrations": (),  # says which package is lacking, and imports none of the others
    "flash.integrations.neuralforecast": ("flash.attention", "flash.integrations"),
    "flash.integrations.*": ("flash.mods", "flash.attention", "flash.decode", "flash.ring", "flash.nn"),
}  # fmt: skip


def module_of(path: Path) -> str:
    """flash/kernels/spec.py -> flash.kernels.spec, flash/__init__.py -> flash."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def sources(*folders: str) -> list[Path]:
    """The Python files under the folders; flash/kernels and flash/autotune are folders of their own."""
    found = []
    for folder in folders:
        links = {"kernels", "autotune"} if folder == "flash" else set()
        paths = (ROOT / folder).rglob("*.py")
        found += sorted(path for path in paths if path.relative_to(ROOT / folder).parts[0] not in links)
    return found


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


@cache
def modules() -> dict[str, Path]:
    """Every module that is installed, by its name."""
    return {module_of(path): path for path in sources(*SHIPPED)}


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, module) of every import in a file, at whatever depth; relative ones made absolute."""
    package = module_of(path).split(".")
    package = package if path.name == "__init__.py" else package[:-1]
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*above, *([node.module] if node.module else [])])
            names = [f"{origin}.{alias.name}" for alias in node.names]
            yield from ((node.lineno, name if name in modules() else origin) for name in names)


def inner_imports(module: str) -> set[str]:
    """The modules of this library that a module imports."""
    return {name for _, name in imports(modules()[module]) if name.split(".")[0] == "flash"}


def fits(module: str, pattern: str) -> bool:
    return fnmatch(module, pattern) or module == pattern.removesuffix(".*")


def is_front(module: str) -> bool:
    """`import flash` and `python -m flash` gather what lies below them."""
    return module in ("flash", "flash.__main__")


def places(folders: tuple[str, ...], wrong: type[ast.AST] | tuple[type[ast.AST], ...]) -> Iterator[tuple[str, ast.AST]]:
    """("file:line", node) of every syntax node of a kind."""
    for path in sources(*folders):
        for node in ast.walk(tree(path)):
            if isinstance(node, wrong):
                yield f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}", node


def run(code: str) -> str:
    """What a fresh Python prints, started in the root."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_imports_follow_the_arrows() -> None:
    wrong = []
    for module in modules():
        if is_front(module):
            continue
        row = next((pattern for pattern in ARROWS if fits(module, pattern)), None)
        assert row, f"{module} has no row in ARROWS: decide what it may import"
        allowed = ARROWS[row]
        found = inner_imports(module)
        wrong += [f"{module} -> {name}" for name in found if not any(fits(name, pattern) for pattern in allowed)]
    assert not wrong


def test_imports_make_no_circle() -> None:
    waiting = {module: inner_imports(module) - {module} for module in modules() if not is_front(module)}
    while free := [module for module, needs in waiting.items() if not needs & waiting.keys()]:
        for module in free:
            del waiting[module]
    assert not waiting


def test_no_call_passes_through_the_oracle() -> None:
    # the sweep is a tool, and checks its candidates against the oracle
    oracles = {"flash.reference", "flash.reference_cache"}
    users = [module for module in modules().keys() - oracles if oracles & inner_imports(module)]
    assert [module for module in users if not module.startswith("flash.autotune.")] == []


def test_nothing_imports_bench_or_tests() -> None:
    users = {"bench": ("bench", "tests"), "tests": ("tests",)}
    found = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for folder in (*SHIPPED, "examples", "bench")
        for path in sources(folder)
        for line, name in imports(path)
        if name.split(".")[0] in users and folder not in users[name.split(".")[0]]
    ]
    assert not found


def test_kernels_and_autotune_are_imported_through_flash() -> None:
    # installed top-level folders of these names would shadow other projects' packages
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in sources(*SHIPPED, "bench", "tests", "examples")
        for line, name in imports(path)
        if name.split(".")[0] in ("kernels", "autotune")
    ]
    assert not found


@pytest.mark.skipif((ROOT / "PKG-INFO").exists(), reason="needs links, in place of which an sdist holds real folders")
@pytest.mark.parametrize("name", ["kernels", "autotune"])
def test_links_are_there(name: str) -> None:
    link = ROOT / "flash" / name
    assert link.is_symlink()
    assert link.readlink() == Path("..", name)


@pytest.mark.parametrize("folder", ["flash/kernels", "flash/autotune", "bench"])
def test_folder_is_no_regular_package(folder: str) -> None:
    # then `import kernels` in a checkout still finds the package of that name
    assert not (ROOT / folder / "__init__.py").exists()


def test_library_reads_no_environment() -> None:
    names = {"environ", "environb", "getenv", "putenv", "unsetenv"}
    attributes = [place for place, node in places(SHIPPED, ast.Attribute) if node.attr in names]
    imported = [place for place, node in places(SHIPPED, ast.alias) if node.name in names]
    assert not attributes + imported


def test_no_block_pointers() -> None:
    # removed from Triton's main branch
    kinds = (ast.Attribute, ast.alias, ast.Name)
    names = {"make_block_ptr", "advance"}
    found = [
        place
        for place, node in places(SHIPPED, kinds)
        if {getattr(node, field, None) for field in ("attr", "name", "id")} & names
    ]
    assert not found


def test_kernels_use_no_atomics() -> None:
    # sums in the order that programs finish are not bitwise repeatable: hopper_backward.unserved says so of its dq
    found = [
        place
        for place, node in places(("flash/kernels",), (ast.Attribute, ast.Name))
        if getattr(node, "attr", getattr(node, "id", "")).startswith("atomic_")
    ]
    assert [place for place in found if not place.startswith("flash/kernels/hopper_backward.py:")] == []


def test_every_dot_names_its_precision() -> None:
    # Triton's default multiplies float32 in tf32
    dots = [
        (place, node)
        for place, node in places(("flash/kernels",), ast.Call)
        if isinstance(node.func, ast.Attribute)
        and node.func.attr == "dot"
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "tl"
    ]
    assert dots
    assert [place for place, node in dots if "input_precision" not in {k.arg for k in node.keywords}] == []


def test_import_touches_no_device_no_environment_and_no_thread() -> None:
    out = run("""
import os, sys, threading
from pathlib import Path
import torch
try:
    import triton.language
except ModuleNotFoundError:
    pass

OURS = [str(Path("flash").resolve()), str(Path("kernels").resolve()), str(Path("autotune").resolve())]
asked = []

def by_us():
    frame = sys._getframe(2)
    while frame.f_code.co_filename.startswith("<frozen ") or Path(frame.f_code.co_filename).name == "os.py":
        frame = frame.f_back
    return any(str(Path(frame.f_code.co_filename).resolve()).startswith(folder) for folder in OURS)

def recording(cls, name):
    original = getattr(cls, name)
    def wrapper(self, *args):
        if by_us():
            asked.append((name, args))
        return original(self, *args)
    setattr(cls, name, wrapper)

for name in ("__getitem__", "__contains__", "get"):
    recording(type(os.environ), name)

def query(*args, **kwargs):
    raise AssertionError("asked for a device at import")

for name in ("is_available", "device_count", "current_device", "get_device_capability", "_lazy_init"):
    setattr(torch.cuda, name, query)

tasks = Path("/proc/self/task")
before = threading.active_count(), len(list(tasks.iterdir())) if tasks.is_dir() else 0
import flash
import flash.attention
after = threading.active_count(), len(list(tasks.iterdir())) if tasks.is_dir() else 0
assert before == after, (before, after)
assert not asked, asked
assert not torch.cuda.is_initialized()
print(flash.__version__)
""")
    assert out.strip()


def test_torch_backend_serves_where_triton_cannot_be_imported() -> None:
    out = run("""
import sys

class WithoutTriton:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] == "triton" else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = map(WithoutTriton, sys.meta_path)
import torch
import flash
import flash.attention
import flash.autotune.tables
import flash.kernels.spec

q, k, v = (torch.randn(2, 3, 17, 40, dtype=torch.float64, requires_grad=True) for _ in range(3))
o = flash.attention.flash_attention(q, k, v, causal=True)
hidden = torch.ones(17, 17, dtype=torch.bool).triu(1)
expected = (q @ k.mT * 40**-0.5).masked_fill(hidden, float("-inf")).softmax(-1) @ v
torch.testing.assert_close(o, expected)
for x, y in zip(torch.autograd.grad(o.sum(), (q, k, v)), torch.autograd.grad(expected.sum(), (q, k, v))):
    torch.testing.assert_close(x, y)
try:
    flash.attention.flash_attention(q, k, v, backend="triton")
except NotImplementedError as error:
    assert "triton" in str(error).lower(), error
else:
    raise AssertionError("the triton backend served a call without Triton")
assert "triton" not in sys.modules
flash.info()
print("served")
""")
    assert out.strip().endswith("served")
