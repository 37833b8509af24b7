"""DEPLOY.md: every command in it is run, as it stands, in its order, and prints what the guide says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from support.deployed import free_ports
from support.guides import DEPLOY, foretold, masked, script


@pytest.mark.slow  # test_guides looks at each command's arguments and config, test_deploy starts processes
@pytest.mark.timeout(600)
def test_a_stranger_can_follow_the_guide(tmp_path):
    text = script(DEPLOY)
    assert text.count("fedpeft ") > 15
    for fixed, free in zip(("9092", "9093"), free_ports(2), strict=True):
        text = text.replace(fixed, str(free))
    (tmp_path / "guide.sh").write_text("trap 'kill $(jobs -p) 2>/dev/null || true' EXIT\n" + text)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-eu", "-o", "pipefail", "guide.sh"],
        cwd=tmp_path,
        timeout=580,
        text=True,
        capture_output=True,
        env={**os.environ, "PATH": path, "COLUMNS": "200"},
    )
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    printed = {*masked(done.stdout), *masked(done.stderr)}
    assert len(foretold(DEPLOY)) > 60 and not [line for line in foretold(DEPLOY) if line not in printed]
    assert re.search(r"round 5 of 5", done.stdout) and "north, south" in done.stdout
    assert (tmp_path / "result" / "adapter" / "adapter_model.safetensors").is_file()
    spent = float(re.search(r"north\W+(\d[\d.]*)", done.stdout).group(1))
    assert 2 < spent <= 3  # all that its policy allows
