# SPDX-License-Identifier: Apache-2.0
"""What the numbers of a batch must obey: a table of rules, all read from the device in one wait.

# B batch rows   S tokens per row
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from nemo_dsv4_cp.sequence.packing import on_cpu_together

IGNORED_LABEL = -100
"""The label of tokens that AutoModel's losses ignore."""

_HOLDS = "{key} holds {number} for token {token} of row {row}; "
_PAST = "attention sees the row's whole past and nothing else; describe documents by seq_lens"
MESSAGES = {
    "images": "images ({key} in the batch) are not supported under context parallelism; set "
    "distributed.cp_size: 1",
    "finite": _HOLDS + "use finite numbers, 0 for tokens without a loss",
    "mask values": _HOLDS + "1 is a real token and 0 is padding; describe documents by seq_lens",
    "float mask": _HOLDS + "in a 4-D mask of floats 0 is seen and a negative number is not; use "
    "bool",
    "first key": "attention_mask, of the first key, holds {number} for token {token} of row {row}; "
    + _PAST,
    "first query": "attention_mask, of the first query, holds {number} for token {token} of row "
    "{row}; " + _PAST,
    "right padding": "attention_mask: row {row} of the batch has real tokens after padding; "
    "attention here goes by position and supports right padding only. Set the tokenizer's or "
    'collator\'s padding_side to "right"',
    "padding's labels": _HOLDS + "attention_mask marks the whole row as padding, whose label must "
    "be -100",
    "counting": "position_ids do not count 0, 1, 2, ... along each row, as if documents were "
    "packed; leave position_ids out of the batch, or give the documents' lengths as seq_lens",
    "documents' positions": "position_ids disagree with the documents of row {row}: token {token} "
    "is at position {expected} of its document, and position_ids give it {number}; leave "
    "position_ids out of the batch or fix the packer's lengths",
    "documents' labels": "labels: token {token} of row {row} has a label and belongs to no "
    "document; fix the packer's lengths, or set the label to -100",
    "ids": _HOLDS + "token ids are {valid}",
}
"""The error of each rule, given the tensor's key and the first wrong number, its token and row."""


@dataclass(frozen=True)
class Rule:
    """What the numbers of one tensor must obey.

    Attributes:
        name: Of the rule, in :data:`MESSAGES`.
        key: The tensor's name in the batch.
        numbers: [B, S], what the error quotes.
        wrong: Bool [B, S]: where the rule is broken.
        facts: What else the error quotes; tensors [B, S] for the wrong token.
    """

    name: str
    key: str
    numbers: torch.Tensor
    wrong: torch.Tensor
    facts: dict[str, Any] = field(default_factory=dict)

    def refusal(self) -> Exception:
        """Return the error for the first wrong number."""
        row, token = self.wrong.nonzero()[0].tolist()
        facts = {"key": self.key, "row": row, "token": token, "number": self.numbers} | self.facts
        for name, value in facts.items():
            if isinstance(value, torch.Tensor):
                facts[name] = value.expand(self.wrong.shape)[row, token].item()
        return refusal(self.name, **facts)


def refusal(name: str, **facts: Any) -> Exception:
    """Return the error of a rule."""
    kind = NotImplementedError if name == "images" else ValueError
    return kind(MESSAGES[name].format(**facts))


def read_together(rules: Sequence[Rule], *others: torch.Tensor) -> list[torch.Tensor]:
    """Return which rules are broken, and other integers, on the CPU: the one wait of a batch."""
    return on_cpu_together([*(rule.wrong.any() for rule in rules), *others])


def refuse_first(rules: Sequence[Rule], broken: Sequence[torch.Tensor]) -> None:
    """Raise the error of the first broken rule."""
    for rule, is_broken in zip(rules, broken, strict=True):
        if is_broken:
            raise rule.refusal()


def padding_of(attention_mask: torch.Tensor) -> torch.Tensor:
    """Return what an attention mask marks as padding, bool [B, S], read as AutoModel does.

    It is [B, S], nonzero = real; or [B, 1, S, S], bool (True = attend) or additive (0 = attend), of
    which the diagonal counts.
    """
    if attention_mask.dim() == 4:
        diagonal = attention_mask[:, 0].diagonal(dim1=-2, dim2=-1)
        return ~diagonal if attention_mask.dtype == torch.bool else diagonal != 0
    return ~attention_mask.bool()


def refuse_left_padding(padding_mask: torch.Tensor) -> None:
    """Refuse whole rows [B, S] (True = pad) in which a real token follows padding.

    Attention goes by position, not by masks: with padding only at the end no real query ever sees
    a pad token, anywhere else it would.
    """
    rules = [_right_padding(padding_mask)]
    refuse_first(rules, read_together(rules))


def _right_padding(padding: torch.Tensor) -> Rule:
    wrong = padding[:, :-1] & ~padding[:, 1:]
    return Rule("right padding", "attention_mask", padding[:, 1:], wrong)


def mask_rules(mask: torch.Tensor, padding: torch.Tensor, labels: Any) -> list[Rule]:
    """Refuse an attention mask that holds more than padding at the end of rows.

    Attention sees all of its row's past. Of a 4-D mask, the first token's row and column identify
    most that differ: bidirectional ones, prefixes, windows, packed documents.
    """
    key = "attention_mask"
    if mask.dim() == 2:
        rules = [Rule("mask values", key, mask, (mask != 0) & (mask != 1))]
    else:
        rules, mask = [], mask[:, 0]
        if mask.dtype != torch.bool:
            own = mask.diagonal(dim1=-2, dim2=-1)
            rules.append(Rule("float mask", key, own, own.isnan() | (own > 0)))
        column, row = (
            part if mask.dtype == torch.bool else part == 0 for part in (mask[:, :, 0], mask[:, 0])
        )
        real = ~padding[: len(mask)]
        rules.append(Rule("first key", key, column, real & ~column))
        ahead = row.clone()
        ahead[:, 0] = False
        rules.append(Rule("first query", key, ahead, ahead & real[:, :1]))
    rules.append(_right_padding(padding))
    if labels is not None:
        lost = padding.all(dim=1, keepdim=True) & (labels != IGNORED_LABEL)
        rules.append(Rule("padding's labels", "labels", labels, lost))
    return rules


def counting_rule(positions: torch.Tensor, padding: torch.Tensor | None) -> Rule:
    """Refuse positions that do not count 0, 1, 2, ... over the real tokens of each row."""
    astray = positions != torch.arange(positions.shape[1], device=positions.device)
    if padding is not None:
        astray = astray & ~padding
    return Rule("counting", "position_ids", positions, astray)


def document_rules(
    positions: torch.Tensor | None, labels: torch.Tensor, places: torch.Tensor, real: torch.Tensor
) -> list[Rule]:
    """Refuse packed rows whose positions or labels disagree with their documents.

    ``places`` are the tokens' positions in their documents, ``real`` whether they are in one.
    """
    lost = (labels != IGNORED_LABEL) & ~real
    rules = [Rule("documents' labels", "labels", labels, lost)]
    if positions is not None:
        astray, expected = (positions != places) & real, {"expected": places}
        rules.insert(0, Rule("documents' positions", "position_ids", positions, astray, expected))
    return rules


def id_rule(
    key: str, numbers: torch.Tensor, vocab_size: int | None, among: torch.Tensor | None
) -> Rule:
    """Refuse numbers, all or ``among`` them, that are no ids: a loss on a GPU dies of them."""
    wrong, valid = numbers < 0, valid_ids(vocab_size)
    if vocab_size is not None:
        wrong = wrong | (numbers >= vocab_size)
    if key == "labels":
        wrong, valid = wrong & (numbers != IGNORED_LABEL), f"{valid}, and {IGNORED_LABEL} for none"
    if among is not None:
        wrong = wrong & among
    return Rule("ids", key, numbers, wrong, {"valid": valid})


def valid_ids(vocab_size: int | None) -> str:
    """Return the range of token ids, for messages."""
    return "0 or more" if vocab_size is None else f"0 to {vocab_size - 1}"
