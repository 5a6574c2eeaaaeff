"""The multimodal models that record_vision.py draws, and the inputs that test them.

Images lie in the order of their placeholders, row after row. Texts are ragged: draw 0 pads nothing, draw 1 pads on the
left, draw 2 on the right; prompts of a generation are always padded on the left, as transformers needs them. Labels are
-100 but on the answer that ends a row.

Legend: B rows, T tokens.
"""

from __future__ import annotations

import numpy as np
import record_cases
import transformers
from vision_draws import Arrays, Drawn, padded, pixels, tower, words


def positions(mask: np.ndarray) -> np.ndarray:
    """How many tokens that are not padding precede each one: [B, T]."""
    return np.maximum(np.cumsum(mask, 1) - 1, 0)


def interleaved(rng: np.random.Generator, vocab: int, media: list[np.ndarray]) -> np.ndarray:
    """A prompt: words, a run of placeholders, words, the next run, ... and words."""
    pieces = [words(rng, vocab, int(rng.integers(1, 4)))]
    for run in media:
        pieces += [run, words(rng, vocab, int(rng.integers(1, 4)))]
    return np.concatenate(pieces)


def dialogue(rng: np.random.Generator, draw: int, vocab: int, prompts: list[np.ndarray]) -> tuple[Arrays, Arrays]:
    """Prompts with answers to learn, and the prompts alone to continue."""
    longest = max(map(len, prompts)) + 4
    lengths = [longest - len(p) if draw % 3 == 0 else int(rng.integers(3, 6)) for p in prompts]
    rows = [np.concatenate([p, words(rng, vocab, n)]) for p, n in zip(prompts, lengths, strict=True)]
    ends = [np.repeat([0, 1], [len(p), n]) for p, n in zip(prompts, lengths, strict=True)]
    ids, mask = padded(rows, left=draw % 3 == 1)
    answers, _ = padded(ends, left=draw % 3 == 1)
    inputs = {"input_ids": ids, "labels": np.where(answers, ids, -100)}
    if draw % 3:
        inputs["attention_mask"] = mask
    starts, start_mask = padded(prompts, left=True)
    return inputs, {"input_ids": starts, "attention_mask": start_mask}


def speechless(config: transformers.PreTrainedConfig) -> transformers.PreTrainedConfig:
    """Without special tokens: embeddings of padding have gradients, and generations do not end."""
    config.bos_token_id = config.eos_token_id = config.pad_token_id = None
    return config


def llava(rng: np.random.Generator, draw: int) -> Drawn:
    """LLaVA; the rows have different numbers of images, one row none."""
    text = speechless(record_cases.llama(rng, draw))
    size, patch = [(16, 8), (16, 8), (24, 8)][draw % 3]
    whole, image_token = draw % 3 == 1, text.vocab_size - 1
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**tower(rng, draw, size, patch), projection_dim=8),
        text_config=text,
        image_token_index=image_token,
        image_seq_length=(size // patch) ** 2 + whole,
        projector_hidden_act=["gelu", "gelu", "relu"][draw % 3],
        vision_feature_layer=[-2, -1, -2][draw % 3],
        vision_feature_select_strategy="full" if whole else "default",
        multimodal_projector_bias=draw % 3 != 2,
        tie_word_embeddings=text.tie_word_embeddings,
    )
    run, counts = np.full(config.image_seq_length, image_token), [(2, 1, 0), (1, 3, 0), (0, 1, 2)][draw % 3]
    prompts = [interleaved(rng, text.vocab_size, [run] * n) for n in counts]
    inputs, prompt = dialogue(rng, draw, text.vocab_size, prompts)
    if draw % 3 == 1:
        inputs["position_ids"] = positions(inputs["attention_mask"])
    images = {"pixel_values": pixels(rng, sum(counts), 3, size, size)}
    return Drawn(config, inputs | images, prompt | images)


def paligemma(rng: np.random.Generator, draw: int) -> Drawn:
    """PaliGemma: images, then a prefix, both seen whole (token_type_ids 0), then a causal suffix (1)."""
    options = record_cases.common(rng, draw) | {"rope_parameters": record_cases.default_rope([1e4, 1e2, 1e3][draw % 3])}
    options |= {"hidden_act": ["gelu_pytorch_tanh", "silu", "gelu_pytorch_tanh"][draw % 3]}
    text = transformers.GemmaConfig(**(options | {"tie_word_embeddings": draw % 3 != 2}))
    size, patch = [(16, 8), (24, 8), (16, 4)][draw % 3]
    vision = tower(rng, draw, size, patch) | {"vision_use_head": False}
    image_token = text.vocab_size + [-1, 5, 0][draw % 3]  # outside the vocabulary is allowed
    config = transformers.PaliGemmaConfig(
        vision_config=transformers.SiglipVisionConfig(**vision),
        text_config=speechless(text),
        image_token_index=image_token,
        projection_dim=text.hidden_size,
        hidden_size=text.hidden_size,
        vocab_size=text.vocab_size,
        tie_word_embeddings=text.tie_word_embeddings,
    )
    run, counts = np.full((size // patch) ** 2, image_token), [(1, 2), (2, 1), (1, 1)][draw % 3]
    prefixes = [words(rng, text.vocab_size, n) for n in (5, 3)]
    prompts = [np.concatenate([*[run] * n, prefix]) for n, prefix in zip(counts, prefixes, strict=True)]
    inputs, prompt = dialogue(rng, draw, text.vocab_size, prompts)
    inputs["token_type_ids"] = (inputs["labels"] != -100).astype(np.int64)
    prompt["token_type_ids"] = np.zeros_like(prompt["input_ids"])
    if draw % 3 == 1:
        inputs["position_ids"] = positions(inputs["attention_mask"]) + 1
    images = {"pixel_values": pixels(rng, sum(counts), 3, size, size)}
    return Drawn(config, inputs | images, prompt | images)


def gemma3(rng: np.random.Generator, draw: int) -> Drawn:
    """Gemma 3: windows shorter than an image and longer; logits are not capped, whatever the text's options say."""
    text = speechless(record_cases.gemma3(rng, draw))
    text.final_logit_softcapping = None
    size, patch, side = [(16, 4, 2), (24, 4, 3), (24, 8, 3)][draw % 3]
    image_token = text.vocab_size + [-1, 3, -1][draw % 3]
    config = transformers.Gemma3Config(
        vision_config=transformers.SiglipVisionConfig(**tower(rng, draw, size, patch), vision_use_head=False),
        text_config=text,
        mm_tokens_per_image=side**2,
        image_token_index=image_token,
        boi_token_index=text.vocab_size - 3,
        eoi_token_index=text.vocab_size - 4,
        tie_word_embeddings=text.tie_word_embeddings,
    )
    run = np.concatenate([[text.vocab_size - 3], np.full(side**2, image_token), [text.vocab_size - 4]])
    counts = [(2, 1), (1, 2), (0, 2)][draw % 3]
    prompts = [interleaved(rng, text.vocab_size, [run] * n) for n in counts]
    inputs, prompt = dialogue(rng, draw, text.vocab_size, prompts)
    for arrays in (inputs, prompt):
        arrays["token_type_ids"] = (arrays["input_ids"] == image_token).astype(np.int64)
    if draw % 3 == 1:
        inputs["position_ids"] = positions(inputs["attention_mask"])
    images = {"pixel_values": pixels(rng, sum(counts), 3, size, size)}
    return Drawn(config, inputs | images, prompt | images)


def qwen2_vl(rng: np.random.Generator, draw: int) -> Drawn:
    """Qwen2-VL: images of different sizes, a row of text alone, and in draw 1 videos too."""
    hidden, heads, kv_heads, sections = [(24, 3, 1, [2, 1, 1]), (24, 2, 1, [2, 2, 2]), (24, 2, 2, [1, 2, 3])][draw % 3]
    vocab, tied = int(rng.integers(60, 80)), draw % 3 == 1
    image_token, video_token = vocab - 1, vocab - 2
    text = {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": int(rng.integers(20, 40)),
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": [1e-6, 1e-3, 1e-12][draw % 3],
        "rope_parameters": record_cases.default_rope([1e4, 1e2, 1e6][draw % 3]) | {"mrope_section": sections},
        "bos_token_id": None,
        "eos_token_id": None,
    }
    vision = {
        "depth": 2,
        "embed_dim": [16, 12, 16][draw % 3],
        "num_heads": [2, 3, 1][draw % 3],
        "hidden_size": hidden,
        "mlp_ratio": [2, 1, 3][draw % 3],
        "patch_size": 4,
        "hidden_act": ["quick_gelu", "gelu", "gelu_pytorch_tanh"][draw % 3],
    }
    special = {"vision_start_token_id": vocab - 3, "vision_end_token_id": vocab - 4}
    special |= {"image_token_id": image_token, "video_token_id": video_token, "tie_word_embeddings": tied}
    config = transformers.Qwen2VLConfig(text_config=text, vision_config=vision, **special)
    # Of each row: (frames / 2, height, width) in patches of its images, and those of its videos, which are longer.
    media = [
        [[(1, 4, 4), (1, 2, 6)], [], [(1, 4, 2)]],
        [[(1, 2, 4), (3, 4, 2)], [(2, 2, 4), (1, 4, 4), (1, 2, 2)], []],
        [[(1, 6, 4)], [], [(1, 2, 4), (1, 4, 4), (1, 2, 2)]],
    ][draw % 3]
    runs = [[np.full(t * h * w // 4, image_token if t == 1 else video_token) for t, h, w in grids] for grids in media]
    runs = [[np.concatenate([[vocab - 3], run, [vocab - 4]]) for run in row] for row in runs]
    inputs, prompt = dialogue(rng, draw, vocab, [interleaved(rng, vocab, row) for row in runs])
    for arrays in (inputs, prompt):
        ids = arrays["input_ids"]
        arrays["mm_token_type_ids"] = (ids == image_token) + 2 * (ids == video_token)
    images = [grid for grids in media for grid in grids if grid[0] == 1]
    videos = [grid for grids in media for grid in grids if grid[0] > 1]
    seen = {"image_grid_thw": np.array(images), "pixel_values": patches(rng, images)}
    seen |= {"video_grid_thw": np.array(videos), "pixel_values_videos": patches(rng, videos)} if videos else {}
    return Drawn(config, inputs | seen, prompt | seen)


def patches(rng: np.random.Generator, grids: list[tuple[int, int, int]]) -> np.ndarray:
    """Patches of 3 channels, 2 frames and 4 x 4 pixels, flattened."""
    return pixels(rng, sum(t * h * w for t, h, w in grids), 3 * 2 * 4 * 4)


def idefics(rng: np.random.Generator, draw: int) -> Drawn:
    """Idefics, as Flamingo: a token sees the last image (draws 0 and 2) or all before it (draw 1), or none."""
    vocab, (hidden, heads) = int(rng.integers(60, 80)), [(16, 2), (16, 4), (16, 1)][draw % 3]
    vision = tower(rng, draw, *[(16, 8), (16, 4), (8, 4)][draw % 3])
    vision["embed_dim"] = vision.pop("hidden_size")
    resampler = {
        "resampler_depth": [1, 1, 2][draw % 3],
        "resampler_n_heads": 3,
        "resampler_head_dim": 4,
        "resampler_n_latents": 3,
    }
    config = transformers.IdeficsConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        num_attention_heads=heads,
        intermediate_size=int(rng.integers(16, 24)),
        num_hidden_layers=[2, 4, 2][draw % 3],
        cross_layer_interval=[1, 2, 1][draw % 3],
        hidden_act=["silu", "gelu", "silu"][draw % 3],
        rms_norm_eps=[1e-6, 1e-3, 1e-12][draw % 3],
        alpha_type=["float", "vector", "float"][draw % 3],
        qk_layer_norms=draw % 3 != 0,
        use_resampler=draw % 3 != 0,
        tie_word_embeddings=draw % 3 == 2,
        freeze_text_layers=False,
        freeze_vision_layers=False,
        vision_config=vision,
        perceiver_config=resampler | {"qk_layer_norms_perceiver": draw % 3 == 1},
        rope_parameters=record_cases.default_rope([1e4, 1e2, 1e4][draw % 3]),
    )
    counts = [(2, 1, 0), (1, 3, 2), (0, 2, 1)][draw % 3]
    prompts = [interleaved(rng, vocab, [np.array([vocab - 1])] * n) for n in counts]
    inputs, prompt = dialogue(rng, draw, vocab, prompts)
    for arrays in (inputs, prompt):
        begun = np.cumsum(arrays["input_ids"] == vocab - 1, 1)[..., None]  # [B, T, 1]
        image = 1 + np.arange(max(counts))
        arrays["image_attention_mask"] = (image <= begun if draw % 3 == 1 else image == begun).astype(np.int64)
    size = (12, 16) if draw % 3 == 2 else (16, 16)
    images = pixels(rng, 3, max(counts), 3, *size)
    images[np.arange(max(counts)) >= np.array(counts)[:, None]] = 0
    seen = {"pixel_values": images} | ({"interpolate_pos_encoding": np.True_} if draw % 3 == 2 else {})
    return Drawn(speechless(config), inputs | seen, prompt | seen)
