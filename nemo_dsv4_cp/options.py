# SPDX-License-Identifier: Apache-2.0
"""The ``context_parallel`` block of a model config, validated once when it is created."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from omegaconf import OmegaConf

from nemo_dsv4_cp import plugins
from nemo_dsv4_cp.sequence.layout import OVERLAP_RATIO, local_seq_multiple

AUTO = "auto"
COMPRESSOR_PRECISIONS = ("float32", "bf16x3")
_FLAGS = ("true", "false", "yes", "no", "on", "off", "y", "n", "1", "0")
_TYPES = {
    "bool": "true or false",
    "str": "a name",
    "bool | str": "a word, or true or false",
    "int | str": "auto, or an integer without quotes",
    "float": "a number",
    "IndexerLoss": "a block",
}
"""What the options are, by their annotations."""
_BLOCK = "IndexerLoss"
_PLUGGED = {
    "transport": plugins.TRANSPORTS,
    "kernels": plugins.KERNELS,
    "batch_function": plugins.BATCH_FNS,
}


def _shown(value: Any) -> str:
    """Return a value as YAML has it, text in quotes."""
    words = {True: "true", False: "false", None: "null"}
    return words[value] if isinstance(value, bool | None) else repr(value)


def _has_type(annotation: str, value: Any) -> bool:
    if annotation == "bool":  # any number but 0 would be taken for true
        return isinstance(value, bool | int | str) and str(value).lower() in _FLAGS
    if annotation == "int | str":
        quoted = isinstance(value, str) and value.isdigit()
        return isinstance(value, int | str) and not (quoted or isinstance(value, bool))
    if annotation == "float":
        return isinstance(value, int | float) and not isinstance(value, bool)
    if annotation == _BLOCK:
        return isinstance(value, IndexerLoss | Mapping)
    return isinstance(value, bool | str if annotation == "bool | str" else str)


def _refuse_unknown(block: Mapping[str, Any], options: type[Any], where: str) -> None:
    """Raise ``ValueError`` for a key that is no option, or whose value has the wrong type."""
    known = {field.name: field for field in dataclasses.fields(options)}
    for key, value in block.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            raise ValueError(
                f"{where}.{key}={_shown(value)} is not an option; "
                + (f"did you mean {near[0]!r}? " if near else "")
                + f"The options are {', '.join(known)}"
            )
        kind = str(known[key].type)
        if not _has_type(kind, value):
            works: Any = known[key].default
            raise ValueError(
                f"{where}.{key}={_shown(value)} has the wrong type (it is {_TYPES[kind]}); a value "
                f"that works is {_shown(dataclasses.asdict(works) if kind == _BLOCK else works)}"
            )


@dataclass(frozen=True)
class IndexerLoss:
    """The ``indexer_loss`` block: train the indexer to choose what attention attends to.

    Attributes:
        coefficient: The loss of all layers is multiplied by it; 0 leaves the indexer frozen.
        mode: Over which entries: ``"sparse"``, those that the query attends to, or ``"full"``, all
            that it may see, which costs dense attention.
    """

    coefficient: float = 0.0
    mode: str = "sparse"

    def __post_init__(self) -> None:
        if not (0 <= self.coefficient < float("inf")):
            raise ValueError(
                f"context_parallel.indexer_loss.coefficient={self.coefficient} is not a number of "
                "0 or more; use 0.01, or 0.0 for a frozen indexer"
            )
        if self.mode not in ("sparse", "full"):
            raise ValueError(
                f"context_parallel.indexer_loss.mode={self.mode!r} is neither sparse nor full; use "
                "sparse"
            )


@dataclass(frozen=True)
class ContextParallelOptions:
    """The ``context_parallel`` block of a model config, validated when it is created.

    The number of CP ranks is not an option: AutoModel's ``distributed.cp_size`` sets it.

    Attributes:
        enabled: False builds AutoModel's own model, unchanged.
        transport: How a rank gets the keys of other ranks; a name in ``nemo_dsv4_cp.transports``.
        kernels: The backend of top-k selection, attention, norms and rotary: a name in
            ``nemo_dsv4_cp.kernels``, or ``"auto"``: on GPUs the fastest of Triton, TileLang and
            torch whose results are right there, on CPUs torch.
        kernels_check: Before the first step on GPUs, what happens if named kernels compute wrong
            results there: ``"strict"`` raises, ``"warn"`` logs and trains with them. ``"off"`` runs
            nothing, and ``kernels: auto`` is then TileLang where ``backend.attn`` names it and
            it is installed, and otherwise torch.
        balance: Load-balance the queries of compressed layers across CP ranks, of V4.1 their top-k
            selection: ``"on"``, ``"off"``, or ``"auto"``, which does so where the time saved
            exceeds the cost of the transfer. YAML parses on and off as true and false, which mean
            the same.
        overlap: Overlap collectives with compute; False waits for each collective at once.
        pad_multiple: Of unpacked rows, a shard's length is padded to a multiple of this: ``"auto"``
            for the LCM that the compress ratios need, or a multiple of that LCM.
        pad_documents: True pads every document of packed rows to a multiple of ``pad_multiple``,
            as AutoModel does; False pads only the end of the row.
        compare_ranks: On which steps the ranks of a CP group compare the tokens and documents of
            their batches, and all raise if one rank refuses its batch: ``"first"``, ``"every"``
            or ``"never"``.
        batch_function: The function that shards a batch; a name in ``nemo_dsv4_cp.batch_fns``.
        workspace_mib: Memory limit of the intermediate results of one chunk of queries, in MiB;
            smaller is slower. ``"auto"`` for 512, or for 1/32 of a GPU's memory where attention
            runs in torch operations, which launch many kernels per chunk. All other memory is
            linear in the shard and in the compressed KV entries.
        compressor_precision: How compressors project activations of bfloat16 with weights of
            float32: ``"float32"`` as AutoModel does, on GPUs without tensor cores, or
            ``"bf16x3"``, three products of bfloat16 that are as accurate, with tensor cores.
            Activations of other dtypes, and projections that LoRA changed, stay in float32.
        keep_index_choice: Under activation checkpointing, keep the indexer's top-k indices
            ([L, index_topk] int32 per CSA layer) for the recomputation instead of computing them
            twice.
        indexer_loss: Whether and how the indexer is trained; see :class:`IndexerLoss`.
        train_only: ``"all"`` trains what AutoModel would, ``"indexer"`` the indexers alone, for a
            warm-up.
        check_finite: Check every module's output, and raise on all CP ranks with the first layer,
            rank and tensor that holds a NaN or an infinity. Waits for the device once per forward.
        failure_attribution: When ranks fail, print first which rank failed first, and its error.
            Replaces ``sys.excepthook`` of the process.
    """

    enabled: bool = True
    transport: str = "boundary"
    kernels: str = AUTO
    kernels_check: bool | str = "strict"
    balance: bool | str = AUTO
    overlap: bool = True
    pad_multiple: int | str = AUTO
    pad_documents: bool = False
    compare_ranks: str = "first"
    batch_function: str = "contiguous_shard"
    workspace_mib: int | str = AUTO
    compressor_precision: str = "float32"
    keep_index_choice: bool = True
    indexer_loss: IndexerLoss = IndexerLoss()
    train_only: str = "all"
    check_finite: bool = False
    failure_attribution: bool = False

    @classmethod
    def of(cls, config: Any) -> ContextParallelOptions:
        """Return the options of a model config; the defaults if it has no block."""
        options: ContextParallelOptions | None = getattr(config, "context_parallel", None)
        return options or cls()

    @classmethod
    def from_block(cls, block: ContextParallelOptions | Mapping[str, Any] | None) -> Any:
        """Create options from a YAML block, which may be any mapping; None gives the defaults.

        Raises:
            ValueError: For an unknown key or a value of the wrong type, with a fix.
        """
        if isinstance(block, cls):
            return block
        if block is not None and not isinstance(block, Mapping):
            raise ValueError(
                f"context_parallel={block!r} is not a mapping; write a block such as "
                "{enabled: true, transport: boundary}"
            )
        given = dict(block or {})
        _refuse_unknown(given, cls, "context_parallel")
        if isinstance(loss := given.get("indexer_loss"), Mapping):
            _refuse_unknown(loss, IndexerLoss, "context_parallel.indexer_loss")
        schema = OmegaConf.structured(cls)
        OmegaConf.set_readonly(schema.indexer_loss, False)  # or no key of it could be set
        return OmegaConf.to_object(OmegaConf.merge(schema, given))

    def __post_init__(self) -> None:
        for key, group in _PLUGGED.items():
            name, installed = getattr(self, key), plugins.names(group)
            if key == "kernels":
                installed = [AUTO, *installed]
            if name not in installed:
                near = difflib.get_close_matches(str(name).lower(), installed, n=1)
                raise ValueError(
                    f"context_parallel.{key}={name!r} is not installed; use one of "
                    f"{installed}, or install a distribution that offers it in the entry-point "
                    f"group {group!r}" + (f"; did you mean {near[0]!r}?" if near else "")
                )
        multiple = self.pad_multiple
        if multiple != AUTO and not (isinstance(multiple, int) and multiple > 0):
            raise ValueError(
                f'context_parallel.pad_multiple={multiple!r} is neither "auto" nor a positive '
                'integer; use "auto"'
            )
        if self.kernels_check is False:  # what YAML reads off as
            object.__setattr__(self, "kernels_check", "off")
        if self.kernels_check not in ("strict", "warn", "off"):
            raise ValueError(
                f"context_parallel.kernels_check={_shown(self.kernels_check)} is none of strict, "
                "warn and off; use strict"
            )
        if isinstance(self.balance, bool):  # what YAML reads on and off as
            object.__setattr__(self, "balance", "on" if self.balance else "off")
        if self.balance not in (AUTO, "on", "off"):
            raise ValueError(
                f"context_parallel.balance={self.balance!r} is none of auto, on and off; use auto"
            )
        if self.compare_ranks not in ("first", "every", "never"):
            raise ValueError(
                f"context_parallel.compare_ranks={self.compare_ranks!r} is none of first, every "
                "and never; use first"
            )
        if self.compressor_precision not in COMPRESSOR_PRECISIONS:
            raise ValueError(
                f"context_parallel.compressor_precision={self.compressor_precision!r} is none of "
                "float32 and bf16x3; use float32"
            )
        if self.train_only not in ("all", "indexer"):
            raise ValueError(
                f"context_parallel.train_only={self.train_only!r} is neither all nor indexer; use "
                "all"
            )
        if self.train_only == "indexer" and not self.trains_indexer:
            raise ValueError(
                "context_parallel.train_only=indexer without indexer_loss trains nothing; set "
                "indexer_loss: {coefficient: 0.01}, or train_only: all"
            )
        if self.trains_indexer and not self.enabled:
            raise ValueError(
                "context_parallel.enabled=false with indexer_loss.coefficient="
                f"{self.indexer_loss.coefficient}: AutoModel's own model freezes the indexer, and "
                "trains all else; use enabled: true, or leave indexer_loss and train_only out"
            )
        scratch = self.workspace_mib
        if scratch != AUTO and not (type(scratch) is int and scratch > 0):
            raise ValueError(
                f'context_parallel.workspace_mib={scratch!r} is neither "auto" nor a positive '
                'number of MiB; use "auto"'
            )

    @property
    def trains_indexer(self) -> bool:
        """Whether the indexer has a loss."""
        return self.indexer_loss.coefficient > 0

    @property
    def workspace_bytes(self) -> int | None:
        """What kernels may take as scratch at a time, None for what suits the device."""
        return None if self.workspace_mib == AUTO else int(self.workspace_mib) << 20

    def check_model(self, compress_ratios: Sequence[int] | None, *, v41: bool) -> None:
        """Refuse what a model cannot have.

        Args:
            compress_ratios: The model's ratios, one per layer; None if they are not known.
            v41: Whether it is DeepSeek-V4.1.

        Raises:
            ValueError: For options of V4's compressors and indexers that the model lacks.
        """
        precision, coefficient = self.compressor_precision, self.indexer_loss.coefficient
        if v41 and precision != "float32":
            raise ValueError(
                f"context_parallel.compressor_precision={precision} is not supported with "
                "DeepSeek-V4.1, where few layers have a compressor; use float32"
            )
        if v41 and self.trains_indexer:
            raise ValueError(
                f"context_parallel.indexer_loss.coefficient={coefficient} is not supported with "
                "DeepSeek-V4.1, whose index keys are quantized and frozen; use 0.0"
            )
        if self.trains_indexer and OVERLAP_RATIO not in (compress_ratios or (OVERLAP_RATIO,)):
            raise ValueError(
                f"context_parallel.indexer_loss.coefficient={coefficient} with compress_ratios "
                f"{compress_ratios}: only layers of ratio 4 have an indexer; use 0.0"
            )

    def resolve_pad_multiple(self, compress_ratios: Sequence[int] | None) -> int:
        """Return the number that a model's shard lengths must be a multiple of.

        Args:
            compress_ratios: The model's ratios, one per layer.

        Raises:
            ValueError: If ``pad_multiple`` breaks the LCM rule, or ``compress_ratios`` is not a
                list of integers of 0 or more.
        """
        of_layers = compress_ratios or ()
        if not isinstance(of_layers, Sequence) or any(
            type(ratio) is not int or ratio < 0 for ratio in of_layers
        ):
            raise ValueError(
                f"compress_ratios={compress_ratios!r} is not a list of integers of 0 or more, one "
                "per layer, such as [0, 4, 128]"
            )
        ratios = sorted({ratio for ratio in of_layers if ratio})
        needed = local_seq_multiple(ratios)
        if self.pad_multiple == AUTO:
            return needed
        multiple = int(self.pad_multiple)
        if multiple % needed:
            raise ValueError(
                f"context_parallel.pad_multiple={multiple} is not a multiple of {needed}, the LCM "
                f"that compress_ratios {ratios} need; use {-(-multiple // needed) * needed} "
                'or "auto"'
            )
        return multiple
