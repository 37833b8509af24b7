"""The one view of a frozen model: head, width, classes, features, and weights that are [out, in] however stored."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedpeft.errors import InputError
from fedpeft.models.base import orient
from fedpeft.tta.deployed import deploy
from support import small_models as small

CLASSIFIERS = [name for name, (task, _) in small.KINDS.items() if task != small.LM]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    return {name: small.save(name, tmp_path_factory.mktemp("models") / name) for name in small.KINDS}


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_width_classes_and_features_are_those_of_the_whole_head(folders, name):
    """DistilBERT's head is two modules: the first takes the features, the last says how many classes there are."""
    base = small.adapted(folders[name], name).base
    assert (base.width, base.classes) == (small.WIDTH, small.LABELS)
    features, logits = base.features_and_logits(small.inputs(name))
    torch.testing.assert_close(logits, base.forward(small.inputs(name)))
    trunk = small.make(name).eval().base_model(**small.inputs(name)).last_hidden_state
    torch.testing.assert_close(
        features,
        trunk[:, 0] if name != "bert" else small.make(name).eval().bert(**small.inputs(name)).pooler_output,
        atol=1e-5,
        rtol=1e-4,
    )
    _, entering = deploy(base)(small.inputs(name))
    assert entering.shape == (3, small.WIDTH) and not torch.allclose(entering, entering[:1])


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_rows_of_classes_that_do_not_compete_are_the_last_layers(folders, name):
    model = small.adapted(folders[name], name)
    with model.competing([1]):
        still = model.still()
    assert {key: rows.tolist() for key, rows in still.items()} == {
        key: [True, False, True]
        for key in sorted(small.HEADS[name])
        if key.startswith("classifier.out_proj" if name == "roberta" else "classifier/")
    }


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("bert", "bert.encoder.layer.0.intermediate.dense"),
        ("llama", "model.layers.1.mlp.down_proj"),
        ("gpt2", "transformer.h.0.attn.c_attn"),
        ("gpt2", "transformer.h.1.attn.c_proj"),
    ],
)
@pytest.mark.parametrize("around", [False, True])
def test_a_weight_is_what_the_layer_multiplies_by(folders, name, layer, around):
    """Also of a square layer that stores [in, out], also with a LoRA around it; writing it writes the layer."""
    target = [layer.rpartition(".")[2]] if around else None
    base = small.adapted(folders[name], name, target_modules=target).base
    outputs, inputs = base.shape(layer)
    x = torch.randn(5, inputs, generator=torch.Generator().manual_seed(0))
    bias = base.layer(layer).bias
    torch.testing.assert_close(base.layer(layer)(x), x @ base.weight(layer).T + (0 if bias is None else bias))
    base.weight(layer).zero_()
    assert not base.layer(layer).weight.any() and base.layer(layer)(x).shape == (5, outputs)
    assert orient(base.layer(layer), orient(base.layer(layer), x)).shape == x.shape


def test_factors_of_a_square_layer_that_stores_its_weight_the_other_way_are_those_of_its_product(folders):
    """s B R A lives in the leading singular directions of x -> W x, whose left ones are B."""
    model = small.adapted(folders["gpt2"], "gpt2", method="lora_sb", r=2, target_modules=["attn.c_proj"])
    site = "transformer.h.0.attn.c_proj"
    U, _, Vt = torch.linalg.svd(model.base.weight(site).double())
    B, A = model.state()[f"{site}/B"].double(), model.state()[f"{site}/A"].double()
    torch.testing.assert_close(B @ B.T, U[:, :2] @ U[:, :2].T, atol=1e-5, rtol=0)
    torch.testing.assert_close(A.T @ A, Vt[:2].T @ Vt[:2], atol=1e-5, rtol=0)
    assert not torch.allclose(B @ B.T, A.T @ A, atol=0.1), "the two sides do not differ"


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_model_without_a_head_says_so(folders, name):
    with pytest.raises(InputError, match=r"model\.task=causal-lm: the model has no classification head"):
        small.adapted(folders[name], name).base.features(small.inputs(name))
