# SPDX-License-Identifier: Apache-2.0
"""Runs AutoModel's fine-tuning recipe where torch sees no CUDA device.

Written for nemo_automodel 0.7.0. Some of its modules call CUDA without checking that it exists.
They get a view of torch in which these calls work without a GPU. Torch itself is unchanged, and
`patches.undo` removes the view.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import inspect
import sys
from collections.abc import Iterator
from importlib.metadata import version
from types import ModuleType
from typing import Any

import torch
from nemo_automodel._transformers import auto_model, infrastructure
from nemo_automodel.components.distributed.pipelining import functional as pipelining
from nemo_automodel.components.models.deepseek_v4 import model as deepseek_v4
from nemo_automodel.components.moe import parallelizer
from nemo_automodel.recipes.llm import kd, train_ft
from torch.distributed.tensor import DTensor, distribute_tensor

from nemo_dsv4_cp.automodel import patches

TESTED_RELEASE = "0.7.0"


class _Overlay(ModuleType):
    """A module with some of its names replaced; all others are looked up in the module itself."""

    def __init__(self, module: ModuleType, **replacements: object) -> None:
        super().__init__(module.__name__)
        self.__dict__.update(replacements)
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _torch(*, cuda: dict[str, object], **replacements: object) -> _Overlay:
    return _Overlay(torch, cuda=_Overlay(torch.cuda, **cuda), **replacements)


def _views() -> Iterator[tuple[ModuleType, tuple[str, ...], _Overlay]]:
    """Yield modules, the code that assumes CUDA in each, and the view of torch that it gets."""
    # recipes/llm/train_ft.py resets the peak memory in setup() and after every step. (Its other
    # two, empty_cache and max_memory_allocated, do nothing and return 0 without CUDA.)
    # recipes/llm/kd.py does the same after its steps.
    for recipe in (train_ft, kd):
        code = ("torch.cuda.reset_peak_memory_stats()",)
        yield recipe, code, _torch(cuda={"reset_peak_memory_stats": lambda: None})
    # _transformers/auto_model.py puts every model that it builds on the current CUDA device.
    yield (
        auto_model,
        (
            'torch.device("cuda", torch.cuda.current_device())',
            "device = torch.cuda.current_device()",
        ),
        _torch(
            device=lambda *_: torch.device("cpu"),
            cuda={"current_device": lambda: torch.device("cpu")},
        ),
    )
    # models/deepseek_v4/model.py initialises on the current CUDA device unless it gets another;
    # our class passes one, and AutoModel's model (context_parallel.enabled: false) gets none.
    yield (
        deepseek_v4,
        ('torch.device(f"cuda:{torch.cuda.current_device()}")',),
        _torch(device=lambda *_: torch.device("cpu"), cuda={"current_device": lambda: 0}),
    )
    # distributed/pipelining/functional.py waits for the device after a first message between
    # pipeline stages, where it knows the rows' length ahead, as with packed rows (from 0.6 on).
    yield pipelining, (), _torch(cuda={"synchronize": lambda *_: None})


def lift_cuda_assumptions() -> None:
    """Give AutoModel's modules a torch whose unchecked CUDA calls work without CUDA.

    Calling it again changes nothing.

    Raises:
        RuntimeError: torch sees a CUDA device, or AutoModel no longer has the code this is for.
    """
    if torch.cuda.is_available():
        raise RuntimeError(
            "torch.cuda.is_available() is True, and lift_cuda_assumptions() would put the model on "
            "the CPU regardless; call it only without CUDA, or hide the devices with "
            "CUDA_VISIBLE_DEVICES=''"
        )
    if patches.is_replaced(train_ft, "torch"):
        return
    views = list(_views())
    # moe/parallelizer.py, apply_cp: with ep_size > 1 and cp_size > 1 it imports transformer_engine
    # to recognize TE's attention, before it looks whether a model brings its own.
    imports = ("from transformer_engine.pytorch.attention import DotProductAttention",)
    for module, assumed, _ in (*views, (parallelizer, imports, None)):
        for code in assumed:
            if code not in inspect.getsource(module):
                raise RuntimeError(
                    f"{module.__name__} of nemo_automodel {version('nemo_automodel')} has no "
                    f"`{code}`; nemo_dsv4_cp.automodel.cpu was written for {TESTED_RELEASE}: "
                    "install that release to train on a CPU"
                )
    for module, _, view in views:
        patches.replace(module, "torch", view)
    if importlib.util.find_spec("transformer_engine") is None:
        apply_cp = _without_transformer_engine(parallelizer.apply_cp)
        patches.replace(parallelizer, "apply_cp", apply_cp)
    # moe/experts.py compiles its activations with max_autotune: on a CPU that takes half a minute,
    # and a C++ compiler.
    torch.compiler.set_stance("force_eager")


def _without_transformer_engine(apply_cp: Any) -> Any:
    name = "transformer_engine.pytorch.attention"
    stand_in = ModuleType(name)
    # No attention is an instance of it, which is the truth on a CPU.
    stand_in.__dict__["DotProductAttention"] = type("DotProductAttention", (), {})

    @functools.wraps(apply_cp)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        # Only for the call: others look in sys.modules whether transformer_engine can be used.
        sys.modules[name] = stand_in
        try:
            return apply_cp(*args, **kwargs)
        finally:
            del sys.modules[name]

    return wrapped


def _with_weights_of_seed(apply_model_infrastructure: Any, seed: int) -> Any:
    """Make random initial weights depend on the seed alone.

    AutoModel draws each rank's shard from that rank's own random stream. One process and two would
    start from different models, and their losses could not be compared. Here every rank also draws
    the whole model, which a model for the CPU can afford, and takes its shards of that.
    """

    @functools.wraps(apply_model_infrastructure)
    @torch.no_grad()
    def wrapped(model: Any, **kwargs: Any) -> Any:
        if kwargs.get("load_base_model"):
            return apply_model_infrastructure(model, **kwargs)
        whole = _whole_copy(model)  # on the meta device still
        model = apply_model_infrastructure(model, **kwargs)
        whole.to_empty(device="cpu")
        torch.manual_seed(seed)
        whole.initialize_weights(dtype=next(whole.parameters()).dtype)
        weights = dict(whole.named_parameters())
        for part in getattr(model, "parts", [model]):
            for name, parameter in part.named_parameters():
                # Activation checkpointing puts its wrapper's name into the path.
                path = name.replace("_checkpoint_wrapped_module.", "")
                weight = weights[path] if path in weights else _adapter(path, parameter)
                if isinstance(parameter, DTensor):
                    # All ranks hold the same values: nothing need be sent (src_data_rank=None).
                    weight = distribute_tensor(
                        weight, parameter.device_mesh, parameter.placements, src_data_rank=None
                    )
                parameter.copy_(weight)
        return model

    return wrapped


def _whole_copy(model: Any) -> Any:
    """Return a copy of a model whose Engram tables hold the rows of all ranks, not of one."""
    tables = _owner_sharded_tables(model)
    groups = [table.process_group for table in tables]
    for table in tables:
        table.process_group = None  # a process group cannot be copied
    whole = copy.deepcopy(model)
    for table, group in zip(tables, groups, strict=True):
        table.process_group = group
    for table in _owner_sharded_tables(whole):
        rows = table.weight.new_empty(table.num_embeddings, table.embedding_dim)
        table.weight, table.global_row_start = torch.nn.Parameter(rows), 0
    return whole


def _owner_sharded_tables(model: Any) -> list[Any]:
    """Return the tables that AutoModel builds as one rank's rows; releases before 0.7 have none."""
    return [module for module in model.modules() if hasattr(module, "num_embeddings_per_rank")]


def _adapter(name: str, parameter: torch.Tensor) -> torch.Tensor:
    """Return initial weights of what AutoModel adds to a model with `peft`: LoRA's B is zero."""
    if "lora_B" in name:
        return torch.zeros(parameter.shape)
    scale: float = parameter.shape[-1] ** -0.5
    return torch.randn(parameter.shape) * scale


class _OnCpu:
    """Sets a recipe of AutoModel up on the CPU, when torch sees no CUDA device.

    There, a model with random weights starts from the same ones on any number of processes.
    """

    def setup(self) -> None:
        """Lift AutoModel's CUDA assumptions if need be, then set up as AutoModel does."""
        if torch.cuda.is_available():
            super().setup()  # type: ignore[misc]
            return
        lift_cuda_assumptions()
        original = infrastructure.apply_model_infrastructure
        seed = self.cfg.get("seed", 42)  # type: ignore[attr-defined]
        auto_model.apply_model_infrastructure = _with_weights_of_seed(original, seed)
        try:
            super().setup()  # type: ignore[misc]
        finally:
            auto_model.apply_model_infrastructure = original


class CpuFinetuneRecipe(_OnCpu, train_ft.TrainFinetuneRecipeForNextTokenPrediction):
    """AutoModel's fine-tuning recipe, on the CPU."""


class CpuDistillationRecipe(_OnCpu, kd.KnowledgeDistillationRecipeForNextTokenPrediction):
    """AutoModel's knowledge-distillation recipe, on the CPU."""
