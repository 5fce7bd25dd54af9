# SPDX-License-Identifier: Apache-2.0
"""What AutoModel's source reads of a model, found with ``ast``.

The searches go by the names on which our classes differ from AutoModel's, wherever AutoModel may
read such a name of a model. So a read that a new release adds is found.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

_V4 = "components/models/deepseek_v4"
_SHARED = "components/models/common"


@dataclass(frozen=True)
class Place:
    """Where AutoModel's source reads something.

    Attributes:
        file: Path below the package.
        scope: The function, or the variable of a module that is assigned.
        line: Line number.
    """

    file: str
    scope: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line} ({self.scope})"


@dataclass(frozen=True)
class NameTest:
    """A condition on the name of a class, or on the module that it is defined in."""

    place: Place
    of_module: bool
    holds: Callable[[str], bool]


@functools.cache
def sources() -> dict[str, str]:
    """Return AutoModel's files that may meet a V4 model, which leaves out other models."""
    spec = find_spec("nemo_automodel")
    assert spec is not None and spec.origin is not None
    root = Path(spec.origin).parent
    found = {}
    for path in sorted(root.rglob("*.py")):
        file = path.relative_to(root).as_posix()
        if not file.startswith("components/models/") or file.startswith((f"{_V4}/", f"{_SHARED}/")):
            found[file] = path.read_text(encoding="utf-8")
    return found


def places_of(names: Iterable[str]) -> dict[str, list[Place]]:
    """Return where each name is read of a model, or of a part of one.

    That is as an attribute of a variable that is named like a model, as an argument of ``getattr``
    and its like, in a collection (which loops over names go through), or as what ``in`` looks for.
    """
    found: dict[str, list[Place]] = {name: [] for name in names}
    for file in _files_with(found):
        for node, scope in _scoped(file):
            for name in _names_read(node, file):
                if name in found:
                    found[name].append(Place(file, scope, getattr(node, "lineno", 0)))
    return found


@functools.cache
def class_dict_reads() -> set[str]:
    """Return the names that are looked up in a class's own ``__dict__``, without its bases."""
    found = set()
    for file in _files_with(["__dict__"]):
        for node, _ in _scoped(file):
            match node:
                case ast.Compare(left=ast.Constant(str(name)), comparators=[ast.Attribute(attr=a)]):
                    found |= {name} if a == "__dict__" else set()
                case ast.Call(
                    func=ast.Attribute(value=ast.Attribute(attr="__dict__"), attr="get"),
                    args=[ast.Constant(str(name)), *_],
                ):
                    found.add(name)
    return found


def uses_of_classes(names: set[str]) -> dict[tuple[str, str], set[str]]:
    """Return where classes of these names are recognized by name or identity, by file and scope.

    A subclass is not found there: strings that hold such a name (``{"DeepseekV4Model", ...}``,
    qualified names), keys of dictionaries and comparisons (``type(x) is DeepseekV4Model``).
    ``isinstance`` and calls are left out, which subclasses pass.
    """
    found: dict[tuple[str, str], set[str]] = {}
    for file in _files_with(names):
        for node, scope in _scoped(file):
            for name in _classes_compared(node, names):
                found.setdefault((file, scope), set()).add(name)
    return found


@functools.cache
def name_tests() -> list[NameTest]:
    """Return the conditions on ``__name__`` and ``__module__`` of classes that are written out."""
    found = []
    for file, text in sources().items():
        if not _CLASS_NAME.search(_REPLACEMENT_FIELD.sub("", text)):
            continue
        for node, scope in _scoped(file):
            for of_module in (False, True):
                holds = _condition(node, of_module=of_module)
                if holds is not None:
                    found.append(NameTest(Place(file, scope, node.lineno), of_module, holds))
    return found


_CLASS_NAME = re.compile(r"\b(?:__name__|__qualname__|__module__)\b(?!\))")
_REPLACEMENT_FIELD = re.compile(r"\{[^{}]*\}")  # of a message, which decides nothing

_PREDICATE = re.compile(r"_?(is|has|supports?|uses?|should|needs?|requires?|can|owns?|keeps?)_")
_SUBJECTS = ("model", "module", "model_part", "part", "layer", "block", "config", "hf_config")


def predicates() -> Iterator[tuple[str, str, str]]:
    """Yield functions that decide by a model, module or config alone.

    Yields:
        Module, function and the parameter's name.
    """
    for file in sources():
        if not re.search(rf"^def {_PREDICATE.pattern}", sources()[file], re.MULTILINE):
            continue
        for node in ast.parse(sources()[file]).body:
            if not isinstance(node, ast.FunctionDef) or not _PREDICATE.match(node.name):
                continue
            taken, defaults = node.args.posonlyargs + node.args.args, node.args.defaults
            if len(taken) - len(defaults) == 1 and taken[0].arg in _SUBJECTS:
                module = file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
                yield f"nemo_automodel.{module}", node.name, taken[0].arg


_HOLDS_A_MODEL = re.compile(
    r"model|mod$|module|part|layer|block|attn|attention|mlp|moe|gate|mtp|expert|backbone|stage"
    r"|child|inner|wrapped|target|root|owner|base|sub|candidate|transformer|tower|draft|linear"
    r"|proj|emb|head|rotary|config|cfg|capabilities|supports|^(_?mp?|cls|obj|v|c|cur)$"
)
# Files whose classes are parts of a V4 model, or its bases: there, `self` is one.
_OF_V4 = re.compile(rf"({_V4}|{_SHARED}|components/moe)/")


def _names_read(node: ast.AST, file: str) -> Iterator[str | None]:
    match node:
        case ast.Attribute(value=value, attr=name):
            holder = _variable(value)
            if _HOLDS_A_MODEL.search(holder) or (holder == "self" and _OF_V4.match(file)):
                yield name
        case ast.Call(
            func=ast.Name("getattr" | "hasattr" | "setattr" | "delattr"), args=[value, name, *_]
        ) if _HOLDS_A_MODEL.search(_variable(value)) or _variable(value) == "self":
            yield _string(name)
        case ast.Tuple(elts=elements) | ast.List(elts=elements) | ast.Set(elts=elements):
            yield from map(_string, elements)
        case ast.Compare(left=left, ops=[ast.In() | ast.NotIn()]):
            yield _string(left)


def _variable(node: ast.expr) -> str:
    """Return the last name of an expression in lower case: ``parts`` of ``self.parts[0]``."""
    while True:
        match node:
            case ast.Subscript(value=inner) | ast.Call(func=ast.Name("type"), args=[inner]):
                node = inner
            case ast.Call(func=ast.Name("getattr"), args=[_, ast.Constant(str(name)), *_]):
                return name.lower()
            case ast.Call(func=inner):
                node = inner
            case ast.Attribute(attr=name) | ast.Name(id=name):
                return name.lower()
            case _:
                return ""


def _files_with(names: Iterable[str]) -> Iterator[str]:
    # Parsing all takes longer than the tests may.
    words = [rf"\b{re.escape(name)}\b" for name in names]
    wanted = re.compile("|".join(words) or "(?!)")
    return (file for file, text in sources().items() if wanted.search(text))


def _scoped(file: str) -> Iterator[tuple[ast.AST, str]]:
    """Yield all nodes with the name of the function or variable that they are part of."""
    tree = _tree(file)
    stack: list[tuple[ast.AST, str]] = [(node, "") for node in reversed(tree.body)]
    while stack:
        node, scope = stack.pop()
        if isinstance(node, ast.Expr) and _string(node.value) is not None:
            continue  # a docstring
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                scope = f"{scope}.{node.name}".lstrip(".")
            case ast.Assign(targets=[target, *_]) | ast.AnnAssign(target=target) if not scope:
                base = target
                while isinstance(base, (ast.Attribute, ast.Subscript)):
                    base = base.value
                scope = base.id if isinstance(base, ast.Name) else ""
        yield node, scope
        stack += [(child, scope) for child in reversed(list(_children(node)))]


def _children(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the parts of a node that are executed, which annotations are not."""
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield child


@functools.cache
def _tree(file: str) -> ast.Module:
    return ast.parse(sources()[file])


def _string(node: ast.AST | None) -> str | None:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def _classes_compared(node: ast.AST, names: set[str]) -> Iterator[str]:
    text = _string(node)
    if text is not None and " " not in text:
        yield from (name for name in names if name in text.split("."))
    compared: list[ast.expr | None] = []
    if isinstance(node, ast.Dict):
        compared = list(node.keys)
    elif isinstance(node, ast.Compare):
        compared = [node.left, *node.comparators]
    for expression in compared:
        for part in ast.walk(expression) if expression is not None else ():
            name = getattr(part, "id", getattr(part, "attr", None))
            if name in names and not isinstance(part, ast.Call):
                yield name


def _condition(node: ast.AST, *, of_module: bool) -> Callable[[str], bool] | None:
    """Return what a comparison with written-out strings, or ``startswith``, tests about a name."""
    match node:
        case ast.Compare(left=ast.Constant(str(text)), ops=[ast.In() | ast.NotIn()]) if _reads(
            node.comparators[0], of_module
        ):
            return lambda name: text in name
        case ast.Compare(left=left, comparators=[right]) if _reads(left, of_module):
            texts = _strings(right)
            return (lambda name: name in texts) if texts else None
        case ast.Call(
            func=ast.Attribute(value=value, attr="startswith" | "endswith" as method), args=[prefix]
        ) if _reads(value, of_module):
            texts = _strings(prefix)
            return (lambda name: getattr(name, method)(texts)) if texts else None
    return None


def _reads(node: ast.AST, of_module: bool) -> bool:
    attributes = ("__module__",) if of_module else ("__name__", "__qualname__")
    return any(getattr(part, "attr", _string(part)) in attributes for part in ast.walk(node))


def _strings(node: ast.AST) -> tuple[str, ...]:
    """Return a string, or the strings of a tuple, list or set."""
    elements = node.elts if isinstance(node, (ast.Tuple, ast.List, ast.Set)) else [node]
    return tuple(text for text in map(_string, elements) if text is not None)
