"""How a cohort's records are cut into passes: each once, with little padding, in the model's own token."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.clients.cohort.passes import assemble_batch, cut_passes, token_counts
from fedpeft.data.encode import Encoded
from support import small_models as small

WIDE = 10**6  # tokens: everything at once


@settings(deadline=None, max_examples=60)
@given(st.lists(st.lists(st.integers(1, 64), min_size=0, max_size=9), min_size=1, max_size=6), st.integers(1, 400))
def test_passes_take_every_record_once_and_stay_short(lengths, tokens):
    lengths = [np.array(own, dtype=np.int64) for own in lengths]
    drawn = [np.arange(len(own)) for own in lengths]
    seen = []
    for piece in cut_passes(lengths, drawn, tokens):
        assert (np.diff(piece.clients) >= 0).all()
        own = [int(lengths[client][record]) for client, record in zip(piece.clients, piece.records, strict=True)]
        assert piece.width == max(own)
        padded = piece.width * len(own)
        assert len(own) == 1 or (padded <= 2 * tokens and padded - sum(own) <= tokens / 8)
        seen += zip(piece.clients.tolist(), piece.records.tolist(), strict=True)
    assert sorted(seen) == [(client, record) for client, own in enumerate(lengths) for record in range(len(own))]


def test_texts_of_other_widths_are_padded_with_the_models_token(build):
    model = build()
    model.base.backbone.config.pad_token_id, before = 9, model.base.backbone.config.pad_token_id
    try:
        data = [
            small.texts(3),
            Encoded({key: value[:, :2] for key, value in small.texts(3).inputs.items()}, small.texts(3).labels),
        ]
        lengths = [token_counts(model, own) for own in data]
        assert lengths[1].tolist() == [2, 2, 2]
        (piece,) = cut_passes(lengths, [np.arange(3), np.arange(3)], WIDE)
        inputs, labels = assemble_batch(model, data, piece)
    finally:
        model.base.backbone.config.pad_token_id = before
    assert inputs["input_ids"].shape == (6, piece.width) and labels.tolist() == 2 * small.texts(3).labels.tolist()
    assert (inputs["input_ids"][3:, 2:] == 9).all() and (inputs["attention_mask"][3:, 2:] == 0).all()
