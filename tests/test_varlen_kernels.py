"""Packed sequences: equal to one call a sequence, whatever their lengths, and unharmed by lengths that lie."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flash.attention import flash_attention
from tests import features
from tests.bounds import Inputs, Outputs, check
from tests.calls import Place
from tests.features import Sizes

BOTH = pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.interpret)])
OUTPUTS_Q, OUTPUTS_K = ("o", "dq"), ("dk", "dv")
TILE = 16  # with the tiles below, a length from each side of every border
EDGES = (0, 1, TILE - 1, TILE, TILE + 1)
STARTS_OF = ("cu_seqlens_q", "cu_seqlens_k")
SMALL = {name: features.Config(TILE, TILE, 4, 1) for name in ("forward", "dkdv", "dq")}


def mixes() -> list[tuple[tuple[int, int], ...]]:
    """Four sequences a call: every length meets every length, in every place."""
    pairs = list(itertools.product(EDGES, EDGES))
    found = [tuple(pairs[(start + step * i) % len(pairs)] for i in range(4)) for start in range(25) for step in (7,)]
    return [*found, ((0, 0),) * 4, ((0, 0), (17, 17), (0, 0), (0, 0)), ((17, 0), (0, 17), (17, 0), (0, 17))]


@pytest.mark.sampled(6)
@BOTH
@pytest.mark.parametrize("lengths", mixes(), ids=str)
def test_zero_lengths_in_any_place(place: Place, backend: str, lengths: tuple[tuple[int, int], ...]) -> None:
    causal = ["causal"] if sum(lengths[0]) % 2 else []
    x = features.call_of(place, ["packed", *causal], Sizes(heads=1, heads_k=1, lengths=lengths))
    got = features.run(x, backend, SMALL)
    check(got, x)
    ends = torch.tensor(lengths).cumsum(0)
    for (n, m), (end_q, end_k) in zip(lengths, ends.tolist(), strict=True):
        if m == 0:
            assert (got.o[end_q - n : end_q] == 0).all() and (got.lse[:, end_q - n : end_q] == float("-inf")).all()
        if n == 0:
            assert got.dk is not None and (got.dk[end_k - m : end_k] == 0).all()


@pytest.mark.sampled(12)
@BOTH
@pytest.mark.parametrize(
    "names", [[name] for name in features.FEATURES] + [["causal", "window", "bias", "groups"]], ids=str
)
def test_packed_sequences_equal_one_call_each(place: Place, backend: str, names: list[str]) -> None:
    if names in (["dropout_p"], ["block_mask"]):
        return  # one call each has other indices: held to the oracle in test_pairs
    lengths = ((20, 33), (0, 5), (17, 17), (9, 0), (40, 8))
    x = features.call_of(place, ["packed", *names], Sizes(lengths=lengths))
    got = features.run(x, backend, SMALL)
    call = features.attention(backend, SMALL)
    row = col = 0
    for b, (n, m) in enumerate(lengths):
        alone = {}
        for name, value in x.options.items():
            if name in ("mask", "bias"):
                value = value[b : b + 1] if value.shape[0] > 1 else value
                value = value[:, :, : n if value.shape[2] > 1 else 1, : m if value.shape[3] > 1 else 1]
            if name == "q_offset" or name == "alibi_slopes":
                value = value[b : b + 1]
            if "seqlen" not in name:
                alone[name] = value
        if names in (["mask_mod"], ["score_mod"]):  # these read the index of the sequence: it is 0 in a call alone
            break
        q, k, v = (t[s : s + c].transpose(0, 1)[None] for t, s, c in ((x.q, row, n), (x.k, col, m), (x.v, col, m)))
        o, lse = call(q, k, v, **alone)
        assert torch.allclose(got.o[row : row + n].transpose(0, 1), o[0], rtol=1e-12, atol=1e-13), b
        assert torch.allclose(got.lse[:, row : row + n], lse[0], rtol=1e-12, atol=1e-13), b
        row, col = row + n, col + m
    check(got, features.known(x))


@BOTH
def test_a_function_sees_the_indices_of_the_sequence(place: Place, backend: str) -> None:
    x = features.call_of(place, ["packed", "score_mod", "mask_mod"], Sizes(lengths=((20, 20), (5, 9), (18, 18))))
    check(features.run(x, backend, SMALL), x)


@pytest.mark.sampled(3, all=True)
@BOTH
@pytest.mark.parametrize("extra", [1, 20])
def test_rows_of_no_sequence_are_zero(place: Place, backend: str, extra: int) -> None:
    x = features.call_of(place, ["packed", "causal"], Sizes(lengths=((7, 9), (20, 18))))
    want = features.run(x, backend, SMALL)
    longer = [
        torch.cat([t, torch.full_like(t[:1], float("nan")).expand(extra, -1, -1)]) for t in x[:4] if t is not None
    ]
    assert x.dlse is not None
    dlse = torch.cat([x.dlse, x.dlse.new_full((x.dlse.shape[0], extra), 3.0)], 1)
    got = features.run(Inputs(*longer, dlse, x.options), backend, SMALL)
    for name in ("o", "dq", "dk", "dv"):
        a, b = getattr(got, name), getattr(want, name)
        assert torch.equal(a[: b.shape[0]], b) and (a[b.shape[0] :] == 0).all(), name
    assert torch.equal(got.lse[:, :27], want.lse) and (got.lse[:, 27:] == float("-inf")).all()


@BOTH
@pytest.mark.sampled(3)
@pytest.mark.parametrize("lengths", [((33, 33),), ((1, 1),), ((70, 20), (20, 70))], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_errors_are_those_of_standard_attention(
    place: Place, backend: str, lengths: tuple[tuple[int, int], ...], dtype: torch.dtype
) -> None:
    x = features.call_of(place, ["packed", "causal", "groups"], Sizes(lengths=lengths, head_dim=40), dtype)
    check(features.run(x, backend), x)


@pytest.mark.sampled(3, all=True)
@BOTH
@pytest.mark.parametrize("longest", [0, 1, 5, 10**6])
def test_the_longest_length_is_not_trusted(place: Place, backend: str, longest: int) -> None:
    x = features.call_of(place, ["packed", "causal"], Sizes(lengths=((20, 33), (40, 17))))
    want = features.run(x, backend, SMALL)
    x.options.update(max_seqlen_q=longest, max_seqlen_k=longest)
    got = features.run(x, backend, SMALL)
    assert all(a is None or torch.equal(a, b) for a, b in zip(got, want, strict=True))


@BOTH
def test_a_neighbour_never_shows(place: Place, backend: str) -> None:
    lengths = ((20, 33), (17, 9), (9, 40))
    x = features.call_of(place, ["packed"], Sizes(lengths=lengths))
    want = features.run(x, backend, SMALL)
    for t, begin, end in ((x.q, 20, 37), (x.k, 33, 42), (x.v, 33, 42)):
        t[begin:end] = float("nan")
    got = features.run(x, backend, SMALL)
    for name in ("o", "dq", "dk", "dv"):
        begin, end = (20, 37) if name in OUTPUTS_Q else (33, 42)
        a, b = getattr(got, name), getattr(want, name)
        assert torch.equal(a[:begin], b[:begin]) and torch.equal(a[end:], b[end:]), name
    assert torch.equal(got.lse[:, :20], want.lse[:, :20]) and torch.equal(got.lse[:, 37:], want.lse[:, 37:])
    assert got.o[20:37].isnan().all()


def clean_of(x: Inputs) -> tuple[Inputs, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A call with lengths that do not lie but the same owners; which rows of q and k are bad, which are nobody's."""
    bad, owner, starts = [], [], {}
    batch = x.options["cu_seqlens_q"].numel() - 1
    for side, total in (("q", x.q.shape[0]), ("k", x.k.shape[0])):
        raw = x.options[f"cu_seqlens_{side}"].cpu().long()
        held = raw.cummax(0).values.clamp(0, total)
        lies = raw != held
        bad.append(lies[:-1] | lies[1:])
        starts[side] = held
    wrong = bad[0] | bad[1]
    for side, total in (("q", x.q.shape[0]), ("k", x.k.shape[0])):
        of = torch.full((total,), -1)
        for b in range(batch):
            of[int(starts[side][b]) : int(starts[side][b + 1])] = b
        owner.append(of)
    device, dtype = x.q.device, torch.int32
    options = x.options | {f"cu_seqlens_{side}": starts[side].to(device, dtype) for side in "qk"}
    rows, cols = ((of >= 0) & wrong[of.clamp(min=0)] for of in owner)
    return (
        x._replace(options=options),
        rows.to(device),
        cols.to(device),
        (owner[0] < 0).to(device),
        (owner[1] < 0).to(device),
    )


def starts_of(place: Place, cu_q: list[int], cu_k: list[int]) -> dict[str, torch.Tensor]:
    """The keywords that say where sequences start."""
    return {name: place(torch.tensor(cu, dtype=torch.int32)) for name, cu in zip(STARTS_OF, (cu_q, cu_k), strict=True)}


def hold_hostile(x: Inputs, backend: str) -> None:
    """Bad sequences are NaN in every output, rows of none are zero, and all others have the bits of a clean call."""
    clean, bad_q, bad_k, none_q, none_k = clean_of(x)
    got, want = features.run(x, backend, SMALL), features.run(clean, backend, SMALL)

    def hold(
        name: str, a: torch.Tensor, b: torch.Tensor, bad: torch.Tensor, none: torch.Tensor, nothing: float
    ) -> None:
        assert a[bad].isnan().all(), f"{name}: a bad row is no NaN"
        assert (a[none] == nothing).all(), f"{name}: a row of no sequence"
        good = ~(bad | none)
        assert torch.equal(a[good], b[good]), f"{name}: a good row changed"

    for names, bad, none in ((OUTPUTS_Q, bad_q, none_q), (OUTPUTS_K, bad_k, none_k)):
        for name in names:
            hold(name, getattr(got, name), getattr(want, name), bad, none, 0.0)
    hold("lse", got.lse.mT, want.lse.mT, bad_q, none_q, float("-inf"))


NUMBERS = st.one_of(
    st.integers(-(2**31), 2**31 - 1), st.integers(-3, 25), st.sampled_from([-(2**31), 2**31 - 1, -1, 0, 20, 21, 10**6])
)
STARTS = st.lists(NUMBERS, min_size=4, max_size=4)
NEARLY = st.lists(st.integers(0, 20), min_size=4, max_size=4).map(sorted)  # right but for where it starts and ends
COMMON = settings(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


HOSTILE = given(cu_q=st.one_of(STARTS, NEARLY), cu_k=st.one_of(STARTS, NEARLY), causal=st.booleans())


@BOTH
@settings(COMMON, max_examples=10)
@HOSTILE
def test_hostile_lengths_harm_their_own_sequence_only(
    place: Place, backend: str, cu_q: list[int], cu_k: list[int], causal: bool
) -> None:
    hold_drawn(place, backend, cu_q, cu_k, causal)


@BOTH
@pytest.mark.slow
@settings(COMMON, max_examples=500)
@HOSTILE
def test_many_hostile_lengths_harm_their_own_sequence_only(
    place: Place, backend: str, cu_q: list[int], cu_k: list[int], causal: bool
) -> None:
    hold_drawn(place, backend, cu_q, cu_k, causal)


def hold_drawn(place: Place, backend: str, cu_q: list[int], cu_k: list[int], causal: bool) -> None:
    """A small packed call whose lengths are these."""
    torch.manual_seed(0)
    x = features.call_of(place, ["packed", "causal"], Sizes(heads=1, heads_k=1, lengths=((10, 10), (10, 10), (0, 0))))
    x.options.update(starts_of(place, cu_q, cu_k))
    x.options["causal"] = causal
    hold_hostile(x, backend)


@BOTH
@settings(COMMON, max_examples=5)
@given(cu_q=st.one_of(STARTS, NEARLY), cu_k=st.one_of(STARTS, NEARLY))
def test_hostile_lengths_with_operands_are_never_out_of_bounds(
    place: Place, backend: str, cu_q: list[int], cu_k: list[int]
) -> None:
    torch.manual_seed(0)
    sizes = Sizes(lengths=((10, 10), (10, 10), (0, 0)))
    names = ["packed", "mask", "alibi_slopes", "sinks", "score_mod", "mask_mod", "dropout_p", "window", "block_mask"]
    x = features.call_of(place, [*names, "bias"], sizes)
    x.options.update(starts_of(place, cu_q, cu_k))
    clean, bad_q, bad_k, none_q, _ = clean_of(x)
    got = features.run(x, backend, SMALL)
    assert got.o[bad_q].isnan().all() and (got.o[none_q] == 0).all()
    assert got.dk is not None and got.dk[bad_k].isnan().all()


@BOTH
def test_a_sequence_longer_than_its_mask_is_a_bad_one(place: Place, backend: str) -> None:
    x = features.call_of(place, ["packed"], Sizes(lengths=((5, 7), (9, 8), (4, 6))))
    x.options["mask"] = place(torch.ones(1, 1, 1, 7, dtype=torch.bool))
    x.options["max_seqlen_k"] = 7
    got: Outputs = features.run(x, backend, SMALL)
    assert got.o[5:14].isnan().all() and got.o[:5].isfinite().all() and got.o[14:].isfinite().all()


def test_lengths_are_never_read_on_the_host(place: Place) -> None:
    """Meta tensors hold no numbers: whatever reads one raises."""
    from flash.problem import Problem

    x = features.call_of(place, ["packed", "causal", "window"])
    q, k, v = (t.to("meta") for t in x[:3])
    options = {n: t.to("meta") if isinstance(t, torch.Tensor) else t for n, t in x.options.items()}
    problem = Problem.of(q, k, v, **options)
    assert problem.mods.bad is not None and problem.mods.bad.shape == (4,)


@pytest.mark.interpret(gpu=False)  # the interpreter counts the programs
@pytest.mark.parametrize(
    "lengths", [((100, 100),) + ((1, 1),) * 8, ((16, 16),) * 5, ((0, 0),) * 7 + ((33, 2),)], ids=str
)
def test_work_is_shared_by_tiles_and_not_by_the_longest_sequence(
    place: Place, launches: list[Any], lengths: tuple[tuple[int, int], ...]
) -> None:
    x = features.call_of(place, ["packed"], Sizes(lengths=lengths, heads=1, heads_k=1))
    features.run(x, "triton", SMALL)
    tiles = {axis: sum(-(-pair[axis] // TILE) for pair in lengths) for axis in (0, 1)}
    for launch in launches:
        axis = 1 if launch.kernel.startswith("dkdv") else 0
        if launch.kernel.startswith(("forward", "dkdv", "dq")):
            programs = torch.tensor(launch.grid).prod().item()
            assert programs <= tiles[axis] + len(lengths), launch.kernel
    visited = sum(-(-n // TILE) * -(-m // TILE) for n, m in lengths)
    for kernel, dots in (("forward", 2), ("dkdv", 4), ("dq", 3)):
        assert sum(launch.dots for launch in launches if launch.kernel.startswith(kernel)) == dots * visited


@BOTH
def test_a_dense_batch_packed_equals_itself(place: Place, backend: str) -> None:
    x = features.call_of(place, ["packed", "causal", "groups"], Sizes(lengths=((33, 40),) * 3))
    got = features.run(x, backend, SMALL)
    q, k, v = (t.unflatten(0, (3, -1)).transpose(1, 2) for t in x[:3])
    o, lse = flash_attention(q, k, v, causal=True, return_lse=True, backend=backend, config=SMALL)
    assert torch.allclose(got.o.unflatten(0, (3, -1)).transpose(1, 2), o, rtol=1e-13, atol=1e-14)
    assert torch.allclose(got.lse.unflatten(1, (3, -1)).transpose(0, 1), lse, rtol=1e-13, atol=1e-14)
