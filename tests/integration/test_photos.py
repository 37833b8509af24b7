"""A run over photos with augmentation: the same adapter alone, in a cohort's processes, with cold and warm cache."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from fedpeft.simulations.run import simulate


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    root, draws = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for number in range(48):
        place = root / "set" / "abc"[number % 3]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draws.integers(0, 256, (8, 8), dtype=np.uint8)).save(place / f"{number}.png")
    return root


def adapter(photos, out, **changes):
    config = {
        "data.source": str(photos / "set"),
        "data.augment": ["crop", "flip"],
        "data.clients": 4,
        "data.partition": "iid",
        "run.rounds": 2,
        "run.baselines": False,
        "client.local_steps": 2,
        "client.local_epochs": None,
        **changes,
    }
    simulate({}, config, out=out)
    return load_file(out / "adapter" / "adapter_model.safetensors")


def test_augmentation_does_not_hang_on_cache_or_processes(photos, tmp_path):
    cache = {"data.cache": str(tmp_path / "cache")}
    alone = {"run.cohort_tokens": 0}  # bits are those of one client after another in every engine
    wanted = adapter(photos, tmp_path / "a", **alone)
    for name, changes in {"cold": cache, "warm": cache, "workers": {**cache, "run.workers": 2}}.items():
        found = adapter(photos, tmp_path / name, **alone, **changes)
        assert all((value == found[key]).all() for key, value in wanted.items()), name
    plain = adapter(photos, tmp_path / "plain", **alone, **{"data.augment": []})
    assert any((value != plain[key]).any() for key, value in wanted.items())
