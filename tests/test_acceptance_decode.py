"""What "serving: decoding with split keys and a paged cache" promises, one test a promise; what holds it is named.

Figures on a GPU are read from committed runs of `python -m bench.run --suite decode`: who commits one is held to it.
"""

import inspect
from pathlib import Path

import pytest

from bench.decode_report import figures
from bench.record import load
from tests.test_acceptance_speed import named_test

ROOT = Path(__file__).parents[1]
RUNS = [path for path in sorted(ROOT.glob("bench/results/*/decode.json")) if "h200" in path.parent.name.lower()]


def hold(module: str, *names: str) -> None:
    """These tests are there, and do something."""
    for name in names:
        named_test(module, name)


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


def test_dense_paged_and_packed_agree_with_the_oracle_for_every_keyword() -> None:
    hold("test_decode", "test_every_keyword", "test_dense_and_paged_have_the_same_bits", "test_new_keys_count")
    hold("test_decode", "test_errors_are_those_of_standard_attention", "test_rows_of_a_group_share_tiles")
    hold("test_decode_call", "test_dense_paged_and_packed_say_the_same")


def test_any_split_merges_into_the_whole() -> None:
    hold("test_decode", "test_any_number_of_parts")
    hold("test_merge", "test_a_split_anywhere_is_the_whole")


def test_a_row_has_the_same_bits_whatever_is_beside_it() -> None:
    hold("test_decode", "test_what_is_beside_a_sequence_changes_no_bit")
    hold("test_decode", "test_parts_of_so_many_keys_know_nothing_of_the_cache_around_them")
    hold("test_dispatch_step", "test_a_row_has_the_same_bits_whatever_is_beside_it")


def test_a_thousand_hostile_tables_read_nothing_out_of_bounds() -> None:
    hold("test_decode_hostile", "test_hostile_lengths_and_tables_harm_their_own_sequence_only")
    hold("test_decode_hostile", "test_a_thousand_hostile_lengths_and_tables", "test_limits_are_kept_to_the_number")


def test_append_writes_exactly_the_asked_slots() -> None:
    hold("test_append", "test_new_keys_go_behind_the_old_ones", "test_a_call_that_lies_writes_where_it_does_not")
    hold("test_append", "test_a_thousand_calls_that_lie", "test_float8_is_torchs", "test_pairs_turn")


def test_splits_are_chosen_without_waiting_for_the_device() -> None:
    hold("test_decode_call", "test_nothing_waits_for_the_device", "test_a_call_never_waits_for_the_gpu")
    hold("test_dispatch_step", "test_parts_fill_the_gpu_whatever_the_lengths")


def test_a_paged_cache_allocates_appends_forks_and_frees() -> None:
    hold("test_paged", "test_out_of_pages_says_how_many_and_changes_nothing")
    hold("test_paged", "test_a_shared_page_is_copied_by_who_writes_first_and_never_for_the_last")
    from tests.test_paged import TestGenerations  # a state machine against lists

    assert TestGenerations.settings.max_examples > 0


def test_the_example_generates_with_it_and_batches_continuously() -> None:
    hold("test_examples", "test_generate_runs", "test_continuous_batching_runs")
    hold("test_examples", "test_a_gpt_writes_in_pages_what_it_writes_without")
    hold("test_examples", "test_requests_that_share_a_batch_write_what_they_write_alone")


def test_fa2s_kvcache_function_is_served() -> None:
    hold("test_kvcache", "test_the_signature_is_fa2s", "test_every_case_of_the_grid_is_the_oracles")
    hold("test_kvcache", "test_triton_kernels_serve_the_grid")


def test_the_torch_backend_serves_all_of_it() -> None:
    hold("test_decode_call", "test_torch_backend_is_the_oracle_with_every_keyword_and_pair")


def test_the_bench_has_a_suite_for_it_with_pictures() -> None:
    hold("test_bench_decode", "test_the_grid_has_every_combination_once_and_what_matters_most_first")
    hold("test_bench_decode", "test_the_smallest_case_runs_from_the_command_line_to_pictures_and_resumes")
    hold("test_bench_decode", "test_a_package_with_a_kvcache_function_is_called_in_its_own_layout")
    assert list(ROOT.glob("bench/results/*/decode-bandwidth.png"))


def test_decode_compiles_without_spills_and_the_clamps_are_counted() -> None:
    hold("test_decode_compiled", "test_one_query_spills_nothing", "test_a_table_that_may_lie_costs_few_instructions")
    hold("test_decode_compiled", "test_every_choice_of_few_rows", "test_append_and_merge_spill_nothing")


@pytest.mark.skipif(not RUNS, reason="needs a run on an H200, of which there is none yet")
def test_nine_tenths_of_copy_bandwidth_and_ahead_of_every_peer() -> None:
    for path in RUNS:
        for figure in figures(load(path)):
            assert figure.reached is not None and figure.reached >= figure.target, figure
