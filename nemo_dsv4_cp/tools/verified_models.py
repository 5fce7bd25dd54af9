# SPDX-License-Identifier: Apache-2.0
"""The two models that ``verify`` compares, AutoModel's and ours, shrunk: of V4 or of V4.1.

And the sizes at which it compares kernels.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from nemo_automodel.components.models.common import BackendConfig

from nemo_dsv4_cp.automodel.contracts import check_v41
from nemo_dsv4_cp.checks.model_layers import SIZES
from nemo_dsv4_cp.tools import shrinking
from nemo_dsv4_cp.tools.byte_tokenizer import byte_tokenizer
from nemo_dsv4_cp.tools.sizes import is_v41

_V41 = "nemo_automodel.components.models.deepseek_v41"


def shrunk(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a small config with every kind of layer of the given one.

    Raises:
        ImportError: If this is a V4.1 config and AutoModel has no V4.1.
        ValueError: If the config cannot be made.
    """
    if not is_v41(fields):
        return shrinking.shrink(fields)
    return shrinking.shrink_v41(_text_config_v41(fields), fields.get("context_parallel"))


def _text_config_v41(fields: Mapping[str, Any]) -> Any:
    """Return the text config of V4.1's fields, AutoModel's defaults beneath."""
    check_v41()
    text = {k: v for k, v in (fields.get("text_config") or {}).items() if not k.startswith("_")}
    return importlib.import_module(f"{_V41}.config").DeepseekV41TextConfig(**text)


def kernel_sizes(fields: Mapping[str, Any]) -> Any:
    """Return the fields on which kernels depend, at full size, of a config of V4 or V4.1.

    AutoModel's defaults stand beneath. V4.1's are those of V4.1-Flash.

    Raises:
        ImportError: If this is a V4.1 config and AutoModel has no V4.1.
        ValueError: If the config cannot be made.
    """
    if is_v41(fields):
        return _text_config_v41(fields)
    from nemo_dsv4_cp.config import DeepseekV4ContextParallelConfig

    given = {name: fields[name] for name in SIZES if fields.get(name) is not None}
    return DeepseekV4ContextParallelConfig(**given)


def config_of(fields: Mapping[str, Any]) -> Any:
    """Return our config with these fields.

    Raises:
        ValueError: If it cannot be made.
    """
    if is_v41(fields):
        from nemo_dsv4_cp.config_v41 import DeepseekV41ContextParallelConfig

        return DeepseekV41ContextParallelConfig(**fields)
    from nemo_dsv4_cp.config import DeepseekV4ContextParallelConfig

    return DeepseekV4ContextParallelConfig(**fields)


def models_of(fields: Mapping[str, Any], settings: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return AutoModel's model and ours, in plain torch.

    Args:
        fields: Of the config.
        settings: The constructors' other arguments.
    """
    config = config_of(fields)
    backend = BackendConfig(
        attn="sdpa",
        linear="torch",
        rms_norm="torch_fp32",
        experts="torch",
        dispatcher="torch",
        rope_fusion=False,
        enable_hf_state_dict_adapter=False,
    )
    if is_v41(fields):
        return _v41_models(config, backend, settings)
    from nemo_automodel.components.models.deepseek_v4.model import DeepseekV4ForCausalLM

    from nemo_dsv4_cp.model import DeepseekV4ContextParallelForCausalLM

    reference = DeepseekV4ForCausalLM(config, backend=backend, **settings)
    return reference, DeepseekV4ContextParallelForCausalLM(config, backend=backend, **settings)


def _v41_models(config: Any, backend: Any, settings: Mapping[str, Any]) -> tuple[Any, Any]:
    from nemo_automodel.components.models.deepseek_v41.engram import DeepseekV41Engram
    from nemo_automodel.components.models.deepseek_v41.model import DeepseekV41ForCausalLM

    from nemo_dsv4_cp.model_v41 import DeepseekV41ContextParallelForCausalLM

    def build(cls: Any) -> Any:
        model = cls(config, backend=backend, tokenizer=byte_tokenizer(), **settings)
        for layer, block in model.model.layers.items():
            if block.engram is not None:
                # Whole: by default a rank holds its part of the table, which expert parallelism
                # alone distributes.
                block.engram = DeepseekV41Engram(config.text_config, int(layer), backend)
        return model

    reference = build(DeepseekV41ForCausalLM)
    reference.register_forward_pre_hook(_for_losses_of_hidden_states, with_kwargs=True)
    return reference, build(DeepseekV41ContextParallelForCausalLM)


def _for_losses_of_hidden_states(model: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Have AutoModel's V4.1 return the final hidden states where its recipes need them.

    They pass ``output_hidden_states``, for which the model returns the streams before each block.
    """
    final = kwargs.pop("output_hidden_states", False)
    return args, kwargs | {"return_hidden_states": final}


@contextmanager
def unquantized() -> Iterator[None]:
    """Keep V4.1's keys as they are computed, in AutoModel's models and in ours.

    Rounding to 4 bits turns the last digit of float32 into a step.
    """
    from nemo_automodel.components.models.deepseek_v41 import attention as automodels

    from nemo_dsv4_cp.attention.layer_v41 import ContextParallelAttentionV41

    check_v41()  # of functions that are AutoModel's own
    quantize = automodels.quantize_cache
    automodels.quantize_cache = lambda values, **_: values
    ContextParallelAttentionV41.quantizes = False
    try:
        yield
    finally:
        automodels.quantize_cache = quantize
        ContextParallelAttentionV41.quantizes = True
