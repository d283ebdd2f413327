"""What docstrings and comments of the package refer to is there."""

import ast
import builtins
import importlib
import io
import pkgutil
import re
import tokenize
from pathlib import Path

import pytest

import n4flow

MODULES = ["n4flow", *(found.name for found in pkgutil.walk_packages(n4flow.__path__, "n4flow."))]
NAME = re.compile(r"(?<!`)`([A-Za-z_][\w.]*)`(?!`)")


def texts_of(source):
    """Docstrings and comments, each with the classes and functions that it stands in."""

    def walk(node, parents):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.Module) and (text := ast.get_docstring(node)):
            yield text, [*parents, node]
        for child in ast.iter_child_nodes(node):
            yield from walk(child, [*parents, node] if isinstance(node, ast.ClassDef | ast.FunctionDef) else parents)

    tree = ast.parse(source)
    yield from walk(tree, [])
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.string, [tree]


def names_in(nodes):
    """Parameters, variables and methods around a text, and what a class holds of itself."""
    for node in nodes:
        for part in ast.walk(node):
            if isinstance(part, ast.arg):
                yield part.arg
            elif isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name) and part.value.id == "self":
                yield part.attr
            elif isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
                yield part.target.id
            elif isinstance(part, ast.FunctionDef):
                yield part.name
            elif isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store):
                yield part.id


def has(owner, names):
    """Whether attribute after attribute is there; of a class, its annotations and what it sets count too."""
    for name in names:
        if isinstance(owner, type) and name in getattr(owner, "__annotations__", {}):
            return True
        if not hasattr(owner, name):
            return False
        owner = getattr(owner, name)
    return True


def resolves(reference, module, nodes):
    if list(Path(n4flow.__file__).parent.rglob(reference)):  # a file
        return True
    first, *others = reference.split(".")
    if first in set(names_in(nodes)):
        return True
    if hasattr(module, first) or hasattr(builtins, first):
        return has(getattr(module, first, None) or getattr(builtins, first), others)
    # a module, by as much of its name as tells it, and something in it
    return any(
        f".{name}".endswith("." + ".".join([first, *others][:count]))
        and has(importlib.import_module(name), others[count - 1 :])
        for name in MODULES
        for count in range(1, len(others) + 2)
    )


@pytest.mark.parametrize("name", MODULES)
def test_names_in_backticks_are_there(name):
    module = importlib.import_module(name)
    source = Path(module.__file__).read_text(encoding="utf-8")
    unknown = {
        reference
        for text, nodes in texts_of(source)
        for reference in NAME.findall(text)
        if not resolves(reference, module, nodes)
    }
    assert unknown == set()


def test_a_name_that_is_gone_is_noticed():
    from n4flow import parameters

    assert resolves("samples.shrink_per_axis", parameters, [])
    assert resolves("N4Parameters.stages", parameters, [])
    for gone in ("estimate.shrink_per_axis", "shrink_per_axis", "N4Parameters.doublings", "stages"):
        assert not resolves(gone, parameters, [])
