"""What "every kind of attention in one call" promises, one small test a promise, from the outside.

Each promise has tests of its own in full: the file that holds them is named beside it.
"""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from flash.attention import flash_attention
from tests import calls, features
from tests.bounds import check
from tests.calls import Place, random_inputs
from tests.features import Sizes

ROOT = Path(__file__).parents[1]
BOTH = pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.interpret)])
KEYWORDS = [name for name in features.FEATURES if name not in ("causal", "q_offset", "padding")]


@pytest.mark.sampled(4)
@BOTH
@pytest.mark.parametrize("name", KEYWORDS)
def test_every_keyword_is_right_forward_and_backward(place: Place, backend: str, name: str) -> None:
    """test_features.py in every dtype, test_pairs.py with every other, test_property.py three at a time."""
    x = features.call_of(place, [name, "causal"])
    check(features.run(x, backend), features.known(x))


@pytest.mark.sampled(2)
@BOTH
@pytest.mark.parametrize("form", ["dense", "packed"])
def test_all_keywords_go_together(place: Place, backend: str, form: str) -> None:
    x = features.call_of(place, [*KEYWORDS, "causal", "groups", *(["packed"] if form == "packed" else [])])
    check(features.run(x, backend), features.known(x))


@BOTH
def test_a_bias_gradient_has_the_bias_s_own_shape_and_repeats(place: Place, backend: str) -> None:
    x = features.call_of(place, [])
    for shape in ((1, 1, 1, 23), (2, 1, 19, 1), (19, 23), ()):
        x.options["bias"] = place(torch.randn(shape, dtype=torch.float64))
        first, second = features.run(x, backend), features.run(x, backend)
        assert first.dbias is not None and second.dbias is not None and first.dbias.shape == shape
        assert torch.equal(first.dbias, second.dbias)


@BOTH
def test_a_user_function_is_a_pair_of_twins(place: Place, backend: str) -> None:
    """test_mods.py; test_features.py has the trap of a function defined anew under its old name."""
    x = features.call_of(place, ["score_mod", "mask_mod"])
    check(features.run(x, backend), x)


def test_the_common_rules_are_shipped_with_their_twins() -> None:
    from flash import mods

    names = ("document", "prefix_lm", "dilated_window", "relative_position", "alibi", "tanh_softcap", "neighborhood_2d")
    assert [name for name in names if not callable(getattr(mods, name, None))] == []


@pytest.mark.sampled(2)
@pytest.mark.interpret(gpu=False)  # the interpreter counts the work
@pytest.mark.parametrize("rule", ["causal", "window", "padding", "document", "block_mask"])
def test_hidden_tiles_are_not_visited(place: Place, launches: list[Any], rule: str) -> None:
    """test_block_sparse.py, test_window.py: forward and backward, to the tile."""
    n = 96
    x = random_inputs(place, heads=1, heads_k=1, seqlen_q=n, head_dim=16)
    calls.backward(x)
    whole = {launch.kernel: launch.dots for launch in launches}
    rows = torch.arange(n, dtype=torch.int32)
    made: dict[str, Any] = {"causal": True, "window": (16, 16), "padding": (rows < 32)[None, None, None]}
    if rule in made:
        x.options["mask" if rule == "padding" else rule] = made[rule]
    elif rule == "document":
        from flash.mods import document

        x.options["mask_mod"] = document(rows // 32)
    else:
        x.options["block_mask"] = features.staircase_blocks(1, n, n, "cpu")
        features.run(x, "triton")
    launches.clear()
    if rule != "block_mask":
        calls.backward(x)
    else:
        features.run(x, "triton")
    for launch in launches:
        if launch.dots:
            assert launch.dots < (0.9 if rule != "block_mask" else 2) * whole[launch.kernel], launch.kernel


@BOTH
def test_packed_and_nested_sequences_are_served(place: Place, backend: str) -> None:
    """test_varlen_kernels.py, test_nested.py."""
    lengths = (5, 0, 9)
    rows = [torch.randn(n, 2, 8, dtype=torch.float64) for n in lengths]
    nested = torch.nested.nested_tensor([place(t) for t in rows], layout=torch.jagged).transpose(1, 2)
    o = flash_attention(nested, nested, nested, causal=True, backend=backend, config=features.TILES)
    assert isinstance(o, torch.Tensor) and o.is_nested
    for got, t in zip(o.transpose(1, 2).unbind(), rows, strict=True):
        q = place(t.transpose(0, 1)[None])
        want = flash_attention(q, q, q, causal=True, backend="torch")
        assert isinstance(want, torch.Tensor) and torch.allclose(got, want[0].transpose(0, 1), rtol=1e-12, atol=1e-13)


@BOTH
def test_a_lying_length_makes_nan_of_its_own_rows(place: Place, backend: str) -> None:
    """test_varlen_kernels.py: 200 drawn at random."""
    x = features.call_of(place, ["packed"], Sizes(lengths=((5, 5), (6, 6), (7, 7))))
    x.options["cu_seqlens_k"] = place(torch.tensor([0, 5, 11, 2**31 - 1], dtype=torch.int32))
    got = features.run(x, backend)
    assert got.o[:11].isfinite().all() and got.o[11:].isnan().all()


@BOTH
def test_key_padding_costs_a_byte_a_key(place: Place, backend: str) -> None:
    """test_features.py: no allocation of the square of the length."""
    from flash.problem import Problem

    x = features.call_of(place, ["padding"])
    mask = Problem.of(x.q, x.k, x.v, **x.options).mods.mask
    assert mask.untyped_storage().data_ptr() == x.options["mask"].untyped_storage().data_ptr()
    assert mask.numel() == 2 * 23 and mask.element_size() == 1


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=[pytest.mark.interpret, pytest.mark.slow])])
def test_gradients_pass_gradcheck(place: Place, backend: str) -> None:
    """test_pairs.py: every feature, and every pair of them."""
    features.gradcheck(features.call_of(place, ["window", "bias", "sinks"]), backend)


@BOTH
def test_dropout_repeats_under_manual_seed_only(place: Place, backend: str) -> None:
    """test_dropout.py: the mask is Philox's, on every backend and for every tile."""
    x = random_inputs(place, seqlen_q=20)
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(flash_attention(x.q, x.k, x.v, dropout_p=0.4, backend=backend, config=features.TILES))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])  # type: ignore[arg-type]


@BOTH
@pytest.mark.parametrize("lowest", [float("-inf"), torch.finfo(torch.float64).min])
def test_a_row_without_keys_is_zero(place: Place, backend: str, lowest: float) -> None:
    """test_masked_rows.py: by every means."""
    x = features.call_of(place, [])
    x.options["bias"] = place(torch.zeros(19, 23, dtype=torch.float64))
    x.options["bias"][3] = lowest
    got = features.run(x, backend)
    assert (got.o[:, :, 3] == 0).all() and (got.lse[:, :, 3] == float("-inf")).all()
    assert all(t is None or t.isfinite().all() for t in got[2:])


@pytest.mark.parametrize(
    "keyword, value, error",
    [
        ("mask", torch.ones(19, 22, dtype=torch.bool), ValueError),
        ("mask", torch.ones(19, 23), ValueError),
        ("bias", torch.ones(19, 23, dtype=torch.bool), ValueError),
        ("window", -1, ValueError),
        ("softcap", 0.0, ValueError),
        ("dropout_p", 1.0, ValueError),
        ("alibi_slopes", torch.ones(3), ValueError),
        ("sinks", torch.ones(3), ValueError),
        ("score_mod", lambda s, b, h, i, j, args: s, TypeError),
        ("mask_mod", lambda b, h, i, j, args: i >= j, TypeError),
    ],
)
def test_bad_input_is_named(keyword: str, value: Any, error: type[Exception]) -> None:
    """test_problem.py has each message."""
    x = features.call_of(lambda t: t, [])
    with pytest.raises(error, match=keyword):
        flash_attention(x.q, x.k, x.v, **{keyword: value})


def test_the_famous_bugs_have_a_test_each() -> None:
    from tests import test_famous_bugs

    names = [name for name in vars(test_famous_bugs) if name.startswith("test_")]
    assert len(names) >= 15
    assert all("https://" in (getattr(test_famous_bugs, name).__doc__ or "") for name in names)


@pytest.mark.parametrize("target", ["mutants", "coverage"])
def test_the_tests_are_tested(target: str) -> None:
    assert f"\n{target}:" in (ROOT / "Makefile").read_text()


RESULTS = sorted(ROOT.glob("bench/results/*/"))


@pytest.mark.parametrize("name", ["features.json", "features.png", "long.json", "long-context.png"])
def test_the_cost_of_features_is_measured(name: str) -> None:
    assert any((folder / name).is_file() for folder in RESULTS)


def test_features_on_a_cpu_are_no_slower_than_standard_attention() -> None:
    """At length 4096."""
    path = next(iter(ROOT.glob("bench/results/cpu*/features.json")))
    rows = json.loads(path.read_text())["rows"]
    found = {(r["case"], r["what"], r["peer"]): r["latency"]["median"] for r in rows if r["latency"]}
    ours = {key[:2]: value for key, value in found.items() if key[2] == "flash"}
    theirs = {key[:2]: value for key, value in found.items() if key[2] == "standard"}
    both = ours.keys() & theirs.keys()
    assert both and [key for key in both if ours[key] > theirs[key]] == []


def test_every_pair_of_features_is_tested() -> None:
    names = [name for name in features.NAMES if name not in ("mask", "padding")]
    assert {*itertools.combinations(names, 2)} <= {*features.PAIRS}
