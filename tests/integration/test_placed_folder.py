"""A run with an adapter that is no product of factors: fedpeft uses what it leaves, and so do the lines of its card."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file

from fedpeft.adapters.folder import CONFIG, HEAD
from fedpeft.errors import InputError
from fedpeft.run.export import export
from fedpeft.run.trained import open_trained
from fedpeft.simulations.run import simulate
from support.methods import TINY

NAMES = ["apple", "river", "stone"]


@pytest.fixture(scope="module")
def run(bert_folder, tmp_path_factory):
    """A finished run that has learned something."""
    folder = tmp_path_factory.mktemp("bottleneck")
    rows = [{"text": f"{name} {number}", "label": name} for number in range(20) for name in NAMES]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    more = {"model.name": str(bert_folder), "model.task": "sequence-classification", "data.clients": 2}
    more |= {"data.source": str(folder / "rows.jsonl"), "adapter": {"name": "bottleneck", "place": "series"}}
    simulate({}, {**TINY, **more, "client.lr": 0.02, "run.rounds": 2}, folder / "run")
    return folder / "run"


def test_predict_answers_as_the_lines_of_the_card_do(fedpeft, run, bert_folder, tmp_path, monkeypatch):
    (tmp_path / "new.jsonl").write_text(json.dumps({"text": "A text."}))
    done = fedpeft("predict", run, "--data", tmp_path / "new.jsonl", "--out", tmp_path / "o.jsonl")
    assert done.code == 0, done.err
    said = json.loads((tmp_path / "o.jsonl").read_text())["probabilities"]
    export(run, tmp_path / "out", base=str(bert_folder))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "library_name: transformers" in card and "peft" not in card.partition("```python\n")[2].partition("```")[0]
    monkeypatch.chdir(tmp_path / "out")
    logits = []
    code = card.partition("```python\n")[2].partition("```")[0]
    exec(compile(code, "README.md", "exec"), {"print": logits.append})
    assert list(said.values()) == pytest.approx(logits[0][0].softmax(-1).tolist(), abs=1e-5)
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(bert_folder, num_labels=3).eval()
    plain.load_state_dict(load_file(tmp_path / "out" / HEAD), strict=False)
    tokenizer = transformers.AutoTokenizer.from_pretrained(bert_folder)
    without = plain(**tokenizer("A text.", return_tensors="pt")).logits
    assert not torch.allclose(without, logits[0], atol=1e-4), "the adapter does nothing"


def test_it_is_not_merged_nor_gone_on_from(fedpeft, run, bert_folder, tmp_path):
    notes = export(run, tmp_path / "adapter")["notes"]
    assert any("stock peft has no bottleneck" in note for note in notes)
    with pytest.raises(InputError, match="cannot be merged, aggregated offline"):
        export(run, tmp_path / "merged", merge=True)
    assert not (tmp_path / "merged").exists()
    done = fedpeft("aggregate", "--strategy", "fedit", "--out", tmp_path / "mean", run / "adapter", run / "adapter")
    assert done.code == 2 and "cannot be merged, aggregated offline" in done.err


def test_a_folder_that_says_what_is_not_so_is_refused(run, tmp_path):
    given = ["model.task=sequence-classification", f"data.labels=[{','.join(NAMES)}]"]
    shutil.copytree(run / "adapter", tmp_path / "there")
    about = json.loads((tmp_path / "there" / CONFIG).read_text())
    assert open_trained(tmp_path / "there", given).names == NAMES
    for change, words in (
        ({"name": "lora"}, "no adapter of this fedpeft's"),
        ({"name": 3}, "no adapter of this fedpeft's"),
        ({"activation": "abs"}, "adapter.activation"),
        ({"r": 5}, r"D has shape \[4, 16\], expected \[5, 16\]"),
        ({"target_modules": ["nowhere"]}, "no linear layer"),
        ({"target_modules": about["adapter"]["target_modules"][1:]}, "unexpected"),
    ):
        changed = {**about, "adapter": {**about["adapter"], **change}}
        (tmp_path / "there" / CONFIG).write_text(json.dumps(changed))
        with pytest.raises(InputError, match=words):
            open_trained(tmp_path / "there", given)
