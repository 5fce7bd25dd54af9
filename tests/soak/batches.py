# SPDX-License-Identifier: Apache-2.0
"""Batches of drawn kinds and lengths out of one recipe, which AutoModel would not mix."""

import random

from nemo_automodel.components.datasets.utils import (
    default_collater,
    packed_sequence_thd_collater,
)


def padded_or_packed(samples):
    """Make a row of every document, padded to the longest, or pack them into one row or two.

    Drawn from the documents alone, so that all ranks that read the same make the same of it.
    """
    draw = random.Random(str([sample["input_ids"] for sample in samples]))
    rows = draw.randint(0, 2)
    if not rows:
        return default_collater(samples)
    packs = [_end_to_end(samples[row::rows]) for row in range(rows)]
    longest = max(len(pack["input_ids"]) for pack in packs) + draw.randint(0, 9)
    return packed_sequence_thd_collater([_padded(pack, longest) for pack in packs])


def _end_to_end(documents):
    lengths = [len(document["input_ids"]) for document in documents]
    tokens = {
        key: [token for document in documents for token in document[key]]
        for key in ("input_ids", "labels")
    }
    positions = [place for length in lengths for place in range(length)]
    return tokens | {"position_ids": positions, "seq_lens": lengths, "seq_lens_padded": lengths}


def _padded(pack, length):
    missing = length - len(pack["input_ids"])
    for key, fill in (("input_ids", 0), ("labels", -100), ("position_ids", 0)):
        pack[key] = pack[key] + [fill] * missing
    *others, last = pack["seq_lens"]
    return pack | {"seq_lens_padded": [*others, last + missing]}
