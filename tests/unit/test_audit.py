"""The audit passes on the real code and catches each seeded fault, by the check that is there for it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import small_models as small
import torch

from fedpeft import config as configs
from fedpeft.clients import chunk, local, train
from fedpeft.clients.private import Guard
from fedpeft.errors import InputError
from fedpeft.privacy.gradients import per_sample_gradients
from fedpeft.privacy.noise import OperatingSystem, Seeded
from fedpeft.privacy.plan import Plan
from fedpeft.simulations import audit
from fedpeft.simulations.world import world

STEPS = 100  # enough to see fixed batch sizes; the audit's own 300 are slower
SETTING = {
    "model.task": "image-classification", "adapter.r": 2, "data.limit": 96, "data.clients": 4,
    "data.partition": "iid", "strategy.name": "fedit", "strategy.weighting": "uniform", "client.local_steps": 2,
    "client.local_epochs": None, "client.batch_size": 6, "client.lr": 0.01, "run.rounds": 2,
    "privacy.unit": "sample", "privacy.noise_multiplier": 1.0,
}


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A small ViT and four clients of 24 records, so q = 1/4."""
    root = tmp_path_factory.mktemp("audit")
    config = configs.load({}, {**SETTING, "model.name": str(small.save("vit", root / "vit"))})
    return world.__wrapped__(configs.to_yaml(config), root / "run")


@pytest.fixture
def failing(here, tmp_path, monkeypatch):
    """`failing("noise")` names the checks of these parts of the audit that fail, as the code now is."""
    monkeypatch.setattr(audit, "STEPS", STEPS)

    def run(*parts: str) -> set[str]:
        subject = audit.Audit(here, tmp_path)
        return {check.name for part in parts for check in getattr(subject, part)() if not check.passed}

    return run


def test_the_real_code_passes(here, tmp_path, monkeypatch):
    monkeypatch.setattr(audit, "STEPS", STEPS)
    result = audit.report(audit.Audit(here, tmp_path))
    assert [check["name"] for check in result["checks"] if not check["passed"]] == [] and result["passed"]
    sensitivity = {check["name"]: check["measured"] for check in result["checks"]}["sensitivity"]
    assert sensitivity == pytest.approx(1.0, abs=1e-4)  # it is reached, so a larger one would be seen
    assert result["claim"]["epsilon"] > result["measured_epsilon"] > 0


def test_it_passes_with_noise_of_the_operating_system(here, tmp_path):
    secret = replace(here.config, privacy=replace(here.config.privacy, randomness="os"))
    subject = audit.Audit(replace(here, config=secret), tmp_path)
    assert isinstance(subject.source(subject.client, 1), OperatingSystem)
    assert all(check.passed for check in subject.noise())


def test_it_refuses_what_is_not_private():
    with pytest.raises(InputError, match=r"privacy.unit=none.*privacy.unit=sample"):
        audit.run({})


# Faults in the plan ---------------------------------------------------------------------------------------------------


def test_the_batch_mean_is_clipped(failing, monkeypatch):
    def clipped_sum(plan, gradients):
        mean = torch.nan_to_num(gradients, 0, 0, 0).mean(0)
        return mean * min(1.0, plan.clip / float(mean.norm() + 1e-6))

    monkeypatch.setattr(Plan, "clipped_sum", clipped_sum)
    assert failing("sensitivity", "noise") == {"sensitivity", "sensitivity of clipping"}


def test_nothing_is_clipped(failing, monkeypatch):
    monkeypatch.setattr(Plan, "clipped_sum", lambda plan, gradients: torch.nan_to_num(gradients, 0, 0, 0).sum(0))
    assert failing("sensitivity") == {"sensitivity", "sensitivity of clipping"}


def test_the_noise_is_divided_twice(failing, monkeypatch):
    def noised_mean(plan, total, source):
        noise = torch.from_numpy(source.normal(total.numel())).to(total)
        b = plan.expected_batch
        return total / b + plan.noise_multiplier * plan.clip * noise / b**2

    monkeypatch.setattr(Plan, "noised_mean", noised_mean)
    assert failing("noise") == {"noise size", "noise of each tensor", "noise shape"}


def test_the_sensitivity_is_mis_stated_by_two(failing, monkeypatch):
    real = Plan.clipped_sum
    monkeypatch.setattr(Plan, "clipped_sum",
                        lambda plan, gradients: real(replace(plan, clip=2 * plan.clip), gradients))
    assert failing("sensitivity", "noise") == {"sensitivity", "sensitivity of clipping"}


def test_the_sum_is_divided_by_the_size_drawn(failing, monkeypatch):
    real = Plan.clipped_sum

    def clipped_sum(plan, gradients):
        return real(plan, gradients) * plan.expected_batch / max(1, len(gradients))

    monkeypatch.setattr(Plan, "clipped_sum", clipped_sum)
    assert failing("sensitivity") == {"sensitivity", "sensitivity of clipping"}


def test_a_record_that_is_not_finite_spoils_the_sum(failing, monkeypatch):
    def clipped_sum(plan, gradients):
        norms = gradients.norm(dim=1)
        return (plan.clip / (norms + 1e-6)).clamp(max=1.0) @ gradients

    monkeypatch.setattr(Plan, "clipped_sum", clipped_sum)
    assert failing("sensitivity", "noise") == {"sensitivity", "sensitivity of clipping"}


def test_batches_come_from_a_shuffle(failing, monkeypatch):
    def sample(plan, count, source):
        return np.sort(np.argsort(source.uniform(count))[: round(count * plan.sample_rate)])

    monkeypatch.setattr(Plan, "sample", sample)
    assert failing("sampling", "noise") == {"batch size", "empty batches"}


def test_passes_over_the_data(failing, monkeypatch):
    """Every record once in four steps: right in how often, wrong in how many and in which."""
    left = {}

    def sample(plan, count, source):
        if not left.get(count):
            left[count] = np.array_split(np.argsort(source.uniform(count)), 4)
        return left[count].pop()

    monkeypatch.setattr(Plan, "sample", sample)
    assert failing("sampling") == {"batch size", "batches are independent", "empty batches"}


def test_the_sampling_rate_is_too_high(failing, monkeypatch):
    real = Plan.sample
    monkeypatch.setattr(Plan, "sample", lambda plan, count, source: real(
        replace(plan, sample_rate=min(1.0, 1.3 * plan.sample_rate)), count, source))
    assert "sampling rate" in failing("sampling")


def test_an_empty_batch_is_drawn_again(failing, monkeypatch):
    real = Plan.sample

    def sample(plan, count, source):
        drawn = real(plan, count, source)
        while len(drawn) == 0 and count and plan.sample_rate:
            drawn = real(plan, count, source)
        return drawn

    monkeypatch.setattr(Plan, "sample", sample)
    assert failing("sampling") == {"empty batches"}


# Faults in the step ---------------------------------------------------------------------------------------------------


def faulty_steps(clip):
    """`private_steps` with another way from per-sample gradients [N, P] and the sizes of the tensors to their sum."""

    def private_steps(model, data, parameters, config, private, device):
        plan, source = private.plan, private.source
        sizes = [value.numel() for value in parameters.values()]
        for _ in range(config.local_steps):
            total = torch.zeros(sum(sizes))
            drawn = plan.sample(len(data), source)
            if len(drawn):
                gradients, _ = per_sample_gradients(
                    model.modules, parameters, lambda *batch: train.per_sample_loss(model, *batch),
                    *train.on_device(data, drawn, device))
                total = clip(plan, torch.nan_to_num(gradients, 0, 0, 0), sizes)
            pieces = plan.noised_mean(total, source).split(sizes)
            yield {key: piece.view_as(parameters[key]) for key, piece in zip(parameters, pieces, strict=True)}, []

    return private_steps


def test_the_faulty_steps_are_right_but_for_their_fault(failing, monkeypatch):
    right = faulty_steps(lambda plan, gradients, sizes: plan.clipped_sum(gradients))
    monkeypatch.setattr(train, "private_steps", right)
    assert failing("sensitivity", "noise", "rounds") == set()


def test_the_head_escapes_the_clip(failing, monkeypatch):
    def clip(plan, gradients, sizes):
        head = sum(sizes[-2:])  # the classifier's weight and bias come last
        return torch.cat([plan.clipped_sum(gradients[:, :-head]), gradients[:, -head:].sum(0)])

    monkeypatch.setattr(train, "private_steps", faulty_steps(clip))
    assert failing("sensitivity") == {"sensitivity"}


def test_each_tensor_is_clipped_on_its_own(failing, monkeypatch):
    def clip(plan, gradients, sizes):
        return torch.cat([plan.clipped_sum(part) for part in gradients.split(sizes, dim=1)])

    monkeypatch.setattr(train, "private_steps", faulty_steps(clip))
    assert failing("sensitivity") == {"sensitivity"}


def test_the_mean_of_the_batch_is_clipped_in_the_step(failing, monkeypatch):
    def clip(plan, gradients, sizes):
        return plan.clipped_sum(gradients.mean(0, keepdim=True))

    monkeypatch.setattr(train, "private_steps", faulty_steps(clip))
    assert failing("sensitivity") == {"sensitivity"}


def test_a_tensor_gets_no_noise(failing, monkeypatch):
    real = train.private_steps

    def private_steps(model, data, parameters, *rest):
        *_, last = parameters
        for released, losses in real(model, data, parameters, *rest):
            yield {**released, last: torch.zeros_like(released[last])}, losses

    monkeypatch.setattr(train, "private_steps", private_steps)
    assert failing("noise", "rounds") == {"noise of each tensor", "noise size", "noise shape", "trained tensors move"}


def test_the_head_trains_outside_of_the_private_step(failing, monkeypatch):
    real = train.private_steps

    def private_steps(model, data, parameters, *rest):
        inside = {key: value for key, value in parameters.items() if not key.startswith("classifier")}
        outside = {key: torch.ones_like(value) for key, value in parameters.items() if key not in inside}
        for released, losses in real(model, data, inside, *rest):
            yield {**released, **outside}, losses

    monkeypatch.setattr(train, "private_steps", private_steps)
    assert failing("noise", "rounds") >= {"trained and noised", "noise of each tensor"}


def test_steps_without_records_are_skipped(failing, monkeypatch):
    real = train.private_steps

    def private_steps(model, data, parameters, config, private, device):
        plan = private.plan
        for _ in range(config.local_steps):
            drawn = plan.sample(len(data), private.source)
            if len(drawn):
                every = replace(private, plan=replace(plan, sample_rate=1.0))
                yield from real(model, Chosen(data, drawn), parameters, replace(config, local_steps=1), every, device)

    class Chosen:
        def __init__(self, data, drawn):
            self.data, self.drawn = data, drawn

        def __len__(self):
            return len(self.drawn)

        def batch(self, indices):
            return self.data.batch(self.drawn[indices])

    monkeypatch.setattr(train, "private_steps", private_steps)
    assert failing("noise", "sampling") >= {"empty batches", "noise size"}


def test_dropout_follows_the_public_seed(failing, here, monkeypatch):
    """Masks that an adversary knows change with the place in the batch, so one record would move all others."""
    real = train.per_sample_loss

    def with_dropout(model, inputs, labels):
        return torch.nn.functional.dropout(real(model, inputs, labels), training=model.base.backbone.training)

    monkeypatch.setattr(train, "per_sample_loss", with_dropout)
    assert failing("public_seed", "rounds") == set()
    secret = train.train

    def public(model, data, trains, config, seed, **options):
        monkeypatch.setattr(train.Private, "secret_seed", lambda self: seed)
        return secret(model, data, trains, config, seed, **options)

    monkeypatch.setattr(train, "train", public)
    assert failing("public_seed") == {"public seed"}


# Faults around it -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [("round", 1), ("client", "all")], ids=["clients", "rounds"])
def test_noise_is_shared(failing, monkeypatch, path):
    def source(guard, client, number):
        return Seeded(0, *(("round", number) if path[0] == "round" else ("client", client)))

    monkeypatch.setattr(Guard, "source", source)
    assert failing("noise", "rounds") == {"noise is fresh"}


def test_a_frozen_tensor_moves(failing, monkeypatch):
    real = train.train

    def moving(model, *arguments, **options):
        result = real(model, *arguments, **options)
        next(value for value in model.base.backbone.parameters() if not value.requires_grad).data.add_(1e-3)
        return result

    monkeypatch.setattr(local, "train", moving)
    assert failing("rounds") == {"frozen tensors rest"}


def test_the_ledger_counts_one_round_only(failing, monkeypatch):
    real = Guard.spend

    def spend(guard, client, number, request, plan):
        if number == 1:
            real(guard, client, number, request, plan)

    monkeypatch.setattr(Guard, "spend", spend)
    assert failing("rounds") == {"ledger"}


def test_a_cohort_clips_less(failing, monkeypatch):
    real = chunk.add_clipped
    monkeypatch.setattr(chunk, "add_clipped", lambda total, slopes, clients, clips: real(
        total, slopes, clients, 2 * clips))
    assert failing("cohort") == {"cohort"}
