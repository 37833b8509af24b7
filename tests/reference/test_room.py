"""What a pass keeps, as it is counted, against what torch allocates at most in a step; and who shares a pass."""

from __future__ import annotations

import functools
import logging

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from fedpeft.clients.cohort import engine, room
from fedpeft.clients.cohort.chunk import Chunk
from fedpeft.clients.train import per_sample_loss
from support import small_models as small
from support.cohort_jobs import AB, ADAMW, ALL, EVEN, make_jobs


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Random models with layers that are wide beside an adapter of rank 1."""

    return functools.cache(lambda kind: small.save_wide(kind, tmp_path_factory.mktemp(kind)))


def allocated(work) -> tuple[int, int]:
    """Bytes that are allocated at most while it works, of those that it allocates; and what is left of them."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    events = [event.nbytes() for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert events
    return int(np.cumsum(events).max()), sum(events)


def step(model, length, trains):
    """A training pass of one drawn record, there and back."""
    trained = model.train_roles(trains)
    batch = room.draw_records(model, small.texts(2, not model.base.objective.headed), length).batch(np.arange(1))
    return lambda: torch.autograd.grad(per_sample_loss(model, *batch).sum(), list(trained.values()))


@pytest.mark.parametrize("length", [32, 128])
@pytest.mark.parametrize(
    ("kind", "model"),
    [
        ("llama", {}),
        ("llama", {"dtype": "bfloat16"}),
        ("bert", {}),
        ("gpt2", {}),
    ],
    ids=["llama", "bfloat16", "bert", "gpt2"],
)
def test_what_is_counted_is_what_a_step_allocates_at_most(wide, kind, model, length):
    """Of models that are wide enough for gradients of the adapter to be next to nothing."""
    made = small.adapted(wide(kind), kind, model, r=1)
    trains = ALL if small.HEADS[kind] else AB
    made.training_mode()
    form = small.texts(2, not small.HEADS[kind])
    counted = room.count_kept(made, form, tuple(trains), length) * length
    work = step(made, length, trains)
    work()  # what is made once, such as tables of positions
    most, left = allocated(lambda: room.count_kept(made, form, tuple(trains), length))
    assert left < most / 100  # what was counted is let go
    assert counted == pytest.approx(allocated(work)[0], rel=0.1)


def test_of_checkpoints_of_gradients_what_is_left_is_counted(wide):
    whole, saving = (small.adapted(wide("llama"), "llama", {"gradient_checkpointing": on}, r=1) for on in (False, True))
    saving.training_mode(), whole.training_mode()
    form = small.texts(2, causal=True)
    less, more = (room.count_kept(model, form, ("A", "B"), 128) for model in (saving, whole))
    work = step(saving, 128, AB)
    work()
    assert less < 0.5 * more
    assert 0.4 < 128 * less / allocated(work)[0] < 1  # without what a block is given, and computes anew


def test_counting_draws_nothing_and_leaves_what_trains(build):
    model = build("bert")
    model.train_roles(["A"])
    before = torch.get_rng_state()
    assert room.count_kept(model, small.texts(2), ("B", "head"), 7) > 0
    assert torch.equal(torch.get_rng_state(), before)
    assert {key.rpartition("/")[2] for key, value in model.parameters.items() if value.requires_grad} == {"A"}


def test_tokens_are_as_many_as_there_is_room_for(build, monkeypatch):
    model = build("llama")
    kept = room.count_kept(model, small.texts(2, causal=True), ("A", "B"), 7)
    found = {}
    for tokens in (0.4, 1, 100, 128, 5000):
        monkeypatch.setitem(room.ROOM, "cpu", tokens * kept * 1.001)
        found[tokens] = room.shared_tokens(model, small.texts(2, causal=True), ("A", "B"), 7)
    assert found == {0.4: 1, 1: 1, 100: 64, 128: 128, 5000: 2048}


@pytest.mark.parametrize("kind", ["bert", "llama", "vit"])
def test_small_models_share_as_many_tokens_as_ever(build, kind):
    model = build(kind)
    like = make_jobs(model, (2,), kind)[0].data
    assert room.shared_tokens(model, like, tuple(ALL if small.HEADS[kind] else AB), 7) == 2048


def test_where_there_is_little_room_each_client_has_a_chunk_of_its_own(build, monkeypatch):
    model = build("llama")
    jobs, chunks = make_jobs(model, EVEN, "llama"), []

    class Seen(Chunk):
        def __init__(self, model, jobs, trains, config, tokens, now):
            chunks.append((len(jobs), tokens))
            super().__init__(model, jobs, trains, config, tokens, now)

    monkeypatch.setattr(engine, "Chunk", Seen)
    together = engine.train_cohort(model, jobs, AB, ADAMW)
    assert chunks == [(4, 2048)]
    chunks.clear()
    monkeypatch.setitem(room.ROOM, "cpu", 1)
    alone = engine.train_cohort(model, jobs, AB, ADAMW)
    assert chunks == [(1, 2048)] * 4  # and none is cut where it would not be alone
    for one, other in zip(together, alone, strict=True):
        assert all(torch.allclose(one.after[key], other.after[key], rtol=0, atol=1e-12) for key in one.after)
        assert any(not torch.equal(value, jobs[0].start[key].to(value)) for key, value in one.after.items())


def test_what_cannot_be_counted_is_said_and_has_as_many_tokens_as_ever(build, monkeypatch, caplog):
    model = build("llama")

    def refuse(*_):
        raise RuntimeError("no drawn inputs here")

    model.kept.clear()
    monkeypatch.setattr(room, "count_kept", refuse)
    with caplog.at_level(logging.WARNING, "fedpeft"):
        for _ in range(2):
            assert room.shared_tokens(model, small.texts(2, causal=True), ("A", "B"), 7) == 2048
    assert caplog.text.count("a pass has up to 2048 tokens, as what it keeps cannot be counted: no drawn inputs") == 1
    model.kept.clear()
