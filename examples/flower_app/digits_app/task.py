"""What server and clients share: the model with its adapter, and the records of a client."""

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from sklearn.datasets import load_digits
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification

TEST = 597
SMALL = ViTConfig(image_size=8, patch_size=2, num_channels=1, hidden_size=24, num_hidden_layers=2, num_labels=10)
LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])


def build() -> PeftModel:
    """The same start everywhere. A real app has `from_pretrained` here."""
    torch.manual_seed(0)
    return get_peft_model(ViTForImageClassification(SMALL), LORA)


def records(part: int, parts: int) -> tuple[Tensor, Tensor]:
    """Pictures and labels of a client."""
    images, labels = _digits()
    return images[TEST + part :: parts], labels[TEST + part :: parts]


def test_records() -> tuple[Tensor, Tensor]:
    """Those of no client, for the server."""
    images, labels = _digits()
    return images[:TEST], labels[:TEST]


def _digits() -> tuple[Tensor, Tensor]:
    found = load_digits()
    return torch.tensor(found.images / 16).float()[:, None], torch.tensor(found.target)
