"""The README's Python script runs as it stands."""

from __future__ import annotations

import re

from guides import README, blocks


def test_the_script_runs_and_is_short(tmp_path, monkeypatch, capsys):
    scripts = [text for _, text in blocks(README, "python")]
    assert len(scripts) == 1
    lines = [line for line in scripts[0].splitlines() if line.strip()]
    assert len(lines) <= 10
    monkeypatch.chdir(tmp_path)
    space: dict = {}
    exec(compile(scripts[0], "README.md", "exec"), space)
    assert re.search(r"accuracy \d+\.\d% -> \d+\.\d%", capsys.readouterr().out)
    summary = space["summary"]
    assert summary["final"]["accuracy"] > summary["baseline"]["accuracy"]
    assert (tmp_path / "runs" / "script" / "report.html").exists()
    assert any("lora_B" in name and value.abs().sum() > 0 for name, value in space["model"].named_parameters())
