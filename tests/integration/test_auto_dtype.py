"""`model.dtype=auto` times the base's products, writes down what it found, and a run keeps the answer."""

from __future__ import annotations

import logging
import re
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from fedpeft import config as configs
from fedpeft.config import ModelConfig
from fedpeft.errors import InputError, RunError
from fedpeft.models import attention, embedded, loading, rates
from fedpeft.run.dtype import settle_dtype
from fedpeft.simulations import run as runs

pytestmark = pytest.mark.usefixtures("heard")
CPU = torch.device("cpu")
AUTO = {"model.dtype": "auto"}
FEW = {  # products in bfloat16 take long on many machines
    "data.limit": 24,
    "data.test_fraction": 0.01,
    "data.clients": 2,
    "client.batch_size": 4,
    "client.local_steps": 1,
    "run.rounds": 1,
}


class Machine:
    """A clock that products move on, by so many GFLOP/s in each dtype."""

    def __init__(self, monkeypatch, float32, bfloat16):
        self.speed = {torch.float32: float32, torch.bfloat16: bfloat16}
        self.now, self.asked = 0.0, []
        monkeypatch.setattr(rates, "seconds", self.seconds)
        monkeypatch.setattr(rates, "time", SimpleNamespace(process_time=lambda: self.now))

    def seconds(self, shape, rows, dtype, device):
        self.asked.append((shape, rows, dtype))
        took = 2e-9 * rows * shape[0] * shape[1] / self.speed[dtype]
        self.now += took
        return took


@pytest.fixture
def heard(caplog):
    caplog.set_level(logging.INFO, "fedpeft")


@pytest.fixture
def machine(monkeypatch):
    def make(float32, bfloat16):
        return Machine(monkeypatch, float32, bfloat16)

    return make


BERT = Counter({(256, 256): 16, (1024, 256): 4, (256, 1024): 4})
LLAMA = Counter({(2048, 2048): 64, (8192, 2048): 32, (2048, 8192): 16, (128256, 2048): 1, (64, 2048): 1})


@pytest.mark.parametrize(("float32", "bfloat16"), [(60.0, 7.5), (75.0, 190.0), (12.0, 24.0), (1000.0, 2000.0)])
@pytest.mark.parametrize("shapes", [BERT, LLAMA])
def test_the_rates_are_the_machines_and_take_less_than_a_tenth_of_a_second(machine, shapes, float32, bfloat16):
    made = machine(float32, bfloat16)
    found = rates.measure(shapes, CPU)
    assert found == pytest.approx({"float32": float32, "bfloat16": bfloat16})
    assert made.now < 0.1
    assert (64, 2048) not in {shape for shape, _, _ in made.asked}  # the least work of five


def test_a_rate_is_of_all_products_as_often_as_they_are_made(monkeypatch):
    # 2 x 10 and 10 x 2 outputs and inputs, one and three layers: 40 and 120 flops a row, at 1 and 4 GFLOP/s.
    monkeypatch.setattr(
        rates, "_time_shape", lambda outputs, *_: dict.fromkeys(rates.DTYPES, {2: 1.0, 10: 4.0}[outputs])
    )
    assert rates.measure(Counter({(2, 10): 1, (10, 2): 3}), CPU)["float32"] == pytest.approx(160 / (40 / 1 + 120 / 4))


def test_one_and_a_half_times_as_fast_is_taken_and_less_is_not():
    assert rates.choose({"float32": 100.0, "bfloat16": 150.0}) == "bfloat16"
    assert rates.choose({"float32": 100.0, "bfloat16": 149.9}) == "float32"


def test_real_products_are_timed():
    assert rates.seconds((64, 32), 16, torch.bfloat16, CPU) > 0
    assert all(rate > 0.01 for rate in rates.measure({(64, 32): 2}, CPU).values())


def test_shapes_are_those_of_the_loaded_base_and_no_weight_is_read(tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}
    model = BertForSequenceClassification(BertConfig(vocab_size=300, **sizes))
    embedded.byte_tokenizer().save_pretrained(tmp_path)
    model.config.save_pretrained(tmp_path)  # and nothing else
    found = loading.product_shapes(ModelConfig(name=str(tmp_path), task="sequence-classification"))
    assert found == rates.shapes_of(model) and found[(48, 32)] == 3
    mean = ModelConfig(name=str(tmp_path), task="sequence-classification", pooling="mean")
    assert (2, 32) in found and (2, 32) not in loading.product_shapes(mean)  # the head is one of ours there
    with pytest.raises(InputError, match="cannot load"):
        loading.product_shapes(ModelConfig(name=str(tmp_path / "none"), task="sequence-classification"))


def test_a_named_dtype_is_not_timed(machine):
    made, config = machine(10.0, 100.0), configs.load({})
    assert settle_dtype(config) == "" and config.model.dtype == "float32" and not made.asked


def test_what_is_loaded_without_a_run_has_a_named_dtype():
    with pytest.raises(InputError, match=r"model\.dtype=auto: only a new simulation .* Set model\.dtype=float32 or bf"):
        loading.load(ModelConfig(name="tiny-bert", task="sequence-classification", dtype="auto"), 2, 0)


@pytest.mark.parametrize("strategy", ["flora", "fedex"])
def test_a_strategy_that_moves_the_base_gets_float32_and_its_reason(machine, caplog, strategy):
    config = configs.load({"strategy": strategy}, AUTO)
    made, said = machine(10.0, 100.0), settle_dtype(config)
    assert config.model.dtype == "float32" and not made.asked
    assert f"strategy.name={strategy} changes the base weights" in said and said in caplog.text


@pytest.mark.parametrize(("bfloat16", "dtype"), [(20.0, "bfloat16"), (14.0, "float32")])
def test_the_answer_is_written_down_and_kept_by_a_resumed_run_on_another_machine(
    tiny, interrupted, tmp_path, machine, caplog, bfloat16, dtype
):
    machine(10.0, bfloat16)
    interrupted("run", {**FEW, **AUTO}, at=1)
    text = (tmp_path / "run" / "resolved.yaml").read_text()
    assert f"dtype: {dtype}" in text and configs.load(tmp_path / "run" / "resolved.yaml").model.dtype == dtype
    said = re.search("# (model.dtype=auto.*)", text)[1]
    assert "10 GFLOP/s in float32" in said and f"{bfloat16:g} in bfloat16" in said and said in caplog.text

    other = machine(10.0, 34.0 - bfloat16)  # where the answer would be the other one
    runs.resume(tmp_path / "run")
    assert not other.asked and (tmp_path / "run" / "resolved.yaml").read_text() == text
    found = configs.load(tmp_path / "run" / "resolved.yaml").model.batched_attention
    tiny("whole", {**FEW, "model.dtype": dtype, **({} if found is None else {"model.batched_attention": found})})
    ends = [(tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("run", "whole")]
    assert ends[0] == ends[1]


@pytest.mark.parametrize(
    ("bfloat16", "given", "kept"), [(20.0, None, 128), (20.0, 0, 0), (10.0, None, None), (10.0, 64, None)]
)
def test_attention_is_timed_with_a_bfloat16_base_and_kept(
    interrupted, tmp_path, machine, monkeypatch, bfloat16, given, kept
):
    machine(10.0, bfloat16)
    asked = []
    monkeypatch.setattr(attention, "longest_faster", lambda: asked.append(1) or 128)
    interrupted("run", {**FEW, **AUTO, **({} if given is None else {"model.batched_attention": given})}, at=1)
    resolved = tmp_path / "run" / "resolved.yaml"
    assert configs.load(resolved).model.batched_attention == kept
    assert len(asked) == (kept == 128) == resolved.read_text().count("faster as batched products up to 128 tokens")
    runs.resume(tmp_path / "run")
    assert len(asked) == (kept == 128)


@pytest.mark.parametrize("engine", ["cohort", "ray"])
def test_workers_and_actors_are_sent_the_dtype_of_the_run(tiny, machine, monkeypatch, engine):
    def stop(make_app, *_, **__):
        raise RunError(f"sent {make_app.args[0].model.dtype}")

    machine(10.0, 20.0)
    monkeypatch.setattr(runs, "LocalGrid", stop)
    monkeypatch.setattr(runs, "start_ray", lambda workers: None)
    monkeypatch.setattr(runs, "stop_ray", lambda: None)
    with pytest.raises(RunError, match="sent bfloat16"):
        tiny("run", {**FEW, **AUTO, "run.workers": 1, "run.engine": engine})
