# SPDX-License-Identifier: Apache-2.0
"""How our models shard batches: AutoModel's contract ``prepare_model_inputs_for_cp``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nemo_dsv4_cp import plugins
from nemo_dsv4_cp.automodel.job import cp_size_of
from nemo_dsv4_cp.automodel.sharding import ContextParallelSharder
from nemo_dsv4_cp.batch import contiguous_shard, local_token_indices
from nemo_dsv4_cp.checks.consistency import compare_settings, settings_of
from nemo_dsv4_cp.exchange.collectives import Group
from nemo_dsv4_cp.options import ContextParallelOptions
from nemo_dsv4_cp.sequence.layout import validate_cp_size
from nemo_dsv4_cp.startup import padding_of_shard


class ShardsBatches:
    """The part of a model that shards batches: checked, and by the model's options."""

    # Set here, not by the constructor alone: AutoModel's tools make models without calling it.
    _batch_fn = staticmethod(contiguous_shard)
    _pad_multiple: int | None = None
    _pad_documents = ContextParallelOptions.pad_documents
    _compare_ranks = ContextParallelOptions.compare_ranks
    _padding = padding_of_shard(None, None, 1)
    _settings_are_one = False  # the ranks of the CP group compare them on the first step
    _routed_over: Group | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy starts with; its first forward sees to the routing anew."""
        return {name: value for name, value in vars(self).items() if name != "_routed_over"}

    def _shard_as(self, options: ContextParallelOptions, compress_ratios: Sequence[int]) -> None:
        """Take over the options of a model with layers of these ratios."""
        self._batch_fn = plugins.load(plugins.BATCH_FNS, options.batch_function)
        self._pad_multiple = options.resolve_pad_multiple(compress_ratios)
        self._pad_documents = options.pad_documents
        self._compare_ranks = options.compare_ranks

    @property
    def _text_config(self: Any) -> Any:
        """The config with the text backbone's fields."""
        return self.config.get_text_config()

    def prepare_model_inputs_for_cp(
        self, batch: dict[str, Any], *, num_chunks: int = 1
    ) -> dict[str, Any]:
        """Return the sharder of this model under ``cp_sharder``, AutoModel's contract."""
        return {
            "cp_sharder": ContextParallelSharder(
                shard_batch=self._shard_batch, local_token_global_indices=local_token_indices
            )
        }

    def _shard_batch(
        self: Any, cp_mesh: Any, tp_mesh: Any, batch: dict[str, Any], **kwargs: Any
    ) -> Any:
        if cp_mesh is not None and cp_mesh.size() > 1 and not self._settings_are_one:
            # Before all else, whatever the options are: they may be what differs.
            compare_settings(settings_of(self), cp_mesh.get_group())
            self._settings_are_one = True
        text = self._text_config
        if cp_mesh is not None:
            validate_cp_size(
                cp_mesh.size(),
                pad_multiple=self._pad_multiple or 1,
                max_seq_len=text.max_position_embeddings,
            )
        compare = self._compare_ranks != "never"
        if self._compare_ranks == "first":
            self._compare_ranks = "never"
        sharded = self._batch_fn(
            cp_mesh,
            tp_mesh,
            batch,
            pad_multiple=self._pad_multiple,
            pad_documents=self._pad_documents,
            compare_ranks=compare,
            sync_packed_length=self.backend.dispatcher == "hybridep",
            vocab_size=getattr(self.model.embed_tokens, "num_embeddings", text.vocab_size),
            **kwargs,
        )
        shape = sharded[2]
        if cp_mesh is not None and cp_mesh.size() > 1 and shape is not None:
            self._padding = padding_of_shard(
                shape.original_seq_len, shape.padded_seq_len, self._pad_multiple or 1
            )
        return sharded

    def _refuse_uncut_batch(self: Any, cut: bool) -> None:
        """Refuse to train under CP on a batch that this model's sharder did not cut.

        Raises:
            RuntimeError: Unless ``cut``, or without CP.
        """
        size = cp_size_of(self)
        if size > 1 and self.training and not cut:
            raise RuntimeError(
                f"distributed.cp_size={size}, and the recipe did not cut the batch with this "
                "model's prepare_model_inputs_for_cp; use a recipe that does, such as "
                "TrainFinetuneRecipeForNextTokenPrediction, or set distributed.cp_size: 1"
            )
