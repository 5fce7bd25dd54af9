# SPDX-License-Identifier: Apache-2.0
"""What a batch or recipe is broken with, and what is to come of it; `hostile/` lists the ways."""

# B batch rows   S tokens a row   D documents of the fullest row

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import yaml

from nemo_dsv4_cp import ContextParallelOptions
from nemo_dsv4_cp.sequence.lengths import NO_DOCUMENT
from nemo_dsv4_cp.tools.verification import packed_batch

VOCAB = 97
OPTIONS = tuple(option.name for option in dataclasses.fields(ContextParallelOptions))
NAN = float("nan")
WRONG_VALUES = ("null", "[]", "[a]", "{a: 1}", ".nan", ".inf", "-1", "nonsense", '""', "2026-01-31")
"""YAML that is right for no option."""


@dataclass(frozen=True)
class Shape:
    """What a batch is drawn by.

    Attributes:
        documents: Lengths of the documents of each row.
        packed: Several documents a row, or one.
        spare: Tokens of padding at the end of the longest row.
        option: Which option a kind of YAML breaks.
        seed: Of ids and labels.
    """

    documents: tuple[tuple[int, ...], ...]
    packed: bool
    spare: int = 0
    option: str = OPTIONS[0]
    seed: int = 0

    @property
    def seq_len(self) -> int:
        """S."""
        return max(map(sum, self.documents)) + self.spare

    def __post_init__(self) -> None:
        assert self.packed or all(len(row) == 1 for row in self.documents)


@dataclass
class Case:
    """What a rank trains with.

    Attributes:
        shape: What it was drawn by.
        batch: The full batch.
        arguments: For the sharder, beside the batch.
        block: The ``context_parallel`` block, as YAML.
        fields: The config's other fields that are not the tests' own, as YAML.
    """

    shape: Shape
    batch: Any
    arguments: dict[str, Any] = field(default_factory=dict)
    block: str = "{}"
    fields: str = "{}"

    def config(self) -> dict[str, Any]:
        """Return the config's fields, the block among them."""
        return yaml.safe_load(self.fields) | {"context_parallel": yaml.safe_load(self.block)}


def case_of(shape: Shape) -> Case:
    """Return a case that nothing is wrong with."""
    seq_len = shape.seq_len
    documents = [list(row) for row in shape.documents]
    batch = packed_batch(documents, seq_len, shape.seed, VOCAB)
    if not shape.packed:
        lengths = torch.tensor(documents)
        real = torch.arange(seq_len) < lengths
        batch = {key: batch[key] for key in ("input_ids", "labels")}
        batch["attention_mask"] = real.long()
        batch["position_ids"] = torch.arange(seq_len).repeat(len(lengths), 1)
    return Case(shape, batch)


Change = Callable[[Case], None]


@dataclass(frozen=True)
class Kind:
    """One way to break a case.

    Attributes:
        what: What is wrong, for the table.
        change: Breaks a case.
        error: What is raised; None if all is as without the change.
        message: A piece of the error's text, with ``...`` for what differs from case to case.
        fits: Whether a case of a shape can be broken so.
        before: Changes the case that the result is compared with, and the broken one before.
        section: The table's part.
    """

    what: str
    change: Change
    error: type[Exception] | None
    message: str = ""
    fits: Callable[[Shape], bool] = lambda shape: True
    before: Change = lambda case: None
    section: str = ""

    @property
    def of_config(self) -> bool:
        """Whether it breaks a config, not a batch."""
        return "YAML" in self.section


def refused(
    what: str,
    change: Change,
    message: str,
    error: type[Exception] = ValueError,
    fits: Callable[[Shape], bool] = lambda shape: True,
) -> Kind:
    return Kind(what, change, error, message, fits)


def as_meant(
    what: str,
    change: Change,
    fits: Callable[[Shape], bool] = lambda shape: True,
    before: Change = lambda case: None,
) -> Kind:
    return Kind(what, change, None, fits=fits, before=before)


def section(name: str, *kinds: Kind) -> tuple[Kind, ...]:
    return tuple(dataclasses.replace(kind, section=name) for kind in kinds)


def plain(shape: Shape) -> bool:
    return not shape.packed


def packed(shape: Shape) -> bool:
    return shape.packed


def several_documents(shape: Shape) -> bool:
    return shape.packed and sum(map(len, shape.documents)) > 1


def not_square(shape: Shape) -> bool:
    return shape.packed or len(shape.documents) != shape.seq_len


def one_packed_row(shape: Shape) -> bool:
    return shape.packed and len(shape.documents) == 1


def several_tokens(shape: Shape) -> bool:
    return not shape.packed and shape.documents[0][0] > 1


def put(key: str, value: Any) -> Change:
    """Put a value, or what a function makes of the case's batch, under a key of the batch."""

    def change(case: Case) -> None:
        case.batch[key] = value(case.batch) if callable(value) else value

    return change


def remake(key: str, function: Callable[[torch.Tensor], Any]) -> Change:
    """Put what a function makes of a tensor of the batch in its place."""
    return put(key, lambda batch: function(batch[key]))


def drop(*keys: str) -> Change:
    def change(case: Case) -> None:
        for key in keys:
            case.batch.pop(key, None)

    return change


def all_tensors(function: Callable[[torch.Tensor], Any]) -> Change:
    def change(case: Case) -> None:
        for key, value in case.batch.items():
            if isinstance(value, torch.Tensor):
                case.batch[key] = function(value)

    return change


def both(*changes: Change) -> Change:
    def change(case: Case) -> None:
        for each in changes:
            each(case)

    return change


def argue(**arguments: Any) -> Change:
    """Pass arguments to the sharder; functions are given the batch."""

    def change(case: Case) -> None:
        for name, value in arguments.items():
            case.arguments[name] = value(case.batch) if callable(value) else value

    return change


def whole(value: Any) -> Change:
    """Put something in the batch's place."""

    def change(case: Case) -> None:
        case.batch = value(case.batch) if callable(value) else value

    return change


def block(text: str) -> Change:
    def change(case: Case) -> None:
        case.block = text.replace("OPTION", case.shape.option)

    return change


def fields(text: str) -> Change:
    def change(case: Case) -> None:
        case.fields = text

    return change


def at(value: Any, row: int = 0, token: int = 0) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a function that copies a tensor and sets one number of it."""

    def change(tensor: torch.Tensor) -> torch.Tensor:
        changed = tensor.clone()
        changed[row, token] = value
        return changed

    return change


def longer(tensor: torch.Tensor) -> torch.Tensor:
    return torch.cat((tensor, tensor[:, :1]), dim=1)


def another_row(tensor: torch.Tensor) -> torch.Tensor:
    return torch.cat((tensor, tensor[:1]))


def embedded(batch: dict[str, Any]) -> torch.Tensor:
    return torch.zeros(*batch["input_ids"].shape, 64)


def square(batch: dict[str, Any]) -> torch.Tensor:
    """Return the mask [B, 1, S, S] that repeats what attention does anyhow."""
    seq_len = batch["input_ids"].shape[1]
    causal = torch.ones(seq_len, seq_len).tril().bool()
    real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    return (causal & real[:, None]).unsqueeze(1)


def offsets(lengths: torch.Tensor) -> torch.Tensor:
    """Return the running sums [B, D + 1] of lengths, -1 after a row's last."""
    sums = torch.nn.functional.pad(lengths.clamp(min=0).cumsum(1), (1, 0))
    used = torch.nn.functional.pad(lengths != NO_DOCUMENT, (1, 0), value=True)
    return sums.where(used, -1)


def numbers(batch: dict[str, Any]) -> torch.Tensor:
    """Return the number of each token's document, 0 for padding."""
    found = torch.zeros_like(batch["input_ids"])
    for row, lengths in enumerate(batch["seq_lens"].tolist()):
        start = 0
        for place, length in enumerate(n for n in lengths if n != NO_DOCUMENT):
            found[row, start : start + length] = place + 1
            start += length
    return found


def every_other(tensor: torch.Tensor) -> torch.Tensor:
    """Return the same numbers, two places apart in memory."""
    return tensor.repeat_interleave(2, dim=-1)[..., ::2]


def by_columns(tensor: torch.Tensor) -> torch.Tensor:
    """Return the same numbers, column after column in memory."""
    return tensor.t().contiguous().t() if tensor.dim() == 2 else tensor


def one_row_for_all(case: Case) -> None:
    all_tensors(lambda tensor: tensor[:1].repeat(len(tensor), *[1] * (tensor.dim() - 1)))(case)


def one_token_for_all(case: Case) -> None:
    for key in ("input_ids", "labels"):
        case.batch[key] = torch.full_like(case.batch[key], 7)
    case.batch.pop("attention_mask", None)


def half_real(batch: dict[str, Any]) -> torch.Tensor:
    """Return a 4-D mask of two documents a row, the second unable to see the first."""
    mask = square(batch)
    mask[:, :, 1:, 0] = False
    return mask


def additive(mask: torch.Tensor) -> torch.Tensor:
    return torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)


def to_meta(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to("meta")


def nested(tensor: torch.Tensor) -> torch.Tensor:
    return torch.nested.nested_tensor(list(tensor), layout=torch.jagged)


def declared(dims: Any, **values: Any) -> Change:
    """Add a key and name which of its dimensions holds the tokens."""

    def change(case: Case) -> None:
        case.batch["advantages"] = case.batch["input_ids"].float()
        case.batch |= values | {"_cp_metadata_seq_dims": dims}

    return change
