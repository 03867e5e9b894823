"""Hugging Face models by flash_attention give what their own eager attention gives: logits, gradients, losses, tokens.

The models are tiny, randomly initialised and float64. Eager attention narrows its softmax to float32 even then, which
is undone here (`wide`). What models narrow elsewhere, RMSNorm's mean square above all, rounds two nearly equal numbers
to float32 each, and may give them one ulp of difference: LOOSE. Models that narrow nothing are held to EXACT.
"""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.families import (
    BOUNDS,
    CAUSAL,
    EXACT,
    LOOSE,
    MODELS,
    PACKED,
    SEQLEN,
    TRACED,
    WINDOW,
    built,
    close,
    decoder,
    enabled,
    left_padded,
    masked,
    prediction,
    series,
    tokens,
)

pytestmark = [
    pytest.mark.integrations,
    pytest.mark.filterwarnings("ignore::DeprecationWarning:transformers"),
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),
    pytest.mark.filterwarnings("ignore::UserWarning:transformers"),
]


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
    with pytest.raises(ValueError, match="is_causal must not be False beside a causal mask"):
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
