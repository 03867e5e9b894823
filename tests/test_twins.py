"""ScoreMod and MaskMod: what they refuse, and handles that never confuse two functions of one name."""

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from flash import mods
from flash.mods import MaskMod, ScoreMod, from_handle, handle_of

triton = pytest.importorskip("triton")


@triton.jit
def score(s, b, h, i, j, args):
    return s


@triton.jit
def mask(b, h, i, j, args):
    return i >= j


def score_twin(s, b, h, i, j, args):  # type: ignore[no-untyped-def]
    return s


def mask_twin(b, h, i, j, args):  # type: ignore[no-untyped-def]
    return i >= j


class Callee:
    def __call__(self, b: Any, h: Any, i: Any, j: Any, args: Any, more: int = 0) -> Any:
        return i >= j


def test_functions_of_the_right_kind_are_taken() -> None:
    x = (torch.ones(2),)
    for mod in (ScoreMod(score, score_twin, score, x), ScoreMod(score, None, None), ScoreMod(None, score_twin, None)):
        assert mod.handle
    for twin in (mask_twin, Callee(), lambda *anything: anything[2] >= anything[3], torch.add, None):
        assert MaskMod(mask, twin).fn is mask
    assert MaskMod(mask, mask_twin, x).args is x


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: ScoreMod(score_twin, score_twin, score), "ScoreMod.fn must be a @triton.jit function .*got function"),
        (lambda: ScoreMod("score", score_twin, score), "ScoreMod.fn must be a @triton.jit function .*got str 'score'"),
        (lambda: ScoreMod(mask, score_twin, score), r"ScoreMod.fn must take 6 arguments .*got \['b"),
        (lambda: ScoreMod(score, score_twin, mask), r"ScoreMod.derivative must take 6 arguments"),
        (lambda: ScoreMod(score, score_twin, 1.0), "ScoreMod.derivative must be a @triton.jit function .*got float"),
        (lambda: ScoreMod(score, mask_twin, score), r"ScoreMod.torch_fn must take 6 arguments .*got \(b, h"),
        (lambda: ScoreMod(score, score, score), "ScoreMod.torch_fn must be a Python function"),
        (lambda: ScoreMod(score, "score_twin", score), "ScoreMod.torch_fn must be a Python function .*got str"),
        (lambda: ScoreMod(None, None, None), "ScoreMod must have fn, torch_fn or both, got neither"),
        (lambda: ScoreMod(score, score_twin, score, torch.ones(2)), "ScoreMod.args must be a tuple .*got Tensor"),
        (lambda: ScoreMod(score, score_twin, score, (1.5,)), r"a tuple of tensors, got \('float',\)"),
        (lambda: MaskMod(score, mask_twin), r"MaskMod.fn must take 5 arguments \(b, h, i, j, args\), got \['s'"),
        (lambda: MaskMod(mask, score_twin), "MaskMod.torch_fn must take 5 arguments"),
        (lambda: MaskMod(mask, lambda b, h, i: b), "MaskMod.torch_fn must take 5 arguments"),
        (lambda: MaskMod(None, None), "MaskMod must have fn, torch_fn or both, got neither"),
        (lambda: MaskMod(mask, mask_twin, [torch.ones(2)]), "MaskMod.args must be a tuple of tensors, got list"),
        (lambda: MaskMod(mask, mask_twin, (), "spans"), "MaskMod.spans must be a Python function"),
        (lambda: MaskMod(mask, mask_twin, (), lambda seqlen_q: None), "MaskMod.spans must take 3 arguments"),
        (lambda: MaskMod(mask, mask_twin, (), None, mask_twin.__get__(1)), "MaskMod.check must take 5 arguments"),
    ],
)  # fmt: skip
def test_functions_of_the_wrong_kind_are_named(make: Callable[[], Any], message: str) -> None:
    for _ in range(2):  # what was refused once is refused again
        with pytest.raises(TypeError, match=message):
            make()


def test_a_missing_twin_is_named_where_it_is_needed() -> None:
    both = ScoreMod(score, score_twin, score)
    for twin in ("triton", "torch", "derivative"):
        both.require(twin)
    alone = ScoreMod(score, None, None)
    alone.require("triton")
    with pytest.raises(
        TypeError, match="ScoreMod.torch_fn must be a Python function .*for the torch backend, got None"
    ):
        alone.require("torch")
    with pytest.raises(TypeError, match="ScoreMod.derivative must be a @triton.jit function for a gradient on"):
        alone.require("derivative")
    with pytest.raises(TypeError, match="MaskMod.fn must be a @triton.jit function for the triton backend, got None"):
        MaskMod(None, mask_twin).require("triton")


def test_check_sees_the_sizes_and_the_args_of_a_call() -> None:
    calls = []
    mod = ScoreMod(score, score_twin, score, (torch.ones(2),), check=lambda *sizes: calls.append(sizes))
    mod.fit(1, 2, 3, 4)
    assert calls == [(1, 2, 3, 4, mod.args)]
    MaskMod(mask, mask_twin).fit(1, 2, 3, 4)


def test_handles_bring_back_the_functions_with_other_args() -> None:
    mod, other = MaskMod(mask, mask_twin, (torch.ones(2),)), (torch.zeros(3), torch.ones(1))
    found = from_handle(handle_of(mod), other)
    assert type(found) is MaskMod and (found.fn, found.torch_fn, found.args) == (mask, mask_twin, other)
    assert handle_of(found) == handle_of(mod) and mod.args[0].numel() == 2
    twice = ScoreMod(score, score_twin, score)
    found = from_handle(handle_of(twice), ())
    assert type(found) is ScoreMod and (found.fn, found.torch_fn, found.derivative) == (score, score_twin, score)
    with pytest.raises(ValueError, match="handle must name a mod of this process, got 'nobody:7'"):
        from_handle("nobody:7", ())


def test_a_handle_is_that_of_the_functions_whatever_the_args() -> None:
    handle = handle_of(MaskMod(mask, mask_twin, (torch.ones(2),)))
    assert handle_of(MaskMod(mask, mask_twin)) == handle and handle.startswith("mask:")
    others = [
        MaskMod(mask, None),
        MaskMod(None, mask_twin),
        MaskMod(mask, lambda b, h, i, j, args: i >= j),
        MaskMod(mask, mask_twin, (), lambda seqlen_q, seqlen_k, args: None),
        MaskMod(mask, mask_twin, (), None, lambda *sizes: None),
        ScoreMod(score, score_twin, score),
        ScoreMod(score, score_twin, None),
    ]
    assert len({handle, *map(handle_of, others)}) == len(others) + 1


def test_a_function_defined_again_under_its_name_gets_another_handle() -> None:
    def define(above: bool) -> Any:
        if above:

            @triton.jit
            def rule(b, h, i, j, args):
                return i < j
        else:

            @triton.jit
            def rule(b, h, i, j, args):
                return i >= j

        return rule

    def twin(above: bool) -> Any:
        def rule(b: Any, h: Any, i: Any, j: Any, args: Any) -> Any:
            return i < j if above else i >= j

        return rule

    first, second = MaskMod(define(True), None), MaskMod(define(False), None)
    assert first.fn.__name__ == second.fn.__name__ and handle_of(first) != handle_of(second)
    assert from_handle(handle_of(first), ()).fn is first.fn and from_handle(handle_of(second), ()).fn is second.fn
    # nor is one mistaken for another that took its place in memory
    handles = set()
    for n in range(50):
        mod = MaskMod(None, twin(n % 2 == 0))
        assert bool(from_handle(handle_of(mod), ()).torch_fn(0, 0, 1, 0, ())) == (n % 2 == 1)
        handles.add(handle_of(mod))
    assert len(handles) == 50


def test_threads_agree_on_a_handle() -> None:
    def twin(b: Any, h: Any, i: Any, j: Any, args: Any) -> Any:
        return i >= j

    found: list[str] = []
    start = threading.Barrier(8)

    def work() -> None:
        start.wait()
        found.append(handle_of(MaskMod(mask, twin)))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 and len(set(found)) == 1


def test_mods_are_frozen() -> None:
    mod = MaskMod(mask, mask_twin)
    with pytest.raises(AttributeError):
        mod.args = ()  # type: ignore[misc]
    assert mod != MaskMod(mask, mask_twin) and hash(mod) != 0  # equal by identity: tensors do not compare


def test_a_copy_has_args_of_its_own_and_pickling_is_refused() -> None:
    mod = mods.document(torch.arange(8) // 3)
    other = copy.deepcopy(mod)
    assert other.handle == mod.handle and torch.equal(other.args[0], mod.args[0]) and other.args[0] is not mod.args[0]
    with pytest.raises(TypeError, match="MaskMod cannot be pickled"):
        pickle.dumps(mod)
