"""The local step loop against slow obvious loops; losses and scores by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft import seeds
from fedpeft.clients import train as training
from fedpeft.clients.cohort.chunk import Job
from fedpeft.clients.cohort.engine import train_cohort
from fedpeft.clients.train import evaluate, index_batches, on_device, per_sample_loss, train
from fedpeft.config import ClientConfig
from fedpeft.data.encode import Encoded
from fedpeft.errors import RunError
from fedpeft.objectives.base import IGNORE
from support import small_models as small

CPU = torch.device("cpu")
SGD = ClientConfig(optimizer="sgd", lr=0.1, local_steps=5, local_epochs=None, batch_size=4)
ADAMW = replace(SGD, optimizer="adamw", lr=0.01)
ROLES = ["A", "B", "head"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {name: small.save(name, root / name) for name in ("bert", "llama")}


@pytest.fixture(scope="module")
def bert(folders):
    """Read-only but for its adapter and head, which every test writes first."""
    return small.adapted(folders["bert"], "bert")


@pytest.fixture(scope="module")
def llama(folders):
    return small.adapted(folders["llama"], "llama")


@pytest.fixture
def model(bert):
    bert.write(small.randomised(bert))
    return bert


# Batches --------------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(count=st.integers(1, 40), size=st.integers(1, 50), epochs=st.integers(1, 4), seed=st.integers(0, 9))
def test_every_epoch_sees_every_record_once(count, size, epochs, seed):
    config = ClientConfig(local_epochs=epochs, batch_size=size)
    made = list(index_batches(count, config, np.random.default_rng(seed)))
    everything = np.concatenate(made)
    assert len(everything) == epochs * count
    for epoch in range(epochs):
        assert sorted(everything[epoch * count : (epoch + 1) * count]) == list(range(count))
    full = min(size, count)
    assert {len(batch) for batch in made} <= {full, count % full or full}


@settings(deadline=None, max_examples=40)
@given(count=st.integers(1, 40), size=st.integers(1, 50), steps=st.integers(1, 30))
def test_local_steps_are_exact(count, size, steps):
    config = ClientConfig(local_steps=steps, local_epochs=None, batch_size=size)
    made = list(index_batches(count, config, np.random.default_rng(0)))
    assert len(made) == steps
    everything = np.concatenate(made)
    for start in range(0, len(everything), count):  # passes, the last one cut short
        part = everything[start : start + count]
        assert len(set(part)) == len(part)


def test_batches_are_shuffled_anew_each_epoch():
    config = ClientConfig(local_epochs=3, batch_size=20)
    epochs = [tuple(batch) for batch in index_batches(20, config, np.random.default_rng(0))]
    assert len(set(epochs)) == 3 and tuple(range(20)) not in epochs


# Steps ----------------------------------------------------------------------------------------------------------------


def slow_loop(model, data, start, config, seed, roles=ROLES, mu=0.0, control=None):
    """One record at a time, gradients averaged by hand, the optimizer's rule written out; the end values in float64."""
    theta = {key: start[key].double().clone() for key in model.form.select(roles).tensors}
    first = {key: value.clone() for key, value in theta.items()}
    moment = {key: torch.zeros_like(value) for key, value in theta.items()}
    square = {key: torch.zeros_like(value) for key, value in theta.items()}
    losses = []
    rng = seeds.numpy_generator(seed, "batches")
    for step, index in enumerate(index_batches(len(data), config, rng), start=1):
        gradient = {key: torch.zeros_like(value) for key, value in theta.items()}
        for record in index:
            model.write(start.replace({key: value.float() for key, value in theta.items()}))
            trained = model.train_roles(roles)
            inputs, label = data.batch(np.array([record]))
            scores = model.logits(inputs)[0]
            loss = -torch.log_softmax(scores, 0)[label[0]]
            for key, value in zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True):
                gradient[key] += value.double() / len(index)
            losses.append(float(loss) / len(index))
        for key in theta:
            g = gradient[key] + mu * (theta[key] - first[key]) + (0 if control is None else control[key].double())
            gradient[key] = g
        if config.max_grad_norm is not None:
            norm = sum(float(g.square().sum()) for g in gradient.values()) ** 0.5
            gradient = {key: g * min(1.0, config.max_grad_norm / norm) for key, g in gradient.items()}
        for key, g in gradient.items():
            if config.optimizer == "sgd":
                g = g + config.weight_decay * theta[key]
                moment[key] = config.momentum * moment[key] + g
                theta[key] = theta[key] - config.lr * moment[key]
            else:
                theta[key] = theta[key] * (1 - config.lr * config.weight_decay)
                moment[key] = 0.9 * moment[key] + 0.1 * g
                square[key] = 0.999 * square[key] + 0.001 * g * g
                mean, variance = moment[key] / (1 - 0.9**step), square[key] / (1 - 0.999**step)
                theta[key] = theta[key] - config.lr * mean / (variance.sqrt() + 1e-8)
    return theta, sum(losses) / step


@pytest.fixture
def still(model, monkeypatch):
    """No dropout: one record at a time would draw other masks."""
    for module in model.base.backbone.modules():
        if isinstance(module, torch.nn.Dropout):
            monkeypatch.setattr(module, "p", 0.0)


@pytest.mark.parametrize(
    "config",
    [
        SGD,
        replace(SGD, momentum=0.9, weight_decay=0.1),
        replace(SGD, max_grad_norm=0.05),
        replace(SGD, local_steps=None, local_epochs=2),
        ADAMW,
        replace(ADAMW, weight_decay=0.1),
    ],
    ids=["sgd", "momentum", "clipped", "epochs", "adamw", "adamw decay"],
)
def test_training_is_the_slow_loop(model, still, config):
    check_against_slow_loop(model, config)


@pytest.mark.parametrize("mu", [0.5, 5.0])
def test_the_proximal_term(model, still, mu):
    check_against_slow_loop(model, SGD, mu=mu)


@pytest.mark.parametrize("config", [SGD, ADAMW])
def test_the_scaffold_correction(model, still, config):
    check_against_slow_loop(model, config, control=small.offsets(model))


def test_proximal_term_and_correction_together(model, still):
    check_against_slow_loop(model, SGD, mu=1.0, control=small.offsets(model))


@pytest.mark.parametrize("roles", [["B"], ["A"], ["B", "head"]])
def test_only_the_asked_roles_train(model, still, roles):
    start = model.state()
    check_against_slow_loop(model, SGD, roles=roles)
    end = model.state()
    moved = {key for key in start.tensors if not torch.equal(start[key], end[key])}
    assert moved == set(start.select(roles).tensors)


def check_against_slow_loop(model, config, roles=ROLES, mu=0.0, control=None):
    data, start = small.texts(), model.state()
    expected, mean_loss = slow_loop(model, data, start, config, 7, roles, mu, control)
    model.write(start)
    own = None if control is None else {key: control[key] for key in start.select(roles).tensors}
    steps, loss = train(model, data, roles, config, 7, proximal=mu, offset=own)
    assert steps == (config.local_steps or 3 * config.local_epochs)
    assert loss == pytest.approx(mean_loss, rel=1e-4)
    end = model.state()
    # AdamW divides by the root of a gradient's square: where that is rounding noise, so is the step.
    tolerance = 1e-5 if config.optimizer == "sgd" else 1e-3
    for key, value in expected.items():
        torch.testing.assert_close(end[key].double(), value, atol=tolerance, rtol=1e-3, msg=key)
    assert end.distance(start) > 100 * tolerance


def test_the_proximal_term_holds_back(model):
    start = model.state()
    moved = []
    for mu in (0.0, 3.0):
        model.write(start)
        train(model, small.texts(), ROLES, SGD, 7, proximal=mu)
        moved.append(model.state().distance(start))
    assert moved[1] < 0.9 * moved[0]


def test_a_seed_gives_one_result_dropout_included(model):
    start, ends = model.state(), []
    for seed, noise in ((7, 1), (7, 2), (8, 1)):
        model.write(start)
        torch.manual_seed(noise)
        before = torch.get_rng_state()
        train(model, small.texts(), ROLES, SGD, seed)
        assert torch.equal(before, torch.get_rng_state())
        ends.append(model.state())
    assert ends[0].sha256() == ends[1].sha256() != ends[2].sha256()
    assert not model.base.backbone.training


def test_a_smaller_clients_control_is_padded(model, still):
    """A client of rank 2 gets a correction of rank 2; the rows that it does not have stay zero."""
    state = model.state()
    narrow = {
        key: value[:2] if key.endswith("/A") else value[:, :2] if key.endswith("/B") else value
        for key, value in state.tensors.items()
    }
    start = replace(state, tensors=narrow)
    model.write(start)
    control = {key: torch.full_like(value, 0.1) for key, value in narrow.items()}
    train(model, small.texts(), ROLES, SGD, 7, offset=control)
    for site in state.lora_sites():
        assert torch.count_nonzero(model.parameters[f"{site}/A"][2:]) == 0
        assert torch.count_nonzero(model.parameters[f"{site}/B"][:, 2:]) == 0
        assert not torch.equal(model.parameters[f"{site}/A"][:2], start[f"{site}/A"])


# Losses and scores ----------------------------------------------------------------------------------------------------


def test_a_texts_loss_is_the_mean_over_its_own_tokens(llama):
    data = small.texts(6, causal=True)
    losses = per_sample_loss(llama, *on_device(data, np.arange(6), CPU))
    for index in range(6):
        ids = [int(token) for token in data.inputs["input_ids"][index] if token != 0]
        length = len(ids)
        scores = llama.logits(
            {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, length, dtype=torch.long)}
        )[0]
        each = [-torch.log_softmax(scores[place].double(), 0)[ids[place + 1]] for place in range(length - 1)]
        assert float(losses[index]) == pytest.approx(float(sum(each)) / (length - 1), rel=1e-5)


def test_a_training_step_makes_no_predictions(llama, monkeypatch):
    """The largest of the whole vocabulary at every token is sought where it is asked for, in `evaluate`."""

    def asked(*arguments):
        raise LookupError

    monkeypatch.setattr(torch.Tensor, "argmax", asked)
    data = small.texts(4, causal=True)
    train(llama, data, ["A", "B"], replace(SGD, local_steps=1), 0)
    with pytest.raises(LookupError):
        evaluate(llama, data)


def test_a_texts_loss_does_not_depend_on_its_batch(llama):
    data = small.texts(6, causal=True)
    assert len(set(data.inputs["attention_mask"].sum(1).tolist())) > 2
    together = per_sample_loss(llama, *on_device(data, np.arange(6), CPU))
    for index in range(6):
        alone = per_sample_loss(llama, *on_device(data, np.array([index]), CPU))
        torch.testing.assert_close(alone[0], together[index], atol=1e-5, rtol=1e-5)


def test_evaluate_a_classifier_by_hand(model):
    data = small.texts(10)
    scores = [model.logits(data.batch(np.array([index]))[0])[0].double() for index in range(10)]
    loss = sum(float(-torch.log_softmax(row, 0)[data.labels[index]]) for index, row in enumerate(scores)) / 10
    accuracy = sum(int(row.argmax()) == int(data.labels[index]) for index, row in enumerate(scores)) / 10
    assert 0 < accuracy < 1
    for size in (3, 10, 256):
        result = evaluate(model, data, batch_size=size)
        assert result["num-examples"] == 10
        assert result["accuracy"] == pytest.approx(accuracy)
        assert result["loss"] == pytest.approx(loss, rel=1e-5)


def test_evaluate_a_language_model_by_hand(llama):
    """The accuracy is over all predicted tokens, the loss the mean over texts."""
    data = small.texts(10, causal=True)
    losses = per_sample_loss(llama, *on_device(data, np.arange(10), CPU))
    guesses, labels = guessed(llama, data).labels, data.labels  # IGNORE at the first token and the padding
    right, made = int((guesses == labels)[guesses != IGNORE].sum()), int((labels[:, 1:] != IGNORE).sum())
    result = evaluate(llama, data, batch_size=4)
    assert made == int(data.inputs["attention_mask"].sum()) - 10
    assert result["accuracy"] == pytest.approx(right / made)
    assert result["loss"] == pytest.approx(float(losses.mean()), rel=1e-5)
    assert evaluate(llama, guessed(llama, data))["accuracy"] == 1.0
    half = guessed(llama, data)
    half.labels[:5] = data.labels[:5]
    some = int((guesses == labels)[:5][guesses[:5] != IGNORE].sum()) + int((guesses[5:] != IGNORE).sum())
    assert 0 < some < made and evaluate(llama, half, batch_size=3)["accuracy"] == pytest.approx(some / made)


@pytest.mark.parametrize(("tokens", "words"), [(1, None), (9, None), (40, None), (2**15, 3)])
def test_an_evaluation_is_cut_by_tokens_and_by_scores_and_counts_the_same(llama, monkeypatch, tokens, words):
    """No pass has more tokens than asked for, but for one record; nor more scores than allowed."""
    data = small.texts(10, causal=True)
    wanted, shapes, forward = evaluate(llama, data), [], llama.base.forward
    if words is not None:
        monkeypatch.setattr(training, "SCORES", words * llama.base.backbone.get_input_embeddings().num_embeddings)

    def watched(inputs):
        shapes.append(tuple(inputs["input_ids"].shape))
        return forward(inputs)

    monkeypatch.setattr(llama.base, "forward", watched)
    found = evaluate(llama, data, tokens=tokens)
    assert sum(rows for rows, _ in shapes) == 10 and len(shapes) > 1
    assert all(rows == 1 or rows * width <= (words or tokens) for rows, width in shapes)
    assert found["num-examples"] == 10 and found["accuracy"] == wanted["accuracy"]
    assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-5)


def test_texts_with_nothing_to_predict_do_not_count(llama):
    data = small.texts(6, causal=True)
    wanted = evaluate(llama, data)
    silent = torch.full_like(data.labels[:4], IGNORE)
    silent[:, 0] = data.labels[:4, 0]  # a first token has nothing before it
    for order in (np.arange(10), np.arange(9, -1, -1)):
        both = Encoded(
            {name: torch.cat([value, value[:4]]) for name, value in data.inputs.items()},
            torch.cat([data.labels, silent]),
        ).view(order)
        found = evaluate(llama, both, batch_size=4)
        assert found["num-examples"] == 6 and found["accuracy"] == wanted["accuracy"]
        assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-5)
    nothing = evaluate(llama, Encoded({name: value[:4] for name, value in data.inputs.items()}, silent))
    assert nothing["num-examples"] == 0 and np.isnan(nothing["loss"]) and np.isnan(nothing["accuracy"])


@pytest.mark.parametrize(("silent", "first"), [([3], 1), ([0, 5, 9], 0), ([1, 2, 4, 6, 7, 8, 9], 1)])
def test_texts_with_nothing_to_predict_are_left_out_of_training_by_both_engines(llama, silent, first, caplog):
    """They are not records of loss zero, that a mean would be divided by; a first token is never predicted."""
    data, start = small.texts(10, causal=True), small.randomised(llama)
    whole = Encoded(data.inputs, data.labels.clone())
    whole.labels[silent, first:] = IGNORE
    part = whole.view(np.setdiff1d(np.arange(10), silent))
    found = []
    for records in (whole, part):
        llama.write(start)
        steps, loss = train(llama, records, ["A", "B"], SGD, 7)
        alone = llama.state().tensors
        done = train_cohort(llama, [Job(start.tensors, records, 7)], ["A", "B"], SGD, 4096)[0]
        assert done.steps == steps == 5 and done.loss == pytest.approx(loss, rel=1e-4)
        for key, value in done.after.items():
            assert torch.allclose(value, alone[key], atol=1e-5), key
        found.append((alone, done.after, loss))
    assert found[0][2] == found[1][2] and all(
        torch.equal(value, other[key])
        for one, other in zip(found[0][:2], found[1][:2], strict=True)
        for key, value in one.items()
    )
    assert caplog.text.count(f"{len(silent)} of 10 texts have nothing to predict and are left out") == 2
    nothing = Encoded(data.inputs, torch.full_like(data.labels, IGNORE))
    for run in (
        lambda: train(llama, nothing, ["A", "B"], SGD, 7),
        lambda: train_cohort(llama, [Job(start.tensors, nothing, 7)], ["A", "B"], SGD, 4096),
    ):
        with pytest.raises(RunError, match="none of 10 texts has a token to predict"):
            run()


def guessed(model, data):
    """The same texts with the model's own guesses as labels."""
    labels = torch.full_like(data.labels, IGNORE)
    labels[:, 1:] = model.logits(data.inputs).argmax(-1)[:, :-1].masked_fill(data.labels[:, 1:] == IGNORE, IGNORE)
    return Encoded(data.inputs, labels)


def test_evaluation_has_no_dropout(model):
    model.base.backbone.train()
    assert len({evaluate(model, small.texts())["loss"] for _ in range(3)}) == 1
    assert not model.base.backbone.training


def test_batch_norms_of_the_base_do_not_remember_a_client(model):
    """Their running statistics are part of the frozen base that all clients share; dropout is on all the same."""
    norm, dropout = torch.nn.BatchNorm1d(4), torch.nn.Dropout(0.5)
    model.base.backbone.added = torch.nn.ModuleList([norm, dropout])
    modes = []

    def look(*_):
        modes.append((norm.training, dropout.training))
        norm(torch.randn(8, 4) + 3)

    hook = model.base.backbone.register_forward_pre_hook(look)
    try:
        train(model, small.texts(), ["A", "B"], ClientConfig(local_epochs=None, local_steps=2), seed=0)
    finally:
        hook.remove()
        del model.base.backbone.added
    assert modes == [(False, True)] * 2
    assert not norm.running_mean.any() and norm.num_batches_tracked == 0
