"""A replay launches what the ordinary way would launch, and nothing that a replay was not made for finds one.

A stand-in driver compiles for sm_90 and records launches instead of making them (drivers.py).
"""

from typing import Any

import pytest

from tests.drivers import printed

pytestmark = pytest.mark.aot

SET_UP = """
from flash import decode, dispatch, dispatch_step, replays
from flash.autotune import tables
from flash.decode import flash_attention_decode
from flash.kernels.spec import Config

replays.SERVED = lambda x: x.is_cpu
dispatch.target_of = lambda device: "cuda:90"
dispatch_step.target_of = lambda device: "cuda:90"
dispatch_step.chosen = lambda backend, *_: "torch" if backend == "torch" else "triton"
dispatch_step.tuned = lambda step: tables.Choice(step.config or Config(16, 32, 4, 2), "small")
made = []
driver.active.launcher_cls = lambda source, metadata: (
    lambda x, y, z, stream, function, packed, about, enter, leave, *args: made.append([metadata.hash, x, args])
)


def flat(args, tensors):
    # a tensor as its place in `tensors`, or what the call allocated
    for x in args:
        if isinstance(x, tuple):
            yield from flat(x, tensors)
        elif isinstance(x, torch.Tensor):
            places = [n for n, y in enumerate(tensors) if x.data_ptr() == y.data_ptr()]
            yield str(places[0]) if places else "made"
        else:
            yield f"{type(x).__name__} {x}"


def tensor(*shape, dtype=torch.bfloat16, by=0):
    # its first element lies `by` elements past an address that 16 divides
    size = torch.Size(shape).numel()
    return torch.zeros(size + 64, dtype=dtype)[by : by + size].view(shape)


def launched(tensors, options):
    # what a call launches, and how many ordinary ways were taken for it
    made.clear()
    before = len(asked)
    with torch.no_grad():
        o, lse = flash_attention_decode(**tensors, **options, return_lse=True)
    given = list(tensors.values())
    about = [[list(x.shape), list(x.stride()), str(x.dtype)] for x in (o, lse)]
    return [[[name, grid, list(flat(args, given))] for name, grid, args in made], about], len(asked) - before


asked = []
of = decode.Step.of
decode.Step.of = lambda *args, **options: asked.append(0) or of(*args, **options)


def integers(*values):
    return torch.tensor(values, dtype=torch.int32)


def dense(**more):
    return {
        "q": tensor(2, 4, 1, 64), "k_cache": tensor(2, 2, 128, 64), "v_cache": tensor(2, 2, 128, 64),
        "cache_seqlens": integers(9, 5), **more,
    }


def paged(**more):
    return dense(
        k_cache=tensor(9, 2, 16, 64), v_cache=tensor(9, 2, 16, 64),
        block_table=torch.zeros(2, 4, dtype=torch.int32), **more,
    )


def new(count=1):
    return {"k": tensor(2, 2, count, 64), "v": tensor(2, 2, count, 64)}


turns = {"rotary_cos": torch.ones(64, 8), "rotary_sin": torch.zeros(64, 8)}
"""

SAME = """
calls = {
    "dense": (dense, {}),
    "parts": (dense, {"num_splits": 3}),
    "paged": (paged, {"num_splits": 2}),
    "append": (lambda: paged(**new()), {}),
    "rotary": (lambda: paged(**new(2), **{name: x.clone() for name, x in turns.items()}), {"num_splits": 2}),
    "slots and padding": (lambda: dense(cache_batch_idx=integers(1, 0), cache_leftpad=integers(0, 2)), {}),
    "float8": (
        lambda: dense(
            **{name: tensor(2, 2, 128, 64, dtype=torch.float8_e4m3fn) for name in ("k_cache", "v_cache")},
            **{name: torch.ones(2) for name in ("k_scale", "v_scale")}, **new(),
        ), {},
    ),
    "score": (lambda: dense(sinks=torch.zeros(4), alibi_slopes=torch.ones(4)), {"softcap": 9.0, "num_splits": 2}),
    "window": (lambda: dense(q=tensor(2, 4, 3, 64)), {"window": (20, 0), "scale": 0.3}),
    "column": (lambda: dense(cache_seqlens=torch.zeros(2, 3, dtype=torch.int32)[:, 0]), {}),
    "parameter": (lambda: dense(sinks=torch.nn.Parameter(torch.zeros(4))), {}),
    "half": (lambda: {name: x.half() if x.is_floating_point() else x for name, x in dense().items()}, {}),
}
found = {}
for name, (tensors, options) in calls.items():
    replays.replays.clear()
    ordinary, first = launched(tensors(), options)
    again, second = launched(tensors(), options)
    found[name] = [ordinary, again, [first, second]]
print(json.dumps(found))
"""

OTHERS = """
def replayed(tensors, **options):
    return launched(tensors, options)[1] == 0


found = {"first": replayed(dense()), "second": replayed(dense())}
wrong = []
for name, value, others in (
    ("scale", 1.0, (1, True)), ("window", (1, 0), ((True, 0), (1.0, 0))),
    ("config", Config(16, 32, 4, 2), (Config(16.0, 32, 4, 2), Config(16, 32, 4, 2, 0), (16, 32, 4, 2, False))),
):
    launched(dense(), {name: value})
    for other in others:
        try:
            found[f"{name} {other} after {value}"] = replayed(dense(), **{name: other})
        except ValueError as error:
            wrong.append(f"{name} {other}: {error}")
found["wrong"] = len(wrong)
found["another dtype"] = replayed({name: x.half() if x.is_floating_point() else x for name, x in dense().items()})
single = {name: x.float() if x.is_floating_point() else x for name, x in dense().items()}
found["float32"] = [replayed(single) for _ in range(2)][-1]
found["negative"] = replayed(dense(q=torch._neg_view(tensor(2, 4, 1, 64))))
torch.Tensor.get_device = lambda x: 1
found["another device"] = replayed(dense())
del torch.Tensor.get_device
for change in (
    {"q": tensor(2, 4, 2, 64)}, {"q": tensor(2, 4, 1, 64, by=1)}, {"cache_seqlens": tensor(2, dtype=torch.int32, by=1)},
    {"k_cache": tensor(2, 128, 2, 64).transpose(1, 2)}, {"v_cache": tensor(2, 2, 128, 32)}, new(), turns,
):
    found[f"another {list(change)}"] = replayed(dense(**change))
tiles = Config(16, 16, 4, 1)
for options in ({"causal": False}, {"window": 5}, {"softcap": 3.0}, {"num_splits": 2}, {"config": tiles}):
    found[f"another {list(options)}"] = replayed(dense(), **options)
same = tensor(2, 2, 128, 64)
for _ in range(2):
    found["k_cache is v_cache"] = replayed(dense(k_cache=same, v_cache=same))
from torch.utils._python_dispatch import TorchDispatchMode
from triton import knobs


class Watcher(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


with Watcher():
    found["a mode"] = replayed(dense())
with torch.autocast("cpu", dtype=torch.bfloat16):
    found["autocast"] = replayed(dense())
runtime, hook = knobs.runtime, lambda *args, **options: None
kernel = next(iter(replays.replays.values())).launches[0].kernel  # of the first call
for name, add, remove in (
    ("enter hook", runtime.launch_enter_hook.add, runtime.launch_enter_hook.remove),
    ("exit hook", runtime.launch_exit_hook.add, runtime.launch_exit_hook.remove),
    ("pre-run hook", kernel.pre_run_hooks.append, kernel.pre_run_hooks.remove),
):
    add(hook)
    found[name] = replayed(dense())
    remove(hook)
current = driver.active.get_current_device
driver.active.get_current_device = lambda: 1
found["another current device"] = replayed(dense())
driver.active.get_current_device = current
knobs.runtime.debug = True
found["debug"] = replayed(dense())
knobs.runtime.debug = False
for _ in range(2):
    found["back again"] = replayed(dense())
before = dense(**new())
launched(before, {}), launched(before, {})
versions = [before[name]._version for name in ("q", "k_cache", "v_cache")]
launched(before, {})
found["written"] = [before[name]._version - n for name, n in zip(("q", "k_cache", "v_cache"), versions)]
try:
    with torch.enable_grad():
        flash_attention_decode(**dense(q=tensor(2, 4, 1, 64).requires_grad_()))
except NotImplementedError:
    found["gradient"] = "raises"
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def same() -> Any:
    pytest.importorskip("triton")
    return printed(SET_UP + SAME)


def test_a_replay_passes_the_arguments_that_triton_passes(same: Any) -> None:
    for name, (ordinary, again, ways) in same.items():
        assert again == ordinary, name
        assert ways == [1, 0], f"{name}: checked when it is new, and not when it comes again"
    kernels = {name: len(ordinary[0]) for name, (ordinary, *_) in same.items()}
    assert kernels["dense"] == 1 and kernels["parts"] == 2 and kernels["append"] == 2 and kernels["rotary"] == 3


def test_what_is_another_call_takes_the_ordinary_way() -> None:
    pytest.importorskip("triton")
    found = printed(SET_UP + OTHERS)
    assert found.pop("first") is False and found.pop("second") is True and found.pop("back again") is True
    assert found.pop("wrong") == 6 and found.pop("written") == [0, 1, 1] and found.pop("gradient") == "raises"
    assert not any(found.values()), found
