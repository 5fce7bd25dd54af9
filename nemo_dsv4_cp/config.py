"""The one changed line of a recipe: V4's config with a validated ``context_parallel`` block."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from nemo_automodel.components.models.deepseek_v4.config import DeepseekV4Config
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_dsv4_cp import plugins
from nemo_dsv4_cp.host import contracts, registration
from nemo_dsv4_cp.sequence.layout import local_seq_multiple

HOST_ARCHITECTURE = "DeepseekV4ForCausalLM"
ARCHITECTURE = "DeepseekV4ContextParallelForCausalLM"


@dataclass(frozen=True)
class ContextParallelOptions:
    """The ``context_parallel`` block of a model config, checked when it is made.

    The number of CP ranks is not here: the host's ``distributed.cp_size`` is its one source.

    Attributes:
        enabled: False gives the host's own model, untouched.
        transport: How a rank sees other ranks' keys; a name in ``nemo_dsv4_cp.transports``.
        pad_multiple: What a shard's length is a multiple of: ``"auto"`` for the LCM that the
            compress ratios need, or a multiple of that LCM.
        pad_documents: Pad every document of packed rows to a multiple of ``pad_multiple``, as the
            host does; else documents lie end to end and only the row's end is padded.
        compare_ranks: When the ranks of a CP group compare the sizes and documents of their
            batches: ``"first"`` step, ``"every"`` step or ``"never"``.
        batch_fn: How a batch is cut; a name in ``nemo_dsv4_cp.batch_fns``.
        workspace_mib: How much a chunk of scores or of float32 rows may take, in MiB: less is
            slower. Memory beside it is linear in the shard and the entries.
        keep_index_choice: Hand the indexer's choice to the recomputation of activation
            checkpointing ([L, index_topk] int32 a CSA layer) instead of computing it twice.
    """

    enabled: bool = True
    transport: str = "boundary"
    pad_multiple: int | str = "auto"
    pad_documents: bool = False
    compare_ranks: str = "first"
    batch_fn: str = "contiguous_shard"
    workspace_mib: int = 256
    keep_index_choice: bool = True

    @classmethod
    def from_block(cls, block: ContextParallelOptions | Mapping[str, Any] | None) -> Any:
        """Make options of a YAML block (a mapping, OmegaConf's included); None gives the defaults.

        Raises:
            ValueError: For an unknown key or a value of the wrong type, naming both and the fix.
        """
        if isinstance(block, cls):
            return block
        if block is not None and not isinstance(block, Mapping):
            raise ValueError(
                f"context_parallel={block!r} is not a mapping; write a block such as "
                "{enabled: true, transport: boundary}"
            )
        known = [field.name for field in dataclasses.fields(cls)]
        for key, value in (block or {}).items():
            if key not in known:
                near = difflib.get_close_matches(str(key), known, n=1)
                raise ValueError(
                    f"context_parallel.{key}={value!r} is not an option; "
                    + (f"did you mean {near[0]!r}? " if near else "")
                    + f"The options are {', '.join(known)}"
                )
            try:
                OmegaConf.merge(OmegaConf.structured(cls), {key: value})
            except OmegaConfBaseException as error:
                default = getattr(cls, key)
                raise ValueError(
                    f"context_parallel.{key}={value!r} has the wrong type "
                    f"({str(error).splitlines()[0]}); a value that works is {default!r}"
                ) from error
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(cls), dict(block or {})))

    def __post_init__(self) -> None:
        for key, group in (("transport", plugins.TRANSPORTS), ("batch_fn", plugins.BATCH_FNS)):
            name, installed = getattr(self, key), plugins.names(group)
            if name not in installed:
                raise ValueError(
                    f"context_parallel.{key}={name!r} is not installed; use one of "
                    f"{installed}, or install a distribution that offers it in the entry-point "
                    f"group {group!r}"
                )
        multiple = self.pad_multiple
        if multiple != "auto" and not (isinstance(multiple, int) and multiple > 0):
            raise ValueError(
                f'context_parallel.pad_multiple={multiple!r} is neither "auto" nor a positive '
                'integer; use "auto"'
            )
        if self.compare_ranks not in ("first", "every", "never"):
            raise ValueError(
                f"context_parallel.compare_ranks={self.compare_ranks!r} is none of first, every "
                "and never; use first"
            )
        if self.workspace_mib < 1:
            raise ValueError(
                f"context_parallel.workspace_mib={self.workspace_mib} is not a positive number of "
                "MiB; use 256"
            )

    def resolve_pad_multiple(self, compress_ratios: Iterable[int] | None) -> int:
        """Return the shard-length multiple that these options mean for a model.

        Args:
            compress_ratios: The model's ratios, one a layer.

        Raises:
            ValueError: If ``pad_multiple`` breaks the LCM rule.
        """
        ratios = sorted({int(ratio) for ratio in compress_ratios or () if int(ratio) > 0})
        needed = local_seq_multiple(ratios)
        if self.pad_multiple == "auto":
            return needed
        multiple = int(self.pad_multiple)
        if multiple % needed:
            raise ValueError(
                f"context_parallel.pad_multiple={multiple} is not a multiple of {needed}, the LCM "
                f"that compress_ratios {ratios} need; use {-(-multiple // needed) * needed} "
                'or "auto"'
            )
        return multiple


def _refuse_misspelt_block(fields: Mapping[str, Any]) -> None:
    # transformers drops unknown fields without a word, and the block with them.
    others = [str(key) for key in fields if key != "context_parallel"]
    near = difflib.get_close_matches("context_parallel", others, 1, 0.85)
    if near:
        raise ValueError(f"{near[0]}={fields[near[0]]!r}: the block is called context_parallel")


class DeepseekV4ContextParallelConfig(DeepseekV4Config):
    """V4's config whose model trains with context parallelism.

    Everything is the host's ``DeepseekV4Config`` but for ``context_parallel``. A saved config names
    the host's architecture and drops the block, so that checkpoints load without this package, and
    any V4 checkpoint loads with it.

    Args:
        context_parallel: The options, as a mapping or :class:`ContextParallelOptions`.
        **kwargs: The host's fields.

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
        self._context_parallel: ContextParallelOptions = options
        self.architectures = [ARCHITECTURE if options.enabled else HOST_ARCHITECTURE]
        if options.enabled:
            contracts.check()
            registration.register(ARCHITECTURE)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Make a config of a dictionary and overrides, the host's way.

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
        fields["architectures"] = [HOST_ARCHITECTURE]
        return fields
