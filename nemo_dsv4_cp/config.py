# SPDX-License-Identifier: Apache-2.0
"""The one changed line of a recipe: AutoModel's config with a validated ``context_parallel``."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from nemo_automodel.components.models.deepseek_v4.config import DeepseekV4Config

from nemo_dsv4_cp.automodel import contracts, registration
from nemo_dsv4_cp.automodel.legacy.auxiliary_loss import refuse_unscaled
from nemo_dsv4_cp.automodel.rope_scaling import resolve_rope_scaling
from nemo_dsv4_cp.checks import failure_attribution
from nemo_dsv4_cp.options import ContextParallelOptions

if TYPE_CHECKING:
    from transformers import PretrainedConfig
else:
    PretrainedConfig = object  # the class beside it brings transformers' own


def _refuse_misspelt_block(fields: Mapping[str, Any]) -> None:
    # transformers silently drops unknown fields, and the block with them.
    others = [str(key) for key in fields if key != "context_parallel"]
    near = difflib.get_close_matches("context_parallel", others, 1, 0.85)
    if near:
        raise ValueError(f"{near[0]}={fields[near[0]]!r}: the block is called context_parallel")


def _refuse_window(window: Any) -> None:
    # Of 0 AutoModel's layers make 128 and its mask no window at all.
    if type(window) is not int or window < 1:
        raise ValueError(
            f"sliding_window={window!r} is not an integer of 1 or more: a query sees itself "
            "and those before it; use 128"
        )


class ContextParallelConfig(PretrainedConfig):
    """A config with the block; subclasses inherit from AutoModel's config, too.

    A saved config names AutoModel's architecture and drops the block, so that checkpoints load
    without this package, and any checkpoint loads with it.

    Attributes:
        automodels: AutoModel's config class.
        automodels_architecture: The model that AutoModel builds by it.
        architecture: Ours.
    """

    automodels: ClassVar[type[Any]]
    automodels_architecture: ClassVar[str]
    architecture: ClassVar[str]

    def __init__(
        self,
        *,
        context_parallel: ContextParallelOptions | Mapping[str, Any] | None = None,
        **kwargs: Any,
    ):
        _refuse_misspelt_block(kwargs)
        super().__init__(**kwargs)
        self.context_parallel = context_parallel

    def check(self, options: ContextParallelOptions) -> None:
        """Refuse options that the config's fields rule out, and prepare fields for them.

        Raises:
            ValueError: With the setting and a fix.
            ImportError: If the installed AutoModel lacks what we build on.
        """
        raise NotImplementedError

    @property
    def context_parallel(self) -> ContextParallelOptions:
        """The options; setting them, as ``from_pretrained`` does with overrides, checks them."""
        return self._context_parallel

    @context_parallel.setter
    def context_parallel(self, block: ContextParallelOptions | Mapping[str, Any] | None) -> None:
        options = ContextParallelOptions.from_block(block)
        self.check(options)
        self._context_parallel: ContextParallelOptions = options
        name = self.architecture if options.enabled else self.automodels_architecture
        self.architectures = [name]
        if options.enabled:
            attribute = failure_attribution.install if options.failure_attribution else None
            registration.register(self.architecture, attribute_failures=attribute)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a pickled config, for which another process is to be patched as for a new one."""
        self.__dict__.update(state)
        if "_context_parallel" in state:
            self.context_parallel = state["_context_parallel"]

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Make a config of a dictionary and overrides, AutoModel's way.

        The block is applied last: it is checked against compress_ratios, which may be overridden
        beside it. Until then the config is disabled, so that one that stays so patches nothing.
        """
        _refuse_misspelt_block(kwargs)
        block = kwargs.pop("context_parallel", config_dict.get("context_parallel"))
        disabled = config_dict | {"context_parallel": {"enabled": False}}
        loaded = super().from_dict(disabled, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        config.context_parallel = block
        return loaded

    def to_dict(self) -> dict[str, Any]:
        """Return the plain config that any AutoModel can load."""
        fields: dict[str, Any] = self._as_automodels().to_dict()
        return fields

    # For the next two, transformers makes a config of the same class with defaults to compare with,
    # and one of ours is enabled by default.

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save the plain config that any AutoModel can load."""
        self._as_automodels().save_pretrained(save_directory, *args, **kwargs)

    def to_diff_dict(self) -> dict[str, Any]:
        """Return the plain config without AutoModel's defaults, as it is stored and printed."""
        fields: dict[str, Any] = self._as_automodels().to_diff_dict()
        return fields

    def _as_automodels(self) -> Any:
        plain: Any = object.__new__(self.automodels)
        plain.__dict__.update(vars(self))
        plain.__dict__.pop("_context_parallel", None)
        plain.architectures = [self.automodels_architecture]
        return plain


class DeepseekV4ContextParallelConfig(ContextParallelConfig, DeepseekV4Config):
    """V4's config whose model trains with context parallelism.

    Everything is AutoModel's ``DeepseekV4Config`` but for ``context_parallel``.

    Args:
        context_parallel: The options, as a mapping or :class:`ContextParallelOptions`.
        **kwargs: AutoModel's fields.

    Raises:
        ValueError: For options that cannot work, before any model is built.
        ImportError: If the installed AutoModel lacks what we build on; ``enabled: false`` checks
            nothing and patches nothing.
    """

    automodels = DeepseekV4Config
    automodels_architecture = "DeepseekV4ForCausalLM"
    architecture = "DeepseekV4ContextParallelForCausalLM"

    # transformers makes a dataclass of a config without a constructor of its own.
    def __init__(self, *, context_parallel: Any = None, **kwargs: Any):
        super().__init__(context_parallel=context_parallel, **kwargs)

    def check(self, options: ContextParallelOptions) -> None:
        """Check the window and the lengths that compress ratios need; resolve RoPE scaling."""
        options.resolve_pad_multiple(self.compress_ratios)
        if options.enabled:
            _refuse_window(self.sliding_window)
            self.rope_scaling: Any = resolve_rope_scaling(self.rope_scaling)
            contracts.check()
            coefficient = options.indexer_loss.coefficient
            refuse_unscaled("context_parallel.indexer_loss.coefficient", coefficient)
            options.check_model(self.compress_ratios[: self.num_hidden_layers], v41=False)
