"""What `fedpeft bench data` runs in a process of its own: one run, and what it notes of itself; and what it runs on.

Texts are of random letters, a token each; photos are JPEGs of 224 x 224 of smooth random colours, some 10 KB each, in a
folder for each label; unequal ones are of 160 to 320 by as many, with a tint for each label that can be learned. Models
are so small that reading, decoding and batching take most of the time.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from fedpeft import seeds
from fedpeft.files import scratch_folder

TOKENS, SIDE, LABELS = 60, 224, 4
TEST = {"texts": 32, "photos": 32, "unequal": 200}
SIDES = (160, 320)  # least and most of an unequal photo
TINTS = ((255, 60, 60), (60, 255, 60), (60, 60, 255), (200, 200, 60))  # of which a photo of its label has three tenths
AUGMENT = ["crop", "flip", "colour"]
CLIENTS, BATCH = 10, 32
VIT = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128, "patch_size": 32}
LORA = {"r": 8, "alpha": 16.0}
LR = 1e-3
Job = dict[str, Any]


# What it runs on ------------------------------------------------------------------------------------------------------


def prepare(folder: Path, kind: str, count: int) -> Path:
    """The file of so many texts, or the folder of so many photos; made where it is not there yet."""
    made = folder / (f"texts-{count}.csv" if kind == "texts" else f"{kind}-{count}")
    if not made.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with scratch_folder(folder, "making") as place:
            if kind == "texts":
                _write_texts(place / made.name, count)
            else:
                _write_photos(place / made.name, kind, count)
            (place / made.name).rename(made)
    return made


def _write_texts(path: Path, count: int) -> None:
    generator = seeds.numpy_generator(0, "bench", "data", "texts", count)
    with path.open("w") as file:
        file.write("text,label\n")
        for start in range(0, count, 10_000):
            letters = generator.integers(ord("a"), ord("z") + 1, (min(10_000, count - start), TOKENS), dtype=np.uint8)
            file.writelines(f"{bytes(row).decode()},{index % LABELS}\n" for index, row in enumerate(letters, start))


def _write_photos(path: Path, kind: str, count: int) -> None:
    from PIL import Image

    generator = seeds.numpy_generator(0, "bench", "data", kind, count)
    for label in range(LABELS):
        (path / f"label-{label}").mkdir(parents=True)
    for number in range(count):
        few, size = generator.integers(0, 256, (14, 14, 3), dtype=np.uint8), (SIDE, SIDE)
        if kind == "unequal":
            few = (0.7 * few + 0.3 * np.array(TINTS[number % LABELS])).astype(np.uint8)
            size = tuple(generator.integers(SIDES[0], SIDES[1] + 1, 2).tolist())
        photo = Image.fromarray(few).resize(size, Image.Resampling.BICUBIC)
        photo.save(path / f"label-{number % LABELS}" / f"{number:06}.jpg", quality=90)


def model_of(folder: Path, kind: str) -> str:
    """Name or folder of the model; that for photos is made, with its image processor."""
    if kind == "texts":
        return "tiny-bert"
    made = folder / "model"
    if not made.exists():
        import torch
        from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

        folder.mkdir(parents=True, exist_ok=True)
        with scratch_folder(folder, "making") as place, torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            ViTForImageClassification(ViTConfig(image_size=SIDE, num_labels=LABELS, **VIT)).save_pretrained(
                place / "model"
            )
            ViTImageProcessor(size={"height": SIDE, "width": SIDE}).save_pretrained(place / "model")
            (place / "model").rename(made)
    return str(made)


def config_of(folder: Path, kind: str, source: Path, steps: int | None, rounds: int, cache: Path) -> Job:
    """The config of a run; that of unequal photos changes them.

    Args:
        steps: of each client and round; None is a pass over its records.
    """
    augment: Job = {"augment": AUGMENT} if kind == "unequal" else {}
    return {
        "model": {
            "name": model_of(folder, kind),
            "task": "sequence-classification" if kind == "texts" else "image-classification",
            "max_length": TOKENS,
        },
        "adapter": LORA,
        "data": {
            "source": str(source),
            "test": str(prepare(folder, kind, TEST[kind])),
            "clients": CLIENTS,
            "partition": {"name": "iid"},
            "cache": str(cache),
            **augment,
        },
        "client": {
            "optimizer": "adamw",
            "lr": LR,
            "batch_size": BATCH,
            "local_epochs": 1 if steps is None else None,
            "local_steps": steps,
        },
        "run": {"rounds": rounds, "baselines": False, "evaluate_every": rounds, "checkpoint_every": rounds},
    }


# In a process of its own ----------------------------------------------------------------------------------------------


def main(path: str) -> None:
    """Do the job of a JSON file, and write what was noted to its `result`."""
    job = json.loads(Path(path).read_text())
    works: dict[str, Callable[[Job], Job]] = {"model": load_model, "read": read, "run": simulate, "loop": loop}
    Path(job["result"]).write_text(json.dumps(works[job["work"]](job)))


class Trained(Exception):
    """A run has come to the end of training: its report is not measured."""


def load_model(job: Job) -> Job:
    """The memory of a process that has the model of a run, and nothing of its data."""
    import fedpeft.simulations.run  # noqa: F401 - what a run has imported by then
    from fedpeft import config as configs
    from fedpeft.adapters.adapted import build
    from fedpeft.simulations.benchmarks.data_memory import memory

    config = configs.load(job["config"])
    held = build(config.model, config.adapter, LABELS, config.run.seed)
    found: Job = {"memory": memory(), "end": moment()}
    return {**found, "parameters": sum(value.numel() for value in held.base.backbone.parameters())}


def read(job: Job) -> Job:
    """Seconds, by the clock and of the CPU, that a run reads its records and makes inputs of them, the model loaded."""
    import fedpeft.simulations.run  # noqa: F401 - what a run has imported by then
    from fedpeft import config as configs
    from fedpeft.adapters.adapted import build
    from fedpeft.data.encode import encode
    from fedpeft.run.world import cache_of, data_key, load_records

    config = configs.load(job["config"])
    processor = build(config.model, config.adapter, LABELS, config.run.seed).base.processor
    began, cache = moment(), cache_of(config, Path(job["out"]))
    for part, what in zip(load_records(data_key(config), cache), ("training texts", "test texts"), strict=True):
        encode(part, processor, config.model.task, config.model.max_length, what, cache)
    return {"seconds": [after - before for before, after in zip(began, moment(), strict=True)]}


def simulate(job: Job) -> Job:
    """When a run took its first step, and was at the end of each of its rounds, and of training, where it is left; one
    that goes to its `result` is not left, and has an accuracy.
    """
    from fedpeft.simulations.run import simulate as run

    noted: Job = {"rounds": []}

    def note(event: Job) -> None:
        if event["event"] == "round":
            noted["rounds"].append(moment())
        elif event["event"] == "end" and not job.get("whole"):
            raise Trained

    with noting_first_step(noted), suppress(Trained):
        noted["accuracy"] = run(job["config"], out=job["out"], on_event=note)["final"]["accuracy"]
    return {**noted, "end": moment()}


def loop(job: Job) -> Job:
    """As `simulate`, of the loop that one would write with other libraries."""
    from fedpeft.simulations.benchmarks import photo_loop

    noted: Job = {"rounds": []}
    sizes = {"batch": BATCH, "passes": job["passes"], "lr": LR, "lora": LORA, "augment": job["augment"]}
    with noting_first_step(noted):
        local, processed = photo_loop.train(
            job["model"], job["source"], job["cache"], **sizes, done=lambda: noted["rounds"].append(moment())
        )
    if job["test"] is not None:
        noted["accuracy"] = photo_loop.accuracy(local, processed, job["test"], job["cache"], BATCH)
        local.save_pretrained(job["out"])
    return {**noted, "end": moment()}


@contextmanager
def noting_first_step(noted: Job) -> Iterator[None]:
    """Note when the first optimizer of this process has taken its first step."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    def note(*_: Any) -> None:
        if "first_step" not in noted:
            noted["first_step"] = moment()

    hook = register_optimizer_step_post_hook(note)
    try:
        yield
    finally:
        hook.remove()


def moment() -> tuple[float, float]:
    """Seconds of the clock that all processes share, and CPU seconds of this one."""
    return time.monotonic(), time.process_time()
