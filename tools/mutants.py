"""The mutants of a file: what each one changes, and the module that it gives.

Left alone are annotations, docstrings, assertions, decorators, imports, and everything inside error messages.
"""

import ast
import copy
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

__all__ = ["ROOT", "Mutant", "mutants_of"]

ROOT = Path(__file__).resolve().parents[1]

COMPARISONS: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.LShift: ast.RShift,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}

# What these calls are given is a message.
MESSAGES = ("Refusal", "ModelError", "expected", "_refused_reader")

# Calls whose keyword arguments are facts about an operator.
ROWS = ("Row", "replace")

Child = tuple[str, int | None]


@dataclass(frozen=True)
class Mutant:
    """One change: in the parent (a number of ast.walk) the child at (field, position) becomes `after`; lines are those it is seen at."""

    path: Path
    parent: int
    child: Child
    function: str
    is_inside: bool
    lines: range
    kind: str
    change: str
    after: ast.AST

    @property
    def text(self) -> str:
        """What the mutant is, without its line: it stays the same while the file changes elsewhere."""
        return f"{self.path.relative_to(ROOT).as_posix()} {self.function}".rstrip() + f": {self.kind}: {self.change}"

    def tree(self) -> ast.Module:
        """Return the mutated module."""
        module = ast.parse(self.path.read_text(encoding="utf-8"))
        parent = list(ast.walk(module))[self.parent]
        name, position = self.child
        if position is None:
            setattr(parent, name, copy.deepcopy(self.after))
        elif self.after is REMOVED:
            del getattr(parent, name)[position]
        else:
            getattr(parent, name)[position] = copy.deepcopy(self.after)
        return ast.fix_missing_locations(module)


# What stands for nothing at all.
REMOVED = ast.Pass()


def _short(node: ast.AST) -> str:
    text = " ".join(ast.unparse(node).split())
    return text if len(text) <= 100 else text[:97] + "..."


def _change(parent: ast.AST, where: Child, node: ast.AST, after: ast.AST) -> str:
    """Return "before -> after", of a constant with what stands around it."""
    if isinstance(node, ast.Constant) and isinstance(parent, ast.expr):
        around = copy.copy(parent)
        name, position = where
        if position is None:
            setattr(around, name, after)
        else:
            changed = [*getattr(parent, name)]
            changed[position] = after
            setattr(around, name, changed)
        return f"{_short(parent)} -> {_short(around)}"
    return f"{_short(node)} -> {'' if after is REMOVED else _short(after)}".rstrip()


def mutants_of(path: Path) -> list[Mutant]:
    """Return the mutants of a file, in its order."""
    return _Finder(path).mutants


class _Finder:
    """Collects the mutants of one file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.mutants: list[Mutant] = []
        module = ast.parse(path.read_text(encoding="utf-8"))
        self._numbers = {id(node): number for number, node in enumerate(ast.walk(module))}
        self._scope: list[str] = []
        self._functions: list[ast.FunctionDef] = []
        self._statement: ast.stmt | None = None
        self._look(module)
        texts = Counter(mutant.text for mutant in self.mutants)
        for at, mutant in reversed([*enumerate(self.mutants)]):
            count, texts[mutant.text] = texts[mutant.text], texts[mutant.text] - 1
            if count > 1:
                self.mutants[at] = replace(mutant, change=f"{mutant.change} ({count})")

    def _look(self, node: ast.AST) -> None:
        for name, value in ast.iter_fields(node):
            children = value if isinstance(value, list) else [value]
            for position, child in enumerate(children):
                if isinstance(child, ast.AST) and not _is_left_alone(node, name, child):
                    self._meet(node, (name, position if isinstance(value, list) else None), child)

    def _meet(self, parent: ast.AST, where: Child, node: ast.AST) -> None:
        outer = self._statement
        self._statement = node if isinstance(node, ast.stmt) else outer
        for kind, after in _variants(parent, where[0], node, self._functions):
            if after is REMOVED or ast.unparse(after) != ast.unparse(node):
                number, scope = self._numbers[id(parent)], ".".join(self._scope)
                change = _change(parent, where, node, after)
                self.mutants.append(Mutant(self.path, number, where, scope, bool(self._functions), self._lines(), kind, change, after))
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            self._scope.append(node.name)
            if isinstance(node, ast.FunctionDef):
                self._functions.append(node)
            self._look(node)
            if isinstance(node, ast.FunctionDef):
                self._functions.pop()
            self._scope.pop()
        elif isinstance(node, ast.arguments) and isinstance(parent, ast.FunctionDef):  # defaults are evaluated outside of their function
            function = self._functions.pop()
            self._look(node)
            self._functions.append(function)
        elif not isinstance(node, ast.Raise):
            self._look(node)
        self._statement = outer

    def _lines(self) -> range:
        """Return the lines of the present statement, of a compound one its head."""
        statement = self._statement
        if statement is None:
            return range(0)
        body = getattr(statement, "body", None)
        last = body[0].lineno - 1 if body else statement.end_lineno or statement.lineno
        return range(statement.lineno, max(last, statement.lineno) + 1)


def _is_left_alone(parent: ast.AST, name: str, child: ast.AST) -> bool:
    """Say whether nothing is mutated below a node."""
    if name in ("annotation", "returns", "decorator_list", "bases", "type_comment"):
        return True
    if isinstance(child, ast.Assert | ast.Import | ast.ImportFrom | ast.JoinedStr):
        return True
    if isinstance(child, ast.keyword) and child.arg == "strict":
        return True
    if isinstance(child, ast.AnnAssign) and ast.unparse(child.annotation) == "TypeAlias":
        return True
    return isinstance(child, ast.Call) and isinstance(child.func, ast.Name) and child.func.id in MESSAGES


def _variants(parent: ast.AST, name: str, node: ast.AST, functions: list[ast.FunctionDef]) -> Iterator[tuple[str, ast.AST]]:
    """Yield (kind, what stands in the place of a node)."""
    is_test = name == "test" and isinstance(parent, ast.If | ast.IfExp | ast.While)
    if is_test and not isinstance(node, ast.Constant):
        yield "condition", ast.Constant(False)
        if not isinstance(parent, ast.While):
            yield "condition", ast.Constant(True)
        if not isinstance(node, ast.Compare | ast.UnaryOp):
            yield "not", ast.UnaryOp(ast.Not(), node)  # type: ignore[arg-type]  # the test of an if is an expression
    if name == "ifs":
        yield "filter", REMOVED
    match node:
        case ast.Compare():
            for at, operator in enumerate(node.ops):
                for new in COMPARISONS[type(operator)]:
                    yield "comparison", ast.Compare(node.left, [*node.ops[:at], new(), *node.ops[at + 1 :]], node.comparators)
        case ast.BinOp() if type(node.op) in OPERATORS:
            yield "arithmetic", ast.BinOp(node.left, OPERATORS[type(node.op)](), node.right)
        case ast.AugAssign() if type(node.op) in OPERATORS:
            yield "arithmetic", ast.AugAssign(node.target, OPERATORS[type(node.op)](), node.value)
        case ast.BoolOp():
            yield "and/or", ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values)
        case ast.UnaryOp(op=ast.Not() | ast.USub()):
            yield "sign", node.operand
        case ast.Constant(value=bool()):
            yield "constant", ast.Constant(not node.value)
        case ast.Constant(value=int() | float() as number):
            yield "constant", ast.Constant(1 - number if number in (0, 1) else number + 1)
        case ast.Raise():
            yield "raise", ast.Pass()
        case ast.Return() if node.value is not None and functions:
            yield from _returns(node.value, functions[-1])
        case ast.Break():
            yield "loop", ast.Continue()
        case ast.Continue():
            yield "loop", ast.Break()
        case ast.Expr(value=ast.Call()):
            yield "call", ast.Pass()
        case ast.Slice():
            if node.lower is not None:
                yield "slice", ast.Slice(None, node.upper, node.step)
            if node.upper is not None:
                yield "slice", ast.Slice(node.lower, None, node.step)
        case ast.keyword() if isinstance(parent, ast.Call) and isinstance(parent.func, ast.Name) and parent.func.id in ROWS:
            yield "row", REMOVED


def _returns(value: ast.expr, function: ast.FunctionDef) -> Iterator[tuple[str, ast.AST]]:
    """Yield a return of something else that the function may give."""
    kind = "" if function.returns is None else ast.unparse(function.returns)
    names = [argument.arg for argument in function.args.args]
    if "None" in kind:
        yield "return", ast.Return(ast.Constant(None))
    elif kind == "Affine" and "affine" in names:
        yield "return", ast.Return(ast.Name("affine", ast.Load()))
    elif kind == "Transfer":
        yield "return", ast.Return(ast.Call(ast.Name("Transfer", ast.Load()), [], []))
    elif kind == "bool" and not isinstance(value, ast.UnaryOp | ast.Compare):
        yield "return", ast.Return(ast.UnaryOp(ast.Not(), value))
    elif kind in ("int", "float"):
        yield "return", ast.Return(ast.BinOp(value, ast.Add(), ast.Constant(1)))
    elif kind.startswith("list["):
        yield "return", ast.Return(ast.List([], ast.Load()))
