"""Tuners of peft by names of their own: `adapter=ia3` is `adapter.name=peft adapter.type=IA3`, and is written so."""

from __future__ import annotations

from typing import Any

# Name -> peft's type, and options of it that make the name.
SHORT: dict[str, tuple[str, dict[str, Any]]] = {
    "dora": ("LORA", {"use_dora": True}),
    "pissa": ("LORA", {"init_lora_weights": "pissa"}),
    "olora": ("LORA", {"init_lora_weights": "olora"}),
    "mica": ("LORA", {"init_lora_weights": "mica"}),
    **{
        name: (name.upper(), {})
        for name in (
            *("ia3", "vera", "loha", "lokr", "boft", "hra", "miss", "randlora", "fourierft", "waveft", "c3a", "shira"),
            *(
                "unilora",
                "ln_tuning",
                "trainable_tokens",
                "osf",
                "beft",
                "road",
                "hira",
                "delora",
                "gralora",
                "tinylora",
            ),
        )
    },
}


def expand_name(section: dict[str, Any]) -> dict[str, Any]:
    """The section `adapter` with a short name written out; options that are given come after those of the name.

    >>> expand_name({"name": "dora", "options": {"r": 4}})
    {'name': 'peft', 'options': {'use_dora': True, 'r': 4}, 'type': 'LORA'}
    """
    if section.get("name") not in SHORT or not isinstance(section.get("options", {}), dict):
        return section
    kind, options = SHORT[section["name"]]
    return {**section, "name": "peft", "options": {**options, **section.get("options", {})}, "type": kind}
