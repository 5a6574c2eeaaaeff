"""Records small adapters made by PEFT on models made by `transformers`, and checks adapters of ours with them.

    python tests/peers/record_adapters.py                 # writes tests/peers/adapters/
    python tests/peers/record_adapters.py --check=DIR     # DIR/CASE/: loads them in PEFT, compares the logits

Needs torch, transformers and peft (`pip install -e ".[peers]"`); the recorded cases are what the tests need, an archive
for each architecture (archives.py).
"""

from __future__ import annotations

import argparse
import json
import tempfile
import warnings
from pathlib import Path

import numpy as np
import peft
import torch
import transformers
from archives import pack, unpacked
from safetensors.numpy import load_file, save_file

HERE = Path(__file__).resolve().parent / "adapters"

# Case: architecture, options of PEFT's LoraConfig.
CASES = {
    "llama_lora": ("llama", {"target_modules": ["q_proj", "v_proj", "down_proj"], "r": 3, "lora_alpha": 5}),
    "llama_rslora": (
        "llama",
        {"target_modules": "all-linear", "r": 4, "use_rslora": True, "rank_pattern": {"o_proj": 2}},
    ),
    "llama_dora": ("llama", {"target_modules": ["k_proj", "o_proj", "up_proj"], "r": 2, "use_dora": True}),
    "gpt2_lora": (
        "gpt2",
        {"target_modules": ["c_attn", "mlp.c_proj"], "r": 3, "alpha_pattern": {"c_attn": 2}, "fan_in_fan_out": True},
    ),
    "gpt2_dora": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "r": 2, "use_dora": True, "fan_in_fan_out": True}),
}


def model(architecture: str) -> torch.nn.Module:
    """A tiny model with random weights, all of them, so that none is missed."""
    if architecture == "llama":
        config = transformers.LlamaConfig(
            vocab_size=29, hidden_size=12, intermediate_size=20, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=4, rms_norm_eps=1e-5, tie_word_embeddings=False,
        )  # fmt: skip
        made = transformers.LlamaForCausalLM(config)
    else:
        config = transformers.GPT2Config(vocab_size=29, n_positions=16, n_embd=12, n_layer=2, n_head=3)
        made = transformers.GPT2LMHeadModel(config)
    with torch.no_grad():
        for weight in made.parameters():
            weight.copy_(weight.mean() + 0.3 * torch.randn_like(weight))
    return made.eval()


def logits(made: torch.nn.Module, tokens: np.ndarray) -> np.ndarray:
    """[B, T, V] float32."""
    with torch.no_grad():
        return made(torch.from_numpy(tokens).long()).logits.float().numpy()


def record(case: str, folder: Path) -> None:
    """Writes one case into a new folder: the adapter as PEFT saves it, the base's weights, tokens and logits."""
    architecture, options = CASES[case]
    torch.manual_seed(sorted(CASES).index(case))
    base = model(architecture)
    tokens = np.random.default_rng(0).integers(0, 29, (2, 9))
    weights = {f"base.{name}": tensor.detach().numpy().copy() for name, tensor in base.named_parameters()}
    before = logits(base, tokens)
    config = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **options)
    adapted = peft.get_peft_model(base, config).eval()
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "magnitude" in name:
                weight.mul_(1 + 0.2 * torch.randn_like(weight))
    after = logits(adapted, tokens)
    assert np.abs(after - before).max() > 0.1
    adapted.save_pretrained(folder)
    for other in set(folder.iterdir()) - {folder / "adapter_config.json", folder / "adapter_model.safetensors"}:
        other.unlink()
    saved = weights | {"input_ids": tokens, "base_logits": before, "logits": after}
    save_file({name: np.ascontiguousarray(array) for name, array in saved.items()}, folder / "case.safetensors")


def check(directory: Path) -> None:
    """Loads every DIR/CASE in PEFT over the recorded base; prints and limits the error of the logits."""
    for folder in sorted(directory.iterdir()):
        saved = load_file(unpacked(HERE) / folder.name / "case.safetensors")
        base = model(CASES[folder.name][0])
        with torch.no_grad():
            for name, weight in base.named_parameters():
                weight.copy_(torch.from_numpy(saved[f"base.{name}"]))
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # PEFT warns of keys that are missing
            warnings.simplefilter("ignore", FutureWarning)
            adapted = peft.PeftModel.from_pretrained(base, folder).eval()
        wanted = saved["logits"]
        error = float((np.abs(logits(adapted, saved["input_ids"]) - wanted) / (1 + np.abs(wanted).max())).max())
        print(json.dumps({"case": folder.name, "error": error}))
        assert error <= 1e-5


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", type=Path)
    given = parser.parse_args()
    if given.check:
        check(given.check)
    else:
        for architecture in ("gpt2", "llama"):
            with tempfile.TemporaryDirectory() as directory:
                folders = [Path(directory) / name for name in CASES if CASES[name][0] == architecture]
                for folder in folders:
                    record(folder.name, folder)
                print(pack(folders, HERE / f"{architecture}.zip"))
