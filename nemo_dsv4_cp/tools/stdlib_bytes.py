# SPDX-License-Identifier: Apache-2.0
"""Real text that every machine already has: the source files of Python's standard library."""

from __future__ import annotations

import sysconfig
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset


class StandardLibraryBytes(Dataset[dict[str, list[int]]]):
    """Windows of the standard library's source, one byte per token (a vocabulary of 256).

    Needs no download and no tokenizer, and every rank of a machine reads the same bytes. A recipe
    names it under `dataset`, and AutoModel's default collater batches what it yields.

    Args:
        seq_length: Tokens in a sample.
        num_samples: How many samples to serve; all that the files hold when None.
        shortest: Samples are of every length from this to ``seq_length``, for packing; all of
            ``seq_length`` when None.
        tokenizer: Not used; AutoModel 0.5 passes it to any dataset.
        split: Not used; AutoModel 0.5 reads it when it packs.
    """

    def __init__(
        self,
        seq_length: int,
        num_samples: int | None = None,
        shortest: int | None = None,
        tokenizer: Any = None,
        split: str = "train",
    ) -> None:
        if seq_length < 1:
            raise ValueError(f"dataset.seq_length={seq_length} must be at least 1")
        directory = Path(sysconfig.get_paths()["stdlib"])
        self._bytes = b"".join(path.read_bytes() for path in sorted(directory.glob("*.py")))
        self._seq_length = seq_length
        # The label of a window's last token is the byte that follows the window.
        held = max(len(self._bytes) - 1, 0) // seq_length
        if held == 0:
            raise ValueError(
                f"{directory} holds {len(self._bytes)} bytes of *.py files, too few for one sample "
                f"of dataset.seq_length={seq_length}; use a shorter one, or a Python that is "
                "installed with its sources"
            )
        if num_samples is not None and not 1 <= num_samples <= held:
            raise ValueError(
                f"dataset.num_samples={num_samples} is not between 1 and {held}, the samples of "
                f"dataset.seq_length={seq_length} that {directory} holds"
            )
        if shortest is not None and not 1 <= shortest <= seq_length:
            raise ValueError(
                f"dataset.shortest={shortest} is not between 1 and dataset.seq_length={seq_length}"
            )
        self._shortest = seq_length if shortest is None else shortest
        self._num_samples = held if num_samples is None else num_samples

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        """Sample `index`: ids, each token's successor as its label, and an all-ones mask."""
        if not 0 <= index < self._num_samples:
            raise IndexError(f"sample {index} of {self._num_samples}")
        start = index * self._seq_length
        # A prime step walks through all lengths, in an order that looks drawn.
        length = self._shortest + index * 7919 % (self._seq_length - self._shortest + 1)
        window = list(self._bytes[start : start + length + 1])
        # AutoModel's losses do not shift, so the dataset does.
        return {
            "input_ids": window[:-1],
            "labels": window[1:],
            "attention_mask": [1] * length,
        }
