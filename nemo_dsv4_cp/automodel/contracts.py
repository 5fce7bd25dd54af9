# SPDX-License-Identifier: Apache-2.0
"""What we build on in AutoModel, and which of its contracts for batches a release has.

The adapter is selected by what is there, not by the release.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib
import inspect
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any, Protocol

from nemo_dsv4_cp.automodel import sharding

TESTED_RELEASES: tuple[str, ...] = ("0.7.0", "0.6.0", "0.5.0")
TESTED_WITH_V41: tuple[str, ...] = ("0.7.0",)
_V4 = "nemo_automodel.components.models.deepseek_v4"
_V41 = "nemo_automodel.components.models.deepseek_v41"
_RECIPE = "nemo_automodel.recipes.base_recipe"
_FINETUNE = "nemo_automodel.recipes.llm.train_ft"
_MOE = "nemo_automodel.components.moe"
_PEFT = "nemo_automodel.components._peft"


class UnsupportedAutoModel(ImportError):
    """The installed AutoModel lacks something that we build on."""

    def __init__(self, lacks: str, *, of_v41: bool = False) -> None:
        self.lacks = lacks
        try:
            installed = f"nemo_automodel {version('nemo_automodel')}"
        except PackageNotFoundError:
            installed = "nemo_automodel"
        # The older releases, which train V4, would be no help with V4.1.
        subject, releases = "nemo_dsv4_cp is", TESTED_RELEASES
        if of_v41:
            subject, releases = "DeepSeek-V4.1 in nemo_dsv4_cp is", TESTED_WITH_V41
        install = "it" if len(releases) == 1 else "one of these"
        super().__init__(
            f"{installed}: {lacks}. {subject} tested with nemo_automodel {', '.join(releases)}; "
            f"install {install}"
        )


@dataclass(frozen=True)
class Signature:
    """A function of AutoModel, and the arguments that we pass to it or read."""

    module: str
    name: str  # a method's with its class
    arguments: tuple[str, ...] = ()
    in_order: bool = False  # they are its first ones, in this order, since we replace it

    def check(self) -> None:
        """Raise :class:`UnsupportedAutoModel` if the function is gone or takes other arguments."""
        known = inspect.signature(_find(self.module, self.name)).parameters
        if missing := [name for name in self.arguments if name not in known]:
            raise UnsupportedAutoModel(
                f"{self.module}.{self.name} takes ({', '.join(known)}), without "
                f"{', '.join(missing)}"
            )
        if self.in_order and tuple(known)[: len(self.arguments)] != self.arguments:
            raise UnsupportedAutoModel(
                f"{self.module}.{self.name} takes ({', '.join(known)}), not "
                f"({', '.join(self.arguments)}) in this order"
            )


@dataclass(frozen=True)
class Body:
    """A function of AutoModel whose body a module of ours restates."""

    module: str
    name: str
    restated_in: str
    fingerprints: tuple[str, ...]  # of the body in each tested release

    def check(self) -> None:
        """Raise :class:`UnsupportedAutoModel` if no tested release has this body."""
        found = fingerprint(_find(self.module, self.name))
        if found not in self.fingerprints:
            raise UnsupportedAutoModel(
                f"{self.module}.{self.name} differs from that of every tested release (fingerprint "
                f"{found}), and {self.restated_in} restates it"
            )


def fingerprint(function: Any) -> str:
    """Return a digest of a function's arguments and statements; nothing else counts."""
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    if ast.get_docstring(node) is not None:  # type: ignore[arg-type]
        del node.body[0]  # type: ignore[attr-defined]
    return hashlib.sha256(repr(_statements(node)).encode()).hexdigest()[:16]


def _statements(node: Any) -> Any:
    # Not ast.dump, which writes the same code differently in Python 3.13.
    if isinstance(node, list):
        return [_statements(item) for item in node]
    if not isinstance(node, ast.AST):
        return node
    fields = [(k, _statements(v)) for k, v in ast.iter_fields(node) if k not in _NO_CODE]
    return [type(node).__name__, *(field for field in fields if field[1] not in (None, []))]


_NO_CODE = ("annotation", "returns", "type_comment", "kind")


def _find(module: str, name: str) -> Any:
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise UnsupportedAutoModel(f"there is no {module}.{name} ({error})") from error
    return found


class BatchContract(Protocol):
    """How a release's recipes come to shard batches with our model's own sharder: a module."""

    NAME: str
    SIGNATURES: tuple[Signature, ...]

    def install(self) -> None:
        """Patch what recipes need for it, process-wide; calling it again changes nothing."""

    def adopt(self, model: Any) -> None:
        """Note a new model of ours, where recipes do not call the model by themselves."""


_CP_UTILS = "nemo_automodel.components.distributed.cp_utils"


def batch_contract() -> BatchContract:
    """Return the adapter for what AutoModel has.

    Raises:
        UnsupportedAutoModel: If it has none that we know.
    """
    adapter = "sharder_contract" if sharding.HAS_SHARDER else "legacy.cp_utils_hook"
    if not sharding.HAS_SHARDER and find_spec(_CP_UTILS) is None:
        raise UnsupportedAutoModel(f"it shards batches in neither {sharding.PLACE} nor {_CP_UTILS}")
    found: Any = importlib.import_module(f"nemo_dsv4_cp.automodel.{adapter}")
    return found  # type: ignore[no-any-return]


def signatures() -> Iterator[Signature]:
    """Yield all that we rely on: of every release, then of this release's contract."""
    yield from _ALWAYS
    yield from batch_contract().SIGNATURES


def check_v4() -> None:
    """Raise :class:`UnsupportedAutoModel` for a release without DeepSeek-V4."""
    try:
        importlib.import_module(f"{_V4}.config")
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("nemo_automodel"):
            raise
        raise UnsupportedAutoModel(f"there is no {error.name}") from error


@functools.cache
def check_v41() -> None:
    """Raise :class:`UnsupportedAutoModel` for a release without DeepSeek-V4.1, or another's."""
    try:
        for signature in _V41_SIGNATURES:
            signature.check()
        for body in RESTATED_V41:
            body.check()
    except UnsupportedAutoModel as error:
        raise UnsupportedAutoModel(error.lacks, of_v41=True) from error


def has_v41() -> bool:
    """Return whether AutoModel has a DeepSeek-V4.1 that we can build on."""
    try:
        check_v41()
    except UnsupportedAutoModel:
        return False
    return True


@functools.cache
def check() -> None:
    """Raise :class:`UnsupportedAutoModel` if a signature or body changed; checked once if none."""
    for signature in signatures():
        signature.check()
    for body in RESTATED:
        body.check()


def signatures_of(functions: Mapping[str, Mapping[str, str]]) -> tuple[Signature, ...]:
    """Return signatures by module and name, of words; a last ``/`` if they come in this order."""
    return tuple(
        Signature(module, name, tuple(words.removesuffix(" /").split()), words.endswith("/"))
        for module, of_module in functions.items()
        for name, words in of_module.items()
    )


_ALWAYS = signatures_of(
    {
        f"{_V4}.layers": {
            "DeepseekV4Attention.__init__": "config layer_idx backend",
            "DeepseekV4Attention.forward": "hidden_states position_embeddings attention_mask "
            "position_embeddings_compress rotary_compress start_pos",
            "_dsv4_kernel_backend": "",
        },
        "nemo_automodel._transformers.capabilities": {
            "attach_capabilities_and_validate": "model mesh /",
        },
        "nemo_automodel._transformers.infrastructure": {
            "freeze_deepseek_v4_indexer_params": "model /",
        },
        f"{_V4}.optimized_kernels": {
            "dsv4_indexer_scores": "q pooled_kv weights compress_ratio softmax_scale backend",
            "dsv4_sparse_attention": "backend",
        },
        f"{_V4}.model": {
            "DeepseekV4Block.forward": "x position_embeddings position_embeddings_compress "
            "rotary_compress padding_mask input_ids attn_kwargs",
            "DeepseekV4ForCausalLM.initialize_weights": "buffer_device dtype",
            "compute_lm_head_logits": "logits_to_keep fp32_lm_head",
            "DeepseekV4HashGate.set_input_ids": "input_ids",
        },
        f"{_MOE}.megatron.moe_utils": {"MoEAuxLossAutoScaler.forward": "output aux_loss"},
        f"{_MOE}.layers": {"Gate.update_bias": "", "MoE.forward": "x padding_mask cp_mesh"},
        f"{_PEFT}.lora": {"apply_lora_to_linear_modules": "model peft_config /"},
        f"{_PEFT}.module_matcher": {"ModuleMatcher.match": "m name"},
        _RECIPE: {
            "BaseRecipe.load_checkpoint": "self restore_from /",
            "BaseRecipe._load_checkpoint_tracked_state": "self ckpt_dir /",
            "BaseRecipe._get_dp_rank": "include_cp",
            "BaseRecipe._get_dp_group_size": "include_cp",
        },
        _FINETUNE: {
            "TrainFinetuneRecipeForNextTokenPrediction.log_train_metrics": "self log_data /",
        },
        "nemo_automodel.components.checkpoint.checkpointing": {
            "Checkpointer.load_on_dp_ranks": "self state state_name path /",
        },
    }
)

RESTATED = (
    Body(
        f"{_V4}.model",
        "DeepseekV4Model.forward",
        "nemo_dsv4_cp.automodel.backbone",
        ("849b0eda48aaa3f0", "38e8affa73564c62", "64147be32cc7d3dc"),
    ),
    Body(
        f"{_V4}.model",
        "DeepseekV4Model.update_moe_gate_bias",
        "nemo_dsv4_cp.automodel.backbone",
        ("dbf752cb7565ac8e", "6fa87f1a46434992"),
    ),
    Body(
        f"{_V4}.model",
        "DeepseekV4ForCausalLM.forward",
        "nemo_dsv4_cp.automodel.mtp",
        ("d086d7018e3ed6c7", "b14c88b6f5b58ef6", "131265d70cf72ce0"),
    ),
)
"""Bodies of AutoModel that we restate; fingerprints of 0.7.0, 0.6.0 and 0.5.0 in this order."""

_V41_SIGNATURES = signatures_of(
    {
        f"{_V41}.attention": {
            "DeepseekV41Attention.__init__": "config layer_idx backend",
            "DeepseekV41Attention.forward": "hidden_states position_ids state attention_mask "
            "cp_group packed_seq_ids",
            "_apply_rope": "values angles",
            "quantize_cache": "values format block_size",
        },
        f"{_V41}.engram": {"DeepseekV41NgramHash.forward": "input_ids token_mask sequence_ids"},
        f"{_V41}.model": {
            "DeepseekV41Block.forward": "hidden_states pre_mix state position_ids attention_mask "
            "engram_hash_ids cp_group packed_seq_ids",
        },
    }
)

RESTATED_V41 = (
    Body(
        f"{_V41}.model",
        "DeepseekV41Model.forward",
        "nemo_dsv4_cp.automodel.backbone_v41",
        ("8ce8d46519e5a807",),
    ),
)
