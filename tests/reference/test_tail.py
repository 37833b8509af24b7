"""The last block for the first token only: found where it may be, and the same logits, gradients and training."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from fedpeft.adapters.tail import find_tail, first_token
from fedpeft.clients.cohort.engine import train_cohort
from fedpeft.clients.train import evaluate, per_sample_loss
from fedpeft.data.encode import Encoded
from fedpeft.models.base import Base
from support import small_models as small
from support.cohort_jobs import ADAMW, WIDE, make_jobs, one_by_one, private
from support.per_sample import records

BERT = [
    *(f"attention.output.{name}" for name in ("dense", "LayerNorm")),
    "intermediate.dense",
    *(f"output.{name}" for name in ("dense", "LayerNorm")),
]
TAILS = {
    "bert": [f"bert.encoder.layer.1.{name}" for name in BERT],
    "roberta": [f"roberta.encoder.layer.1.{name}" for name in BERT],
    "distilbert": [
        f"distilbert.transformer.layer.1.{name}"
        for name in ("attention.out_lin", "sa_layer_norm", "ffn.lin1", "ffn.lin2", "output_layer_norm")
    ],
    "vit": [
        *(f"vit.layers.1.{name}" for name in ("attention.o_proj", "layernorm_after", "mlp.fc1", "mlp.fc2")),
        "vit.layernorm",
    ],
}
LINEAR = {
    "bert": ["dense", "key", "query", "value"],
    "roberta": ["dense", "key", "query", "value"],
    "distilbert": ["k_lin", "lin1", "lin2", "out_lin", "q_lin", "v_lin"],
    "vit": ["fc1", "fc2", "k_proj", "o_proj", "q_proj", "v_proj"],
}
ALL = ["A", "B", "head"]


def named(model, found):
    names = {module: name for name, module in model.base.backbone.named_modules()}
    return sorted(names[module] for module in found)


def gradients(model, data):
    parameters = model.train_roles(ALL)
    losses = per_sample_loss(model, *data.batch(np.arange(len(data))))
    return losses.detach(), torch.autograd.grad(losses.sum(), list(parameters.values()))


def whole(model):
    """Let the model run with all tokens."""
    model.tail = []


@pytest.mark.parametrize("kind", list(TAILS))
def test_last_block_is_found(build, kind):
    model = build(kind)
    assert named(model, find_tail(model, records(kind))) == sorted(TAILS[kind])


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_language_models_read_every_token(build, kind):
    assert find_tail(build(kind), records(kind)) == []


def test_mean_pooling_reads_every_token(tmp_path):
    model = small.adapted(small.save("bert", tmp_path, whole=False), "bert", model={"pooling": "mean"})
    assert find_tail(model, records("bert")) == []


@pytest.mark.parametrize(
    "read",
    [
        lambda hidden: hidden[:, 0] + hidden[:, -1],
        lambda hidden: hidden[:, -1],
        lambda hidden: hidden[:, 1],
        lambda hidden: hidden[:, ::6].mean(1),
    ],
    ids=["both", "last", "second", "strided"],
)
def test_a_head_that_reads_another_token_leaves_the_block_alone(folder, read):
    model = small.adapted(folder("bert"), "bert", r=4)
    inner, head = model.base.backbone.bert, model.base.heads["classifier"]
    model.base = Base(
        model.base.backbone,
        lambda batch: head(read(inner(**batch).last_hidden_state)),
        {"classifier": head},
        None,
        "",
        small.TEXT,
    )
    assert find_tail(model, records("bert")) == []


def test_a_model_that_refuses_random_texts_stays_whole_and_says_so(folder, caplog):
    model = small.adapted(folder("bert"), "bert", r=4)
    forward = model.base.forward

    def strict(batch):
        if not bool((batch["input_ids"][:, 0] == 2).all()):
            raise ValueError("every text has to begin with the start token")
        return forward(batch)

    model.base.forward = strict
    assert find_tail(model, records("bert")) == []
    assert "all tokens" in caplog.text and "start token" in caplog.text
    assert not any(module._forward_pre_hooks for module in model.base.backbone.bert.modules())


def test_a_layer_that_wants_all_tokens_is_left_alone(folder):
    """What would not run with one token, or would say something else, is not cut."""

    class Centred(nn.Linear):
        def forward(self, x):
            return super().forward(x - x.detach().mean(1, keepdim=True))  # its gradient hides that it reads them all

    class Seven(nn.Linear):
        def forward(self, x):
            return super().forward(x.view(2, 7, -1))

    for kind in (Centred, Seven):
        model = small.adapted(folder("bert"), "bert", r=4)
        block = model.base.backbone.bert.encoder.layer[1]
        block.intermediate.dense.__class__ = kind
        assert block.intermediate.dense not in find_tail(model, records("bert"))


@pytest.mark.parametrize("kind", list(TAILS))
@pytest.mark.parametrize("targets", [{}, LINEAR], ids=["attention", "linear"])
def test_losses_and_gradients_are_the_same(folder, kind, targets):
    """Also where the layers that are cut have adapters themselves; padded texts of unequal length."""
    model = small.adapted(folder(kind), kind, r=2, target_modules=targets.get(kind))
    for module in model.base.modules:
        module.double()
    model.write(small.randomised(model, scale=0.3))
    data = records(kind)
    losses, wanted = gradients(model, data)
    shapes = []
    last = find_tail(model, data)[-1]
    with first_token(model, data):
        hook = last.register_forward_hook(lambda _, args, __: shapes.append(args[0].shape[1]))
        again, mine = gradients(model, data)
        hook.remove()
    assert shapes == [1]
    assert float((again - losses).abs().max()) < 1e-12
    assert max(float((one - two).abs().max()) for one, two in zip(mine, wanted, strict=True)) < 1e-12
    assert min(float(one.abs().max()) for one in wanted) > 1e-6


@pytest.mark.parametrize("kind", list(TAILS))
@pytest.mark.parametrize("noisy", [False, True])
def test_training_is_the_same(folder, kind, noisy):
    """A cohort and one client after another, with the last block whole and cut."""
    model = small.adapted(folder(kind), kind, r=4, target_modules=LINEAR[kind])
    for module in model.base.modules:
        module.double()
    model.training_mode = lambda: None

    def jobs():
        made = make_jobs(model, (5, 3), kind)
        for k, job in enumerate(made):
            job.private = private(1.0, 0.5, k) if noisy else None
        return made

    def cohort():
        return [done.after for done in train_cohort(model, jobs(), ALL, ADAMW, WIDE)]

    cut = cohort()
    assert model.tail
    alone = [after for after, *_ in one_by_one(model, jobs(), ALL, ADAMW)]
    whole(model)
    full, full_alone = cohort(), [after for after, *_ in one_by_one(model, jobs(), ALL, ADAMW)]
    for ends in (cut, alone, full):
        for mine, wanted in zip(ends, full_alone, strict=True):
            assert max(float((mine[key] - value).abs().max()) for key, value in wanted.items()) < 1e-10


@pytest.mark.parametrize("kind", list(small.KINDS))
def test_scores_are_the_same(build, kind):
    model, data = build(kind), records(kind, 20)
    model.tail = None
    cut, tail = evaluate(model, data), model.tail
    whole(model)
    full = evaluate(model, data)
    model.tail = None
    assert bool(tail) == (kind in TAILS)
    assert cut["accuracy"] == full["accuracy"] and abs(cut["loss"] - full["loss"]) < 1e-12


def test_model_stays_what_it_is(folder):
    """Hooks go, also after an error; the modes of the modules and the parameters' gradients stay; no record is read."""
    model = small.adapted(folder("bert"), "bert", r=4)
    model.training_mode()
    modes = [module.training for module in model.base.backbone.modules()]
    assert any(modes)
    needs = {key: value.requires_grad for key, value in model.parameters.items()}
    unreadable = Encoded(
        {"input_ids": torch.full((3, 7), -99), "attention_mask": torch.zeros(3, 7, dtype=torch.long)},
        torch.zeros(3, dtype=torch.long),
    )
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="stop"), first_token(model, unreadable):
        assert model.tail
        raise RuntimeError("stop")
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.base.backbone.modules()] == modes
    assert {key: value.requires_grad for key, value in model.parameters.items()} == needs
    assert all(value.grad is None for value in model.parameters.values())
    assert not any(
        module._forward_pre_hooks
        for root in model.base.modules
        for name, module in root.named_modules()
        if module is not model.base.head
    )


def test_private_gradients_are_verified_on_the_model_that_trains(tiny, monkeypatch):
    """Before the first private step, with the last block cut as it is in training."""
    from fedpeft.clients import inputs as client_inputs

    real, cut = client_inputs.verify, []

    def watched(modules, *given):
        last = modules[0].vit.layers[-1].mlp.fc1
        hook = last.register_forward_hook(lambda module, args, output: cut.append(output.shape[1]))
        real(modules, *given)
        hook.remove()

    monkeypatch.setattr(client_inputs, "verify", watched)
    tiny(
        config={
            "privacy.unit": "sample",
            "privacy.noise_multiplier": 1.0,
            "strategy.weighting": "uniform",
            "data.limit": 200,
            "run.rounds": 1,
        }
    )
    assert cut and set(cut) == {1}
