"""The decode suite: its grid, the bytes it counts, the gate, what becomes of peers, resuming, text and pictures."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import bandwidth, decode, decode_peers, decode_plot, decode_report, measure, plot, record, run
from bench import cases as shapes
from bench.cases import DECODE_CACHES, Case
from bench.decode import Operands
from bench.measure import Effort, Latency
from bench.peers import FLEX, OURS, SDPA, Attention, Peer
from bench.record import Record, Row
from bench.trial import Settings
from flash import reference_cache

CPU, GPU = torch.device("cpu"), torch.device("cuda")
SMALL = Case("small", "made up", 3, 4, 2, 1, 37, 16, 24, True, "float32", "decode", cache="dense")
FAST = Settings(CPU, threads=1, effort=Effort(0.0, 0.001, 3), memory=False)
KINDS = pytest.mark.parametrize("cache", DECODE_CACHES)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A few copies of a few kilobytes, and the threads of other tests as they were."""
    monkeypatch.setitem(bandwidth.APART, "cpu", 2**16)
    monkeypatch.setitem(bandwidth.COPIED, "cpu", 2**16)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def right(x: Operands) -> Tensor:
    """Attention by another way than the bench's own indexing: page by page."""
    keys: list[Tensor] = []
    values: list[Tensor] = []
    for b, length in enumerate(x.cache_seqlens.tolist()):
        for into, cache, scale in ((keys, x.k_cache, x.k_scale), (values, x.v_cache, x.v_scale)):
            pages = [cache[b]] if x.block_table is None else [cache[page] for page in x.block_table[b].tolist()]
            whole = torch.cat(pages, 1)[:, :length].to(x.q.dtype)
            into.append(whole if scale is None else whole * scale[:, None, None])
    return F.scaled_dot_product_attention(x.q, torch.stack(keys), torch.stack(values), enable_gqa=True)


def peer(name: str, attention: Attention | Exception, absent: str | None = None) -> Peer:
    """A peer that computes attention, or raises it when called."""

    @contextmanager
    def prepare(case: Case, device: torch.device) -> Iterator[Attention]:
        def call(x: Any) -> Tensor:
            if isinstance(attention, Exception):
                raise attention
            return attention(x)

        yield call

    return Peer(name, "made up", lambda case, device: absent, prepare)


def made(*cases: Case, device: str = "cpu") -> Record:
    """A record without rows."""
    machine = record.machine(CPU, 1) | {"device": device, "gpu": "Imaginary 9000"}
    settings = replace(FAST, device=torch.device(device))
    described = run.described(run.parse(["--suite", "decode", "--device", device]), settings)
    return Record(machine, described, {case.name: case for case in cases}, {}, {})


def timed(*peers: Peer, case: Case = SMALL, settings: Settings = FAST, tmp_path: Path) -> Record:
    """A record of one case and some peers."""
    found = made()
    decode.time_all(
        found, [case], peers, settings, lambda text: None, lambda case: found.save(tmp_path / "decode.json")
    )
    return found


def took(case: Case, peer: str, milliseconds: float) -> Row:
    latency = Latency(milliseconds, 0.9 * milliseconds, 1.1 * milliseconds, 10)
    return Row(case.name, peer, "forward", "ok", latency=latency, tflops=1.0)


def copied(gbps: float) -> dict[str, Any]:
    return {"gbps": gbps, "low": gbps, "high": gbps, "bytes": 2**31, "date": "a day", "clocks": {"absent": "none"}}


def test_the_grid_has_every_combination_once_and_what_matters_most_first() -> None:
    suite = shapes.suite("decode", GPU)
    combinations = {(c.batch, c.seqlen_k, c.group, c.cache) for c in suite}
    assert len(suite) == len(combinations) == len({c.name for c in suite}) == 4 * 5 * 3 * 4
    assert {c.batch for c in suite} == {1, 4, 16, 64} and {c.group for c in suite} == {1, 4, 8}
    assert {c.seqlen_k for c in suite} == {4096, 16384, 32768, 65536, 131072}
    assert {(c.seqlen_q, c.head_dim, c.dtype) for c in suite} == {(1, 128, "bfloat16")}
    assert {c.cache for c in suite[:20]} == {"dense"} and {c.group for c in suite[:20]} == {4}
    assert suite[0].name == "b16 k32768 gqa4 dense" and {c.batch for c in suite[:3]} == {1, 16}
    assert all(len(c.source) > 20 and shapes.passes_of(c, GPU) == ("forward",) for c in suite)
    small = shapes.suite("decode", CPU)
    assert {c.dtype for c in small} == {"float32"} and {c.cache for c in small} == set(DECODE_CACHES)
    assert max(map(decode.cache_bytes, small)) < 2**28 and len(small) == 72


def test_bytes_are_those_of_the_keys_and_values_and_the_same_for_every_group() -> None:
    found = {c.name: decode.cache_bytes(c) for c in shapes.suite("decode", GPU)}
    for group in (1, 4, 8):
        assert found[f"b16 k4096 gqa{group} dense"] == 2 * 2 * 16 * 4096 * 8 * 128
        assert found[f"b16 k4096 gqa{group} paged 16"] == found[f"b16 k4096 gqa{group} dense"]
        assert 2 * found[f"b16 k4096 gqa{group} fp8"] == found[f"b16 k4096 gqa{group} dense"]
    assert decode.cache_bytes(SMALL) == 4 * 3 * 2 * 37 * (16 + 24)


def test_rates_and_shares_are_bytes_over_time_over_the_copys_rate() -> None:
    case = replace(SMALL, batch=1, heads=2, seqlen_k=5**6, head_dim=16, head_dim_v=16)  # 4 MB
    found = made(case)
    found.add([took(case, OURS, 2.0), took(case, SDPA, 4.0)])
    assert decode.cache_bytes(case) == 4_000_000
    assert decode_report.share(found, case, OURS) is None
    found.speed["copies"] = [copied(4.0), copied(1.0)]  # the best of a run and those it resumed
    assert decode.gigabytes_per_second(case, found.rows[case.name, OURS, "forward"]) == pytest.approx(2.0)
    assert decode_report.share(found, case, OURS) == pytest.approx(0.5)
    assert decode_report.best_peer(found, case) == (SDPA, 2.0)
    decode_report.finish(found)
    (standing,) = found.speed["decode"]
    assert standing["bytes"] == 4_000_000 and standing["over_best"] == 2.0
    assert standing["peers"][OURS] == pytest.approx({"microseconds": 2000.0, "gbps": 2.0, "of_copy": 0.5})
    text = decode_report.report(found)
    assert "2000 ±10% 2 50%" in text and "4000 ±10% 1 25%" in text and "2.00x" in text


def test_a_copy_counts_what_it_reads_and_what_it_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandwidth, "latency", lambda *_: Latency(2.0, 1.0, 4.0, 5))
    found = bandwidth.copy(CPU, 1_000_000)
    assert (found["gbps"], found["low"], found["high"]) == pytest.approx((1.0, 0.5, 2.0))
    assert found["bytes"] == 1_000_000 and "absent" in found["clocks"]


@KINDS
def test_operands_are_what_the_oracle_of_decoding_reads(cache: str) -> None:
    case = replace(SMALL, cache=cache)
    held = decode.operands(case, CPU, 0)[0]
    assert held.k_cache.dtype == (torch.float8_e4m3fn if cache == "fp8" else torch.float32)
    assert (held.block_table is not None) == cache.startswith("paged")
    keywords = {name: x for name, x in vars(held).items() if name not in ("q", "k_cache", "v_cache")}
    oracle = reference_cache.decode(held.q, held.k_cache, held.v_cache, **keywords).o
    wanted = decode.reference(case, held).expected
    for part in wanted.slices:
        heads = slice(part.part.head_k * case.group, (part.part.head_k + 1) * case.group)
        torch.testing.assert_close(part.expected["o"][0], oracle[part.part.batch, heads], rtol=1e-12, atol=1e-12)
    assert len(wanted.slices) == case.batch * case.heads_k and "every sequence" in wanted.extent


@KINDS
def test_copies_hold_the_same_at_addresses_of_their_own(cache: str) -> None:
    case = replace(SMALL, cache=cache)
    held = decode.operands(case, CPU, 0)
    assert 2 <= len(held) == bandwidth.copies(decode.cache_bytes(case), CPU)
    assert len(held) * decode.cache_bytes(case) >= bandwidth.APART["cpu"]
    read = set()
    for each in held:
        torch.testing.assert_close(right(each), right(held[0]), rtol=0, atol=0)
        pages = [0] if each.block_table is None else each.block_table.flatten().tolist()
        read |= {(each.k_cache.data_ptr(), page) for page in pages}
    assert len(read) == sum(1 if x.block_table is None else x.block_table.numel() for x in held)


def test_calls_take_their_turns() -> None:
    seen: list[int] = []
    call = bandwidth.in_turn([lambda n=n: seen.append(n) for n in range(3)])  # type: ignore[misc]
    for _ in range(7):
        call()
    assert seen == [0, 1, 2, 0, 1, 2, 0]


def test_on_a_gpu_times_are_those_of_replayed_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def do_bench_cudagraph(call: Any, **told: Any) -> list[float]:
        asked.update(told)
        return [call() for _ in range(5)]

    monkeypatch.setattr("triton.testing.do_bench_cudagraph", do_bench_cudagraph)
    times = iter((3.0, 1.0, 2.0, 5.0, 4.0))
    found = bandwidth.replayed(lambda: next(times), GPU, FAST.effort)
    assert (found.median, found.samples, asked["return_mode"]) == (3.0, 5, "all")
    assert found.p20 < found.median < found.p80
    assert "do_bench_cudagraph" in made(device="cuda").settings["timer"]


@KINDS
def test_a_right_peer_is_checked_then_timed(cache: str, tmp_path: Path) -> None:
    case = replace(SMALL, cache=cache)
    found = timed(peer(OURS, right), case=case, tmp_path=tmp_path)
    row = found.rows["small", OURS, "forward"]
    assert (row.outcome, row.reason) == ("ok", "") and row.latency is not None and row.latency.samples >= 3
    assert row.errors["o"] <= row.bounds["o"] and "every sequence" in found.checked["small"]
    assert len(found.speed["copies"]) == 1 and record.load(tmp_path / "decode.json") == found


def without_scales(x: Operands) -> Tensor:
    return right(replace(x, k_scale=None, v_scale=None))


def one_key_less(x: Operands) -> Tensor:
    return right(replace(x, cache_seqlens=x.cache_seqlens - 1))


def other_page(x: Operands) -> Tensor:
    assert x.block_table is not None
    return right(replace(x, block_table=x.block_table.flip(1)))


def one_nan(x: Operands) -> Tensor:
    return right(x).index_fill(0, torch.tensor([1]), float("nan"))


@pytest.mark.parametrize(
    ("wrong", "cache", "batch"),
    [
        (without_scales, "fp8", 3),
        (one_key_less, "dense", 3),
        (other_page, "paged 16", 3),
        (one_nan, "dense", 8),  # in a sequence that is not compared
    ],
)
def test_a_wrong_peer_is_caught_and_not_timed(wrong: Attention, cache: str, batch: int, tmp_path: Path) -> None:
    case = replace(SMALL, cache=cache, batch=batch)
    found = timed(peer(OURS, wrong), peer(SDPA, right), case=case, tmp_path=tmp_path)
    row = found.rows["small", OURS, "forward"]
    assert row.outcome == "wrong" and row.latency is None and "o " in row.reason
    assert found.rows["small", SDPA, "forward"].outcome == "ok"
    assert "WRONG" in decode_report.report(found)
    assert ("sequences 0, 2, 4, 7" in found.checked["small"]) == (batch == 8)


def test_whatever_becomes_of_a_peer_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    oom = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8 GiB")
    found = timed(
        peer(OURS, right), peer(SDPA, oom), peer(FLEX, ValueError("no capture")),
        peer("flash-attn-2", right, absent="not installed"), tmp_path=tmp_path,
    )  # fmt: skip
    outcomes = {row.peer: row.outcome for row in found.rows.values()}
    assert outcomes == {OURS: "ok", SDPA: "oom", FLEX: "error", "flash-attn-2": "absent"}
    assert "no capture" in decode_report.report(found) and "not installed" in decode_report.report(found)
    late = timed(peer(OURS, right), settings=replace(FAST, deadline=0.0), tmp_path=tmp_path)
    assert late.rows["small", OURS, "forward"].outcome == "skipped"
    monkeypatch.setattr(measure, "available_memory", lambda: 10_000)
    large = timed(peer(OURS, right), peer(SDPA, right, absent="no"), tmp_path=tmp_path)
    assert large.rows["small", OURS, "forward"].outcome == "oom"
    assert "not started" in large.rows["small", OURS, "forward"].reason
    assert large.rows["small", SDPA, "forward"].outcome == "absent"


def test_memory_that_ends_while_operands_are_made_is_written_down_and_nothing_else_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(error: Exception) -> Any:
        def operands(*_: Any) -> list[Operands]:
            raise error

        return operands

    monkeypatch.setattr(decode, "operands", failing(torch.OutOfMemoryError("CUDA out of memory")))
    row = timed(peer(OURS, right), tmp_path=tmp_path).rows["small", OURS, "forward"]
    assert (row.outcome, row.reason) == ("oom", "making it: CUDA out of memory")
    monkeypatch.setattr(decode, "operands", failing(ValueError("the bench is wrong")))
    with pytest.raises(ValueError, match="the bench is wrong"):
        timed(peer(OURS, right), tmp_path=tmp_path)


def test_peers_that_cannot_read_a_cache_say_why() -> None:
    paged, fp8 = replace(SMALL, cache="paged 16"), replace(SMALL, cache="fp8")
    peers = decode_peers.PEERS
    assert peers[OURS].absent(paged, CPU) is None and peers[SDPA].absent(SMALL, CPU) is None
    for case in (paged, fp8):
        assert "dense" in (peers[SDPA].absent(case, CPU) or "") and "dense" in (peers[FLEX].absent(case, GPU) or "")
    assert "GPU" in (peers[FLEX].absent(SMALL, CPU) or "") and peers[FLEX].absent(SMALL, GPU) is None
    for name in ("flash-attn-2", "flash-attn-3", "flash-attn-4"):
        assert "CUDA only" in (peers[name].absent(SMALL, CPU) or "")
        assert peers[name].what.endswith(".flash_attn_with_kvcache")


def test_a_package_with_a_kvcache_function_is_called_in_its_own_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    def kvcache(q: Tensor, k: Tensor, v: Tensor, *, cache_seqlens: Tensor, causal: bool, **table: Tensor) -> Tensor:
        assert q.shape == (3, 1, 4, 16) and causal and set(table) <= {"block_table"}
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return right(Operands(q, k, v, cache_seqlens, **table)).transpose(1, 2)

    module = SimpleNamespace(flash_attn_with_kvcache=kvcache, __spec__=SimpleNamespace(name="flash_attn"))
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    theirs = decode_peers.PEERS["flash-attn-2"]
    for cache in ("dense", "paged 256"):
        case = replace(SMALL, cache=cache)
        assert theirs.absent(case, GPU) is None
        with theirs.prepare(case, CPU) as attention:
            held = decode.operands(case, CPU, 0)[0]
            torch.testing.assert_close(attention(held), right(held))
    assert "multiple of 256" in (theirs.absent(replace(SMALL, cache="paged 16"), GPU) or "")
    assert "float8" in (theirs.absent(replace(SMALL, cache="fp8"), GPU) or "")
    del module.flash_attn_with_kvcache
    assert theirs.absent(SMALL, GPU) == "flash_attn has no flash_attn_with_kvcache"

    def broken(name: str) -> None:
        raise OSError("undefined symbol")

    monkeypatch.setattr(decode_peers, "import_module", broken)
    assert theirs.absent(SMALL, GPU) == "flash_attn is not importable: OSError: undefined symbol"


def imagined() -> Record:
    """A whole GPU run: ours at 95% of a copy but for one case, FlexAttention half as fast, one case out of memory."""
    found = made(*shapes.suite("decode", GPU), device="cuda")
    found.speed["copies"] = [copied(4000.0)]
    for case in found.cases.values():
        fastest = decode.cache_bytes(case) / 4000.0 / 1e6
        slow = case.name == "b1 k4096 gqa4 dense"
        found.add([took(case, OURS, fastest / (0.6 if slow else 0.95))])
        if case.cache == "dense":
            outcome = "oom" if case.seqlen_k == 131072 and case.batch == 64 else "ok"
            theirs = took(case, FLEX, fastest / 0.475)
            found.add([theirs if outcome == "ok" else Row(case.name, FLEX, "forward", outcome, "out of memory")])
    return found


def test_figures_to_reach_name_the_worst_case_and_are_none_on_a_cpu() -> None:
    found = imagined()
    figures = {figure.name: figure for figure in decode_report.figures(found)}
    dense = figures["lowest share of a copy's rate, dense"]
    assert dense.reached == pytest.approx(0.6) and not dense.met
    assert dense.note == "b1 k4096 gqa4 dense; 59 of 60 reach it"
    assert figures["lowest share of a copy's rate, paged 16"].met
    assert figures["least times as fast as flex"].reached == pytest.approx(0.6 / 0.475)
    assert figures["least times as fast as flash-attn-2"].reached is None
    text = decode_report.report(found)
    assert "MISSED" in text and "not measured" in text and "OOM" in text and "No GPU speed" not in text
    cpu = made(SMALL)
    cpu.add([took(SMALL, OURS, 1.0)])
    assert decode_report.figures(cpu) == [] and "No GPU speed is measured here" in decode_report.report(cpu)


def test_pictures_have_a_line_for_each_peer_and_cache_and_name_the_machine(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pictures need the bench extra")
    found = imagined()
    assert decode_plot.draw(made(SMALL), tmp_path) == []
    pictures = decode_plot.draw(found, tmp_path)
    assert [path.name for path in pictures] == ["decode-bandwidth.png", "decode-latency.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)
    _, ((axes,),) = plot.figure(1, 1, 4, 3)
    panel = decode_plot.curves(found)[64, 4]
    decode_plot.lines(axes, found, panel, decode_plot.percent)
    lines = {line.get_label(): line for line in axes.lines}
    assert set(lines) == {"flex", "flash (this library)", *(f"flash (this library), {x}" for x in DECODE_CACHES[1:])}
    assert list(lines["flash (this library)"].get_ydata()) == pytest.approx([95.0] * 5)
    assert list(lines["flex"].get_xdata()) == [4096, 16384, 32768, 65536]
    assert [text.get_text() for text in axes.texts if text.get_text()] == ["flex, dense: OOM at 128k"]
    assert len({decode_plot.STYLES[cache] for cache in DECODE_CACHES}) == len(DECODE_CACHES)


def test_the_aim_is_drawn_on_a_gpu_alone() -> None:
    pytest.importorskip("matplotlib", reason="pictures need the bench extra")
    for aim, top in ((True, 110.0), (False, 44.0)):
        _, ((axes,),) = plot.figure(1, 1, 4, 3)
        decode_plot.share_axis(axes, [10.0, 40.0], aim)
        assert [list(line.get_ydata()) for line in axes.lines] == [[90.0, 90.0]] * aim
        assert axes.get_ylim() == pytest.approx((0.0, top))


def test_the_smallest_case_runs_from_the_command_line_to_pictures_and_resumes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib", reason="pictures need the bench extra")
    pytest.importorskip("tqdm", reason="the progress bar needs the bench extra")
    arguments = ["--suite", "decode", "--quick", "--device", "cpu", "--threads", "1", "--out", str(tmp_path)]
    arguments += ["--cases", "b2 k64 gqa4"]
    assert run.main([*arguments, "--peers", "standard"]) == 2
    assert run.main([*arguments, "--peers", OURS]) == 0
    content = json.loads((tmp_path / "decode.json").read_text())
    assert {row["outcome"] for row in content["rows"]} == {"ok"} and len(content["rows"]) == 4
    assert {case["cache"] for case in content["cases"]} == set(DECODE_CACHES)
    assert {"copies", "decode"} == set(content["speed"])
    assert all(each["peers"][OURS]["of_copy"] > 0 for each in content["speed"]["decode"])
    assert (tmp_path / "decode.md").read_text() in capsys.readouterr().out
    assert {path.name for path in tmp_path.glob("*.png")} == {"decode-bandwidth.png", "decode-latency.png"}

    assert run.main([*arguments, "--resume"]) == 0
    again = json.loads((tmp_path / "decode.json").read_text())
    assert [row["latency"] for row in again["rows"] if row["peer"] == OURS] == [
        row["latency"] for row in content["rows"]
    ]
    assert {row["outcome"] for row in again["rows"] if row["peer"] == SDPA} == {"ok", "absent"}
    assert len(again["rows"]) == 4 * len(decode_peers.PEERS) and len(again["speed"]["copies"]) == 2

    drawn = (tmp_path / "decode.md").read_text()
    (tmp_path / "decode.md").unlink()
    decode_report.main([str(tmp_path / "decode.json")])
    assert (tmp_path / "decode.md").read_text() == drawn


def test_a_wrong_result_of_ours_fails_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="pictures need the bench extra")
    pytest.importorskip("tqdm", reason="the progress bar needs the bench extra")
    monkeypatch.setitem(decode_peers.PEERS, OURS, peer(OURS, one_key_less))
    arguments = ["--suite", "decode", "--quick", "--device", "cpu", "--threads", "1", "--out", str(tmp_path)]
    assert run.main([*arguments, "--cases", "b2 k64 gqa1 dense", "--peers", OURS]) == 1
    assert json.loads((tmp_path / "decode.json").read_text())["rows"][0]["outcome"] == "wrong"
