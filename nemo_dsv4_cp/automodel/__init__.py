# SPDX-License-Identifier: Apache-2.0
"""All that this package knows of AutoModel's releases and their private places."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nemo_dsv4_cp.automodel.legacy.cp_utils import make_cp_batch_and_ctx

__all__ = ["make_cp_batch_and_ctx"]


def __getattr__(name: str) -> Any:
    # On first use: `doctor` reads the tested releases where AutoModel is not installed.
    if name in __all__:
        from nemo_dsv4_cp.automodel.legacy import cp_utils

        return getattr(cp_utils, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
