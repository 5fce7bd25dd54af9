# SPDX-License-Identifier: Apache-2.0
"""V4.1's backbone under context parallelism: shared state for attention, a halo for Engram.

# B batch rows   L local tokens   H hashes of a token, of all Engram layers
"""

from __future__ import annotations

from typing import Any

import torch
from nemo_automodel.components.models.deepseek_v41.model import DeepseekV41Model

from nemo_dsv4_cp.attention.layer_v41 import SharedState, document_alignment
from nemo_dsv4_cp.attention.step import StepContext
from nemo_dsv4_cp.automodel.backbone_v41 import run_blocks
from nemo_dsv4_cp.checks.batch import check_rows
from nemo_dsv4_cp.exchange.collectives import Group, cp_enabled
from nemo_dsv4_cp.gpus import Gpu
from nemo_dsv4_cp.options import ContextParallelOptions


class ContextParallelModelV41(DeepseekV41Model):
    """AutoModel's V4.1 backbone on one rank's shard; at CP size 1 it is AutoModel's own."""

    options = ContextParallelOptions()
    gpu: Gpu | None = None
    """By whose rates ``balance: auto`` decides; None for the table's."""

    def forward(
        self,
        input_ids: torch.Tensor,
        *,
        position_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        output_hidden_states: bool = False,
        cp_group: Group | None = None,
        packed_seq_ids: torch.Tensor | None = None,
        **images: Any,
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...] | None]:
        """Run the backbone; the arguments and the result are those of AutoModel's.

        Args:
            input_ids: Token ids [B, L].
            position_ids: Of each token in its document, [B, L]; counting from 0 by default.
            attention_mask: [B, L], 1 = real, padding on the right of each document.
            output_hidden_states: Return the hidden streams before each block too.
            cp_group: CP group.
            packed_seq_ids: Number of each token's document, [B, L], 0 for padding.
            **images: At CP size 1 only.

        Returns:
            Hidden states [B, L, E], and the streams or None.

        Raises:
            ValueError: At CP size 1, if rows have padding before real tokens, or positions that
                do not count 0, 1, 2, ... without documents.
        """
        if not cp_enabled(cp_group):
            # AutoModel's attention checks this in every layer; ours attends by position only.
            check_rows(
                input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                packed=packed_seq_ids is not None,
            )
            if attention_mask is not None:
                attention_mask = attention_mask.expand_as(input_ids)
            own: Any = super().forward(
                input_ids,
                position_ids=position_ids,
                attention_mask=attention_mask,
                output_hidden_states=output_hidden_states,
                packed_seq_ids=packed_seq_ids,
                **images,
            )
            return own  # type: ignore[no-any-return]
        assert not any(each is not None for each in images.values()), "images passed checks"
        state = self.state_of(input_ids, cp_group, packed_seq_ids)
        step = state.step
        if position_ids is None:
            position_ids = step.layout.document_positions(input_ids.device)
            position_ids = position_ids.expand(len(input_ids), -1)
        real = torch.ones_like(input_ids, dtype=torch.bool)
        if attention_mask is not None:
            real = attention_mask.bool()
        hashes = None
        if self.engram_hash is not None:
            hashes = self._hashes(step, input_ids, real, packed_seq_ids)
        return run_blocks(
            self,
            input_ids,
            state,
            hashes=hashes,
            output_hidden_states=output_hidden_states,
            position_ids=position_ids,
            attention_mask=real,
            cp_group=cp_group,
            packed_seq_ids=packed_seq_ids,
        )

    def state_of(
        self, input_ids: torch.Tensor, cp_group: Group | None, documents: torch.Tensor | None
    ) -> SharedState:
        """Return the state before the first layer of a shard [B, L]; all ranks call this."""
        return SharedState.start(
            input_ids.shape[1],
            self.options,
            group=cp_group,
            documents_BL=documents,
            alignment=document_alignment(self.config),
            gpu=self.gpu,
        )

    def _hashes(
        self,
        step: StepContext,
        input_ids: torch.Tensor,
        real: torch.Tensor,
        documents: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return the Engram rows of each local token, int64 [B, L, layers, H].

        An n-gram ends with its token, so the first ones of a shard hold tokens of the shard before.
        """
        before = self.engram_hash.max_ngram_size - 1
        tensors = {"ids": input_ids, "real": real}
        if documents is not None:
            tensors["documents"] = documents
        rows = step.with_halo(tensors, before)
        hashes: torch.Tensor = self.engram_hash(
            rows["ids"], token_mask=rows["real"], sequence_ids=rows.get("documents")
        )
        return hashes[:, before:]
