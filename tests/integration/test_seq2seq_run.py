"""Runs of encoder-decoders: equal to the loop that averages by hand, resumed bit for bit, used by stock libraries."""

from __future__ import annotations

import contextlib
import io
import json

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from fedpeft import config as configs
from fedpeft.objectives.base import IGNORE
from fedpeft.record.metrics import read
from fedpeft.run.export import export
from fedpeft.run.world import load_world
from support import by_hand, objectives
from support import small_models as small

WORDS = [f"{word} {number}" for number, word in enumerate(objectives.WORDS)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {kind: small.save(kind, tmp_path_factory.mktemp("models") / kind) for kind in ("t5", "bart")}


@pytest.fixture
def job(folders, tmp_path):
    return {
        "model.name": str(folders["t5"]),
        "model.task": "seq2seq",
        "model.max_length": 24,
        "data.source": str(objectives.write("seq2seq", tmp_path / "records.jsonl", 24)),
        "data.clients": 2,
        "run.rounds": 2,
    }


def stock(model, data, index):
    """Loss and number of tokens of a record, by the model's own shift of labels."""
    inputs, labels = data.batch(np.array([index]))
    asked, said = inputs["input_ids"][inputs["part"] == 2], labels[labels != IGNORE]
    return model(input_ids=asked[None], labels=said[None]).loss, len(said)


@pytest.mark.parametrize("weighting", ["record", "token"])
@pytest.mark.parametrize(("kind", "lr"), [("t5", 0.5), ("bart", 2.0)])
def test_a_federated_run_is_the_loop_that_averages_by_hand(kind, lr, weighting, job, folders, tiny, tmp_path):
    plain = {"client.optimizer": "sgd", "client.lr": lr, "client.batch_size": 100, "client.local_steps": 2}
    tiny("run", {**job, **plain, "model.name": str(folders[kind]), "client.loss_weighting": weighting})
    world = load_world(configs.load(tmp_path / "run" / "resolved.yaml"), tmp_path / "run")

    def loss(model, share):
        losses, counts = zip(*(stock(model, share, index) for index in range(len(share))), strict=True)
        weights = torch.tensor([float(count if weighting == "token" else 1) for count in counts])
        return (torch.stack(losses) * weights).sum() / weights.sum()

    make = lambda: transformers.AutoModelForSeq2SeqLM.from_pretrained(folders[kind])  # noqa: E731
    shares = world.local.train_data
    ends = by_hand.average(world, make, loss, lambda number: shares, 2, lr, tmp_path / "hand")
    by_hand.compare(tmp_path / "run", tmp_path / "hand", ends)


def test_what_is_measured_is_what_stock_libraries_say(job, folders, tiny, tmp_path):
    tiny("run", {**job, "client.lr": 0.05})
    run = tmp_path / "run"
    data = load_world(configs.load(run / "resolved.yaml"), run).test_encoded
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(folders["t5"])
    model = peft.PeftModel.from_pretrained(model, run / "adapter").eval()
    with torch.no_grad():
        losses, counts = zip(*(stock(model, data, index) for index in range(len(data))), strict=True)
    total = sum(float(loss) * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)
    event = next(event for event in reversed(list(read(run / "metrics.jsonl"))) if event["event"] == "round")
    assert event["loss"] == pytest.approx(float(sum(losses)) / len(losses), rel=1e-4)
    assert event["perplexity"] == pytest.approx(np.exp(total), rel=1e-4) and event["test_tokens"] == sum(counts)


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_adapter_and_merged_model_generate_the_same_in_stock_libraries(
    kind, job, folders, tiny, fedpeft, tmp_path, monkeypatch
):
    """With padding beside them, and by the lines of their cards."""
    longer = {
        "data.limit": 24,
        "client.local_steps": 60,
        "client.lr": 0.02,
        "adapter.target_modules": ["all-linear"],
        "adapter.r": 8,
        "client.optimizer": "adamw",
        "client.batch_size": 8,
    }
    tiny("run", {**job, **longer, "model.name": str(folders[kind])})
    run, rows = tmp_path / "run", ["pale", *WORDS, "a much longer question"]
    (tmp_path / "new.jsonl").write_text("".join(json.dumps({"prompt": row}) + "\n" for row in rows))
    asked = ("--data", tmp_path / "new.jsonl", "--out", tmp_path / "said.jsonl", "--max-new-tokens", 6)
    assert fedpeft("predict", run, *asked).code == 0
    ours = [json.loads(line)["answer"] for line in (tmp_path / "said.jsonl").read_text().splitlines()]
    assert len(set(ours)) > 1, "the encoder is not read"
    printed = []
    for merge in (False, True):
        folder = tmp_path / f"merged-{merge}"
        export(run, folder, merge=merge, base=str(folders[kind]))
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        settings = transformers.GenerationConfig.from_pretrained(folder, max_new_tokens=6)
        loader = transformers.AutoModelForSeq2SeqLM if merge else peft.AutoPeftModelForSeq2SeqLM
        model = loader.from_pretrained(folder).eval()
        batch = tokenizer(rows, padding=True, return_tensors="pt")
        said = tokenizer.batch_decode(model.generate(**batch, generation_config=settings), skip_special_tokens=True)
        assert [text.strip() for text in said] == ours
        monkeypatch.chdir(folder)
        lines, out = (folder / "README.md").read_text().partition("```python\n")[2].partition("```")[0], io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(lines, "README.md", "exec"), {})
        printed.append(out.getvalue())
    assert printed[0] == printed[1]


def test_a_run_that_was_interrupted_ends_with_the_same_bits(job, ends_alike):
    ends_alike(job)


def test_checkpointed_and_pieced_training_is_the_plain_one(job, tiny, tmp_path):
    ends = []
    for name, more in (("plain", {}), ("other", {"model.gradient_checkpointing": True, "client.micro_batch": 2})):
        tiny(name, {**job, "client.optimizer": "sgd", "client.lr": 0.5, **more})
        ends.append(load_file(tmp_path / name / "adapter" / "adapter_model.safetensors"))
    for key, value in ends[0].items():
        torch.testing.assert_close(ends[1][key], value, atol=1e-5, rtol=1e-4)


def test_a_chat_has_no_history_and_many_turns_are_not_asked(job, tiny, fedpeft, tmp_path):
    tiny("run", {**job, "run.rounds": 1})
    done = fedpeft("chat", tmp_path / "run", "--history")
    assert done.code == 2 and "reads one question at a time" in done.err
    turns = [{"role": ("user", "assistant")[n % 2], "content": "a"} for n in range(4)]
    (tmp_path / "many.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    done = fedpeft("predict", tmp_path / "run", "--data", tmp_path / "many.jsonl", "--out", tmp_path / "o.jsonl")
    assert done.code == 2 and "record 1: it has 3 turns, and an encoder reads one question" in done.err


def test_the_shipped_config_learns_and_its_answers_are_compared(fedpeft, tmp_path):
    few = ["run.rounds=1", "data.limit=60", "evaluation.generate.records=2", "evaluation.generate.max_new_tokens=4"]
    done = fedpeft("simulate", "seq2seq", *few, "--out", tmp_path / "run", "--json")
    assert done.code == 0, done.err
    summary = done.json
    assert summary["final"]["loss"] < summary["baseline"]["loss"] - 0.5
    assert summary["texts"]["template"] == "plain" and summary["answers"]["tuned"].keys() == {"exact_match", "rouge_l"}
    about = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert about["task_type"] == "SEQ_2_SEQ_LM"
