# SPDX-License-Identifier: Apache-2.0
"""What we build on in AutoModel, and which of its contracts for batches a release has.

The adapter is chosen by what is there, not by the release.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any, Protocol

from nemo_dsv4_cp.automodel import sharding

TESTED_RELEASES = ("0.7.0", "0.6.0", "0.5.0")
_V4 = "nemo_automodel.components.models.deepseek_v4"
_RECIPE = "nemo_automodel.recipes.base_recipe"
_MOE = "nemo_automodel.components.moe"
_PEFT = "nemo_automodel.components._peft"


class UnsupportedAutoModel(ImportError):
    """The installed AutoModel lacks something that we build on."""

    def __init__(self, lacks: str) -> None:
        try:
            installed = f"nemo_automodel {version('nemo_automodel')}"
        except PackageNotFoundError:
            installed = "nemo_automodel"
        super().__init__(
            f"{installed}: {lacks}. nemo_dsv4_cp is tested with nemo_automodel "
            f"{', '.join(TESTED_RELEASES)}; install one of these"
        )


@dataclass(frozen=True)
class Signature:
    """A function of AutoModel, and arguments that we pass to it or take from it.

    Attributes:
        module: Where it is.
        name: Its name there, a method's with its class.
        arguments: Those that we count on, by name.
        in_order: Whether they must also be its first ones, in this order, since we stand in for it.
    """

    module: str
    name: str
    arguments: tuple[str, ...] = ()
    in_order: bool = False

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
    """A function of AutoModel whose body we restate.

    Attributes:
        module: Where it is.
        name: Its name there, a method's with its class.
        restated_in: Our module that must follow a change of it.
        fingerprints: Of the body in each tested release.
    """

    module: str
    name: str
    restated_in: str
    fingerprints: tuple[str, ...]

    def check(self) -> None:
        """Raise :class:`UnsupportedAutoModel` if no tested release has this body.

        Whatever the release: as with signatures, one that differs is not trained with.
        """
        found = fingerprint(_find(self.module, self.name))
        if found not in self.fingerprints:
            raise UnsupportedAutoModel(
                f"{self.module}.{self.name} differs from that of every tested release (fingerprint "
                f"{found}), and {self.restated_in} restates it"
            )


def fingerprint(function: Any) -> str:
    """Return a digest of a function's arguments and statements.

    Annotations, docstrings, comments and layout do not count.
    """
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
    """How a release's recipes come to cut batches with our model's own sharder."""

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
    adapter = "sharder_contract" if sharding.HAS_SHARDER else "legacy.cp_utils_contract"
    if not sharding.HAS_SHARDER and find_spec(_CP_UTILS) is None:
        raise UnsupportedAutoModel(f"it cuts batches in neither {sharding.PLACE} nor {_CP_UTILS}")
    found: Any = importlib.import_module(f"nemo_dsv4_cp.automodel.{adapter}")
    return found  # type: ignore[no-any-return]


def signatures() -> Iterator[Signature]:
    """All that we count on, the parts of every release first, then those of this release's."""
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
def check() -> None:
    """Raise :class:`UnsupportedAutoModel` for the first signature or body that is not as we know.

    A release that was found to have all is not checked again.
    """
    for signature in signatures():
        signature.check()
    for body in RESTATED:
        body.check()


_ALWAYS = (
    Signature(f"{_V4}.layers", "DeepseekV4Attention.__init__", ("config", "layer_idx", "backend")),
    Signature(
        f"{_V4}.layers",
        "DeepseekV4Attention.forward",
        (
            "hidden_states",
            "position_embeddings",
            "attention_mask",
            "position_embeddings_compress",
            "rotary_compress",
            "start_pos",
        ),
    ),
    Signature(f"{_V4}.layers", "_dsv4_kernel_backend"),
    Signature(
        "nemo_automodel._transformers.capabilities",
        "attach_capabilities_and_validate",
        ("model", "mesh"),
        in_order=True,
    ),
    Signature(
        f"{_V4}.optimized_kernels",
        "dsv4_indexer_scores",
        ("q", "pooled_kv", "weights", "compress_ratio", "softmax_scale", "backend"),
    ),
    Signature(f"{_V4}.optimized_kernels", "dsv4_sparse_attention", ("backend",)),
    Signature(
        f"{_V4}.model",
        "DeepseekV4Block.forward",
        (
            "x",
            "position_embeddings",
            "position_embeddings_compress",
            "rotary_compress",
            "padding_mask",
            "input_ids",
            "attn_kwargs",
        ),
    ),
    Signature(
        f"{_V4}.model",
        "DeepseekV4ForCausalLM.initialize_weights",
        ("buffer_device", "dtype"),
    ),
    Signature(f"{_V4}.model", "compute_lm_head_logits", ("logits_to_keep", "fp32_lm_head")),
    Signature(f"{_V4}.model", "DeepseekV4HashGate.set_input_ids", ("input_ids",)),
    Signature(f"{_MOE}.layers", "Gate.update_bias"),
    Signature(f"{_MOE}.layers", "MoE.forward", ("x", "padding_mask", "cp_mesh")),
    Signature(
        f"{_PEFT}.lora", "apply_lora_to_linear_modules", ("model", "peft_config"), in_order=True
    ),
    Signature(f"{_PEFT}.module_matcher", "ModuleMatcher.match", ("m", "name")),
    Signature(_RECIPE, "BaseRecipe.load_checkpoint", ("self", "restore_from"), in_order=True),
    Signature(
        _RECIPE, "BaseRecipe._load_checkpoint_tracked_state", ("self", "ckpt_dir"), in_order=True
    ),
    Signature(_RECIPE, "BaseRecipe._get_dp_rank", ("include_cp",)),
    Signature(_RECIPE, "BaseRecipe._get_dp_group_size", ("include_cp",)),
    Signature(
        "nemo_automodel.components.checkpoint.checkpointing",
        "Checkpointer.load_on_dp_ranks",
        ("self", "state", "state_name", "path"),
        in_order=True,
    ),
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
