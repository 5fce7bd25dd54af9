"""What we take for granted of the host's functions: who changed is named by the failing test."""

import importlib
import inspect

import pytest

LAYERS = "nemo_automodel.components.models.deepseek_v4.layers"
KERNELS = "nemo_automodel.components.models.deepseek_v4.optimized_kernels"
MODEL = "nemo_automodel.components.models.deepseek_v4.model"
SHARDER = "nemo_automodel.components.distributed.context_parallel.sharder"
MTP = "nemo_automodel.components.models.common.mtp"

# Function, and the arguments that we pass to it or take from it.
IN_EVERY_RELEASE = [
    (LAYERS, "DeepseekV4Attention.__init__", ["config", "layer_idx", "backend"]),
    (
        LAYERS,
        "DeepseekV4Attention.forward",
        [
            "hidden_states",
            "position_embeddings",
            "attention_mask",
            "position_embeddings_compress",
            "rotary_compress",
            "start_pos",
        ],
    ),
    (LAYERS, "_apply_partial_rope", None),
    (LAYERS, "_dsv4_kernel_backend", None),
    (
        KERNELS,
        "dsv4_indexer_scores",
        ["q", "pooled_kv", "weights", "compress_ratio", "softmax_scale", "backend"],
    ),
    (KERNELS, "dsv4_sparse_attention", ["backend"]),
    (
        MODEL,
        "DeepseekV4Block.forward",
        [
            "x",
            "position_embeddings",
            "position_embeddings_compress",
            "rotary_compress",
            "padding_mask",
            "input_ids",
            "attn_kwargs",
        ],
    ),
    (MODEL, "DeepseekV4ForCausalLM.initialize_weights", ["buffer_device", "dtype"]),
    (MODEL, "compute_lm_head_logits", ["is_thd", "fp32_lm_head"]),
]
SINCE_SOME_RELEASE = [
    (
        SHARDER,
        "ContextParallelSharder.__init__",
        ["shard_batch", "local_token_global_indices", "loss_mask", "padding_token_id"],
    ),
    (SHARDER, "ContextParallelSharder.shard_token_tensor", ["tensor", "seq_dim", "fill"]),
    (SHARDER, "ContextParallelSharder.gather_token_tensor", ["tensor", "seq_dim", "trim", "fill"]),
    (MTP, "prepare_mtp_context_parallel_inputs", ["batch", "num_depths", "ignore_index"]),
    (
        "nemo_automodel.components.distributed.cp_utils",
        "make_cp_batch_and_ctx",
        ["device_mesh", "batch", "loss_mask", "use_te", "padding_token_id", "num_chunks"],
    ),
]


def check(module, name, arguments):
    found = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    known = inspect.signature(found).parameters
    missing = [argument for argument in arguments or [] if argument not in known]
    assert not missing, f"{module}.{name} no longer takes {missing}; it takes {list(known)}"


@pytest.mark.parametrize(("module", "name", "arguments"), IN_EVERY_RELEASE)
def test_the_host_takes_what_we_pass(module, name, arguments):
    check(module, name, arguments)


@pytest.mark.parametrize(("module", "name", "arguments"), SINCE_SOME_RELEASE)
def test_contracts_of_some_releases_are_as_we_know_them(module, name, arguments):
    try:
        owner = importlib.import_module(module)
    except ModuleNotFoundError:
        pytest.skip(f"this release has no {module}; another contract is used instead")
    if not hasattr(owner, name.split(".")[0]):
        pytest.skip(f"this release has no {module}.{name}; MTP under CP is refused there")
    check(module, name, arguments)
