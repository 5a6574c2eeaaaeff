"""Draws tiny random models with transformers, and records what they compute, for tests that have no torch.

    python tests/peers/record_cases.py --out=tests/peers/cases [--families=llama,gpt2 --draws=3 --seed=0]
    python tests/peers/record_cases.py --check=DIR

Needs torch and transformers, nothing of Foursight. Writes an archive for each family (archives.py). Each case in it is
a directory as `save_pretrained` leaves it, with
`inputs.npz` and `outputs.npz` (arrays named as transformers names them), `prompt.npz` and `sequences` there for greedy
generation, and `case.json`: the loss, the norm of every weight's gradient, the tolerance, and after how many generated
tokens two are too near each other to tell apart. Options vary with the number of the draw, sizes with the seed.

--check loads every directory under DIR that has a `case.json` and prints how far the logits of the model in its
subdirectory `exported` are from those recorded, as JSON.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import pathlib
import tempfile
from typing import Any

import numpy as np
import safetensors.torch
import torch
import transformers
from archives import pack

NEW_TOKENS = 12
EAGER = {"attn_implementation": "eager", "experts_implementation": "eager"}
Options = dict[str, Any]


def default_rope(theta: float = 1e4) -> Options:
    """Rotary positions as they were first."""
    return {"rope_type": "default", "rope_theta": theta}


ROPES: list[Options] = [
    default_rope(),
    {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    | {"original_max_position_embeddings": 16},
    {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32},
    {"rope_type": "linear", "rope_theta": 1e3, "factor": 2.5},
    {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 64}
    | {"beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 1.3},
]
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 3.0}


def common(rng: np.random.Generator, draw: int) -> Options:
    """Sizes, and options that all decoders after Llama have; heads, key/value heads and head sizes of every ratio."""
    heads, kv_heads, head_dim, embed = [(4, 2, 8, 16), (4, 1, 6, 24), (2, 2, 16, 16), (6, 3, 4, 24)][draw % 4]
    return {
        "vocab_size": int(rng.integers(40, 64)),
        "hidden_size": embed,
        "intermediate_size": int(rng.integers(20, 40)),
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "rms_norm_eps": [1e-6, 1e-3, 1e-12][draw % 3],
        "max_position_embeddings": 64,
        "tie_word_embeddings": draw % 2 == 1,
        "hidden_act": ["silu", "gelu", "gelu_pytorch_tanh"][draw % 3],
    }


def gpt2(rng: np.random.Generator, draw: int) -> transformers.PreTrainedConfig:
    """GPT-2."""
    return transformers.GPT2Config(
        vocab_size=int(rng.integers(40, 64)),
        n_embd=[16, 24, 20][draw % 3],
        n_layer=2,
        n_head=[2, 4, 5][draw % 3],
        n_inner=[None, 40, 24][draw % 3],
        n_positions=40,
        activation_function=["gelu_new", "gelu", "relu"][draw % 3],
        layer_norm_epsilon=[1e-5, 1e-3, 1e-12][draw % 3],
        scale_attn_weights=draw % 3 != 2,
        tie_word_embeddings=draw % 3 != 1,
    )


def llama(rng: np.random.Generator, draw: int) -> transformers.PreTrainedConfig:
    """Llama 2 and 3."""
    rope = ([*ROPES[:3], DYNAMIC, *ROPES[3:]])[draw % 6]
    options = common(rng, draw) | {"rope_parameters": rope, "attention_bias": draw % 3 == 2, "mlp_bias": draw % 3 == 1}
    return transformers.LlamaConfig(**options | ({"max_position_embeddings": 9} if rope is DYNAMIC else {}))


def mistral(rng: np.random.Generator, draw: int) -> transformers.PreTrainedConfig:
    """Mistral."""
    options = common(rng, draw) | {"rope_parameters": [ROPES[0], ROPES[3], ROPES[2]][draw % 3]}
    return transformers.MistralConfig(**options, sliding_window=[5, 3, None][draw % 3])


def qwen2(rng: np.random.Generator, draw: int) -> transformers.PreTrainedConfig:
    """Qwen2."""
    options = common(rng, draw) | {"rope_parameters": [ROPES[0], ROPES[2], ROPES[4]][draw % 3]}
    del options["head_dim"]
    windows = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    return transformers.Qwen2Config(**options, **(windows if draw % 3 == 1 else {}))


def qwen3(rng: np.random.Generator, draw: int) -> transformers.PreTrainedConfig:
    """Qwen3."""
    options = common(rng, draw) | {"rope_parameters": [ROPES[4], ROPES[0], ROPES[3]][draw % 3]}
    windows = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 0}
    return transformers.Qwen3Config(**options, attention_bias=draw % 3 == 1, **(windows if draw % 3 == 2 else {}))


def gemma(options: Options, draw: int) -> Options:
    """What Gemma 2 and 3 have beside or instead of the common options."""
    options = options | {
        "hidden_activation": ["gelu_pytorch_tanh", "gelu", "gelu_pytorch_tanh"][draw % 3],
        "query_pre_attn_scalar": [16, 7, 24][draw % 3],
        "sliding_window": [4, 6, 3][draw % 3],
        "final_logit_softcapping": [None, 4.0, 30.0][draw % 3],
        "attention_bias": draw % 3 == 2,
        "tie_word_embeddings": draw % 3 != 2,
    }
    del options["hidden_act"]
    return options


def gemma2(rng: np.random.Generator, draw: int) -> transformers.PreTrainedConfig:
    """Gemma 2."""
    options = gemma(common(rng, draw), draw) | {"num_hidden_layers": [2, 4, 3][draw % 3]}
    caps = {"attn_logit_softcapping": [3.0, None, 50.0][draw % 3]}
    return transformers.Gemma2Config(**options, **caps, rope_parameters=default_rope())


def gemma3(rng: np.random.Generator, draw: int) -> transformers.PreTrainedConfig:
    """Gemma 3, text."""
    slides, sees = "sliding_attention", "full_attention"
    types = [[slides, slides, sees], [slides, sees] * 2, [slides, sees, sees]][draw % 3]
    ropes = {
        sees: [default_rope(1e6), ROPES[3], default_rope(1e5)][draw % 3],
        slides: default_rope([1e4, 1e2, 1e3][draw % 3]),
    }
    options = gemma(common(rng, draw), draw) | {"num_hidden_layers": len(types), "layer_types": types}
    return transformers.Gemma3TextConfig(**options, rope_parameters=ropes)


def olmo2(rng: np.random.Generator, draw: int) -> transformers.PreTrainedConfig:
    """OLMo 2."""
    options = common(rng, draw) | {"rope_parameters": [ROPES[0], ROPES[2], ROPES[1]][draw % 3]}
    return transformers.Olmo2Config(**options, attention_bias=draw % 3 == 1)


def mixtral(rng: np.random.Generator, draw: int) -> transformers.PreTrainedConfig:
    """Mixtral."""
    options = common(rng, draw) | {"rope_parameters": [ROPES[0], ROPES[3], ROPES[2]][draw % 3]}
    experts = {"num_local_experts": [4, 8, 3][draw % 3], "num_experts_per_tok": [2, 3, 1][draw % 3]}
    return transformers.MixtralConfig(**options, **experts, sliding_window=[None, 4, None][draw % 3])


def qwen3_moe(rng: np.random.Generator, draw: int) -> transformers.PreTrainedConfig:
    """Qwen3's mixtures of experts."""
    options = common(rng, draw) | {"rope_parameters": [ROPES[4], ROPES[0], ROPES[3]][draw % 3]}
    experts = {"num_experts": [4, 8, 5][draw % 3], "num_experts_per_tok": [2, 3, 4][draw % 3]}
    experts |= {"moe_intermediate_size": int(rng.integers(8, 24)), "decoder_sparse_step": [1, 2, 1][draw % 3]}
    return transformers.Qwen3MoeConfig(**options, **experts, norm_topk_prob=draw % 3 != 2, attention_bias=draw % 3 == 1)


FAMILIES = {f.__name__: f for f in (gpt2, llama, mistral, qwen2, qwen3, gemma2, gemma3, olmo2, mixtral, qwen3_moe)}


def randomize(model: torch.nn.Module, seed: int) -> None:
    """Weights, biases and norms of a size at which everything in a model matters."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        with torch.no_grad():
            if weight.ndim > 1:
                weight.copy_(noise * (0.7 if "wte" in name or "embed" in name else 1.2 / math.sqrt(weight.shape[1])))
            else:
                weight.add_(0.3 * noise)


def draw_inputs(rng: np.random.Generator, vocab_size: int, draw: int, slides: bool) -> tuple[Options, Options]:
    """Arrays for one forward pass and for generation: whole rows, padding on the left, padding on the right."""
    ids = rng.integers(0, vocab_size, (2, 13))
    inputs, prompt = {"input_ids": ids, "labels": ids.copy()}, {"input_ids": ids[:, :6]}
    padded = int(rng.integers(2, 5))
    if draw % 3 == 1:
        mask = np.ones_like(ids)
        mask[1, :padded] = 0
        # The first token's label too: it is the next one's of padding that sees nothing, which is anybody's guess.
        counted = mask & np.roll(mask, 1, axis=1)
        inputs["attention_mask"], inputs["labels"] = mask, np.where(counted, ids, -100)
        inputs["position_ids"] = np.maximum(np.cumsum(mask, 1) - 1, 0)
        prompt["attention_mask"] = mask[:, :6]
    if draw % 3 == 2:
        mask = np.ones_like(ids)
        mask[1, -padded:] = 0
        inputs["attention_mask"] = mask
        if slides:  # Padding after a window of padding sees nothing either.
            inputs["labels"] = np.where(mask, ids, -100)
    return inputs, prompt


def gradient_norms(model: transformers.PreTrainedModel) -> dict[str, float]:
    """The norm of every weight's gradient by the names of files, in which experts are tensors of their own."""
    twin = copy.deepcopy(model)
    for theirs, weight in zip(twin.parameters(), model.parameters(), strict=True):
        theirs.data = weight.grad.clone()
    with tempfile.TemporaryDirectory() as directory:
        twin.save_pretrained(directory)
        tensors = safetensors.torch.load_file(f"{directory}/model.safetensors")
    return {name: float(tensor.norm()) for name, tensor in tensors.items()}


def record(family: str, draw: int, seed: int, out: pathlib.Path) -> pathlib.Path:
    """Draws one model and writes its case."""
    rng = np.random.default_rng([seed, draw, sorted(FAMILIES).index(family)])
    config = FAMILIES[family](rng, draw)
    config.bos_token_id = config.pad_token_id = None
    config.eos_token_id = [None, int(rng.integers(config.vocab_size)), [1, 2]][draw % 3]
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config, **EAGER).eval()
    randomize(model, int(rng.integers(2**31)))
    slides = "sliding_attention" in (getattr(config, "layer_types", None) or ()) or family == "mistral"
    inputs, prompt = draw_inputs(rng, config.vocab_size, draw, slides)
    dynamic = (getattr(config, "rope_parameters", None) or {}).get("rope_type") == "dynamic"
    if dynamic:  # Within the trained context: transformers keeps keys that it has turned for a shorter text.
        prompt = {"input_ids": prompt["input_ids"][:, :4]}
    # Without a mask a prompt's tokens are taken for padding where they equal pad_token_id.
    prompt.setdefault("attention_mask", np.ones_like(prompt["input_ids"]))
    tensors = {name: torch.tensor(value) for name, value in inputs.items()}
    found = model(**tensors, output_hidden_states=True)
    found.loss.backward()
    gradients = gradient_norms(model)
    logits = found.logits.detach().numpy()
    longest = 9 - 4 if dynamic else NEW_TOKENS
    said = model.generate(
        **{name: torch.tensor(value) for name, value in prompt.items()},
        max_new_tokens=longest,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        pad_token_id=0 if config.eos_token_id is not None else None,
    )
    path = out / f"{family}_{draw}"
    model.generation_config.pad_token_id = 0 if config.eos_token_id is not None else None
    model.save_pretrained(path)
    exact = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64, **EAGER)
    # Of rows without padding: in float64 a token that sees nothing is NaN there.
    whole = {"input_ids": tensors["input_ids"]}
    with torch.no_grad():
        noise = error(model(**whole).logits.numpy(), exact.eval()(**whole).logits.numpy())
    tolerance = float(np.clip(20 * noise, 5e-6, 1e-5))
    two = torch.stack(said.logits, 1).topk(2).values  # [rows, steps, 2]
    near = ((two[..., 0] - two[..., 1]).amin(0) < 100 * tolerance).tolist()
    np.savez(path / "inputs.npz", **{n: v.astype(np.int32) for n, v in inputs.items()})
    np.savez(path / "prompt.npz", **{n: v.astype(np.int32) for n, v in prompt.items()})
    hidden = found.hidden_states[-1].detach().numpy()
    np.savez(path / "outputs.npz", logits=logits, last_hidden_state=hidden, sequences=said.sequences.numpy())
    case = {
        "family": family,
        "loss": found.loss.item(),
        "gradient_norms": gradients,
        "tolerance": tolerance,
        "new_tokens": longest,
        "certain_tokens": near.index(True) if True in near else len(near),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    (path / "case.json").write_text(json.dumps(case, indent=1) + "\n")
    return path


def error(found: np.ndarray, wanted: np.ndarray) -> float:
    """max|a - b| / (1 + max|b|)."""
    return float(np.abs(found - wanted).max() / (1 + np.abs(wanted).max()))


def check(directory: pathlib.Path) -> dict[str, float]:
    """How far the exported models' logits are from those recorded."""
    errors = {}
    for case in sorted(directory.glob("*/case.json")):
        path = case.parent
        model = transformers.AutoModelForCausalLM.from_pretrained(path / "exported", dtype=torch.float32, **EAGER)
        inputs = dict(np.load(path / "inputs.npz"))
        seen = inputs.get("attention_mask", np.ones_like(inputs["input_ids"])) != 0
        logits = model.eval()(**{n: torch.tensor(v, dtype=torch.int64) for n, v in inputs.items()}).logits
        errors[path.name] = error(logits.detach().numpy()[seen], np.load(path / "outputs.npz")["logits"][seen])
    return errors


def main() -> None:
    """Records or checks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--families", default=",".join(FAMILIES))
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--check", type=pathlib.Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if options.check:
        print(json.dumps(check(options.check)))
        return
    for family in options.families.split(","):
        with tempfile.TemporaryDirectory() as folder:
            cases = [record(family, draw, options.seed, pathlib.Path(folder)) for draw in range(options.draws)]
            print(pack(cases, options.out / f"{family}.zip"))


if __name__ == "__main__":
    main()
