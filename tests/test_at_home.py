"""A model that uses attention lives as any other: compiled, exported, copied, forked, threaded, sharded, captured."""

import copy
import io
import multiprocessing
import pickle
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.testing import assert_close

from flash import mods, reference
from flash.attention import flash_attention
from flash.mods import MaskMod, ScoreMod
from flash.problem import Problem
from tests import features

WIDTH, HEADS = 16, 2


class Block(nn.Module):
    """A transformer block: attention by a function of q, k, v, then a perceptron, each in a residual."""

    def __init__(self, dtype: torch.dtype = torch.float64, **options: Any) -> None:
        super().__init__()
        self.options = options
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH, dtype=dtype) for _ in range(2))
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, dtype=dtype), nn.Linear(WIDTH, WIDTH, dtype=dtype)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH, dtype=dtype), nn.Linear(2 * WIDTH, WIDTH, dtype=dtype)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        return flash_attention(q, k, v, **self.options)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = self.qkv(self.norms[0](x)).unflatten(-1, (3, HEADS, WIDTH // HEADS))
        o = self.attend(*(t.transpose(1, 2) for t in heads.unbind(2)))
        x = x + self.out(o.transpose(1, 2).flatten(2))
        return x + self.down(torch.nn.functional.gelu(self.up(self.norms[1](x))))


class Standard(Block):
    """The same with the oracle's attention."""

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        return reference.attention(q, k, v, **self.options)


def tokens(length: int = 9, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, length, WIDTH, dtype=torch.float64)


def standard(model: Block) -> Standard:
    """The oracle's model with the parameters of this one."""
    made = Standard(**model.options)
    made.load_state_dict(model.state_dict())
    return made


def step(model: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, parameters: Any) -> list[torch.Tensor]:
    """The output, and the gradients of the sum of its squares at the parameters."""
    out = model(x)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), list(parameters))]


def same(model: Callable[[torch.Tensor], torch.Tensor], of: Block, x: torch.Tensor) -> None:
    """Hold a form of a model to the oracle's, forward and backward."""
    want = standard(of)
    assert_close(step(model, x, of.parameters()), step(want, x, want.parameters()), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_transformer_block_compiles_whole(dynamic: bool) -> None:
    """fullgraph: no graph break; and with dynamic shapes no second compilation for another length or batch."""
    model = Block(causal=True, window=(4, 0))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    same(compiled, model, tokens(9))
    if dynamic:
        with torch._dynamo.config.patch(error_on_recompile=True):
            for length, batch in ((13, 2), (24, 3), (65, 5)):
                same(compiled, model, tokens(length, batch))


def test_a_new_length_would_be_seen_to_compile_again() -> None:
    """What the test above relies on."""
    model = Block()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    compiled(tokens(9))
    with torch._dynamo.config.patch(error_on_recompile=True), pytest.raises(torch._dynamo.exc.RecompileError):
        compiled(tokens(13))


COMPILER = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None, reason="needs a C++ compiler"
)


@pytest.mark.slow
@COMPILER
@pytest.mark.parametrize("dynamic", [False, True])
def test_inductor_keeps_values_and_the_strides_that_ops_expect(dynamic: bool) -> None:
    model = Block(causal=True)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic)
    for length in (9, 13):
        same(compiled, model, tokens(length))


@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_user_functions_work_under_compile(dynamic: bool) -> None:
    """Two of one form with other args share the compiled code; their functions cross by a handle."""
    numbers = torch.linspace(-0.2, 0.3, HEADS).double(), torch.tensor([0.05]).double()
    score_mod = ScoreMod(features.bent_score, features.bent_twin, features.bent_derivative, numbers)
    mask_mod = MaskMod(features.sieve, features.sieve_twin, (torch.tensor([2], dtype=torch.int32),))
    model = Block(score_mod=score_mod, mask_mod=mask_mod)
    torch._dynamo.reset()
    same(torch.compile(model, fullgraph=True, dynamic=dynamic, backend="aot_eager"), model, tokens())


def test_a_user_function_that_is_made_while_compiling_says_what_to_do() -> None:
    def call(q: torch.Tensor) -> Any:
        return flash_attention(q, q, q, mask_mod=MaskMod(None, lambda b, h, i, j, args: i >= j))

    torch._dynamo.reset()
    with pytest.raises(Exception, match="make the mod once outside"):
        torch.compile(call, fullgraph=True, backend="aot_eager")(torch.randn(1, 1, 5, 8))


@pytest.mark.filterwarnings("ignore:.*treespec:FutureWarning")  # torch's own, of run_decompositions
@pytest.mark.parametrize("strict, dynamic", [(False, True), (True, False)])
def test_an_exported_model_has_one_node_for_attention(strict: bool, dynamic: bool) -> None:
    model = Block(causal=True)
    shapes = {"x": {0: torch.export.Dim("batch", max=64), 1: torch.export.Dim("length", max=4096)}} if dynamic else None
    program = torch.export.export(model, (tokens(),), dynamic_shapes=shapes, strict=strict)
    for form in (program, program.run_decompositions()):
        nodes = [str(node.target) for node in form.graph.nodes if "flash" in str(node.target)]
        assert nodes == ["flash.forward.default"]
    x = tokens(23, 3) if dynamic else tokens()
    with torch.no_grad():
        assert_close(program.module()(x), standard(model)(x), rtol=1e-12, atol=1e-12)
    with pytest.raises(RuntimeError, match=r"would be lost.* under torch\.no_grad"):  # its parameters ask for gradients
        program.module()(x)


def test_an_exported_model_is_saved_and_loaded() -> None:
    model, file = Block(causal=True), io.BytesIO()
    torch.export.save(torch.export.export(model, (tokens(),)), file)
    file.seek(0)
    x = tokens()
    with torch.no_grad():
        assert_close(torch.export.load(file).module()(x), standard(model)(x), rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:.*treespec:FutureWarning")
@pytest.mark.slow
@COMPILER
def test_an_aotinductor_package_runs(tmp_path: Path) -> None:
    model = Block(causal=True)
    with torch.no_grad():
        program = torch.export.export(model, (tokens(),))
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        x = tokens()
        assert_close(torch._inductor.aoti_load_package(path)(x), standard(model)(x), rtol=1e-12, atol=1e-12)


def test_per_sample_gradients_by_functional_call() -> None:
    model, x = Block(causal=True), tokens(batch=4)
    parameters = dict(model.named_parameters())

    def loss(parameters: dict[str, torch.Tensor], one: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = torch.func.functional_call(model, parameters, one[None])
        return out.square().sum()

    got = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    want = standard(model)
    for number, one in enumerate(x):
        gradients = step(want, one[None], want.parameters())[1:]
        assert_close([g[number] for g in got.values()], gradients, rtol=1e-11, atol=1e-11)


def test_an_ensemble_by_stacked_parameters() -> None:
    models, x = [Block(alibi_slopes=torch.tensor([0.5, 0.25])) for _ in range(3)], tokens()
    parameters, buffers = torch.func.stack_module_state(models)
    got = torch.vmap(lambda p, b: torch.func.functional_call(models[0], (p, b), x))(parameters, buffers)
    assert_close(got, torch.stack([standard(model)(x) for model in models]), rtol=1e-12, atol=1e-12)


def test_meanflow_trains_parameters_through_the_primal_of_a_jvp() -> None:
    """Geng et al. 2025, arXiv 2505.13447: u = f(x), target = stopgrad(x - t du/dt), loss |u - target|^2."""
    results = []
    x, along = tokens(), tokens()
    model = Block()
    for form in (model, standard(model)):
        u, moved = torch.func.jvp(form, (x,), (along,))
        loss = (u - (x - 0.7 * moved).detach()).square().mean()
        results.append([loss.detach(), *torch.autograd.grad(loss, list(form.parameters()))])
    assert_close(*results, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    "again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_a_copied_or_pickled_module_is_the_same_and_its_own(again: Callable[[Block], Block]) -> None:
    model = Block(causal=True, softcap=5.0)
    same(model, model, tokens())
    other = again(model)
    x = tokens()
    assert torch.equal(other(x), model(x))
    with torch.no_grad():
        other.qkv.weight.zero_()
    assert not torch.equal(other(x), model(x))


def test_a_module_with_a_mod_is_copied_and_refuses_to_be_pickled() -> None:
    model = Block(score_mod=mods.tanh_softcap(3.0))
    x = tokens()
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(model)


def test_eight_threads_at_once_get_what_each_gets_alone() -> None:
    lengths = [5 + 7 * n for n in range(8)]
    models = [Block(causal=n % 2 == 0, softcap=None if n % 3 else 4.0, window=n + 1) for n in range(8)]
    given = [tokens(length) for length in lengths]
    alone = [step(model, x, model.parameters()) for model, x in zip(models, given, strict=True)]
    found: list[list[list[torch.Tensor]]] = [[] for _ in models]
    start = threading.Barrier(len(models))

    def work(number: int) -> None:
        start.wait()
        for _ in range(5):
            found[number].append(step(models[number], given[number], models[number].parameters()))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(models))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for results, want in zip(found, alone, strict=True):
        assert len(results) == 5
        for got in results:
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def work_in_a_child(model: Block, x: torch.Tensor, pipe: Any) -> None:
    pipe.send([t.tolist() for t in step(model, x, model.parameters())])


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_worker_gets_what_its_parent_gets() -> None:
    model, x = Block(causal=True), tokens()
    want = step(model, x, model.parameters())  # before the fork: what torch and we have set up is inherited
    here, there = multiprocessing.get_context("fork").Pipe()
    child = multiprocessing.get_context("fork").Process(target=work_in_a_child, args=(model, x, there))
    child.start()
    assert here.poll(60), "the child hangs"
    got = here.recv()
    child.join(60)
    assert child.exitcode == 0 and got == [t.tolist() for t in want]


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.interpret)])
def test_deterministic_algorithms_are_heeded_and_repeat(deterministic: None, place: Any, backend: str) -> None:
    x = features.call_of(place, ["groups", "bias", "alibi_slopes", "sinks", "dropout_p"])
    assert Problem.of(x.q, x.k, x.v).deterministic and not Problem.of(x.q, x.k, x.v, deterministic=False).deterministic
    first, second = features.run(x, backend), features.run(x, backend)
    found = [(a, b) for a, b in zip(first, second, strict=True) if a is not None and b is not None]
    assert len(found) == 8 and all(torch.equal(a, b) for a, b in found)


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_ddp_leaves_gradients_as_they_are(alone: None) -> None:
    model, x = Block(causal=True), tokens()
    want = standard(model)
    wrapped = nn.parallel.DistributedDataParallel(model)
    wrapped(x).square().sum().backward()
    assert_close([p.grad for p in model.parameters()], step(want, x, want.parameters())[1:], rtol=1e-11, atol=1e-11)


def test_fsdp2_leaves_gradients_as_they_are(alone: None) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.utils.checkpoint import checkpoint

    for recompute in (False, True):
        model, x = nn.Sequential(Block(causal=True), Block(window=(3, 3))), tokens()
        want = nn.Sequential(*(standard(block) for block in model))
        mesh = init_device_mesh("cpu", (1,))
        for block in model:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        out = checkpoint(model, x, use_reentrant=False) if recompute else model(x)
        out.square().sum().backward()
        got = [p.grad.full_tensor() for p in model.parameters()]
        assert_close(got, step(want, x, want.parameters())[1:], rtol=1e-11, atol=1e-11)


def halves(length: int = 128) -> list[torch.Tensor]:
    return [torch.randn(2, 4, length, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]


def train(inputs: list[torch.Tensor], **options: Any) -> list[torch.Tensor]:
    """o and the gradients of its sum."""
    o = flash_attention(*inputs, backend="triton", **options)
    assert isinstance(o, torch.Tensor)
    return [o.detach(), *torch.autograd.grad(o.sum(), inputs)]


@pytest.mark.gpu
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_a_cuda_graph_replays_with_new_inputs_and_fresh_dropout(dropout_p: float) -> None:
    inputs = halves()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            train(inputs, causal=True, dropout_p=dropout_p)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = train(inputs, causal=True, dropout_p=dropout_p)
    replays = []
    for _ in range(2):
        graph.replay()
        replays.append([x.clone() for x in captured])
    assert all(torch.equal(a, b) for a, b in zip(*replays, strict=True)) == (dropout_p == 0.0)
    with torch.no_grad():
        for x in inputs:
            x.copy_(torch.randn_like(x))
    graph.replay()
    if dropout_p == 0.0:
        for got, want in zip(captured, train(inputs, causal=True), strict=True):
            assert torch.equal(got, want)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options", [{}, {"dropout_p": 0.3}, {"causal": True, "window": (9, 0)}, {"q_offset": "tensor"}]
)
def test_a_call_never_waits_for_the_gpu(options: dict[str, Any]) -> None:
    inputs = halves()
    if options.get("q_offset") == "tensor":
        options = {"causal": True, "q_offset": torch.tensor([3, 0], device="cuda")}
    train(inputs, **options)  # compiles, which may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        train(inputs, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_a_call_runs_on_the_current_stream() -> None:
    inputs, side = halves(), torch.cuda.Stream()
    want = train(inputs)
    late = [torch.zeros_like(x, requires_grad=True) for x in inputs]
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)
        with torch.no_grad():
            for x, y in zip(late, inputs, strict=True):
                x.copy_(y)  # what does not run after this, on this stream, reads zeros
        got = train(late)
    side.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_current_device_is_neither_used_nor_changed() -> None:
    inputs = [x.detach().to("cuda:1").requires_grad_() for x in halves()]
    with torch.cuda.device(0):
        got = train(inputs)
        assert torch.cuda.current_device() == 0
    assert all(x.device.index == 1 for x in got)
    with torch.cuda.device(1):
        assert all(torch.equal(a, b) for a, b in zip(got, train(inputs), strict=True))


@pytest.mark.gpu
def test_the_current_device_is_untouched() -> None:
    before = torch.cuda.current_device()
    train(halves(), causal=True)
    assert torch.cuda.current_device() == before
