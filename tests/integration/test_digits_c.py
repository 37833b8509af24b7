"""The quick acceptance gates of digits-C for seed 1.

`python -m fedpeft.simulations.benchmarks.tta_gates` runs all of them, over seeds.
"""

from __future__ import annotations

import pytest
import torch

from fedpeft.data.corruptions import CORRUPTIONS
from fedpeft.data.drift import build
from fedpeft.errors import InputError
from fedpeft.simulations.benchmarks import tta_gates
from fedpeft.simulations.benchmarks.digits_c import source_data, source_model
from fedpeft.tta.deployed import deploy
from fedpeft.tta.play import run_stream
from support import tta_parts as parts


@pytest.fixture(scope="module")
def cnn():
    return source_model("cnn", 1)


def test_the_quick_gates_hold(cnn):
    rows = [*tta_gates.quick_gates(1, cnn), tta_gates.prior_gate(1)]
    assert len(rows) == 5 and not [row for row in rows if not row["holds"]]


def test_source_models_come_from_their_seed():
    one, same, other = (source_model("cnn", seed, epochs=1) for seed in (0, 0, 1))
    assert parts.fingerprint(one) == parts.fingerprint(same) != parts.fingerprint(other)
    with pytest.raises(InputError, match="not known"):
        source_model("resnet")
    labels = torch.bincount(source_data(20.0).labels)
    assert labels[0] > 15 * labels[9] > 0


def test_the_convolution_knows_clean_digits(cnn):
    tail = run_stream("source", build("clean_tail", corruptions=tuple(CORRUPTIONS)[:1]), cnn)
    assert tail["domains"]["clean"] < 0.03 < tail["domains"]["gaussian-5"]


def test_a_transformer_has_no_batch_norm_to_adapt():
    model = source_model("vit", 0, epochs=1)
    stream = build("mixed", limit=60)
    one, two = (run_stream(name, stream, model) for name in ("source", "bn_adapt"))
    assert all(one[key] == two[key] for key in ("error", "nll", "brier", "ece"))
    assert deploy(model) is model and model.head.out_features == 10
