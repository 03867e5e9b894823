"""Which backend serves a call, which refuse it and why."""

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import flash
from flash import dispatch
from flash.attention import flash_attention
from flash.autotune import tables
from flash.kernels.spec import Config, Unfit
from tests.bounds import check, differentiate
from tests.calls import Place, random_inputs

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_auto_on_a_cpu_is_the_torch_backend() -> None:
    assert dispatch.choose("auto", CPU, torch.float32) == "torch"


@pytest.mark.parametrize("device", [CPU, torch.device("mps"), torch.device("xpu"), GPU])
def test_the_torch_backend_serves_every_device(device: torch.device) -> None:
    assert dispatch.refusal("torch", device, torch.float32, 64) is None


@pytest.mark.parametrize("device", [CPU, torch.device("meta")])
def test_hopper_asked_for_by_name_raises_and_names_what_works(device: torch.device) -> None:
    with pytest.raises(
        NotImplementedError, match="'hopper' does not serve float32 with head_dim 64 .* use backend='auto'.* 'torch'"
    ):
        dispatch.choose("hopper", device, torch.float32)
    q = torch.randn(1, 1, 3, 4)
    with pytest.raises(NotImplementedError, match="compute capability 9.0, cpu is none; use backend='auto'"):
        flash_attention(q, q, q, backend="hopper")


def test_triton_asked_for_on_a_cpu_raises_without_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "interpreted", lambda: False)
    with pytest.raises(NotImplementedError, match="only under its interpreter .* 'torch'"):
        dispatch.choose("triton", CPU, torch.float32)


def test_triton_refuses_bfloat16_under_an_interpreter_that_multiplies_it_wrongly(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dispatch, "interpreted", lambda: True)
    monkeypatch.setattr(dispatch, "interprets_bfloat16", lambda: False)
    with pytest.raises(NotImplementedError, match="triton#11584"):
        dispatch.choose("triton", CPU, torch.bfloat16)
    assert dispatch.choose("triton", CPU, torch.float16) == "triton"


def test_the_stock_interpreter_is_found_out() -> None:
    code = "import torch, flash.dispatch as d; print(d.interpreted(), d.interprets_bfloat16())"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={"TRITON_INTERPRET": "1", "PYTHONPATH": "."},
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == ["True", "False"], done.stderr


@pytest.mark.interpret(gpu=False)
def test_the_repaired_interpreter_is_trusted() -> None:
    assert dispatch.interprets_bfloat16()


@pytest.mark.parametrize(
    "release, hip, capability, dtype, reason",
    [
        ("Triton is not installed", None, (9, 0), torch.float16, "Triton is not installed"),
        ("Triton cannot be imported: no libcuda", None, (9, 0), torch.float16, "no libcuda"),
        ((3, 5), None, (9, 0), torch.float16, "Triton 3.6 or newer"),
        ((3, 7), None, (7, 5), torch.bfloat16, "compute capability 8.0"),
        ((3, 7), None, (7, 5), torch.float16, None),
        ((3, 7), None, (8, 0), torch.bfloat16, None),
        ((3, 7), "6.4", (9, 4), torch.float64, "Triton 3.9"),
        ((3, 9), "6.4", (9, 4), torch.float64, None),
        ((3, 7), "6.4", (9, 4), torch.float32, None),
    ],
)
def test_a_gpu_is_refused_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
    release: tuple[int, int] | str,
    hip: str | None,
    capability: tuple[int, int],
    dtype: torch.dtype,
    reason: str | None,
) -> None:
    monkeypatch.setattr(dispatch, "triton_release", lambda: release)
    monkeypatch.setattr(dispatch, "interpreted", lambda: False)
    monkeypatch.setattr(dispatch, "too_wide", lambda *call: None)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    found = dispatch.triton_refuses(GPU, dtype)
    assert found is None if reason is None else reason in str(found)
    assert dispatch.choose("auto", GPU, dtype) == ("triton" if reason is None else "torch")


def test_float32_is_multiplied_in_tf32_only_where_torch_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from flash.problem import precision_of

    x = torch.randn(1, dtype=torch.float32)
    assert precision_of(x) == "ieee"
    monkeypatch.setattr(torch.Tensor, "device", GPU)
    monkeypatch.setattr(torch.version, "hip", None)
    for setting, expected in (("highest", "tf32x3"), ("high", "tf32"), ("medium", "tf32")):
        monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda setting=setting: setting)
        assert precision_of(x) == expected
    assert precision_of(x.double()) == "ieee"
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert precision_of(x) == "ieee"


def test_info_tells_what_is_served_and_why_the_rest_is_not() -> None:
    found = flash.info()
    assert found["backends"]["torch"] == "served"
    assert "compute capability 9.0" in found["backends"]["hopper"]
    assert found["version"] == flash.__version__
    json.dumps(found)


@pytest.mark.interpret(gpu=False)
def test_info_tells_the_configuration_of_a_call_and_its_reason() -> None:
    q = torch.randn(1, 2, 40, 64, dtype=torch.float16)
    mine = flash.Config(32, 32, 4, 1)
    found = flash.info(q, backend="triton", causal=True, config={"dq": mine})
    assert found["backend"] == "triton"
    assert set(found["configs"]) == {"forward", "dkdv", "dq"}
    assert found["configs"]["dq"] == {"config": mine, "reason": "given by the caller"}
    assert (
        found["configs"]["forward"]["config"] == tables.lookup("interpreter", "forward", "float16", 64, 40, True).config
    )
    assert flash.info(q, backend="torch")["configs"] == {}


@pytest.mark.interpret(gpu=False)
def test_the_config_given_is_the_config_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    from flash.kernels import launch

    seen = {}
    stock = launch.launch

    def spy(kernel, programs, device, config, *args):  # type: ignore[no-untyped-def]
        seen[kernel.__name__] = config
        stock(kernel, programs, device, config, *args)

    monkeypatch.setattr("flash.kernels.forward.launch", spy)
    monkeypatch.setattr("flash.kernels.backward.launch", spy)
    configs = {"forward": flash.Config(16, 32), "dkdv": flash.Config(32, 16), "dq": flash.Config(16, 16)}
    q = torch.randn(1, 1, 20, 16, requires_grad=True)
    flash_attention(q, q, q, backend="triton", config=configs).sum().backward()
    assert seen == {f"{name}_kernel": config for name, config in configs.items()} | {"delta_kernel": configs["dq"]}


def test_a_config_that_does_not_fit_the_machine_is_a_value_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.errors import OutOfResources

    from flash.kernels.launch import launch

    class Kernel:
        __name__ = "forward_kernel"

        def __getitem__(self, grid):  # type: ignore[no-untyped-def]
            def run(*args, **options):  # type: ignore[no-untyped-def]
                raise OutOfResources(400000, 232448, "shared memory")

            return run

    with pytest.raises(ValueError, match="config must fit cpu, got Config.block_m=256.* for forward_kernel: .*400000"):
        launch(Kernel(), 1, CPU, flash.Config(256, 256, 8, 4))


def test_info_refuses_what_the_call_would(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.randn(1, 2, 5, 8)
    with pytest.raises(TypeError, match="no keyword 'casual'"):
        flash.info(q, casual=True)
    with pytest.raises(ValueError, match="return_lse must be True or False, got 'x'"):
        flash.info(q, return_lse="x")
    with pytest.raises(ValueError, match="q must be given"):
        flash.info(causal=True)
    with pytest.raises(ValueError, match="q must be a torch.Tensor, got list"):
        flash.info([1])  # type: ignore[arg-type]


@pytest.mark.interpret(gpu=False)
def test_a_table_that_a_sweep_wrote_is_what_calls_run_with(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = flash.Config(64, 32, 8, 2)
    monkeypatch.setattr(dispatch, "target_of", lambda device: "cuda:90")
    monkeypatch.setattr(dispatch, "gpu_of", lambda device: "Some GPU")
    row = tables.Row("forward", "float16", 64, None, None, None, mine, 1024, 0, 1.0)
    table = tables.Table("cuda:90", "Some GPU", "3.7.1", tables.kernel_hash(), True, (row,))
    monkeypatch.setattr(tables, "user_table", lambda target, gpu: table if gpu == "Some GPU" else None)
    tables._choose.cache_clear()
    q = torch.randn(1, 2, 4000, 64, dtype=torch.float16)
    found = flash.info(q, q[:, :, :16], backend="triton")["configs"]
    assert found["forward"] == {"config": mine, "reason": "timed on this machine's Some GPU"}
    assert "Some GPU" not in found["dq"]["reason"]
    tables._choose.cache_clear()


def test_a_head_too_wide_for_a_gpu_goes_to_torch_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "triton_refuses", lambda device, dtype: None)
    monkeypatch.setattr(dispatch, "target_of", lambda device: "cuda:90")
    assert dispatch.choose("auto", GPU, torch.float64, 512) == "torch"
    assert dispatch.choose("auto", GPU, torch.float64, 128) == "triton"
    assert dispatch.choose("auto", GPU, torch.bfloat16, 512) == "triton"
    with pytest.raises(NotImplementedError, match="KiB of shared memory, cuda:90 has 227.* takes 'torch'"):
        dispatch.choose("triton", GPU, torch.float64, 512)


def test_a_triton_that_cannot_be_imported_leaves_the_torch_backend(tmp_path: Path) -> None:
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text('raise ImportError("libcuda.so.1 is missing")')
    code = """
import json, torch, flash
q = torch.randn(1, 2, 5, 8)
flash.flash_attention(q, q, q)
print(json.dumps(flash.info()["backends"]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": f"{tmp_path}:."}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "libcuda.so.1 is missing" in json.loads(done.stdout)["triton"]


def test_python_m_flash_prints_it() -> None:
    done = subprocess.run([sys.executable, "-m", "flash"], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["backends"]["torch"] == "served"


@pytest.mark.interpret(gpu=False)
@pytest.mark.parametrize("causal", [False, True])
def test_tiles_of_a_table_that_do_not_fit_make_one_warning_and_no_wrong_result(
    causal: bool, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flash.kernels import backward, forward, jvp

    huge = Config(256, 256, 16, 8)
    monkeypatch.setattr(tables, "lookup", lambda *call: tables.Choice(huge, "a table"))
    refused: list[str] = []
    stock = forward.launch

    def launch(kernel: Any, programs: int, device: torch.device, config: Config, *args: Any, **options: Any) -> Any:
        if config == huge or kernel.__name__ == "jvp_kernel" not in refused:
            refused.append(kernel.__name__)
            raise Unfit(f"config must fit {device}, got {config}")
        return stock(kernel, programs, device, config, *args, **options)

    for module in (forward, backward, jvp):
        monkeypatch.setattr(module, "launch", launch)

    def attend(*tensors: torch.Tensor, **options: Any) -> Any:
        return flash_attention(*tensors, backend="triton", return_lse=True, **options)

    x = random_inputs(place, heads_k=1, seqlen_q=40, seqlen_k=53, head_dim=24, head_dim_v=32, causal=causal)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        check(differentiate(attend, x), x)
        tangent = torch.randn_like(x.q)
        _, got = torch.func.jvp(lambda q: attend(q, x.k, x.v, causal=causal)[0], (x.q,), (tangent,))
        _, want = torch.func.jvp(lambda q: flash_attention(q, x.k, x.v, causal=causal), (x.q,), (tangent,))
    torch.testing.assert_close(got, want)
    told = [str(each.message) for each in seen if "formula" in str(each.message)]
    # forward, backward, and the forward of forward mode with its tangents
    assert refused == ["forward_kernel", "delta_kernel", "forward_kernel", "jvp_kernel"]
    assert len(told) == len(refused) and all("in place of the table's" in words for words in told)
    with pytest.raises(Unfit, match="config must fit"):  # what the caller asks for is not replaced
        attend(x.q, x.k, x.v, config=huge)
