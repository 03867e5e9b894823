"""Which calls the Hopper kernels get: asked for by name, or where a table has timed them to be faster; with the reason.

There is no such GPU here: `hopper` pretends, and what the kernels return is never looked at.
"""

import runpy
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import flash
from flash import dispatch
from flash.autograd import attend
from flash.autotune import tables
from flash.kernels.spec import Config, Gradients, Mods, Spec
from flash.problem import Problem

GPU = torch.device("cuda", 0)
NAME = "NVIDIA H200"
PLAIN, OWN = Config(128, 64, 8, 3), Config(128, 128, 8, 2)


def rows(hopper: float, plain: float) -> tuple[tables.Row, ...]:
    """A table's rows for bfloat16 at head_dim 128, with milliseconds of the Hopper kernels and of the plain ones."""
    times = {"forward": plain, "dkdv": plain, "dq": plain, "hopper_forward": hopper, "hopper_backward": 2 * hopper}
    return tuple(
        tables.Row(name, "bfloat16", 128, None, None, None, OWN if name in tables.HOPPER else PLAIN, 1024, 0, ms)
        for name, ms in times.items()
    )


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Pretends that tensors lie on an H200; call it with rows to give that GPU a table."""
    found: list[tables.Table] = []

    def give(given: tuple[tables.Row, ...]) -> None:
        found[:] = [tables.Table("cuda:90", NAME, "3.7.1", tables.kernel_hash(), True, given)]
        forget()

    monkeypatch.setattr(dispatch, "triton_release", lambda: (3, 7))
    monkeypatch.setattr(dispatch, "interpreted", lambda: False)
    monkeypatch.setattr(dispatch, "target_of", lambda device: "cuda:90")
    monkeypatch.setattr(dispatch, "gpu_of", lambda device: NAME)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.Tensor, "device", GPU)
    monkeypatch.setattr(tables, "user_table", lambda target, gpu: found[0] if found and gpu == NAME else None)
    forget()
    yield give
    forget()


def forget() -> None:
    for function in (tables._choose, tables.timed, tables.is_faster):
        function.cache_clear()


def call(**keywords: Any) -> Problem:
    q = torch.empty(1, 4, 100, 128, dtype=torch.bfloat16)
    return Problem.of(q, q[:, :2], q[:, :2], **keywords)


def test_until_they_are_timed_they_are_taken_by_name_only(hopper: Any) -> None:
    assert dispatch.chosen(call()) == "triton"
    assert dispatch.chosen(call(backend="hopper")) == "hopper"
    assert dispatch.chosen(call(backend="hopper"), "backward") == "hopper"
    found = flash.info(call().q)
    assert found["backend"] == "triton" and "not been timed" in found["backends"]["hopper"]
    by_name = flash.info(call().q, backend="hopper")
    assert by_name["backends"]["hopper"] == "served"
    assert by_name["configs"].keys() == {"hopper_forward", "hopper_backward"}
    assert "untimed" in by_name["configs"]["hopper_forward"]["reason"]


def test_a_table_that_timed_them_faster_makes_them_the_choice(hopper: Any) -> None:
    hopper(rows(1.0, 2.0))
    for part in ("forward", "backward"):
        assert dispatch.chosen(call(), part) == "hopper"
    assert dispatch.tuned(call(), "hopper_forward") == tables.Choice(OWN, f"timed on {NAME}")
    assert flash.info(call().q)["configs"].keys() == {"hopper_forward", "hopper_backward"}
    hopper(rows(2.1, 2.0))
    assert [dispatch.chosen(call(), part) for part in ("forward", "backward")] == ["triton", "triton"]


def test_each_direction_is_chosen_for_itself(hopper: Any) -> None:
    hopper(tuple(row for row in rows(1.0, 2.0) if row.kernel != "hopper_backward"))
    assert [dispatch.chosen(call(), part) for part in ("forward", "backward")] == ["hopper", "triton"]
    assert flash.info(call().q)["configs"].keys() == {"hopper_forward", "dkdv", "dq"}


@pytest.mark.parametrize("window", [None, (63, 0), (63, None), (None, 63)])
def test_tiles_timed_on_full_calls_serve_no_window_that_they_are_not_shipped_for(hopper: Any, window: Any) -> None:
    three, two = Config(192, 128, 12, 2), Config(128, 128, 8, 2)
    hopper((tables.Row("hopper_forward", "bfloat16", 64, None, None, None, three, 1024, 0, 1.0),))
    q = torch.empty(1, 4, 100, 64, dtype=torch.bfloat16)
    found = dispatch.tuned(Problem.of(q, q, q, window=window, backend="hopper"), "hopper_forward")
    assert found.config == (three if window is None else two)
    assert found.reason == (f"timed on {NAME}" if window is None else "compiled and simulated, untimed")


def test_deterministic_gradients_are_handed_to_the_plain_kernels(hopper: Any) -> None:
    hopper(rows(1.0, 2.0))
    given = call(deterministic=True)
    assert [dispatch.chosen(given, part) for part in ("forward", "backward")] == ["hopper", "triton"]
    with pytest.raises(NotImplementedError, match="deterministic"):
        dispatch.chosen(call(deterministic=True, backend="hopper"), "backward")


def test_torch_s_own_switch_makes_a_call_deterministic() -> None:
    q = torch.randn(1, 1, 3, 4)
    assert not Problem.of(q, q, q).deterministic
    torch.use_deterministic_algorithms(True)
    try:
        assert Problem.of(q, q, q).deterministic
        assert not Problem.of(q, q, q, deterministic=False).deterministic
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    "keywords, reason",
    [
        ({"bias": torch.zeros(100, 100)}, "a bias, which the Hopper kernels lack"),
        ({"mask": torch.ones(100, 100, dtype=torch.bool)}, "a mask, which the Hopper kernels lack"),
        ({"dropout_p": 0.1}, "dropout, which the Hopper kernels lack"),
    ],
)
def test_what_they_lack_is_said_and_goes_to_the_plain_kernels(hopper: Any, keywords: Any, reason: str) -> None:
    hopper(rows(1.0, 2.0))
    assert dispatch.chosen(call(**keywords)) == "triton"
    assert reason in flash.info(call().q, **keywords)["backends"]["hopper"]
    with pytest.raises(NotImplementedError, match=f"{reason}; use backend='auto'"):
        dispatch.chosen(call(**keywords, backend="hopper"))


def test_a_gradient_of_some_operands_is_asked_of_the_plain_kernels(hopper: Any) -> None:
    hopper(rows(1.0, 2.0))
    assert dispatch.chosen(call(), "backward", Gradients(True, False, False)) == "triton"


@pytest.mark.parametrize("capability", [(8, 0), (10, 0), (12, 0)])
def test_other_gpus_are_refused(hopper: Any, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with pytest.raises(NotImplementedError, match=f"9.0, cuda:0 has {capability[0]}.{capability[1]}"):
        dispatch.chosen(call(backend="hopper"))


def test_a_config_of_three_warpgroups_is_theirs_alone() -> None:
    three = Config(192, 128, 12, 2)
    q = torch.randn(1, 1, 3, 64)
    assert Problem.of(q, q, q, backend="hopper", config=three).configs[0] == three
    with pytest.raises(ValueError, match="block_m must be one of"):
        Problem.of(q, q, q, config=three)


def test_a_config_of_the_plain_kernels_is_run_by_them(hopper: Any) -> None:
    hopper(rows(1.0, 2.0))
    forward = call(config=Config(64, 32, 4, 3))
    assert [dispatch.chosen(forward, part) for part in ("forward", "backward")] == ["triton", "hopper"]
    assert dispatch.tuned(forward, "forward").config == Config(64, 32, 4, 3)
    backward = call(config={"dq": Config(64, 32, 4, 3)})
    assert [dispatch.chosen(backward, part) for part in ("forward", "backward")] == ["hopper", "triton"]


@pytest.mark.parametrize(
    "config, message",
    [
        ({"forward": Config(192, 128, 8, 2)}, "config\\['forward'\\] must have 16 queries a warp"),
        ({"forward": Config(64, 128, 8, 2)}, "config\\['forward'\\].block_m must be one of"),
        ({"dkdv": Config(128, 128, 8, 2)}, "config\\['dkdv'\\].block_m must be one of"),
        ({"dq": Config(192, 128, 8, 2)}, "config\\['dq'\\].block_m must be one of"),
        ({"dq": Config(64, 64, 12, 2)}, "config\\['dq'\\].num_warps must be one of"),
    ],
)
def test_a_config_that_their_kernels_do_not_take_is_refused_at_once(config: Any, message: str) -> None:
    q = torch.randn(1, 1, 3, 64)
    with pytest.raises(ValueError, match=message):
        Problem.of(q, q, q, backend="hopper", config=config)


def test_delta_s_config_is_that_of_a_plain_kernel() -> None:
    q = torch.randn(1, 1, 3, 64)
    assert Problem.of(q, q, q, backend="hopper", config={"dq": Config(64, 64, 4, 2)}).configs[2] is not None


@pytest.mark.parametrize(
    "keywords, needs, reason",
    [({"deterministic": True}, "qkv", "deterministic"), ({}, "q", "dk or dv is not asked for")],
)
def test_a_backward_that_they_lack_is_refused_before_the_forward_runs(
    hopper: Any, keywords: Any, needs: str, reason: str
) -> None:
    shape = 1, 2, 100, 128
    q, k, v = (torch.empty(shape, dtype=torch.bfloat16, requires_grad=name in needs) for name in "qkv")
    with pytest.raises(NotImplementedError, match=reason):
        attend(Problem.of(q, k, v, backend="hopper", **keywords))
    found = flash.info(q, k, v, backend="hopper", **keywords)
    refused = found["backward"]
    assert refused == {"backend": "hopper", "hopper": "served"} if not keywords else reason in refused["hopper"]
    assert found["configs"].keys() == {"hopper_forward", *(() if keywords else ("hopper_backward",))}


@pytest.mark.interpret(gpu=False)  # on a GPU the kernels' own tests launch them
@pytest.mark.parametrize("causal", [False, True])
def test_a_call_by_name_runs_both_kernels_and_gets_the_oracle_s_numbers(
    monkeypatch: pytest.MonkeyPatch, causal: bool
) -> None:
    pytest.importorskip("triton.experimental.gluon")
    from flash.kernels import hopper_backward, hopper_forward
    from tests import features
    from tests.bounds import check
    from tests.calls import random_inputs
    from tests.interpreter.gluon import Simulated

    ran = []

    class Watched(Simulated):
        def __getitem__(self, grid: Any) -> Any:
            ran.append(self.kernel.fn.__module__)
            return super().__getitem__(grid)

    monkeypatch.setattr(dispatch, "hopper_refuses", lambda device, dtype: None)
    monkeypatch.setattr(hopper_forward, "forward_kernel", Watched(hopper_forward.forward_kernel))
    monkeypatch.setattr(hopper_backward, "backward_kernel", Watched(hopper_backward.backward_kernel))
    x = random_inputs(lambda t: t, seqlen_q=70, head_dim=64, dtype=torch.float16, causal=causal)
    check(features.run(x, "hopper", None), x)
    assert ran == [hopper_forward.__name__, hopper_backward.__name__]


def test_rows_beyond_what_tma_counts_are_named() -> None:
    from flash.kernels.hopper_backward import unserved

    q = torch.empty(2**15, 2**8, 2**8, 64, dtype=torch.bfloat16, device="meta")
    every = Gradients(True, True, True)
    assert unserved(q, q, q, Mods(), Spec(), every, False) == f"{2**31} rows, where TMA counts to 2^31"
    assert unserved(q[1:], q[1:], q[1:], Mods(), Spec(), every, False) is None


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")  # which is where it should be
def test_a_triton_without_gluon_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton.experimental.gluon", None)
    with pytest.raises(ImportError, match="the Hopper kernels are written in Gluon, which Triton .* lacks"):
        runpy.run_module("flash.kernels.hopper_forward")
