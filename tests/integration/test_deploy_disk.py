"""A disk that fills up under real processes, at either end: a sentence, and with room again the undisturbed result."""

from __future__ import annotations

import contextlib
import shutil
import subprocess

import pytest

from support.deployed import LABELS, STEADY, TRAIN, Deployment, read_results, start_sites, until

SITES = ["site-0", "site-1"]
ROUNDS = 30  # so many that a disk fills up before the last of them
TREE = {**TRAIN, "data": {"labels": LABELS}}
SIZE_MB = 128


@contextlib.contextmanager
def small_disk(folder):
    """A disk of its own for a folder."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE_MB}m", "fedpeft-test", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("this user may mount no disk")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder):
    """Leave no byte free; the file that takes them all."""
    file = folder / "filler"
    with contextlib.suppress(OSError), file.open("wb", buffering=0) as stream:
        while stream.write(bytes(2**20)):
            pass
    with contextlib.suppress(OSError), file.open("ab", buffering=0) as stream:
        while stream.write(b"x"):
            pass
    return file


def log_of(made, what):
    """What it has said, without the line breaks of a terminal."""
    return " ".join(made.log(what).split())


def all_logs(made, run):
    """What coordinator, sites, and the processes below them have said."""
    inside = [*(made.coordinator / "logs").glob("*.log"), made.coordinator / "runs" / run / "log.txt"]
    return "".join(path.read_text(errors="replace") for path in [*made.root.glob("*.log"), *inside] if path.exists())


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("end", ["coordinator", "site-0"])
def test_a_full_disk_pauses_a_run_and_room_lets_it_end_as_if_nothing_had_been(tmp_path, end):
    with small_disk(tmp_path / end) as disk:
        made = Deployment(tmp_path)
        try:
            start_sites(made, SITES)
            options = (*STEADY, f"run.rounds={ROUNDS}", f"privacy.planned_rounds={ROUNDS}")
            undisturbed = made.submit(TREE, *options)
            made.wait(undisturbed, 300)
            run = made.submit(TREE, *options)
            until(lambda: made.rounds(run), "the first round", 120)
            filler = fill(disk)
            if end == "coordinator":
                until(lambda: "its disk is full: make room there" in log_of(made, end), "the sentence", 120)
                path = made.root / "train.yaml"
                said = made.call("server", "run", made.coordinator, path, "--detach", code=1)
                assert "no space left on device; make room on that disk" in said and said.count("\n") == 1
            else:
                until(lambda: any(one["event"] == "round_failed" for one in made.events(run)), "a failed round", 120)
                assert "no space left on device; make room on that disk" in log_of(made, end)
            reached = len(made.rounds(run))
            assert reached < ROUNDS and made.state(run) in ("running", "waiting")
            filler.unlink()
            made.wait(run, 300)
            assert read_results(made, run, SITES) == read_results(made, undisturbed, SITES)
            assert "Traceback" not in all_logs(made, run)
        finally:
            made.close()
