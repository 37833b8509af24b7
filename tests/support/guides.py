"""README.md, the pages of docs/ and DEPLOY.md as what they tell a reader to type, and what that reader has at hand."""

from __future__ import annotations

import itertools
import re
import shlex
import sys
from pathlib import Path

import torch
import transformers

from fedpeft.models.embedded import byte_tokenizer

ROOT = Path(__file__).parents[2]
README, DEPLOY = ROOT / "README.md", ROOT / "DEPLOY.md"
COMMANDS = ROOT / "docs" / "commands.md"
# In the order in which a reader who types everything meets them.
GUIDES = (README, COMMANDS, *sorted(set((ROOT / "docs").glob("*.md")) - {COMMANDS}), DEPLOY)
FRAMES = "".join(map(chr, range(0x2500, 0x2580)))  # box-drawing characters
SITES = ("north", "south", "west")


def blocks(guide: Path, languages: str = "bash|python") -> list[tuple[str, str]]:
    """(language, text) of the blocks that are to be run, in their order; one marked `no-run` is none of them."""
    return re.findall(rf"```({languages})\n(.*?)```", guide.read_text(), re.DOTALL)


def script(guide: Path) -> str:
    """All of them as one shell script."""
    return "\n".join(
        text if language == "bash" else f"python - <<'EOF'\n{text}EOF\n" for language, text in blocks(guide)
    )


def commands(guide: Path) -> list[list[str]]:
    """The arguments of every `fedpeft` that the shell blocks call."""
    lines = [line for _, text in blocks(guide, "bash") for line in text.splitlines() if line.startswith("fedpeft ")]
    return [
        list(itertools.takewhile(lambda word: word not in ("&", "|"), shlex.split(line, comments=True)[1:]))
        for line in lines
    ]


def masked(text: str) -> list[str]:
    """The lines of a text as a guide can foretell them: no frames, paths by their ends, words with a digit alike."""
    lines = (line.translate(dict.fromkeys(map(ord, FRAMES))).split() for line in text.splitlines())
    ends = ([word.rpartition("/")[2] for word in line] for line in lines)
    return [" ".join("#" if re.search(r"\d", word) else word for word in line) for line in ends]


def foretold(guide: Path) -> list[str]:
    """The lines that a guide says are printed, masked."""
    texts = re.findall(r"```text\n(.*?)```", guide.read_text(), re.DOTALL)
    return [line for line in masked("".join(texts)) if line]


def at_hand(folder: Path) -> None:
    """Put into an empty folder what the guides take for granted: the checkout's Makefile with its environment set up,
    and the reader's own models and records. The models are small and random, but their features tell texts apart.
    """
    binaries = folder / ".venv" / "bin"
    binaries.mkdir(parents=True)
    here = Path(sys.executable).parent
    for name in ("Makefile", "pyproject.toml"):
        (folder / name).symlink_to(ROOT / name)
    (binaries / "fedpeft").symlink_to(here / "fedpeft")
    (binaries / "activate").write_text(f"export PATH={shlex.quote(str(here))}:$PATH\n")
    (folder / ".venv" / "ready").touch()
    sizes = {
        "vocab_size": len(byte_tokenizer()),
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "initializer_range": 0.3,
    }
    torch.manual_seed(2)
    for name, model in (
        ("minilm", transformers.BertModel(transformers.BertConfig(**sizes))),
        ("smollm2", transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))),
    ):
        model.save_pretrained(folder / "models" / name)
        byte_tokenizer().save_pretrained(folder / "models" / name)
    notes = [
        f"{SITES[number % 3]},note {number} of a {'calm' if number % 2 else 'restless'} night,"
        f"{'day' if number % 2 else 'night'} ward,{number % 7}"
        for number in range(90)
    ]
    (folder / "notes.csv").write_text("\n".join(["site,note,ward,days", *notes]) + "\n")
    (folder / "letters.jsonl").write_text(
        "".join(f'{{"text": "Dear colleague, this is letter {number}."}}\n' for number in range(60))
    )
