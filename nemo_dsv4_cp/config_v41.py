# SPDX-License-Identifier: Apache-2.0
"""The one changed line of a V4.1 recipe; V4's is in :mod:`nemo_dsv4_cp.config`."""

from __future__ import annotations

from typing import Any

from nemo_automodel.components.models.deepseek_v41.config import DeepseekV41Config

from nemo_dsv4_cp.automodel import contracts
from nemo_dsv4_cp.config import ContextParallelConfig
from nemo_dsv4_cp.options import ContextParallelOptions


class DeepseekV41ContextParallelConfig(ContextParallelConfig, DeepseekV41Config):
    """V4.1's config whose model trains with context parallelism.

    Everything is AutoModel's ``DeepseekV41Config`` but for ``context_parallel``, whose options are
    those of V4.

    Args:
        context_parallel: The options, as a mapping or :class:`ContextParallelOptions`.
        **kwargs: AutoModel's fields.

    Raises:
        ValueError: For options that cannot work, before any model is built.
        ImportError: If the installed AutoModel lacks what we build on; ``enabled: false`` checks
            nothing and patches nothing.
    """

    automodels = DeepseekV41Config
    automodels_architecture = "DeepseekV41ForCausalLM"
    architecture = "DeepseekV41ContextParallelForCausalLM"

    # transformers makes a dataclass of a config without a constructor of its own.
    def __init__(self, *, context_parallel: Any = None, **kwargs: Any):
        super().__init__(context_parallel=context_parallel, **kwargs)

    def check(self, options: ContextParallelOptions) -> None:
        """Check the lengths that compress ratios need, and which layers have candidates."""
        text = self.text_config
        options.resolve_pad_multiple(text.compress_ratios[: text.num_hidden_layers])
        if not options.enabled:
            return
        contracts.check_v41()
        chosen_by = text.candidate_source_layer_id
        later = [layer for layer in text.kv_source_layer_ids if layer > chosen_by >= 0]
        if later and later[0] < text.num_hidden_layers:
            raise ValueError(
                f"candidate_source_layer_id={chosen_by} is followed by layer {later[0]} of "
                "kv_source_layer_ids, whose entries the candidates do not count; use "
                f"{text.kv_source_layer_ids[-1]}, or -1 for none"
            )
        options.check_model(text.compress_ratios, v41=True)
