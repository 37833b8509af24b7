"""`fedpeft merge` on peft folders of the embedded image model, read back by stock peft; and what is refused."""

from __future__ import annotations

import json

import peft
import pytest
import torch
import transformers

from fedpeft.adapters import folder
from fedpeft.state import AdaptedLayer, AdapterState


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """`vit()`: a fresh base model; its folder; and the names and shapes of two kinds of layers of unequal width."""
    from fedpeft.config import ModelConfig
    from fedpeft.models import loading

    source = loading.load(ModelConfig(name="tiny-vit"), 10, 0).source

    def load():
        return transformers.AutoModelForImageClassification.from_pretrained(source, num_labels=10).eval()

    base = load()
    layers = {name: module for name, module in base.named_modules() if isinstance(module, torch.nn.Linear)}
    head = next(name for name, module in layers.items() if module.out_features == 10)
    inner = [name for name in layers if name != head]
    wide = [name for name in inner if layers[name].in_features != layers[name].out_features]
    return load, source, {name: tuple(layers[name].weight.shape) for name in (inner[0], wide[0])}, head


@pytest.fixture
def tasks(tmp_path, vit):
    """Three folders of rank 2, 3 and 2 with unequal scalings."""
    _, source, shapes, head = vit
    width = vit[0]().get_submodule(head).in_features
    made = []
    for index, (rank, scaling) in enumerate([(2, 2.0), (3, 0.5), (2, 1.0)]):
        generator = torch.Generator().manual_seed(index)
        tensors = {f"{head}/weight": torch.randn(10, width, generator=generator), f"{head}/bias": torch.zeros(10)}
        for name, (m, n) in shapes.items():
            tensors[f"{name}/A"] = torch.randn(rank, n, generator=generator)
            tensors[f"{name}/B"] = torch.randn(m, rank, generator=generator)
        sites = {name: AdaptedLayer("lora", shape, scaling) for name, shape in shapes.items()}
        made.append(tmp_path / f"task-{index}")
        folder.save(
            AdapterState(tensors, sites | {head: AdaptedLayer("head", (10, width))}),
            made[-1],
            base=source,
            task="image-classification",
        )
    return made


def product(adapter, site):
    return adapter.sites[site].scaling * adapter[f"{site}/B"].double() @ adapter[f"{site}/A"].double()


def expected(name, products):
    if name == "running_average":
        return sum(products) / 3
    if name == "task_arithmetic":
        return 0.5 * (products[0] + products[1] - products[2])
    if name == "metrics_weighted":
        return (products[0] + 2 * products[1] + 5 * products[2]) / 8
    U, S, Vt = torch.linalg.svd(sum(products) / 3, full_matrices=False)
    return U[:, :2] * S[:2] @ Vt[:2]


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("running_average", []),
        ("task_arithmetic", ["lambda=0.5", "--numbers", "1,1,-1"]),
        ("metrics_weighted", ["by=step", "--numbers", "1,2,5"]),
        ("lora_squeeze", ["rank=2"]),
    ],
)
def test_stock_peft_loads_the_expected_products(fedpeft, tmp_path, tasks, vit, name, arguments):
    load, _, shapes, head = vit
    done = fedpeft("merge", "--method", name, *arguments, *tasks, "--out", tmp_path / "out", "--json")
    assert done.code == 0, done.err
    assert done.json["method"] == name and done.json["adapters"] == 3 and done.json["sites"] == 2
    assert done.json["rank"] == (2 if name == "lora_squeeze" else 7)
    assert any("rank 7, above the adapters' 3" in note for note in done.json["notes"]) == (name != "lora_squeeze")
    states = [folder.load(path) for path in tasks]
    model = peft.PeftModel.from_pretrained(load(), tmp_path / "out").eval()
    merged, base = model.merge_and_unload(), load()
    for site in shapes:
        delta = (merged.get_submodule(site).weight - base.get_submodule(site).weight).detach().double()
        wanted = expected(name, [product(state, site) for state in states])
        assert float((delta - wanted).norm() / wanted.norm()) < 1e-5
    share = [1 / 8, 2 / 8, 5 / 8] if name == "metrics_weighted" else [1 / 3] * 3
    wanted = sum(part * state[f"{head}/weight"] for part, state in zip(share, states, strict=True))
    torch.testing.assert_close(merged.get_submodule(head).weight, wanted, atol=1e-5, rtol=1e-5)


def test_order_matters_to_opcm_and_its_note_is_shown(fedpeft, tmp_path, tasks, vit):
    assert fedpeft("merge", "--method", "opcm", *tasks, "--out", tmp_path / "one").code == 0
    done = fedpeft("merge", "--method", "opcm", *tasks[::-1], "--out", tmp_path / "other")
    assert done.code == 0 and "opcm: 3 adapters, 2 modules, rank 7" in done.out and "lambda 1." in done.out
    one, other = folder.load(tmp_path / "one"), folder.load(tmp_path / "other")
    norms = [sum(product(folder.load(path), site).square().sum() for site in vit[2]) ** 0.5 for path in tasks]
    for state in (one, other):
        norm = sum(product(state, site).square().sum() for site in vit[2]) ** 0.5
        assert float(norm) == pytest.approx(float(sum(norms)) / 3, rel=1e-5)
    assert all((product(one, site) - product(other, site)).norm() > 1 for site in vit[2])


def test_reversible_gives_one_adapter_back(fedpeft, tmp_path, tasks, vit):
    same = [tasks[0], tasks[2], tasks[0]]
    done = fedpeft("merge", "--method", "reversible", "p=3", "index=1", *same, "--out", tmp_path / "out", "--json")
    assert done.code == 0 and "relative error of the factors" in done.json["notes"][0]
    back, own = folder.load(tmp_path / "out"), folder.load(tasks[2])
    for site in vit[2]:
        torch.testing.assert_close(product(back, site), product(own, site), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(back[f"{vit[3]}/weight"], own[f"{vit[3]}/weight"])


def test_squeeze_takes_one_adapter_and_others_do_not(fedpeft, tmp_path, tasks):
    done = fedpeft("merge", "--method", "lora_squeeze", "rank=1", tasks[0], "--out", tmp_path / "out", "--json")
    assert done.code == 0 and done.json["rank"] == 1 and "of the squared norm" in done.json["notes"][0]
    done = fedpeft("merge", "--method", "opcm", tasks[0], "--out", tmp_path / "no")
    assert done.code == 2 and "OPCM needs at least 2 adapters; 1 given" in done.err


@pytest.mark.parametrize(
    ("method", "arguments", "message"),
    [
        ("opmc", [], "Did you mean 'opcm'"),
        ("opcm", ["alfa=0.5"], "'alfa' is not known. Did you mean 'alpha'"),
        ("opcm", ["alpha=2"], "alpha: 2.0 is out of range; allowed: >= 0 and <= 1"),
        ("opcm", ["--numbers", "1,2,3"], "--numbers: opcm takes no number with an adapter"),
        ("task_arithmetic", ["--numbers", "1,2"], "--numbers: 2 numbers for 3 adapters"),
        ("task_arithmetic", ["--numbers", "1,x,2"], "--numbers: '1,x,2' is not a list of numbers"),
        ("task_arithmetic", ["--numbers", "1,inf,2"], "task-1: number=inf: the weight must be finite"),
        ("metrics_weighted", ["--numbers", "1,0,2"], "task-1: metrics_weighted: number=0: a loss must be positive"),
        ("metrics_weighted", [], "task-0: metrics_weighted: by=loss needs the loss"),
        ("orthogonal_adaptation", [], "task-1: orthogonal_adaptation: "),
        ("reversible", [], "has rank 3, the first adapter's is 2"),
        ("opcm", ["/no/such/adapter"], "/no/such/adapter/adapter_config.json: cannot be read"),
    ],
)
def test_merge_refuses(fedpeft, tmp_path, tasks, method, arguments, message):
    done = fedpeft("merge", "--method", method, *tasks, *arguments, "--out", tmp_path / "out")
    assert done.code == 2 and message in done.err, done.err
    assert not (tmp_path / "out").exists()


def test_merge_refuses_unlike_adapters_and_names_the_folder(fedpeft, tmp_path, tasks):
    def refused(*folders):
        done = fedpeft("merge", "--method", "running_average", *folders, "--out", tmp_path / "out")
        assert done.code == 2 and not (tmp_path / "out").exists()
        return done.err

    path = tasks[1] / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "base_model_name_or_path": "some/other"}))
    assert f"{tasks[1]}: its base model is 'some/other'" in refused(*tasks)
    state = folder.load(tasks[2])
    site = state.lora_sites()[0]
    fewer = AdapterState(
        {key: value for key, value in state.tensors.items() if not key.startswith(f"{site}/")},
        {name: value for name, value in state.sites.items() if name != site},
    )
    folder.save(fewer, tmp_path / "fewer", base=folder.about(tasks[0])["base"], task="image-classification")
    assert f"{tmp_path / 'fewer'}: adapter: missing {site}/A, {site}/B" in refused(tasks[0], tmp_path / "fewer")
    done = fedpeft("merge", "--method", "running_average", *tasks, "--out", tasks[0])
    assert done.code == 2 and "is not an empty folder" in done.err
