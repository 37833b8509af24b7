"""The privacy calculator on the command line."""

from __future__ import annotations

import json

import pytest


def test_epsilon(fedpeft):
    words = ["privacy", "epsilon", "--sample-rate", "1", "--noise-multiplier", "1", "--steps", "1", "--delta", "1e-5"]
    assert json.loads(fedpeft(*words, "--json").out)["epsilon"] == pytest.approx(4.37718, abs=1e-4)
    plain = fedpeft(*words).out
    assert "4.377" in plain and "Poisson sampling" in plain and "sample level" in plain


def test_noise(fedpeft):
    words = ["privacy", "noise", "--sample-rate", "1", "--epsilon", "4.37718", "--steps", "1", "--delta", "1e-5"]
    assert json.loads(fedpeft(*words, "--json").out)["noise_multiplier"] == pytest.approx(1.0, abs=1e-3)
    assert json.loads(fedpeft(*words, "--accountant", "rdp", "--json").out)["noise_multiplier"] > 1.05


def test_bad_values_end_with_code_2(fedpeft):
    numbers = ["--noise-multiplier", "1", "--steps", "1", "--delta", "1e-5"]
    done = fedpeft("privacy", "epsilon", "--sample-rate", "2", *numbers)
    assert done.code == 2 and "--sample-rate: 2.0 is not allowed; it must be in (0, 1]" in done.err
