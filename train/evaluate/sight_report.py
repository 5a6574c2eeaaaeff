"""How well a model sees: its answers to held-out questions beside those to shuffled images and to no image at all, and
a page that shows some of them."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from model.weights import Weights
from train.config import Experiment
from train.data.chat.record import IMAGE, Conversation
from train.data.chat.rows import good, last_answer, open_source
from train.data.images.decode import Limits, decode
from train.data.made.made import answer
from train.data.text.tokenizer import Tokenizer
from train.evaluate import answers

KNOWN = 4000  # training records from which the best guess without looking is learned


def figures(
    experiment: Experiment, weights: Weights, tokenizer: Tokenizer, limit: int
) -> tuple[dict[str, dict[str, Any]], list[tuple[Conversation, str]]]:
    """Accuracies of each source of data.sources with a held-out side, by kind of question; and the answers.

    Each source has `answers`, `whole` (with every word before the answer right too), `shuffled` (the same model, the
    images of other questions) and `blind` (the most frequent answer to the question), each a dictionary from kind to a
    share, and `count`. limit: questions of a source; 0: all.
    """
    data, model = experiment.data, experiment.model
    ask = answers.replier(model, weights, tokenizer, data, data.context, min(64, limit or 64))
    found, said = {}, []

    def answerable(conversation: Conversation) -> Conversation:
        conversation = _up_to_answer(conversation)
        answers.prompts([conversation], tokenizer, data, model)
        return conversation

    for name in data.sources:
        source = open_source(name, data, model.vision.image_size)
        count = min(limit or source.held_out.length, source.held_out.length)
        if not count:
            continue
        held_out, train = good(source.held_out, data, answerable), good(source.train, data, _up_to_answer)
        asked = [held_out[index] for index in range(count)]
        replies = ask(asked)
        known = [train[index] for index in range(min(KNOWN, len(train)))]
        found[name] = {
            "count": count,
            "answers": answers.accuracies(asked, replies),
            "whole": answers.whole(asked, replies),
            "shuffled": answers.accuracies(asked, ask(answers.shuffled(asked))),
            "blind": answers.accuracies(asked, answers.blind_guesses(known, asked)),
        }
        said += zip(asked, replies, strict=True)
    return found, said


def _up_to_answer(conversation: Conversation) -> Conversation:
    """Without what follows the assistant's last turn. Raises UserError where it says nothing."""
    last_answer(conversation)
    last = max(number for number, turn in enumerate(conversation.turns) if turn.role == "assistant")
    return conversation._replace(turns=conversation.turns[: last + 1])


def lines(found: dict[str, dict[str, Any]]) -> list[str]:
    """The figures as lines for a terminal."""
    rows = [f"{'source':18}{'kind':14}{'right':>8}{'whole reply':>13}{'shuffled images':>18}{'best blind guess':>18}"]
    for name, of in found.items():
        for kind, share in of["answers"].items():
            others = (of[control].get(kind, 0.0) for control in ("shuffled", "blind"))
            shares = f"{share:8.1%}{of['whole'][kind]:13.1%}"
            rows.append(f"{name:18}{kind:14}{shares}" + "".join(f"{other:18.1%}" for other in others))
    return rows


def page(title: str, found: dict[str, dict[str, Any]], said: Sequence[tuple[Conversation, str]], count: int) -> str:
    """An HTML page without anything outside it: the figures, and `count` conversations spread over all, with images."""
    chosen = [said[int(i)] for i in np.linspace(0, len(said) - 1, min(count, len(said)))]
    table = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{html.escape(kind)}</td><td>{share:.1%}</td>"
        f"<td>{of['shuffled'].get(kind, 0.0):.1%}</td><td>{of['blind'].get(kind, 0.0):.1%}</td></tr>"
        for name, of in found.items()
        for kind, share in of["answers"].items()
    )
    cards = "".join(_card(conversation, reply) for conversation, reply in chosen)
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>{html.escape(title)}</title><style>{STYLE}</style><h1>{html.escape(title)}</h1>"
        "<p>Held-out pictures, never trained on. Shuffled: the same questions, with the pictures "
        "of others. Blind: the answer that is most often right without looking.</p>"
        "<table><tr><th>questions<th>kind<th>right<th>shuffled<th>blind</tr>"
        f"{table}</table><div class=cards>{cards}</div></html>\n"
    )


STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse;margin:1rem 0}"
    "td,th{padding:.2rem .9rem;text-align:left;border-bottom:1px solid #ddd}"
    ".cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(17rem,1fr));gap:1rem}"
    ".card{border:1px solid #ddd;border-radius:.6rem;padding:.8rem}"
    "img{width:8rem;image-rendering:pixelated;border:1px solid #eee;margin-right:.3rem}"
    ".right{color:#17692c}.wrong{color:#b00020}"
)


def _card(conversation: Conversation, reply: str) -> str:
    right = answer(reply) == answers.truth(conversation)
    images = "".join(f"<img alt='' src='data:image/png;base64,{_png(source)}'>" for source in conversation.images)
    turns = "".join(f"<p>{html.escape(turn.text.replace(IMAGE, ''))}</p>" for turn in conversation.turns[:-1])
    wanted = "" if right else f"<p>right: {html.escape(conversation.turns[-1].text)}</p>"
    said = f"<p class={'right' if right else 'wrong'}><b>{html.escape(reply) or '(nothing)'}</b></p>"
    return f"<div class=card>{images}{turns}{said}{wanted}</div>"


def _png(source: Any) -> str:
    from PIL import Image

    file = io.BytesIO()
    # What was asked about has been decoded before, within data.max_megapixels.
    Image.fromarray(decode(source, Limits(megapixels=math.inf))).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()
