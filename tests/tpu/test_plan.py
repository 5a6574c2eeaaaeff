"""The planner's arithmetic against closed forms."""

from __future__ import annotations

import pytest

from model.config import ModelConfig
from tpu import plan
from tpu.errors import UserError
from tpu.forecast import layer_weights, recomputed, saved_per_token
from train.config import Experiment
from train.summary import summarize


def llama(remat: str) -> ModelConfig:
    return ModelConfig(
        vocab_size=32, layers=2, embed_dim=64, heads=4, kv_heads=2, mlp_dim=96, activation="swiglu", remat=remat
    ).resolved()


def test_weights_of_a_layer_are_those_of_its_matrices():
    for activation in ("swiglu", "gelu"):
        shapes = {"embed_dim": 64, "heads": 4, "attention_bias": False, "mlp_bias": False, "activation": activation}
        counts = [
            summarize(Experiment(model=ModelConfig(vocab_size=4096, layers=n, **shapes)).resolved())["parameters"][
                "total"
            ]
            for n in (2, 3)
        ]
        norms = 2 * 2 * 64
        model = ModelConfig(vocab_size=4096, layers=2, **shapes).resolved()
        assert counts[1] - counts[0] - norms == layer_weights(model)


def test_what_is_saved_need_not_be_done_again():
    policies = ("full", "attention", "all_but_mlp", "projections", "none")
    saved = [saved_per_token(llama(remat), 1) for remat in policies]
    again = [recomputed(llama(remat)) for remat in policies]
    assert saved == sorted(set(saved))
    assert again == sorted(again, reverse=True)
    assert again[0] == pytest.approx(1 - 64 * 96 / layer_weights(llama("full")))
    assert again[-1] == 0


def test_every_candidate_uses_all_devices():
    experiment = Experiment(model=ModelConfig(layers=4, heads=4, embed_dim=64)).resolved()
    meshes = {
        tuple(v for k, v in c.items() if k.startswith("mesh.") and k != "mesh.zero")
        for c in plan._candidates(experiment, 8)
    }
    assert len(meshes) > 10
    for mesh in meshes:
        product = 1
        for size in mesh:
            product *= size
        assert product == 8


def test_an_impossible_override_is_named():
    with pytest.raises(UserError, match=r"mesh\.tensor=3: .*|model\.heads=6"):
        plan.overridden(Experiment().resolved(), {"mesh.tensor": 4})
