"""Every adapter, embedded data set and partitioner of the registry in a real run, and what every entry must tell."""

from __future__ import annotations

import dataclasses
import inspect

import numpy as np
import pytest
from safetensors.torch import load_file

from fedpeft import config as configs
from fedpeft import registry
from fedpeft.config.schema import METHOD_SECTIONS, options_of
from fedpeft.data.source import load
from fedpeft.errors import InputError
from fedpeft.objectives.base import load_objective
from support.sample import sampled

PARTITION_OPTIONS = {
    "column": {
        "data.source": "docstrings",
        "data.partition.column": "module",
        "model.name": "tiny-bert",
        "model.task": "sequence-classification",
        "model.max_length": 32,
    }
}
ENTRIES = [
    (table, name) for table in ("strategies", "adapters", "datasets", "partitioners") for name in registry.names(table)
]


@pytest.mark.parametrize(("table", "name"), ENTRIES)
def test_an_entry_documents_itself_and_its_options(table, name):
    cls = registry.load(table, name)
    assert len((inspect.getdoc(cls) or "").splitlines()[0]) > 10
    if table == "strategies":
        assert (
            "arXiv" in cls.paper
            or "ICML" in cls.paper
            or "NeurIPS" in cls.paper
            or name in ("flower", "norm_clip", "median")
        ), cls.paper
    for item in options_of(cls).values():
        assert item.metadata.get("help"), f"{name}.{item.name} has no meaning"


@pytest.mark.parametrize(
    ("path", "name"),
    [(path, name) for path, section in METHOD_SECTIONS.items() for name in registry.names(section.table)],
)
def test_a_config_with_the_method_is_read_as_it_was_written(path, name):
    """An option that had the name of a key of the section would take its place."""
    section, cls = METHOD_SECTIONS[path].config, registry.load(METHOD_SECTIONS[path].table, name)
    assert not {item.name for item in dataclasses.fields(section) if item.name != "options"} & set(options_of(cls))
    built = configs.build(section, {METHOD_SECTIONS[path].key: name}, path)
    assert configs.build(section, configs.to_tree(built), path) == built


@pytest.mark.parametrize("name", registry.names("tta"))
def test_a_test_time_method_documents_itself_and_its_options(name):
    """These take a model, a seed and any options, which their `Config` declares."""
    cls = registry.load("tta", name)
    assert len((inspect.getdoc(cls) or "").splitlines()[0]) > 10
    assert any(where in cls.paper for where in ("arXiv", "NeurIPS", "Neural Computation")) or name == "source"
    parameters = list(inspect.signature(cls).parameters.values())
    assert [(item.name, item.kind.name) for item in parameters] == [
        ("model", "POSITIONAL_OR_KEYWORD"),
        ("seed", "POSITIONAL_OR_KEYWORD"),
        ("options", "VAR_KEYWORD"),
    ]
    items = options_of(cls)
    assert {"order"} <= set(items), "each says when it predicts"
    for item in items.values():
        assert item.metadata.get("help"), f"{name}.{item.name} has no meaning"
    defaults = {item.name: configs.default_of(item) for item in items.values()}
    assert configs.build(cls.Config, defaults, name) == cls.Config(), "defaults are within their own bounds"
    with pytest.raises(InputError, match=r"config key tta\.learning_rat"):
        configs.method("tta", name, {"learning_rat": 1.0}, "tta", model=None)


@pytest.mark.parametrize(
    "name, model", sampled(registry.names("adapters"), ["tiny-vit", "tiny-bert", "tiny-llama"], keep=2)
)
def test_an_adapter_trains_on_every_model_family(name, model, tiny, tmp_path):
    text = {"data.source": "docstrings", "data.limit": 60, "model.max_length": 32}
    config = {
        "model.name": model,
        "model.task": {
            "tiny-vit": "image-classification",
            "tiny-bert": "sequence-classification",
            "tiny-llama": "causal-lm",
        }[model],
        **({} if model == "tiny-vit" else text),
    }
    if name == "lora_sb":
        config |= {"adapter": "lora_sb", "strategy": "fed_sb"}
    summary = tiny("run", {**config, "run.rounds": 1})
    assert summary["final"]["loss"] != summary["baseline"]["loss"]
    factors = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert any("lora_B" in key and value.abs().max() > 0 for key, value in factors.items())


@pytest.mark.parametrize("name", registry.names("datasets"))
def test_a_data_set_is_the_same_every_time_and_does_not_leak(name):
    cls = registry.load("datasets", name)
    kind, labelled = cls.kind, getattr(cls, "labelled", "class")
    task = next(
        task
        for task in registry.names("objectives")
        if (load_objective(task).records, load_objective(task).labelled) == (kind, labelled)
    )
    config = configs.DataConfig(source=name, limit=150)
    one, two = (load(config, task, 0) for _ in range(2))
    assert [part.fingerprint for part in one] == [part.fingerprint for part in two]
    train, test = one
    keys = [{np.asarray(row).tobytes() if kind == "image" else row for row in part.inputs} for part in (train, test)]
    assert not keys[0] & keys[1]
    assert set(np.unique(test.labels)) <= set(np.unique(train.labels))
    assert load(config, task, 1)[0].fingerprint != train.fingerprint


@pytest.mark.parametrize("name", registry.names("partitioners"))
def test_a_partitioner_runs_and_its_split_can_be_used_again(name, tiny, tmp_path):
    config = {"data.partition": name, "run.rounds": 1, "data.limit": 200, **PARTITION_OPTIONS.get(name, {})}
    tiny("one", config)
    tiny("two", {**config, "data.split": str(tmp_path / "one" / "split.json")})
    adapters = [(tmp_path / run / "adapter" / "adapter_model.safetensors").read_bytes() for run in ("one", "two")]
    assert adapters[0] == adapters[1]
    splits = [(tmp_path / run / "split.json").read_text() for run in ("one", "two")]
    assert splits[0] == splits[1]
