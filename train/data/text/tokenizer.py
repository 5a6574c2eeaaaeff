"""Tokenizers: bytes, byte-pair encoding (trained here or read from a tokenizer.json) and sentencepiece.

All have one surface: `vocab_size`, `end_of_document` (the id that separates documents), `beginning` (the id that opens
a document and a prompt: the same, but for imported models that have another), `ends` (the ids that end an answer: that
one, and what else an imported model ends its turns with), `encode`, `encode_batch`, `decode`, `to_dict`, which holds
everything needed to build the tokenizer again and goes into checkpoints, and `files`, which transformers reads.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tpu.errors import UserError

END_OF_DOCUMENT = "<|endoftext|>"
END_OF_DOCUMENT_NAMES = (END_OF_DOCUMENT, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "[SEP]")

# What one merge may not cross, as published with GPT-4's cl100k_base: contractions, words with one leading mark or
# space, at most three digits, marks with the line ends after them, runs of white space.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class ByteTokenizer:
    """UTF-8 bytes 0..255; 256 ends a document."""

    vocab_size = 257
    end_of_document = beginning = 256
    ends = frozenset({256})

    def encode(self, text: str) -> list[int]:
        """The token ids of `text`."""
        return list(text.encode())

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The token ids of each text, [tokens] each."""
        return [np.frombuffer(text.encode(), np.uint8) for text in texts]

    def encode_with_spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """The token ids of `text`, and for each the characters [start, end) that it stands for."""
        sizes = [len(character.encode()) for character in text]
        return list(text.encode()), [(i, i + 1) for i, size in enumerate(sizes) for _ in range(size)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; an incomplete character becomes U+FFFD, ids that are no byte are left out."""
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    def to_dict(self) -> dict[str, str]:
        """What `from_dict` needs."""
        return {"kind": "bytes"}

    def files(self) -> dict[str, bytes]:
        """What transformers loads it from: byte-level BPE without merges."""
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers

        # As GPT-2 has it: bytes that print stand for themselves, the others for what comes after all bytes, in order.
        printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = iter(range(256, 512))
        vocabulary = {chr(byte if byte in printed else next(others)): byte for byte in range(256)}
        tokenizer = Tokenizer(models.BPE(vocabulary | {END_OF_DOCUMENT: self.end_of_document}, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens([END_OF_DOCUMENT])
        return JsonTokenizer(tokenizer.to_str(), "bytes").files()


class JsonTokenizer:
    """A Hugging Face tokenizer, from the text of its tokenizer.json.

    The end of a document is the first of END_OF_DOCUMENT_NAMES in the vocabulary, one of `ends` if there is any; else
    it is the first of `ends`. Special tokens that occur in a text are read as ordinary text, so that no document can
    forge them. Raises UserError for a text that is no tokenizer or has no such token; `origin` names it in the message.

    Args:
      beginning: opens a document, if its end does not.
      ends: names or ids of what ends an answer beside the end of a document; what is not in the vocabulary is passed
        over.
    """

    def __init__(self, text: str, origin: str, beginning: int | None = None, ends: Iterable[int | str] = ()):
        import tokenizers

        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{origin}: not a Hugging Face tokenizer.json ({error})") from error
        given = [end if isinstance(end, str) else self._tokenizer.id_to_token(end) for end in ends]
        given = [name for name in given if name is not None and self._tokenizer.token_to_id(name) is not None]
        names = [name for name in END_OF_DOCUMENT_NAMES if self._tokenizer.token_to_id(name) is not None]
        names = sorted(names, key=lambda name: name not in given) or given
        if not names:
            raise UserError(f"{origin}: no end-of-document token; needs one of {', '.join(END_OF_DOCUMENT_NAMES)}")
        self._text = text
        # Registered as special even where the file lists it as a plain word: decode leaves special tokens out.
        self._tokenizer.add_special_tokens([names[0]])
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.end_of_document: int = self._tokenizer.token_to_id(names[0])
        self.end_of_document_name = names[0]
        self._given = [self._tokenizer.token_to_id(name) for name in given]
        self.ends = frozenset({self.end_of_document, *self._given})
        self.beginning = self.end_of_document if beginning is None else beginning
        self.vocab_size: int = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def id_of(self, name: str) -> int | None:
        """The id of the token of this name, None where there is none."""
        return self._tokenizer.token_to_id(name)

    def encode(self, text: str) -> list[int]:
        """The token ids of `text`."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The token ids of each text, [tokens] each."""
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, np.uint32) for encoding in encodings]

    def encode_with_spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """The token ids of `text`, and for each the characters [start, end) that it stands for."""
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; an incomplete character becomes U+FFFD, special and unknown ids are left out."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def to_dict(self) -> dict[str, Any]:
        """What `from_dict` needs."""
        return {"kind": "tokenizer.json", "text": self._text, **_own(self, self._given)}

    def files(self) -> dict[str, bytes]:
        """What transformers loads it from, by file name."""
        described = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": self.end_of_document_name}
        return {"tokenizer.json": self._text.encode(), "tokenizer_config.json": _described(described)}


class SentencePieceTokenizer:
    """A sentencepiece model, from the bytes of its .model file; its `eos` piece ends a document.

    Raises UserError for bytes that are no model or have no `eos`; `origin` names them in the message. `beginning` and
    `ends` are as for JsonTokenizer.
    """

    def __init__(self, model: bytes, origin: str, beginning: int | None = None, ends: Iterable[int | str] = ()):
        import sentencepiece

        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise UserError(f"{origin}: not a sentencepiece model ({error})") from error
        self._model = model
        self.end_of_document: int = self._processor.eos_id()
        self.beginning = self.end_of_document if beginning is None else beginning
        self.vocab_size: int = self._processor.vocab_size()
        given = [self._processor.piece_to_id(end) if isinstance(end, str) else end for end in ends]
        self._given = [end for end in given if 0 <= end < self.vocab_size and end != self._processor.unk_id()]
        self.ends = frozenset({self.end_of_document, *self._given})
        if self.end_of_document < 0:
            raise UserError(f"{origin}: no end-of-document token; train the sentencepiece model with an eos_id")

    def encode(self, text: str) -> list[int]:
        """The token ids of `text`."""
        return self._processor.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The token ids of each text, [tokens] each."""
        return [np.array(ids, np.uint32) for ids in self._processor.encode(list(texts))]

    def encode_with_spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """The token ids of `text`, and for each the characters [start, end) that it stands for."""
        pieces = self._processor.encode(text, out_type="immutable_proto").pieces
        return [piece.id for piece in pieces], [(piece.begin, piece.end) for piece in pieces]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; end of document and ids outside the vocabulary are left out."""
        return self._processor.decode([int(i) for i in ids if i < self.vocab_size and i != self.end_of_document])

    def to_dict(self) -> dict[str, Any]:
        """What `from_dict` needs."""
        return {"kind": "sentencepiece", "model": base64.b64encode(self._model).decode(), **_own(self, self._given)}

    def files(self) -> dict[str, bytes]:
        """What transformers loads it from, by file name; of a unigram model the model alone, for the one class that
        reads a .model would take it for BPE."""
        scores = [self._processor.get_score(piece) for piece in range(self.vocab_size)]
        if any(score != int(score) for score in scores):  # BPE's are the order of its merges.
            return {"tokenizer.model": self._model}
        pieces = {"unk_token": self._processor.unk_id(), "eos_token": self.end_of_document}
        described = {name: self._processor.id_to_piece(piece) for name, piece in pieces.items()}
        described |= {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": False}
        return {"tokenizer.model": self._model, "tokenizer_config.json": _described(described)}


Tokenizer = ByteTokenizer | JsonTokenizer | SentencePieceTokenizer


def _described(options: dict[str, Any]) -> bytes:
    return (json.dumps(options, indent=2) + "\n").encode()


def _own(tokenizer: JsonTokenizer | SentencePieceTokenizer, ends: list[int]) -> dict[str, Any]:
    """What an import gave a tokenizer that is not in its file."""
    beginning = {} if tokenizer.beginning == tokenizer.end_of_document else {"beginning": tokenizer.beginning}
    return beginning | ({"ends": ends} if ends else {})


def train_bpe(texts: Iterable[str], vocab_size: int) -> JsonTokenizer:
    """Trains byte-level BPE (arXiv:1508.07909; GPT-2's bytes, GPT-4's word boundaries) of at most `vocab_size` tokens.

    The vocabulary is END_OF_DOCUMENT, the 256 bytes, then merges; a small corpus may have fewer than asked for.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size < 257:
        raise UserError(f"data.bpe_vocab_size={vocab_size}: must be at least 257 (256 bytes and end of document)")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        show_progress=False,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return JsonTokenizer(tokenizer.to_str(), "the tokenizer trained here")


def from_file(path: str, ends: Iterable[int | str] = ()) -> Tokenizer:
    """Reads a tokenizer.json or a sentencepiece .model. Raises UserError naming a path that is neither.

    ends: as for JsonTokenizer.
    """
    if not path.endswith((".json", ".model")):
        raise UserError(f"data.tokenizer={path!r}: valid: bytes, bpe, a path to a tokenizer.json or a .model")
    try:
        content = Path(os.path.expanduser(path)).read_bytes()
    except OSError as error:
        raise UserError(f"data.tokenizer={path!r}: cannot be read ({error.strerror})") from error
    if path.endswith(".model"):
        return SentencePieceTokenizer(content, path, ends=ends)
    try:
        return JsonTokenizer(content.decode("utf-8-sig"), path, ends=ends)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error.reason} at byte {error.start})") from error


def from_dict(saved: dict[str, Any]) -> Tokenizer:
    """Builds the tokenizer that `to_dict` described. Raises UserError for anything else."""
    own = saved.get("beginning"), saved.get("ends", ())
    match saved:
        case {"kind": "bytes"}:
            return ByteTokenizer()
        case {"kind": "tokenizer.json", "text": text}:
            return JsonTokenizer(text, "the saved tokenizer", *own)
        case {"kind": "sentencepiece", "model": model}:
            return SentencePieceTokenizer(base64.b64decode(model), "the saved tokenizer", *own)
        case {"kind": "none"}:
            raise UserError("this checkpoint has no tokenizer: it was imported from a directory that has none")
    raise UserError(f"a saved tokenizer of kind {saved.get('kind')!r}: valid: bytes, tokenizer.json, sentencepiece")


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int, special: int = 0) -> None:
    """Raises UserError where the tokenizer has ids that an embedding of `vocab_size` rows does not.

    The last `special` rows are the mask's or the sentinels' of an objective.
    """
    if tokenizer.vocab_size + special > vocab_size:
        more = f" and the {special} special tokens of the objective" if special else ""
        raise UserError(
            f"model.vocab_size={vocab_size}: smaller than the {tokenizer.vocab_size} tokens of the tokenizer{more}; "
            f"valid: {tokenizer.vocab_size + special} or more"
        )
