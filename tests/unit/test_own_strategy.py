"""The strategy of docs/own_strategy.md, installed as a package: what it computes, and that it works like ours."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

import fedpeft
from fedpeft import registry
from fedpeft.cli import catalogue

PAGE = Path(fedpeft.__file__).parents[1] / "docs" / "own_strategy.md"
TINY = {
    **{"run.rounds": 1, "run.baselines": False, "run.clients_per_round": None, "data.clients": 3},
    **{"client.local_epochs": None, "client.local_steps": 2, "client.batch_size": 4},
}


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Both files as the page has them, where Python finds them as pip puts them."""
    text = PAGE.read_text()
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL).group(1)
    project = re.search(r"```toml\n(.*?)```", text, re.DOTALL).group(1)
    ((name, value),) = re.findall(r'^(\w+) = "(partway:\w+)"$', project, re.MULTILINE)
    assert '[project.entry-points."fedpeft.strategies"]' in project
    (tmp_path / "partway.py").write_text(code)
    about = tmp_path / "partway-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: partway\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(f"[fedpeft.strategies]\n{name} = {value}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    registry.entries_of_others.cache_clear()
    registry.table.cache_clear()
    yield name
    sys.modules.pop("partway", None)
    registry.entries_of_others.cache_clear()
    registry.table.cache_clear()


def adapter(folder):
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def test_it_goes_part_of_the_way_from_the_start_to_fedit(package, tmp_path):
    whole = fedpeft.simulate("quickstart", {**TINY, "strategy.name": "fedit"}, out=tmp_path / "fedit")
    for step in (1.0, 0.5):
        keys = {**TINY, "strategy.name": package, "strategy.step": step}
        part = fedpeft.simulate("quickstart", keys, out=tmp_path / f"part-{step}")
        ended, mean = adapter(part.folder), adapter(whole.folder)
        for key in mean:
            if step == 1:
                assert ended[key].equal(mean[key]), key
            elif "lora_B" in key:  # it starts at zero
                assert ended[key].allclose(step * mean[key], rtol=1e-5, atol=1e-8) and mean[key].abs().max() > 1e-4


def test_it_is_listed_shown_and_its_options_are_checked(package, tmp_path):
    assert any(entry["name"] == package for entry in catalogue.entries("strategies")["strategies"])
    with pytest.raises(fedpeft.InputError, match=r"strategy\.step: .*2.*<= 1"):
        fedpeft.simulate("quickstart", {**TINY, "strategy.name": package, "strategy.step": 2.0}, out=tmp_path / "bad")


def test_it_resumes_and_takes_privacy_and_wrappers(package, tmp_path):
    keys = {**TINY, "strategy.name": package, "strategy.weighting": "uniform", "strategy.wrap": ["norm_clip"]}
    private = {"privacy.unit": "sample", "privacy.noise_multiplier": 1.0, "run.rounds": 2}
    result = fedpeft.simulate("quickstart", keys | private, out=tmp_path / "run")
    assert result["epsilon_max"] > 0 and fedpeft.resume(result.folder)["final"] == result["final"]
