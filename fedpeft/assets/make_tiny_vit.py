"""Make the embedded checkpoint: a tiny ViT pre-trained on drawn digits. `make checkpoint` takes a minute on one core.

Digits are drawn with Pillow's built-in font at random width, shear, rotation, thickness and threshold on 32x32, then
reduced to 4x4 block means: the construction of scikit-learn's real `digits`, so that fine-tuning on those is a shift
from synthetic to real with no third-party image in the package.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from transformers import ViTConfig, ViTForImageClassification

EXAMPLES, EPOCHS, BATCH, SEED = 6000, 12, 64, 0


def draw(digit: int, rng: np.random.Generator) -> np.ndarray:
    """One drawn digit, float32 [8, 8] in [0, 1]."""
    canvas = Image.new("L", (64, 64), 0)
    font = ImageFont.load_default(size=int(rng.integers(38, 50)))
    ImageDraw.Draw(canvas).text((32, 32), str(digit), fill=255, font=font, anchor="mm")
    width, shear, angle = rng.uniform(0.8, 1.3), rng.uniform(-0.3, 0.3), rng.uniform(-15, 15)
    canvas = canvas.rotate(angle, resample=Image.Resampling.BILINEAR)
    canvas = canvas.transform(
        (64, 64),
        Image.Transform.AFFINE,
        (1 / width, shear, 32 - 32 / width - 32 * shear, 0, 1, 0),
        resample=Image.Resampling.BILINEAR,
    )
    if rng.random() < 0.5:
        canvas = canvas.filter(ImageFilter.MaxFilter(3 if rng.random() < 0.5 else 5))
    threshold = int(rng.integers(80, 170))
    ink = canvas.point(lambda value: 255 if value > threshold else 0)
    box = ink.getbbox() or (0, 0, 64, 64)
    ink = ink.crop(box)
    scale = 30 / max(ink.size)
    ink = ink.resize((max(1, int(ink.width * scale)), max(1, int(ink.height * scale))), Image.Resampling.BILINEAR)
    page = Image.new("L", (32, 32), 0)
    page.paste(
        ink, ((32 - ink.width) // 2 + int(rng.integers(-1, 2)), (32 - ink.height) // 2 + int(rng.integers(-1, 2)))
    )
    # Black or white before means are taken, as those digits were.
    bitmap = (np.asarray(page) > 127).astype(np.float32)
    grey: np.ndarray = bitmap.reshape(8, 4, 8, 4).mean(axis=(1, 3))
    return grey


def main(target: Path) -> None:
    """Train the model on drawn digits, print its loss and accuracy, and save it to the folder `target`."""
    # More would sum in another order, and the checkpoint would be another one.
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    rng = np.random.default_rng(SEED)
    labels = rng.integers(0, 10, EXAMPLES)
    images = np.stack([draw(int(label), rng) for label in labels])
    x = torch.from_numpy(images)[:, None]
    y = torch.from_numpy(labels)
    model = ViTForImageClassification(
        ViTConfig(
            image_size=8,
            patch_size=2,
            num_channels=1,
            hidden_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=128,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            num_labels=10,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    steps = EPOCHS * (EXAMPLES // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps)
    for epoch in range(EPOCHS):
        order = torch.randperm(EXAMPLES)
        for start in range(0, EXAMPLES - BATCH + 1, BATCH):
            index = order[start : start + BATCH]
            loss = torch.nn.functional.cross_entropy(model(pixel_values=x[index]).logits, y[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}")
    model.eval()
    with torch.no_grad():
        correct = (model(pixel_values=x).logits.argmax(-1) == y).float().mean()
    print(f"synthetic accuracy {correct:.3f}")
    model.save_pretrained(target)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "tiny-vit")
