"""Draws small random BERT and T5 models with transformers and records what they compute, for test_encoder_cases.py.

    python tests/peers/record_encoders.py --out=tests/peers/cases [--draws=3 --seed=0]     (needs the extra [peers])
    python tests/peers/record_encoders.py --check=DIR

Writes an archive for each architecture (archives.py). A case in it is a directory: config.json and model.safetensors as
`save_pretrained` writes them, and case.npz with the inputs, the logits, the loss, and the norm of the loss's gradient
for every tensor of model.safetensors (`gradient:NAME`); for T5 also greedy `sequences`. Dropout is off; weights are
drawn wide, so that attention is far from uniform.

--check loads every case under DIR from its subdirectory `exported` and prints how far the logits are from those
recorded, as JSON.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from archives import pack
from safetensors.torch import load_file

# What differs between the draws of a family; everything else is drawn.
BERT = [
    {"hidden_act": "gelu", "layer_norm_eps": 1e-12, "hidden_size": 24, "heads": 3, "type_vocab_size": 2},
    {"hidden_act": "gelu_new", "layer_norm_eps": 1e-3, "hidden_size": 32, "heads": 4, "type_vocab_size": 3},
    {"hidden_act": "relu", "layer_norm_eps": 1e-5, "hidden_size": 16, "heads": 1, "type_vocab_size": 1},
]
T5 = [
    {"feed_forward_proj": "relu", "layer_norm_epsilon": 1e-6, "num_heads": 3, "d_kv": 6, "num_decoder_layers": 3},
    {"feed_forward_proj": "gated-gelu", "layer_norm_epsilon": 1e-3, "num_heads": 2, "d_kv": 16, "num_decoder_layers": 1}
    | {"tie_word_embeddings": False, "untied": True, "relative_attention_num_buckets": 8},
    {"feed_forward_proj": "gated-silu", "layer_norm_epsilon": 1e-12, "num_heads": 4, "d_kv": 4, "num_decoder_layers": 2}
    | {"tie_word_embeddings": False, "relative_attention_max_distance": 20},
]
ROWS, TOKENS = 3, 24


def widen(model: torch.nn.Module, rng: np.random.Generator) -> None:
    """Draws every weight anew: matrices normal with outputs as wide as inputs, norms around 1, biases around 0."""
    seen = set()
    for name, weight in model.named_parameters():
        if id(weight) in seen:
            continue
        seen.add(id(weight))
        values = rng.normal(size=tuple(weight.shape))
        if weight.ndim == 1:
            values = 0.2 * values + (1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0)
        elif "shared" in name or "embed" in name or "relative" in name:
            values = 0.8 * values
        else:
            values = values * 1.2 / np.sqrt(weight.shape[1])
        weight.data = torch.tensor(values, dtype=torch.float32)


def record(folder: Path, model: Any, inputs: dict[str, np.ndarray], labels: dict[str, np.ndarray], new: int) -> None:
    """Writes one case. `labels` go into the loss; `new`: so many greedy tokens."""
    model.eval()
    tensors = {name: torch.tensor(a) for name, a in (inputs | labels).items()}
    out = model(**tensors)
    out.loss.backward()
    found = {name: value.detach().numpy() for name, value in out.items() if name.endswith("logits")}
    model.save_pretrained(folder)
    saved = load_file(folder / "model.safetensors").keys()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    gradients = {
        f"gradient:{name}": np.float32(0.0 if parameters[name].grad is None else parameters[name].grad.norm())
        for name in saved
    }
    if new:
        ask = {name: tensors[name] for name in inputs if not name.startswith("decoder")}
        with torch.no_grad():
            greedy = model.generate(**ask, max_new_tokens=new, do_sample=False, num_beams=1, use_cache=False)
        found["sequences"] = greedy.numpy()
    np.savez_compressed(folder / "case.npz", **inputs, **labels, **found, **gradients, loss=np.float32(out.loss.item()))


def padded(rng: np.random.Generator) -> np.ndarray:
    """Attention masks [ROWS, TOKENS]: the first row is full, the others end early."""
    lengths = np.array([TOKENS, *rng.integers(TOKENS // 3, TOKENS, ROWS - 1)])
    return (np.arange(TOKENS) < lengths[:, None]).astype(np.int64)


def bert_cases(to: Path, draws: int, seed: int) -> None:
    """Every head with every draw."""
    for draw, options in enumerate(BERT[:draws]):
        rng = np.random.default_rng([seed, draw])
        vocab, labels = int(rng.integers(40, 90)), int(rng.integers(3, 6))
        heads = {"num_attention_heads": options["heads"]}
        shared = {name: value for name, value in options.items() if name != "heads"} | heads
        shared |= {
            "vocab_size": vocab,
            "num_hidden_layers": int(rng.integers(1, 4)),
            "intermediate_size": int(rng.integers(20, 50)),
            "max_position_embeddings": int(rng.integers(TOKENS, 2 * TOKENS)),
        }
        for head in HEADS:
            more, targets = HEADS[head](rng, vocab, labels)
            config = transformers.BertConfig(**(shared | {"num_labels": labels} | more))
            mask = padded(rng)
            inputs = {
                "input_ids": rng.integers(1, vocab, (ROWS, TOKENS)),  # Of 0, padding, the embedding has no gradient.
                "attention_mask": mask,
                "token_type_ids": rng.integers(0, config.type_vocab_size, (ROWS, TOKENS)),
            }
            if head == "BertForQuestionAnswering":
                inputs["attention_mask"] = np.ones_like(mask)
            torch.manual_seed(seed)
            model = getattr(transformers, head.partition("-")[0])(config)
            widen(model, rng)
            record(to / f"{head}-{draw}", model, inputs, targets(mask), new=0)


def ignored(labels: np.ndarray, keep: np.ndarray) -> np.ndarray:
    return np.where(keep, labels, -100)


def some(rng: np.random.Generator, vocab: int, mask: np.ndarray) -> np.ndarray:
    return ignored(rng.integers(0, vocab, mask.shape), (rng.random(mask.shape) < 0.3) & (mask > 0))


HEADS: dict[str, Any] = {  # name: (rng, vocab, labels) -> (options, mask -> labels)
    "BertForMaskedLM": lambda rng, vocab, labels: (
        {},
        lambda mask: {"labels": some(rng, vocab, mask)},
    ),
    "BertForPreTraining": lambda rng, vocab, labels: (
        {"type_vocab_size": 2},
        lambda mask: {
            "labels": some(rng, vocab, mask),
            "next_sentence_label": rng.integers(0, 2, ROWS),
        },
    ),
    "BertForSequenceClassification": lambda rng, vocab, labels: (
        {"problem_type": "single_label_classification"},
        lambda mask: {"labels": rng.integers(0, labels, ROWS)},
    ),
    "BertForSequenceClassification-regression": lambda rng, vocab, labels: (
        {"problem_type": "regression", "num_labels": 1},
        lambda mask: {"labels": rng.normal(size=ROWS).astype(np.float32)},
    ),
    "BertForSequenceClassification-multi_label": lambda rng, vocab, labels: (
        {"problem_type": "multi_label_classification"},
        lambda mask: {"labels": rng.integers(0, 2, (ROWS, labels)).astype(np.float32)},
    ),
    "BertForTokenClassification": lambda rng, vocab, labels: (
        {},
        lambda mask: {"labels": ignored(rng.integers(0, labels, mask.shape), mask > 0)},
    ),
    "BertForQuestionAnswering": lambda rng, vocab, labels: (
        {"num_labels": 2},
        lambda mask: {
            "start_positions": rng.integers(0, TOKENS, ROWS),
            "end_positions": rng.integers(0, TOKENS, ROWS),
        },
    ),
}


def t5_cases(to: Path, draws: int, seed: int) -> None:
    """Version 1.0, version 1.1 (gated, its head untied), and a tied head without scaling."""
    for draw, options in enumerate(T5[:draws]):
        rng = np.random.default_rng([seed, 100 + draw])
        vocab, options = int(rng.integers(40, 90)), dict(options)
        untied = options.pop("untied", False)
        config = transformers.T5Config(
            vocab_size=vocab,
            d_model=int(rng.integers(3, 6)) * 8,
            d_ff=int(rng.integers(20, 50)),
            num_layers=2,
            decoder_start_token_id=0,
            dropout_rate=0.0,
            **options,
        )
        torch.manual_seed(seed)
        model = transformers.T5ForConditionalGeneration(config)
        if untied:  # as the published 1.1 checkpoints are, which transformers loads so
            model.lm_head.weight = torch.nn.Parameter(torch.empty(vocab, config.d_model))
        widen(model, rng)
        mask = padded(rng)
        inputs = {"input_ids": rng.integers(2, vocab, mask.shape), "attention_mask": mask}
        inputs["decoder_input_ids"] = np.concatenate([np.zeros((ROWS, 1), int), rng.integers(2, vocab, (ROWS, 29))], 1)
        labels = ignored(rng.integers(2, vocab, (ROWS, 30)), rng.random((ROWS, 30)) < 0.8)
        record(to / f"T5ForConditionalGeneration-{draw}", model, inputs, {"labels": labels}, new=12)


def check(directory: Path) -> dict[str, float]:
    """The largest error of each exported model's logits."""
    errors = {}
    for file in sorted(directory.glob("*/case.npz")):
        arrays = dict(np.load(file))
        config = transformers.AutoConfig.from_pretrained(file.parent / "exported")
        model = getattr(transformers, config.architectures[0]).from_pretrained(file.parent / "exported").eval()
        names = ("input_ids", "attention_mask", "token_type_ids", "decoder_input_ids")
        with torch.no_grad():
            found = model(**{name: torch.tensor(arrays[name]) for name in names if name in arrays})
        errors[file.parent.name] = max(
            float(np.abs(found[n].numpy() - a).max() / (1 + np.abs(a).max()))
            for n, a in arrays.items()
            if "logits" in n
        )
    return errors


def main() -> None:
    """Records all cases, or checks exported ones."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--draws", type=int, default=3, choices=(1, 2, 3))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--check", type=Path)
    arguments = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if arguments.check:
        print(json.dumps(check(arguments.check)))
        return
    with tempfile.TemporaryDirectory() as folder:
        for make in (bert_cases, t5_cases):
            make(Path(folder), arguments.draws, arguments.seed)
        cases = sorted(Path(folder).iterdir())
        for name in sorted({case.name.rpartition("-")[0] for case in cases}):
            print(pack([case for case in cases if case.name.rpartition("-")[0] == name], arguments.out / f"{name}.zip"))


if __name__ == "__main__":
    main()
