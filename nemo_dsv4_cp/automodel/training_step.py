# SPDX-License-Identifier: Apache-2.0
"""One optimizer step by AutoModel's own fine-tuning recipe, on a model and a batch of the caller's.

The recipe's code runs from the batch to the update of the gates' biases: sharding of the batch,
losses, the scale of the auxiliary loss, averaging of gradients. Its setup (data, tokenizer,
checkpoints) is left out, and the weights stay as they are.
"""

# B batch rows   S tokens a row   V vocabulary   E hidden size   X experts

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from nemo_automodel._transformers import capabilities
from nemo_automodel._transformers.infrastructure import (
    apply_model_infrastructure,
    instantiate_infrastructure,
)
from nemo_automodel.components.config.loader import ConfigNode
from nemo_automodel.components.distributed.config import DistributedSetup
from nemo_automodel.components.loss.linear_ce import FusedLinearCrossEntropy
from nemo_automodel.components.loss.masked_ce import MaskedCrossEntropy
from nemo_automodel.components.moe.load_balance_metrics import enable_load_balance_tracking
from nemo_automodel.recipes._dist_utils import create_distributed_setup_from_config
from nemo_automodel.recipes._typed_config import RecipeConfig
from nemo_automodel.recipes.llm import train_ft
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy, linear

from nemo_dsv4_cp.automodel.sharding import HAS_SHARDER, ContextParallelSharder

COLLATER = "nemo_automodel.components.datasets.utils.packed_sequence_thd_collater"
_WRAPPER = "_checkpoint_wrapped_module."
_SHARDING_KEYS = ("activation_checkpointing", "activation_checkpointing_scope")
"""The keys of ``distributed`` that a step reads from the recipe."""
_FLOAT32 = {
    "param_dtype": "float32",
    "reduce_dtype": "float32",
    "output_dtype": "float32",
    "cast_forward_inputs": True,
}


@dataclass
class StepResult:
    """What one step computed, on this rank.

    Attributes:
        loss: The loss that the recipe logs, summed over all ranks.
        gradients: Whole gradients, after averaging, by parameter name.
        logits: [B, S, V] of all ranks' tokens, one of each microbatch; empty without functions of
            AutoModel to gather them.
        loads: Tokens [X] that this rank sent to each expert, by gate; so with the next two.
        auxiliary_losses: Of each microbatch.
        biases: Correction biases [X] after the update.
    """

    loss: float = 0.0
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)
    logits: list[torch.Tensor] = field(default_factory=list)
    loads: dict[str, torch.Tensor] = field(default_factory=dict)
    auxiliary_losses: dict[str, torch.Tensor] = field(default_factory=dict)
    biases: dict[str, torch.Tensor] = field(default_factory=dict)


def parallelize(
    model: Any, recipe: Mapping[str, Any], *, cp_size: int, device: torch.device
) -> tuple[Any, DistributedSetup]:
    """Checkpoint and shard a model as AutoModel does with ``ep_size: 1``, in float32.

    All ranks are one CP group; the recipe's ``distributed`` section names the checkpointing.
    """
    named = recipe.get("distributed") or {}
    distributed = {key: named[key] for key in _SHARDING_KEYS if named.get(key) is not None}
    distributed |= {"strategy": "fsdp2", "cp_size": cp_size, "mp_policy": _FLOAT32}
    setup = create_distributed_setup_from_config(
        ConfigNode({"distributed": distributed}), world_size=cp_size
    )
    model = capabilities.attach_capabilities_and_validate(model, setup.mesh_context)
    wrapper, *_ = instantiate_infrastructure(
        distributed_config=setup.strategy_config,
        activation_checkpointing=setup.activation_checkpointing,
        device=device,
        mesh=setup.mesh_context,
    )
    model = apply_model_infrastructure(
        model,
        is_meta_device=False,
        device=device,
        model_wrapper=wrapper,
        mesh=setup.mesh_context,
    )
    return model, setup


class TrainingStep(train_ft.TrainFinetuneRecipeForNextTokenPrediction):
    """AutoModel's recipe with a model and a loss in place of all that its setup would make.

    Without ``setup``, every rank runs the whole model alone.
    """

    def __init__(
        self,
        model: Any,
        loss_fn: Any,
        device: torch.device,
        setup: DistributedSetup | None = None,
        *,
        packed: bool = False,
    ) -> None:
        # 0.5 recognises packed rows by the dataloader's collater.
        dataloader = {"collate_fn": COLLATER} if packed else {}
        super().__init__(ConfigNode({"dataloader": dataloader}))
        self.device_mesh = None if setup is None else setup.mesh_context.device_mesh
        self.moe_mesh = None
        self.distributed_config = None if setup is None else setup.strategy_config
        self.pp_enabled = False
        self.model_parts = [model]
        self.loss_fn = loss_fn
        self.dist_env = SimpleNamespace(
            device=device, world_size=1 if setup is None else self._get_dp_group_size(True)
        )
        self.tokenizer = None
        self.te_fp8 = None
        self.lr_scheduler = None
        self.checkpointer = SimpleNamespace(maybe_wait_for_staging=lambda: None)
        self.step_scheduler = SimpleNamespace(step=0, epoch=0)
        self.timestamp = time.perf_counter()
        # Called between the averaging of gradients and the update of biases.
        at_step = SimpleNamespace(
            step=self._record, zero_grad=lambda: None, param_groups=[{"lr": 0.0}]
        )
        self.optimizer = [at_step]
        self._result = StepResult()

    def run(self, batches: list[dict[str, Any]]) -> StepResult:
        """Train on microbatches, whole on every rank; weights stay, biases move."""
        (model,) = self.model_parts
        enable_load_balance_tracking(model)
        hook = model.register_forward_hook(self._keep_output)
        try:
            metrics = self._run_train_optim_step(batches).metrics
        finally:
            hook.remove()
        result = self._result
        result.loss = float(metrics["loss"])
        result.logits = self._gathered(result.logits, batches)
        for name, gate in _gates(model).items():
            if gate.e_score_correction_bias is not None:
                result.biases[name] = whole(gate.e_score_correction_bias).clone()
        return result

    def _keep_output(self, model: Any, _: Any, output: Any) -> None:
        """Store what a microbatch's forward returned, before backward recomputes any of it."""
        result = self._result
        # A loss that projects hidden states has the model return the last token's logits alone.
        scored = output.hidden_states if takes_hidden_states(self.loss_fn) else output.logits
        if scored is None:
            return  # releases before 0.7 end here, with the setting that is missing
        result.logits.append(scored.detach())
        for name, gate in _gates(model).items():
            result.loads[name] = result.loads.get(name, 0) + gate._last_expert_load
            if gate._last_aux_loss is not None:
                earlier = result.auxiliary_losses.get(name, gate._last_aux_loss.new_empty(0))
                latest = gate._last_aux_loss.reshape(1)
                result.auxiliary_losses[name] = torch.cat((earlier, latest))

    def _record(self) -> None:
        (model,) = self.model_parts
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                self._result.gradients[name.replace(_WRAPPER, "")] = whole(parameter.grad).clone()

    def _gathered(
        self, outputs: list[torch.Tensor], batches: list[dict[str, Any]]
    ) -> list[torch.Tensor]:
        """Return the logits of all tokens of the microbatches, in the order of their batches."""
        (model,) = self.model_parts
        if takes_hidden_states(self.loss_fn):
            head = whole(model.lm_head.weight.detach()).float()
            outputs = [linear(hidden.float(), head) for hidden in outputs]
        if self.device_mesh is None:
            return outputs
        gathered = []
        for logits, batch in zip(outputs, batches, strict=True) if HAS_SHARDER else ():
            tokens = {
                key: value.to(self.dist_env.device) if isinstance(value, torch.Tensor) else value
                for key, value in batch.items()
            }
            sharder = ContextParallelSharder(model, self.device_mesh, tokens)
            sharder.shard(tokens)
            gathered.append(sharder.gather_token_tensor(logits, trim=True, fill=0.0))
        return gathered

    # Without a mesh AutoModel counts the ranks of the job as those of one data-parallel run.
    def _get_dp_group_size(self, include_cp: bool = False) -> int:
        return 1 if self.device_mesh is None else int(super()._get_dp_group_size(include_cp))

    def _dp_allreduce(self, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.device_mesh is None:
            return tensor
        return super()._dp_allreduce(tensor, *args, **kwargs)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return all of a tensor, which may be sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _gates(model: Any) -> dict[str, Any]:
    """Return the gates that balance their experts, by name."""
    return {
        name.replace(_WRAPPER, ""): module
        for name, module in model.named_modules()
        if hasattr(module, "_last_expert_load")
    }


class _TorchLinearCrossEntropy(FusedLinearCrossEntropy):
    """AutoModel's fused loss in plain torch, for where its kernels do not run."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        labels: torch.Tensor,
        lm_weight: torch.Tensor,
        num_label_tokens: int | None = None,
        **_: Any,
    ) -> torch.Tensor:
        logits = linear(hidden_states.float(), whole(lm_weight).float())
        if self.logit_softcapping:
            logits = self.logit_softcapping * torch.tanh(logits / self.logit_softcapping)
        loss = cross_entropy(
            logits.flatten(0, -2),
            labels.flatten(),
            ignore_index=self.ignore_index,
            reduction=self.reduction,
        )
        return loss if num_label_tokens is None else loss / num_label_tokens


@dataclass(frozen=True)
class Loss:
    """A recipe's loss, or one that stands in for it."""

    function: Any
    name: str  # of the recipe's
    reason: str | None = None  # why another one stands in, if one does

    def for_model(self, model: Any) -> Loss:
        """Return the loss that AutoModel's recipe trains a model with.

        Raises:
            ValueError: If AutoModel refuses the loss for this model.
        """
        downgrade = getattr(train_ft, "_maybe_downgrade_loss_fn", None)  # since 0.6
        function = self.function if downgrade is None else downgrade(self.function, model, False)
        if function is self.function:
            return self
        reason = f"AutoModel trains this model with {type(function).__name__}"
        return Loss(function, self.name, reason)


def build_loss(recipe: Mapping[str, Any], device: torch.device) -> Loss:
    """Return a recipe's loss, or where that does not run the same loss in plain torch."""
    named = recipe.get("loss_fn")
    if not named:
        return Loss(MaskedCrossEntropy(), MaskedCrossEntropy.__name__)
    loss = RecipeConfig(ConfigNode({"loss_fn": dict(named)})).loss_fn.build()
    name = type(loss).__name__
    try:
        _try_out(loss, device)
    except Exception as error:
        line = (str(error).strip().splitlines() or [""])[0]
        fused = isinstance(loss, FusedLinearCrossEntropy)
        options = ("ignore_index", "reduction") + (("logit_softcapping",) if fused else ())
        known = {option: getattr(loss, option) for option in options if hasattr(loss, option)}
        function = (_TorchLinearCrossEntropy if fused else MaskedCrossEntropy)(**known)
        return Loss(function, name, f"does not run here: {type(error).__name__}: {line}")
    return Loss(loss, name)


def takes_hidden_states(loss: Any) -> bool:
    """Return whether a loss projects hidden states to logits itself."""
    return isinstance(loss, getattr(train_ft, "LinearCrossEntropy", FusedLinearCrossEntropy))


def _try_out(loss: Any, device: torch.device) -> None:
    """Raise what a loss raises on a few tokens, forward and backward."""
    hidden = torch.randn(1, 4, 16, device=device, requires_grad=True)
    weight = torch.randn(32, 16, device=device, requires_grad=True)
    labels = torch.tensor([[1, 2, -100, 3]], device=device)
    if takes_hidden_states(loss):
        out = loss(hidden_states=hidden, labels=labels, lm_weight=weight, num_label_tokens=3)
    else:
        out = loss(logits=linear(hidden, weight), labels=labels, num_label_tokens=3)
    out.backward()
