"""What "into people's models with one line" promises, one test a promise; tests that hold it in full are named here.

Those that need packages beside torch are marked `integrations` where they stand; here only their being there is asked.
"""

import inspect
from pathlib import Path

import pytest
import torch

from tests.test_acceptance_speed import named_test

ROOT = Path(__file__).parents[1]
FAMILIES = (
    "llama", "gemma2", "gemma3", "gpt_oss", "bert", "modernbert", "t5", "mistral", "deepseek_v3", "whisper", "patchtst",
    "time_series_transformer",
)  # fmt: skip
EXAMPLES = ("gpt", "flash_attention_demo", "lora", "generate", "embed_long_documents", "vit_block")


def hold(module: str, *names: str) -> None:
    """These tests are there, and do something."""
    for name in names:
        named_test(module, name)


def test_sdpa_has_torchs_signature_and_meaning() -> None:
    from flash.integrations.sdpa import scaled_dot_product_attention

    q, k, v = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 7, 8), torch.randn(2, 3, 7, 8)
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(scaled_dot_product_attention(q, k, v, is_causal=True), want)
    names = ["query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa"]
    assert list(inspect.signature(scaled_dot_product_attention).parameters) == names
    hold(
        "test_sdpa",
        "test_every_argument_means_what_it_means_to_torch",
        "test_three_to_five_dimensions_are_served",
        "test_gradients_are_torchs",
        "test_wrong_calls_raise",
    )


def test_a_scope_serves_every_sdpa_call_in_it() -> None:
    hold("test_sdpa", "test_calls_in_the_scope_are_ours_and_those_outside_are_torchs")


def test_torchs_own_registry_routes_to_us_and_back() -> None:
    hold(
        "test_sdpa_registry",
        "test_every_registered_kernel_has_the_schema_of_its_op",
        "test_the_cpu_twin_is_called_forward_and_backward",
        "test_the_cuda_kernels_compute_what_their_ops_say",
        "test_restoring_leaves_nothing_behind",
    )


def test_flash_attn_has_fa2s_signatures_layout_and_alignment() -> None:
    from flash.integrations import flash_attn

    names = "q k v dropout_p softmax_scale causal window_size softcap alibi_slopes deterministic return_attn_probs"
    assert list(inspect.signature(flash_attn.flash_attn_func).parameters) == names.split()
    hold(
        "test_flash_attn",
        "test_every_signature_is_fa2s",
        "test_every_function_equals_the_oracle",
        "test_causal_is_aligned_to_the_last_key",
        "test_return_attn_probs_answers_as_fa2_does",
        "test_packed_functions_equal_their_parts",
        "test_a_slice_of_fa2s_own_tests",
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_serves_the_family(family: str) -> None:
    from tests.families import MODELS

    assert family in MODELS
    hold("test_transformers", "test_logits_losses_and_gradients_are_those_of_eager_attention")


def test_transformers_generates_and_refuses() -> None:
    hold(
        "test_transformers",
        "test_generated_tokens_are_those_of_eager_attention",
        "test_left_padding_changes_nothing",
        "test_packed_documents_do_not_see_each_other",
        "test_key_heads_are_never_repeated",
        "test_arguments_that_would_change_the_result_raise",
        "test_models_that_would_lose_causality_are_refused",
        "test_short_sequences_keep_the_models_own_attention",
        "test_a_model_compiles_without_a_graph_break",
        "test_losses_after_three_steps_are_those_of_eager_attention",
    )


@pytest.mark.parametrize("model", ["TFT", "PatchTST", "iTransformer", "Informer", "Autoformer", "FEDformer"])
def test_neuralforecast_serves_the_model_or_says_why_not(model: str) -> None:
    from tests.test_neuralforecast import MODELS

    assert model in MODELS
    hold(
        "test_neuralforecast",
        "test_exact_models_predict_and_train_as_before",
        "test_without_a_mechanism_the_others_are_left_alone_and_told_so",
        "test_full_attention_by_name_is_another_model_that_trains",
        "test_interpretability_weights_are_still_there",
    )


def test_documents_say_which_time_series_models_stay_exact() -> None:
    text = (ROOT / "docs" / "integrations.md").read_text(encoding="utf-8")
    assert all(name in text for name in ("Informer", "Autoformer", "FEDformer", 'mechanism="full"'))


def test_modules_have_torchs_state_and_their_own_sizes() -> None:
    from flash.nn import MultiheadAttention

    names = list(inspect.signature(torch.nn.MultiheadAttention).parameters)
    assert list(inspect.signature(MultiheadAttention).parameters)[: len(names)] == names
    hold(
        "test_nn",
        "test_multihead_attention_loads_torchs_weights_and_equals_it",
        "test_weights_asked_for_are_computed_in_blocks",
        "test_a_transformer_block_equals_its_formula",
        "test_dropout_is_active_in_training_only",
    )
    hold("test_footprint", "test_the_memory_estimate_is_what_is_measured")
    hold("test_weights", "test_attention_weights_equal_the_softmax")


def test_onnx_exports_attention_nodes_that_run() -> None:
    hold(
        "test_onnx",
        "test_a_model_becomes_attention_nodes_and_runs_alike",
        "test_different_lengths_get_a_bottom_right_mask",
        "test_dynamic_lengths_run",
        "test_features_without_a_node_are_decomposed_or_refused",
    )


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_example_is_there_and_runs_small(name: str) -> None:
    assert (ROOT / "examples" / f"{name}.py").exists()
    hold("test_examples", f"test_{name}_runs")


def test_extras_have_a_command_of_their_own() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "test-integrations" in makefile and "test-all: test test-slow test-integrations" in makefile
