"""Every adapter of ours that is a product of low rank does all that an adapter must."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import PeftModel

from fedpeft import config as configs
from fedpeft import registry
from fedpeft.adapters import folder
from fedpeft.adapters.factored import tensors_at
from fedpeft.adapters.flat import flatten_adapter
from fedpeft.adapters.peft_measure import measure_average
from fedpeft.adapters.peft_types import EXACT
from fedpeft.clients.cohort.engine import Job, why_not_cohort
from fedpeft.errors import InputError
from fedpeft.models.loading import fingerprint, load
from fedpeft.run.export import merge_into
from fedpeft.state import RunContext, ServerState, Update
from fedpeft.strategies import wire
from fedpeft.strategies.rules.fedit import FedIT
from support import per_sample
from support import small_models as small
from support.cohort_jobs import SGD, UNEVEN, check, private, records
from support.own_adapters import CASES, OWN, adapted, is_linear, moved, roles_of

CLOSE = {"atol": 5e-6, "rtol": 1e-5}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return small.save("bert", tmp_path_factory.mktemp("models") / "bert")


def bare(path):
    return load(small.ModelConfig(name=str(path), task=small.TEXT), small.LABELS, 0)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_untrained_it_is_the_base(name, options, path):
    model, plain = adapted(path, name, options), bare(path)
    assert fingerprint(model.base, heads=False) == fingerprint(plain, heads=False)
    model.write(model.state())
    inputs = small.inputs("bert")
    torch.testing.assert_close(model.logits(inputs), plain.forward(inputs), **CLOSE)
    trained = model.form.select(registry.load("adapters", name).averages).tensors
    assert trained and all(key.rpartition("/")[0] in model.sites for key in trained)
    again = adapted(path, name, options).state()
    assert again.sha256() == model.state().sha256()


@pytest.mark.parametrize(("name", "options"), CASES)
def test_only_what_trains_moves_and_all_of_it(name, options, path):
    model = adapted(path, name, options)
    model.write(moved(model, name))  # where no factor is zero, so that all have gradients
    parameters = model.train_roles(roles_of(name))
    own = {id(value) for value in parameters.values()}
    before = [(value, value.detach().clone()) for value in model.base.backbone.state_dict(keep_vars=True).values()]
    slopes = torch.autograd.grad(model.logits(small.inputs("bert")).square().sum(), list(parameters.values()))
    assert all(bool(slope.any()) for slope in slopes)
    with torch.no_grad():
        for value, slope in zip(parameters.values(), slopes, strict=True):
            value -= 0.1 * slope
    model.logits(small.inputs("bert"))
    assert all(torch.equal(value, old) for value, old in before if id(value) not in own)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_a_state_goes_through_message_and_average(name, options, path):
    cls = registry.load("adapters", name)
    model = adapted(path, name, options)
    state = moved(model, name)
    model.write(state)
    model.write(state)  # twice is once
    assert model.state().sha256() == state.sha256()
    strategy = FedIT(context=RunContext(adapter=name, averages=cls.averages))
    assert strategy.trains == roles_of(name)
    server = ServerState(state)
    sent = strategy.broadcast(server, "a")
    received, told = wire.Packed.open(wire.PACKED.content(sent, strategy.instructions(server)))
    assert received.sha256() == sent.sha256()
    assert (told.static is not None) == bool(state.select(["frozen"]).tensors)
    assert not any(key.endswith("/frozen") for key in sent.tensors)
    both = [moved(model, name, seed).select(roles_of(name)) for seed in (2, 3)]
    after = strategy.aggregate(server, [Update(who, 1.0, one) for who, one in zip("ab", both, strict=True)]).adapter
    for key in both[0].tensors:
        torch.testing.assert_close(after[key], (both[0][key] + both[1][key]) / 2)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_its_folder_is_a_plain_lora_that_stock_peft_loads_and_merges(name, options, path, tmp_path):
    model = adapted(path, name, options)
    state = moved(model, name)
    model.write(state)
    inputs = small.inputs("bert")
    wanted = model.logits(inputs)
    folder.save(flatten_adapter(state), tmp_path, base=str(path), task=small.TEXT)
    plain = small.transformers.AutoModelForSequenceClassification.from_pretrained(path).eval()
    stock = PeftModel.from_pretrained(plain, tmp_path).eval()
    torch.testing.assert_close(stock(**inputs).logits, wanted, **CLOSE)
    assert float((wanted - bare(path).forward(inputs)).abs().max()) > 1e-2
    back = folder.load(tmp_path)
    assert back.tensors.keys() == flatten_adapter(state).tensors.keys()
    assert all(torch.equal(back[key], value) for key, value in flatten_adapter(state).tensors.items())
    base = bare(path)
    merge_into(base, back)
    torch.testing.assert_close(base.forward(inputs), wanted, **CLOSE)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_the_products_are_those_of_the_factors_that_it_folds_to(name, options, path):
    cls = registry.load("adapters", name)
    model = adapted(path, name, options)
    state = moved(model, name).map(torch.Tensor.double)
    x = torch.randn(3, 7, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for site in state.lora_sites():
        own = tensors_at(state, site)
        B, A = cls.fold(own, (16, 16))
        torch.testing.assert_close(cls.product(x, own, (16, 16)), x @ A.mT @ B.mT, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_averages_are_exact_where_it_says_so(name, options, path):
    model = adapted(path, name, options)
    error = measure_average(model, small.inputs("bert"), registry.load("adapters", name).averages)
    assert error < EXACT if is_linear(name, options) else error > 2 * EXACT


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_a_cohort_is_one_after_another_and_records_have_their_own_gradients(name, options, kind, tmp_path):
    model = adapted(small.save(kind, tmp_path), name, options, kind)
    per_sample.as_double(model)
    per_sample.without_dropout(model)
    model.training_mode = lambda: None
    trains = [role for role in roles_of(name) if model.form.select([role]).tensors]
    assert why_not_cohort(model, trains) is None
    jobs = [
        Job(dict(moved(model, name, 10 + k).select(trains).tensors), records(kind, size, k), seed=100 + k)
        for k, size in enumerate(UNEVEN)
    ]
    config = replace(SGD, lr=0.05, local_steps=2)
    check(model, jobs, trains, config, limit=1e-11)
    jobs = [replace(job, private=private(1.5, 0.5, k)) for k, job in enumerate(jobs)]
    check(model, jobs, trains, config, limit=1e-11)
    model.write(moved(model, name))
    parameters, data = model.train_roles(trains), per_sample.records(kind)
    per_sample.compare(model, parameters, data)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_a_run_goes_on_bit_for_bit(name, options, ends_alike):
    ends_alike({"adapter": {"name": name, **options}, "run.rounds": 2})


@pytest.mark.parametrize("name", OWN)
def test_a_rank_that_no_layer_has_is_refused_by_its_key(name, path):
    with pytest.raises(InputError, match=r"adapter\.r=500"):
        small.adapted(path, "bert", method=name, r=500)


def test_bases_of_few_bits_refuse_starts_that_move_them():
    moving = {name for name in OWN if registry.load("adapters", name).moving_start(defaults(name))}
    assert moving == {"sorsa", "soma"}
    with pytest.raises(InputError, match=r"model\.quantization=nf4: adapter\.name=sorsa moves the base weights"):
        configs.load({"adapter": "sorsa", "model": {"quantization": "nf4"}})


def defaults(name: str) -> dict[str, Any]:
    return dict(configs.load({"adapter": name}).adapter.options)
