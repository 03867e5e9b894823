"""Models of transformers that tests run: tiny, random, float64, of every family that is served, and their inputs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

EXACT, LOOSE = 1e-11, 20 * torch.finfo(torch.float32).eps
SEQLEN, WINDOW = 19, 6
PACKED = torch.cat([torch.arange(7), torch.arange(12)])[None]  # two documents
TRACED = "aot_eager"  # all of torch.compile but its code generator
DECODER: dict[str, Any] = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=None,
)  # fmt: skip
ENCODER: dict[str, Any] = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2,
)  # fmt: skip
SERIES: dict[str, Any] = dict(context_length=16, prediction_length=6)

Built = tuple[Any, dict[str, Any]]


def loaded(name: str, config: Any, **options: Any) -> Any:
    """A model of transformers' class of that name, eager, float64, with every parameter drawn at random."""
    import transformers

    if hasattr(config, "num_local_experts") or hasattr(config, "n_routed_experts"):
        options["experts_implementation"] = "eager"  # the others multiply no float64
    model = getattr(transformers, name)._from_config(config, attn_implementation="eager", **options).double().eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def tokens(*shape: int) -> Tensor:
    return torch.randint(3, 64, shape)


def decoder(family: str, **options: Any) -> Built:
    """A causal language model, and two sequences of which it predicts every token."""
    import transformers

    config = getattr(transformers, f"{family}Config" if family != "Gemma3" else "Gemma3TextConfig")
    model = loaded(f"{family}ForCausalLM", config(**{**DECODER, **options}))
    ids = tokens(2, SEQLEN)
    return model, {"input_ids": ids, "labels": ids}


def masked(family: str, **options: Any) -> Built:
    """A bidirectional encoder, and two sequences of different lengths."""
    import transformers

    model = loaded(f"{family}ForMaskedLM", getattr(transformers, f"{family}Config")(**{**ENCODER, **options}))
    ids, mask = tokens(2, SEQLEN), torch.ones(2, SEQLEN, dtype=torch.long)
    mask[1, 13:] = 0
    return model, {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def t5() -> Built:
    from transformers import T5Config

    config = T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, relative_attention_num_buckets=8,
        relative_attention_max_distance=12, dropout_rate=0.0, decoder_start_token_id=0, pad_token_id=0,
        eos_token_id=None,
    )  # fmt: skip
    mask = torch.ones(2, SEQLEN, dtype=torch.long)
    mask[1, 13:] = 0
    model = loaded("T5ForConditionalGeneration", config)
    return model, {"input_ids": tokens(2, SEQLEN), "attention_mask": mask, "labels": tokens(2, 11)}


def whisper() -> Built:
    from transformers import WhisperConfig

    config = WhisperConfig(
        vocab_size=64, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, num_mel_bins=8, max_source_positions=20,
        max_target_positions=32, decoder_start_token_id=1, pad_token_id=0, bos_token_id=1, eos_token_id=None,
        suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    model = loaded("WhisperForConditionalGeneration", config)
    return model, {"input_features": torch.randn(2, 8, 40, dtype=torch.float64), "labels": tokens(2, 11)}


def patchtst() -> Built:
    from transformers import PatchTSTConfig

    config = PatchTSTConfig(
        num_input_channels=3, patch_length=4, patch_stride=2, d_model=32, num_attention_heads=4, num_hidden_layers=2,
        ffn_dim=48, attention_dropout=0.0, ff_dropout=0.0, head_dropout=0.0, loss="mse", **SERIES,
    )  # fmt: skip
    values = {"past_values": torch.randn(2, 16, 3), "future_values": torch.randn(2, 6, 3)}
    return loaded("PatchTSTForPrediction", config), {name: x.double() for name, x in values.items()}


def series(family: str, **options: Any) -> Built:
    """A probabilistic forecaster, with its values and their times."""
    import transformers

    config = getattr(transformers, f"{family}Config")(
        input_size=1, lags_sequence=[1, 2, 3], num_time_features=2, d_model=32, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, dropout=0.0,
        attention_dropout=0.0, activation_dropout=0.0, encoder_layerdrop=0.0, decoder_layerdrop=0.0,
        num_parallel_samples=2, **SERIES, **options,
    )  # fmt: skip
    values = {
        "past_values": torch.randn(2, 19),
        "past_time_features": torch.randn(2, 19, 2),
        "past_observed_mask": torch.ones(2, 19),
        "future_values": torch.randn(2, 6),
        "future_time_features": torch.randn(2, 6, 2),
    }
    return loaded(f"{family}ForPrediction", config), {name: x.double() for name, x in values.items()}


SLIDING: dict[str, Any] = dict(head_dim=8, sliding_window=WINDOW, query_pre_attn_scalar=8)
LATENT: dict[str, Any] = dict(
    num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=12,
    n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1, moe_intermediate_size=16,
    first_k_dense_replace=1, n_shared_experts=1,
)  # fmt: skip

MODELS: dict[str, Callable[[], Built]] = {
    "llama": lambda: decoder("Llama"),
    "gemma2": lambda: decoder("Gemma2", **SLIDING, attn_logit_softcapping=2.0),
    "gemma3": lambda: decoder("Gemma3", **SLIDING, layer_types=["sliding_attention", "full_attention"]),
    "gpt_oss": lambda: decoder(
        "GptOss", head_dim=8, sliding_window=WINDOW, num_local_experts=2, num_experts_per_tok=1,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    ),
    "bert": lambda: masked("Bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
    "modernbert": lambda: masked("ModernBert", local_attention=8, global_attn_every_n_layers=2, pad_token_id=0),
    "t5": t5,
    "mistral": lambda: decoder("Mistral", sliding_window=WINDOW),
    "deepseek_v3": lambda: decoder("DeepseekV3", **LATENT),
    "whisper": whisper,
    "patchtst": patchtst,
    "time_series_transformer": lambda: series("TimeSeriesTransformer"),
}  # fmt: skip
CAUSAL = ("llama", "gemma2", "gemma3", "gpt_oss", "mistral", "deepseek_v3")
BOUNDS = {family: LOOSE for family in (*CAUSAL, "t5", "patchtst", "time_series_transformer")}


def built(family: str) -> Built:
    """A model and its inputs, the same ones each time."""
    torch.manual_seed(0)
    return MODELS[family]()


def close(got: Tensor, want: Tensor, bound: float, what: str = "") -> None:
    """Equal within bound times the largest of the wanted numbers."""
    got, want = got.detach(), want.detach()
    assert got.shape == want.shape, what
    error, largest = float((got - want).abs().max()), float(want.abs().max())
    assert error <= bound * max(largest, 1.0), f"{what} differs by {error:.2g}, largest {largest:.2g}"


def left_padded(ids: Tensor, lengths: tuple[int, ...]) -> dict[str, Tensor]:
    """The last tokens of each sequence, behind padding."""
    mask = torch.arange(ids.shape[1]) >= ids.shape[1] - torch.tensor(lengths)[:, None]
    return {"input_ids": ids * mask, "attention_mask": mask.long()}


@contextmanager
def enabled(model: Any, min_seqlen: int = 0) -> Iterator[None]:
    """A model by flash_attention."""
    from flash.integrations.transformers import disable, enable

    enable(model, min_seqlen)
    yield
    disable(model)


def prediction(output: Any) -> Tensor:
    """Logits, or what stands in their place."""
    for name in ("logits", "prediction_outputs", "params"):
        found = getattr(output, name, None)
        if found is not None:
            return torch.stack(found, -1) if isinstance(found, tuple) else found
    raise AssertionError(f"no prediction in {list(output)}")
