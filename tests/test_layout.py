"""FileLayout against the files that the safetensors library writes, byte for byte in length."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from para_ext.errors import ParaError
from para_ext.layout import DTYPE_BITS, FileLayout, Slot

deterministic = settings(derandomize=True, deadline=None, database=None, max_examples=150)

# Older torch lacks the last few.
TORCH_NAMES = {
    "U64": "uint64", "I64": "int64", "F64": "float64", "C64": "complex64", "F32": "float32", "U32": "uint32",
    "I32": "int32", "BF16": "bfloat16", "F16": "float16", "U16": "uint16", "I16": "int16", "I8": "int8", "U8": "uint8",
    "BOOL": "bool", "F8_E5M2": "float8_e5m2", "F8_E4M3": "float8_e4m3fn", "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E8M0": "float8_e8m0fnu", "F4": "float4_e2m1fn_x2",
}  # fmt: skip
TORCH_DTYPES = {code: getattr(torch, name) for code, name in TORCH_NAMES.items() if hasattr(torch, name)}


def written(layout: FileLayout, ranks: dict[str, int]) -> int:
    """The length of the file that the library writes for this layout."""
    tensors = {}
    for slot in layout.slots:
        rank = 1 if slot.module is None else ranks[slot.module]
        if rank > 0:
            shape = list(slot.shape)
            if slot.rank_axis is not None:
                shape[slot.rank_axis] *= rank
            if slot.dtype == "F4":  # torch stores two of them in one element
                shape[-1] //= 2
            tensors[slot.key] = torch.empty(shape, dtype=TORCH_DTYPES[slot.dtype])
    return len(save(tensors, None if layout.metadata is None else dict(layout.metadata)))


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(
    ['"', "\\", "\x00", "\x1f\x7f", "\n\t", "\u2028", "é", "\U0001f600", "layers.2", "layers.10"]
)
dtypes = st.sampled_from([code for code in TORCH_DTYPES if code != "F4"])
sizes = st.sampled_from([0, 1, 2, 3, 9, 10, 11, 64, 99, 100])


@st.composite
def layouts(draw: st.DrawFn) -> FileLayout:
    modules = st.sampled_from(["a", "b", "c"])
    slots = []
    for key in draw(st.lists(texts.filter(lambda text: text != "__metadata__"), unique=True, max_size=10)):
        shape = tuple(draw(st.lists(sizes, max_size=3)))
        axis = draw(st.none() | st.integers(0, len(shape) - 1)) if shape else None
        module = draw(modules if axis is not None else st.none() | modules)
        slots.append(Slot(key, draw(dtypes), shape, axis, module))
    return FileLayout(tuple(slots), draw(st.none() | st.dictionaries(texts, texts, max_size=3)))


rank_choices = st.fixed_dictionaries({name: st.integers(0, 12) for name in "abc"})


@deterministic
@given(layouts(), rank_choices)
def test_bytes_are_those_of_the_written_file(layout: FileLayout, ranks: dict[str, int]) -> None:
    assert layout.bytes(ranks) == written(layout, ranks)


@deterministic
@given(layouts(), rank_choices, st.sampled_from("abc"))
def test_bytes_never_fall_with_a_rank(layout: FileLayout, ranks: dict[str, int], grown: str) -> None:
    assert layout.bytes(ranks) <= layout.bytes({**ranks, grown: ranks[grown] + 1})


def test_every_dtype_has_the_place_the_writer_gives_it() -> None:
    """Only the order decides how many digits the offsets take, so each pair of dtypes is tried with unequal sizes."""
    for wide in TORCH_DTYPES:
        for narrow in TORCH_DTYPES:
            for ours, theirs in ((2, 3000), (3000, 2)):
                layout = FileLayout((Slot("a", wide, (ours,)), Slot("b", narrow, (theirs,)), Slot("c", wide, (2,))))
                assert layout.bytes({}) == written(layout, {}), (wide, narrow)


def test_dtype_table_is_the_one_tested() -> None:
    assert set(DTYPE_BITS) == set(TORCH_NAMES)


def test_module_of_rank_zero_leaves_no_tensor() -> None:
    alpha = Slot("q.alpha", "F32", (), None, "q")
    factors = (Slot("q.down", "BF16", (1, 64), 0, "q"), Slot("q.up", "BF16", (64, 1), 1, "q"))
    head = Slot("head", "F32", (10, 64))
    assert FileLayout((*factors, alpha, head)).bytes({"q": 0}) == FileLayout((head,)).bytes({})
    assert FileLayout((*factors, alpha)).bytes({"q": 0}) == 16


def test_stacked_tensor_has_its_experts_in_each_unit_of_rank() -> None:
    layout = FileLayout((Slot("experts.A", "F32", (8, 5), 0, "e"),), {"format": "pt"})
    assert layout.bytes({"e": 3}) == len(save({"experts.A": torch.zeros(24, 5)}, {"format": "pt"}))


@deterministic
@given(layouts())
def test_json_round_trip(layout: FileLayout) -> None:
    assert FileLayout.from_dict(json.loads(json.dumps(layout.to_dict()))) == layout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("__metadata__", "F32", (1,)), "__metadata__"),
        (("\ud800", "F32", (1,)), "rename the tensor"),
        (("t", "F31", (1,)), "'t' has dtype 'F31'"),
        (("t", "F32", (-1,)), "'t' has shape"),
        (("t", "F32", (1,), 1, "m"), "'t' has rank_axis 1"),
        (("t", "F32", (1,), -1, "m"), "'t' has rank_axis -1"),
        (("t", "F32", (1,), 0, None), "'t' has rank_axis 0"),
    ],
)
def test_impossible_slots_are_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ParaError, match=message):
        Slot(*arguments)


def test_impossible_layouts_are_refused() -> None:
    slot = Slot("t", "F32", (1,))
    with pytest.raises(ParaError, match="'t' is given twice"):
        FileLayout((slot, slot))
    with pytest.raises(ParaError, match="metadata 'k'"):
        FileLayout((slot,), {"k": "\udfff"})


SLOT: dict[str, Any] = {"key": "t", "dtype": "F32", "shape": [1, 2], "rank_axis": 0, "module": "m"}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ([], "'slots' is missing"),
        ({"metadata": None}, "'slots' is missing"),
        ({"slots": []}, "'metadata' is missing"),
        ({"slots": [], "metadata": {"a": 1}}, "'metadata' holds"),
        ({"slots": {}, "metadata": None}, "'slots' is"),
        ({"slots": [3], "metadata": None}, "'shape' is missing"),
        *(
            ({"slots": [{**SLOT, field: wrong}], "metadata": None}, field)
            for field, wrong in (
                ("key", 1), ("key", None), ("dtype", "F33"), ("dtype", 4), ("shape", "12"), ("shape", [True]),
                ("shape", [1.0]), ("shape", [2**80]), ("rank_axis", 2), ("rank_axis", True), ("module", 7),
            )
        ),
    ],
)  # fmt: skip
def test_untrusted_records_are_refused_by_field(record: Any, message: str) -> None:
    assert FileLayout.from_dict({"slots": [SLOT], "metadata": None}).bytes({"m": 2}) > 8
    with pytest.raises(ParaError, match=message):
        FileLayout.from_dict(record)
