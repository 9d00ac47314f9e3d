"""The code that runs for instances of a class, as syntax trees, and which methods name what."""

import ast
import functools
import inspect
import linecache
import textwrap
from ast import AST
from collections.abc import Iterable
from tokenize import TokenError
from types import CodeType, FunctionType
from typing import Any


@functools.lru_cache(maxsize=256)
def methods_of(cls: type) -> dict[tuple[str, int], CodeType] | None:
    """Return the methods of a class, by name and place of their class among its bases; None where some is not Python.

    Of the methods of bases those that are inherited, or may be called through `super()`. Torch's own are left out.
    """
    bases = [base for base in cls.__mro__ if base is not object and not base.__module__.startswith("torch.")]
    waiting = [(name, 0) for base in bases for name in vars(base)]
    found: dict[tuple[str, int], CodeType] = {}
    while waiting:
        name, start = waiting.pop()
        place = next((i for i in range(start, len(bases)) if name in vars(bases[i])), None)
        if place is None or (name, place) in found:
            continue
        value = vars(bases[place])[name]
        if isinstance(value, type) or not (callable(value) or isinstance(value, property | staticmethod | classmethod)):
            continue
        function: Any = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
        function = inspect.unwrap(function) if callable(function) else function
        if not isinstance(function, FunctionType):
            return None
        found[name, place] = function.__code__
        names = names_in(function.__code__)
        if "super" in names:
            waiting += [(called, place + 1) for called in names]
    return found


@functools.lru_cache(maxsize=4096)
def names_in(code: CodeType) -> frozenset[str]:
    """Return the names of attributes and outer variables that some code uses, in the functions inside of it too."""
    inside = [names_in(each) for each in code.co_consts if isinstance(each, CodeType)]
    return frozenset(code.co_names).union(code.co_freevars, *inside)


@functools.lru_cache(maxsize=256)
def tree_of(code: CodeType) -> AST | None:
    """Return the syntax tree of a function, or None where its source is not at hand, or is another one by now."""
    lines = linecache.getlines(code.co_filename)[code.co_firstlineno - 1 :]
    try:
        tree = ast.parse(textwrap.dedent("".join(inspect.getblock(lines)))) if lines else None
    except (SyntaxError, ValueError, TokenError):
        return None
    # a file may have changed since it was imported, and hold something else at this line
    return tree if tree and [getattr(each, "name", None) for each in tree.body] == [code.co_name] else None


def reached_from(method: str, methods: Iterable[tuple[tuple[str, int], CodeType]]) -> list[CodeType]:
    """Return the code of a method and of whatever methods it names, and they."""
    known, names, found = list(methods), {method}, []
    while True:
        new = [code for (name, _), code in known if name in names and code not in found]
        if not new:
            return found
        found += new
        names = names.union(*(names_in(code) for code in new))


def has_own_code(module: Any) -> bool:
    """Return whether functions were put on an instance, in place of its class's or beside them."""
    return any(inspect.isroutine(value) for value in vars(module).values())


def parents_in(tree: AST) -> dict[AST, AST]:
    """Return, by node of a syntax tree, the node around it."""
    return {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
