"""neuralforecast's models, tiny and random, with our attention and with their own."""

import copy
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

pytestmark = [
    pytest.mark.integrations,
    pytest.mark.filterwarnings("ignore::FutureWarning:ray"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),
    pytest.mark.filterwarnings("ignore::UserWarning:pytorch_lightning"),
    pytest.mark.filterwarnings("ignore::FutureWarning:pytorch_lightning"),
    pytest.mark.filterwarnings("ignore:The given NumPy array is not writable:UserWarning"),  # of pandas, to torch
]

H, LENGTH, SERIES = 4, 24, 5
SMALL = {"hidden_size": 16, "dropout": 0.0}
ENCODER_DECODER = {**SMALL, "n_head": 2, "conv_hidden_size": 8}
MODELS: dict[str, dict[str, Any]] = {
    "TFT": {**SMALL, "n_head": 2},
    "PatchTST": {**SMALL, "n_heads": 4, "linear_hidden_size": 16, "patch_len": 4, "stride": 2, "fc_dropout": 0.0},
    "iTransformer": {**SMALL, "n_heads": 2, "d_ff": 16, "n_series": SERIES},
    "Informer": ENCODER_DECODER,
    "Autoformer": {**ENCODER_DECODER, "MovingAvg_window": 5},
    "FEDformer": {**ENCODER_DECODER, "n_head": 8, "MovingAvg_window": 5},
}
EXACT = {
    "TFT": ("TFT", {}),
    "PatchTST": ("PatchTST", {}),
    "PatchTST without residual scores": ("PatchTST", {"res_attention": False}),
    "iTransformer": ("iTransformer", {}),
    "VanillaTransformer": ("VanillaTransformer", ENCODER_DECODER),
}
OTHERS = {"Informer": "ProbSparse attention", "Autoformer": "auto-correlation", "FEDformer": "Fourier blocks"}


def made(name: str, **changes: Any) -> Any:
    """A small random model in evaluation mode."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ray's and lightning's, when first imported
        import neuralforecast.models

    torch.manual_seed(0)
    keywords: dict[str, Any] = {"h": H, "input_size": LENGTH, **MODELS.get(name, {}), **changes}
    return getattr(neuralforecast.models, name)(**keywords).eval()


def batch(dtype: torch.dtype = torch.float64, size: int = 3, length: int = LENGTH, series: int = 1) -> dict[str, Any]:
    """What a model's forward takes."""
    y = torch.randn(size, length, series, dtype=dtype, generator=torch.Generator().manual_seed(1))
    return {"insample_y": y, "futr_exog": None, "hist_exog": None, "stat_exog": None}


def batch_of(model: Any, **changes: Any) -> dict[str, Any]:
    return batch(series=SERIES if type(model).__name__ == "iTransformer" else 1, **changes)


@pytest.fixture(autouse=True)
def float64() -> Any:
    """Models that make zeros of their own make them in the default dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def losses_of(model: Any, steps: int = 3, lr: float = 1e-3) -> list[float]:
    """The loss before each of these steps of Adam, and after the last."""
    inputs = batch_of(model)
    target = torch.randn(3, H, inputs["insample_y"].shape[2], generator=torch.Generator().manual_seed(2))
    optimiser = torch.optim.Adam([x for x in model.parameters() if x.requires_grad], lr=lr)
    losses = []
    model.train()
    for _ in range(steps):
        loss = (model(inputs) - target).square().mean()
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    losses.append((model(inputs) - target).square().mean().item())
    model.eval()
    return losses


def hold_alike(ours: Any, own: Any) -> None:
    """Predictions, gradients of every parameter, and losses over three steps are the same to rounding."""
    inputs = batch_of(own)
    got, want = ours(inputs), own(inputs)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
    got.square().sum().backward()
    want.square().sum().backward()
    gradients = {name: x.grad for name, x in ours.named_parameters() if x.grad is not None}
    assert gradients.keys() == {name for name, x in own.named_parameters() if x.grad is not None}
    for name, x in own.named_parameters():
        if name in gradients:
            torch.testing.assert_close(gradients[name], x.grad, rtol=1e-10, atol=1e-10)
    assert sum(bool(x.abs().max() > 0) for x in gradients.values()) > 5
    torch.testing.assert_close(losses_of(ours), losses_of(own), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(ours(inputs), own(inputs), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("case", EXACT)
def test_exact_models_predict_and_train_as_before(case: str) -> None:
    from flash.integrations.neuralforecast import StandIn, enable

    name, changes = EXACT[case]
    own = made(name, **changes)
    ours = enable(copy.deepcopy(own))
    assert any(isinstance(x, StandIn) for x in ours.modules())
    if name == "iTransformer":  # so that it multiplies out the scores itself
        for layer in own.encoder.attn_layers:
            layer.attention.inner_attention.output_attention = True
    hold_alike(ours, own)


@pytest.mark.parametrize("name", ["TFT", "PatchTST", "iTransformer"])
def test_exact_models_learn(name: str) -> None:
    from flash.integrations.neuralforecast import enable

    first, *_, last = losses_of(enable(made(name)), steps=20, lr=1e-2)
    assert last < 0.8 * first


@pytest.mark.parametrize("name", OTHERS)
def test_without_a_mechanism_the_others_are_left_alone_and_told_so(name: str) -> None:
    from flash.integrations.neuralforecast import enable

    torch.set_default_dtype(torch.float32)  # FEDformer has complex64 weights
    own = made(name)
    with pytest.warns(UserWarning, match=f'{name} has {OTHERS[name]}.*left alone.*mechanism="full"'):
        same = enable(copy.deepcopy(own))
    assert [type(x) for x in same.modules()] == [type(x) for x in own.modules()]
    assert repr(same) == name
    torch.manual_seed(0)  # ProbSparse attention draws keys
    want = own(batch(torch.float32))
    torch.manual_seed(0)
    assert torch.equal(same(batch(torch.float32)), want)


def with_its_own_full_attention(model: Any) -> Any:
    """The same swap by neuralforecast's own FullAttention, with all scores in memory."""
    from neuralforecast.common._modules import FullAttention

    for layer in [x for x in model.modules() if hasattr(x, "query_projection")]:
        name = "inner_attention" if hasattr(layer, "inner_attention") else "inner_correlation"
        causal = getattr(getattr(layer, name), "mask_flag", False)
        eager = FullAttention(causal, attention_dropout=0.0, output_attention=True)
        setattr(layer, name, Positional(eager))
    return model


class Positional(torch.nn.Module):
    """Takes what both kinds of layer give, three tensors and no mask."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.attention = attention

    def forward(
        self, queries: Any, keys: Any, values: Any, attn_mask: None, tau: None = None, delta: None = None
    ) -> Any:
        return self.attention(queries, keys, values, attn_mask)


@pytest.mark.parametrize("name", OTHERS)
def test_full_attention_by_name_is_another_model_that_trains(name: str) -> None:
    from flash.integrations.neuralforecast import disable, enable

    own = made(name)
    ours = enable(copy.deepcopy(own), mechanism="full")
    assert repr(ours) == f"{name}-full"
    assert ours.state_dict().keys() == own.state_dict().keys()
    hold_alike(ours, with_its_own_full_attention(copy.deepcopy(own)))
    first, *_, last = losses_of(ours, steps=20, lr=1e-2)
    assert last < 0.9 * first
    assert all(x.grad is not None for x in ours.parameters() if x.requires_grad)  # as DDP expects

    assert repr(enable(ours, mechanism="full")) == f"{name}-full"
    back = disable(ours)
    assert repr(back) == name
    assert [type(x) for x in back.modules()] == [type(x) for x in own.modules()]
    assert all(x.requires_grad for x in back.parameters())


def test_interpretability_weights_are_still_there() -> None:
    from flash.integrations.neuralforecast import enable

    own = made("TFT")
    ours = enable(copy.deepcopy(own))
    for size in (1, 3):
        with torch.no_grad():
            own(batch(size=size)), ours(batch(size=size))
        want, got = own.interpretability_params["attn_wts"], ours.interpretability_params["attn_wts"]
        assert not isinstance(got, torch.Tensor)
        assert (got.size(), got.size(0), len(got), got.shape) == (want.size(), size, size, want.shape)
        for x, y in (
            (got.tensor(), want),
            (got[0], want[0]),
            (got.mean(dim=0), want.mean(0)),
            (got.mean(), want.mean()),
        ):
            torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(ours.attention_weights(), own.attention_weights(), rtol=1e-12, atol=1e-12)
        assert ours.feature_importance_correlations().equals(own.feature_importance_correlations())
    ours(batch())
    held = ours.interpretability_params["attn_wts"]
    assert not held.q.requires_grad and copy.deepcopy(held).shape == held.shape


def test_checkpoints_fit_both_ways() -> None:
    from flash.integrations.neuralforecast import disable, enable

    for name in ("TFT", "PatchTST"):
        own = made(name)
        ours = enable(copy.deepcopy(own))
        losses_of(ours)
        saved = ours.state_dict()
        assert {key: x.shape for key, x in saved.items()} == {key: x.shape for key, x in own.state_dict().items()}
        own.load_state_dict(saved)
        torch.testing.assert_close(own(batch()), ours(batch()), rtol=1e-11, atol=1e-11)
        ours.load_state_dict(own.state_dict(), assign=True)
        torch.testing.assert_close(disable(ours)(batch()), own(batch()), rtol=0, atol=0)
        assert all(torch.equal(x, saved[key]) for key, x in ours.state_dict().items())


def test_disable_gives_the_model_back_and_enabling_twice_is_once() -> None:
    from flash.integrations.neuralforecast import StandIn, disable, enable

    for name in EXACT:
        own = made(EXACT[name][0], **EXACT[name][1], alias="mine-full")
        ours = enable(enable(copy.deepcopy(own)))
        assert not any(isinstance(x.own[0], StandIn) for x in ours.modules() if isinstance(x, StandIn))
        back = disable(disable(ours))
        assert [(key, type(x)) for key, x in back.named_modules()] == [(key, type(x)) for key, x in own.named_modules()]
        assert torch.equal(back(batch_of(own)), own(batch_of(own))) and repr(back) == "mine-full"
        assert back.state_dict().keys() == own.state_dict().keys()


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("TFT", {"attn_dropout": 0.5}),
        ("PatchTST", {"attn_dropout": 0.5}),
        ("PatchTST", {"attn_dropout": 0.5, "res_attention": False}),
        ("iTransformer", {"dropout": 0.5}),
    ],
)
def test_attention_drops_in_training_only(name: str, changes: dict[str, Any]) -> None:
    from flash.integrations.neuralforecast import enable

    ours = enable(made(name, **changes))
    for layer in ours.modules():  # leave attention's dropout alone
        if isinstance(layer, torch.nn.Dropout) and name == "iTransformer":
            layer.p = 0.0
    if name == "iTransformer":
        for layer in ours.encoder.attn_layers:
            layer.attention.inner_attention.dropout.p = 0.5
    inputs = batch_of(ours)
    assert torch.equal(ours(inputs), ours(inputs))
    ours.train()
    assert not torch.equal(ours(inputs), ours(inputs))


def test_patchtst_by_itself_drops_in_predictions() -> None:
    """A fault of neuralforecast 3.3.0; when it is gone, `enable` mends nothing."""
    own = made("PatchTST", attn_dropout=0.5, res_attention=False)
    assert not torch.equal(own(batch()), own(batch()))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
def test_tft_takes_memory_that_grows_with_the_length() -> None:
    """At length 4096 the scores of two heads are 128 MiB, and the model by itself holds several such."""
    from flash.integrations.neuralforecast import enable

    torch.set_default_dtype(torch.float32)

    def taken(length: int, change: Callable[[Any], Any]) -> int:
        """MiB that a forward and backward pass takes at its peak."""
        model = change(made("TFT", input_size=length - H, hidden_size=4))
        if change is enable:
            assert max(x.numel() for x in (*model.buffers(), *model.parameters())) < length
        inputs = batch(torch.float32, size=1, length=length - H)

        def memory(what: str) -> int:
            with open("/proc/self/status") as status:
                return next(int(line.split()[1]) for line in status if line.startswith(what)) // 1024

        with open("/proc/self/clear_refs", "w") as peak:
            peak.write("5")  # forget the peak
        before = memory("VmRSS")
        model(inputs).sum().backward()
        return memory("VmHWM") - before

    taken(512, enable)
    short, long = taken(2048, enable), taken(4096, enable)
    assert long < 2.5 * short + 16
    assert long < taken(4096, lambda model: model) / 4


def test_a_neuralforecast_fits_and_predicts_with_it(tmp_path: Any) -> None:
    import numpy as np
    import pandas as pd
    from neuralforecast import NeuralForecast

    from flash.integrations.neuralforecast import StandIn, enable

    torch.set_default_dtype(torch.float32)
    times = np.arange(60)
    frame = pd.concat(pd.DataFrame({"unique_id": i, "ds": times, "y": np.sin(times / 3 + i)}) for i in range(2))
    quiet = {"max_steps": 2, "val_check_steps": 1, "accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    quiet |= {"enable_progress_bar": False, "enable_model_summary": False}

    def predictions(change: Callable[[Any], Any]) -> tuple[Any, Any]:
        models = [made("TFT", **quiet), made("Informer", **quiet), made("NHITS", **quiet)]
        forecast = change(NeuralForecast(models=models, freq=1))
        forecast.fit(frame)
        return forecast, forecast.predict()

    forecast, ours = predictions(lambda x: enable(x, mechanism="full"))
    _, own = predictions(lambda x: x)
    assert [any(isinstance(x, StandIn) for x in model.modules()) for model in forecast.models] == [True, True, False]
    assert list(ours.columns) == ["unique_id", "ds", "TFT", "Informer-full", "NHITS"]
    np.testing.assert_allclose(ours["TFT"], own["TFT"], rtol=1e-5, atol=1e-5)
    assert np.isfinite(ours["Informer-full"]).all()
    forecast.save(str(tmp_path / "saved"))
    with pytest.warns(UserWarning, match="left alone"):
        loaded = enable(NeuralForecast.load(str(tmp_path / "saved")))
    np.testing.assert_allclose(loaded.predict()["TFT"], ours["TFT"], rtol=1e-5, atol=1e-5)


def test_wrong_use_raises() -> None:
    from flash.integrations.neuralforecast import disable, enable

    with pytest.raises(ValueError, match='mechanism must be None or "full", got .fourier.'):
        enable(made("FEDformer"), mechanism="fourier")
    with pytest.raises(ValueError, match="model must have attention of neuralforecast, got NHITS without"):
        enable(made("NHITS"))
    for function in (enable, disable):
        with pytest.raises(TypeError, match="model must be a model of neuralforecast or a NeuralForecast, got str"):
            function("TFT")
    model = made("iTransformer")
    model.encoder.attn_layers[1].attention.inner_attention.output_attention = True
    types = [type(x) for x in model.modules()]
    with pytest.raises(NotImplementedError, match="set output_attention to False"):
        enable(model)
    assert types == [type(x) for x in model.modules()]
    x = torch.randn(1, 5, 2, 8)
    attention = enable(made("iTransformer")).encoder.attn_layers[0].attention.inner_attention
    with pytest.raises(NotImplementedError, match="attn_mask is not served"):
        attention(x, x, x, attn_mask=torch.ones(5, 5))
    residual = enable(made("PatchTST")).model.backbone.encoder.layers[0].self_attn.sdp_attn
    with pytest.raises(NotImplementedError, match="attn_mask and its like are not served"):
        residual(x, x.mT, x, attn_mask=torch.ones(1, 5, 5))
    wide = enable(made("PatchTST", hidden_size=260, n_heads=1, encoder_layers=2))
    with pytest.raises(ValueError, match="head_dim from 1 to 512, got 520"):
        wide(batch())
