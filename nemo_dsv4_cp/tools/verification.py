# SPDX-License-Identifier: Apache-2.0
"""Whether a recipe trains under CP as AutoModel's own model does on one rank: shrunk, one step.

Both run AutoModel's own code from the batch to the update of the gates' biases
(:mod:`nemo_dsv4_cp.automodel.training_step`). The reference is AutoModel's model, on one rank and
without activation checkpointing, with one document per row.
"""

# B batch rows   S tokens per row   V vocabulary   E hidden size   M hyper-connection streams
# X experts

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from nemo_dsv4_cp import plugins
from nemo_dsv4_cp.automodel import training_step
from nemo_dsv4_cp.automodel.training_step import Loss, StepResult, TrainingStep
from nemo_dsv4_cp.checks.difference import GRADIENT_LIMIT, OUTPUT_LIMIT, Difference
from nemo_dsv4_cp.exchange.collectives import all_reduce_sum, cp_size
from nemo_dsv4_cp.options import AUTO, ContextParallelOptions
from nemo_dsv4_cp.sequence.lengths import NO_DOCUMENT
from nemo_dsv4_cp.tools import local_ranks, shrinking
from nemo_dsv4_cp.tools.sizes import is_v41
from nemo_dsv4_cp.tools.verified_models import config_of, models_of, shrunk, unquantized

# Of the terms of a sum that cancels. Of 1,482 scales (drawn weights, S 33 to 1,031, 2 to 4 ranks)
# none of ours was further than 5.5 eps from AutoModel's, and none of AutoModel's in float32 further
# than 8.1 eps from its own in float64.
CANCELLATION_LIMIT = 16 * torch.finfo(torch.float32).eps

_INDEXER = ".indexer."
"""In the names of its parameters."""


@dataclass(frozen=True)
class Verification:
    """What :func:`verify` found: differences, and what of the recipe did not run, by setting."""

    differences: list[Difference]
    left_out: list[str]


@dataclass(frozen=True)
class Case:
    """What the ranks of one comparison run.

    Attributes:
        config: Fields of the shrunk model's config.
        recipe: The recipe that names the other settings.
        documents: Lengths of documents by row, for each microbatch.
        packed: Whether rows hold several documents.
    """

    config: dict[str, Any]
    recipe: Mapping[str, Any]
    documents: list[list[list[int]]]
    packed: bool


def documents_for(packed: bool, cp_size: int, multiple: int) -> list[list[int]]:
    """Return lengths of documents, row by row, that put cuts at awkward places.

    Shards are a multiple of ``multiple`` when rows are not packed.
    """
    shard = max(2 * multiple, 64)
    whole = cp_size * shard - shard // 3
    if not packed:
        return [[whole], [whole // 2]]
    return [[1, whole // 2, 3, whole // 3, 7], [whole - 5]]


def case_of(
    recipe: Mapping[str, Any], config: Mapping[str, Any], *, cp_size: int, packed: bool
) -> Case:
    """Return what to run for a recipe: two microbatches that differ in their documents."""
    # The model section may hold it as well as the config.
    hidden = (recipe.get("model") or {}).get("output_hidden_states")
    extra = {} if hidden is None else {"output_hidden_states": hidden}
    small = shrunk({**config, **extra})
    made = config_of(small)
    options = ContextParallelOptions.of(made)
    if options.kernels != AUTO:  # refused here rather than by every rank
        plugins.load(plugins.KERNELS, options.kernels)(workspace_bytes=options.workspace_bytes)
    multiple = options.resolve_pad_multiple(made.get_text_config().compress_ratios)
    documents = documents_for(packed, cp_size, multiple)
    return Case(small, recipe, [documents, [row[::-1] for row in documents[::-1]]], packed)


def verify(
    recipe: Mapping[str, Any], config: Mapping[str, Any], *, cp_size: int, packed: bool
) -> Verification:
    """Train the shrunk model for one step on one rank and on ``cp_size``, float32, and compare.

    Both start from the same weights and see the same batches, with the loss, auxiliary loss and
    gates of ``recipe``, whose complete model config is ``config``. Under CP its activation
    checkpointing runs too. Compared are the loss, logits, the gradient of every parameter that has
    one, and of each gate that balances its experts the auxiliary loss, the experts' loads and their
    biases after the step. If the indexer has a loss, so are its gradients and what is logged of it,
    with those of our model on one rank.

    Raises:
        RankFailed: If a rank raised.
        ValueError: If the config cannot be made, or kernels that it names cannot run here.
    """
    case = case_of(recipe, config, cp_size=cp_size, packed=packed)
    differences, not_run = local_ranks.run(compare, cp_size, case)
    if is_v41(case.config):
        not_run = [*shrinking.left_out_v41(config), *not_run]
    return Verification(differences, [*shrinking.left_out(recipe), *not_run])


def gradient_limit(name: str, reference: Mapping[str, torch.nn.Parameter]) -> float:
    """Return how far rounding may take a gradient from the reference's, of its largest entry.

    That is 5e-5, and only for the scales of hyper-connections what their sum makes of rounding, if
    it is more. A scale s is one number for all tokens, ``s * (fn @ x) + base``, so its gradient is
    a sum over tokens, streams and features that can cancel to a thousandth of its terms and less,
    while each term keeps its rounding. It is also ``(fn * fn.grad).sum() / s``, which gives the
    size of the terms, for this model and this batch, from the reference's own parameters and
    gradients.
    """
    if not name.endswith(("_hc.scale", "hc_head.hc_scale")):
        return GRADIENT_LIMIT
    scale, fn = reference[name], reference[name.removesuffix("scale") + "fn"]
    if scale.grad is None or fn.grad is None:
        return GRADIENT_LIMIT
    # [M, M E] for the head's one scale; else [(2 + M) M, M E] for three: pre, post and combination.
    rows = fn.shape[0]
    streams = math.isqrt(rows + 1) - 1
    parts = [rows] if scale.numel() == 1 else [streams, streams, streams * streams]
    terms = (fn.detach() * fn.grad).abs().sum(dim=1).split(parts)
    sums = torch.stack([part.sum() for part in terms]) / scale.detach().abs()
    cancellation = sums.max() / scale.grad.abs().max().clamp(min=1e-30)
    return max(GRADIENT_LIMIT, CANCELLATION_LIMIT * float(cancellation))


def rounding_of_gradients(
    model: torch.nn.Module, backward: Callable[[], object]
) -> dict[str, float]:
    """Return how far rounding moves a model's own gradients, of their largest entries.

    Engram's gate is the square root of a product that may be close to 0. There its gradient
    enlarges rounding without bound, in AutoModel's model as in ours. So all parameters are rounded
    at random, a few times, in the last place of float32, and the gradients compared.

    Args:
        model: Float32, with the gradients of ``backward``; it gets its parameters and gradients
            back.
        backward: Adds to the gradients what one step makes.
    """
    parameters = dict(model.named_parameters())
    exact = {name: p.detach().clone() for name, p in parameters.items()}
    gradients = {name: p.grad for name, p in parameters.items()}
    largest = dict.fromkeys(parameters, 0.0)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in parameters.items():
                rounding = (torch.rand(parameter.shape, generator=generator) - 0.5) * 2**-22
                parameter.copy_(exact[name] * (1 + rounding.to(parameter.device)))
        model.zero_grad()
        backward()
        for name, parameter in parameters.items():
            largest[name] = max(largest[name], _relative(parameter.grad, gradients[name]))
    for name, parameter in parameters.items():
        parameter.data, parameter.grad = exact[name], gradients[name]
    return largest


def draw_weights(module: torch.nn.Module, seed: int) -> None:
    """Draw every parameter, those included that AutoModel starts as constants.

    Hyper-connections are drawn apart: at AutoModel's start all streams are alike, and the gradients
    of their parameters are rounding already in the reference.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name or name.endswith(("scale", ".q_weight", ".k_weight")):
                drawn = 1 + 0.1 * noise
            elif name.endswith(("base", "sinks_param.weight", "ape_param.weight")):
                drawn = 0.5 * noise
            elif "embed" in name:
                drawn = noise
            else:
                drawn = noise * parameter.shape[-1] ** -0.5
            parameter.copy_(drawn)


def packed_batch(documents: list[list[int]], seq_len: int, seed: int, vocab: int) -> dict[str, Any]:
    """Draw a batch as AutoModel's packed collater makes it."""
    generator = torch.Generator().manual_seed(seed)
    rows, most = len(documents), max(map(len, documents))
    lengths = torch.full((rows, most), NO_DOCUMENT)
    position_ids = torch.zeros(rows, seq_len, dtype=torch.long)
    labels = torch.full((rows, seq_len), -100)
    for row, of_row in enumerate(documents):
        lengths[row, : len(of_row)] = torch.tensor(of_row)
        counting = torch.cat([torch.arange(length) for length in of_row])
        position_ids[row, : len(counting)] = counting
        labels[row, : len(counting)] = torch.randint(
            0, vocab, (len(counting),), generator=generator
        )
    return {
        "input_ids": torch.randint(0, vocab, (rows, seq_len), generator=generator),
        "labels": labels,
        "position_ids": position_ids,
        "seq_lens": lengths,
        "seq_lens_padded": lengths.clone(),
        "qkv_format": "thd",
    }


def _unpacked(batch: dict[str, Any]) -> dict[str, Any]:
    """Return a batch of one document per row as AutoModel's default collater makes it."""
    real = batch["labels"] != -100
    # MTP reads the padding behind a row's last token; packed documents are followed by id 0.
    ids = batch["input_ids"].masked_fill(~real, 0)
    return {"input_ids": ids, "labels": batch["labels"], "attention_mask": real}


def _document_rows(
    batch: dict[str, Any], documents: list[list[int]], spare: int
) -> tuple[dict[str, Any], torch.Tensor]:
    """Return each document as a row of its own, and which of the B S tokens each slot holds.

    Args:
        batch: Rows of documents, one after the other.
        documents: Their lengths, row by row.
        spare: Slots of padding, -1, behind the longest one, for what MTP looks ahead.
    """
    slots = torch.arange(batch["input_ids"].numel()).view_as(batch["input_ids"])
    sources = [
        source
        for row, of_row in zip(slots, documents, strict=True)
        for source in row[: sum(of_row)].split(of_row)
    ]
    padded = torch.nn.utils.rnn.pad_sequence(sources, batch_first=True, padding_value=-1)
    source = torch.nn.functional.pad(padded, (0, spare), value=-1)
    padding = source < 0
    rows = {
        key: batch[key].flatten()[source].masked_fill(padding, fill)
        for key, fill in (("input_ids", 0), ("labels", -100))
    }
    return rows | {"attention_mask": ~padding, "padding_mask": padding}, source


def _models(case: Case, device: torch.device) -> tuple[Any, Any]:
    """Return AutoModel's model and ours with the same drawn weights."""
    reference, mine = models_of(case.config, shrinking.model_settings(case.recipe))
    for model in (reference, mine):  # AutoModel 0.5 builds norms in bfloat16
        model.initialize_weights(torch.device("cpu"), torch.float32)
    draw_weights(reference, seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, buffer in reference.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))
        elif name.endswith("tid2eid"):  # AutoModel 0.5 sends every token to one expert
            slots = torch.arange(buffer.numel()).view(buffer.shape)
            buffer.copy_(slots % reference.config.n_routed_experts)
    mine.load_state_dict(reference.state_dict())
    for model in (reference, mine):
        model.to(device).train()
        for name, parameter in model.named_parameters():
            if _INDEXER in name:  # it chooses, and is not trained
                parameter.requires_grad_(False)
    if ContextParallelOptions.of(mine.config).trains_indexer:
        mine.select_trained_parameters()
    return reference, mine


def compare(group: Any, rank: int, case: Case) -> tuple[list[Difference], list[str]]:
    """Compare one step of a rank's two models; a job of :func:`local_ranks.run`.

    Returns:
        The differences, and what of the recipe does not run here.
    """
    keys = unquantized() if is_v41(case.config) else nullcontext()
    with keys, torch.compiler.set_stance("force_eager"):  # shapes change with each microbatch
        return _compare(group, rank, case)


def _compare(group: Any, rank: int, case: Case) -> tuple[list[Difference], list[str]]:
    size = cp_size(group)
    device = local_ranks.device_of(rank, size)
    reference, mine = _models(case, device)
    spare = mine.mtp_config.num_layers if hasattr(mine, "mtp_config") else 0
    vocab = mine.config.get_text_config().vocab_size

    batches, rows, sources = [], [], []
    for seed, documents in enumerate(case.documents, start=1):
        seq_len = max(map(sum, documents))
        batch = packed_batch(documents, seq_len, seed, vocab)
        batches.append(batch if case.packed else _unpacked(batch))
        of_documents, source = _document_rows(batch, documents, spare)
        rows.append(of_documents)
        sources.append(source)

    loss = training_step.build_loss(case.recipe, device)
    expected = TrainingStep(reference, loss.function, device).run(rows)
    logged = {}
    if ContextParallelOptions.of(mine.config).trains_indexer:
        logged = _expect_indexer(expected, copy.deepcopy(mine), loss, device, rows)
    mine, setup = training_step.parallelize(mine, case.recipe, cp_size=size, device=device)
    loss = loss.for_model(mine)
    found = TrainingStep(mine, loss.function, device, setup, packed=case.packed).run(batches)

    not_run = [] if loss.reason is None else [f"loss_fn: {loss.name} ({loss.reason})"]
    differences = [Difference("loss", abs(found.loss - expected.loss), OUTPUT_LIMIT)]
    if found.logits:
        gaps = [
            _largest(mine_BSV.flatten(0, 1)[source[source >= 0]], theirs_DSV[source >= 0])
            for mine_BSV, theirs_DSV, source in zip(
                found.logits, expected.logits, sources, strict=True
            )
        ]
        differences.append(Difference("logits", max(gaps), OUTPUT_LIMIT))
    else:
        not_run.append("logits (this AutoModel has no functions to gather tokens)")
    metrics = mine.take_indexer_metrics([mine], [group], size) if logged else {}
    for name in logged:
        value = abs(metrics.get(name, math.inf) - logged[name])
        differences.append(Difference(name, value, OUTPUT_LIMIT))
    parameters, rounding = dict(reference.named_parameters()), {}
    if getattr(reference.model, "engram_hash", None) is not None:
        rounding = rounding_of_gradients(
            reference, lambda: TrainingStep(reference, loss.function, device).run(rows)
        )
    for name in expected.gradients.keys() | found.gradients.keys():
        limit = max(gradient_limit(name, parameters), 3 * rounding.get(name, 0.0))
        value = _relative(found.gradients.get(name), expected.gradients.get(name))
        differences.append(Difference(f"gradient of {name}", value, limit))
    bias_step = reference.model.moe_config.gate_bias_update_factor
    return differences + _compare_gates(found, expected, group, bias_step), not_run


def _expect_indexer(
    expected: StepResult, alone: Any, loss: Loss, device: torch.device, rows: list[dict[str, Any]]
) -> dict[str, float]:
    """Expect the indexer's gradients to be those of our model on one rank: AutoModel's has none.

    Where the indexer alone is trained, nothing else has a gradient, and biases stay.

    Returns:
        What is logged of the indexer.
    """
    own = TrainingStep(alone, loss.function, device).run(rows)
    if ContextParallelOptions.of(alone.config).train_only == "indexer":
        expected.gradients, expected.biases = own.gradients, own.biases
    else:
        expected.gradients = own.gradients | expected.gradients
    metrics: dict[str, float] = alone.take_indexer_metrics([alone], [None], 1)
    return metrics


def _compare_gates(
    found: StepResult, expected: StepResult, group: Any, bias_step: float
) -> list[Difference]:
    """Compare what the gates did to balance their experts.

    Loads are integers and biases move by one step up or down: less than half of the smallest
    difference is none.
    """
    differences = []
    for name, theirs in expected.loads.items():
        # Each rank counts its own tokens.
        mine = all_reduce_sum(found.loads.get(name, torch.zeros_like(theirs)), [group])
        total = float(theirs.sum())
        value = _largest(mine, theirs) / total
        differences.append(Difference(f"expert load of {name}", value, 0.5 / total))
    for name, theirs in expected.auxiliary_losses.items():
        value = _largest(found.auxiliary_losses.get(name), theirs)
        differences.append(Difference(f"auxiliary loss of {name}", value, OUTPUT_LIMIT))
    for name, theirs in expected.biases.items():
        value = _largest(found.biases.get(name), theirs)
        limit = 0.5 * bias_step
        differences.append(Difference(f"correction bias of {name} after the step", value, limit))
    return differences


def _largest(mine: torch.Tensor | None, theirs: torch.Tensor) -> float:
    """Return the largest difference, infinite where there is nothing to compare."""
    return math.inf if mine is None else float((mine - theirs).abs().max())


def _relative(mine: torch.Tensor | None, theirs: torch.Tensor | None) -> float:
    """Return the largest difference relative to the reference's largest entry; None is zero."""
    if theirs is None:
        return 0.0 if mine is None or not mine.any() else math.inf
    largest = float(theirs.abs().max().clamp(min=1e-30))
    return float((theirs if mine is None else mine - theirs).abs().max()) / largest
