"""What "serving: decoding with split keys and a paged cache" promises, one test a promise; what holds it is named.

Figures on a GPU are read from committed runs of `python -m bench.run --suite decode`: who commits one is held to it.
"""

import inspect
from pathlib import Path

import pytest

from tests.test_acceptance_speed import named_test

ROOT = Path(__file__).parents[1]
RUNS = [path for path in sorted(ROOT.glob("bench/results/*/decode.json")) if "h200" in path.parent.name.lower()]


def missing(what: str) -> pytest.MarkDecorator:
    return pytest.mark.xfail(strict=True, reason=f"missing: {what}")


def hold(module: str, *names: str) -> None:
    """These tests are there, and do something."""
    for name in names:
        named_test(module, name)


@missing("the call")
def test_one_function_decodes() -> None:
    from flash.decode import flash_attention_decode

    names = list(inspect.signature(flash_attention_decode).parameters)
    assert names[:3] == ["q", "k_cache", "v_cache"]
    wanted = {
        "cache_seqlens", "block_table", "k", "v", "rotary_cos", "rotary_sin", "rotary_interleaved", "cache_batch_idx",
        "cache_leftpad", "k_scale", "v_scale", "num_splits", "causal", "window", "scale", "alibi_slopes", "softcap",
        "sinks", "return_lse", "backend", "config",
    }  # fmt: skip
    assert wanted <= set(names)


@missing("the kernel")
def test_dense_paged_and_packed_agree_with_the_oracle_for_every_keyword() -> None:
    hold("test_decode", "todo")


@missing("the merge")
def test_any_split_merges_into_the_whole() -> None:
    hold("test_decode_call", "todo")


@missing("the batch-invariant mode")
def test_a_row_has_the_same_bits_whatever_is_beside_it() -> None:
    hold("test_decode", "todo")


@missing("hostile tables")
def test_a_thousand_hostile_tables_read_nothing_out_of_bounds() -> None:
    hold("test_decode", "todo")


@missing("the append")
def test_append_writes_exactly_the_asked_slots() -> None:
    hold("test_append", "todo")


@missing("the number of splits")
def test_splits_are_chosen_without_waiting_for_the_device() -> None:
    hold("test_decode_call", "todo")


@missing("PagedCache")
def test_a_paged_cache_allocates_appends_forks_and_frees() -> None:
    hold("test_paged", "todo")


@missing("examples/generate.py with it")
def test_the_example_generates_with_it_and_batches_continuously() -> None:
    hold("test_examples", "todo")


@missing("flash_attn_with_kvcache")
def test_fa2s_kvcache_function_is_served() -> None:
    hold("test_kvcache", "todo")


@missing("the torch backend")
def test_the_torch_backend_serves_all_of_it() -> None:
    hold("test_decode_call", "todo")


@missing("the bench suite")
def test_the_bench_has_a_suite_for_it_with_pictures() -> None:
    hold("test_bench_decode", "todo")


@missing("compiled configurations")
def test_decode_compiles_without_spills_and_the_clamps_are_counted() -> None:
    hold("test_decode_compiled", "todo")


@pytest.mark.skipif(not RUNS, reason="asked of machines with an H200; none has run it yet")
def test_nine_tenths_of_copy_bandwidth() -> None:
    raise NotImplementedError
