"""The wire format: packed states come back bit for bit, and what does not fit its manifest is refused by name."""

from __future__ import annotations

import json

import pytest
import torch
from flwr.app import Array, ArrayRecord

from fedpeft.errors import RunError
from fedpeft.packing import pack_state, unpack_state
from fedpeft.state import AdaptedLayer, AdapterState, StateMismatch, from_dict, to_dict
from fedpeft.strategies.flower_api import Named, named_site


def bits(value: torch.Tensor) -> bytes:
    return value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def lora(dtype: torch.dtype = torch.float32, rank: int = 2) -> AdapterState:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "layer/A": torch.randn(rank, 5, generator=generator).to(dtype),
        "layer/B": torch.randn(3, rank, generator=generator).to(dtype),
        "head/weight": torch.randn(4, 3, generator=generator).to(dtype),
    }
    return AdapterState(tensors, {"layer": AdaptedLayer("lora", (3, 5), 2.0), "head": AdaptedLayer("head", (4, 3))})


def assert_same_bits(left: AdapterState, right: AdapterState) -> None:
    assert list(left.tensors) == list(right.tensors)
    for key, value in left.tensors.items():
        assert (right[key].dtype, right[key].shape) == (value.dtype, value.shape), key
        assert bits(right[key]) == bits(value), key


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool]
)
def test_one_dtype_round_trips_bit_for_bit(dtype):
    state = lora(dtype)
    array, manifest = pack_state(state)
    back = unpack_state(array, manifest)
    assert_same_bits(state, back)
    assert back.sites == state.sites


def test_special_values_keep_their_bits():
    values = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 1e-45])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        state = AdapterState({"x/A": values.to(dtype)})
        assert_same_bits(state, unpack_state(*pack_state(state)))


def test_one_dtype_is_one_array_of_that_dtype():
    assert pack_state(lora(torch.float32))[0].dtype == "float32"
    assert pack_state(lora(torch.bfloat16))[0].dtype == "int16"  # numpy has no bfloat16
    assert pack_state(lora())[0].shape == (lora().parameters,)


def test_mixed_dtypes_scalars_and_empty_tensors_round_trip():
    state = AdapterState(
        {
            "a/step": torch.tensor(7, dtype=torch.int64),
            "b/scalar": torch.tensor(1.5, dtype=torch.bfloat16),
            "c/empty": torch.empty(0, 4),
            "d/mask": torch.tensor([True, False, True]),
            "e/half": torch.tensor([[0.1], [0.2]], dtype=torch.float16),
            "f/column": torch.arange(6.0).reshape(2, 3).T,  # not contiguous
        }
    )
    assert_same_bits(state, unpack_state(*pack_state(state)))


def test_scalars_and_empty_tensors_of_one_dtype_round_trip():
    state = AdapterState({"a/x": torch.tensor(2.5), "b/y": torch.empty(3, 0), "c/z": torch.ones(1)})
    assert_same_bits(state, unpack_state(*pack_state(state)))
    nothing = AdapterState({}, {"layer": AdaptedLayer("lora", (3, 5), 2.0)})
    assert unpack_state(*pack_state(nothing)) == nothing


def test_unpacked_tensors_do_not_share_memory_with_the_message():
    array, manifest = pack_state(lora())
    back = unpack_state(array, manifest)
    back["layer/A"].zero_()
    assert torch.equal(unpack_state(array, manifest)["layer/A"], lora()["layer/A"])


def test_a_read_only_array_is_accepted():
    array, manifest = pack_state(lora())
    array.flags.writeable = False
    assert_same_bits(lora(), unpack_state(array, manifest))


@pytest.mark.parametrize("change", [lambda array: array[:-1], lambda array: array[:0], lambda array: array.repeat(2)])
def test_an_array_of_another_size_is_refused(change):
    array, manifest = pack_state(lora())
    with pytest.raises(StateMismatch, match=r"array has \d+ bytes, its manifest describes \d+"):
        unpack_state(change(array), manifest)


def with_entry(entry: list) -> str:
    manifest = json.loads(pack_state(lora())[1])
    manifest["tensors"][0] = entry
    return json.dumps(manifest)


@pytest.mark.parametrize(
    "manifest",
    [
        "",
        "not json",
        "[]",
        "{}",
        "3",
        '{"tensors": []}',
        '{"tensors": [["a"]], "sites": {}}',
        '{"tensors": 3, "sites": {}}',
        '{"tensors": [], "sites": {"x": {"kind": "lora"}}}',
        '{"tensors": [], "sites": []}',
        with_entry(["layer/A", "float31", [2, 5]]),
        with_entry(["layer/A", "float32", ["two", 5]]),
        with_entry(["layer/A", "float32", [-2, -5]]),
        with_entry(["layer/A", "float32", 10]),
    ],
)
def test_a_malformed_manifest_is_refused(manifest):
    with pytest.raises(StateMismatch, match="manifest"):
        unpack_state(pack_state(lora())[0], manifest)


def test_form_names_missing_and_extra_tensors():
    full = lora()
    with pytest.raises(StateMismatch, match=r"reply: missing layer/B; unexpected nothing"):
        full.require_same_form(full.without(("B",)), "reply")
    with pytest.raises(StateMismatch, match=r"missing nothing; unexpected layer/C"):
        full.require_same_form(full.replace({"layer/C": torch.zeros(1)}), "reply")
    many = AdapterState({f"s{index}/A": torch.zeros(1) for index in range(9)})
    with pytest.raises(StateMismatch, match=r"s0/A, s1/A, s2/A and 6 more"):
        many.require_same_form(AdapterState({}), "reply")


def test_form_names_shapes_and_dtypes():
    with pytest.raises(StateMismatch, match=r"layer/A has shape \[3, 5\], expected \[2, 5\]"):
        lora(rank=2).require_same_form(lora(rank=3), "reply")
    with pytest.raises(StateMismatch, match=r"dtype torch\.float64, expected torch\.float32"):
        lora().require_same_form(lora(torch.float64), "reply")
    lora().require_same_form(lora().map(lambda value: value + 1), "reply")


def test_roles():
    state = AdapterState(
        {"layer/A": torch.zeros(1), "head/weight": torch.zeros(1)},
        {"layer": AdaptedLayer("lora"), "head": AdaptedLayer("head")},
    )
    assert {key: state.role(key) for key in state.tensors} == {"layer/A": "A", "head/weight": "head"}
    assert list(state.select(("A",)).tensors) == ["layer/A"]
    assert list(state.without(("A",)).tensors) == ["head/weight"]
    assert state.select(("A",)).sites == state.sites


def test_what_travels_beside_is_packed_hashed_and_checked_but_is_no_adapter():
    plain, extra = lora(), {"control:layer/A": torch.full((2, 5), 7.0), "mean": torch.ones(3, dtype=torch.float64)}
    state = plain.beside(extra)
    array, manifest = pack_state(state)
    back = unpack_state(array, manifest)
    assert back.sha256() == state.sha256() != plain.sha256() and list(back.extra) == ["control:layer/A", "mean"]
    assert back.extra["mean"].dtype == torch.float64 and back.tensors.keys() == plain.tensors.keys()
    assert state.distance(plain) == 0.0 and state.parameters == plain.parameters
    assert state.nbytes == plain.nbytes + 40 + 24 == array.nbytes
    for changed in (state.select(("A",)), state.without(("A",)), state.map(lambda value: value * 2), state.clone()):
        assert changed.extra.keys() == extra.keys() and torch.equal(changed.extra["mean"], extra["mean"])
    with pytest.raises(StateMismatch, match="unexpected extra control:layer/A"):
        plain.require_same_form(state, "reply")
    with pytest.raises(StateMismatch, match="extra mean has dtype"):
        state.require_same_form(state.beside({"mean": torch.ones(3)}), "reply")


def test_hash_sees_names_bits_dtypes_and_shapes_only():
    state = lora()
    assert state.sha256() == lora().sha256()
    shuffled = AdapterState(dict(reversed(list(state.tensors.items()))), state.sites)
    assert shuffled.sha256() == state.sha256()
    bumped = state.replace({"layer/A": state["layer/A"].nextafter(torch.tensor(9.0))})
    renamed = AdapterState({key.replace("layer", "other"): value for key, value in state.tensors.items()}, state.sites)
    flat = state.replace({"layer/A": state["layer/A"].reshape(5, 2)})
    as_int = state.replace({"layer/A": state["layer/A"].view(torch.int32)})
    assert len({other.sha256() for other in (state, bumped, renamed, flat, as_int)}) == 5


def test_distance_is_euclidean_over_the_tensors_of_the_left():
    left = AdapterState({"a/A": torch.tensor([3.0, 0.0]), "b/B": torch.tensor([[1.0]])})
    right = AdapterState({"a/A": torch.tensor([0.0, 4.0]), "b/B": torch.tensor([[13.0]]), "c/C": torch.ones(1)})
    assert left.distance(right) == pytest.approx(13.0)
    assert left.distance(left) == 0.0


def test_sites_to_json_and_back():
    state = lora()
    back = from_dict(state.tensors, json.loads(json.dumps(to_dict(state))))
    assert back.sites == state.sites
    assert_same_bits(state, back)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("base_model.model.vit.q_proj.lora_A.default.weight", ("vit.q_proj", "A")),
        ("base_model.model.vit.q_proj.lora_B.weight", ("vit.q_proj", "B")),
        ("base_model.model.vit.layers.0.q_proj.lora_B.default.weight", ("vit.layers.0.q_proj", "B")),
        ("base_model.model.classifier.modules_to_save.default.weight", ("classifier", "weight")),
        ("base_model.model.classifier.weight", ("classifier", "weight")),
        ("q.lora_A.weight", ("q", "A")),
    ],
)
def test_named_site(name, expected):
    assert named_site(name) == expected


NAMES = {
    "base_model.model.q.lora_A.weight": torch.arange(8.0).reshape(2, 4),
    "base_model.model.q.lora_B.weight": torch.arange(6.0).reshape(3, 2),
    "base_model.model.classifier.weight": torch.full((2, 3), 0.5),
}


def record(tensors: dict[str, torch.Tensor]) -> ArrayRecord:
    return ArrayRecord({name: Array(value.numpy()) for name, value in tensors.items()})


def test_named_codec_round_trip():
    codec, adapter = Named.of(record(NAMES), {})
    assert list(adapter.tensors) == ["classifier/weight", "q/A", "q/B"]
    assert adapter.sites["q"].shape == (3, 4)
    assert adapter.role("classifier/weight") == "head"
    back = codec.arrays(adapter)
    assert set(back) == set(NAMES)
    for name, value in NAMES.items():
        assert torch.equal(torch.from_numpy(back[name].numpy()), value)


def test_named_codec_refuses_what_is_not_lora():
    with pytest.raises(RunError, match="no partner"):
        Named.of(record({name: value for name, value in NAMES.items() if "lora_B" not in name}), {})
    with pytest.raises(RunError, match="no lora_A / lora_B"):
        Named.of(record({"classifier.weight": torch.zeros(2, 3)}), {})
