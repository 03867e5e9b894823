"""What "at home in PyTorch" promises, one test a promise; tests of their own hold each in full and are named here."""

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from bench import run as bench_run
from flash import fallback
from flash.attention import flash_attention
from flash.functorch import TWICE
from flash.kernels.spec import Gradients
from flash.ops import call_of
from flash.problem import Problem
from flash.tiling import TILE_BYTES
from tests import features, test_matrix, transforms
from tests.calls import Place
from tests.test_acceptance_speed import named_test

ROOT = Path(__file__).parents[1]
OPS = [getattr(torch.ops.flash, name) for name in ("forward", "backward", "jvp")]


def hold(module: str, *names: str) -> None:
    """These tests are there, and do something."""
    for name in names:
        named_test(module, name)


@pytest.mark.parametrize("op", OPS, ids=str)
def test_ops_mutate_nothing_and_count_their_flops(op: Any) -> None:
    assert not op.default._schema.is_mutable
    assert op in flop_registry
    hold(
        "test_ops",
        "test_opcheck_passes_whatever_the_strides",
        "test_opcheck_passes_with_every_operand",
        "test_opcheck_passes_with_the_operands_of_other_calls",
        "test_a_raw_op_refuses_to_lose_a_gradient",
        "test_a_raw_op_refuses_to_lose_a_tangent_even_under_no_grad",
        "test_flops_of_a_dense_call_are_those_of_its_matrix_products",
        "test_flops_of_packed_sequences_are_the_sum_of_theirs",
    )


@pytest.mark.parametrize("op", OPS, ids=str)
def test_ops_carry_no_autograd_formula(op: Any) -> None:
    """One below functorch's transforms makes some of them return zeros in silence."""
    q = torch.randn(1, 1, 4, 8, requires_grad=True)
    with torch.no_grad():
        o = torch.ops.flash.forward(q, q, q, *call_of(Problem.of(q, q, q)))[0]
    assert o.grad_fn is None and not o.requires_grad
    hold("test_ops", "test_a_raw_op_refuses_to_lose_a_gradient")


def test_compile_and_export_see_one_opaque_op() -> None:
    hold(
        "test_at_home",
        "test_a_transformer_block_compiles_whole",
        "test_a_new_length_would_be_seen_to_compile_again",
        "test_inductor_keeps_values_and_the_strides_that_ops_expect",
        "test_an_exported_model_has_one_node_for_attention",
        "test_an_exported_model_is_saved_and_loaded",
        "test_an_aotinductor_package_runs",
    )
    hold("test_matrix", "test_compiled", "test_export_keeps_one_node")


@pytest.mark.parametrize("name", ["grad", "vmap", "vmap(grad)", "jacrev", "jvp", "dual", "jacfwd"])
def test_torch_func_and_forward_mode_are_right_in_eager(name: str) -> None:
    assert test_matrix.CELLS[name][0] is test_matrix.RIGHT
    hold("test_matrix", "test_eager", "test_any_operand_may_be_mapped_over_any_axis")
    hold("test_at_home", "test_per_sample_gradients_by_functional_call", "test_an_ensemble_by_stacked_parameters")


def test_no_cell_that_answers_is_content_with_having_run() -> None:
    """Each that must be right has the oracle's word on it."""
    answered = {name for name, expected in test_matrix.CELLS.items() if test_matrix.RIGHT in expected}
    assert test_matrix.CELLS.keys() == transforms.TRANSFORMS.keys() and answered <= transforms.WANTED.keys()


@pytest.mark.interpret(gpu=False)  # the interpreter counts launches
def test_tangents_of_o_and_lse_are_made_in_one_launch(place: Place, launches: list[Any]) -> None:
    x = features.call_of(place, ["bias", "causal", "groups", "sinks", "softcap"])
    function, tensors = features.of_operands(features.attention("triton"), x)
    function(*tensors)
    alone = len(launches)
    torch.func.jvp(function, tuple(tensors), tuple(torch.randn_like(t) for t in tensors))
    assert len(launches) == alone + alone + 1, [launch.kernel for launch in launches]


class Largest(TorchDispatchMode):
    """The largest tensor, in bytes, that any operation makes."""

    nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            self.nbytes = max(self.nbytes, x.untyped_storage().nbytes() if isinstance(x, torch.Tensor) else 0)
        return out


def test_tangents_take_memory_that_grows_with_the_length() -> None:
    """The scores of length 8192 are 256 MiB; a tile's are a small part of that."""
    q, t = torch.randn(2, 1, 1, 8192, 16)
    p = Problem.of(q, q, q, causal=True, bias=torch.randn(8192))
    call = p.q, p.k, p.v, *fallback.forward(p.q, p.k, p.v, p.mods, p.spec, p.scale, p.positions)
    with Largest() as largest:  # an op's own operations are not seen from outside of it
        fallback.jvp(Gradients(t, t, t, None, None, None), *call, p.mods, p.spec, p.scale, p.positions)
    assert q.nbytes < largest.nbytes <= TILE_BYTES < 4 * 8192 * 8192 / 16


def test_reverse_over_jvp_raises_and_its_primal_trains() -> None:
    assert test_matrix.CELLS["grad(jvp)"][0] == test_matrix.CELLS["jvp(grad)"][0] == test_matrix.ONCE
    assert test_matrix.CELLS["backward of o beside jvp"][0] is test_matrix.RIGHT
    hold("test_at_home", "test_meanflow_trains_parameters_through_the_primal_of_a_jvp")


MENTIONS = [
    ("torch.func", r"torch\.func|vmap"),
    ("forward mode", r"\bjvp\b|forward mode"),
    ("once", "differentiable once"),
]


def test_the_readme_says_which() -> None:
    text = (ROOT / "README.md").read_text()
    assert [what for what, pattern in MENTIONS if not re.search(pattern, text)] == []


def test_double_backward_raises_and_what_it_names_instead_works() -> None:
    q = torch.randn(1, 2, 5, 8, dtype=torch.float64, requires_grad=True)

    def second(attention: Any) -> torch.Tensor:
        (first,) = torch.autograd.grad(attention(q, q, q).square().sum(), q, create_graph=True)
        return torch.autograd.grad(first.square().sum(), q)[0]

    with pytest.raises(NotImplementedError, match="differentiable once") as raised:
        second(flash_attention)
    assert "scaled_dot_product_attention under sdpa_kernel(SDPBackend.MATH)" in str(raised.value) == TWICE
    with sdpa_kernel(SDPBackend.MATH):
        got = second(torch.nn.functional.scaled_dot_product_attention)
    assert_close(got, second(lambda q, k, v: (q @ k.mT * 8**-0.5).softmax(-1) @ v))


def test_training_s_surroundings_are_held() -> None:
    """autocast, checkpoint, determinism, copies, threads, forks, streams, devices, CUDA graphs, DDP and FSDP2."""
    assert test_matrix.CELLS["checkpoint"] == (test_matrix.RIGHT,) * 3
    hold("test_matrix", "test_autocast_casts_q_k_and_v_and_gradients_back")
    hold(
        "test_at_home",
        "test_deterministic_algorithms_are_heeded_and_repeat",
        "test_a_copied_or_pickled_module_is_the_same_and_its_own",
        "test_eight_threads_at_once_get_what_each_gets_alone",
        "test_a_forked_worker_gets_what_its_parent_gets",
        "test_ddp_leaves_gradients_as_they_are",
        "test_fsdp2_leaves_gradients_as_they_are",
        "test_a_call_runs_on_the_current_stream",
        "test_the_current_device_is_neither_used_nor_changed",
        "test_a_call_never_waits_for_the_gpu",
        "test_a_cuda_graph_replays_with_new_inputs_and_fresh_dropout",
    )


def test_user_functions_work_under_compile() -> None:
    hold("test_at_home", "test_user_functions_work_under_compile")
    assert "score_mod-mask_mod" in test_matrix.COMBINATIONS


def test_tangents_are_the_oracle_s_and_the_transpose_of_gradients() -> None:
    hold(
        "test_jvp",
        "test_tangents_of_every_feature_are_the_oracle_s",
        "test_tangents_of_every_pair_of_features_are_the_oracle_s",
        "test_tangents_and_gradients_are_each_other_s_transpose",
    )


def private_names(path: Path) -> set[str]:
    """The last part of each private name of torch, or of a module of it, that a file uses."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").startswith("torch"):
            private = "._" in (node.module or "")
            found |= {alias.name for alias in node.names if private or alias.name.startswith("_")}
        elif isinstance(node, ast.Attribute):
            parts = ast.unparse(node).split(".")
            if parts[0] in ("torch", "forward_ad") and any(part.startswith("_") for part in parts[1:]):
                found.add(parts[-1])
    return found - {"_C", "_functorch", "__version__"}


def test_each_private_name_of_torch_has_a_smoke_test() -> None:
    used = set().union(*(private_names(path) for path in (ROOT / "flash").glob("*.py")))
    assert {"_current_level", "_AutoDispatchBelowAutograd", "FakeTensor", "is_gradtrackingtensor"} <= used
    smoke = (ROOT / "tests" / "test_ops.py").read_text()
    assert sorted(name for name in used if name not in smoke) == []


def test_overheads_of_each_path_are_a_suite_of_bench() -> None:
    assert "--suite overhead" in str(bench_run.__doc__)
    assert list(ROOT.glob("bench/results/*/overhead.json"))
