"""`fedpeft predict` and `fedpeft chat`: what they say is what the run's own model says, record by record."""

from __future__ import annotations

import csv
import io
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from fedpeft import config as configs
from fedpeft.adapters import folder
from fedpeft.data import templates
from fedpeft.errors import InputError
from fedpeft.run import generations
from fedpeft.run.predict import predict
from fedpeft.run.world import load_world
from fedpeft.simulations.run import simulate
from support.methods import TINY

QUESTIONS = ["What is 2 plus 3?", "What is red?", "Who is there, and why is it so late?"]


def world_of(run):
    """The run's own world, its model with the run's adapter."""
    here = load_world(configs.load(run / "resolved.yaml"), run)
    here.local.model.write(folder.load(run / "adapter"))
    here.local.model.base.backbone.eval()
    return here


def written(path):
    text = path.read_text()
    if path.suffix == ".csv":
        return list(csv.DictReader(io.StringIO(text)))
    return [json.loads(line) for line in text.splitlines()]


def by_model(here, texts):
    """Logits of each text alone, by the run's own model."""
    tokenizer = here.local.model.base.processor
    with torch.no_grad():
        return [here.local.model.base.forward(dict(tokenizer(text, return_tensors="pt"))) for text in texts]


def test_classes_and_probabilities_are_the_models_in_the_files_order(fedpeft, runs, tmp_path):
    texts = ["river 77 revir", "a much longer text about an apple and a stone that comes second", "x"]
    (tmp_path / "new.csv").write_text("text,ward\n" + "\n".join(f"{text},n" for text in texts) + "\n")
    done = fedpeft("predict", runs["text"], "--data", tmp_path / "new.csv", "--out", tmp_path / "o.jsonl", "--json")
    assert done.code == 0, done.err
    assert done.json == {"records": 3, "task": "sequence-classification", "out": str(tmp_path / "o.jsonl")}
    rows, here = written(tmp_path / "o.jsonl"), world_of(runs["text"])
    assert [row["record"] for row in rows] == [1, 2, 3]
    for row, logits in zip(rows, by_model(here, texts), strict=True):
        wanted = logits[0].softmax(-1)
        assert list(row["probabilities"]) == here.train.label_names == ["apple", "river", "stone"]
        assert list(row["probabilities"].values()) == pytest.approx(wanted.tolist(), abs=1e-5)
        assert row["label"] == here.train.label_names[int(wanted.argmax())]
    assert len({tuple(row["probabilities"].values()) for row in rows}) == 3
    fedpeft("predict", runs["text"] / "adapter", "--data", tmp_path / "new.csv", "--out", tmp_path / "o.csv")
    table = written(tmp_path / "o.csv")
    assert [row["label"] for row in table] == [row["label"] for row in rows]
    assert float(table[1]["probabilities: stone"]) == rows[1]["probabilities"]["stone"]


def test_pictures(fedpeft, runs, tmp_path):
    here = world_of(runs["fedit"])
    pictures = (here.test.take(np.arange(5)).inputs[..., 0] * 255).round().astype(np.uint8)
    for number, picture in enumerate(pictures):
        Image.fromarray(picture).save(tmp_path / f"{number}.png")
    (tmp_path / "new.csv").write_text("image\n" + "\n".join(f"{number}.png" for number in (3, 0, 4, 1, 2)) + "\n")
    done = fedpeft("predict", runs["fedit"], "--data", tmp_path / "new.csv", "--out", tmp_path / "o.jsonl")
    assert done.code == 0, done.err
    inputs = {"pixel_values": torch.from_numpy(pictures)[:, None].float() / 255}
    wanted = here.local.model.base.forward(inputs).softmax(-1)[[3, 0, 4, 1, 2]]
    for row, probabilities in zip(written(tmp_path / "o.jsonl"), wanted, strict=True):
        assert list(row["probabilities"].values()) == pytest.approx(probabilities.tolist(), abs=1e-4)


def test_a_text_is_gone_on_with(fedpeft, runs, tmp_path):
    (tmp_path / "new.csv").write_text("text\napple 1\nriver\n")
    done = fedpeft(
        "predict", runs["causal"], "--data", tmp_path / "new.csv", "--out", tmp_path / "o.jsonl", "--max-new-tokens", 5
    )
    assert done.code == 0, done.err
    base = world_of(runs["causal"]).local.model.base
    prompts = [base.processor(text)["input_ids"] for text in ("apple 1", "river")]
    wanted = generations.generate_answers(base, prompts, 5, [base.processor.eos_token_id])
    assert [row["answer"] for row in written(tmp_path / "o.jsonl")] == wanted and any(wanted)


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """A run over questions and answers."""
    root = tmp_path_factory.mktemp("asked")
    rows = [{"question": f"What is {n} plus 1?", "answer": f"It is {n + 1}."} for n in range(60)]
    (root / "qa.jsonl").write_text("\n".join(map(json.dumps, rows)))
    more = {"model.name": "tiny-llama", "model.task": "causal-lm", "data.source": str(root / "qa.jsonl")}
    simulate({}, {**TINY, **more, "data.clients": 2, "run.rounds": 1, "client.lr": 0.001}, root / "run")
    return root / "run"


def test_questions_are_answered_as_the_template_asks_them(fedpeft, asked, tmp_path, monkeypatch):
    base = world_of(asked).local.model.base
    template = templates.find_template(None, "qa", base.processor)
    texts = [template.write([("user", question)], base.processor, answering=True) for question in QUESTIONS]
    prompts = [base.processor(text, add_special_tokens=False)["input_ids"] for text in texts]
    wanted = generations.generate_answers(base, prompts, 6, templates.find_ends(template, base.processor))
    files = {
        "question.jsonl": [{"question": question} for question in QUESTIONS],
        "answered.jsonl": [{"question": question, "answer": "not looked at"} for question in QUESTIONS],
        "messages.jsonl": [{"messages": [{"role": "user", "content": question}]} for question in QUESTIONS],
        "prompt.jsonl": [{"prompt": question} for question in QUESTIONS],
        "text.jsonl": [{"text": question} for question in QUESTIONS],
    }
    for name, rows in files.items():
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows)))
        out = tmp_path / f"of-{name}"
        done = fedpeft("predict", asked, "--data", tmp_path / name, "--out", out, "--max-new-tokens", 6)
        assert done.code == 0, done.err
        assert [row["answer"] for row in written(out)] == wanted
    assert len(set(wanted)) > 1
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join([*QUESTIONS[:2], "", "x" * 400, QUESTIONS[2]])))
    done = fedpeft("chat", asked, "--max-new-tokens", 6)
    lines = [" ".join(text.split()) for text in wanted]
    assert done.code == 0 and done.out.split("\n") == [*lines[:2], "", lines[2], ""]
    assert "line 4: has 4" in done.err and "model.max_length=128 is the most" in done.err


def test_a_conversation_goes_on_with_history(fedpeft, asked, monkeypatch):
    base = world_of(asked).local.model.base
    template = templates.find_template(None, "qa", base.processor)
    stop = templates.find_ends(template, base.processor)

    def ask(turns):
        ids = base.processor(template.write(turns, base.processor, answering=True), add_special_tokens=False)
        return generations.generate_answers(base, [ids["input_ids"]], 5, stop)[0]

    first = ask([("user", "Hello?")])
    second = ask([("user", "Hello?"), ("assistant", first), ("user", "And?")])
    monkeypatch.setattr("sys.stdin", io.StringIO("And?\n"))
    done = fedpeft("chat", asked, "--max-new-tokens", 5, "--json")
    assert done.json == {"question": "And?", "answer": " ".join(ask([("user", "And?")]).split())}
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello?\nAnd?\n\nHello?\n"))
    done = fedpeft("chat", asked, "--history", "--max-new-tokens", 5)
    assert done.out.splitlines() == [" ".join(text.split()) for text in (first, second, first)]


def test_numbers_labels_and_tags(fedpeft, bert_folder, tmp_path):
    words = [["Ann", "went", "home"], ["to", "Rome"], ["Bob", "saw", "Ann", "there"]] * 10
    tags = {"Ann": "PER", "Bob": "PER", "Rome": "LOC"}
    kinds = {
        "regression": [{"text": " ".join(row), "label": float(len(row))} for row in words],
        "multi-label": [{"text": " ".join(row), "label": [row[0], row[-1]]} for row in words],
        "token-classification": [{"tokens": row, "tags": [tags.get(word, "O") for word in row]} for row in words],
    }
    for task, rows in kinds.items():
        source, run, out = (tmp_path / f"{task}{end}" for end in (".jsonl", "", "-out.jsonl"))
        source.write_text("\n".join(map(json.dumps, rows)))
        more = {"model.name": str(bert_folder), "model.task": task, "data.source": str(source), "data.clients": 2}
        simulate({}, {**TINY, **more, "run.rounds": 1}, run)
        new = [{key: row[key] for key in ("text", "tokens") if key in row} for row in rows[:3]]
        (tmp_path / "new.jsonl").write_text("\n".join(map(json.dumps, new)))
        done = fedpeft("predict", run, "--data", tmp_path / "new.jsonl", "--out", out)
        assert done.code == 0, done.err
        here, said = world_of(run), written(out)
        logits = by_model(here, [row.get("text") or " ".join(row["tokens"]) for row in rows[:3]])
        names = here.train.label_names
        for row, scores in zip(said, logits, strict=True):
            if task == "regression":
                assert row["values"] == {"label": pytest.approx(float(scores[0, 0]), rel=1e-3, abs=1e-5)}
            elif task == "multi-label":
                assert list(row["probabilities"].values()) == pytest.approx(scores[0].sigmoid().tolist(), abs=1e-4)
                assert row["labels"] == [name for name in names if row["probabilities"][name] > 0.5]
            else:  # a token is a byte, so a word begins where those before it and their spaces end
                starts = np.cumsum([0, *(len(word) + 1 for word in row["tokens"][:-1])])
                assert row["tags"] == [names[int(scores[0, start].argmax())] for start in starts]
    (tmp_path / "cut.jsonl").write_text(json.dumps({"tokens": ["Ann", "x" * 130, "Rome"]}))
    fedpeft("predict", run, "--data", tmp_path / "cut.jsonl", "--out", tmp_path / "cut-out.csv")
    (row,) = written(tmp_path / "cut-out.csv")
    assert json.loads(row["tokens"])[0] == "Ann" and json.loads(row["tags"])[2] is None


def test_an_adapter_without_its_run_is_told_what_it_is_for(fedpeft, runs, asked, tmp_path):
    shutil.copytree(runs["text"] / "adapter", tmp_path / "alone")
    (tmp_path / "new.csv").write_text("text\nriver 77 revir\n")
    to = ["--data", tmp_path / "new.csv", "--out"]
    fedpeft("predict", runs["text"], *to, tmp_path / "a.csv")
    (wanted,) = written(tmp_path / "a.csv")
    done = fedpeft("predict", tmp_path / "alone", *to, tmp_path / "b.csv")
    assert done.code == 2 and "Give model.task, one of" in done.err
    given = ["model.task=sequence-classification", "data.labels=[apple,river,stone]"]
    assert fedpeft("predict", tmp_path / "alone", *given, *to, tmp_path / "b.csv").code == 0
    assert written(tmp_path / "b.csv") == [wanted]
    done = fedpeft("predict", tmp_path / "alone", given[0], *to, tmp_path / "c.csv")
    assert done.code == 0 and list(written(tmp_path / "c.csv")[0])[2:] == [f"probabilities: {n}" for n in range(3)]
    done = fedpeft("predict", tmp_path / "alone", *given[:1], "model.name=tiny-llama", *to, tmp_path / "d.csv")
    assert done.code == 2 and "tiny-llama is for causal-lm" in done.err
    done = fedpeft("predict", tmp_path / "alone", given[0], "data.labels=[a,b]", *to, tmp_path / "d.csv")
    assert done.code == 2 and "its head has classifier/bias of shape [3]" in done.err


def test_refusals(fedpeft, runs, tmp_path):
    (tmp_path / "new.csv").write_text("text\nriver\n")
    (tmp_path / "there.csv").write_text("mine\n")
    (tmp_path / "empty.csv").write_text("text\n")
    (tmp_path / "other.csv").write_text("note,day\nriver,1\n")
    (tmp_path / "hole.csv").write_text("text,day\nriver,1\n,2\n")
    cases = {
        (runs["text"], "new.csv", "there.csv"): "is there already, and is not written over",
        (runs["text"], "new.csv", "o.txt"): "allowed are .jsonl and .csv",
        (runs["text"], "new.csv", "no/o.csv"): "there is no folder",
        (runs["text"], "none.csv", "o.csv"): "there is no such file",
        (runs["text"], "empty.csv", "o.csv"): "no records",
        (runs["text"], "other.csv", "o.csv"): "no text column",
        (runs["text"], "hole.csv", "o.csv"): "record 2 has no text",
        (tmp_path, "new.csv", "o.csv"): str(tmp_path),
        (tmp_path / "gone", "new.csv", "o.csv"): "there is no such folder",
    }
    for (model, data, out), words in cases.items():
        done = fedpeft("predict", model, "--data", tmp_path / data, "--out", tmp_path / out)
        assert done.code == 2 and words in done.err, (done.err, words)
    assert (tmp_path / "there.csv").read_text() == "mine\n" and not (tmp_path / "o.csv").exists()
    done = fedpeft("chat", runs["text"])
    assert done.code == 2 and "only language models answer in words" in done.err


@pytest.mark.parametrize("most", [0, -3])
def test_an_answer_of_no_token_is_refused(tmp_path, most):
    with pytest.raises(InputError, match=f"--max-new-tokens {most}: an answer needs room"):
        predict(tmp_path, tmp_path, tmp_path / "out.csv", {}, most)


def test_a_question_behind_the_model_is_refused_with_how_to_ask(fedpeft, tmp_path):
    done = fedpeft("chat", tmp_path / "run", "What is 2 + 2?")
    assert done.code == 2 and "Questions are lines of the input" in " ".join(done.err.split())
