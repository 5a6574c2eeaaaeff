"""Adapters as PEFT writes and reads them: recorded cases in, the same cases out; live where PEFT is installed."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from model import kinds
from model.config import ModelConfig
from model.place import Place
from model.weights import bind
from tests.peers.archives import unpacked
from tpu.errors import UserError
from train.adapter import peft
from train.adapter import weights as adapter_weights
from train.config import AdapterConfig

HERE = Path(__file__).resolve().parent
ADAPTERS = unpacked(HERE / "adapters")
CASES = sorted(path.name for path in ADAPTERS.iterdir())

LLAMA = ModelConfig(
    vocab_size=29,
    layers=2,
    embed_dim=12,
    heads=4,
    kv_heads=2,
    head_dim=4,
    mlp_dim=20,
    activation="swiglu",
    norm="rmsnorm",
    norm_eps=1e-5,
    attention_bias=False,
    mlp_bias=False,
    tied_head=False,
)
GPT2 = ModelConfig(vocab_size=29, layers=2, embed_dim=12, heads=3, positions="learned", max_positions=16)


def base_of(case: str) -> tuple[ModelConfig, Any, dict[str, np.ndarray]]:
    """The config, our weights of the recorded base, and what else was recorded."""
    saved = load_file(ADAPTERS / case / "case.safetensors")
    theirs = {name.removeprefix("base."): array for name, array in saved.items() if name.startswith("base.")}
    make = _llama if case.startswith("llama") else _gpt2
    config, weights = make(theirs)
    return config, weights, saved


def _stacked(parts: list[Any]) -> Any:
    return jax.tree.map(lambda *arrays: np.stack(arrays), *parts)


def _llama(theirs: dict[str, np.ndarray]) -> tuple[ModelConfig, Any]:
    config = LLAMA.resolved().placed("cpu", "float32")
    d, h, g, k = config.embed_dim, config.heads, config.kv_heads, config.head_dim

    def layer(i: int) -> dict[str, Any]:
        of = lambda name: theirs[f"model.layers.{i}.{name}.weight"]  # noqa: E731
        return {
            "attention_norm": {"scale": of("input_layernorm")},
            "mlp_norm": {"scale": of("post_attention_layernorm")},
            "attention": {
                "query": {"kernel": of("self_attn.q_proj").T.reshape(d, h, k)},
                "key": {"kernel": of("self_attn.k_proj").T.reshape(d, g, k)},
                "value": {"kernel": of("self_attn.v_proj").T.reshape(d, g, k)},
                "out": {"kernel": of("self_attn.o_proj").T.reshape(h, k, d)},
            },
            "mlp": {name: {"kernel": of(f"mlp.{name}_proj").T} for name in ("gate", "up", "down")},
        }

    return config, {
        "embedding": {"embedding": theirs["model.embed_tokens.weight"]},
        "stack": {"groups": {"layer_0": _stacked([layer(i) for i in range(2)])}},
        "final_norm": {"scale": theirs["model.norm.weight"]},
        "head": {"linear": {"kernel": theirs["lm_head.weight"].T}},
    }


def _gpt2(theirs: dict[str, np.ndarray]) -> tuple[ModelConfig, Any]:
    config = GPT2.resolved().placed("cpu", "float32")
    d, h, k = config.embed_dim, config.heads, config.head_dim

    def layer(i: int) -> dict[str, Any]:
        of = lambda name: theirs[f"transformer.h.{i}.{name}"]  # noqa: E731
        both = lambda name, w, b: {w: of(f"{name}.weight"), b: of(f"{name}.bias")}  # noqa: E731
        kernels, biases = np.split(of("attn.c_attn.weight"), 3, 1), np.split(of("attn.c_attn.bias"), 3)
        attention = {
            name: {"kernel": kernel.reshape(d, h, k), "bias": bias.reshape(h, k)}
            for name, kernel, bias in zip(("query", "key", "value"), kernels, biases, strict=True)
        }
        out = both("attn.c_proj", "kernel", "bias")
        return {
            "attention_norm": both("ln_1", "scale", "bias"),
            "mlp_norm": both("ln_2", "scale", "bias"),
            "attention": attention | {"out": out | {"kernel": out["kernel"].reshape(h, k, d)}},
            "mlp": {"up": both("mlp.c_fc", "kernel", "bias"), "down": both("mlp.c_proj", "kernel", "bias")},
        }

    return config, {
        "embedding": {"embedding": theirs["transformer.wte.weight"]},
        "position_embedding": {"embedding": theirs["transformer.wpe.weight"]},
        "stack": {"groups": {"layer_0": _stacked([layer(i) for i in range(2)])}},
        "final_norm": {"scale": theirs["transformer.ln_f.weight"], "bias": theirs["transformer.ln_f.bias"]},
    }


def logits(config: ModelConfig, weights: Any, tokens: np.ndarray) -> np.ndarray:
    place = Place(jnp.ones_like(tokens), jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape))
    graph = kinds.build(config)[0]

    def compute(weights: Any) -> jax.Array:
        model = bind(graph, weights)
        return model.head(model(jnp.asarray(tokens), place)[0])

    return np.asarray(jax.jit(compute)(jax.tree.map(jnp.asarray, weights)))


def close(found: np.ndarray, wanted: np.ndarray) -> None:
    assert (np.abs(found - wanted) / (1 + np.abs(wanted).max())).max() <= 1e-5


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_of_peft_gives_its_logits(case):
    config, base, saved = base_of(case)
    close(logits(config, base, saved["input_ids"]), saved["base_logits"])
    adapter, trained = peft.load(ADAPTERS / case, config, base)
    close(logits(config, adapter_weights.combined(adapter, base, trained), saved["input_ids"]), saved["logits"])
    close(logits(config, adapter_weights.merged(adapter, base, trained), saved["input_ids"]), saved["logits"])


@pytest.mark.parametrize("case", CASES)
def test_what_is_exported_is_the_same_adapter(case, tmp_path):
    config, base, saved = base_of(case)
    adapter, trained = peft.load(ADAPTERS / case, config, base)
    peft.export(tmp_path, adapter, config, trained, base, "base")
    products, theirs = (products_of(path) for path in (tmp_path, ADAPTERS / case))
    assert products.keys() == theirs.keys()
    for name, product in products.items():
        np.testing.assert_allclose(product, theirs[name], rtol=0, atol=1e-6)
    again, once_more = peft.load(tmp_path, config, base)
    close(logits(config, adapter_weights.merged(again, base, once_more), saved["input_ids"]), saved["logits"])


def products_of(path: Path) -> dict[str, np.ndarray]:
    """What each module of a PEFT directory adds, and its lengths, by PEFT's own rules."""
    description = json.loads((path / peft.CONFIG).read_text())
    tensors, found = load_file(path / peft.TENSORS), {}
    for name, a in tensors.items():
        if name.endswith("lora_A.weight"):
            module = name.removesuffix(".lora_A.weight")
            alpha = next(
                (v for k, v in description["alpha_pattern"].items() if module.endswith(k.replace("\\", ""))),
                description["lora_alpha"],
            )
            scale = alpha / (len(a) ** 0.5 if description["use_rslora"] else len(a))
            found[module] = scale * tensors[f"{module}.lora_B.weight"] @ a
        elif name.endswith("lora_magnitude_vector"):
            found[name] = tensors[name]
    return found


def test_some_of_a_fused_matrix(tmp_path):
    """Values alone: queries and keys, which PEFT has in the same matrix, stay as they are."""
    config, base, saved = base_of("gpt2_lora")
    for kind in ("lora", "dora"):
        adapter = AdapterConfig(kind=kind, rank=2, alpha=3.0, targets=(r"value$", r"mlp\.down"))
        trained = adapter_weights.init(adapter, config, jax.random.key(0), base)
        trained = jax.tree.map(lambda w: w + 0.3 * jax.random.normal(jax.random.key(1), w.shape), trained)
        peft.export(tmp_path / kind, adapter, config, trained, base, "base")
        again, once_more = peft.load(tmp_path / kind, config, base)
        wanted = logits(config, adapter_weights.merged(adapter, base, trained), saved["input_ids"])
        close(logits(config, adapter_weights.merged(again, base, once_more), saved["input_ids"]), wanted)


def test_peft_loads_what_is_exported(tmp_path):
    if importlib.util.find_spec("peft") is None or importlib.util.find_spec("torch") is None:
        pytest.skip("needs torch and peft: pip install -e '.[peers]'")
    for case in CASES:
        config, base, _ = base_of(case)
        adapter, trained = peft.load(ADAPTERS / case, config, base)
        peft.export(tmp_path / case, adapter, config, trained, base, "base")
    command = [sys.executable, str(HERE / "record_adapters.py"), f"--check={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    errors = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [row["case"] for row in errors] == CASES


def edited(path: Path, tmp_path: Path, tensors: dict[str, Any] | None = None, **description: Any) -> Path:
    """A copy of a case with some fields and tensors replaced; None removes a tensor."""
    folder = tmp_path / "edited"
    shutil.copytree(path, folder)
    found = json.loads((folder / peft.CONFIG).read_text())
    (folder / peft.CONFIG).write_text(json.dumps(found | description))
    arrays = load_file(folder / peft.TENSORS) | (tensors or {})
    save_file({name: array for name, array in arrays.items() if array is not None}, folder / peft.TENSORS)
    return folder


NAME = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("description", "tensors", "message"),
    [
        ({"peft_type": "IA3"}, {}, "peft_type='IA3': not supported; valid: 'LORA'"),
        ({"bias": "all"}, {}, "bias='all': not supported"),
        ({"modules_to_save": ["lm_head"]}, {}, r"modules_to_save=\['lm_head'\]: not supported"),
        ({}, {f"{NAME}.lora_B.weight": None}, f"{NAME}.lora_B.weight is missing"),
        ({}, {f"{NAME}.lora_A.weight": np.zeros((3, 11), np.float32)}, r"is \[3, 11\], and the base needs \[3, 12\]"),
        ({}, {f"{NAME}.lora_magnitude_vector": np.zeros(16, np.float32)}, "not supported: .*magnitude_vector"),
        ({}, {"base_model.model.lm_head.lora_A.weight": np.zeros((3, 12), np.float32)}, "no such module; it has self_"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(description, tensors, message, tmp_path):
    config, base, _ = base_of("llama_lora")
    with pytest.raises(UserError, match=message):
        peft.load(edited(ADAPTERS / "llama_lora", tmp_path, tensors, **description), config, base)


def test_a_damaged_file_is_refused(tmp_path):
    folder, (config, base, _) = edited(ADAPTERS / "llama_lora", tmp_path), base_of("llama_lora")
    file = folder / peft.TENSORS
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"adapter_model\.safetensors: cannot be read"):
        peft.load(folder, config, base)
    file.unlink()
    with pytest.raises(UserError, match=r"adapter_model\.safetensors: .*give a directory that PEFT wrote"):
        peft.load(folder, config, base)
