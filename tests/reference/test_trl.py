"""Tokens, masks, losses and gradients of conversations are TRL's, whose own are in `trl.json` (`support.trl_runs`).

What differs by intent, and so is not in there: TRL has no other way to find the assistant's turns of a conversation
than marks in the template, so it is given ours with these. Its own marked template for Qwen 2.5 has the line break
behind the assistant's name in what is learned, which the model is given when it has to answer: TRL leaves it out as
well where an answer stands in a column of its own, and so do we. It writes plain strings of prompt and completion one
behind the other, where our plain template puts a line break between them. Cut at the start, a row of ours keeps the
mark of its beginning.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fedpeft import config as configs
from fedpeft.adapters.adapted import build as build_adapted
from fedpeft.clients.train import count_targets, per_sample_loss
from fedpeft.data import source
from fedpeft.data.encode import encode
from fedpeft.objectives.base import IGNORE
from fedpeft.objectives.preference import unfold_pairs
from support import chat
from support.trl_talks import ALPHA, BETA, FORMS, RANK, TARGETS, make_model, norms_of, rows_of, set_factors

SAID = json.loads(Path(__file__).with_name("trl.json").read_text(encoding="utf-8"))
KINDS = list(SAID["kinds"])


def settings(folder, form):
    task, options = ("preference", {"beta": BETA}) if form == "preference" else ("causal-lm", {})
    return configs.load(
        {
            "model": {"name": str(folder), "task": task, "task_options": options, "max_length": 256},
            "adapter": {"r": RANK, "alpha": ALPHA, "dropout": 0.0, "target_modules": TARGETS},
            "data": {"source": str(folder / "talks.jsonl")},
        }
    )


def read(kind, form, folder):
    """Our tokens of the records, and the config."""
    folder.mkdir(exist_ok=True)
    (folder / "talks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_of(kind, form)))
    config = settings(folder, form)
    records = source.whole(str(folder / "talks.jsonl"), "data.source", config.data, config.model.task)
    return encode(records, chat.fixed_tokenizer(kind, SAID["merges"]), config.model.task, 256), config


def rows(data, form):
    """As `support.trl_runs` has them."""
    made = []
    for place in range(len(data)):
        inputs, labels = data.batch(np.array([place]))
        if form == "preference":
            sides, answers = unfold_pairs(inputs)
            pairs = zip(sides["input_ids"], sides["attention_mask"], answers, strict=True)
            made.append([[ids[mask == 1].tolist(), _as_text(learned[mask == 1])] for ids, mask, learned in pairs])
        else:
            made.append([inputs["input_ids"][0].tolist(), _as_text(labels[0] != IGNORE)])
    return made


def _as_text(mask):
    return "".join(map(str, mask.int().tolist()))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_and_masks_are_trls(kind, form, tmp_path):
    data, _ = read(kind, form, tmp_path)
    assert rows(data, form) == SAID["kinds"][kind][form]["rows"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_are_trls(kind, form, tmp_path):
    """Of one batch of all, by tokens as TRL weighs them, and of pairs as a mean. TRL takes them in float32."""
    data, config = read(kind, form, tmp_path)
    make_model(kind, SAID["merges"]).float().save_pretrained(tmp_path)
    chat.fixed_tokenizer(kind, SAID["merges"]).save_pretrained(tmp_path)
    model = build_adapted(config.model, config.adapter, 0, 0)
    model.base.backbone.double().eval()
    inputs, labels = data.batch(np.arange(len(data)))
    if form == "preference":
        with torch.no_grad():  # the reference is the model before it was trained, whose B is zero
            labels = model.logits(inputs)
    factors = set_factors(model.base.backbone)
    for factor in factors:
        factor.requires_grad_()
    losses = per_sample_loss(model, inputs, labels)
    weights = torch.ones_like(losses) if form == "preference" else count_targets(model, labels)
    loss = (losses * weights).sum() / weights.sum()
    said = SAID["kinds"][kind][form]
    assert loss.dtype == torch.float64 and loss.item() == pytest.approx(said["loss"], rel=3e-6)
    assert norms_of(loss, factors) == pytest.approx(said["norms"], rel=3e-5)
    by_record = losses.mean().item()
    assert form == "preference" or abs(by_record - said["loss"]) > 1e-3  # which way is weighed is seen


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_trl_still_says_so(kind, form):
    """With `pip install --no-deps trl`; another version may say something else, and that is then to be looked at."""
    pytest.importorskip("trl")
    from support.trl_runs import ask_trl

    found, said = ask_trl(kind, form, SAID["merges"]), SAID["kinds"][kind][form]
    assert found["rows"] == said["rows"]
    assert found["loss"] == pytest.approx(said["loss"], rel=3e-6)
    assert found["norms"] == pytest.approx(said["norms"], rel=3e-5)
