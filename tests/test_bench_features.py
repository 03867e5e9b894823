"""The bench on features: what each hides, how every peer is told of it, and how its cost is shown."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench import cases as shapes
from bench import check, features, measure, peers, philox, plot, record, report, run
from bench.cases import Case
from bench.measure import Effort, Latency
from bench.peers import FLEX, OURS, PEERS, SDPA, STANDARD
from bench.record import Record, Row
from tests.test_bench import measured, peer

CPU = torch.device("cpu")
SIZED = {"window": 5, "document": 6, "block mask": 7, "varlen": 6}
LABELS = [f"{name} {SIZED[name]}" if name in SIZED else name for name in features.FEATURES]
FAST = run.Settings(CPU, threads=1, effort=Effort(0.0, 0.001, 3), memory=False)


def tiny(feature: str, causal: bool = False, batch: int = 2) -> Case:
    """Grouped heads, an odd length, values wider than keys."""
    return Case("tiny", "made up", batch, 4, 2, 37, 37, 8, 24, causal, "float32", "feature", feature)


def sees(name: str, i: int, j: int, starts: list[int]) -> bool:
    """Whether query i sees key j, said pair by pair."""
    if name == "window":
        return i - SIZED[name] < j <= i
    if name == "padding":
        return j < 27  # three quarters of 37
    if name == "mask":
        return (i + j) % 4 != 3
    if name in ("document", "varlen"):
        return not any(min(i, j) < start <= max(i, j) for start in starts)
    return name != "block mask" or abs(i - j) <= SIZED[name] or j < 128


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("feature", LABELS)
def test_a_feature_hides_the_pairs_that_it_names(feature: str, causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    case, name = tiny(feature, causal), features.find(feature)[0]
    starts = features.document_starts(37, SIZED["document"])
    wanted = [[sees(name, i, j, starts) and (not causal or j <= i) for j in range(37)] for i in range(37)]
    assert torch.equal(shapes.visible(case, range(37), range(37), CPU), torch.tensor(wanted))
    assert torch.equal(shapes.visible(case, range(5, 9), range(3, 20), CPU), torch.tensor(wanted)[5:9, 3:20])
    monkeypatch.setattr(shapes, "ROWS_AT_ONCE", 5)
    shapes.visible_pairs.cache_clear()
    assert shapes.visible_pairs(case) == sum(map(sum, wanted))
    assert shapes.flops(case, "forward") == 2 * 2 * 4 * sum(map(sum, wanted)) * (8 + 24)


def test_documents_are_whole_and_of_the_lengths_that_are_asked_for() -> None:
    starts = features.document_starts(100_000, 2048)
    lengths = [end - start for start, end in zip(starts, starts[1:], strict=False)]
    assert starts[0] == 0 and starts[-1] == 100_000
    assert all(1024 <= length <= 4096 for length in lengths[:-1])
    assert len(set(lengths)) > 10
    assert features.document_starts(100_000, 2048) == starts


def test_an_unknown_feature_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="feature must be one of window, .* got 'magic 3'"):
        features.find("magic 3")


@pytest.mark.parametrize("feature", LABELS)
def test_standard_and_sdpa_and_ours_agree_on_every_feature_and_every_gradient(feature: str) -> None:
    case = tiny(feature)
    made = measured(PEERS[STANDARD], PEERS[OURS], PEERS[SDPA], case=case, settings=FAST)
    absent = {SDPA} if feature in ("softcap", "sinks") else set()
    for key, row in made.rows.items():
        assert row.outcome == ("absent" if row.peer in absent else "ok"), (key, row.reason)
    errors = made.rows["tiny", OURS, "both"].errors
    assert set(errors) == {"o", "dq", "dk", "dv", *({f"d{case.traits.operand}"} if case.traits.learned else ())}


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@pytest.mark.parametrize("feature", [*(label for label in LABELS if label != "dropout"), "causal"])
def test_flex_is_told_the_same_attention(feature: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Uncompiled and forward alone, which is what it has on a CPU."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    case = tiny("" if feature == "causal" else feature, feature == "causal")
    tensors = shapes.inputs(case, CPU, 0)
    expected = check.expect(case, *tensors, backward=False)
    with PEERS[FLEX].prepare(case, CPU) as attention, torch.no_grad():
        (o,) = measure.passes(attention, *tensors)["forward"]()
    verdict = check.compare(case, expected, {"o": o}, FLEX)
    assert verdict.ok, verdict


def test_flex_on_a_cpu_is_absent_where_a_gradient_is_timed() -> None:
    assert "no backward on a CPU" in str(PEERS[FLEX].absent(tiny("window 5"), CPU))
    assert PEERS[FLEX].absent(replace(tiny("window 5"), series="long"), CPU) is None
    assert "dropout" in str(PEERS[FLEX].absent(tiny("dropout"), torch.device("cuda")))
    refused = NotImplementedError("FlexAttention does not support backward on CPU. Please set ..")
    assert "no backward" in str(peers.refusal(refused))


@pytest.mark.parametrize("feature", ["mask", "bias gradient", "key bias gradient", "alibi", "sinks", "dropout"])
def test_the_oracle_in_pieces_is_the_oracle_at_once(feature: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, part = tiny(feature, causal=True), check.Part(1, 1)
    tensors = shapes.inputs(case, CPU, 0)
    found = [compute(case, part, tensors) for compute in (check.oracle, check.standard)]
    monkeypatch.setattr(check, "SCORES_AT_ONCE", 5 * 37 * 2)
    monkeypatch.setattr(check, "STANDARD_AT_ONCE", 7 * 37 * 2)
    for compute, whole, tolerance in ((check.oracle, found[0], 1e-12), (check.standard, found[1], 1e-5)):
        for name, pieces in compute(case, part, tensors).items():
            torch.testing.assert_close(pieces, whole[name], rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("feature", ["window 5", "document 3"])
def test_the_oracle_of_few_keys_is_the_oracle_of_all(feature: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, part = tiny(feature, causal=True), check.Part(1, 1)
    tensors = shapes.inputs(case, CPU, 0)
    monkeypatch.setattr(check, "NARROW_ROWS", 4)
    cut = check.oracle(case, part, tensors)
    assert max(len(piece.cols) for piece in check.pieces(case, 1)) < 37
    monkeypatch.setattr(check, "NARROW", 1000)
    for name, x in check.oracle(case, part, tensors).items():
        torch.testing.assert_close(cut[name], x, rtol=1e-12, atol=1e-12, msg=name)


def test_a_gradient_that_heads_share_is_compared_whole() -> None:
    case = tiny("key bias gradient")

    def without_the_last_head(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        bias = bias.expand(2, 4, 1, 37).clone()
        bias[:, -1] = bias[:, -1].detach()
        return peers.standard_attention(q, k, v, None, bias=bias)

    made = measured(peer("crooked", without_the_last_head), case=case, settings=FAST)
    assert made.rows["tiny", "crooked", "forward"].outcome == "ok"
    row = made.rows["tiny", "crooked", "both"]
    assert row.outcome == "wrong" and "dbias" in row.reason and "dq" not in row.reason


@pytest.mark.parametrize("rate", [0.0, 0.2])
def test_a_wrong_rate_of_dropout_is_caught(rate: float) -> None:
    def dropped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        drop = torch.nn.Dropout(rate)
        return peers.standard_attention(q, k, v, None, drop=drop)

    row = measured(peer("crooked", dropped), case=tiny("dropout"), settings=FAST).rows["tiny", "crooked", "forward"]
    assert row.outcome == "wrong" and "variance of o" in row.reason
    ours = measured(replace(PEERS[STANDARD], name=OURS), case=tiny("dropout"), settings=FAST)
    assert ours.rows["tiny", OURS, "forward"].outcome == "wrong"  # another generator than Philox


@pytest.mark.parametrize(
    ("key", "counter", "word"),
    [(0, (0, 0, 0, 0), 0x6627E8D5), (2**64 - 1, (2**32 - 1,) * 4, 0x408F276D),
     (0x299F31D0A4093822, (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), 0xD16CFE09)],
)  # fmt: skip
def test_philox_gives_the_published_words(key: int, counter: tuple[int, int, int, int], word: int) -> None:
    c0, c1, c2, c3 = (torch.tensor(c) for c in counter)
    assert int(philox.first_word(key, (c0, c1, c2, c3))) == word


def test_long_sequences_on_a_cpu_are_timed_forward_and_standard_attention_ends_early() -> None:
    suite = shapes.suite("long", CPU)
    assert {shapes.passes_of(case, CPU) for case in suite} == {("forward",)}
    assert max(case.seqlen_k for case in suite) == 16384
    assert max(case.seqlen_k for case in shapes.suite("long", torch.device("cuda"))) >= 2**17
    assert run.too_long(suite[-1], STANDARD) and not run.too_long(suite[-1], OURS)
    row = run.measure(suite[-1], PEERS[STANDARD], (), check.Expected([], ""), FAST)
    assert [(each.what, each.outcome) for each in row] == [("forward", "skipped")]


def test_a_mask_that_stands_for_a_feature_weighs() -> None:
    case = replace(tiny("mask"), batch=1, heads=1, heads_k=1, seqlen_q=4096, seqlen_k=4096, head_dim_v=8)
    peak = measure.cpu_peak_in_child(case, OURS, "forward", threads=1, seed=0)
    assert peak > 0.9 * 4096**2


def test_a_peak_of_an_earlier_run_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def fresh(case: Case, peer: str, what: str) -> Row:
        return Row(case.name, peer, what, peak_bytes=9, peak_outcome="ok")

    case = tiny("window")
    made = Record(record.machine(CPU, 1), {}, {}, {}, {})
    made.add([Row(case.name, OURS, "forward", peak_bytes=7, peak_outcome="ok")])
    made.add([Row(case.name, SDPA, "forward", peak_outcome="skipped")])
    monkeypatch.setattr(run, "weigh_in_child", lambda case, peer, what, _: fresh(case, peer, what))
    run.weigh_all(made, [case], [OURS, SDPA], FAST, lambda text: None)
    peaks = {(peer, what): row.peak_bytes for (_, peer, what), row in made.rows.items()}
    assert peaks == {(OURS, "forward"): 7, (OURS, "both"): 9, (SDPA, "forward"): 9, (SDPA, "both"): 9}


def invented(cost: float) -> Record:
    """Every feature at `cost` times plain, the bias gradient at twice the bias, SDPA out of memory where it is long."""
    made = Record(record.machine(CPU, 1), run.described(run.parse([]), FAST), {}, {}, {})
    for case in shapes.suite("features", CPU) + shapes.suite("long", CPU):
        made.cases[case.name] = case
        for name in (STANDARD, OURS, SDPA):
            for what in shapes.passes_of(case, CPU):
                ms = (cost if case.label != "plain" else 1.0) * (2 if case.label.endswith("gradient") else 1)
                row = Row(case.name, name, what, "ok", latency=Latency(ms, 0.9 * ms, 1.2 * ms, 5), tflops=1.0)
                if case.series == "long":
                    row = replace(row, peak_bytes=100 * case.seqlen_k, peak_outcome="ok")
                if name == SDPA and case.seqlen_k > 8192:
                    row = Row(case.name, name, what, "oom", "no room", peak_outcome="oom", peak_reason="no room")
                made.add([row])
    record.compare_peers(made)
    return made


def test_cost_is_over_the_plain_call_of_the_same_peer_and_the_bias_gradient_has_its_rows() -> None:
    text = report.report(invented(3.0))
    lines = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("| ")}
    assert lines["softcap"].count("3 ±15% 3.00x") == 3
    assert lines["plain"].count("1 ±15% 1.00x") == 3
    assert "| 2.00x |" in lines["[batch, 1, 1, seqlen_k], head_dim 64"]
    assert "| 2.00x |" in lines["[1, heads, seqlen_q, seqlen_k], head_dim 64"]
    assert lines["16384"].count("OOM") == 2 and "1.6" in lines["16384"]
    assert "Figures to reach" not in text


def test_features_and_long_sequences_are_drawn_with_what_is_missing(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pictures need the bench extra")
    made = invented(3.0)
    assert {path.name for path in plot.draw(made, tmp_path)} == {"features.png", "long-context.png"}
    _, panels = plot.figure(1, 2, 4, 3)
    plot.feature_bars(panels[0][0], made, report.shapes_of(made, "feature")[0], "both")
    assert [text.get_text() for text in panels[0][0].texts].count(" 3.00x") > 20
    plot.lost_lengths(panels[0][1], made, report.long_curves(made)[0], "forward", memory=True)
    assert any("OOM:\n" in text.get_text() and "\nsdpa" in text.get_text() for text in panels[0][1].texts)


def test_a_small_run_of_features_has_files_of_its_own(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pictures need the bench extra")
    pytest.importorskip("tqdm", reason="the progress bar needs the bench extra")
    (tmp_path / "results.json").write_text("kept")
    arguments = ["--quick", "--device", "cpu", "--threads", "1", "--no-memory", "--out", str(tmp_path)]
    chosen = ["--cases", "plain", "key bias", "length 64", "--peers", STANDARD, OURS, SDPA]
    for suite in run.FEATURE_SUITES:
        assert run.main([*arguments, "--suite", suite, *chosen]) == 0
        rows = json.loads((tmp_path / f"{suite}.json").read_text())["rows"]
        assert {row["outcome"] for row in rows} == {"ok"}
        assert (tmp_path / f"{suite}.md").exists()
    assert {path.name for path in tmp_path.glob("*.png")} == {"features.png", "long-context.png"}
    assert (tmp_path / "results.json").read_text() == "kept"
    assert record.load(tmp_path / "features.json").cases["d16 key bias"].feature == "key bias"


def test_results_from_before_features_can_still_be_read() -> None:
    for path in Path(run.RESULTS).glob("*/results.json"):
        assert all(not case.feature for case in record.load(path).cases.values())
