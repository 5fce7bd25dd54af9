# SPDX-License-Identifier: Apache-2.0
"""The one changed line of a recipe: V4's config with a validated ``context_parallel`` block."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from nemo_automodel.components.models.deepseek_v4.config import DeepseekV4Config

from nemo_dsv4_cp.automodel import contracts, registration
from nemo_dsv4_cp.automodel.rope_scaling import resolve_rope_scaling
from nemo_dsv4_cp.options import ContextParallelOptions

AUTOMODEL_ARCHITECTURE = "DeepseekV4ForCausalLM"
ARCHITECTURE = "DeepseekV4ContextParallelForCausalLM"


def _refuse_misspelt_block(fields: Mapping[str, Any]) -> None:
    # transformers drops unknown fields without a word, and the block with them.
    others = [str(key) for key in fields if key != "context_parallel"]
    near = difflib.get_close_matches("context_parallel", others, 1, 0.85)
    if near:
        raise ValueError(f"{near[0]}={fields[near[0]]!r}: the block is called context_parallel")


def _refuse_window(window: Any) -> None:
    # Of 0 AutoModel's layers make 128 and its mask no window at all.
    if type(window) is not int or window < 1:
        raise ValueError(
            f"sliding_window={window!r} is not a whole number of 1 or more: a query sees itself "
            "and those before it; use 128"
        )


class DeepseekV4ContextParallelConfig(DeepseekV4Config):
    """V4's config whose model trains with context parallelism.

    Everything is AutoModel's ``DeepseekV4Config`` but for ``context_parallel``. A saved config
    names AutoModel's architecture and drops the block, so that checkpoints load without this
    package, and any V4 checkpoint loads with it.

    Args:
        context_parallel: The options, as a mapping or :class:`ContextParallelOptions`.
        **kwargs: AutoModel's fields.

    Raises:
        ValueError: For options that cannot work, before any model is built.
        ImportError: If the installed AutoModel lacks what we build on; ``enabled: false`` asks for
            nothing.
    """

    def __init__(
        self,
        *,
        context_parallel: ContextParallelOptions | Mapping[str, Any] | None = None,
        **kwargs: Any,
    ):
        _refuse_misspelt_block(kwargs)
        super().__init__(**kwargs)
        self.context_parallel = context_parallel

    @property
    def context_parallel(self) -> ContextParallelOptions:
        """The options; setting them, as ``from_pretrained`` does with overrides, checks them."""
        return self._context_parallel

    @context_parallel.setter
    def context_parallel(self, block: ContextParallelOptions | Mapping[str, Any] | None) -> None:
        options = ContextParallelOptions.from_block(block)
        options.resolve_pad_multiple(self.compress_ratios)
        if options.enabled:
            _refuse_window(self.sliding_window)
            self.rope_scaling: Any = resolve_rope_scaling(self.rope_scaling)
        self._context_parallel: ContextParallelOptions = options
        self.architectures = [ARCHITECTURE if options.enabled else AUTOMODEL_ARCHITECTURE]
        if options.enabled:
            contracts.check()
            registration.register(ARCHITECTURE)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Make a config of a dictionary and overrides, AutoModel's way.

        The block is applied last: it is checked against compress_ratios, which may be overridden
        beside it.
        """
        _refuse_misspelt_block(kwargs)
        block = kwargs.pop("context_parallel", config_dict.get("context_parallel"))
        loaded = super().from_dict(config_dict, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        config.context_parallel = block
        return loaded

    def to_dict(self) -> dict[str, Any]:
        """Return the plain V4 config that any AutoModel can load."""
        fields: dict[str, Any] = super().to_dict()
        fields.pop("_context_parallel", None)
        fields["architectures"] = [AUTOMODEL_ARCHITECTURE]
        return fields
