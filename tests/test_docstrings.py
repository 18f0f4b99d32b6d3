"""Public functions, classes and methods say what they take, return and raise, in Google's style.

`python -m tests.test_docstrings [FOLDER ...]` lists what is missing.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LEAST = {"varjax": 1.0, "models": 1.0, "analysis": 0.9, "profiling": 0.9, "tuning": 0.9, "experiments": 0.9}
Function = ast.FunctionDef | ast.AsyncFunctionDef


def lacking(folder: str) -> tuple[list[str], int]:
    """What the public definitions of a folder lack, one line for each that lacks something; and how many there are."""
    missing, number = [], 0
    for path in sorted((ROOT / folder).rglob("*.py")):
        for name, node, documented in public(ast.parse(path.read_text())):
            number += 1
            sections = [section for section in wanted(node) if f"\n{section}:" not in documented]
            if not documented.strip():
                sections = ["a docstring"]
            if sections:
                missing.append(f"{path.relative_to(ROOT)}:{node.lineno} {name}: {', '.join(sections)}")
    return missing, number


def public(module: ast.Module) -> Iterator[tuple[str, ast.AST, str]]:
    """Name, node and docstring of each definition; that of a class counts for its `__init__`."""
    for node in module.body:
        if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_"):
            yield node.name, node, text(node)
        if not isinstance(node, ast.ClassDef) or node.name.startswith("_"):
            continue
        for method in node.body:
            if not isinstance(method, Function) or is_stub(method):
                continue
            if method.name in ("__init__", "__call__"):
                own = text(method) + (text(node) if method.name == "__init__" else "")
                yield f"{node.name}.{method.name}", method, own
            elif not method.name.startswith("_"):
                yield f"{node.name}.{method.name}", method, text(method)


def text(node: ast.AST) -> str:
    return "\n" + (ast.get_docstring(node) or "")


def is_stub(function: Function) -> bool:
    """A method of a protocol: its body is `...`."""
    last = function.body[-1]
    return isinstance(last, ast.Expr) and isinstance(last.value, ast.Constant) and last.value.value is ...


def wanted(node: ast.AST) -> Iterator[str]:
    """The sections that a definition needs. Of a property the title is enough, of a class its fields are.

    The `main` of a program is described by its `--help`.
    """
    if not isinstance(node, Function):
        return
    decorators = {ast.unparse(one).rpartition(".")[2] for one in node.decorator_list}
    if decorators & {"property", "cached_property", "program"}:
        return
    taken = node.args
    names = [one.arg for one in (*taken.posonlyargs, *taken.args, *taken.kwonlyargs, taken.vararg, taken.kwarg) if one]
    if [name for name in names if name not in ("self", "cls") and not name.startswith("_")]:
        yield "Args"
    inside = list(own_statements(node))
    if any(isinstance(one, ast.Yield | ast.YieldFrom) for one in inside):
        yield "Yields"
    elif any(isinstance(one, ast.Return) and not is_none(one.value) for one in inside):
        yield "Returns"
    if any(isinstance(one, ast.Raise) and one.exc is not None for one in inside):
        yield "Raises"


def own_statements(function: Function) -> Iterator[ast.AST]:
    """The nodes of a function without those of the functions inside it."""
    waiting: list[ast.AST] = list(function.body)
    while waiting:
        node = waiting.pop()
        yield node
        if not isinstance(node, Function | ast.Lambda | ast.ClassDef):
            waiting += ast.iter_child_nodes(node)


def is_none(value: ast.AST | None) -> bool:
    return value is None or (isinstance(value, ast.Constant) and value.value is None)


@pytest.mark.parametrize("folder", LEAST)
def test_public_definitions_are_documented(folder):
    missing, number = lacking(folder)
    share = 1 - len(missing) / number
    listed = "\n".join(missing)
    assert share >= LEAST[folder], f"{share:.1%} of {number} have all their sections; these lack some:\n{listed}"


def test_a_section_is_missed_where_it_is_needed():
    code = '''
class A:
    def __init__(self, x): self.x = x
    @property
    def p(self): "p"; return 1
    def f(self, x):
        """F.

        Args:
            x: it.
        """
        def g(): return 1
        if x: raise ValueError
        return None
    def h(self): yield 1
    def protocol(self, x): ...
    def _private(self, x): return x
def _f(x): return x
'''
    needed = {name: list(wanted(node)) for name, node, _ in public(ast.parse(code))}
    assert needed == {"A": [], "A.__init__": ["Args"], "A.p": [], "A.f": ["Args", "Raises"], "A.h": ["Yields"]}


if __name__ == "__main__":
    for folder in sys.argv[1:] or LEAST:
        missing, number = lacking(folder)
        print(*missing, f"{folder}: {number - len(missing)} of {number} have all their sections", sep="\n")
