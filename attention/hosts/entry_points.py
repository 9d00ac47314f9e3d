"""Whether a model's attention can reach this pack, read from the code of its classes.

A model may have the structure of a host and yet call its attention past it: blocks that use another method of their
attention module than the module itself, or attention that does not hand on the transformer options. Such a model would
sample untouched. What is read here is certain or it is nothing: where a module may be called after all, where code is
not at hand, or where another pack put in its own, there is no answer, and the run record tells what happened.

It takes milliseconds once per class, and looks at one block only, since the blocks of a model are alike.
"""

import functools
import re
from ast import AST, Assign, Attribute, Call, For, Load, Name, Subscript, Tuple, arguments, comprehension, walk
from collections.abc import Iterator
from typing import Any

from .base import Host
from .class_code import has_own_code, methods_of, names_in, parents_in, reached_from, tree_of

ATTENTION = re.compile(r"optimized_attention.*|scaled_dot_product_attention|attention_(pytorch|basic|split|sub_quad)")
OPTIONS = "transformer_options"


def why_unseen(host: Host, module: Any) -> str | None:
    """Return why no attention call of this model can reach its host, as the end of a sentence, or None."""
    sites = host.site_modules(module)
    if sites:
        path = next(iter(sites.values()))
        if not may_be_called(module, path):
            name = path.rsplit(".", 1)[-1]
            return f"its blocks use methods of {name} that Linearize does not know, and never {name} itself"
    else:
        weights = next(iter(host.site_weights(module).values()))[0]
        path = re.sub(r"(\.\d+)\..*", r"\1", weights)  # of the block
    return "its attention hides its calls from other code" if hides_its_calls(module, path) else None


def may_be_called(root: Any, path: str) -> bool:
    """Return whether any code of the model may call the module at a dotted path, as opposed to methods of it only."""
    owner_path, _, name = path.rpartition(".")
    in_list = name.isdigit()
    if in_list:
        owner_path, _, name = owner_path.rpartition(".")
    module, owner = _at(root, path), _at(root, owner_path)
    if not path or module is None or owner is None or has_own_code(module) or has_own_code(owner):
        return True
    if _may_call_itself(type(module)):
        return True
    callers = _callers(type(owner), name, in_list)
    if (
        callers is None
        or callers - {"forward"}
        or any(_callers(each, name, in_list) for each in _above(root, owner_path))
    ):
        return True
    return bool(callers) and (_names_forward(type(owner)) or may_be_called(root, owner_path))


def _above(root: Any, path: str) -> Iterator[type]:
    """Yield the classes around a module, which may reach into it."""
    while path:
        path = path.rpartition(".")[0]
        yield type(_at(root, path))


def hides_its_calls(root: Any, path: str) -> bool:
    """Return whether the forward of a module calls attention, and never with the transformer options."""
    module = _at(root, path)
    return module is not None and not has_own_code(module) and _hides(type(module))


@functools.lru_cache(maxsize=256)
def _hides(cls: type) -> bool:
    found = False
    for code in reached_from("forward", (methods_of(cls) or {}).items()):
        calling = any(ATTENTION.fullmatch(name) for name in names_in(code))
        tree = tree_of(code) if calling else None
        if calling and tree is None:
            return False
        parents = parents_in(tree) if tree else {}
        for node in parents:
            name, call = node.id if isinstance(node, Name) else getattr(node, "attr", ""), parents[node]
            if not ATTENTION.fullmatch(name):
                continue
            # what is handed on, or chosen, is called elsewhere
            if not isinstance(call, Call) or call.func is not node or name.endswith("for_device"):
                return False
            if any(keyword.arg in (None, OPTIONS) for keyword in call.keywords):
                return False
            found = True
    return found


def _at(root: Any, path: str) -> Any:
    """Return the module at a path, or None where there is none or it is behind a wrapper."""
    module = root
    for part in filter(None, path.split(".")):
        module = getattr(module, "_modules", {}).get(part)
    return module if hasattr(module, "_modules") else None


@functools.lru_cache(maxsize=256)
def _may_call_itself(cls: type) -> bool:
    """Return whether a method of a class may call the instance, which runs its forward."""
    for code in (methods_of(cls) or {}).values():
        tree, own = tree_of(code), code.co_varnames[:1]
        if tree is None or any(isinstance(node, Call) and getattr(node.func, "id", None) in own for node in walk(tree)):
            return True
    return False


def _names_forward(cls: type) -> bool:
    """Return whether a method of a class uses a `forward`, be it its own or its base's."""
    return any("forward" in names_in(code) for code in (methods_of(cls) or {}).values())


@functools.lru_cache(maxsize=256)
def _callers(cls: type, name: str, in_list: bool) -> frozenset[str] | None:
    """Return the methods of a class that may call its child; None where its code never names it or is not at hand."""
    mentioned, found = False, set()
    for (method, _), code in (methods_of(cls) or {}).items():
        if name not in names_in(code):
            continue
        tree = tree_of(code)
        if tree is None:
            return None
        parents = parents_in(tree)
        for node in parents:
            if not isinstance(node, Attribute) or node.attr != name or not isinstance(node.ctx, Load):
                continue
            mentioned = True
            uses = _items(node, parents, tree) if in_list else [node]
            if uses is None or any(_may_call(use, parents) for use in uses):
                found.add(method)
    return frozenset(found) if mentioned else None


def _items(mention: AST, parents: dict[AST, AST], tree: AST) -> list[AST] | None:
    """Return where items of a list are used, behind an index or under the name of a loop; None where it is unclear."""
    parent = parents[mention]
    if isinstance(parent, Subscript):
        target = parents[parent]
        return list(_named(target.targets, tree)) if isinstance(target, Assign) else [parent]
    function = parent.func.id if isinstance(parent, Call) and isinstance(parent.func, Name) else ""
    if function == "len":
        return []
    loop, looped = (parents[parent], parent) if function == "enumerate" else (parent, mention)
    if isinstance(loop, For | comprehension) and loop.iter is looped:
        targets = loop.target.elts[1:] if function and isinstance(loop.target, Tuple) else [loop.target]
        return list(_named(targets, tree))
    return None


def _named(targets: list[Any], tree: AST) -> Iterator[AST]:
    """Yield every use of the names in some targets."""
    names = {node.id for target in targets for node in walk(target) if isinstance(node, Name)}
    for node in walk(tree):
        if isinstance(node, Name) and node.id in names and isinstance(node.ctx, Load):
            yield node


def _may_call(use: AST, parents: dict[AST, AST]) -> bool:
    """Return whether a use of a module is anything but that of one of its attributes."""
    parent = parents[use]
    if isinstance(parent, Attribute):
        return parent.attr in ("forward", "__call__")
    # a default of a function inside takes the module along under its name
    return not (isinstance(parent, arguments) and use in (*parent.defaults, *parent.kw_defaults))
