"""The calls of tests/mutation/cases_decode.py, run so that each compares everything a mutant could change.

A case is run through the public function. o and lse must be within the bounds of the oracle, as in `slice`, the caches
must hold bit by bit what the oracle's hold, and kernels must have read, written and multiplied as much as before.
"""

import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from flash import reference_cache
from flash.autotune import decoding as formulas
from flash.decode import flash_attention_decode
from tests import decoding
from tests.bounds import Inputs, Outputs
from tests.decoding import Call
from tests.interpreter import memory
from tests.mutation import slice
from tests.mutation.cases_decode import FEATURES, Case


class Prepared(NamedTuple):
    """A case with its call, what it must give, and what it must leave in the caches."""

    case: Case
    call: Call
    caches: tuple[torch.Tensor, torch.Tensor]
    result: slice.Prepared  # of o and lse


def call_of(case: Case) -> Call:
    """The call of a case, the same in every process; new keys and values are among its options."""
    torch.manual_seed(zlib.crc32(case.name.encode()))
    options: dict[str, Any] = {}
    for name in case.names.split():
        options |= FEATURES[name]
    options |= case.options
    sizes = {"heads": 4, "heads_k": 2, "head_dim": 12, "head_dim_v": 7, "capacity": max(case.lengths, default=0) + 3}
    x = decoding.random_call(
        slice.place, case.lengths, seqlen_q=case.seqlen_q, page_size=case.page_size, new=case.new, dtype=case.dtype,
        stored=case.stored, **sizes | case.sizes, **options,
    )  # fmt: skip
    options = {name: y.clone() if isinstance(y, torch.Tensor) else y for name, y in x.options.items()}
    if "rotary_cos" in options:  # what turns is rounded once, as the oracle does
        x = x._replace(q=rounded(x.q, case.dtype))
    if case.new:
        rows = len(case.lengths), x.k_cache.shape[1], case.new
        drawn = (torch.randn(*rows, cache.shape[3], dtype=torch.float64) for cache in (x.k_cache, x.v_cache))
        options["k"], options["v"] = (rounded(y, case.dtype) for y in drawn)
    for name, said in case.told.items():
        for index, value in said.items():
            options[name].view(-1)[index] = value
    return planted(case, x._replace(options=options))


def rounded(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Numbers up to 4 of so few bits that dtype's accumulator holds their products with sixteenths."""
    steps = 2.0**30 if dtype == torch.float64 else 16.0
    return ((x.double() * steps).round() / steps).clamp(-4, 4).to(dtype)


def planted(case: Case, x: Call) -> Call:
    """A call with what `Case.planted` asks for in it."""
    if case.planted == "seen":
        x.q[0, 1, -1, 2] = torch.nan
        page, row = place_of(x, 0, case.lengths[0] - 2)
        x.k_cache[page, -1, row, 3] = torch.nan
        for position in (3, 20, case.lengths[1] - 2):
            page, row = place_of(x, 1, position)
            x.v_cache[page, 0, row, position % 5] = torch.nan
    elif case.planted == "bytes":
        x.v_cache[0, 0, 0] = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).to(x.v_cache.dtype)
    elif case.planted == "edges":
        edges = edges_of_float8()
        x.options["v"].view(-1)[: len(edges)] = edges.to(case.dtype)
    elif case.planted == "filled":
        for cache in (x.k_cache, x.v_cache):
            cache.copy_(torch.where(cache.isnan(), torch.randn(cache.shape), cache.double()))
    elif case.planted == "nan":
        x.options["v"].view(-1)[::7] = torch.nan
    elif case.planted == "level":
        x = x._replace(q=rounded(x.q, case.dtype), k_cache=rounded(x.k_cache, case.dtype))
        x.q[..., 0] = x.k_cache[..., 0] = 32.0
    elif case.planted == "tight":
        used = x.options["block_table"].flatten().long()
        x.options["block_table"].view(-1).copy_(torch.arange(len(used)))
        x = x._replace(k_cache=x.k_cache[used], v_cache=x.v_cache[used])
    return x


def place_of(x: Call, slot: int, position: int) -> tuple[int, int]:
    """Element and row of the caches that hold a position."""
    if "block_table" not in x.options:
        return slot, position
    page_size = x.k_cache.shape[2]
    return int(x.options["block_table"][slot, position // page_size]), position % page_size


def edges_of_float8() -> torch.Tensor:
    """Every finite float8, what lies halfway between two, its neighbours, and what is too large or too small."""
    finite = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    finite = finite[finite.isfinite()].sort().values
    middle = (finite[1:] + finite[:-1]) / 2
    others = torch.tensor([1e-40, 448.1, 463.9, 464.1, 480.0, -1e30, torch.inf, -torch.inf, 2.0**-10, -(2.0**-10)])
    return torch.cat((finite, middle, middle * (1 + 2**-22), middle * (1 - 2**-22), others))


def prepare(case: Case) -> Prepared:
    """Run a case unchanged, and keep what mutants are compared with; raises where it is wrong."""
    x = call_of(case)
    aside = ("num_splits", "batch_invariant")  # they change no result
    options = {name: y for name, y in x.options.items() if name not in aside}
    found = reference_cache.decode(x.q, x.k_cache, x.v_cache, **options)
    want = Outputs(found.o, found.lse)
    sound = [y.double().nan_to_num(0.0).to(y.dtype) for y in (x.q, found.k_cache, found.v_cache)]
    known = Call(*sound, {name: y for name, y in options.items() if name not in ("k", "v")}, x.new)
    plain, floors = decoding.standard(known, want)
    inputs = Inputs(x.q, x.k_cache, x.v_cache)
    result = slice.Prepared(case, inputs, want, plain, floors, {}, [])
    prepared = Prepared(case, x, (found.k_cache, found.v_cache), result)
    slice.warm(case.dtype)
    memory.launches.clear()
    got, caches = run(prepared)
    complaint = slice.wrong(result, got) or changed(prepared, caches)
    if complaint:
        raise AssertionError(f"{case.name}: {complaint}")
    return prepared._replace(result=result._replace(work=[*memory.launches], errors=slice.errors_of(result, got)))


def run(prepared: Prepared) -> tuple[Outputs, tuple[torch.Tensor, torch.Tensor]]:
    """o and lse of a case by the kernels as they now are, and the caches that it leaves."""
    case, x, *_ = prepared
    tensors = {"q": x.q, "k_cache": x.k_cache.clone(), "v_cache": x.v_cache.clone(), **x.options}
    if case.far is not None:  # made anew each time: a process with so much memory to its name cannot fork
        name, axis = case.far
        tensors[name] = far_apart(tensors[name], axis)
    with patched(case.patches):
        o, lse = flash_attention_decode(**tensors, return_lse=True, backend="triton", config=case.config)
    return Outputs(o, lse), (tensors["k_cache"], tensors["v_cache"])


def far_apart(x: torch.Tensor, axis: int) -> torch.Tensor:
    """x with its elements along one axis so far apart that the last lie past 2^31; the stride itself has 32 bits."""
    strides = list(torch.empty_like(x.select(axis, 0), memory_format=torch.contiguous_format).stride())
    strides.insert(axis, 2**31 // (x.shape[axis] - 1) + 2**9)
    span = sum((n - 1) * stride for n, stride in zip(x.shape, strides, strict=True))
    return torch.empty(span + 1, dtype=x.dtype).as_strided(x.shape, strides).copy_(x)


@contextmanager
def patched(numbers: Mapping[str, int]) -> Iterator[None]:
    """Other numbers in autotune/decoding.py for a while."""
    stock = {name: getattr(formulas, name) for name in numbers}
    vars(formulas).update(numbers)
    try:
        yield
    finally:
        vars(formulas).update(stock)


def changed(prepared: Prepared, caches: tuple[torch.Tensor, torch.Tensor]) -> str:
    """The first cache that does not hold what the oracle's does, bit by bit; all NaN are one."""
    for name, got, want in zip(("k_cache", "v_cache"), caches, prepared.caches, strict=True):
        integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[got.itemsize]
        same = got.contiguous().view(integer) == want.contiguous().view(integer)
        if not bool((same | got.double().isnan() & want.double().isnan()).all()):
            return f"{name} holds other numbers"
    return ""


def check(prepared: Prepared) -> str:
    """What is wrong with a case by the kernels as they now are; empty where nothing is."""
    memory.launches.clear()
    got, caches = run(prepared)
    complaint = slice.wrong(prepared.result, got) or changed(prepared, caches)
    if complaint:
        return complaint
    work = prepared.result.work
    costs = [*memory.launches]
    if costs != work:
        return f"costs {costs}, not {work}"
    if prepared.case.options.get("batch_invariant"):
        longer, _ = run(prepared._replace(call=with_room(prepared.call)))
        return "" if all(map(torch.equal, got[:2], longer[:2])) else "a longer slot gives other bits"
    return ""


def with_room(x: Call) -> Call:
    """The call with more room in each slot, which nobody uses."""
    if "block_table" in x.options:
        table = x.options["block_table"]
        return x._replace(options={**x.options, "block_table": torch.cat((table, torch.full_like(table, -1)), 1)})
    caches = (torch.cat((y, torch.full_like(y, torch.nan)), 2) for y in (x.k_cache, x.v_cache))
    return Call(x.q, *caches, x.options, x.new)
