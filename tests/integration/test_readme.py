"""The README's Python script runs as it stands, on a reader's own model and records."""

from __future__ import annotations

import re
import warnings

from safetensors.torch import load_file

from support.guides import README, at_hand, blocks


def test_the_script_runs_and_is_short(tmp_path, monkeypatch, capsys):
    scripts = [text for _, text in blocks(README, "python")]
    assert len(scripts) == 1
    lines = [line for line in scripts[0].splitlines() if line.strip()]
    assert len(lines) <= 10
    at_hand(tmp_path)
    monkeypatch.chdir(tmp_path)
    space: dict = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Found missing adapter keys")  # peft's word for an adapter that loads nowhere
        exec(compile(scripts[0], "README.md", "exec"), space)
    summary, model = space["summary"], space["model"]
    said = re.search(r"Accuracy (\d+\.\d) % ± \d+\.\d", capsys.readouterr().out)
    assert float(said[1]) == round(100 * summary["final"]["accuracy"], 1)
    assert summary["final"]["accuracy"] > summary["baseline"]["accuracy"] + 0.1
    assert set(summary["owner"].values()) == {"north", "south", "west"}
    assert (tmp_path / "runs" / "notes" / "report.html").exists()
    assert any("lora_B" in name and value.abs().sum() > 0 for name, value in model.named_parameters())
    head = load_file(tmp_path / "runs" / "notes" / "adapter" / "head.safetensors")
    loaded = model.base_model.model.classifier.modules_to_save["default"].state_dict()
    assert all((loaded[name.removeprefix("classifier.")] == value).all() for name, value in head.items())
