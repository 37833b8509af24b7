"""A run over instructions: what its summary and report say of texts and answers."""

import fedpeft


def test_a_run_says_what_was_learned_and_shows_answers_before_and_after(tmp_path):
    tiny = {"run.rounds": 1, "client.local_steps": 2, "data.limit": 40, "data.clients": 2}
    asked = {"evaluation.generate.records": 3, "evaluation.generate.max_new_tokens": 4}
    summary = fedpeft.simulate("instruct", {**tiny, **asked}, out=tmp_path / "run")
    assert summary["texts"] == {
        "form": "alpaca",
        "template": "alpaca",
        "loss_on": "response",
        "truncate": "end",
        "loss_weighting": "token",
    }
    answers = summary["answers"]
    assert answers["records"] == len(answers["samples"]) == 3 and {"exact_match", "rouge_l"} == set(answers["base"])
    first = answers["samples"][0]
    assert first["prompt"].endswith("### Response:\n") and first["wanted"] and {"base", "tuned"} < set(first)
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Answers to 3 test conversations" in page and first["wanted"] in page
    # Only the answers and their end token are scored: a few tokens a record, not the 200 of its prompt.
    assert summary["final"]["loss"] > 0 and summary["test_tokens"] < 20 * summary["test_records"]


def test_a_template_of_ones_own_is_found_again_from_another_folder(tmp_path, monkeypatch):
    (tmp_path / "mine.jinja").write_text("{% for message in messages %}{{ message.content + eos_token }}{% endfor %}")
    (tmp_path / "elsewhere").mkdir()
    tiny = {"run.rounds": 1, "client.local_steps": 1, "data.limit": 20, "data.clients": 2}
    monkeypatch.chdir(tmp_path)
    fedpeft.simulate("instruct", {**tiny, "data.template": "mine.jinja"}, out="run")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert fedpeft.resume(tmp_path / "run")["texts"]["template"] == str(tmp_path / "mine.jinja")
