"""Sources of image–text data: what was written into files comes back by index; what cannot be read is named."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tpu.errors import UserError
from train.config import DataConfig
from train.data.chat.record import IMAGE, Conversation, Turn
from train.data.chat.skipping import Skipping
from train.data.chat.sources import _braces, open_source

WELL = st.text(st.characters(exclude_categories=["Cs"]), max_size=20).filter(lambda text: IMAGE not in text)
NAMES = st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="/\\"), min_size=1, max_size=20)


def opened(source, **fields):
    return open_source(str(source), DataConfig(**fields))


def said(answer: str = "yes", **fields) -> dict:
    question = IMAGE * len(fields.get("images", [0] if "image" in fields else []))
    return fields | {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}


def lines(path: Path, *records) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@st.composite
def written(draw: st.DrawFn) -> tuple[dict, Conversation]:
    """A record, whose images are named by their number, and what it should be read as."""
    images = tuple(draw(st.lists(st.binary(max_size=40), max_size=3)))
    text = [draw(WELL) + "".join(f"{IMAGE}{draw(WELL)}" for _ in images), f"a{draw(WELL)}"]
    turns = tuple(map(Turn, ("user", "assistant"), text))
    record = {"conversations": [{"from": "human", "value": text[0]}, {"from": "gpt", "value": text[1]}]}
    if draw(st.booleans()):
        record = {"messages": [{"role": turn.role, "content": turn.text} for turn in turns], "id": draw(st.integers())}
    return record, Conversation("", turns, images)


@given(
    found=st.lists(written(), min_size=1, max_size=5),
    name=NAMES.filter(lambda name: len(name.encode()) < 100),
    ascii_only=st.booleans(),
    indent=st.sampled_from([None, 1]),
    data=st.data(),
)
def test_what_was_written_comes_back_in_any_order(tmp_path_factory, found, name, ascii_only, indent, data):
    folder = tmp_path_factory.mktemp("folder")
    (folder / "images").mkdir()
    for number, (record, conversation) in enumerate(found):
        paths = [f"images/{number}-{n}-{name}" for n in range(len(conversation.images))]
        for path, content in zip(paths, conversation.images, strict=True):
            (folder / path).write_bytes(content)
        record |= {"image": paths[0]} if len(paths) == 1 else {"images": paths} if paths else {}
    records = [record for record, _ in found]
    text = "".join(f"{json.dumps(record, ensure_ascii=ascii_only)}\n \r\n" for record in records)
    (folder / "a.jsonl").write_bytes(text.encode())
    (folder / "b.json").write_bytes(json.dumps(records, ensure_ascii=ascii_only, indent=indent).encode())
    source = opened(f"{folder}/?.js*")
    assert len(source) == 2 * len(found)
    sequential = list(source)
    assert [c._replace(key="") for c in sequential] == [c for _, c in found] * 2
    assert [c.key for c in sequential[: len(found)]] == [
        f"{folder}/a.jsonl, line {2 * n + 1}" for n in range(len(found))
    ]
    assert [c.key for c in sequential[len(found) :]] == [f"{folder}/b.json, record {n + 1}" for n in range(len(found))]
    for index in data.draw(st.permutations(range(len(source)))):
        assert source[index] == sequential[index]
    for path in (folder / "images").iterdir():
        path.unlink()
    for index, conversation in enumerate(sequential):
        text = source.text(index)
        assert text._replace(images=conversation.images) == conversation
        assert len(text.images) == len(conversation.images)
    for read in (source.__getitem__, source.text):
        with pytest.raises(IndexError):
            read(len(source))


def test_keys_put_records_of_an_image_and_duplicates_together(tmp_path):
    records = (said("1", image="x.jpg"), said("2", images=["x.jpg"]), said("3", image="y.jpg"), said("4"), said("4"))
    source = opened(lines(tmp_path / "a.jsonl", *records, said("5")))  # no image need be there
    keys = [source.key(i) for i in range(len(source))]
    assert keys[:3] == ["x.jpg", "x.jpg", "y.jpg"]
    assert keys[3] == keys[4] != keys[5]
    (tmp_path / "b").mkdir()
    moved = opened(lines(tmp_path / "b" / "b.jsonl", *reversed(records)))
    assert [moved.key(i) for i in range(5)] == keys[4::-1]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": ', r"a\.jsonl, line 2: not JSON"),
        ("[1]", r"a\.jsonl, line 2: a JSON list"),
        ("[" * 100_000, r"a\.jsonl, line 2: not JSON"),
        ("{}", r"a\.jsonl, line 2: no field 'conversations'"),
        (json.dumps(said(image="gone.jpg")), r"a\.jsonl, line 2: image 'gone\.jpg' cannot be read \(No such file"),
        (json.dumps(said(image="a.jsonl/x")), r"a\.jsonl, line 2: image 'a\.jsonl/x' cannot be read"),
        (json.dumps(said(image="../a.jpg")), r"a\.jsonl, line 2: image '\.\./a\.jpg' leads out"),
        (json.dumps(said(image="/etc/hostname")), r"a\.jsonl, line 2: image '/etc/hostname' leads out"),
        (json.dumps(said("yes <image>", image="x.jpg")), r"line 2: 2 <image> in the text and 1 images"),
        (json.dumps(said() | {"image": "x.jpg"}), r"line 2: 0 <image> in the text and 1 images"),
    ],
)
def test_bad_lines_are_named_and_leave_the_others(tmp_path, line, message):
    (tmp_path / "x.jpg").write_bytes(b"i")
    (tmp_path / "a.jsonl").write_text(f"{json.dumps(said('first'))}\n{line}\n{json.dumps(said('third'))}")
    source = opened(tmp_path / "a.jsonl")
    with pytest.raises(UserError, match=message) as caught:
        source[1]
    assert "\n" not in str(caught.value)
    assert [source[i].turns[1].text for i in (0, 2)] == ["first", "third"]
    assert source.key(1)
    assert Skipping(source.__getitem__, len(source))[1].turns[1].text in ("first", "third")


def test_invalid_utf8_is_replaced_or_refused(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(json.dumps(said("caf#")).encode().replace(b"#", b"\xe9"))
    assert opened(tmp_path / "a.jsonl")[0].turns[1].text == "caf\ufffd"
    with pytest.raises(UserError, match=r"a\.jsonl, line 1: not UTF-8 \(byte 0xe9\)"):
        opened(tmp_path / "a.jsonl", invalid_utf8="refuse")[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"a\.json: not a JSON list"),
        ('{"conversations": []}', r"a\.json: not a JSON list of records; .* name the file \.jsonl"),
        ("[", r"a\.json, record 1: not JSON"),
        ("[{}, ]", r"a\.json, record 2: not JSON"),
        ('[{}, {"a": ]', r"a\.json, record 2: not JSON"),
        ("[{} {}]", r"a\.json: not JSON after record 1 \(byte 4\)"),
        ("[{}, {}", r"a\.json: not JSON after record 2 \(byte 7\)"),
        ("[{}] more", r"a\.json: not JSON after record 1"),
        ("[" * 100_000, r"a\.json, record 1: not JSON"),
        (" [ ] ", r"a\.json' holds no record"),
    ],
)
def test_bad_json_files_are_named(tmp_path, content, message):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(UserError, match=message):
        opened(tmp_path / "a.json")


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_a_byte_order_mark_is_passed_over_and_utf16_refused(tmp_path, name):
    content = json.dumps(said("é"))
    content = f"[{content}]" if name == "a.json" else content
    (tmp_path / name).write_bytes(content.encode("utf-8-sig"))
    assert opened(tmp_path / name)[0].turns[1].text == "é"
    (tmp_path / name).write_bytes(content.encode("utf-16"))
    with pytest.raises(UserError, match="not UTF-8: its byte-order mark says UTF-16"):
        opened(tmp_path / name)[0]


def test_a_file_removed_after_it_was_opened_is_named(tmp_path):
    source = opened(lines(tmp_path / "a.jsonl", said()))
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(UserError, match=r"a\.jsonl, line 1: cannot be read"):
        source[0]


def test_files_of_no_or_mixed_kinds_are_refused(tmp_path):
    for name in ("a.jsonl", "a.tar", "a.csv"):
        (tmp_path / name).write_text("")
    for source, message in (
        ("*.parquet", r"\*\.parquet' matches no file; valid: a glob of \.json, \.jsonl, \.tar files"),
        ("", "matches no file"),  # a folder
        ("*.csv", r"a\.csv: unknown kind of file; valid: \.json, \.jsonl, \.tar"),
        ("a.{jsonl,tar}", r"matches \.tar and other files"),
        ("a.jsonl", r"a\.jsonl' holds no record"),
        ("{a,b}.jsonl", r"b\.jsonl' matches no file"),
    ):
        with pytest.raises(UserError, match=message):
            opened(f"{tmp_path}/{source}")


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("a.tar", ["a.tar"]),
        ("s-{000..002}.tar", ["s-000.tar", "s-001.tar", "s-002.tar"]),
        ("s-{8..11}.tar", ["s-8.tar", "s-9.tar", "s-10.tar", "s-11.tar"]),
        ("s-{098..101}", ["s-098", "s-099", "s-100", "s-101"]),
        ("{a,b}/{1..2}.tar", ["a/1.tar", "a/2.tar", "b/1.tar", "b/2.tar"]),
        ("{a,b*,}x", ["ax", "b*x", "x"]),
        ("{a}{}..{1..}", ["{a}{}..{1..}"]),
        ("{3..3}", ["3"]),
    ],
)
def test_braces_expand_as_in_shells(pattern, expected):
    assert list(_braces(pattern)) == expected


def test_braces_take_no_time_for_what_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"s-000000000\.tar' matches no file"):
        opened(f"{tmp_path}/s-{{000000000..999999999}}.tar")
    with pytest.raises(UserError, match=r"\{9\.\.0\} counts down"):
        opened(f"{tmp_path}/s-{{9..0}}.tar")


def test_a_file_named_twice_is_read_once(tmp_path):
    lines(tmp_path / "a.jsonl", said())
    assert len(opened(f"{tmp_path}/{{a,*}}.jsonl")) == 1


def test_digest_changes_with_the_files(tmp_path):
    path = lines(tmp_path / "a.jsonl", said())
    first = opened(path).digest
    assert opened(path).digest == first
    os.utime(path, ns=(0, 1))
    assert opened(path).digest != first


@pytest.fixture(scope="module")
def tfds_folder(tmp_path_factory):
    """A data set made here, without a network."""
    import tensorflow_datasets as tfds

    class TinyImages(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        url_infos = None  # nothing is downloaded

        def _info(self):
            features = {
                "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
                "caption": tfds.features.Text(),
                "label": tfds.features.ClassLabel(names=["cat", "dog"]),
                "id": tfds.features.Scalar(np.int64),
            }
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(range(6)), "validation": self._generate_examples([9])}

        def _generate_examples(self, numbers):
            for number in numbers:
                file = io.BytesIO()
                Image.fromarray(np.full((2, 3, 3), number, np.uint8)).save(file, "png")
                file.seek(0)
                yield (
                    number,
                    {
                        "image": file,
                        "caption": f"café {number}",
                        "label": number % 2 if number < 6 else -1,
                        "id": number,
                    },
                )

    folder = tmp_path_factory.mktemp("tfds")
    TinyImages(data_dir=folder, file_format="array_record").download_and_prepare()
    return str(folder)


def test_tensorflow_datasets_without_tensorflow(tfds_folder):
    data = DataConfig(tfds_dir=tfds_folder)
    source = open_source("tfds:tiny_images", data)
    labels = open_source("tfds:tiny_images:train", data, text_field="label")
    assert len(source) == len(labels) == 6
    numbers = []
    for index in (3, 0, 5, 1, 2, 4):
        found = source[index]
        pixels = np.asarray(Image.open(io.BytesIO(found.images[0])))
        assert pixels.shape == (2, 3, 3)
        numbers.append(int(pixels[0, 0, 0]))
        assert found == (
            source.key(index),
            (Turn("user", IMAGE), Turn("assistant", f"café {numbers[-1]}")),
            found.images,
            (),
            "",
        )
        assert labels[index].turns[1].text == ("cat", "dog")[numbers[-1] % 2]
        assert labels.text(index).turns == labels[index].turns
    assert sorted(numbers) == [0, 1, 2, 3, 4, 5]
    assert labels.names == ("cat", "dog")
    assert source.names == ()
    assert len({source.key(i) for i in range(6)}) == 6
    assert open_source("tfds:tiny_images:validation", data)[0].turns[1].text == "café 9"
    assert len(open_source("tfds:tiny_images:train[:2]", data)) == 2
    with pytest.raises(UserError, match="tfds:tiny_images:validation, record 1: text_field='label' is -1, no label"):
        open_source("tfds:tiny_images:validation", data, text_field="label")[0]
    assert source.digest == labels.digest
    with pytest.raises(IndexError):
        source[6]
    assert "tensorflow" not in sys.modules


def test_bad_tensorflow_datasets_are_named(tfds_folder):
    for source, fields, message in (
        ("tfds:no_such_set", {}, "'tfds:no_such_set': Dataset no_such_set not found"),
        ("tfds:tiny_images:test", {}, "'tfds:tiny_images:test'"),
        ("tfds:tiny_images", {"image_field": "photo"}, "image_field='photo': .* valid: .*image"),
        ("tfds:tiny_images", {"text_field": "text"}, "text_field='text': .* valid: .*caption"),
        ("tfds:tiny_images", {"image_field": "caption"}, "image_field='caption': .* no image there"),
    ):
        with pytest.raises(UserError, match=message):
            open_source(source, DataConfig(tfds_dir=tfds_folder), **fields)
    numbers = open_source("tfds:tiny_images", DataConfig(tfds_dir=tfds_folder), text_field="id")
    with pytest.raises(UserError, match=r"tiny_images, record 1: text_field='id' holds .*int.*, not text or a label"):
        numbers[0]


def test_a_damaged_data_set_is_named(tfds_folder, tmp_path):
    shutil.copytree(tfds_folder, tmp_path / "tfds")
    (path,) = (tmp_path / "tfds").rglob("*train.array_record*")
    path.write_bytes(path.read_bytes()[:-1000])
    source = open_source("tfds:tiny_images", DataConfig(tfds_dir=str(tmp_path / "tfds")))
    with pytest.raises(UserError, match=r"^tfds:tiny_images, record 1: cannot be read \([^\n]*$"):
        source[0]
