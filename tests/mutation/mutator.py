"""Small changes to the bodies of @triton.jit functions, one at a time: each makes a mutant that a good test kills.

    operators      + -, * +, // *, % //, & |, << >>, and or; -x, not x, ~x lose the sign
    comparisons    < <=, > >=, == !=, is `is not`
    constants      a number + 1; True False; "-inf" "inf"
    calls          minimum maximum, min max, sum max, exp exp2, log log2; cdiv rounds down; tl.where takes one branch
    dropped        .to(...), the mask of a load or store, the accumulator of a dot, options that change a value
    branches       `if` negated, the two sides of `a if c else b` swapped

What cannot be seen by running, as `other=` under the interpreter, is left alone. Parameters, decorators, annotations
and docstrings are no code of a body.
"""

import ast
import copy
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from triton.runtime.interpreter import FunctionRewriter, InterpretedFunction

OPERATORS: dict[type[ast.AST], tuple[str, type[ast.AST] | None]] = {
    ast.Add: ("+", ast.Sub),
    ast.Sub: ("-", ast.Add),
    ast.Mult: ("*", ast.Add),
    ast.Div: ("/", ast.Mult),
    ast.FloorDiv: ("//", ast.Mult),
    ast.Mod: ("%", ast.FloorDiv),
    ast.BitAnd: ("&", ast.BitOr),
    ast.BitOr: ("|", ast.BitAnd),
    ast.BitXor: ("^", ast.BitOr),
    ast.LShift: ("<<", ast.RShift),
    ast.RShift: (">>", ast.LShift),
    ast.And: ("and", ast.Or),
    ast.Or: ("or", ast.And),
    ast.Lt: ("<", ast.LtE),
    ast.LtE: ("<=", ast.Lt),
    ast.Gt: (">", ast.GtE),
    ast.GtE: (">=", ast.Gt),
    ast.Eq: ("==", ast.NotEq),
    ast.NotEq: ("!=", ast.Eq),
    ast.Is: ("is", ast.IsNot),
    ast.IsNot: ("is not", ast.Is),
    ast.USub: ("-", None),
    ast.Not: ("not", None),
    ast.Invert: ("~", None),
}
CALLS = {
    "minimum": "maximum",
    "maximum": "minimum",
    "min": "max",
    "max": "min",
    "sum": "max",
    "exp": "exp2",
    "exp2": "exp",
    "log": "log2",
    "log2": "log",
}
TRANSPARENT = ("abs", "tanh", "floor", "ceil")  # functions of one number whose call can be left out
OPTIONS = ("input_precision", "propagate_nan")
WORDS = {"inf": "-inf", "-inf": "inf", "nan": "0"}  # in float("...")
REACHED = "_statements_reached"
Change = tuple[str, ast.AST]


class Mutant(NamedTuple):
    """One change of one place.

    Args:
        path: the source file, as it was given.
        function: name of the @triton.jit function.
        line: of the place.
        statement: line where the statement around it begins.
        text: the source line, trimmed, without its comment.
        change: what becomes of what.
        nth: which of the same changes of the same text in this function, from 1.
        place: number of the place in `places`.
        choice: number of the change in `changes`.
    """

    path: str
    function: str
    line: int
    statement: int
    text: str
    change: str
    nth: int
    place: int
    choice: int

    @property
    def name(self) -> str:
        """Tells the mutant from every other one, whatever line it moves to."""
        nth = f" (place {self.nth})" if self.nth > 1 else ""
        return f"{Path(self.path).stem}.{self.function} | {self.text} | {self.change}{nth}"


def jit_functions(tree: ast.Module) -> Iterator[ast.FunctionDef]:
    """The functions of a module under @triton.jit, with or without arguments."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            decorators = [d.func if isinstance(d, ast.Call) else d for d in node.decorator_list]
            if any(ast.unparse(decorator).split(".")[-1] == "jit" for decorator in decorators):
                yield node


def mutants(path: str, source: str) -> list[Mutant]:
    """Every mutant of a source file, in the order of the text."""
    found = []
    lines = source.splitlines()
    for function in jit_functions(ast.parse(source)):
        seen: Counter[tuple[str, str]] = Counter()
        for place, (_, _, _, node, statement) in enumerate(places(function)):
            for choice, (change, _) in enumerate(changes(node)):
                line = getattr(node, "lineno", statement.lineno)
                text = lines[line - 1].split("  #")[0].strip()
                seen[text, change] += 1
                nth = seen[text, change]
                found.append(Mutant(path, function.name, line, statement.lineno, text, change, nth, place, choice))
    return found


def mutated(source: str, mutant: Mutant) -> ast.FunctionDef:
    """The function with the change made."""
    function = next(f for f in jit_functions(ast.parse(source)) if f.name == mutant.function)
    parent, field, index, node, _ = list(places(function))[mutant.place]
    _, replacement = list(changes(node))[mutant.choice]
    if index is None:
        setattr(parent, field, replacement)
    else:
        getattr(parent, field)[index] = replacement
    return function


Place = tuple[ast.AST, str, int | None, ast.AST, ast.stmt]


def places(function: ast.FunctionDef) -> Iterator[Place]:
    """(parent, field, index in it, node, statement) of every node of a body, always in the same order."""
    for index, statement in enumerate(function.body):
        yield from _places(function, "body", index, statement, statement)


def _places(parent: ast.AST, field: str, index: int | None, node: ast.AST, statement: ast.stmt) -> Iterator[Place]:
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return  # a docstring
    statement = node if isinstance(node, ast.stmt) else statement
    yield parent, field, index, node, statement
    for name, value in ast.iter_fields(node):
        if name == "annotation":
            continue
        for i, child in enumerate(value if isinstance(value, list) else [value]):
            if isinstance(child, ast.AST):
                yield from _places(node, name, i if isinstance(value, list) else None, child, statement)


def changes(node: ast.AST) -> Iterator[Change]:
    """What a node can become, each with its description; the node itself stays as it is."""
    if isinstance(node, (ast.BinOp, ast.AugAssign, ast.BoolOp)):
        symbol, other = OPERATORS.get(type(node.op), ("", None))
        if other is not None:
            yield f"{symbol} becomes {OPERATORS[other][0]}", changed(node, op=other())
    elif isinstance(node, ast.UnaryOp) and type(node.op) in OPERATORS:
        yield f"{OPERATORS[type(node.op)][0]} dropped", node.operand
    elif isinstance(node, ast.Compare):
        for i, op in enumerate(node.ops):
            symbol, other = OPERATORS.get(type(op), ("", None))
            if other is not None:
                ops = [*node.ops[:i], other(), *node.ops[i + 1 :]]
                yield f"{symbol} becomes {OPERATORS[other][0]}", changed(node, ops=ops)
    elif isinstance(node, ast.Constant):
        yield from changes_of_constant(node)
    elif isinstance(node, ast.Call):
        yield from changes_of_call(node)
    elif isinstance(node, ast.If) and not isinstance(node.test, (ast.Compare, ast.UnaryOp)):
        yield "if negated", changed(node, test=ast.UnaryOp(ast.Not(), node.test))
    elif isinstance(node, ast.IfExp):
        yield "branches swapped", changed(node, body=node.orelse, orelse=node.body)


def changes_of_constant(node: ast.Constant) -> Iterator[Change]:
    value: Any = node.value
    if isinstance(value, bool):
        yield f"{value} becomes {not value}", changed(node, value=not value)
    elif isinstance(value, (int, float)):
        other = value + 1 if value + 1 != value else 2 * value
        yield f"{value} becomes {other}", changed(node, value=other)
    elif isinstance(value, str) and value in WORDS:
        yield f"{value} becomes {WORDS[value]}", changed(node, value=WORDS[value])


def changes_of_call(node: ast.Call) -> Iterator[Change]:
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    if name in CALLS and isinstance(node.func, ast.Attribute):
        yield f"{name} becomes {CALLS[name]}", changed(node, func=changed(node.func, attr=CALLS[name]))
    elif name == "cdiv":
        yield "cdiv becomes //", ast.BinOp(node.args[0], ast.FloorDiv(), node.args[1])
    elif name == "where":
        yield "where becomes its first branch", node.args[1]
        yield "where becomes its second branch", node.args[2]
    elif name == "to" and isinstance(node.func, ast.Attribute):
        yield f".to({', '.join(map(ast.unparse, node.args))}) dropped", node.func.value
    elif name in TRANSPARENT:
        yield f"{name} dropped", node.args[0]
    elif name == "dot" and len(node.args) == 3:
        yield "accumulator dropped", changed(node, args=node.args[:2])
    for i, keyword in enumerate(node.keywords):
        before, after = node.keywords[:i], node.keywords[i + 1 :]
        if keyword.arg in OPTIONS:
            yield f"{keyword.arg} dropped", changed(node, keywords=before + after)
        elif keyword.arg == "mask" and name in ("load", "store"):
            everywhere = ast.BinOp(keyword.value, ast.BitOr(), ast.Constant(True))
            yield "mask dropped", changed(node, keywords=[*before, ast.keyword("mask", everywhere), *after])


def marked(function: ast.FunctionDef, path: str) -> ast.FunctionDef:
    """The function, counting how often it comes to each statement, (path, line), in a global Counter, REACHED."""

    def mark(statements: list[ast.stmt]) -> list[ast.stmt]:
        found: list[ast.stmt] = []
        for statement in statements:
            for field in ("body", "orelse"):
                if hasattr(statement, field):
                    setattr(statement, field, mark(getattr(statement, field)))
            found += [*ast.parse(f"{REACHED}[{path!r}, {statement.lineno}] += 1").body, statement]
        return found

    function.body = mark(function.body)
    return function


def changed(node: Any, **fields: Any) -> Any:
    """A copy of a node with some fields replaced."""
    node = copy.copy(node)
    for name, value in fields.items():
        setattr(node, name, value)
    return node


def install(function: InterpretedFunction, tree: ast.FunctionDef, path: str, **names: Any) -> None:
    """Let every caller of an interpreted function run another body, as the interpreter itself would compile it.

    `names` join the function's globals, as those do that compiled bodies use.
    """
    function.rewrite()
    function.fn.__globals__.update(names)
    tree.decorator_list = []
    module = ast.Module([FunctionRewriter.ast_transformer.visit(tree)], [])
    namespace: dict[str, Any] = {}
    exec(compile(ast.fix_missing_locations(module), path, "exec"), function.fn.__globals__, namespace)
    InterpretedFunction.rewritten_fn[function.fn] = namespace[tree.name]
