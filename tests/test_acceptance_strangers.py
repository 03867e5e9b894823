"""What "ready for strangers" promises, one test a promise; tests of their own hold each in full and are named here."""

import re
from pathlib import Path

import pytest

from flash._version import __version__
from tests.test_acceptance_ring import hold
from tests.test_acceptance_speed import named_test

ROOT = Path(__file__).parents[1]
PAGES = ("front-doors", "masks", "tuning", "memory", "numerics", "adding-a-feature", "adding-a-machine", "numbers")


# Faults of the tools


def test_a_killed_sweep_ends_in_the_same_table() -> None:
    hold("test_faults", "test_a_sweep_killed_at_twenty_random_points_ends_in_the_same_table")


def test_tables_that_are_none_make_one_warning_and_no_wrong_result() -> None:
    hold("test_tables", "test_hostile_file_is_left_out_with_one_warning")
    hold("test_faults", "test_any_table_that_is_read_gives_right_results_or_is_refused")


def test_bad_candidates_are_recorded_and_passed_over() -> None:
    hold("test_sweep", "test_fastest_right_candidate_wins_its_cell", "test_cell_without_a_right_candidate_has_no_row")
    hold("test_sweep", "test_child_that_crashes_or_hangs_costs_only_its_own_job")
    hold("test_sweep", "test_exception_is_recorded_as_what_it_means")


def test_a_gpu_that_is_gone_or_was_never_there_ends_with_one_line() -> None:
    hold("test_faults", "test_a_gpu_that_is_gone_ends_the_sweep_with_exit_code_3")
    hold("test_faults", "test_tools_that_need_a_gpu_say_so_in_one_line")


def test_a_full_disk_or_a_read_only_home_changes_no_result() -> None:
    hold("test_faults", "test_a_full_disk_leaves_the_old_table_and_one_line")
    hold("test_faults", "test_a_read_only_home_or_cache_leaves_results_as_they_are")


def test_two_sweeps_at_once_corrupt_and_lose_nothing() -> None:
    hold("test_faults", "test_sixty_kills_of_sweeps_at_once_corrupt_nothing_and_lose_no_entry")


# Threats


def test_nothing_that_is_shipped_can_run_what_a_file_says() -> None:
    hold("test_threats", "test_no_pickle_eval_exec_or_load", "test_user_functions_are_jit_functions")


def test_caches_are_private() -> None:
    hold("test_threats", "test_what_is_written_is_private_to_the_user")
    hold("test_tables", "test_file_that_others_may_write_or_link_is_left_out")


def test_nothing_reads_the_network() -> None:
    hold("test_threats", "test_import_and_calls_open_no_socket")


def test_import_is_quiet_and_quick() -> None:
    hold(
        "test_layout", "test_import_touches_no_device_no_environment_and_no_thread", "test_library_reads_no_environment"
    )
    hold("test_threats", "test_import_adds_at_most_three_tenths_of_a_second_to_that_of_torch")


# The wheel


def test_the_wheel_is_pure_listed_and_reproducible() -> None:
    hold("test_packaging", "test_wheel_is_pure_and_holds_what_is_listed_and_nothing_else")
    hold("test_packaging", "test_two_builds_are_the_same_to_the_byte")


def test_it_installs_on_every_python() -> None:
    hold("test_installs", "test_wheel_and_sdist_install_and_import_in_a_clean_environment")
    hold("test_installs", "test_it_imports_and_serves_without_triton")


# The suite


def test_the_suite_holds_in_any_order() -> None:
    hold("test_sampling", "test_the_order_of_tests_is_drawn_and_told")


def test_a_thousand_hostile_tables() -> None:
    hold("test_decode_hostile", "test_a_thousand_hostile_lengths_and_tables")
    hold("test_faults", "test_a_thousand_hostile_tables_of_tiles")


def test_every_line_of_every_kernel_is_reached() -> None:
    held = named_test("test_suite", "test_coverage_of_the_kernels_is_complete_in_the_committed_run")
    for path in ROOT.glob("kernels/*.py"):
        held(path.name)


def test_the_mutants_of_every_kernel_are_killed() -> None:
    named_test("test_suite", "test_mutants_of_every_kernel_are_killed_in_the_committed_run")()


def test_twenty_runs_in_a_row_pass() -> None:
    named_test("test_suite", "test_twenty_runs_in_a_row_pass_in_the_committed_report")()


def test_skips_have_true_reasons() -> None:
    hold("test_suite", "test_every_skip_says_what_it_needs")


# Numbers


def test_numbers_have_a_page_with_every_picture() -> None:
    text = (ROOT / "docs" / "numbers.md").read_text(encoding="utf-8")
    pictures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", text)
    for kind in ("memory", "throughput", "features", "error", "cold", "decode", "scale"):
        assert any(kind in Path(picture).name for picture in pictures), kind
    assert all((ROOT / "docs" / picture).is_file() for picture in pictures)


def test_every_figure_stands_beside_its_command() -> None:
    hold("test_numbers", "test_every_figure_is_found_in_what_its_command_wrote")
    hold("test_numbers", "test_every_run_says_machine_versions_seed_median_and_spread")
    hold("test_numbers", "test_what_never_ran_on_a_gpu_says_so")


def test_errors_and_cold_starts_are_measured() -> None:
    hold("test_bench_error", "test_errors_of_every_peer_are_measured_against_float64")
    hold("test_bench_cold", "test_import_and_first_call_are_timed_in_fresh_processes")


# Reading


def test_the_readme_decides_in_a_screen_and_starts_in_a_minute() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    screen = "\n".join(text.splitlines()[:50])
    assert "pip install" in screen and "flash_attention(" in screen and "not" in screen
    assert len(text.splitlines()) <= 160
    assert all(f"docs/{page}.md" in text for page in PAGES)


@pytest.mark.parametrize("page", PAGES)
def test_each_subject_has_a_page(page: str) -> None:
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    assert text.startswith("# ") and len(text.split()) > 250


def test_masks_have_a_gallery() -> None:
    hold("test_docs", "test_gallery_shows_every_mask_and_is_what_its_command_draws")


def test_code_blocks_run() -> None:
    hold("test_docs", "test_code_block_runs", "test_every_link_leads_somewhere")


# The house


def test_the_walk_is_counted_and_stands_beside_others() -> None:
    hold("test_house", "test_the_walk_in_contributing_is_the_one_that_a_call_takes")


def test_the_house_keeps_its_measures() -> None:
    hold("test_house", "test_no_file_is_longer_than_500_lines", "test_no_function_is_longer_than_120_lines")
    hold("test_house", "test_no_function_has_more_than_20_arguments", "test_no_kernel_has_more_than_14_arguments")
    hold("test_house", "test_no_block_of_six_lines_stands_twice")
    hold("test_layout", "test_imports_make_no_circle")


# First use and release


def test_error_messages_say_what_to_do() -> None:
    hold("test_messages", "test_every_message_names_its_argument_and_what_to_do")


def test_other_platforms_are_pretended() -> None:
    hold("test_installs", "test_windows_and_macos_are_served_by_torch")


def test_a_release_is_a_command() -> None:
    makefile, text = (ROOT / "Makefile").read_text(), (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert re.search(r"^release:", makefile, re.MULTILINE) and "make release" in text
    hold("test_release", "test_a_release_is_refused_while_something_is_missing")


def test_the_version_is_released_and_in_the_changelog() -> None:
    assert __version__ == "0.1.0"
    assert "## 0.1.0" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
