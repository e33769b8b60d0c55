"""Mutants that nobody chose: which there are, how they are drawn, which tests meet
them.

For `make mutants ARGS="--random 40 --seed 1"`. A mutant is one edit of the text of
one statement, placed with the help of the syntax tree, so that its diff is a line as
a person would have written it. An edit that does not parse, or that leaves the tree
as it was, is none. One seed draws the same mutants with every Python. Which tests
run a statement is found out once, by tracing them over the unchanged library."""

import ast
import difflib
import json
import random
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

MODULES = (  # the stages of a step: chapters 2 to 10, 12 and 13
    *("rollout", "policy", "sampling", "reference", "reward", "value", "gae"),
    *("group", "objective", "update", "algorithm"),
)
TESTS = (  # what is quick; none of them trains for long or starts a process
    *("test_bad_input", "test_coming_from_trl", "test_data", "test_equations"),
    *("test_faults", "test_models", "test_properties", "test_recipes", "test_rows"),
    *("test_sampler", "test_sampling", "test_stages", "test_task", "test_trl"),
)


# -- The operators: each yields the edits of one node ----------------------------------


@dataclass(frozen=True)
class Edit:
    operator: str
    start: int  # bytes
    end: int
    text: bytes


@dataclass
class Source:
    "The text of a module, in bytes as `ast` counts them."

    text: bytes
    tree: ast.Module = field(init=False)
    code: bytes = field(init=False)  # with comments blanked
    lines: list[int] = field(init=False)  # where each begins

    def __post_init__(self):
        self.tree = ast.parse(self.text)
        self.code = re.sub(rb"#[^\n]*", lambda m: b" " * len(m[0]), self.text)
        self.lines = [0, *(m.end() for m in re.finditer(rb"\n", self.text))]

    def span(self, node: ast.AST) -> tuple[int, int]:
        start = self.lines[node.lineno - 1] + node.col_offset
        return start, self.lines[node.end_lineno - 1] + node.end_col_offset

    def of(self, node: ast.AST) -> bytes:
        start, end = self.span(node)
        return self.text[start:end]

    def between(
        self, operator: str, left: ast.AST, right: ast.AST, old: str, new: str
    ) -> Iterator[Edit]:
        "Replace the `old` that stands between two nodes."
        start, end = self.span(left)[1], self.span(right)[0]
        at = self.code.find(old.encode(), start, end)
        if at >= 0:
            yield Edit(operator, at, at + len(old), new.encode())


BINARY = {
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: ("*", "/"),
    ast.Div: ("/", "*"),
    ast.FloorDiv: ("//", "*"),
    ast.Mod: ("%", "//"),
    ast.Pow: ("**", "*"),
    ast.BitAnd: ("&", "|"),
    ast.BitOr: ("|", "&"),
}


def arithmetic(source: Source, node: ast.AST) -> Iterator[Edit]:
    "Another operator; the operands of - and / swapped. Not of texts."
    if isinstance(node, ast.AugAssign) and type(node.op) in BINARY:
        old, new = BINARY[type(node.op)]
        yield from source.between("arithmetic", node.target, node.value, old, new)
    if not isinstance(node, ast.BinOp) or type(node.op) not in BINARY:
        return
    if any(map(is_text, (node.left, node.right))):
        return
    old, new = BINARY[type(node.op)]
    yield from source.between("arithmetic", node.left, node.right, old, new)
    if isinstance(node.op, ast.Sub | ast.Div):
        yield from swap(source, "operands", node.left, node.right)


COMPARISONS = {
    ast.Lt: ("<", ("<=", ">=")),
    ast.LtE: ("<=", ("<", ">")),
    ast.Gt: (">", (">=", "<=")),
    ast.GtE: (">=", (">", "<")),
    ast.Eq: ("==", ("!=",)),
    ast.NotEq: ("!=", ("==",)),
    ast.Is: ("is", ("is not",)),
    ast.IsNot: ("is not", ("is",)),
    ast.In: ("in", ("not in",)),
    ast.NotIn: ("not in", ("in",)),
}


def comparison(source: Source, node: ast.AST) -> Iterator[Edit]:
    "Another comparison: its limit moved, or its opposite."
    if not isinstance(node, ast.Compare):
        return
    operands = [node.left, *node.comparators]
    for left, op, right in zip(operands, node.ops, operands[1:]):
        old, others = COMPARISONS[type(op)]
        for new in others:
            yield from source.between("comparison", left, right, old, new)


def logic(source: Source, node: ast.AST) -> Iterator[Edit]:
    "`and` for `or`, one operand less, a condition negated, a `not` or a `~` less."
    if isinstance(node, ast.BoolOp):
        old, new = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
        for left, right in zip(node.values, node.values[1:]):
            yield from source.between("logic", left, right, old, new)
        if len(node.values) == 2:
            yield from either(source, "operand dropped", node, *node.values)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.Invert):
        start, _ = source.span(node)
        yield Edit("negation", start, source.span(node.operand)[0], b"")
    test = getattr(node, "test", None)
    if isinstance(test, ast.Name | ast.Attribute | ast.Call | ast.Subscript):
        start, end = source.span(test)
        yield Edit("negation", start, start, b"not ")


def constant(source: Source, node: ast.AST) -> Iterator[Edit]:
    "A number off by one or of the other sign, a truth value turned round."
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        start, _ = source.span(node)
        yield Edit("sign", start, source.span(node.operand)[0], b"")
    value = node.value if isinstance(node, ast.Constant) else None
    if isinstance(value, bool):
        others = [not value]
    elif isinstance(value, int):
        others = [value + 1, value - 1, -value]
    elif isinstance(value, float):
        others = [value + 1.0, -value]
    else:
        return
    for other in others:
        yield Edit("constant", *source.span(node), repr(other).encode())


OTHER_NAMES = {
    **{"min": "max", "amin": "amax", "argmin": "argmax", "minimum": "maximum"},
    **{"any": "all", "mean": "sum", "nanmean": "nansum", "floor": "ceil"},
    **{"ones": "zeros", "ones_like": "zeros_like"},
}
OTHER_NAMES |= {new: old for old, new in OTHER_NAMES.items()}


def name(source: Source, node: ast.AST) -> Iterator[Edit]:
    "min for max, any for all, mean for sum, ones for zeros: of what is called."
    if isinstance(node, ast.keyword) and node.arg in ("min", "max"):
        start, _ = source.span(node)
        yield Edit("name", start, start + 3, OTHER_NAMES[node.arg].encode())
    function = node.func if isinstance(node, ast.Call) else None
    if isinstance(function, ast.Attribute) and function.attr in OTHER_NAMES:
        _, end = source.span(function)
        old, new = function.attr, OTHER_NAMES[function.attr]
        yield Edit("name", end - len(old), end, new.encode())
    if isinstance(function, ast.Name) and function.id in ("min", "max", "any", "all"):
        yield Edit("name", *source.span(function), OTHER_NAMES[function.id].encode())


METHODS = {
    *("abs", "clamp", "cumsum", "detach", "double", "exp", "flip", "float", "log"),
    *("lower", "masked_fill", "nan_to_num", "round", "sqrt", "square", "strip"),
}


def method(source: Source, node: ast.AST) -> Iterator[Edit]:
    "`x.detach()` becomes `x`; `torch.where(mask, x, y)` becomes `x` or `y`."
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
        return
    owner = node.func.value
    if node.func.attr == "where" and len(node.args) == 3:
        yield from either(source, "mask dropped", node, *node.args[1:])
    if node.func.attr not in METHODS or source.of(owner) in (b"torch", b"F", b"math"):
        return
    end = source.span(node)[1]
    yield Edit("call dropped", source.code.index(b".", source.span(owner)[1]), end, b"")


def mask(source: Source, node: ast.AST) -> Iterator[Edit]:
    "`x * mask`, `x & mask` and `x[mask]` become `x`."
    if isinstance(node, ast.Subscript) and b"mask" in source.of(node.slice):
        start = source.span(node.value)[1]
        yield Edit("mask dropped", start, source.span(node)[1], b"")
    if isinstance(node, ast.BinOp) and isinstance(
        node.op, ast.Mult | ast.BitAnd | ast.BitOr
    ):
        if isinstance(node.op, ast.Mult) and b"mask" not in source.of(node):
            return
        yield from either(source, "operand dropped", node, node.left, node.right)


def bound(source: Source, node: ast.AST) -> Iterator[Edit]:
    "A slice without its begin or its end."
    if not isinstance(node, ast.Slice):
        return
    for limit in (node.lower, node.upper):
        if limit is not None:
            yield Edit("bound dropped", *source.span(limit), b"")


TEXTS = {"desc", "description", "doc", "help", "title"}
UNSEEN = {
    "device",
    "stacklevel",
    "strict",
    None,
}  # their absence, on one CPU; ** as well
SYMMETRIC = {
    *("add", "allclose", "equal", "isclose", "logaddexp", "max", "maximum", "min"),
    *("minimum", "mul"),
}


def argument(source: Source, node: ast.AST) -> Iterator[Edit]:
    "One keyword argument less; two neighbours swapped."
    if not isinstance(node, ast.Call):
        return
    for keyword in node.keywords:
        if keyword.arg in TEXTS | UNSEEN:
            continue
        start, end = source.span(keyword)
        if comma := re.compile(rb"\s*,[ \n]*").match(source.code, end):
            end = comma.end()
        elif comma := re.search(rb",\s*$", source.code[:start]):
            start = comma.start()
        yield Edit("argument dropped", start, end, b"")
    called = getattr(node.func, "attr", getattr(node.func, "id", ""))
    if called not in SYMMETRIC:
        for left, right in zip(node.args, node.args[1:]):
            yield from swap(source, "arguments", left, right)


def statement(source: Source, node: ast.AST) -> Iterator[Edit]:
    "`pass` in place of what has an effect and whose absence does not only crash."
    assigned = isinstance(node, ast.Assign) and not isinstance(
        node.targets[0], ast.Name | ast.Tuple
    )
    called = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    others = ast.AugAssign | ast.Raise | ast.Continue | ast.Break
    if assigned or called or isinstance(node, others) or is_early_return(node):
        yield Edit("statement dropped", *source.span(node), b"pass")
    if isinstance(node, ast.Assign) and getattr(node, "rebinds", False):
        yield Edit("statement dropped", *source.span(node), b"pass")


OPERATORS = (
    *(arithmetic, comparison, logic, constant, name, method, mask, bound, argument),
    statement,
)


def swap(source: Source, what: str, left: ast.AST, right: ast.AST) -> Iterator[Edit]:
    (start, middle), (restart, end) = source.span(left), source.span(right)
    between = source.text[middle:restart]
    text = source.of(right) + between + source.of(left)
    yield Edit(f"{what} swapped", start, end, text)


def either(
    source: Source, what: str, node: ast.AST, left: ast.AST, right: ast.AST
) -> Iterator[Edit]:
    "One of two in place of the node that holds both."
    for kept in (left, right):
        yield Edit(what, *source.span(node), b"(" + source.of(kept) + b")")


# -- What may be mutated ---------------------------------------------------------------


MESSAGES = {"debug", "info", "print", "warn", "warning"}  # calls of these


def is_text(node: ast.AST) -> bool:
    text = isinstance(node, ast.Constant) and isinstance(node.value, str)
    return text or isinstance(node, ast.JoinedStr)


def is_message(node: ast.AST) -> bool:
    "What only a person reads: the text of an error, a warning, a log line, a help."
    if isinstance(node, ast.JoinedStr):
        return True
    if isinstance(node, ast.keyword):
        return node.arg in TEXTS
    function = node.func if isinstance(node, ast.Call) else None
    return getattr(function, "attr", getattr(function, "id", "")) in MESSAGES


def is_early_return(node: ast.AST) -> bool:
    return isinstance(node, ast.Return) and getattr(node, "early", False)


def expressions(node: ast.AST) -> Iterator[ast.AST]:
    "A statement, and what is computed in it: no annotation, decorator or message."
    if is_message(node):
        return
    yield node
    if isinstance(node, ast.Raise):
        return
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "msg", "handlers"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and not isinstance(child, ast.stmt):
                yield from expressions(child)


def statements(body: list[ast.stmt], bound: set[str], inner=False) -> Iterator:
    "Every statement, in order, with a note on those that may be left out."
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            continue
        if isinstance(node, ast.FunctionDef):
            arguments = {a.arg for a in ast.walk(node.args) if isinstance(a, ast.arg)}
            yield node
            yield from statements(node.body, bound | arguments)
            continue
        if isinstance(node, ast.Assign):
            names = {n.id for t in node.targets for n in ast.walk(t) if is_name(n)}
            node.rebinds = names <= bound
            bound |= names
        node.early = inner and isinstance(node, ast.Return)
        yield node
        for part in ("body", "orelse", "finalbody"):
            yield from statements(getattr(node, part, []), bound, inner=True)
        for handler in getattr(node, "handlers", []):
            yield from statements(handler.body, bound, inner=True)


def is_name(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)


@dataclass(frozen=True)
class Mutant:
    file: str
    line: int
    operator: str
    old: str  # the text of the file
    new: str
    lines: range  # of the statement, or of the head of a compound one
    body: range  # all lines that speak for it when no test is seen to run these

    def diff(self) -> str:
        "As `diff -u` shows it, without context."
        old, new = (text.splitlines(keepends=True) for text in (self.old, self.new))
        return "".join(difflib.unified_diff(old, new, self.file, self.file, n=0))


def ranges(node: ast.stmt, last: int) -> tuple[range, range]:
    "Lines of the head of a statement, and those that speak for it."
    everything = range(node.lineno, node.end_lineno + 1)
    body = getattr(node, "body", None)
    if not isinstance(body, list):
        return everything, range(1, last)
    function = isinstance(node, ast.FunctionDef)
    head = range(node.lineno, max(body[0].lineno, node.lineno + 1))
    return (range(0) if function else head), everything


def mutants_of(file: str, text: str) -> list[list[Mutant]]:
    "For each statement of a module that has any, its mutants: all that can be written."
    source = Source(text.encode())
    last = text.count("\n") + 2
    result = []
    for node in statements(source.tree.body, set()):
        if isinstance(node, ast.Assign) and source.of(node).startswith(b"__all__"):
            continue
        found = {}
        for part in expressions(node):
            for operator in OPERATORS:
                for edit in operator(source, part):
                    new = (
                        source.text[: edit.start] + edit.text + source.text[edit.end :]
                    )
                    found.setdefault(new, (edit, node))
        result.append(
            [
                Mutant(
                    file,
                    source.text.count(b"\n", 0, edit.start) + 1,
                    edit.operator,
                    text,
                    new.decode(),
                    *ranges(node, last),
                )
                for new, (edit, node) in found.items()
            ]
        )
    return [mutants for mutants in result if mutants]


def is_another(mutant: Mutant) -> bool:
    "It parses, and is not the same program with other parentheses."
    try:
        return ast.dump(ast.parse(mutant.new)) != ast.dump(ast.parse(mutant.old))
    except SyntaxError:
        return False


def draw(root: Path, modules: tuple[str, ...], n: int, seed: int) -> list[Mutant]:
    "n mutants: a statement of all, then an operator of those it has, then a place."
    order = random.Random(seed)
    waiting = [
        mutants
        for path in (f"grpo_nb/{name.replace('.', '/')}.py" for name in modules)
        for mutants in mutants_of(path, (root / path).read_text())
    ]
    drawn = []
    while waiting and len(drawn) < n:
        waiting.sort(key=lambda _: order.random())
        for mutants in waiting:
            if len(drawn) < n and (mutant := draw_one(mutants, order)):
                drawn.append(mutant)
        waiting = [mutants for mutants in waiting if mutants]
    return sorted(drawn, key=lambda mutant: (mutant.file, mutant.line))


def draw_one(mutants: list[Mutant], order: random.Random) -> Mutant | None:
    """Take one out of the mutants of a statement; None if none of them is another
    program."""
    while mutants:
        operators = sorted({mutant.operator for mutant in mutants})
        operator = operators[int(order.random() * len(operators))]
        places = [mutant for mutant in mutants if mutant.operator == operator]
        mutant = places[int(order.random() * len(places))]
        mutants.remove(mutant)
        if is_another(mutant):
            return mutant
    return None


# -- Which tests meet a mutant ---------------------------------------------------------


class Trace:
    "A plugin of pytest: the lines of the library that each test runs, and its seconds."

    def __init__(self, copy: Path):
        self.library, self.result = str(copy / "grpo_nb"), {}
        self.file = Path(f"{copy}.trace")

    def calls(self, frame, event, argument):
        if not frame.f_code.co_filename.startswith(self.library):
            return None
        return self.lines

    def lines(self, frame, event, argument):
        if event == "line":
            self.seen.add((frame.f_code.co_filename, frame.f_lineno))
        return self.lines

    def pytest_runtest_logstart(self, nodeid, location):
        self.seen, self.began = set(), time.monotonic()
        sys.settrace(self.calls)

    def pytest_runtest_logfinish(self, nodeid, location):
        sys.settrace(None)
        seconds = time.monotonic() - self.began
        lines = {}
        for file, line in self.seen:
            name = Path(file).relative_to(self.library)
            lines.setdefault(f"grpo_nb/{name}", []).append(line)
        self.result[nodeid] = {"seconds": seconds, "lines": lines}

    def pytest_sessionfinish(self):
        self.file.write_text(json.dumps(self.result))


class Chosen:
    "A plugin of pytest: these tests and no others, in this order."

    def __init__(self, tests: list[str]):
        self.place = {test: i for i, test in enumerate(tests)}

    def pytest_collection_modifyitems(self, items):
        chosen = [item for item in items if item.nodeid in self.place]
        items[:] = sorted(chosen, key=lambda item: self.place[item.nodeid])


def tests_for(mutant: Mutant, trace: dict, seconds: float) -> list[str]:
    "Those that run its statement, quickest first, as many as fit into the seconds."
    lines = {
        test: set(run["lines"].get(mutant.file, ())) for test, run in trace.items()
    }
    near = [test for test in trace if lines[test].intersection(mutant.lines)]
    near = near or [test for test in trace if lines[test].intersection(mutant.body)]
    near.sort(key=lambda test: trace[test]["seconds"])
    chosen, left = [], seconds
    for test in near:
        left -= trace[test]["seconds"]
        if left < 0 and chosen:
            break
        chosen.append(test)
    return chosen
