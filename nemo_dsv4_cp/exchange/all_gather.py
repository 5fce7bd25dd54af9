# SPDX-License-Identifier: Apache-2.0
"""Full all-gather: every rank receives every token, as on AutoModel's own path.

# B batch rows   L local tokens   S global tokens   T rows of an answer
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from nemo_dsv4_cp.exchange.collectives import Pending
from nemo_dsv4_cp.exchange.transport import Transport
from nemo_dsv4_cp.sequence.queries import Runs
from nemo_dsv4_cp.sequence.row_plan import RowPlan, take


class AllGatherTransport(Transport):
    """Gathers whole tensors: simple, and linear in S."""

    def fetch(
        self, tensors: Mapping[str, torch.Tensor], plans: Mapping[str, RowPlan]
    ) -> Pending[dict[str, torch.Tensor]]:
        """Start to gather each tensor [B, L, ...] once, and take of [B, S, ...] what is wanted."""
        moving = {id(tensor): tensor for name, tensor in tensors.items() if plans[name].moves}
        gathers = {key: self.gather(tensor) for key, tensor in moving.items()}

        def wait() -> dict[str, torch.Tensor]:
            whole = {key: gather.wait() for key, gather in gathers.items()}
            return {
                name: _tokens(whole[id(tensor)], plans[name].wanted)
                if plans[name].moves
                else plans[name].answer(take(tensor, plans[name].own), None)
                for name, tensor in tensors.items()
            }

        return Pending(wait)


def _tokens(whole_BSF: torch.Tensor, wanted: Runs) -> torch.Tensor:
    """Return tokens of whole rows in the order wanted, zeros before the first: [B, T, ...]."""
    parts = []
    for run in wanted:
        if run.start < 0:
            missing = min(run.stop, 0) - run.start
            parts.append(whole_BSF.new_zeros(whole_BSF.shape[0], missing, *whole_BSF.shape[2:]))
        parts.append(whole_BSF[:, max(run.start, 0) : max(run.stop, 0)])
    return torch.cat(parts, dim=1) if parts else whole_BSF[:, :0]
