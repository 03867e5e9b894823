"""Hugging Face models by flash_attention give what their own eager attention gives: logits, gradients, losses, tokens.

The models are tiny, randomly initialised and float64. Eager attention narrows its softmax to float32 even then, which
is undone here (`wide`). What models narrow elsewhere, RMSNorm's mean square above all, rounds two nearly equal numbers
to float32 each, and may give them one ulp of difference: LOOSE. Models that narrow nothing are held to EXACT.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

pytestmark = [
    pytest.mark.integrations,
    pytest.mark.filterwarnings("ignore::DeprecationWarning:transformers"),
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),
    pytest.mark.filterwarnings("ignore::UserWarning:transformers"),
]

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


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """The softmax of eager attention in the dtype of its scores."""
    stock = torch.nn.functional.softmax

    def softmax(x: Tensor, dim: Any = None, dtype: Any = None, **others: Any) -> Tensor:
        return stock(x, dim=dim, dtype=None if x.dtype == torch.float64 else dtype, **others)

    monkeypatch.setattr(torch.nn.functional, "softmax", softmax)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What flash_attention was called with, call by call."""
    from flash.integrations import transformers as front

    found: list[dict[str, Any]] = []
    stock = front.flash_attention

    def recorded(q: Tensor, k: Tensor, v: Tensor, **keywords: Any) -> Any:
        found.append({"q": q, "k": k, "v": v, **keywords})
        return stock(q, k, v, **keywords)

    monkeypatch.setattr(front, "flash_attention", recorded)
    return found


def built(family: str) -> Built:
    """A model and its inputs, the same ones each time."""
    torch.manual_seed(0)
    return MODELS[family]()


@contextmanager
def enabled(model: Any, min_seqlen: int = 0) -> Iterator[None]:
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


def close(got: Tensor, want: Tensor, bound: float, what: str = "") -> None:
    """Equal within bound times the largest of the wanted numbers."""
    got, want = got.detach(), want.detach()
    assert got.shape == want.shape, what
    error, largest = float((got - want).abs().max()), float(want.abs().max())
    assert error <= bound * max(largest, 1.0), f"{what} differs by {error:.2g}, largest {largest:.2g}"


def differentiated(model: Any, inputs: dict[str, Any], run: Any = None) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Prediction of what is no padding, loss and the gradients of all parameters."""
    model.zero_grad()
    output = (model if run is None else run)(**inputs)
    output.loss.backward()
    grads = {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}
    found = prediction(output).detach()
    if "attention_mask" in inputs and inputs["attention_mask"].shape == found.shape[:2]:
        # a padded row that sees padding alone is 0 here, and the mean of all values in eager attention
        found = found[inputs["attention_mask"].bool()]
    return found, output.loss.detach(), grads


@pytest.mark.parametrize("family", MODELS)
def test_logits_losses_and_gradients_are_those_of_eager_attention(family: str, calls: list[Any]) -> None:
    model, inputs = built(family)
    bound = BOUNDS.get(family, EXACT)
    logits, loss, grads = differentiated(model, inputs)
    assert not calls
    with enabled(model):
        got_logits, got_loss, got_grads = differentiated(model, inputs)
    assert len(calls) >= 2
    close(got_logits, logits, bound, "logits")
    close(got_loss, loss, bound, "loss")
    assert got_grads.keys() == grads.keys()
    for name, grad in grads.items():
        close(got_grads[name], grad, bound, name)
    learned = {"gpt_oss": "sinks", "t5": "relative_attention_bias"}.get(family, "norm")
    assert any(learned in name.lower() and bool(grad.abs().max() > 1e-4) for name, grad in grads.items())


@pytest.mark.parametrize("family", MODELS)
def test_losses_after_three_steps_are_those_of_eager_attention(family: str) -> None:
    def losses(flash: bool) -> list[float]:
        model, inputs = built(family)
        model.train()
        found = []
        with enabled(model) if flash else nullcontext():
            optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
            for _ in range(4):
                optimizer.zero_grad()
                loss = model(**inputs).loss
                loss.backward()
                optimizer.step()
                found.append(loss.item())
        return found

    want, got = losses(False), losses(True)
    assert got == pytest.approx(want, rel=10 * BOUNDS.get(family, EXACT))
    assert want[3] != want[0]


GENERATING = (*CAUSAL, "t5", "whisper")


def generated(model: Any, inputs: dict[str, Any], **options: Any) -> tuple[Tensor, Tensor]:
    """Twelve tokens more, greedily: (tokens, their logits)."""
    inputs = {name: x for name, x in inputs.items() if name != "labels"}
    found = model.generate(
        **inputs, max_new_tokens=12, do_sample=False, output_logits=True, return_dict_in_generate=True, **options
    )
    return found.sequences, torch.stack(found.logits, 1)


def left_padded(ids: Tensor, lengths: tuple[int, ...]) -> dict[str, Tensor]:
    """The last tokens of each sequence, behind padding."""
    mask = torch.arange(ids.shape[1]) >= ids.shape[1] - torch.tensor(lengths)[:, None]
    return {"input_ids": ids * mask, "attention_mask": mask.long()}


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", GENERATING)
def test_generated_tokens_are_those_of_eager_attention(family: str, cache: str) -> None:
    # Gemma's, GPT-OSS's and Mistral's caches slide: dynamic ones keep the window, static ones roll within it
    model, inputs = built(family)
    if family in CAUSAL:
        inputs = left_padded(inputs["input_ids"], (SEQLEN, 11))
    else:
        inputs["decoder_input_ids"] = tokens(2, 5)
    options: dict[str, Any] = dict(cache_implementation="static", disable_compile=True) if cache == "static" else {}
    want_tokens, want = generated(model, inputs, **options)
    with enabled(model):
        got_tokens, got = generated(model, inputs, **options)
    assert torch.equal(got_tokens, want_tokens)
    close(got, want, LOOSE, "logits")


@pytest.mark.parametrize("family", CAUSAL)
def test_a_prompt_may_come_in_pieces(family: str) -> None:
    # queries that are the last ones of more keys, with a window that is cut from a sliding cache
    model, inputs = built(family)
    ids = inputs["input_ids"]
    want = model(input_ids=ids).logits
    with enabled(model), torch.no_grad():
        parts, past = [], None
        for piece in ids.split([7, 1, 8, 3], 1):
            output = model(input_ids=piece, past_key_values=past, use_cache=True)
            past = output.past_key_values
            parts.append(output.logits)
    close(torch.cat(parts, 1), want, LOOSE)


def test_a_forecast_is_sampled_alike() -> None:
    model, inputs = built("time_series_transformer")
    inputs.pop("future_values")
    found = []
    for flash in (False, True):
        torch.manual_seed(2)
        with enabled(model) if flash else nullcontext():
            found.append(model.generate(**inputs).sequences)
    close(found[1], found[0], LOOSE)


@pytest.mark.parametrize("family", CAUSAL)
def test_left_padding_changes_nothing(family: str) -> None:
    model, inputs = built(family)
    batch = left_padded(inputs["input_ids"], (SEQLEN, 8))
    alone = {"input_ids": inputs["input_ids"][1:, -8:]}
    with enabled(model):
        tokens, logits = generated(model, batch)
        alone_tokens, alone_logits = generated(model, alone)
    assert torch.equal(tokens[1, SEQLEN:], alone_tokens[0, 8:])
    close(logits[1], alone_logits[0], LOOSE)


@pytest.mark.parametrize("family", CAUSAL)
def test_packed_documents_do_not_see_each_other(family: str, calls: list[dict[str, Any]]) -> None:
    model, inputs = built(family)
    ids, lengths = inputs["input_ids"][:1], (7, 1, 11)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    alone = torch.cat([model(input_ids=piece).logits for piece in ids.split(lengths, 1)], 1)
    packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    with enabled(model):
        close(model(input_ids=ids, position_ids=positions, use_cache=False).logits, alone, LOOSE)
        assert all(call.get("mask") is None and call["mask_mod"] is not None for call in calls)  # no [seqlen, seqlen]
        starts = torch.tensor([0, 7, 8, 19], dtype=torch.int32)
        explicit = dict(cu_seq_lens_q=starts, cu_seq_lens_k=starts, max_length_q=11, max_length_k=11)
        close(model(input_ids=ids, position_ids=positions, use_cache=False, **explicit).logits, alone, LOOSE)
    if family != "gpt_oss":  # which does not tell its mask of positions: its eager attention mixes documents
        close(packed, alone, LOOSE)


def test_a_mask_that_is_given_says_that_there_is_one_document() -> None:
    # as in transformers, which looks for packing only where no mask came
    for family in ("llama", "gpt_oss"):
        model, inputs = built(family)
        inputs.update(position_ids=PACKED, attention_mask=torch.ones(2, SEQLEN, dtype=torch.long), use_cache=False)
        want = model(**inputs).logits
        with enabled(model):
            close(model(**inputs).logits, want, LOOSE)


def test_positions_may_be_written_anew_into_the_same_tensor() -> None:
    model, inputs = built("gpt_oss")
    positions = torch.arange(SEQLEN)[None].clone()
    with enabled(model), torch.no_grad():
        whole = model(**inputs, position_ids=positions).logits
        positions.copy_(PACKED)
        packed = model(**inputs, position_ids=positions).logits
        alone = torch.cat([model(input_ids=x).logits for x in inputs["input_ids"].split([7, 12], 1)], 1)
    close(packed, alone, LOOSE)
    assert not torch.allclose(whole, alone, atol=1e-2)


@pytest.mark.parametrize("family", CAUSAL)
def test_key_heads_are_never_repeated(family: str, calls: list[dict[str, Any]]) -> None:
    model, inputs = built(family)
    with enabled(model), torch.no_grad():
        model(**inputs)
        generated(model, inputs)
    heads = model.config.num_key_value_heads
    assert {(call["q"].shape[1], call["k"].shape[1], call["v"].shape[1]) for call in calls} == {(4, heads, heads)}


def test_dropout_and_determinism_are_the_models(calls: list[dict[str, Any]]) -> None:
    torch.manual_seed(0)
    model, inputs = masked("ModernBert", attention_dropout=0.25, deterministic_flash_attn=True, cls_token_id=1)
    with enabled(model):
        model.train()(**inputs)
        model.eval()(**inputs)
    assert [call["dropout_p"] for call in calls] == [0.25, 0.25, 0.0, 0.0]
    assert {call["deterministic"] for call in calls} == {True}


def test_heads_of_values_keep_their_own_size(calls: list[dict[str, Any]]) -> None:
    model, inputs = built("deepseek_v3")
    with enabled(model):
        model(**inputs)
    assert {(call["q"].shape[3], call["v"].shape[3]) for call in calls} == {(24, 12)}


def test_the_name_loads_a_model_and_says_nothing_of_flash() -> None:
    # a name with "flash" in it is taken for one of transformers' own, and asks for their packages
    from transformers import AutoModelForCausalLM

    from flash.integrations.transformers import Implementation, register

    model, inputs = built("llama")
    batch = left_padded(inputs["input_ids"], (SEQLEN, 8))
    named = AutoModelForCausalLM.from_config(model.config, attn_implementation=register()).double().eval()
    named.load_state_dict(model.state_dict())
    assert named.config._attn_implementation == "triton_attention"
    for name in ("eager", "sdpa"):
        assert "flash" not in Implementation(name, 512).name
    want, got = (generated(each, batch) for each in (model, named))
    assert torch.equal(got[0], want[0])
    close(got[1], want[1], LOOSE)  # which no padding would reach without a mask function of that name


def test_disable_restores_every_part_of_a_model() -> None:
    from flash.integrations.transformers import disable, enable

    model, _ = built("llama")
    model.set_attn_implementation("sdpa")
    holder = torch.nn.ModuleDict({"head": torch.nn.Linear(2, 2), "body": model})
    enable(holder)
    enable(holder, min_seqlen=8)  # once more, with another length
    assert model.config._attn_implementation.startswith("triton_attention")
    disable(holder)
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(ValueError, match="enable was called with"):
        disable(holder)
    with pytest.raises(ValueError, match="PreTrainedModel"):
        enable(torch.nn.Linear(2, 2))


def test_parts_of_a_model_keep_their_own_attention_to_return_to() -> None:
    from transformers import CLIPConfig, CLIPModel

    small = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
    parts = dict(text_config=dict(vocab_size=64, **small), vision_config=dict(image_size=8, patch_size=4, **small))
    config = CLIPConfig(**parts)
    model = CLIPModel._from_config(config, attn_implementation={"text_config": "sdpa", "vision_config": "eager"})
    model = model.double().eval()
    inputs = dict(input_ids=tokens(2, 9), pixel_values=torch.randn(2, 3, 8, 8, dtype=torch.float64))
    want = model(**inputs).logits_per_image
    with enabled(model):
        names = [part.config._attn_implementation for part in (model.text_model, model.vision_model)]
        assert [name.rpartition("_")[2] for name in names] == ["sdpa", "eager"]
        close(model(**inputs).logits_per_image, want, LOOSE)
    assert model.text_model.config._attn_implementation == "sdpa"
    assert model.vision_model.config._attn_implementation == "eager"


@pytest.mark.parametrize("own", ["eager", "sdpa"])
def test_short_sequences_keep_the_models_own_attention(own: str, calls: list[dict[str, Any]]) -> None:
    model, inputs = built("bert")
    model.set_attn_implementation(own)
    short = {name: x[:, 5:15].contiguous() for name, x in inputs.items()}
    want, want_short = (differentiated(model, x)[0] for x in (inputs, short))
    with enabled(model, min_seqlen=SEQLEN):
        close(differentiated(model, short)[0], want_short, EXACT)
        assert not calls
        close(differentiated(model, inputs)[0], want, EXACT)
        assert len(calls) == model.config.num_hidden_layers


@pytest.mark.parametrize("family", ["gemma3", "whisper"])
def test_generation_may_grow_beyond_the_models_own_attention(family: str, calls: list[dict[str, Any]]) -> None:
    model, inputs = built(family)
    if family == "gemma3":
        inputs = left_padded(inputs["input_ids"], (SEQLEN, 11))
    want_tokens, want = generated(model, inputs)
    with enabled(model, min_seqlen=WINDOW + 2 if family == "whisper" else SEQLEN + 5):
        got_tokens, got = generated(model, inputs)
    assert calls
    assert torch.equal(got_tokens, want_tokens)
    close(got, want, LOOSE)


def test_short_sequences_need_an_attention_to_be_left_to() -> None:
    from flash.integrations.transformers import enable

    model, _ = built("llama")
    for wrong in (-1, True, 3.0):
        with pytest.raises(ValueError, match="min_seqlen"):
            enable(model, min_seqlen=wrong)
    model.set_attn_implementation("flex_attention")
    with pytest.raises(ValueError, match="flex_attention"):
        enable(model, min_seqlen=8)
    assert model.config._attn_implementation == "flex_attention"
    enable(model)


def test_models_that_would_lose_causality_are_refused() -> None:
    from transformers import AutoformerConfig, AutoformerModel

    from flash.integrations.transformers import enable, register

    torch.manual_seed(0)
    model, inputs = series("Informer", attention_type="full")  # its decoder says that it is not causal
    with pytest.raises(NotImplementedError, match="InformerForPrediction .* future"):
        enable(model)
    want = model(**inputs)
    model.set_attn_implementation(register())  # but a mask of ours says that it is
    close(prediction(model(**inputs)), prediction(want), LOOSE)

    without = AutoformerModel(AutoformerConfig(prediction_length=4, d_model=16, encoder_layers=1, decoder_layers=1))
    with pytest.raises(NotImplementedError, match="AutoformerModel does not attend through"):
        enable(without)


def test_windows_that_layers_do_not_pass_on_are_kept(calls: list[dict[str, Any]]) -> None:
    from flash.integrations.transformers import enable

    torch.manual_seed(0)
    model, inputs = decoder(
        "Qwen2Moe", use_sliding_window=True, sliding_window=WINDOW, max_window_layers=2, num_experts=2,
        num_experts_per_tok=1, moe_intermediate_size=16, shared_expert_intermediate_size=16,
        experts_implementation="eager",
    )  # fmt: skip
    want = model(**inputs).logits
    enable(model)
    close(model(**inputs).logits, want, LOOSE)
    assert [call["window"] for call in calls] == [(WINDOW - 1, None), None]


def test_a_decoder_may_be_told_to_look_both_ways() -> None:
    model, inputs = built("llama")
    causal, want = model(**inputs).logits, model(**inputs, is_causal=False).logits
    assert not torch.allclose(want, causal, atol=1e-2)
    with enabled(model):
        close(model(**inputs, is_causal=False).logits, want, LOOSE)
        model.config.is_causal = False
        close(model(**inputs).logits, want, LOOSE)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_masks_of_four_axes_pass_as_they_are(family: str, calls: list[dict[str, Any]]) -> None:
    # a prefix of 5 tokens is seen by all, for which the model's own causality and windows must be left aside
    model, inputs = built(family)
    i, j = torch.arange(SEQLEN)[:, None], torch.arange(SEQLEN)
    sees = ((j <= i) | (j < 5)).expand(2, 1, SEQLEN, SEQLEN)
    added = torch.zeros(sees.shape, dtype=torch.float64).masked_fill(~sees, float("-inf"))
    want = model(**inputs, attention_mask=added).logits
    with enabled(model):
        close(model(**inputs, attention_mask=added).logits, want, LOOSE)
        close(model(**inputs, attention_mask=sees).logits, want, LOOSE)
    biases, masks = [call["bias"] for call in calls[:2]], [call["mask"] for call in calls[2:]]
    assert all(x is added for x in biases) and all(x is sees for x in masks)


def test_rows_that_see_nothing_are_zero_not_nan(calls: list[dict[str, Any]]) -> None:
    model, inputs = built("gemma2")
    batch = {**left_padded(inputs["input_ids"], (SEQLEN, 4)), "labels": inputs["labels"]}
    with enabled(model):
        logits, loss, grads = differentiated(model, batch)
    assert bool(logits.isfinite().all()) and bool(loss.isfinite())
    assert all(bool(x.isfinite().all()) for x in grads.values())
    assert any(call.get("mask") is not None and call["window"] == (WINDOW - 1, None) for call in calls)


@pytest.mark.parametrize("name", ["cache", "indices", "block_indices", "head_mask", "anything_else"])
def test_arguments_that_would_change_the_result_raise(name: str) -> None:
    from flash.integrations.transformers import attend

    q = torch.randn(1, 2, 4, 8)
    attend(torch.nn.Identity(), q, q, q, None, **{name: None}, use_cache=True)
    with pytest.raises(NotImplementedError, match=name):
        attend(torch.nn.Identity(), q, q, q, None, **{name: torch.ones(1)})


def test_calls_that_cannot_be_meant_raise() -> None:
    from flash.integrations.transformers import attend
    from flash.integrations.transformers_masks import Visibility

    q, starts = torch.randn(2, 2, 4, 8), torch.tensor([0, 4], dtype=torch.int32)
    with pytest.raises(ValueError, match="4 dimensions"):
        attend(torch.nn.Identity(), q, q, q, torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="batch of one"):
        attend(torch.nn.Identity(), q, q, q, None, cu_seq_lens_q=starts, cu_seq_lens_k=starts)
    causal = Visibility(True, None, 4, 4).mask("cpu")
    attend(torch.nn.Identity(), q, q, q, causal)
    with pytest.raises(ValueError, match="is_causal=False contradicts"):
        attend(torch.nn.Identity(), q, q, q, causal, is_causal=False)
    for wrong in (torch.ones(2, 1, 4, 4).tril().to(dtype) for dtype in (torch.int64, torch.int32, torch.uint8)):
        with pytest.raises(ValueError, match="must be bool or float"):
            attend(torch.nn.Identity(), q, q, q, wrong)
    for cut in (causal[:, :, 1:], causal[..., 1:], causal[:, :, ::2], causal[:, :, :, :1]):
        with pytest.raises(ValueError, match="attention_mask must"):
            attend(torch.nn.Identity(), q, q, q, cut)
    model, inputs = built("llama")
    with enabled(model), pytest.raises(NotImplementedError, match="output_attentions"):
        model(**inputs, output_attentions=True)


def test_continuous_batching_takes_transformers_own_names_alone() -> None:
    # when this fails, transformers serves other names: see what it passes as `cache` then
    model, _ = built("llama")
    model.generation_config.eos_token_id = -1
    with enabled(model), pytest.raises(ValueError, match="not supported for continuous batching"):
        model.init_continuous_batching().switch_to_cb_friendly_attn(model, False)


COMPILED: dict[str, dict[str, Any]] = {
    "llama": {"position_ids": PACKED, "use_cache": False},  # might be packed: who sees whom, pair by pair
    "gemma2": {"attention_mask": torch.ones(2, SEQLEN, dtype=torch.long)},  # not looked at: a padding mask
    "gpt_oss": {},  # documents by its positions
    "bert": {},
}


@pytest.mark.parametrize("family", COMPILED)
def test_a_model_compiles_without_a_graph_break(family: str) -> None:
    torch.compiler.reset()
    model, inputs = built(family)
    if family == "gpt_oss":
        model.set_experts_implementation("batched_mm")  # the eager one waits for numbers
    inputs.update(COMPILED[family])
    want, want_loss, want_grads = differentiated(model, inputs)
    with enabled(model):
        got, got_loss, got_grads = differentiated(model, inputs, torch.compile(model, fullgraph=True, backend=TRACED))
    close(got, want, LOOSE)
    close(got_loss, want_loss, LOOSE)
    assert got_grads.keys() == want_grads.keys()
    for name, grad in want_grads.items():
        close(got_grads[name], grad, LOOSE, name)


def test_generation_with_a_static_cache_compiles() -> None:
    from transformers import CompileConfig

    torch.compiler.reset()
    model, inputs = built("gemma3")
    batch = left_padded(inputs["input_ids"], (SEQLEN, 11))
    want_tokens, want = generated(model, batch)
    with enabled(model):
        options = dict(cache_implementation="static", compile_config=CompileConfig(fullgraph=True, backend=TRACED))
        got_tokens, got = generated(model, batch, **options)
    assert torch.equal(got_tokens, want_tokens)
    close(got, want, LOOSE)


@pytest.mark.parametrize("rows", [slice(None), slice(3, None), slice(0, 2), slice(1, 3)], ids=str)
def test_a_model_may_cut_its_mask_to_some_of_its_queries(rows: slice) -> None:
    """Gemma 4 does, to those that logits are wanted of."""
    from flash.integrations.transformers import attend
    from flash.integrations.transformers_masks import Visibility

    q, k = torch.randn(2, 2, 4, 8).double(), torch.randn(2, 2, 6, 8).double()
    ids = torch.tensor([[0, 0, 1, 1, 1, 1], [5, 5, 5, 5, 6, 6]])
    for said in (Visibility(True, 2, 4, 6, ids != 5), Visibility(True, None, 4, 6, documents=ids)):
        mask = said.mask("cpu")
        whole = attend(torch.nn.Identity(), q, k, k, mask)
        close(attend(torch.nn.Identity(), q[:, :, rows], k, k, mask[:, :, rows]), whole[:, rows], 1e-12)


def test_a_mask_of_one_key_says_the_same_of_all() -> None:
    """MiniMax asks for one at each step of generation."""
    from flash.integrations.transformers import attend
    from flash.integrations.transformers_masks import Visibility

    q, k = torch.randn(2, 2, 1, 8).double(), torch.randn(2, 2, 6, 8).double()
    for shown in (None, torch.tensor([[True], [False]])):
        got = attend(torch.nn.Identity(), q, k, k, Visibility(True, None, 1, 1, shown).mask("cpu"))
        mask = None if shown is None else shown[:, None, None].expand(2, 1, 1, 6)
        close(got, attend(torch.nn.Identity(), q, k, k, mask, is_causal=False), 1e-12)


def pairs_of(mask: Tensor, batch: int, kv_length: int, q_length: int) -> Tensor:
    """What a mask of ours says of every pair, bool [batch, 1, q_length, kv_length]."""
    from flash.integrations.transformers_masks import Visibility

    if mask.dtype == torch.bool:
        return mask
    said, first = Visibility.of(mask, batch, q_length, kv_length)
    assert first == 0
    j = torch.arange(kv_length)
    i = torch.arange(q_length)[:, None] + kv_length - q_length
    sees = (j >= 0) & torch.ones_like(i).bool()
    if said.causal:
        sees = sees & (j <= i)
    if said.left is not None:
        sees = sees & (j >= i - said.left) & (said.causal | (j <= i + said.left))
    sees = sees.expand(mask.shape[0], 1, q_length, kv_length).clone()
    for rows in (said.shown, said.documents):
        if rows is not None:
            same = rows[:, None, :] if rows is said.shown else rows[:, :, None] == rows[:, None, :]
            sees &= same[:, None]
    return sees


def asked() -> dict[str, tuple[Any, dict[str, Any]]]:
    """Requests as transformers' models make them: (creator, keywords)."""
    from transformers import DynamicCache, LlamaConfig, StaticCache, masking_utils

    config = LlamaConfig(**DECODER)
    config.sliding_window, config.attention_chunk_size = WINDOW, None
    chunks = LlamaConfig(**DECODER)
    chunks.attention_chunk_size = WINDOW
    padding = left_padded(torch.ones(2, SEQLEN, dtype=torch.long), (SEQLEN, 8))["attention_mask"]
    blocks = torch.tensor([-1] * 5 + [0] * 4 + [-1] * 3 + [1] * 7).expand(2, -1)

    def cache(kind: Any, filled: int, **options: Any) -> Any:
        past = kind(config=LlamaConfig(**DECODER), **options)
        for layer in range(2 if filled else 0):
            past.update(torch.zeros(2, 2, filled, 8), torch.zeros(2, 2, filled, 8), layer)
        return past

    of = {kind: getattr(masking_utils, f"create_{kind}_mask") for kind in (
        "causal", "sliding_window_causal", "chunked_causal", "bidirectional", "bidirectional_sliding_window",
    )}  # fmt: skip
    found: dict[str, tuple[Any, dict[str, Any]]] = {}
    for kind, create in of.items():
        plain = {"config": chunks if "chunk" in kind else config, "attention_mask": None, "past_key_values": None}
        found[kind] = create, plain
        found[f"{kind}, padded"] = create, {**plain, "attention_mask": padding}
        if "bidirectional" in kind:
            continue
        found[f"{kind}, packed"] = create, {**plain, "position_ids": PACKED}
        found[f"{kind}, blocks"] = create, {**plain, "block_sequence_ids": blocks}
        found[f"{kind}, or"] = create, {**plain, "or_mask_function": lambda b, h, i, j: j < 3}
        found[f"{kind}, and"] = create, {**plain, "and_mask_function": lambda b, h, i, j: j > 0}
        for name, past in {
            "more": cache(DynamicCache, 5), "static": cache(StaticCache, 0, max_cache_len=32),
            "static, more": cache(StaticCache, 5, max_cache_len=32),
        }.items():  # fmt: skip
            found[f"{kind}, {name}"] = create, {**plain, "past_key_values": past}
    return found


def test_every_mask_says_of_every_pair_what_transformers_own_says() -> None:
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    from flash.integrations.transformers import register

    compact = []
    for name, (create, request) in asked().items():
        masks = {}
        for implementation in (register(), "pairs"):
            AttentionMaskInterface._global_mapping["pairs"] = lambda **x: sdpa_mask(
                **{**x, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
            )
            request["config"]._attn_implementation_internal = implementation
            masks[implementation] = create(inputs_embeds=torch.zeros(2, SEQLEN, 32), **request)
        del AttentionMaskInterface._global_mapping["pairs"]
        ours, theirs = masks[register()], masks["pairs"]
        assert torch.equal(pairs_of(ours, 2, theirs.shape[3], SEQLEN).expand(theirs.shape), theirs), name
        if ours.dtype != torch.bool:
            compact.append(name)
            assert ours.untyped_storage().nbytes() <= 2 * 32 * 8, name
    wide = {name.split(", ", 1)[-1] for name in asked()} - {"blocks", "or", "and", "static", "static, more"}
    assert {name for name in asked() if name.split(", ", 1)[-1] in wide and "chunk" not in name} == set(compact)
