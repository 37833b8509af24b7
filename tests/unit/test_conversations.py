"""Which columns are a conversation, what its turns are, and what is no conversation, by row."""

from __future__ import annotations

import pytest

from fedpeft.data.conversations import dump_turns, find_form, parse_turns, read_rows, require_form
from fedpeft.errors import InputError

CHAT = [("user", "Hi"), ("assistant", "Hello")]
SYSTEM = ("system", "Be brief.")


def messages(turns, role="role", content="content", names=None):
    return [{role: (names or {}).get(who, who), content: what} for who, what in turns]


GPT = {"user": "human", "assistant": "gpt", "system": "system"}
FORMS = [
    ("messages", {"messages": messages([SYSTEM, *CHAT])}, [SYSTEM, *CHAT]),
    ("messages", {"messages": messages([*CHAT, *CHAT]), "prompt": "Hi", "id": 3}, [*CHAT, *CHAT]),
    ("messages", {"messages": messages(CHAT), "system": "Be brief."}, [SYSTEM, *CHAT]),
    ("sharegpt", {"conversations": messages([SYSTEM, *CHAT], "from", "value", GPT)}, [SYSTEM, *CHAT]),
    ("sharegpt", {"Conversations": messages(CHAT, "from", "value")}, CHAT),
    ("alpaca", {"instruction": "Hi", "input": "", "output": "Hello"}, CHAT),
    ("alpaca", {"instruction": "Add.", "input": "1 2", "output": "3"}, [("user", "Add.\n\n1 2"), ("assistant", "3")]),
    ("alpaca", {"Instruction": "Hi", "response": "Hello", "input": None}, CHAT),
    ("alpaca", {"instruction": "Hi", "output": "Hello", "system": "Be brief."}, [SYSTEM, *CHAT]),
    ("completion", {"prompt": "Hi", "completion": "Hello", "label": 1}, CHAT),
    ("completion", {"prompt": messages([SYSTEM, CHAT[0]]), "completion": messages(CHAT[1:])}, [SYSTEM, *CHAT]),
    ("qa", {"question": "Hi", "answer": "Hello", "id": "x", "comment": "a good one"}, CHAT),
]


@pytest.mark.parametrize(("name", "row", "turns"), FORMS)
def test_each_form_is_found_by_its_columns_and_read_to_turns(name, row, turns):
    form, held = find_form(list(row), {}, "x.jsonl")
    assert form.name == name
    texts, kept, bad = read_rows({key: [value] for key, value in row.items()}, form, held, "x.jsonl", False)
    assert [parse_turns(text) for text in texts] == [turns] and kept == [0] and bad == []


@pytest.mark.parametrize("names", [["text"], ["text", "label"], ["review", "stars"], ["text", "question"], ["prompt"]])
def test_columns_that_are_no_conversations_are_left_to_the_search_for_texts(names):
    assert find_form(names, {}, "x.csv") is None


REFUSED = [
    (["instruction", "input", "output", "text"], ["in instruction, output, input or in text", "data.text=text"]),
    (["messages", "prompt", "chosen", "rejected"], ["chosen, rejected, prompt or in messages"]),
    (["messages", "text"], ["messages or in text", "data.columns={messages: messages}"]),
    (["question", "answer", "prompt", "completion"], ["prompt, completion or in question, answer"]),
    (["Question", "question", "answer"], ["Question or in question"]),
    (["question", "answer", "context"], ["beside question, answer there is context"]),
    (
        ["instruction", "context", "response"],
        ["there is context", "{instruction: instruction, output: response, input:"],
    ),
    (["question", "answer", "answers"], ["there is answers"]),
    (["question", "response"], ["data.columns={prompt: question, completion: response}", "data.text"]),
    (["input", "output", "comment"], ["input, output seem to be parts"]),
    (["prompt", "response"], ["prompt, response", "completion: response"]),
]


@pytest.mark.parametrize(("names", "words"), REFUSED)
def test_what_may_be_several_things_is_refused_with_the_columns_and_the_key(names, words):
    with pytest.raises(InputError) as error:
        find_form(names, {}, "x.csv")
    assert all(word in str(error.value) for word in ["x.csv: ", "data.columns={", *words]), error.value


def test_columns_that_hold_something_else_for_certain_are_no_part_of_a_conversation():
    assert find_form(["question", "answer", "context"], {}, "x.csv", ("context",))[0].name == "qa"


def test_named_columns_say_the_form():
    names = ["q", "a", "text", "chosen", "hint"]
    form, held = find_form(names, {"prompt": "q", "completion": "a", "system": "hint"}, "x.csv")
    assert form.name == "completion" and held == {"prompt": "q", "completion": "a", "system": "hint"}
    with pytest.raises(InputError, match="keys prompt; allowed are those of one form: chosen, rejected; messages;"):
        find_form(names, {"prompt": "q"}, "x.csv")
    with pytest.raises(InputError, match=r"data\.columns\.answer: 'b' is not known.*columns of x\.csv"):
        find_form(names, {"question": "q", "answer": "b"}, "x.csv")


def test_preferences_are_known_and_not_a_language_models():
    form, _ = find_form(["prompt", "chosen", "rejected"], {}, "x.csv")
    with pytest.raises(InputError, match=r"model\.task=preference.*completion: chosen"):
        require_form(form, "causal-lm", "x.csv")
    require_form(form, "preference", "x.csv")
    require_form(find_form(["messages"], {}, "x.csv")[0], "causal-lm", "x.csv")


BAD = [
    (None, "its messages is no list, but None"),
    ("[]", "is no list, but '[]'"),
    ([], "it has no turn"),
    ({"role": ["user"], "content": ["a"]}, "is no list"),
    (["Hi"], "turn 1 is 'Hi'; expected an object with role and content"),
    ([{"role": "user", "text": "a"}], "turn 1 is {'role': 'user'"),
    (messages([("human", "a"), CHAT[1]]), "turn 1 has the role 'human'; allowed: system, user, assistant"),
    (messages([("user", None), CHAT[1]]), "its content of turn 1 is empty"),
    (messages([CHAT[0], ("assistant", "  ")]), "its content of turn 2 is empty"),
    (messages([("user", [{"type": "image"}]), CHAT[1]]), "its content of turn 1 is no string"),
    (messages([("user", "a\ud800"), CHAT[1]]), "half of a character (\\ud800)"),
    (messages([CHAT[0]]), "it has no turn of the assistant"),
    (messages([SYSTEM]), "it has no turn of the assistant"),
    (messages([SYSTEM, CHAT[0], *CHAT]), "turns 2 and 3 are both of the user"),
    (messages([*CHAT, CHAT[1]]), "turns 2 and 3 are both of the assistant"),
    (messages([CHAT[1], *CHAT]), "it begins with the assistant"),
    (messages([*CHAT, SYSTEM, *CHAT]), "turn 3 is of the system, which may speak first only"),
    (messages([SYSTEM, SYSTEM, *CHAT]), "turn 2 is of the system"),
]


@pytest.mark.parametrize(("value", "why"), BAD)
def test_a_malformed_conversation_names_its_row_or_is_counted(value, why):
    form, held = find_form(["messages"], {}, "x.jsonl")
    good = messages(CHAT)
    with pytest.raises(InputError) as error:
        read_rows({"messages": [good, value, good]}, form, held, "x.jsonl", False)
    assert "x.jsonl: record 2 is no conversation" in str(error.value) and why in str(error.value)
    assert "data.skip_bad=true" in str(error.value)
    texts, kept, bad = read_rows({"messages": [good, value, good]}, form, held, "x.jsonl", True)
    assert texts == [dump_turns(CHAT)] * 2 and kept == [0, 2] and len(bad) == 1 and why in bad[0]
    with pytest.raises(InputError, match="none of 1 records is a conversation"):
        read_rows({"messages": [value]}, form, held, "x.jsonl", True)


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"question": "a", "answer": 2}, "its answer is no string, but 2"),
        ({"question": "", "answer": "b"}, "its question is empty"),
        ({"instruction": "a", "output": "b", "input": 3}, "its input is no string"),
        ({"prompt": messages(CHAT), "completion": "b"}, "turns 2 and 3 are both of the assistant"),
        ({"conversations": messages(CHAT)}, "expected an object with from and value"),
        ({"conversations": messages([("bing", "a")], "from", "value")}, "allowed: system, user, assistant, human, gpt"),
    ],
)
def test_a_cell_that_is_no_part_of_a_conversation_names_its_row(row, why):
    form, held = find_form(list(row), {}, "x.jsonl")
    with pytest.raises(InputError) as error:
        read_rows({key: [value] for key, value in row.items()}, form, held, "x.jsonl", False)
    assert "record 1 is no conversation" in str(error.value) and why in str(error.value)
