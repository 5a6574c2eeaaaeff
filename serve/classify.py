"""Says which of some classes, given by name, a picture is of: zero-shot classification (arXiv:2103.00020, section 3.1).

    python -m serve.classify --checkpoint=runs/clip --image=a.png --label="a red star" --label="a blue circle"

For models of images and texts (CLIP, SigLIP). A class is the mean of its name's vectors in all --template: names stand
for {}. CLIP's probabilities sum to 1 over the classes; SigLIP has one for each class by itself.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from absl import flags

from tpu.errors import UserError
from train import entry

if TYPE_CHECKING:
    from train.restore import Trained

if __name__ == "__main__":
    flags.DEFINE(entry.PATH, "checkpoint", None, "workdir of a run, or one of its step directories")
    flags.DEFINE_multi(
        entry.PATH, flags.ArgumentSerializer(), "image", [], "file of a picture; may be given several times"
    )
    flags.DEFINE_multi_string("label", [], "name of a class; to be given twice or more")
    flags.DEFINE_multi_string("template", ["{}"], "text with {} for the name; several are averaged")
    flags.DEFINE(entry.PATH, "json", None, "also write the probabilities to this file")


def probabilities(
    trained: Trained, images: Sequence[str], labels: Sequence[str], templates: Sequence[str]
) -> list[dict[str, float]]:
    """Of each picture, by class. Raises UserError for a model that has no vectors of texts, and bad pictures."""
    import jax
    import numpy as np

    from model.weights import bind
    from train.data.chat.record import IMAGE, Conversation, Turn
    from train.data.images.look import look
    from train.evaluate.retrieval import class_vectors, embedders

    data, model = trained.experiment.data, trained.experiment.model
    if not model.pairs:
        raise UserError(f"model.fusion={model.fusion!r}: {trained.step_dir} compares no pictures with texts")
    see, read = embedders(model, trained.weights, trained.tokenizer, data.context)
    turns = (Turn("user", IMAGE),)
    pictures = np.stack([look(Conversation(path, turns, (path,)), data, model).fields["images"][0] for path in images])
    logits = bind(trained.graphdef, trained.weights).logits(see(pictures), class_vectors(read, labels, templates))
    found = jax.nn.sigmoid(logits) if model.vision.similarity == "sigmoid" else jax.nn.softmax(logits)
    return [dict(zip(labels, map(float, row), strict=True)) for row in np.asarray(found)]


def main() -> int:
    """Prints the classes of every --image, the most probable first, and writes --json."""
    options = entry.FLAGS
    entry.need(checkpoint=options.checkpoint)
    entry.need_writable(json=options.json)
    if not options.image:
        raise UserError("image: missing; give one picture or more")
    if len(set(options.label)) < 2:
        raise UserError(f"label={', '.join(options.label)}: give two classes or more, each as --label=NAME")
    for template in options.template:
        if template.count("{}") != 1:
            raise UserError(f"template={template!r}: must hold {{}} once, where the name stands")
    from train.restore import open_checkpoint  # Only now: it loads jax.

    trained = open_checkpoint(pathlib.Path(options.checkpoint))
    found = probabilities(trained, options.image, list(dict.fromkeys(options.label)), options.template)
    for path, of_image in zip(options.image, found, strict=True):
        print(path)
        for label, share in sorted(of_image.items(), key=lambda item: -item[1]):
            print(f"  {share:7.1%}  {label}")
    entry.write_json(dict(zip(options.image, found, strict=True)))
    return 0


if __name__ == "__main__":
    entry.run(main)
