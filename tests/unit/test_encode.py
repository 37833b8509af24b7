"""Records to tensors: padding, trimming, labels of language models, layout and scale of images."""

import numpy as np
import pytest
import torch

from fedpeft.data.encode import encode
from fedpeft.data.records import Records
from fedpeft.errors import InputError
from fedpeft.models.embedded import byte_tokenizer

TEXTS = ["abc", "a", "abcdef", "ab"]


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def records(texts=TEXTS):
    return Records(list(texts), np.arange(len(texts)), [str(i) for i in range(len(texts))], {}, "text")


def test_texts_are_padded_on_the_right_and_cut_at_the_end(tokenizer):
    data = encode(records(), tokenizer, "sequence-classification", 4)
    a, b, c, d = (tokenizer.convert_tokens_to_ids(letter) for letter in "abcd")
    pad = tokenizer.pad_token_id
    assert data.inputs["input_ids"].tolist() == [[a, b, c, pad], [a, pad, pad, pad], [a, b, c, d], [a, b, pad, pad]]
    assert data.inputs["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0]]
    assert data.labels.tolist() == [0, 1, 2, 3] and data.labels.dtype == torch.int64


def test_a_tokenizer_that_pads_on_the_left_is_told_otherwise():
    left = byte_tokenizer()
    left.padding_side = "left"
    assert encode(records(), left, "sequence-classification", 8).inputs["attention_mask"][1].tolist() == [
        1,
        0,
        0,
        0,
        0,
        0,
    ]


def test_a_batch_is_cut_to_its_longest_text_in_the_order_asked(tokenizer):
    data = encode(records(), tokenizer, "sequence-classification", 16)
    inputs, labels = data.batch(np.array([3, 1]))
    assert labels.tolist() == [3, 1]
    assert {name: tuple(value.shape) for name, value in inputs.items()} == {
        "input_ids": (2, 2),
        "attention_mask": (2, 2),
    }
    a, b = tokenizer.convert_tokens_to_ids(["a", "b"])
    assert inputs["input_ids"].tolist() == [[a, b], [a, tokenizer.pad_token_id]]


def test_subset_then_batch_is_batch_of_the_chosen(tokenizer):
    data = encode(records(), tokenizer, "sequence-classification", 16)
    assert len(data.view([2, 0])) == 2
    inputs, labels = data.view([2, 0]).batch(np.array([1]))
    expected, expected_labels = data.batch(np.array([0]))
    assert labels.tolist() == expected_labels.tolist() == [0]
    assert torch.equal(inputs["input_ids"], expected["input_ids"])


def test_language_model_labels_ignore_padding_but_not_the_padding_token(tokenizer):
    tokenizer.pad_token = tokenizer.eos_token  # as many causal models are padded
    try:
        data = encode(records(["ab<eos>", "abcd"]), tokenizer, "causal-lm", 8)
    finally:
        tokenizer.pad_token = "<pad>"
    ids = data.inputs["input_ids"]
    assert ids[0, 2] == ids[0, 3] == ids[0, 4] == ids[1, 4] == tokenizer.eos_token_id
    assert data.labels.tolist() == [[*ids[0, :3].tolist(), -100, -100], ids[1].tolist()]
    inputs, labels = data.batch(np.array([0]))
    assert inputs["input_ids"].shape == labels.shape == (1, 3) and (labels != -100).all()


def test_every_text_with_room_ends_with_the_end_token(tokenizer):
    data = encode(records(["ab", "abcd", "abc<eos>", "a"]), tokenizer, "causal-lm", 4)
    end = tokenizer.eos_token_id
    last = [row[row != -100][-1].item() for row in data.labels]
    assert [value == end for value in last] == [True, False, True, True] and data.end == end
    assert [int((row == end).sum()) for row in data.labels] == [1, 0, 1, 1]
    assert torch.equal(data.labels != -100, data.inputs["attention_mask"] == 1)
    assert data.inputs["attention_mask"].sum(1).tolist() == [3, 4, 4, 2]
    assert data.view([3]).end == end and encode(records(), tokenizer, "sequence-classification", 4).end is None


def test_texts_that_are_cut_are_counted_with_their_share(tokenizer, caplog):
    data = encode(records(), tokenizer, "sequence-classification", 3)
    assert "model.max_length=3: 1 of 4 texts have more tokens and are cut; the longest has 6" in caplog.text
    assert [(entry.count, entry.total) for entry in data.skipped] == [(1, 4)]
    caplog.clear()
    exact = encode(records(["abc", "ab"]), tokenizer, "causal-lm", 3, "test texts")
    assert "1 of 2 test texts have more tokens, with their end token, and are cut; the longest has 4" in caplog.text
    assert exact.skipped[0].tree()["count"] == 1
    caplog.clear()
    assert not encode(records(), tokenizer, "sequence-classification", 6).skipped and not caplog.records


def test_what_a_tokenizer_puts_around_a_text_stays_around_a_cut_one():
    from tokenizers.processors import TemplateProcessing

    framed = byte_tokenizer()
    a, b, c = framed.convert_tokens_to_ids(["a", "b", "c"])
    framed.backend_tokenizer.post_processor = TemplateProcessing(
        single="<pad> $A <eos>", special_tokens=[("<pad>", 0), ("<eos>", 1)]
    )
    data = encode(records(["ab", "abcdef"]), framed, "sequence-classification", 5)
    assert data.inputs["input_ids"].tolist() == [[0, a, b, 1, 0], [0, a, b, c, 1]]
    language = encode(records(["ab", "abcdef"]), framed, "causal-lm", 4)
    assert language.inputs["input_ids"].tolist() == [[0, a, b, 1], [0, a, b, c]]  # a cut text does not end


def test_texts_with_nothing_to_predict_are_counted(tokenizer, caplog):
    data = encode(records(["a", "ab", "b"]), tokenizer, "causal-lm", 1)
    assert data.teaching().tolist() == [] and "3 of 3 texts have nothing to predict" in caplog.text
    endless = byte_tokenizer()
    endless.eos_token = None
    data = encode(records(["a", "ab", "b"]), endless, "causal-lm", 8)
    assert data.teaching().tolist() == [1] and [entry.count for entry in data.skipped] == [2, 3]
    assert "2 of 3 texts have nothing to predict" in caplog.text and "'a', 'b'" in caplog.text
    assert "the model does not learn where a text ends" in caplog.text
    assert encode(records(), tokenizer, "sequence-classification", 1).teaching().tolist() == [0, 1, 2, 3]


def images(array):
    return Records(array, np.zeros(len(array), dtype=np.int64), ["a"], {}, "image")


def test_images_without_a_processor_are_scaled_and_channels_first():
    pixels = np.arange(2 * 3 * 4 * 3, dtype=np.uint8).reshape(2, 3, 4, 3)
    data = encode(images(pixels), None, "image-classification", 1)
    assert data.inputs["pixel_values"].shape == (2, 3, 3, 4)
    assert data.inputs["pixel_values"][1, 2, 0, 3] == torch.tensor(pixels[1, 0, 3, 2] / 255, dtype=torch.float32)
    inputs, _ = data.batch(np.array([1]))
    assert torch.equal(inputs["pixel_values"], data.inputs["pixel_values"][1:])
    unit = encode(images(np.full((1, 2, 2, 1), 0.25, dtype=np.float32)), None, "image-classification", 1)
    assert unit.inputs["pixel_values"].unique().tolist() == [0.25]


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_a_processor_resizes_normalises_and_colours_grey_images_once(dtype):
    from transformers import ViTImageProcessor

    processor = ViTImageProcessor(size={"height": 6, "width": 5}, image_mean=[0.5, 0.0, 0.1], image_std=[0.5, 1.0, 0.2])
    grey = np.full((3, 4, 4, 1), 51 if dtype == np.uint8 else 0.2, dtype=dtype)
    pixels = encode(images(grey), processor, "image-classification", 1).inputs["pixel_values"]
    assert pixels.shape == (3, 3, 6, 5) and pixels.dtype == torch.float32
    for channel, expected in enumerate([(0.2 - 0.5) / 0.5, 0.2, (0.2 - 0.1) / 0.2]):
        assert torch.allclose(pixels[:, channel], torch.tensor(expected), atol=1e-5)


def test_the_wrong_kind_is_refused(tokenizer):
    with pytest.raises(InputError, match="does not take texts"):
        encode(records(), tokenizer, "image-classification", 8)
    with pytest.raises(InputError, match="does not take images"):
        encode(images(np.zeros((1, 2, 2, 1), dtype=np.uint8)), None, "causal-lm", 8)
    with pytest.raises(InputError, match="no tokenizer"):
        encode(records(), None, "causal-lm", 8)
