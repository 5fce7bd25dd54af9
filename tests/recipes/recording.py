# SPDX-License-Identifier: Apache-2.0
"""A recipe that records losses, gradient norms and every parameter's gradient of each step.

Each rank writes ``record_RANK.pt`` to the checkpoint directory when training ends.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from nemo_automodel.components.loss import linear_ce
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.functional import cross_entropy, linear

from nemo_dsv4_cp.automodel.cpu import CpuFinetuneRecipe
from nemo_dsv4_cp.tools.verification import draw_weights
from tests.recipes.launching import STARTED


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    ignore_index: int,
    reduction: str,
    **_: Any,
) -> torch.Tensor:
    """Stand in for cut_cross_entropy's kernel, which needs a GPU."""
    logits = linear(hidden, weight).flatten(0, -2).float()
    return cross_entropy(logits, targets.flatten(), ignore_index=ignore_index, reduction=reduction)


def named_parameters(parts: list[torch.nn.Module]) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yield parameters under the names that they have without activation checkpointing."""
    for part in parts:
        for name, parameter in part.named_parameters():
            yield name.replace("_checkpoint_wrapped_module.", ""), parameter


@torch.no_grad()
def draw_by_name(parts: list[torch.nn.Module], draw: int) -> None:
    """Draw every parameter by its name alone, so that any mesh and any option starts alike.

    The weights that AutoModel initializes are no test: hyper-connection streams start equal, and
    the gradients of their parameters are rounding noise.
    """
    for name, parameter in named_parameters(parts):
        whole = torch.nn.Module()
        leaf = name.rpartition("model.layers.")[2].replace(".", "_")
        whole.register_parameter(leaf, torch.nn.Parameter(torch.zeros(parameter.shape)))
        draw_weights(whole, seed=zlib.crc32(f"{draw} {name}".encode()))
        drawn = getattr(whole, leaf).to(parameter.dtype)
        if isinstance(parameter, DTensor):
            mesh, placements = parameter.device_mesh, parameter.placements
            drawn = distribute_tensor(drawn, mesh, placements, src_data_rank=None)
        parameter.copy_(drawn)


def whole_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy of a tensor, gathered from all ranks that hold a shard of it."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


class RecordingRecipe(CpuFinetuneRecipe):
    """AutoModel's fine-tuning recipe, from weights drawn by name."""

    def setup(self) -> None:
        linear_ce.linear_cross_entropy = linear_cross_entropy
        linear_ce.HAVE_CUT_CROSS_ENTROPY = True
        super().setup()
        self._directory = Path(self.checkpointer.config.checkpoint_dir)
        self._record: dict[str, Any] = {
            "loss_fn": type(self.loss_fn).__name__,
            "frozen_adapters": [
                name
                for name, parameter in named_parameters(self.model_parts)
                if "lora_" in name and not parameter.requires_grad
            ],
            "losses": [],
            "norms": [],
            "validation": [],
            "gradients": [],
            "scales": [],
        }
        draw_by_name(self.model_parts, self.cfg.get("draw", 0))
        self.optimizer[0].register_step_pre_hook(lambda *_: self._record_gradients())

    def _record_gradients(self) -> None:
        if self.dist_env.is_main:
            (self._directory / STARTED).touch()
        gradients, scales = {}, {}
        for name, parameter in named_parameters(self.model_parts):
            if not parameter.requires_grad:
                continue
            # All ranks gather the same parameters, whether or not a rank has a gradient.
            gradient = parameter.grad
            gradients[name] = whole_tensor(
                torch.zeros_like(parameter) if gradient is None else gradient
            )
            if "hc" in name and name.endswith(("scale", "fn")):
                scales[name] = whole_tensor(parameter)
        self._record["gradients"].append(gradients)
        self._record["scales"].append(scales)

    def log_train_metrics(self, log_data: Any) -> None:
        self._record["losses"].append(log_data.metrics["loss"])
        self._record["norms"].append(float(log_data.metrics["grad_norm"]))
        super().log_train_metrics(log_data)

    def log_val_metrics(self, val_name: str, log_data: Any, metric_logger: Any = None) -> None:
        self._record["validation"].append(log_data.metrics["val_loss"])
        super().log_val_metrics(val_name, log_data, metric_logger)

    def run_train_validation_loop(self) -> None:
        super().run_train_validation_loop()
        mesh = self.device_mesh
        stage = mesh["pp"].get_local_rank() if self.pp_enabled else 0
        if self.dist_env.rank == 0 or (stage and self._get_dp_rank(include_cp=True) == 0):
            torch.save(self._record, self._directory / f"record_{stage}.pt")
        if dist.get_world_size() > 1:
            dist.barrier()  # no rank leaves while another waits for it
