"""What "beyond one device" promises, one test a promise; tests of their own hold each in full and are named here."""

import inspect
from pathlib import Path

from tests.test_acceptance_speed import named_test

ROOT = Path(__file__).parents[1]


def hold(module: str, *names: str) -> None:
    """These tests are there, and do something."""
    for name in names:
        named_test(module, name)


def test_one_function_takes_a_group_or_a_mesh() -> None:
    from flash.ring import ring_attention

    parameters = inspect.signature(ring_attention).parameters
    assert list(parameters)[:3] == ["q", "k", "v"]
    usual = {name: parameters[name].default for name in ("group", "mesh", "sharding", "method")}
    assert usual == {"group": None, "mesh": None, "sharding": "contiguous", "method": "auto"}
    hold("test_ring_faults", "test_wrong_groups_and_settings_are_named")


def test_keys_travel_while_a_rank_computes() -> None:
    hold("test_ring_torch", "test_keys_are_on_their_way_while_a_rank_computes")


def test_partial_results_merge_exactly_forward_and_backward() -> None:
    hold("test_parts", "test_parts_come_together_to_the_whole")
    hold("test_ring", "test_half_precision_is_rounded_once", "test_calls_repeat_to_the_bit")


def test_zigzag_balances_causal_and_has_helpers() -> None:
    hold("test_shards", "test_zigzag_pairs_early_chunks_with_late_ones", "test_each_position_is_on_one_rank")
    hold("test_ring_torch", "test_unshard_is_the_inverse_of_shard")


def test_groups_move_key_heads_and_windows_skip_steps() -> None:
    hold("test_ring_torch", "test_groups_move_their_key_heads_only", "test_a_window_sends_nothing_further_than_it_sees")
    hold("test_shards", "test_a_window_ends_the_ring_early")


def test_every_keyword_is_included() -> None:
    hold("test_ring", "test_every_keyword_is_that_of_one_device", "test_a_pair_of_keywords_is_that_of_one_device")
    hold("test_ring", "test_hostile_lengths_harm_their_own_sequence_only", "test_interpreted_kernels_serve_the_ring")


def test_methods_are_chosen_and_say_why() -> None:
    hold("test_ring_torch", "test_the_method_and_its_reason_are_told", "test_all_gather_fetches_what_is_seen")


def test_lengths_are_free() -> None:
    hold("test_ring", "test_lengths_need_not_divide_by_the_ranks", "test_shards_may_be_uneven_and_ranks_without_keys")


def test_a_rank_that_dies_raises_on_the_others() -> None:
    hold("test_ring_faults", "test_a_rank_that_is_gone_or_silent_is_an_error_within_the_time_out")


def test_memory_grows_as_the_shard() -> None:
    hold("test_ring_torch", "test_memory_of_a_rank_is_its_part_of_the_sequence")


def test_twenty_runs_do_not_deadlock() -> None:
    hold("test_ring", "test_twenty_runs_end")


def test_ranks_that_disagree_are_named() -> None:
    hold("test_ring_faults", "test_what_differs_between_ranks_is_named_on_all_of_them")
    hold("test_ring_faults", "test_a_rank_that_refuses_its_arguments_takes_the_others_along")


def test_each_rank_compiles() -> None:
    hold("test_ring_torch", "test_each_rank_compiles_without_a_graph_break")


def test_distributed_tensors_are_sharded_by_batch_head_and_sequence() -> None:
    hold("test_dtensor", "test_placements_are_served_as_on_one_device", "test_a_parallel_model_needs_no_change")


def test_the_scale_suite_models_and_measures() -> None:
    hold("test_bench_scale", "test_the_crossover_by_formula_is_the_one_that_the_steps_have")
    hold(
        "test_bench_scale",
        "test_messages_are_those_that_the_code_posts",
        "test_two_ranks_are_checked_timed_and_weighed",
    )
    folders = [path.parent for path in (ROOT / "bench/results").glob("*/scale.json")]
    assert folders
    for folder in folders:
        pictures = ("scale-tokens.png", "scale-crossover.png", "scale-check.png")
        assert "What is simulated" in (folder / "scale.md").read_text(encoding="utf-8")
        assert all((folder / name).is_file() for name in pictures)
