"""Draws tiny random vision and multimodal models with transformers, and records what they compute.

    python tests/peers/record_vision.py --out=tests/peers/vision_cases [--families=vit,clip --draws=3 --seed=0]
    python tests/peers/record_vision.py --check=DIR
    python tests/peers/record_vision.py --counts

Needs torch and transformers, nothing of Foursight; vision_draws.py and multimodal_draws.py say what is drawn. Writes an
archive for each family (archives.py). Each case in it is a directory as `save_pretrained` leaves it, with

- inputs.npz: the arrays of one forward pass, named as transformers names them; scalars are flags;
- outputs.npz: what it gives. A dotted name is a path in transformers' output; `last_hidden_state` is that of the model
  below the head (ViT's after its last norm); for Qwen2-VL also `position_ids` [3, B, T] and `rope_deltas` as it counts
  them, and the merged features of all images or videos;
- prompt.npz, and `sequences` and `first_logits` (of the first new token) in outputs.npz, where the model generates:
  greedily, with a cache, rows padded on the left;
- case.json: the loss, the norm of every trained tensor's gradient (zero where a tensor is not used), the tolerance, and
  after how many generated tokens two are too near each other to tell apart.

Texts' outputs where attention_mask is 0 are not to be compared. The tolerance is of max|a - b| / (1 + max|b|): 20 times
what the same model differs by in float64, at least 5e-6, at most 1e-3. Language models' norms and every softmax are in
float32 even then. ResNets are recorded in evaluation mode, with running statistics that are not 0 and 1.

--check loads every directory under DIR that has a `case.json` and prints how far the outputs of the model in its
subdirectory `exported` are from those recorded, as JSON. --counts builds the published configurations in
vision_configs/ without memory, prints their numbers of parameters and fails where one is not the published one.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import pathlib
import tempfile

import numpy as np
import record_cases
import safetensors.torch
import torch
import transformers
from archives import pack
from multimodal_draws import gemma3, idefics, llava, paligemma, qwen2_vl
from published import PARAMETERS
from vision_draws import Arrays, clip, resnet, siglip, vit

NEW_TOKENS = 8
FAMILIES = {f.__name__: f for f in (vit, resnet, clip, siglip, llava, paligemma, gemma3, qwen2_vl, idefics)}
OUTPUTS = ("logits", "logits_per_image", "logits_per_text", "image_embeds", "text_embeds", "image_hidden_states")
HIDDEN = ("last_hidden_state", "pooler_output")


def architecture(family: str) -> type[transformers.PreTrainedModel]:
    """The class with the head."""
    names = {"vit": "ViTForImageClassification", "resnet": "ResNetForImageClassification", "clip": "CLIPModel"}
    names |= {"siglip": "SiglipModel", "llava": "LlavaForConditionalGeneration"}
    names |= {"paligemma": "PaliGemmaForConditionalGeneration", "gemma3": "Gemma3ForConditionalGeneration"}
    names |= {"qwen2_vl": "Qwen2VLForConditionalGeneration", "idefics": "IdeficsForVisionText2Text"}
    return getattr(transformers, names[family])


def randomize(model: torch.nn.Module, seed: int) -> None:
    """As record_cases does, but for convolutions, which keep the size of their input, and what it has not met.

    Placeholders, the last two of the vocabulary, are unlikely to be said: what follows then would be a matter of taste.
    """
    record_cases.randomize(model, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    for module in model.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Conv3d)):
            noise = torch.randn(module.weight.shape, generator=generator)
            module.weight.data = noise * 1.2 / math.sqrt(module.weight[0].numel())
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
    if hasattr(model, "lm_head"):
        model.lm_head.weight.data[-2:] *= 0.1
    if hasattr(model, "logit_bias"):  # SigLIP's, which begin at 0
        model.logit_scale.data += 1.5
        model.logit_bias.data -= 2.0


def tensors(arrays: Arrays, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Integers as int64, images as `dtype`, flags as they are."""
    kinds = {"i": torch.int64, "f": dtype, "b": torch.bool}
    return {name: torch.tensor(value, dtype=kinds[value.dtype.kind]) for name, value in arrays.items()}


def forward(model: transformers.PreTrainedModel, arrays: Arrays) -> tuple[torch.Tensor, Arrays]:
    """The loss, and all outputs to record."""
    below = []
    hook = model.base_model.register_forward_hook(lambda module, inputs, output: below.append(output))
    inputs = tensors(arrays, model.dtype)
    found = model(**inputs)
    hook.remove()
    shown = {name: getattr(found, name, None) for name in OUTPUTS}
    # A list of images since transformers 5.24
    outputs = {name: torch.cat(a) if isinstance(a, list) else a for name, a in shown.items() if a is not None}
    if model.config.model_type == "idefics" and hasattr(found, "image_outputs"):  # since 5.24, which pools the others
        outputs["image_hidden_states"] = found.image_outputs.last_hidden_state
    outputs |= {name: below[0][name] for name in HIDDEN if name in below[0]}
    for part in ("text_model_output", "vision_model_output"):
        outputs |= {f"{part}.{name}": found[part][name] for name in HIDDEN if part in found}
    if "image_grid_thw" in inputs:
        names = ("input_ids", "mm_token_type_ids", "image_grid_thw", "video_grid_thw", "attention_mask")
        places = model.model.get_rope_index(**{name: inputs[name] for name in names if name in inputs})
        outputs |= dict(zip(("position_ids", "rope_deltas"), places, strict=True))
        images = model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
        outputs["image_features"] = torch.cat(images.pooler_output)
    if "video_grid_thw" in inputs:
        videos = model.get_video_features(inputs["pixel_values_videos"], inputs["video_grid_thw"])
        outputs["video_features"] = torch.cat(videos.pooler_output)
    return found.loss, {name: value.detach().numpy() for name, value in outputs.items()}


def gradient_norms(model: transformers.PreTrainedModel) -> dict[str, float]:
    """The norm of every weight's gradient by the names of files."""
    twin = copy.deepcopy(model)
    for theirs, weight in zip(twin.parameters(), model.parameters(), strict=True):
        theirs.data = torch.zeros_like(weight) if weight.grad is None else weight.grad.clone()
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    with tempfile.TemporaryDirectory() as directory:
        twin.save_pretrained(directory)
        saved = safetensors.torch.load_file(f"{directory}/model.safetensors")
    return {name: float(tensor.norm()) for name, tensor in saved.items() if not name.endswith(statistics)}


def errors(found: Arrays, wanted: Arrays, mask: np.ndarray | None) -> dict[str, float]:
    """The error of each output, of texts only where `mask` [B, T] is not 0, and of what is a number in `found`."""
    result = {}
    for name in found.keys() & wanted.keys():
        a, b = found[name], wanted[name]
        if mask is not None and a.shape[:2] == mask.shape:
            a, b = a[mask != 0], b[mask != 0]
        known = np.isfinite(a)
        result[name] = record_cases.error(a[known], b[known])
    return result


def save(path: pathlib.Path, arrays: Arrays) -> None:
    """Integers as int32."""
    np.savez_compressed(path, **{n: a.astype(np.int32) if a.dtype.kind == "i" else a for n, a in arrays.items()})


def generate(model: transformers.PreTrainedModel, prompt: Arrays, tolerance: float) -> tuple[Arrays, int]:
    """Greedy sequences, the logits of their first new token, and how many new tokens are certain."""
    said = model.generate(
        **tensors(prompt),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    two = torch.stack(said.logits, 1).topk(2).values  # [B, steps, 2]
    near = ((two[..., 0] - two[..., 1]).amin(0) < 100 * tolerance).tolist()
    outputs = {"sequences": said.sequences.numpy(), "first_logits": said.logits[0].numpy()}
    return outputs, near.index(True) if True in near else len(near)


def record(family: str, draw: int, seed: int, out: pathlib.Path) -> pathlib.Path:
    """Draws one model and writes its case."""
    rng = np.random.default_rng([seed, draw, sorted(FAMILIES).index(family)])
    config, inputs, prompt = FAMILIES[family](rng, draw)
    weights_seed = int(rng.integers(2**31))
    torch.manual_seed(weights_seed)
    model = architecture(family)._from_config(config, attn_implementation="eager").eval()
    randomize(model, weights_seed)
    loss, outputs = forward(model, inputs)
    loss.backward()
    path = out / f"{family}_{draw}"
    model.save_pretrained(path)
    exact = type(model).from_pretrained(path, dtype=torch.float64, attn_implementation="eager").eval()
    with torch.no_grad():  # In float64 a row with a token that sees nothing is NaN.
        noise = errors(forward(exact, inputs)[1], outputs, inputs.get("attention_mask"))
    tolerance = float(np.clip(20 * max(noise.values()), 5e-6, 1e-3))
    case = {
        "family": family,
        "loss": loss.item(),
        "gradient_norms": gradient_norms(model),
        "tolerance": tolerance,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    if prompt is not None:
        said, certain = generate(model, prompt, tolerance)
        outputs |= said
        case |= {"new_tokens": NEW_TOKENS, "certain_tokens": certain}
        save(path / "prompt.npz", prompt)
    save(path / "inputs.npz", inputs)
    save(path / "outputs.npz", outputs)
    (path / "case.json").write_text(json.dumps(case, indent=1) + "\n")
    return path


def check(directory: pathlib.Path) -> dict[str, float]:
    """How far the exported models' outputs are from those recorded."""
    found = {}
    for case in sorted(directory.glob("*/case.json")):
        path = case.parent
        family = json.loads(case.read_text())["family"]
        model = architecture(family).from_pretrained(
            path / "exported", dtype=torch.float32, attn_implementation="eager"
        )
        inputs = dict(np.load(path / "inputs.npz"))
        wanted = dict(np.load(path / "outputs.npz"))
        found[path.name] = max(errors(forward(model.eval(), inputs)[1], wanted, inputs.get("attention_mask")).values())
    return found


def counts(directory: pathlib.Path) -> dict[str, int]:
    """The number of parameters of each published configuration, tied ones once."""
    found = {}
    for name in PARAMETERS:
        options = json.loads((directory / f"{name}.json").read_text())
        with torch.device("meta"):
            model = getattr(transformers, options["architectures"][0])._from_config(
                transformers.AutoConfig.for_model(**options)
            )
        found[name] = sum(weight.numel() for weight in model.parameters())
    return found


def main() -> None:
    """Records, checks or counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--families", default=",".join(FAMILIES))
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--check", type=pathlib.Path)
    parser.add_argument("--counts", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if options.counts:
        found = counts(pathlib.Path(__file__).parent / "vision_configs")
        print(json.dumps(found, indent=1))
        raise SystemExit(int(found != PARAMETERS))
    if options.check:
        print(json.dumps(check(options.check)))
        return
    for family in options.families.split(","):
        with tempfile.TemporaryDirectory() as folder:
            cases = [record(family, draw, options.seed, pathlib.Path(folder)) for draw in range(options.draws)]
            print(pack(cases, options.out / f"{family}.zip"))


if __name__ == "__main__":
    main()
