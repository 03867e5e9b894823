"""The mutator: what it changes, that it says what survived, and that the list of survivors is about real mutants."""

from pathlib import Path

import pytest

pytest.importorskip("triton")

from tests.mutation import toy
from tests.mutation.mutator import mutants
from tests.mutation.run import LIST, ROOT, Result, Trial, every_mutant, listed, verdict

SOURCE = Path(toy.__file__).read_text(encoding="utf-8")
SAME = [
    "toy.doubled | return x + tl.maximum(x, x) | maximum becomes minimum",
    "toy.toy_kernel | y = doubled(tl.load(x + i, mask=i < n, other=0.0)) | 0.0 becomes 1.0",  # of lanes never stored
]
UNREACHED = [
    "toy.toy_kernel | y = y + 1.0 | + becomes -",
    "toy.toy_kernel | y = y + 1.0 | 1.0 becomes 2.0",
]


def test_a_mutant_keeps_its_name_when_lines_move() -> None:
    names = [mutant.name for mutant in mutants(toy.PATH, SOURCE)]
    moved = "# one\n# two\n" + SOURCE.replace("    i = tl.arange", "    # three\n    i = tl.arange")
    assert names == [mutant.name for mutant in mutants(toy.PATH, moved)]
    assert names == [mutant.name for mutant in mutants(toy.PATH, SOURCE)]
    assert len(names) == len(set(names))


def test_every_kind_of_change_is_made() -> None:
    changes = {mutant.change for mutant in every_mutant()}
    operators = ["+ becomes -", "* becomes +", "// becomes *", "< becomes <=", ">= becomes >", "& becomes |"]
    dropped = ["mask dropped", ".to(tl.int64) dropped", "not dropped", "input_precision dropped"]
    others = ["0 becomes 1", "True becomes False", "-inf becomes inf", "minimum becomes maximum", "if negated"]
    whole = ["where becomes its first branch", "cdiv becomes //", "branches swapped", "is not becomes is"]
    assert not {*operators, *dropped, *others, *whole} - changes


def test_what_no_body_runs_is_left_alone() -> None:
    source = '''
import triton

@triton.jit(do_not_specialize=["n" + "m"])
def kernel(x, BLOCK: tl.constexpr = 1 + 1):
    """1 + 1"""
    Y: tl.constexpr[1 + 1] = x

def launcher():
    return 1 + 1
'''
    assert mutants("kernels/none.py", source) == []


@pytest.mark.interpret(gpu=False)
def test_the_wrong_mutants_of_a_toy_die_and_the_others_are_told() -> None:
    trial = Trial({toy.PATH: SOURCE}, toy.CASES, toy.prepare, toy.check)
    results = list(trial.results(mutants(toy.PATH, SOURCE), jobs=2))
    survivors = {result.mutant.name for result in results if not result.killer}
    assert survivors == {*SAME, *UNREACHED}
    line = 1 + SOURCE.splitlines().index("        y = y + 1.0")
    assert trial.unreached() == [f"{toy.PATH}:{line}"]
    assert {result.mutant.name for result in results if not trial.order(result.mutant)} == {*UNREACHED}
    killers = {result.mutant.name: result.killer for result in results}
    assert "out of bounds" in killers["toy.toy_kernel | tl.store(out + i, y, mask=i < n) | < becomes <="]
    assert "out of bounds" in killers["toy.toy_kernel | tl.store(out + i, y, mask=i < n) | mask dropped"]
    assert "gives" in killers["toy.doubled | return x + tl.maximum(x, x) | + becomes -"]
    assert not any(toy.check(case) for case in toy.CASES)  # this process was not touched


@pytest.mark.interpret(gpu=False)
def test_every_call_shown_to_mutants_can_be_made() -> None:
    from tests.mutation import cases, cases_decode
    from tests.mutation.slice import inputs_of
    from tests.mutation.slice_decode import call_of

    every_case = [*cases.CASES, *cases_decode.CASES]
    assert len({case.name for case in every_case}) == len(every_case)
    for case in cases.CASES:
        inputs_of(case)
    for own in cases_decode.CASES:
        call_of(own)


def test_a_run_fails_for_a_survivor_that_is_not_listed_or_too_low_a_rate() -> None:
    some = mutants(toy.PATH, SOURCE)[:4]
    killed = [Result(mutant, "case", 0.1) for mutant in some]
    alive = [Result(mutant, "", 0.1) for mutant in some]
    assert verdict(killed, {}) == (4, 0, 0, 1.0)
    assert verdict([*killed[:3], alive[3]], {}) == (3, 0, 1, 0.75)
    assert verdict([*killed[:3], alive[3]], {some[3].name: "the same"}) == (3, 1, 0, 1.0)


def test_the_list_wants_a_reason() -> None:
    assert listed("# one\n# reason\na\nb\n\n# other\nc\n") == {"a": "one reason", "b": "one reason", "c": "other"}
    with pytest.raises(ValueError, match="no reason stands above a"):
        listed("# gone\n\na\n")
    with pytest.raises(ValueError, match="listed twice: a"):
        listed("# one\na\n# two\na\n")


def test_every_listed_survivor_is_a_mutant_of_today() -> None:
    names = {mutant.name for mutant in every_mutant()}
    assert [name for name in listed(LIST.read_text(encoding="utf-8")) if name not in names] == []
    assert (ROOT / "kernels").is_dir()
