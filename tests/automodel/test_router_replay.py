# SPDX-License-Identifier: Apache-2.0
"""Routes recorded at cp_size 1 are those of cp_size 2, in models with hash layers too."""

import pytest
import torch
from nemo_automodel.components.models.deepseek_v4.model import DeepseekV4ForCausalLM

from nemo_dsv4_cp.automodel.router_replay import HAS_REPLAY
from nemo_dsv4_cp.model import DeepseekV4ContextParallelForCausalLM
from tests.parity import GroupMesh, cpu_backend, randomise, tiny_config, worst

if HAS_REPLAY:
    from nemo_automodel.components.distributed.context_parallel.sharder import (
        ContextParallelSharder,
    )
    from nemo_automodel.components.moe.router_replay import RouterReplay, RouterReplayMode
else:
    pytest.skip("this AutoModel has no router replay", allow_module_level=True)

RATIOS = [0, 4, 128]  # the first layer routes by token id
ROWS, LENGTH, TOPK = 2, 300, 2


def build(cls, seed, **changes):
    overrides = {"enable_routing_replay": True}
    config = tiny_config(RATIOS, **changes)
    model = cls(config, backend=cpu_backend(), moe_overrides=overrides)
    model.initialize_weights(torch.device("cpu"), torch.float32)
    randomise(model, seed)
    return model.eval()


def replay_job(group, rank):
    """Replay at CP=2 what another model recorded at CP=1, beside AutoModel's own model."""
    RouterReplay.clear_registry()
    ids = torch.randint(0, 97, (ROWS, LENGTH), generator=torch.Generator().manual_seed(3))
    recorder = build(DeepseekV4ContextParallelForCausalLM, seed=5)
    with RouterReplay.record(), torch.no_grad():
        recorder(ids)
    recorded = RouterReplay.collect()

    RouterReplay.clear_registry()
    reference = build(DeepseekV4ForCausalLM, seed=0)
    gates = [m for m in reference.modules() if getattr(m, "router_replay", None) is not None]
    RouterReplay.clear_registry()
    for gate, indices in zip(gates, recorded, strict=True):
        gate.router_replay.set_target(indices)
        gate.router_replay.mode = RouterReplayMode.REPLAY
    mine = build(DeepseekV4ContextParallelForCausalLM, seed=0)

    class Mesh(dict):
        mesh_dim_names = ("cp",)

    batch = {"input_ids": ids, "labels": ids.clone()}
    sharder = ContextParallelSharder(mine, Mesh(cp=GroupMesh(group)), batch)
    _, batch = sharder.shard(batch)
    batch.pop("labels")
    shards = [
        sharder.shard_token_tensor(indices.view(ROWS, LENGTH, TOPK), fill=0).flatten(0, 1)
        for indices in recorded
    ]
    with torch.no_grad():
        own_routes = mine(**batch).logits
        with RouterReplay.replay(shards):
            replayed = mine(**batch).logits
        expected = reference(ids).logits
    gather = [sharder.gather_token_tensor(t, trim=True) for t in (replayed, own_routes)]
    return len(recorded), worst(gather[0], expected), worst(gather[1], expected)


def test_routes_recorded_at_one_rank_are_replayed_at_two(ranks):
    for layers, replayed, own_routes in ranks.run(replay_job, 2):
        assert layers == 2
        assert replayed < 1e-5
        assert own_routes > 1e-2  # the recorded routes are others than the model's own


def test_gates_of_other_models_stay_registered():
    RouterReplay.clear_registry()
    build(DeepseekV4ContextParallelForCausalLM, seed=0)
    build(DeepseekV4ContextParallelForCausalLM, seed=1)
    assert len(RouterReplay.instances()) == 4
    RouterReplay.clear_registry()


def test_replay_with_a_vision_tower_is_refused():
    vision = {"vision_n_layers": 1, "vision_dim": 64, "vision_n_heads": 4, "vision_inter_dim": 64}
    if not hasattr(tiny_config(RATIOS), "vision_n_layers"):
        pytest.skip("this AutoModel has no vision tower")
    RouterReplay.clear_registry()
    with pytest.raises(ValueError, match=r"enable_routing_replay=True: .*vision_n_layers: 0"):
        build(DeepseekV4ContextParallelForCausalLM, seed=0, **vision)
    assert RouterReplay.instances() == []  # what was refused leaves nothing behind
