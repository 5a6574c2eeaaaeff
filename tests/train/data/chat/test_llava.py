"""Records as conversations: both spellings give the same, and what is not as it should be is named."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpu.errors import UserError
from train.config import DataConfig
from train.data.chat import llava
from train.data.chat.record import IMAGE, Conversation, Turn

WELL = st.text(st.characters(exclude_categories=["Cs"]), max_size=20).filter(lambda text: IMAGE not in text)


def turn(role: str, text: str) -> dict:
    return {"from": role, "value": text}


def read(record: dict, images: int = 0, **fields) -> Conversation:
    return llava.conversation(record, (b"image",) * images, "a.jsonl, line 7", DataConfig(**fields))


@given(said=st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), WELL), max_size=5), answer=WELL)
def test_both_spellings_give_the_turns_as_written(said, answer):
    said = [*said, ("user", f"{IMAGE}\nwhat?\n{IMAGE}"), ("assistant", f"a{answer}")]
    spelled = {"system": "system", "user": "human", "assistant": "gpt"}
    llavas = {"conversations": [turn(spelled[role], text) for role, text in said]}
    messages = {"messages": [{"role": role, "content": text} for role, text in said]}
    expected = Conversation("a.jsonl, line 7", tuple(Turn(*pair) for pair in said), (b"image",) * 2)
    assert read(llavas, 2) == read(messages, 2) == expected


def test_times_and_kind_stand_beside_the_turns():
    record = {"conversations": [turn("human", IMAGE * 2), turn("gpt", "x")], "times": [0, 1.5], "kind": "counting"}
    assert read(record, 2)[3:] == ((0.0, 1.5), "counting")
    assert read(record | {"times": None, "kind": None}, 2)[3:] == ((), "")


ANSWER = turn("gpt", "x")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({}, "line 7: no field 'conversations' or 'messages'; has none"),
        ({"id": 1, "text": "x"}, "line 7: no field 'conversations' or 'messages'; has id, text"),
        ({"conversations": "x"}, "line 7: 'conversations' holds str, not a list"),
        ({"conversations": []}, "line 7: an empty conversation"),
        ({"conversations": [turn("human", "x"), turn("gpt", " \n")]}, "line 7: an empty conversation"),
        ({"conversations": [ANSWER, "x"]}, "line 7, turn 2: a JSON str"),
        ({"conversations": [turn("robot", "x")]}, "turn 1: unknown role 'robot'; valid: human, user, gpt"),
        ({"conversations": [turn(["gpt"], "x")]}, r"turn 1: unknown role \['gpt'\]"),
        ({"conversations": [{"value": "x"}]}, "turn 1: unknown role None"),
        ({"messages": [{"role": "user"}]}, r"turn 1: 'value' \(or 'content'\) holds NoneType"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "turn 1: .* holds list, not text"),
        ({"conversations": [turn("human", IMAGE * 3), ANSWER]}, "line 7: 3 <image> in the text and 2 images"),
        ({"conversations": [turn("human", "none"), ANSWER]}, "line 7: 0 <image> in the text and 2 images"),
        ({"conversations": [ANSWER], "times": [1.0]}, "line 7: 1 'times' for 2 images"),
        ({"conversations": [ANSWER], "times": [float("nan"), 1]}, "line 7: 'times' holds"),
        ({"conversations": [ANSWER], "times": [0, 10**400]}, "line 7: 'times' holds"),
        ({"conversations": [ANSWER], "times": [-1.0, 1]}, "line 7: 'times' holds"),
        ({"conversations": [ANSWER], "times": ["1", "2"]}, "line 7: 'times' holds"),
        ({"conversations": [ANSWER], "times": 3}, "line 7: 'times' holds 3"),
        ({"conversations": [ANSWER], "kind": 3}, "line 7: 'kind' holds int"),
    ],
)
def test_bad_records_are_named(record, message):
    with pytest.raises(UserError, match=message):
        read(record, 2)


WORDS = ["from", "value", "role", "content", "human", "gpt", "image", "a.jpg", IMAGE]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.just(10**400) | st.floats() | st.sampled_from(WORDS) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(WORDS), inner, max_size=3),
    max_leaves=12,
)


@given(st.dictionaries(st.sampled_from(["conversations", "messages", "image", "images", "times", "kind"]), JSON))
def test_any_json_is_a_conversation_or_a_line_that_says_why_not(record):
    def images_and_placeholders() -> tuple[int, int]:
        found = read(record, len(llava.image_paths(record, "a.jsonl, line 7")))
        return len(found.images), sum(turn.text.count(IMAGE) for turn in found.turns)

    try:
        images, placeholders = images_and_placeholders()
    except UserError:
        with pytest.raises(UserError, match=r"^a\.jsonl, line 7[^\n]*$"):
            images_and_placeholders()
    else:
        assert images == placeholders


def test_half_a_surrogate_pair_is_replaced_or_refused():
    record = {"conversations": [turn("gpt", "half \ud83d")]}
    assert read(record).turns[0].text == "half \ufffd\ufffd\ufffd"
    with pytest.raises(UserError, match="line 7, turn 1: not UTF-8"):
        read(record, invalid_utf8="refuse")


def test_a_caption_answers_its_images():
    found = llava.caption(" a cat\n", (b"1", b"2"), "x")
    assert found == Conversation("x", (Turn("user", IMAGE * 2), Turn("assistant", "a cat")), (b"1", b"2"))
    for text, images, message in (
        ("a cat", (), "x: a caption without an image"),
        (" ", (b"1",), "x: an empty conversation"),
        (f"a {IMAGE}", (b"1",), "x: 2 <image> in the text and 1 images"),
    ):
        with pytest.raises(UserError, match=message):
            llava.caption(text, images, "x")


def test_image_paths_in_all_their_forms():
    for record, expected in (
        ({}, ()),
        ({"image": None, "images": []}, ()),
        ({"image": ""}, ()),
        ({"image": "a/b.jpg"}, ("a/b.jpg",)),
        ({"image": ["a.jpg", "./b..jpg"], "images": None}, ("a.jpg", "./b..jpg")),
        ({"images": "東京.png"}, ("東京.png",)),
    ):
        assert llava.image_paths(record, "x") == expected


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "../a.jpg", "a/../../b.jpg", "a/..", "..", "a\\..\\..\\b.jpg", "\\a", "C:\\a", "c:/a"]
)
def test_paths_that_lead_out_of_the_folder_are_refused(path):
    with pytest.raises(UserError, match=r"x: image .* leads out of the file's folder"):
        llava.image_paths({"image": ["good.jpg", path]}, "x")


@pytest.mark.parametrize("path", [3, {}, ["", "a.jpg"], [None], ["a\0.jpg"], [["a.jpg"]]])
def test_what_is_no_path_is_refused(path):
    with pytest.raises(UserError, match=r"x: image .* is no path"):
        llava.image_paths({"images": path}, "x")
    with pytest.raises(UserError, match="x: has both 'image' and 'images'"):
        llava.image_paths({"images": path, "image": "a.jpg"}, "x")
