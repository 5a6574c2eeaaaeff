"""What a model may be trained to predict."""

from __future__ import annotations

# What objective.name may be, and the model.kind and model.head that it trains.
OBJECTIVES = {
    "next_token": ("decoder", "language"),
    "masked": ("encoder", "language"),  # BERT (arXiv:1810.04805, section 3.1)
    "classification": ("encoder", "pooled"),
    "regression": ("encoder", "pooled"),
    "multi_label": ("encoder", "pooled"),
    "token_classification": ("encoder", "token"),
    "span": ("encoder", "token"),  # the first and last token of an answer
    "span_corruption": ("encoder_decoder", "language"),  # T5 (arXiv:1910.10683, section 3.1.4)
    "sequence_to_sequence": ("encoder_decoder", "language"),
    "conversation": ("decoder", "language"),  # what one side says, with images or without (train.data.chat.rows)
    "contrastive": ("decoder", "language"),  # CLIP, SigLIP (train.losses.contrastive)
    "image_classification": ("vision", "language"),
}
# Objectives that read labelled records, and of these the ones whose head gives labels instead of tokens.
LABELLED = ("classification", "regression", "multi_label", "token_classification", "span", "sequence_to_sequence")
LABEL_HEADS = LABELLED[:-1]
# Objectives that read conversations about images, and of these the ones that score by right answers.
CONVERSATIONS = ("conversation", "contrastive", "image_classification")
SCORED = (*LABEL_HEADS, *CONVERSATIONS[1:])
