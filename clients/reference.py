"""What a model says of records before it is trained, as their labels: what an objective compares it with later.

The passes are taken once, where the records are read: in a simulation of all of them, at a site of its own. Records are
taken in an order and in batches that hang on the records alone, so that a resumed run has the same numbers. Where they
are long work, what they say is kept in the cache of the data, for a simulation's worker processes and for later runs,
under all that it hangs on: the tokens themselves (and so tokenizer, template and length), which records, the base's
weights and settings, the adapter that the model begins with, the device, and the code.
"""

from __future__ import annotations

import copy
import hashlib
import json
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedpeft import progress
from fedpeft.adapters.adapted import Adapted
from fedpeft.clients.train import EVALUATED, on_device, scored_tokens
from fedpeft.config import Config
from fedpeft.data.cache import Cache, hash_code, hash_facts
from fedpeft.data.encode import Encoded
from fedpeft.data.ragged import cut_runs
from fedpeft.data.stored import Tokens
from fedpeft.models import agreement
from fedpeft.models.loading import fingerprint

TOGETHER = 64  # records of a pass
COSTLY = 1e11  # operations of all passes below which they take less than a second or two
VALUES = "values"
LIBRARIES = ("torch", "transformers", "peft")
PACKAGES = ("adapters", "models", "objectives")  # of fedpeft, whose code a pass runs through


def with_reference(config: Config, model: Adapted, data: Encoded, cache: Cache | None = None) -> Encoded:
    """The same records; where the objective compares with a reference, with its scores as their labels.

    Args:
        model: as the run begins, with the adapter of `adapter.start` if there is one.
        cache: where scores are kept for other processes and later runs; None keeps none.
    """
    objective = model.base.objective
    if not objective.referred:
        return data
    begun = model.state()
    if config.adapter.start is not None and objective.config.reference == "base":
        model.write(begun.map(torch.zeros_like))  # plain LoRA, whose product is then zero; a fresh one's is
    stored = data.stored
    assert isinstance(stored, Tokens)
    try:
        labels = _score_cached(config, model, data, stored, cache)
    finally:
        model.write(begun)
    scored = copy.copy(data)
    scored.stored = Tokens(stored.columns, stored.fillers, labels)
    return scored


def _score_cached(config: Config, model: Adapted, data: Encoded, stored: Tokens, cache: Cache | None) -> Tensor:
    """What `_score_records` says, from the cache if it was said before."""
    if cache is None or (cache.least and _count_operations(model, data) < COSTLY):
        return _score_records(model, data)
    form = stored.labels_of(None)

    def make(folder: Path) -> dict[str, Any]:
        values = _score_records(model, data).numpy()
        (folder / VALUES).write_bytes(values.tobytes())
        return {}

    kept = cache.get("references", _facts_of_scores(config, model, data, stored), make)
    if kept is None:
        return _score_records(model, data)
    values = np.fromfile(kept[0] / VALUES, dtype=form.numpy().dtype)
    return torch.from_numpy(values.reshape(form.shape))


def _count_operations(model: Adapted, data: Encoded) -> float:
    """About how many operations the passes take: two for each weight and token."""
    weights = sum(value.numel() for value in model.base.backbone.parameters())
    return 2.0 * weights * float(data.lengths.sum())


def _facts_of_scores(config: Config, model: Adapted, data: Encoded, stored: Tokens) -> dict[str, Any]:
    """All that the scores hang on, as JSON has it."""
    backbone: Any = model.base.backbone
    settings = {key: str(value) for key, value in backbone.config.to_dict().items() if key != "_name_or_path"}
    columns = {
        name: column if isinstance(column, int) else _hash_facts(column.values, column.ends)
        for name, column in stored.columns.items()
    }
    state = model.state()
    package = Path(agreement.__file__).parents[1]
    files = [path for name in PACKAGES for path in sorted((package / name).rglob("*.py"))]
    return {
        "tokens": [columns, dict(stored.fillers), str(stored.labels_of(None).dtype)],
        "records": _hash_facts(data.rows, data.teaching()),
        "base": [fingerprint(model.base, heads=True), settings, config.model.dtype, config.model.quantization],
        "adapter": [
            {key: _hash_facts(value.float().numpy()) for key, value in sorted(state.tensors.items())},
            {name: str(site) for name, site in sorted(state.sites.items())},
            json.dumps(model.folder, sort_keys=True, default=str),
            config.adapter.name,
        ],
        "device": next(iter(model.parameters.values())).device.type,
        "code": [
            *hash_code(type(model.base.objective)),
            hash_facts([_hash_file(path) for path in (*files, Path(__file__))]),
        ],
        "libraries": [metadata.version(library) for library in LIBRARIES],
    }


def _hash_facts(*arrays: np.ndarray) -> str:
    found = hashlib.sha256()
    for array in arrays:
        found.update(f"{array.dtype}{array.shape}".encode())
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()


def _hash_file(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@torch.no_grad()
def _score_records(model: Adapted, data: Encoded) -> Tensor:
    """The model's scores of all records of the storage, NaN where nothing can be learned, the model cannot take it, or
    `data` has not the record.
    """
    stored = data.stored
    device = next(iter(model.parameters.values())).device
    model.base.backbone.eval()
    teaching = np.intersect1d(data.teaching(), _find_known(model, data))
    # The longest first: what does not fit into memory is found out at once.
    order = teaching[np.argsort(-data.lengths[teaching], kind="stable")]
    labels = torch.full_like(stored.labels_of(None), torch.nan)
    done = 0
    for places in cut_runs(data.lengths[order], TOGETHER, scored_tokens(model, EVALUATED)):
        inputs, _ = on_device(data, order[places], device)
        labels[data.rows[order[places]]] = model.logits(inputs).cpu().to(labels.dtype)
        done += len(places)
        progress.step("records", done, len(order))
    return labels


def _find_known(model: Adapted, data: Encoded) -> np.ndarray:
    """Numbers of the records whose tokens the model knows, which are all but at a private site: there one that it does
    not know must change nothing for the others (`inputs.find_usable`), so it is no error here either.
    """
    words = agreement.rows_of(model.base.backbone)
    if words is None:
        return np.arange(len(data))
    each = [(block.inputs["input_ids"] < words).all(1).numpy() for block in data.blocks()]
    return np.flatnonzero(np.concatenate(each)) if each else np.arange(0)
