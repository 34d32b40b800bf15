"""What `torch.save` wrote is looked into: the very types and shapes, and nothing that torch would have to make up."""

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from coe_megatron.checkpoint.torch_file_check import STORED_DTYPES, SavedTensor, inspect_saved, rng_states_problem


def saved(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def looked_into(content: bytes, before: bytes = b"", after: bytes = b"") -> Any:
    return inspect_saved(io.BytesIO(before + content + after), len(content), len(before))


@pytest.mark.parametrize("dtype", STORED_DTYPES.values(), ids=str)
def test_a_tensor_is_seen_as_it_is(dtype: torch.dtype) -> None:
    """Also in the midst of a file, as parts of tensors lie; a scalar, an empty one and a view as well."""
    for sizes in ((), (3,), (4, 0), (2, 30_000)):
        content = saved(torch.zeros(sizes, dtype=dtype))
        assert looked_into(content, b"x" * 99, b"y" * 99) == SavedTensor(dtype, torch.Size(sizes))
    assert looked_into(saved(torch.zeros(8, 8, dtype=dtype)[::2].t())) == SavedTensor(dtype, torch.Size([8, 4]))


def test_dicts_of_tensors_are_seen() -> None:
    assert looked_into(saved({})) == {}
    vector = SavedTensor(torch.uint8, torch.Size([5]))
    assert looked_into(saved({"cpu": torch.zeros(5, dtype=torch.uint8), "b": torch.zeros(5).byte()})) == {
        "cpu": vector,
        "b": vector,
    }


def archive(pickled: bytes, compression: int = zipfile.ZIP_STORED, **more: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as made:
        for name, content in {"data.pkl": pickled, "byteorder": b"little", "version": b"3\n", **more}.items():
            made.writestr(f"archive/{name}", content)
    return file.getvalue()


def rewritten(old: bytes, new: bytes) -> bytes:
    """A saved tensor of 4 numbers with something else in its pickle."""
    with zipfile.ZipFile(io.BytesIO(saved(torch.zeros(4)))) as read:
        pickled = read.read("archive/data.pkl")
    assert old in pickled
    return archive(pickled.replace(old, new), **{"data/0": bytes(16)})


TENSOR = saved(torch.zeros(4))
REFUSED = {
    "nothing": b"",
    "noise": bytes(range(256)) * 50,
    "a pickle alone": pickle.dumps({}),
    "cut": TENSOR[:-1],
    "something before it": b"x" + TENSOR,
    "compressed: 100 MB in 100 kB": archive(b"\x80\x02}.", zipfile.ZIP_DEFLATED, data=bytes(10**8)),
    "a large pickle": archive(b"\x80\x02" + b"}" * 70_000 + b"."),
    "a long list of entries": archive(b"\x80\x02}.", **{f"data/{number}": b"" for number in range(2_000)}),
    "two entries that torch does not tell apart": archive(b"\x80\x02}.", VERSION=b"3\n"),
    "big-endian": archive(b"\x80\x02}.").replace(b"little", b"bigbig"),
    "a bytearray of 2 GB": archive(b"\x80\x02cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R."),
    "more numbers than bytes": rewritten(b"K\x04", b"K\x05"),
    "a shape beyond its numbers": rewritten(b"K\x04\x85", b"J\xff\xff\xff\x7f\x85"),
    "a negative size": rewritten(b"K\x04\x85", b"J\xff\xff\xff\xff\x85"),
    "another count": rewritten(b"K\x04t", b"K\x03t"),
    "another storage": rewritten(b"FloatStorage", b"DoubleStorage"),
    "bytes that are missing": rewritten(b"\x01\x00\x00\x000", b"\x01\x00\x00\x001"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_torch_would_have_to_make_up_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r".") as raised:
        looked_into(REFUSED[name])
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 300


def test_rewriting_alone_is_not_what_is_refused() -> None:
    assert looked_into(rewritten(b"K\x04t", b"K\x04t")) == SavedTensor(torch.float32, torch.Size([4]))


@pytest.mark.parametrize(
    "states",
    [{}, [], torch.zeros(5056).byte(), {"cpu": torch.zeros(9).byte()}, {"cpu": torch.zeros(5056)}, {"cpu": {}}],
    ids=["none", "a list", "a tensor", "short", "floats", "nested"],
)
def test_states_of_generators_have_a_shape(states: Any, tmp_path: Path) -> None:
    right, wrong = tmp_path / "right.pt", tmp_path / "wrong.pt"
    torch.save({"cpu": torch.get_rng_state(), "cuda": torch.zeros(16).byte()}, right)
    torch.save(states, wrong)
    assert rng_states_problem(right) is None
    assert f"{tmp_path.name}/wrong.pt is damaged: " in str(rng_states_problem(wrong))
