"""Context parallelism for DeepSeek-V4 in NeMo AutoModel, switched on by one line of a recipe."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nemo_dsv4_cp.config import ContextParallelOptions, DeepseekV4ContextParallelConfig

__all__ = ["ContextParallelOptions", "DeepseekV4ContextParallelConfig"]


def __getattr__(name: str) -> Any:
    # On first use: importing the host takes seconds, which commands without a model do not have.
    if name in __all__:
        from nemo_dsv4_cp.host.contracts import check_v4

        check_v4()
        from nemo_dsv4_cp import config

        return getattr(config, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
