"""Small faults that a source can have: each changes one operator, constant, condition or statement."""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterator
from dataclasses import dataclass

_COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
_ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Div,
    ast.Mod: ast.Mult, ast.Pow: ast.Mult, ast.LShift: ast.RShift, ast.RShift: ast.LShift,
    ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.BitXor: ast.BitAnd,
}  # fmt: skip
_NAMES = {
    "min": "max", "max": "min", "any": "all", "all": "any", "ceil": "floor", "floor": "ceil", "minimum": "maximum",
    "maximum": "minimum", "amin": "amax", "amax": "amin", "argmin": "argmax", "argmax": "argmin",
    "clamp_min": "clamp_max", "clamp_max": "clamp_min",
}  # fmt: skip


@dataclass(frozen=True)
class Mutation:
    """Bytes `start` to `end` of the source become `replacement`; lines are counted from 1.

    first_line, last_line: of the statement it is in, without the block below that statement: a test that runs one of
    them may see the change. before, after: the lines it stands in, as they were and as they are.
    """

    start: int
    end: int
    replacement: str
    line: int
    first_line: int
    last_line: int
    scope: str
    before: str
    after: str

    def apply(self, source: str) -> str:
        encoded = source.encode()
        return (encoded[: self.start] + self.replacement.encode() + encoded[self.end :]).decode()


def mutations(source: str) -> list[Mutation]:
    """All of them, in the order of the source.

    Left alone is what no behaviour follows from, or what only words it: annotations, decorators, docstrings, formatted
    texts, asserts, `strict` of zip, and what an error says.
    """
    found = _Finder(source)
    found.block(ast.parse(source).body)
    unique = {(mutation.start, mutation.end, mutation.replacement): mutation for mutation in found.mutations}
    return sorted(unique.values(), key=lambda mutation: (mutation.start, mutation.end, mutation.replacement))


class _Finder:
    def __init__(self, source: str) -> None:
        self.mutations: list[Mutation] = []
        self._source = source.encode()
        lines = self._source.splitlines(keepends=True)
        self._starts = [0]
        for line in lines:
            self._starts.append(self._starts[-1] + len(line))
        self._scope: list[str] = []
        self._lines = (1, 1)

    def block(self, statements: list[ast.stmt]) -> None:
        for statement in statements:
            self._statement(statement)

    def _statement(self, node: ast.stmt) -> None:
        if isinstance(node, ast.Import | ast.ImportFrom | ast.Assert | ast.Pass | ast.Global | ast.Nonlocal):
            return
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            return  # A docstring
        self._lines = (node.lineno, _header_end(node))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            self._definition(node)
            return
        if _is_removable(node):
            self._replace(node, "pass")
        if isinstance(node, ast.Raise):
            return
        if isinstance(node, ast.Break | ast.Continue):
            self._replace(node, "continue" if isinstance(node, ast.Break) else "break")
        if isinstance(node, ast.If | ast.While):
            self._condition(node.test, can_be_true=isinstance(node, ast.If))
        if isinstance(node, ast.Return) and node.value is not None and not _is_none(node.value):
            self._replace(node.value, "None")
        if isinstance(node, ast.AugAssign) and type(node.op) in _ARITHMETIC:
            changed = copy.deepcopy(node)
            changed.op = _ARITHMETIC[type(node.op)]()
            self._replace(node, ast.unparse(changed))
        for expression in _expressions(node):
            self._expression(expression)
        for body in ("body", "orelse", "finalbody"):
            self.block(getattr(node, body, []))
        for handler in getattr(node, "handlers", []):
            self.block(handler.body)
        for case in getattr(node, "cases", []):
            self.block(case.body)

    def _definition(self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> None:
        if not isinstance(node, ast.ClassDef):
            for default in (*node.args.defaults, *node.args.kw_defaults):
                if default is not None:
                    self._expression(default)
        self._scope.append(node.name)
        self.block(node.body)
        self._scope.pop()

    def _condition(self, node: ast.expr, *, can_be_true: bool = True) -> None:
        if not isinstance(node, ast.Constant):
            self._replace(node, "False")
            if can_be_true:
                self._replace(node, "True")

    def _expression(self, node: ast.expr) -> None:
        for replacement in _replacements(node):
            self._replace(node, replacement)
        if isinstance(node, ast.JoinedStr):
            return
        if isinstance(node, ast.IfExp):
            self._condition(node.test)
        if isinstance(node, ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp):
            for generator in node.generators:
                self._expression(generator.iter)
                for test in generator.ifs:
                    self._condition(test)
                    self._expression(test)
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.expr):
                self._expression(child)
            # `strict=True` asserts what the code relies on anyway.
            elif isinstance(child, ast.keyword) and child.arg != "strict":
                self._expression(child.value)

    def _replace(self, node: ast.expr | ast.stmt, replacement: str) -> None:
        start, end = self._offset(node.lineno, node.col_offset), self._offset(node.end_lineno, node.end_col_offset)
        before = self._source[self._starts[node.lineno - 1] : self._starts[(node.end_lineno or 0)]]
        lead, rest = self._starts[node.lineno - 1], self._starts[node.end_lineno or 0]
        after = self._source[lead:start] + replacement.encode() + self._source[end:rest]
        self.mutations.append(
            Mutation(
                start, end, replacement, node.lineno, *self._lines, ".".join(self._scope), _one_line(before),
                _one_line(after),
            )
        )  # fmt: skip

    def _offset(self, line: int | None, column: int | None) -> int:
        assert line is not None
        assert column is not None
        return self._starts[line - 1] + column


def _header_end(node: ast.stmt) -> int:
    """The last line before the block that `node` begins; of a simple statement its own last line."""
    body = getattr(node, "body", None) or getattr(node, "cases", None)
    if not body:
        return node.end_lineno or node.lineno
    first = body[0].body[0] if isinstance(body[0], ast.match_case) else body[0]
    return max(node.lineno, min(first.lineno - 1, node.end_lineno or node.lineno))


def _is_removable(node: ast.stmt) -> bool:
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Call)
    if isinstance(node, ast.Assign):
        return all(isinstance(target, ast.Attribute | ast.Subscript) for target in node.targets)
    return isinstance(node, ast.AugAssign | ast.Delete | ast.Raise)


def _is_none(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def _expressions(node: ast.stmt) -> Iterator[ast.expr]:
    """Those of the statement itself that are evaluated, without annotations and targets that are mere names."""
    for name, value in ast.iter_fields(node):
        if name == "annotation":
            continue
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, ast.expr):
                yield item
            elif isinstance(item, ast.withitem):
                yield item.context_expr


def _replacements(node: ast.expr) -> Iterator[str]:
    """What may stand in place of this expression alone, without its parts."""
    if isinstance(node, ast.Constant):
        yield from _other_constants(node.value)
    elif isinstance(node, ast.Compare):
        for index, operator in enumerate(node.ops):
            changed = copy.deepcopy(node)
            changed.ops[index] = _COMPARISONS[type(operator)]()
            yield f"({ast.unparse(changed)})"
    elif isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
        changed_operation = copy.deepcopy(node)
        changed_operation.op = _ARITHMETIC[type(node.op)]()
        yield f"({ast.unparse(changed_operation)})"
    elif isinstance(node, ast.BoolOp):
        changed_logic = copy.deepcopy(node)
        changed_logic.op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        yield f"({ast.unparse(changed_logic)})"
    elif isinstance(node, ast.UnaryOp) and not isinstance(node.operand, ast.Constant):
        # -1 is a constant, and as an index often the same as 1.
        yield f"({ast.unparse(node.operand)})"
    elif isinstance(node, ast.Call):
        changed_call = copy.deepcopy(node)
        function = changed_call.func
        if isinstance(function, ast.Name) and function.id in _NAMES:
            function.id = _NAMES[function.id]
            yield ast.unparse(changed_call)
        elif isinstance(function, ast.Attribute) and function.attr in _NAMES:
            function.attr = _NAMES[function.attr]
            yield ast.unparse(changed_call)


def _other_constants(value: object) -> Iterator[str]:
    if isinstance(value, bool):
        yield str(not value)
    elif isinstance(value, int):
        yield str(value + 1)
    elif isinstance(value, float):
        yield repr(2 * value if value else 1.0)
    elif isinstance(value, str):
        yield '"mutant"' if not value else '""'
    elif isinstance(value, bytes):
        yield 'b"mutant"' if not value else 'b""'


def _one_line(source: bytes) -> str:
    return " ".join(source.decode().split())
