# SPDX-License-Identifier: Apache-2.0
"""Rows whose tokens can only be predicted from a single compressed entry, far before."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import Dataset

KEYS, VALUES, NOISE = 4, 8, 16
FILLER = KEYS + VALUES
VOCABULARY = FILLER + 1 + NOISE
RATIO = 4
"""Tokens of a record, as many as a compressed entry pools."""
ROW = 64 * RATIO
IGNORED = -100


class Recall(Dataset[dict[str, list[int]]]):
    """Key-value recall: half a row of noise that hides a record per key, half a row of keys.

    A record is a key, its value and filler. Where a key comes back, its value is the label; nothing
    else has one, and the values are not shown again.

    Args:
        num_samples: How many rows to serve.
        tokenizer: Not used; AutoModel 0.5 passes it to any dataset.
    """

    def __init__(self, num_samples: int, tokenizer: Any = None) -> None:
        self._num_samples = num_samples

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        """Row `index`: ids, labels of the same places, and an all-ones mask."""
        generator = torch.Generator().manual_seed(index)
        half = ROW // RATIO // 2
        values = torch.randint(VALUES, (KEYS,), generator=generator)
        hidden = torch.randperm(half, generator=generator)[:KEYS]
        asked = torch.cat([torch.randperm(KEYS, generator=generator) for _ in range(half // KEYS)])
        noise = FILLER + 1 + torch.randint(NOISE, (half, RATIO), generator=generator)
        noise[hidden] = FILLER
        noise[hidden, 0], noise[hidden, 1] = torch.arange(KEYS), KEYS + values
        questions = torch.full((half, RATIO), FILLER)
        questions[:, 0] = asked
        labels = torch.full((2 * half, RATIO), IGNORED)
        labels[half:, 0] = KEYS + values[asked]
        return {
            "input_ids": torch.cat((noise, questions)).flatten().tolist(),
            "labels": labels.flatten().tolist(),
            "attention_mask": [1] * ROW,
        }
