"""A plan launches what the ordinary way would launch, and nothing that a plan was not made for finds one.

A stand-in driver compiles for sm_90 and records launches instead of making them (drivers.py).
"""

from typing import Any

import pytest

from tests.drivers import printed

pytestmark = pytest.mark.aot

SET_UP = """
import collections
from torch.nn import functional

import flash.attention
from flash import dispatch, plans
from flash.attention import flash_attention
from flash.autotune import tables
from flash.kernels.forward import forward_kernel
from flash.kernels.spec import Config

plans.SERVED = lambda x: x.is_cpu
dispatch.choose = lambda *_: "triton"
dispatch.target_of = lambda device: "cuda:90"
dispatch.tuned = lambda *_: tables.Choice(Config(32, 32, 4, 1), "small tiles compile fast")
Launched = collections.namedtuple("Launched", "grid stream kernel args")
made = []
stand_in = driver.active
stand_in.stream = stand_in.device = 0
stand_in.get_current_stream = lambda device: stand_in.stream
stand_in.get_current_device = lambda: stand_in.device


def launcher(source, metadata):
    return lambda x, y, z, stream, function, packed, about, enter, leave, *args: made.append(
        Launched((x, y, z), stream, metadata.hash, args)
    )


stand_in.launcher_cls = launcher


def flat(args, tensors):
    # a tensor as its place in `tensors`, or -1 for what the call allocated
    for x in args:
        if isinstance(x, tuple):
            yield from flat(x, tensors)
        elif isinstance(x, torch.Tensor):
            places = [i for i, y in enumerate(tensors) if x.data_ptr() == y.data_ptr()]
            yield [places[0] if places else -1, list(x.shape), list(x.stride()), str(x.dtype)]
        else:
            yield [type(x).__name__, str(x)]


def launched(q, k, v, plan, **options):
    # what one call launches: by its plan, or without one
    kept = dict(plans.plans), dict(plans.kinds)
    if not plan:
        plans.plans.clear()
        plans.kinds.clear()
    before, made[:] = len(plans.plans), []
    flash_attention(q, k, v, **options)
    (one,) = made
    plans.plans.update(kept[0])
    plans.kinds.update(kept[1])
    return [one.grid, one.stream, one.kernel, list(flat(one.args, [q, k, v]))]


def tensor(*shape, dtype=torch.bfloat16, by=0):
    # its first element lies `by` elements past an address that 16 divides
    n = 1
    for size in shape:
        n *= size
    return torch.zeros(n + 64, dtype=dtype)[by : by + n].view(shape)


def heads_last(batch, heads, seqlen, head_dim, **more):
    return tensor(batch, seqlen, heads, head_dim, **more).transpose(1, 2)
"""

SAME = """
calls = {
    "plain": ((tensor(2, 4, 128, 64), tensor(2, 4, 128, 64), tensor(2, 4, 128, 64)), {}),
    "causal": ((tensor(2, 4, 128, 64),) * 3, {"causal": True}),
    "half": ((tensor(2, 4, 128, 64, dtype=torch.float16),) * 3, {}),
    "group": ((tensor(2, 4, 128, 64), tensor(2, 2, 128, 64), tensor(2, 2, 128, 64)), {}),
    "longer keys": ((tensor(2, 4, 100, 64), tensor(2, 4, 200, 64), tensor(2, 4, 200, 64)), {}),
    "one query": ((tensor(1, 1, 1, 64), tensor(1, 1, 200, 64), tensor(1, 1, 200, 64)), {}),
    "narrow values": ((tensor(2, 4, 128, 64), tensor(2, 4, 128, 64), tensor(2, 4, 128, 32)), {}),
    "ragged rows": ((tensor(2, 4, 128, 40),) * 3, {}),
    "odd rows": ((tensor(2, 4, 128, 33),) * 3, {}),
    "heads last": ((heads_last(2, 4, 128, 64),) * 3, {}),
    "head_dim innermost not": ((tensor(2, 4, 64, 128).transpose(2, 3),) * 3, {}),
    "scale": ((tensor(2, 4, 128, 64),) * 3, {"scale": 0.3}),
    "negative scale": ((tensor(2, 4, 128, 64),) * 3, {"scale": -0.3}),
    "softcap": ((tensor(2, 4, 128, 64),) * 3, {"softcap": 20.0}),
    "strides of one": ((tensor(1, 1, 128, 16)[..., :1],) * 3, {}),
}
found = {}
for name, (tensors, options) in calls.items():
    first = launched(*tensors, plan=True, **options)
    planned = len(plans.plans)
    by_plan = launched(*tensors, plan=True, **options)
    assert len(plans.plans) == planned
    found[name] = [first, by_plan, launched(*tensors, plan=False, **options)]
count = len(plans.plans)
found["plans"] = [count, len(calls), 0]
print(json.dumps(found))
"""

UNUSUAL = """
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from triton import knobs

by_plan = []
again = forward_kernel.run
forward_kernel.run = lambda *args, **options: by_plan.append(False) or again(*args, **options)


def planned(call):
    # whether a call is launched by a plan: not by the JIT
    by_plan.clear()
    made.clear()
    call()
    assert len(made) == 1
    return not by_plan


q, k = tensor(2, 4, 128, 64), tensor(2, 4, 128, 64)
plain = lambda: flash_attention(q, k, k)
found = {"first": planned(plain), "second": planned(plain)}
found["other tensors"] = planned(lambda: flash_attention(q.clone(), k.clone(), k.clone()))
for place in range(3):
    tensors = [tensor(2, 4, 128, 64, by=1 if place == at else 0) for at in range(3)]
    for _ in range(2):
        found[f"unaligned {place}"] = planned(lambda: flash_attention(*tensors))
grad = q.clone().requires_grad_()
for _ in range(2):
    found["gradient"] = planned(lambda: flash_attention(grad, k, k))
with torch.no_grad():
    found["no_grad"] = planned(lambda: flash_attention(grad, k, k))
found["fewer keys"] = planned(lambda: flash_attention(q, *(tensor(2, 4, 120, 64) for _ in "kv")))
found["another batch"] = planned(lambda: flash_attention(*(tensor(3, 4, 128, 64) for _ in "qkv")))
found["other heads"] = planned(lambda: flash_attention(*(tensor(2, 6, 128, 64) for _ in "qkv")))
found["heads last"] = planned(lambda: flash_attention(*(heads_last(2, 4, 128, 64) for _ in "qkv")))
found["a group"] = planned(lambda: flash_attention(q, *(tensor(2, 2, 128, 64) for _ in "kv")))
found["another head_dim"] = planned(lambda: flash_attention(*(tensor(2, 4, 128, 32) for _ in "qkv")))
found["another bucket of lengths"] = planned(lambda: flash_attention(*(tensor(2, 4, 2048, 64) for _ in "qkv")))
found["causal"] = planned(lambda: flash_attention(q, k, k, causal=True))
found["odd strides"] = planned(lambda: flash_attention(q, *(tensor(2, 4, 128, 72)[..., :64] for _ in "kv")))
mismatched = []
for other in (tensor(3, 4, 128, 64), tensor(2, 3, 128, 64), tensor(2, 4, 128, 32), tensor(2, 4, 128)):
    try:
        flash_attention(q, other, other)
    except ValueError as error:
        mismatched.append(str(error))
found["mismatched"] = len(mismatched)
found["parameter"] = planned(lambda: flash_attention(nn.Parameter(q, requires_grad=False), k, k))


class Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


with Mode():
    found["mode"] = planned(plain)
with torch.autocast("cpu", dtype=torch.bfloat16):
    found["autocast"] = planned(plain)
hook = lambda *args: None
knobs.runtime.launch_enter_hook.add(hook)
found["hook"] = planned(plain)
knobs.runtime.launch_enter_hook.remove(hook)
knobs.runtime.debug = True
found["debug"] = planned(plain)
knobs.runtime.debug = False
stand_in.device = 1
found["another current device"] = planned(plain)
stand_in.device = 0
found["float32"] = [planned(lambda: flash_attention(q.float(), k.float(), k.float())) for _ in range(2)][-1]
found["window"] = [planned(lambda: flash_attention(q, k, k, window=5)) for _ in range(2)][-1]
wrong = []
strange = {"causal": 1, "scale": True, "softcap": True, "dropout_p": False, "backend": "x", "return_lse": 1}
for options in ({"backend": ["auto"]}, *({name: value} for name, value in strange.items())):
    try:
        flash_attention(q, k, k, **options)
    except ValueError as error:
        wrong.append(str(error))
found["wrong"] = len(wrong)
without_strides = [torch.nested.nested_tensor([q[0], q[0]]), q.to_sparse(), q[:1, :1, :1, :1].to_sparse()]
found["without strides"] = []
for x in without_strides:
    try:
        flash_attention(x, x, x)
    except (ValueError, NotImplementedError) as error:
        found["without strides"].append(str(error))
stand_in.stream = 7
plain()
found["stream"] = made[-1].stream
found["after"] = planned(plain)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def same() -> Any:
    return printed(SET_UP + SAME)


def test_a_plan_passes_the_arguments_that_triton_passes(same: Any) -> None:
    planned, calls, _ = same.pop("plans")
    assert planned == calls
    for name, (first, by_plan, without) in same.items():
        assert first == by_plan == without, name


def test_calls_that_triton_tells_apart_run_their_own_kernel(same: Any) -> None:
    kernels = {name: first[2] for name, (first, *_) in same.items() if name != "plans"}
    alike = {"plain", "scale", "longer keys", "one query", "heads last"}  # strides alike: multiples of 16, and a last 1
    assert len({kernels[name] for name in alike}) == 1
    others = [kernel for name, kernel in kernels.items() if name not in alike]
    assert len(set(others) | {kernels["plain"]}) == len(others) + 1


def test_whatever_is_unusual_takes_the_ordinary_way() -> None:
    found = printed(SET_UP + UNUSUAL)
    assert found.pop("wrong") == 7 and found.pop("mismatched") == 4
    assert len(found.pop("without strides")) == 3 and found.pop("stream") == 7
    compiled_alike = {"fewer keys", "another batch", "other heads", "heads last"}
    planned = {"second", "other tensors", "no_grad", "after", *compiled_alike}
    assert {name for name, by_plan in found.items() if by_plan} == planned
