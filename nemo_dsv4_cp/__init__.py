# SPDX-License-Identifier: Apache-2.0
"""Context parallelism for DeepSeek-V4 and V4.1 in NeMo AutoModel, by one line of a recipe."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nemo_dsv4_cp.config import DeepseekV4ContextParallelConfig
    from nemo_dsv4_cp.config_v41 import DeepseekV41ContextParallelConfig
    from nemo_dsv4_cp.options import ContextParallelOptions

    __version__: str
    __all__ = [
        "ContextParallelOptions",
        "DeepseekV4ContextParallelConfig",
        "DeepseekV41ContextParallelConfig",
    ]


def __getattr__(name: str) -> Any:
    # On first use: importing AutoModel takes seconds, which commands without a model do not have.
    if name == "__all__":
        return _importable()
    if name == "ContextParallelOptions":
        from nemo_dsv4_cp.options import ContextParallelOptions

        return ContextParallelOptions
    if name == "DeepseekV4ContextParallelConfig":
        from nemo_dsv4_cp.automodel.contracts import check_v4

        check_v4()
        from nemo_dsv4_cp.config import DeepseekV4ContextParallelConfig

        return DeepseekV4ContextParallelConfig
    if name == "DeepseekV41ContextParallelConfig":
        from nemo_dsv4_cp.automodel.contracts import check_v41

        check_v41()
        from nemo_dsv4_cp.config_v41 import DeepseekV41ContextParallelConfig

        return DeepseekV41ContextParallelConfig
    if name == "__version__":
        from importlib.metadata import version  # pyproject.toml alone states it

        return version("nemo-dsv4-cp")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _importable() -> list[str]:
    """Return what ``import *`` takes: V4.1's config only from an AutoModel that has V4.1."""
    from nemo_dsv4_cp.automodel.contracts import has_v41

    names = ["ContextParallelOptions", "DeepseekV4ContextParallelConfig"]
    return [*names, "DeepseekV41ContextParallelConfig"] if has_v41() else names
