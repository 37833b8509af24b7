"""An exported folder is used with stock transformers and peft alone, as its own card says, and tells no secrets."""

from __future__ import annotations

import contextlib
import io
import json

import peft
import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file

import fedpeft
from fedpeft import config as configs
from fedpeft.data.templates import find_ends, find_template
from fedpeft.models import loading
from fedpeft.run.card import front_matter, shareable_name, usage_snippet
from fedpeft.run.export import export
from fedpeft.run.world import load_world
from support import chat
from support import small_models as small

TURNS = [("user", "How many people live there?"), ("assistant", "Three."), ("user", "And islands?")]
MESSAGES = [{"role": role, "content": content} for role, content in TURNS]
SECRET = "Ward-7-of-St-Anna"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A decoder with a chat tokenizer, in a folder whose path is nobody's business."""
    folder = tmp_path_factory.mktemp("private") / "decoder"
    tokenizer = chat.tokenizer("llama")
    torch.manual_seed(0)
    sizes = {
        "initializer_range": 0.2,
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    config = transformers.LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=256, **sizes)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def conversations(tmp_path_factory):
    """Conversations of three users, the file and the users with telling names."""
    path = tmp_path_factory.mktemp(SECRET) / "letters.jsonl"
    rows = [
        {"messages": [*MESSAGES[:1], {"role": "assistant", "content": f"{number} of them."}], "user": f"{SECRET}-{who}"}
        for who in range(3)
        for number in range(8)
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


@pytest.fixture(scope="module")
def run(base, conversations, tmp_path_factory):
    """A finished run over them."""
    out = tmp_path_factory.mktemp("runs") / SECRET
    given = {
        "model": {"name": str(base), "task": "causal-lm", "max_length": 96},
        "adapter": {"name": "lora", "r": 4, "alpha": 64, "target_modules": ["all-linear"]},
        "data": {"source": str(conversations), "partition": {"name": "column", "column": "user"}},
        "client": {"local_steps": 4, "local_epochs": None, "batch_size": 4, "lr": 0.002},
        "run": {"rounds": 2, "baselines": False},
    }
    fedpeft.simulate(given, out=out)
    return out


def printed(code: str, folder, monkeypatch) -> str:
    """What the lines of a card print, executed in the folder."""
    monkeypatch.chdir(folder)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(code, "README.md", "exec"), {})
    return out.getvalue()


def code_of(folder) -> str:
    return (folder / "README.md").read_text().partition("```python\n")[2].partition("```")[0]


def test_adapter_and_merged_model_say_the_same_in_stock_libraries_by_the_lines_of_their_cards(
    run, base, tmp_path, monkeypatch
):
    export(run, tmp_path / "adapter", base=str(base))
    export(run, tmp_path / "merged", merge=True, base=str(base))
    said = printed(code_of(tmp_path / "adapter"), tmp_path / "adapter", monkeypatch)
    assert said.strip() and said == printed(code_of(tmp_path / "merged"), tmp_path / "merged", monkeypatch)
    plain = transformers.AutoModelForCausalLM.from_pretrained(base).eval()
    tuned = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    ids = torch.arange(10)[None]
    assert not torch.allclose(plain(ids).logits, tuned(ids).logits, atol=1e-2), "the adapter does nothing"


@pytest.mark.parametrize("merge", [False, True])
def test_the_folder_writes_and_ends_turns_as_the_run_did(run, tmp_path, merge):
    export(run, tmp_path / "out", merge=merge)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ours = loading.load(configs.load(run / "resolved.yaml").model, 1, 0).processor
    template = find_template(None, "messages", ours)
    wanted = ours(template.write(TURNS, ours, answering=True), add_special_tokens=False)["input_ids"]
    assert tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True)["input_ids"] == wanted
    settings = transformers.GenerationConfig.from_pretrained(tmp_path / "out")
    assert settings.eos_token_id == find_ends(template, ours) == [ours.convert_tokens_to_ids("<|eot_id|>")]
    assert settings.pad_token_id == ours.pad_token_id and tokenizer.padding_side == "left"
    assert not settings.do_sample


def test_a_built_in_template_and_its_mark_of_a_beginning_go_along(base, run, tmp_path):
    """The tokenizer begins every text with a mark, which the template `alpaca` leaves to it; stock code does not."""
    config = configs.load(run / "resolved.yaml", ["data.template=alpaca"])
    from fedpeft.run.companions import write_processor

    loaded = loading.load(config.model, 1, 0)
    ours = loading.load(config.model, 1, 0).processor
    template = find_template("alpaca", "messages", ours)
    write_processor(tmp_path, loaded, config, "messages")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    wanted = ours(template.write(TURNS[:1], ours, answering=True), add_special_tokens=False)["input_ids"]
    found = tokenizer.apply_chat_template(MESSAGES[:1], add_generation_prompt=True)["input_ids"]
    assert found == wanted and found.count(ours.bos_token_id) == (1 if template.start else 0)
    assert "### Response" in tokenizer.decode(found)


@pytest.mark.parametrize("merge", [False, True])
def test_nothing_in_the_folder_says_whose_it_is(run, base, conversations, tmp_path, merge):
    export(run, tmp_path / "out", merge=merge)
    secrets = [SECRET, "letters", str(base.parent), str(run), str(tmp_path), "/tmp/", "of them."]
    for path in (tmp_path / "out").rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            told = [secret for secret in secrets if secret.encode() in content]
            assert not told, f"{path.name} tells {told}"
    about = (tmp_path / "out" / "README.md").read_text()
    assert "fine-tuned from decoder" in about


def test_the_card_is_the_hubs(run, tmp_path):
    result = export(run, tmp_path / "out", base="ada/decoder", license="apache-2.0")
    text = (tmp_path / "out" / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    about = yaml.safe_load(front)
    assert about == {
        "base_model": "ada/decoder",
        "library_name": "peft",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["fedpeft", "federated-learning", "lora"],
    }
    assert (
        json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == "ada/decoder"
    )
    summary = json.loads((run / "summary.json").read_text())
    assert "| clients | 3 |" in body and "| rounds | 2 |" in body and "| strategy | fedit |" in body
    assert "conversations (messages); template of the tokenizer; what the assistant says is learned" in body
    assert "without differential privacy" in body and f"{summary['measures']['loss']['final']:.4g}" in body
    assert result["notes"] == []


def test_a_local_base_has_its_own_name_alone_and_that_is_said(run, tmp_path):
    result = export(run, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == "decoder"
    assert "base_model:" not in (tmp_path / "out" / "README.md").read_text()
    assert any("--base NAME says where others get it" in note for note in result["notes"])
    assert shareable_name("ada/decoder") == "ada/decoder" and shareable_name("../models/decoder") == "decoder"


def test_a_data_set_of_the_hub_is_named_and_a_file_is_not(run):
    from fedpeft.run.card import Exported

    def datasets(source, engine="cohort"):
        config = configs.load(run / "resolved.yaml", [f"data.source={source}"])
        config.run.engine = engine
        card = front_matter(Exported(run, config, "a/b", 2, False, False, ["all"], True))
        return yaml.safe_load(card).get("datasets")

    assert datasets("flwrlabs/alpaca-gpt4") == ["flwrlabs/alpaca-gpt4"]
    assert datasets("data/letters.jsonl") is None and datasets("debian/da") is None and datasets("digits") is None
    assert datasets("flwrlabs/alpaca-gpt4", "sites") is None


def test_names_of_classes_and_of_the_base_are_shown_and_change_nothing_else_of_the_card(run, tmp_path):
    from fedpeft.run.card import Exported, write

    names = ["a | b", "---\nlicense: mit", "```\n# x", "<script>alert(1)</script>", '"']
    base = 'de"co<b>d</b>er\n---\n# [x](y)|`z`'
    config = configs.load(run / "resolved.yaml", ["model.task=sequence-classification"])
    plain = write(Exported(run, config, "decoder", 2, False, False, ["c"] * len(names), True))
    found = write(Exported(run, config, base, 2, False, False, names, True))
    assert "license:" not in found.split("\n---\n")[0] and found.count("\n") == plain.count("\n")
    heads = [[line for line in card.splitlines() if line.startswith("#")] for card in (plain, found)]
    assert heads[1][1:] == heads[0][1:] and "\\<b\\>d" in heads[1][0]
    blocks = found.split("\n```")
    assert list(json.loads(blocks[3].removeprefix("json")).values()) == names and len(blocks) == 5
    compile(blocks[1].removeprefix("python"), "README.md", "exec")
    assert json.dumps(base) in blocks[1]
    rows = [line for line in found.splitlines() if line.startswith("| base model")]
    assert len(rows) == 1 and rows[0].replace("\\|", "").count("|") == 3


def test_without_a_tokenizer_in_the_folder_the_lines_take_the_bases(run, base, tmp_path, monkeypatch):
    from fedpeft.run.card import Exported

    export(run, tmp_path / "out", base=str(base))
    (tmp_path / "out" / "tokenizer.json").unlink()
    config = configs.load(run / "resolved.yaml")
    lines = usage_snippet(Exported(run, config, str(base), 2, False, False, ["all"], False))
    assert "pixel" not in lines and "from_pretrained(here" not in lines
    assert printed(lines, tmp_path / "out", monkeypatch).strip()


@pytest.mark.parametrize("flag", ["base", "license"])
@pytest.mark.parametrize("value", ["", " ", "mit\n---\n"])
def test_a_name_of_nothing_or_of_several_lines_is_refused(run, tmp_path, flag, value):
    with pytest.raises(fedpeft.InputError, match=f"--{flag} .*Leave it out, or give one line"):
        export(run, tmp_path / "out", **{flag: value})


def test_a_guarantee_stands_in_the_card(tmp_path):
    private = {"privacy.unit": "sample", "privacy.noise_multiplier": 2.0, "privacy.epsilon": None}
    given = {"strategy": "fedit", "strategy.weighting": "uniform", "run.rounds": 1, "data.limit": 60, "data.clients": 2}
    few = {"client.local_steps": 1, "client.local_epochs": None, "run.clients_per_round": None, "run.baselines": False}
    private["privacy.accountant"] = "rdp"
    summary = fedpeft.simulate("quickstart", {**given, **few, **private}, out=tmp_path / "run")
    export(tmp_path / "run", tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert f"epsilon {summary['epsilon_max']:.4g} at delta {summary['privacy']['delta']:g}" in text
    assert "for one record of a client (unit sample)" in text and "- differential-privacy" in text
    assert "without differential privacy" not in text and '\n```json\n{\n  "0": "0",\n  "1": "1",' in text


# A mean-pooled head ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pooled(tmp_path_factory):
    """A run of an encoder with a mean-pooled head, and where its base lies."""
    root = tmp_path_factory.mktemp("pooled")
    base = small.save("bert", root / "encoder", whole=False)
    lines = [f"{word} {index},{word}" for index in range(20) for word in ("apple", "stone", "river")]
    (root / "texts.csv").write_text("\n".join(["text,label", *lines]) + "\n")
    given = {
        "model": {"name": str(base), "task": "sequence-classification", "pooling": "mean", "max_length": 32},
        "data": {"source": str(root / "texts.csv"), "clients": 2, "partition": "iid"},
        "client": {"local_steps": 5, "local_epochs": None, "lr": 0.05},
        "run": {"rounds": 1, "baselines": False},
    }
    fedpeft.simulate(given, out=root / "run")
    return root / "run", base


def scores(run, text):
    """The run's own model on a text."""
    world = load_world(configs.load(run / "resolved.yaml"), run)
    from fedpeft.adapters import folder

    world.local.model.write(folder.load(run / "adapter"))
    batch = world.local.model.base.processor([text], return_tensors="pt")
    with torch.no_grad():
        return world.local.model.logits(batch)[0]


@pytest.mark.parametrize("merge", [False, True])
def test_the_lines_of_the_card_restore_a_mean_pooled_head(pooled, tmp_path, monkeypatch, merge):
    run, base = pooled
    result = export(run, tmp_path / "out", merge=merge, base=str(base))
    assert any("mean-pooled" in note for note in result["notes"])
    lines = code_of(tmp_path / "out")
    assert "fedpeft" not in lines and len(lines.strip().splitlines()) <= 14
    said = printed(lines, tmp_path / "out", monkeypatch)
    found = [float(value) for value in said.partition("[[")[2].partition("]]")[0].split(",")]
    assert found == pytest.approx(scores(run, "A text.").tolist(), abs=1e-3)


def test_a_merged_mean_pooled_model_is_a_folder_of_sentence_transformers(pooled, tmp_path):
    """By hand what each module of modules.json does, as sentence-transformers documents it, and by it where it is."""
    run, _ = pooled
    export(run, tmp_path / "out", merge=True)
    steps = json.loads((tmp_path / "out" / "modules.json").read_text())
    names = [step["type"].rpartition(".")[2] for step in steps]
    assert names == ["Transformer", "Pooling", "Normalize", "Dense"] and [step["idx"] for step in steps] == [0, 1, 2, 3]
    about = json.loads((tmp_path / "out" / steps[3]["path"] / "config.json").read_text())
    dense = load_file(tmp_path / "out" / steps[3]["path"] / "model.safetensors")
    assert about["activation_function"].endswith(".Identity") and about["in_features"] == small.WIDTH
    batch = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")(["A text."], return_tensors="pt")
    with torch.no_grad():
        hidden = transformers.AutoModel.from_pretrained(tmp_path / "out").eval()(**batch).last_hidden_state
    unit = torch.nn.functional.normalize(hidden.mean(1), dim=-1)
    found = unit @ dense["linear.weight"].T + dense["linear.bias"]
    torch.testing.assert_close(found[0], scores(run, "A text."), atol=1e-4, rtol=1e-4)


def test_a_classifiers_lines_ask_for_as_many_outputs_as_it_has(run):
    from fedpeft.run.card import Exported

    config = configs.load(run / "resolved.yaml", ["model.task=token-classification"])
    lines = usage_snippet(Exported(run, config, "a/b", 2, False, False, ["O", "PER"], True))
    assert 'AutoModelForTokenClassification.from_pretrained("a/b", num_labels=2)' in lines
