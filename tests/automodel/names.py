# SPDX-License-Identifier: Apache-2.0
"""Every name in AutoModel's modules and classes, to see which of them a plugin replaced."""

import sys
from types import ModuleType


def names():
    """Return what each name stands for now."""
    found = {}
    for path, module in list(sys.modules.items()):
        if path.startswith("nemo_automodel") and isinstance(module, ModuleType):
            for name, value in list(vars(module).items()):
                found[path, name] = value
                if isinstance(value, type) and value.__module__ == path:
                    found |= {(path, name, key): v for key, v in vars(value).items()}
    return found


def changed(before):
    """Return the names that stand for something else than before."""
    after = names()
    return sorted(".".join(key) for key, value in before.items() if after.get(key) is not value)
