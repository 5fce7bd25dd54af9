# SPDX-License-Identifier: Apache-2.0
"""Names of AutoModel that were replaced: each once, and each can be given back."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

_replaced: list[tuple[Any, str, Any, Any]] = []


def replace(owner: Any, name: str, new: Any) -> None:
    """Put ``new`` in the place of an attribute of a module or class."""
    _replaced.append((owner, name, getattr(owner, name), new))
    setattr(owner, name, new)


def replace_everywhere(name: str, original: Any, new: Any) -> None:
    """Put ``new`` in the place of a function in every module that has imported it by its name."""
    for module in list(sys.modules.values()):
        if getattr(module, "__dict__", {}).get(name) is original:
            replace(module, name, new)


def wrap(owner: Any, name: str, around: Callable[..., Any], *, everywhere: bool = False) -> None:
    """Have ``around(original, ...)`` called in the place of a function, once.

    ``everywhere``: in every module that has imported it by its name, too.
    """
    if is_replaced(owner, name):
        return
    original = getattr(owner, name)

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return around(original, *args, **kwargs)

    if everywhere:
        replace_everywhere(name, original, wrapped)
    else:
        replace(owner, name, wrapped)


def is_replaced(owner: Any, name: str) -> bool:
    """Whether the attribute is one that was put there."""
    found = getattr(owner, name)
    return any(new is found for _, known, _, new in _replaced if known == name)


def was_replaced(owner: Any, name: str) -> bool:
    """Whether something was put there, which another may stand on top of since."""
    return any(known_owner is owner and known == name for known_owner, known, _, _ in _replaced)


def replaced_names() -> list[str]:
    """Return what is replaced, as ``module.name`` without AutoModel's prefix, each name once."""
    names = set()
    for owner, name, _, _ in _replaced:
        path = f"{owner.__module__}.{owner.__name__}" if isinstance(owner, type) else owner.__name__
        names.add(f"{path}.{name}".removeprefix("nemo_automodel."))
    return sorted(names)


def undo() -> None:
    """Give everything back, to modules too that imported a replacement since."""
    while _replaced:
        owner, name, original, new = _replaced.pop()
        setattr(owner, name, original)
        for module in list(sys.modules.values()):
            if getattr(module, "__dict__", {}).get(name) is new:
                setattr(module, name, original)
