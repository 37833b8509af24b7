"""Every adapter of ours does all that an adapter must."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from fedpeft import config as configs
from fedpeft import registry
from fedpeft.adapters import folder, placed_folder
from fedpeft.adapters.adapted import build
from fedpeft.adapters.factored import tensors_at
from fedpeft.adapters.flat import flatten_adapter
from fedpeft.adapters.peft_measure import measure_average
from fedpeft.adapters.peft_types import EXACT
from fedpeft.clients.cohort.engine import Job, why_not_cohort
from fedpeft.config import AdapterConfig
from fedpeft.errors import InputError
from fedpeft.models.loading import fingerprint, load
from fedpeft.models.quantized import is_quantized
from fedpeft.run.export import merge_into, read_mergeable
from fedpeft.state import RunContext, ServerState, Update
from fedpeft.strategies import wire
from fedpeft.strategies.rules.fedit import FedIT
from support import per_sample
from support import small_models as small
from support.cohort_jobs import SGD, UNEVEN, check, private, records
from support.own_adapters import CASES, FACTORED, OWN, PLACED, WITHOUT_RANK, adapted, is_linear, moved, roles_of

READER = {"load_file": load_file}
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
    strategy = FedIT(context=RunContext(adapter=name, averages=cls.averages, keeps=cls.keeps))
    assert strategy.trains == roles_of(name) and strategy.keeps == cls.keeps
    server = ServerState(state)
    sent = strategy.broadcast(server, "a")
    received, told = wire.Packed.open(wire.PACKED.content(sent, strategy.instructions(server)))
    assert received.sha256() == sent.sha256()
    assert (told.static is not None) == bool(state.select(["frozen"]).tensors)
    assert not any(key.endswith("/frozen") for key in sent.tensors)
    both = [moved(model, name, seed).select(roles_of(name)) for seed in (2, 3)]
    after = strategy.aggregate(server, [Update(who, 1.0, one) for who, one in zip("ab", both, strict=True)]).adapter
    assert not sent.select(cls.keeps).tensors
    assert all(torch.equal(after[key], state[key]) for key in state.select(cls.keeps).tensors)
    for key in both[0].without(cls.keeps).tensors:
        torch.testing.assert_close(after[key], (both[0][key] + both[1][key]) / 2)


@pytest.mark.parametrize(("name", "options"), FACTORED)
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


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
@pytest.mark.parametrize(("name", "options"), PLACED)
def test_a_folder_of_its_own_comes_back_bit_for_bit_and_has_lines_that_load_it(name, options, kind, tmp_path):
    path = small.save(kind, tmp_path / "base")
    model = adapted(path, name, options, kind)
    state = moved(model, name)
    model.write(state)
    inputs, task = small.inputs(kind), model.base.task
    wanted = model.logits(inputs)
    folder.save(flatten_adapter(state), tmp_path / "out", base=str(path), task=task, settings=model.folder)
    section = placed_folder.read_section(tmp_path / "out")
    back = placed_folder.load(tmp_path / "out", section)
    assert back.sha256() == state.sha256()
    again = load(small.ModelConfig(name=str(path), task=task), small.LABELS, 0)
    placed_folder.put_into(again, tmp_path / "out", section, back)
    assert torch.equal(again.forward(inputs), wanted)
    plain = load(small.ModelConfig(name=str(path), task=task), small.LABELS, 0)
    assert float((wanted - plain.forward(inputs)).detach().abs().max()) > 1e-2
    lines = "\n".join(placed_folder.write_loading_lines(section, with_head=bool(plain.heads)))
    exec(lines, {"here": tmp_path / "out", "model": plain.backbone, "torch": torch, "functools": functools, **READER})
    torch.testing.assert_close(plain.forward(inputs), wanted, **CLOSE)


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize(("name", "options"), PLACED)
def test_merged_is_unmerged_or_refused(name, options, kind, tmp_path):
    path = small.save(kind, tmp_path / "base")
    model = adapted(path, name, options, kind)
    model.write(moved(model, name))
    inputs, task = small.inputs(kind), model.base.task
    folder.save(model.state(), tmp_path / "out", base=str(path), task=task, settings=model.folder)
    base = load(small.ModelConfig(name=str(path), task=task), small.LABELS, 0)
    if name == "bottleneck":
        with pytest.raises(InputError, match="no product of factors"):
            read_mergeable(tmp_path / "out")
        return
    before = base.forward(inputs)
    names = set(base.backbone.state_dict())
    read_mergeable(tmp_path / "out")(base)
    assert set(base.backbone.state_dict()) == names  # plain layers
    torch.testing.assert_close(base.forward(inputs), model.logits(inputs), **CLOSE)
    assert float((base.forward(inputs) - before).abs().max()) > 1e-2


@pytest.mark.parametrize("name", ["hydra", "difffit", "peqa"])
def test_merged_over_a_base_of_few_bits_is_unmerged(name, path, tmp_path):
    section = AdapterConfig(name=name, r=4, alpha=8.0)
    config = small.ModelConfig(name=str(path), task=small.TEXT, quantization="int8")
    model = build(config, section, small.LABELS, 0)
    model.write(moved(model, name))
    folder.save(model.state(), tmp_path, base=str(path), task=small.TEXT, settings=model.folder)
    base, inputs = load(config, small.LABELS, 0), small.inputs("bert")
    read_mergeable(tmp_path)(base)
    assert not any(is_quantized(module) for module in base.backbone.modules())
    torch.testing.assert_close(base.forward(inputs), model.logits(inputs), **CLOSE)


@pytest.mark.parametrize(("name", "options"), PLACED)
def test_who_wants_a_product_of_factors_is_told_that_there_is_none(name, options, path, tmp_path):
    model = adapted(path, name, options)
    folder.save(model.state(), tmp_path, base=str(path), task=small.TEXT, settings=model.folder)
    with pytest.raises(InputError, match=r"cannot be merged, aggregated offline, unlearned or gone on from"):
        folder.load(tmp_path)
    plain = small.transformers.AutoModelForSequenceClassification.from_pretrained(path)
    with pytest.raises(KeyError, match=f"FEDPEFT_{name.upper()}"):
        PeftModel.from_pretrained(plain, tmp_path)


@pytest.mark.parametrize(("name", "options"), FACTORED)
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
    # On layers of 16 x 16 SALT's product hardly counts beside its values, unless it has most of the rank that is left.
    model = adapted(path, name, {**options, "rank": 11} if name == "salt" else options)
    error = measure_average(model, small.inputs("bert"), registry.load("adapters", name).averages)
    assert error < EXACT if is_linear(name, options) else error > 0.02


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
    ends_alike({"adapter": {"name": name, **options}, "run.rounds": 2, "data.holdout": 0.2})


@pytest.mark.parametrize("name", sorted({*OWN} - {*WITHOUT_RANK}))
def test_a_rank_that_no_layer_has_is_refused_by_its_key(name, path):
    with pytest.raises(InputError, match=r"adapter\.r=500"):
        small.adapted(path, "bert", method=name, r=500)


@pytest.mark.parametrize("kind", small.KINDS)
def test_a_bottleneck_stands_behind_attention_and_feed_forward_network(kind, tmp_path):
    model = adapted(small.save(kind, tmp_path), "bottleneck", {}, kind)
    first = model.base.backbone.config.num_hidden_layers
    assert len(model.form.lora_sites()) == 2 * first
    width = model.base.backbone.config.hidden_size
    assert {model.base.shape(site)[0] for site in model.form.lora_sites()} == {width}
    assert len({model.base.shape(site)[1] for site in model.form.lora_sites()}) == 2  # the wider is the network's


def test_bases_of_few_bits_refuse_starts_that_move_them():
    moving = {name for name in OWN if registry.load("adapters", name).moving_start(defaults(name))}
    assert moving == {"sorsa", "soma"}
    with pytest.raises(InputError, match=r"model\.quantization=nf4: adapter\.name=sorsa moves the base weights"):
        configs.load({"adapter": "sorsa", "model": {"quantization": "nf4"}})


def defaults(name: str) -> dict[str, Any]:
    return dict(
        configs.load({"adapter": name, "data": {"holdout": 0.2}}).adapter.options
    )  # what stays with clients needs it
