"""Texts from tokens, stop strings, and the command as users run it."""

from __future__ import annotations

import functools
import io
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers

from model import kinds
from model.config import ModelConfig
from model.generate.decode import decoding_weights, make_decoder
from serve.completion import Completion, Request, prompt_tokens
from serve.engine import check_length, check_memory, complete
from tpu.errors import UserError
from train.data.text.tokenizer import ByteTokenizer, JsonTokenizer, SentencePieceTokenizer, Tokenizer, train_bpe

ROOT = Path(__file__).resolve().parents[2]
TEXTS = [f"def function_{n}(self):\n    return 'the value of the number {n * 37}'\n" for n in range(60)]
BYTES, BPE = ByteTokenizer(), train_bpe(iter(TEXTS), 320)


@functools.cache
def sentencepiece() -> SentencePieceTokenizer:
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=model, vocab_size=300, byte_fallback=True, minloglevel=2
    )
    return SentencePieceTokenizer(model.getvalue(), "model")


def completed(tokens: Sequence[int], tokenizer: Tokenizer, prompt: str = "", **fields: Any) -> Completion:
    """What becomes of these tokens, checking on the way what is said to be certain."""
    request = Request(prompt, **({"max_tokens": max(1, len(tokens))} | fields))
    completion = Completion(request, prompt_tokens(tokenizer, prompt), tokenizer)
    shown = [completion.certain()]
    for token in tokens:
        if completion.finish_reason is None:
            completion.append(token, -1.0)
            shown.append(completion.certain())
    for before, after in zip(shown, [*shown[1:], completion.text], strict=True):
        assert after.startswith(before), "what was shown is never taken back"
    assert "".join(completion.token_texts()) == completion.text
    assert len(completion.tokens) == len(completion.logprobs) == len(completion.token_texts())
    return completion


# Texts


@settings(max_examples=100)
@given(st.text(max_size=30))
@example("naïve 東京 🙂 e\u0301")
def test_whole_characters_of_any_text(text):
    for tokenizer in (BYTES, BPE):
        tokens = tokenizer.encode(text)
        completion = completed(tokens, tokenizer)
        assert completion.text == text
        assert completion.tokens == tokens
        assert completion.finish_reason == ("length" if tokens else None)


@settings(max_examples=100)
@given(st.lists(st.integers(0, 255), min_size=1, max_size=20))
@example([0xF0, 0x9F, 0x99, 0x82, 0xF0, 0x9F])
@example([0xFF] * 6)
def test_bytes_that_are_no_characters_end_as_the_tokenizer_decodes_them(tokens):
    assert completed(tokens, BYTES).text == BYTES.decode(tokens)


def test_half_a_character_is_not_shown():
    completion = Completion(Request(), [256], BYTES)
    for byte, shown in zip("a🙂".encode(), ["a", "a", "a", "a", "a🙂"], strict=True):
        completion.append(byte, 0.0)
        assert completion.certain() == shown


@pytest.mark.parametrize(("prompt", "text"), [("return", " the value of"), ("", "return the value"), ("def", "函 ü x")])
def test_sentencepiece_keeps_the_space_after_the_prompt(prompt, text):
    tokenizer = sentencepiece()
    whole = tokenizer.encode(prompt + text)
    start = len(tokenizer.encode(prompt))
    assert whole[:start] == tokenizer.encode(prompt)
    assert completed(whole[start:], tokenizer, prompt).text == text


def fallback() -> JsonTokenizer:
    """Of Llama's kind: bytes of characters it does not have, a mark for spaces, a special token."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *"abc"]
    tokenizer = tokenizers.Tokenizer(
        models.BPE({word: i for i, word in enumerate(words)}, [], byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    space = "\u2581"
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(space), normalizers.Replace(" ", space)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(space, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(words[:3])
    return JsonTokenizer(tokenizer.to_str(), "x", beginning=1)


FALLBACK = fallback()


@settings(max_examples=100)
@given(st.text("ab é龘。🙂", min_size=1, max_size=8), st.text("é龘。🙂", min_size=1, max_size=2))
@example("龘龖。bca", "。")
def test_characters_made_of_runs_of_bytes(text, stop):
    """Their decoder takes back a whole run of bytes while the last character of it is not complete."""
    tokens = FALLBACK.encode("a" + text)[2:]
    completion = Completion(Request(max_tokens=99, stop=(stop,)), FALLBACK.encode("a"), FALLBACK)
    shown = ""
    for token in tokens:
        if completion.finish_reason is None:
            completion.append(token, 0.0)
            assert completion.certain().startswith(shown)
            shown = completion.certain()
    assert completion.text == text.partition(stop)[0]
    assert (completion.finish_reason == "stop") == (stop in text)
    assert "".join(completion.token_texts()) == completion.text


def test_the_space_after_a_special_token_stays():
    completion = Completion(Request(max_tokens=99), FALLBACK.encode("a"), FALLBACK)
    for token in (*FALLBACK.encode("b"), 1, *FALLBACK.encode("c")):
        completion.append(token, 0.0)
    assert completion.text == " b c"


def test_any_end_that_the_model_has_is_one():
    tokenizer = JsonTokenizer(BPE.to_dict()["text"], "x", ends=(BPE.encode("e")[0],))
    completion = completed([*BPE.encode("t"), *BPE.encode("e"), *BPE.encode("t")], tokenizer)
    assert (completion.text, completion.finish_reason) == ("t", "end")


def test_a_cache_without_room_is_refused_with_what_it_takes():
    assert check_memory(CONFIG, 1, 128) is None
    for slots in (10**12, 2**40):
        with pytest.raises(UserError, match=r"tokens of 1 text\(s\) at a time take a cache of .* GiB are free"):
            check_memory(CONFIG, 1, slots)
    with pytest.raises(UserError, match="max_tokens=3000000000: must be at least 1, and below"):
        Request(max_tokens=3_000_000_000).check()


# Stop strings

LETTERS = st.text("ab🙂", min_size=1, max_size=12)


@settings(max_examples=200)
@given(LETTERS, st.lists(st.text("ab🙂", min_size=1, max_size=4), min_size=1, max_size=3))
def test_the_text_ends_before_the_first_stop_string(text, stops):
    completion = completed(BYTES.encode(text), BYTES, stop=tuple(stops))
    # Character by character: the first time that a stop string is complete.
    ends = [n for n in range(1, len(text) + 1) if any(stop in text[:n] for stop in stops)]
    if ends:
        wanted = min(text[: ends[0]].index(stop) for stop in stops if stop in text[: ends[0]])
        assert completion.text == text[:wanted]
        assert completion.finish_reason == "stop"
        assert completion.tokens == BYTES.encode(text[:wanted])
    else:
        assert completion.text == text
        assert completion.finish_reason == "length"


@settings(max_examples=60)
@given(st.integers(0, 40), st.integers(1, 12))
def test_a_stop_string_across_tokens_of_several_characters(start, length):
    text = "    return 'the value of the number 74'\n    return 'the value"
    stop = text[start : start + length]
    completion = completed(BPE.encode(text), BPE, stop=(stop,))
    assert completion.text == text[: text.index(stop)]
    assert completion.finish_reason == "stop"
    covered = BPE.decode(completion.tokens)
    assert covered.startswith(completion.text), "the tokens that have a part in the text are all there"
    assert not BPE.decode(completion.tokens[:-1]).startswith(completion.text) or completion.text == ""


def test_what_may_become_a_stop_string_is_held_back():
    completion = Completion(Request(stop=("END", "NDX")), [256], BYTES)
    shown = []
    for byte in b"aENDb":
        if completion.finish_reason is None:
            completion.append(byte, 0.0)
            shown.append(completion.certain())
    assert shown == ["a", "a", "a", "a"]
    assert completion.text == "a"


def test_the_end_of_the_document_is_no_part_of_the_text():
    completion = completed([*b"ab", 256, *b"cd"], BYTES)
    assert (completion.text, completion.tokens, completion.finish_reason) == ("ab", [97, 98], "end")
    assert completed([*b"a", 0xF0, 256], BYTES).text == "a\ufffd", "what is left of a character is shown at the end"


# Generation

CONFIG = ModelConfig(vocab_size=260, layers=1, embed_dim=16, heads=2, init_std=0.4).resolved().placed("cpu", "float32")


@functools.cache
def tiny() -> tuple[Any, ...]:
    graphdef = kinds.build(CONFIG)[0]
    weights = decoding_weights(CONFIG, kinds.init(CONFIG, jax.random.key(1)))
    return make_decoder(CONFIG, graphdef, BYTES.vocab_size, BYTES.end_of_document), weights, CONFIG, BYTES


REQUESTS = [
    Request("one", max_tokens=30),
    Request("two, which is longer", number=1, max_tokens=25, temperature=0.5, top_k=20),
    Request("", seed=4, max_tokens=30, min_p=0.02),
    Request("four", max_tokens=7, temperature=0),
]


def outcome(completion: Completion) -> tuple[Any, ...]:
    return completion.text, completion.tokens, completion.finish_reason


def test_results_are_those_of_each_request_whatever_the_order_and_the_chunk():
    wanted = [outcome(c) for c in complete(*tiny(), REQUESTS)]
    assert len({text for text, *_ in wanted}) == 4
    order = [2, 3, 0, 1]
    found = complete(*tiny(), [REQUESTS[i] for i in order], chunk=5)
    assert [outcome(c) for c in found] == [wanted[i] for i in order]


def test_a_stop_string_is_found_whatever_the_chunk_and_ends_only_its_row():
    plain = complete(*tiny(), REQUESTS)
    # Two characters that are generated once, so that they may lie on both sides of a chunk's end.
    text = plain[0].text
    pairs = [text[i : i + 2] for i in range(8, 20)]
    stop = next(pair for pair in pairs if text.count(pair) == 1 and "\ufffd" not in pair)
    requests = [Request("one", max_tokens=30, stop=(stop,)), *REQUESTS[1:]]
    for chunk in (1, 2, 5, 16):
        found = complete(*tiny(), requests, chunk=chunk)
        assert found[0].text == text[: text.index(stop)]
        assert found[0].finish_reason == "stop"
        assert [outcome(c) for c in found[1:]] == [outcome(c) for c in plain[1:]]


def test_texts_are_shown_as_they_grow():
    lengths: list[int] = []
    complete(*tiny(), REQUESTS[:1], lambda completions: lengths.append(len(completions[0].tokens)), chunk=8)
    assert lengths == [1, 9, 17, 25, 30]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": -0.1}, "temperature=-0.1: must be at least 0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_p": 0.0}, "top_p=0.0: must be above 0 and at most 1"),
        ({"top_p": 1.1}, "top_p=1.1"),
        ({"min_p": 1.0}, "min_p=1.0: must be at least 0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0: must be above 0"),
        ({"max_tokens": 0}, "max_tokens=0: must be at least 1"),
        ({"seed": -1}, "seed=-1"),
        ({"number": 2**32}, "number=4294967296"),
        ({"stop": ("a", "")}, "stop=''"),
        ({"prompt": "a\udcff"}, "prompt='a\\\\udcff': is not valid UTF-8"),
    ],
)
def test_requests_out_of_range(fields, message):
    with pytest.raises(UserError, match=message):
        complete(*tiny(), [Request(**{"prompt": "a"} | fields)])


def test_the_context_of_learned_positions_is_a_limit_and_that_of_others_is_not():
    learned = ModelConfig(positions="learned", max_positions=64).resolved()
    check_length(learned, 30, 34)
    with pytest.raises(UserError, match=r"max_tokens=35 after a prompt of 30 tokens .* 64 positions .* up to 34"):
        check_length(learned, 30, 35)
    with pytest.raises(UserError, match="shorten the prompt"):
        check_length(learned, 64, 1)
    for positions in ("rope", "sinusoidal", "none"):
        check_length(ModelConfig(positions=positions, max_positions=64).resolved(), 30, 1000)


# The command


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory, corpus_file: Path) -> Callable[..., subprocess.CompletedProcess]:
    """Runs `python -m serve.generate` with the arguments given, on a GPT of two layers trained for a few steps."""
    workdir = tmp_path_factory.mktemp("run")
    fields = {
        "model.layers": 2,
        "model.embed_dim": 32,
        "model.heads": 2,
        "model.max_positions": 96,
        "data.sources": f"('{corpus_file}',)",
        "data.context": 64,
        "data.batch_size": 4,
        "optimizer.warmup_steps": 2,
        "optimizer.ema_decay": 0.9,
        "optimizer.learning_rate": 0.02,
        "run.steps": 40,
        "run.eval_every": 0,
        "run.eval_batches": 1,
        "run.save_every": 0,
        "run.tensorboard": False,
    }
    overrides = [f"--config.{name}={value}" for name, value in fields.items()]
    run("train.pretrain", "--config=configs/gpt_mini.py", f"--workdir={workdir}", *overrides).check_returncode()
    return functools.partial(run, "serve.generate", f"--checkpoint={workdir}")


def run(module: str, *arguments: str, text: str = "") -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", module, *arguments], cwd=ROOT, input=text, capture_output=True, text=True
    )


def test_one_continuation_is_streamed_and_reported(command, tmp_path):
    report = tmp_path / "report.json"
    arguments = ("--prompt=the ", "--max_tokens=40", "--logprobs", f"--json={report}")
    first = command(*arguments)
    assert first.returncode == 0, first.stderr
    found = json.loads(report.read_text())["completions"][0]
    tokens = zip(found["logprobs"], found["token_texts"], strict=True)
    lines = [f"{logprob:10.4f}  {text!r}\n" for logprob, text in tokens]
    assert first.stdout == f"the {found['text']}\n" + "".join(lines)
    assert found["prompt"] == "the "
    assert found["finish_reason"] == "length"
    assert len(found["tokens"]) == 40
    assert "".join(found["token_texts"]) == found["text"] == BYTES.decode(found["tokens"])
    assert np.all(np.array(found["logprobs"]) < 0)


def test_several_prompts_and_samples_at_once(command, tmp_path):
    report = tmp_path / "report.json"
    (tmp_path / "prompt.txt").write_text("from a file")
    found = command(
        "--prompt=the ",
        "--prompt=a longer prompt than the other ",
        f"--prompt_file={tmp_path / 'prompt.txt'}",
        "--samples=2",
        "--max_tokens=20",
        "--stop=e",
        "--stop= ",
        "--top_p=0.9",
        "--ema",
        f"--json={report}",
    )
    assert found.returncode == 0, found.stderr
    completions = json.loads(report.read_text())["completions"]
    assert [(c["prompt"][:6], c["sample"]) for c in completions] == [
        (prompt, sample) for prompt in ("the ", "a long", "from a") for sample in (0, 1)
    ]
    for completion in completions:
        assert completion["prompt"] + completion["text"] in found.stdout
        assert not {"e", " "} & set(completion["text"])
        assert (completion["finish_reason"] == "length") == (len(completion["tokens"]) == 20)
    assert "stop" in {c["finish_reason"] for c in completions}
    assert len({c["text"] for c in completions}) > 2


def test_a_prompt_from_standard_input(command):
    found = command("--prompt_file=-", "--max_tokens=5", "--temperature=0", text="naïve ")
    assert found.returncode == 0, found.stderr
    assert found.stdout.startswith("naïve ")


def assert_refused(found: subprocess.CompletedProcess, message: str) -> None:
    assert found.returncode == 2, found.stderr
    assert found.stderr.count("\n") == 1, found.stderr
    assert found.stderr.startswith(f"error: {message}")
    assert found.stdout == ""


def test_a_prompt_too_long_for_the_model(command):
    found = command("--prompt=" + "x" * 60, "--max_tokens=50")
    assert_refused(found, "max_tokens=50 after a prompt of 61 tokens")
    assert "96 positions" in found.stderr
    assert "up to 35" in found.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--temperature=-1"], "temperature=-1.0: must be at least 0"),
        (["--top_p=0"], "top_p=0.0: must be above 0"),
        (["--samples=0"], "samples=0: must be at least 1"),
        (["--max_tokens=many"], "flag --max_tokens=many"),
        (["--stop="], "stop='': a stop string must have"),
        (["--prompt_file=nowhere.txt"], "prompt_file=nowhere.txt: cannot be read (No such file"),
        (["--json=nowhere/report.json"], "json=nowhere/report.json: its directory does not exist"),
        (["--compute_dtype=float8"], "flag --compute_dtype=float8"),
        (["--checkpoint="], "--checkpoint is missing"),
        (["--checkpoint=nowhere"], "checkpoint=nowhere: no complete checkpoint there"),
    ],
)
def test_mistakes_are_one_line(arguments, message):
    assert_refused(run("serve.generate", "--checkpoint=somewhere", *arguments), message)
