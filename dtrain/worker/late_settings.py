"""Variables that a script sets for a library's start: too late, where the library was loaded before it began."""

import ast
from collections.abc import Callable, Iterator

_SETTERS = frozenset({"setdefault", "update", "putenv"})


def set_by(source: str, is_read_at_start: Callable[[str], bool]) -> str:
    """Return a variable of that kind that the source sets in the environment; empty if there is none.

    Seen are names that stand in the text: ``os.environ["X"] = ...``, ``setdefault``, ``update``, ``putenv``, ``|=``.
    Raises SyntaxError and ValueError as ``ast.parse`` does.
    """
    return next((name for node in ast.walk(ast.parse(source)) for name in _names(node) if is_read_at_start(name)), "")


def _names(node: ast.AST) -> Iterator[str]:
    match node:
        case ast.Subscript(value=environment, slice=key, ctx=ast.Store()) if _is_environment(environment):
            yield from _texts(key)
        case ast.Call(func=ast.Attribute(attr=attribute, value=owner), args=arguments, keywords=keywords):
            if attribute in _SETTERS and (_is_environment(owner) or attribute == "putenv"):
                yield from (name for argument in arguments[:1] for name in _texts(argument))
                yield from (keyword.arg for keyword in keywords if keyword.arg)
        case ast.AugAssign(target=target, value=value) if _is_environment(target):
            yield from _texts(value)


def _is_environment(node: ast.AST) -> bool:
    match node:
        case ast.Name(id="environ") | ast.Attribute(attr="environ"):
            return True
    return False


def _texts(node: ast.AST) -> Iterator[str]:
    """Text constants, also as the keys of a dict, or as names in a call of it."""
    for each in ast.walk(node):
        if isinstance(each, ast.Constant) and isinstance(each.value, str):
            yield each.value
        elif isinstance(each, ast.keyword) and each.arg:
            yield each.arg
