"""`fedpeft report` and `fedpeft export`: the pages written again, the adapter copied out or merged into its base."""

from __future__ import annotations

import json
import re

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from fedpeft import config as configs
from fedpeft.adapters import folder
from fedpeft.errors import InputError
from fedpeft.models.loading import mean_pool
from fedpeft.run.export import export
from fedpeft.run.world import load_world

IMAGE = "data:image/"


def test_report_of_one_run(fedpeft, runs):
    page = runs["fedit"] / "report.html"
    before = page.read_text()
    page.unlink()
    done = fedpeft("report", runs["fedit"], "--json")
    assert done.code == 0 and done.json["report"] == str(page) and len(done.json["runs"]) == 1
    again = page.read_text()
    assert again.count(IMAGE) == before.count(IMAGE) > 0
    written = [re.sub(f'{IMAGE}[^"]*', "", text) for text in (again, before)]  # images are not painted again here
    assert len(written[0]) == pytest.approx(len(written[1]), rel=0.05)
    assert str(page) in fedpeft("report", runs["fedit"]).out


def test_report_of_two_runs(fedpeft, tmp_path, runs):
    done = fedpeft("report", runs["fedit"], runs["fedex"], "--out", tmp_path / "both.html", "--json")
    assert done.code == 0 and done.json["report"] == str(tmp_path / "both.html")
    assert {row["strategy"] for row in done.json["runs"]} == {"fedit", "fedex"}
    page = (tmp_path / "both.html").read_text()
    assert "fedit" in page and "fedex" in page and "http://" not in page.replace("http://www.w3.org", "")
    text = fedpeft("report", runs["fedit"], runs["fedex"], "--out", tmp_path / "both.html").out
    assert "fedit" in text and "fedex" in text and str(tmp_path / "both.html") in text


def inside(run):
    """The run's own world, its model with the run's adapter, and a test batch."""
    here = load_world(configs.load(run / "resolved.yaml"), run)
    batch, labels = here.test_encoded.batch(range(20))
    return here, batch, labels


def scores_of_adapter(run, batch):
    """By stock peft on the base model that the folder names; the text model is made by fedpeft, its head is ours."""
    adapter = run / "adapter"
    here = load_world(configs.load(run / "resolved.yaml"), run)
    if here.config.model.task == "image-classification":
        base = transformers.AutoModelForImageClassification.from_pretrained(
            folder.about(adapter)["base"], num_labels=10
        )
        return peft.PeftModel.from_pretrained(base, adapter).eval()(**batch).logits.detach()
    config = configs.load(run / "resolved.yaml")
    from fedpeft.models import loading

    fresh = loading.load(config.model, len(here.train.label_names), config.run.seed).backbone
    hidden = peft.PeftModel.from_pretrained(fresh, adapter).eval()(**batch).last_hidden_state
    return pooled_scores(hidden, batch, adapter)


def pooled_scores(hidden, batch, path):
    head = load_file(path / "head.safetensors")
    return torch.nn.functional.linear(
        mean_pool(hidden, batch["attention_mask"]), head["classifier.weight"], head["classifier.bias"]
    ).detach()


@pytest.mark.parametrize("arguments", [[], ["--json"]])
def test_export_copies_the_adapter(fedpeft, tmp_path, runs, arguments):
    done = fedpeft("export", runs["fedit"], "--to", tmp_path / "out", *arguments)
    assert done.code == 0 and str(tmp_path / "out") in done.out
    for path in (runs["fedit"] / "adapter").iterdir():
        copy = tmp_path / "out" / path.name
        if path.name == "adapter_config.json":
            about = json.loads(path.read_text())
            assert json.loads(copy.read_text()) == {**about, "base_model_name_or_path": "tiny-vit"} != about
        else:
            assert copy.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("name", ["fedit", "fedex", "text"])
def test_a_merged_model_is_the_adapters(fedpeft, tmp_path, runs, name):
    done = fedpeft("export", runs[name], "--to", tmp_path / "out", "--merge", "--json")
    assert done.code == 0 and done.json["model"] == str(tmp_path / "out")
    assert bool(done.json["notes"]) == (name == "text"), "only a head that no stock model has needs a word"
    here, batch, _ = inside(runs[name])
    with torch.no_grad():
        if name == "text":
            merged = transformers.AutoModel.from_pretrained(tmp_path / "out").eval()
            got = pooled_scores(merged(**batch).last_hidden_state, batch, tmp_path / "out")
            tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
            assert tokenizer("abc")["input_ids"] == here.local.model.base.processor("abc")["input_ids"]
        else:
            merged = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "out").eval()
            got = merged(**batch).logits
        torch.testing.assert_close(got, scores_of_adapter(runs[name], batch), atol=1e-4, rtol=1e-4)
        here.local.model.write(here.start.adapter)
        assert not torch.allclose(got, here.local.model.logits(batch), atol=1e-2)
    assert list(merged.config.id2label.values()) == here.train.label_names
    if name == "fedex":
        assert folder.load(runs[name] / "adapter").rank(folder.load(runs[name] / "adapter").lora_sites()[0]) > 4


@pytest.mark.parametrize("name", ["fedit", "fedex", "text"])
def test_the_exported_adapter_has_the_accuracy_of_the_run(runs, name):
    here, _, _ = inside(runs[name])
    batch, labels = here.test_encoded.batch(range(len(here.test_encoded)))
    with torch.no_grad():
        right = scores_of_adapter(runs[name], batch).argmax(-1) == labels
    assert float(right.float().mean()) == pytest.approx(
        json.loads((runs[name] / "summary.json").read_text())["final"]["accuracy"], abs=0.02
    )


def test_a_causal_model_is_merged_too(fedpeft, tmp_path, runs):
    """No head tells the number of labels here; the saved split does."""
    assert fedpeft("export", runs["causal"], "--to", tmp_path / "out", "--merge").code == 0
    here, batch, _ = inside(runs["causal"])
    adapter = folder.load(runs["causal"] / "adapter")
    here.local.model.write(adapter)
    with torch.no_grad():
        got = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()(**batch).logits
        torch.testing.assert_close(got, here.local.model.logits(batch), atol=1e-4, rtol=1e-4)


def test_export_refuses(fedpeft, tmp_path, runs):
    done = fedpeft("export", tmp_path, "--to", tmp_path / "out")
    assert done.code == 2 and "this is not a run folder" in done.err
    done = fedpeft("export", runs["fedit"], "--to", runs["fedex"])
    assert done.code == 2 and "is not an empty folder" in done.err
    with pytest.raises(InputError, match="merge='no': give True or False"):
        export(runs["fedit"], tmp_path / "out", merge="no")
