"""Context parallelism for DeepSeek-V4 in NeMo AutoModel."""

from nemo_dsv4_cp.config import ContextParallelOptions, DeepseekV4ContextParallelConfig

__all__ = ["ContextParallelOptions", "DeepseekV4ContextParallelConfig"]
