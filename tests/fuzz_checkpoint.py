"""Fuzz target: a run's folder with a checkpoint in it."""

import json
import pickle
from collections.abc import Collection
from pathlib import Path
from typing import Any

import fuzz_values as values
import torch
from fuzz_bounds import Case, attempt
from fuzz_targets import Target, printable
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorProperties, TensorStorageMetadata

from coe_megatron.checkpoint import listing, save_load, storage, tools
from coe_megatron.checkpoint.integrity import MANIFEST, write_manifest


class Checkpoint(Target):
    """A run with a checkpoint: looked at, verified, written anew; its files manifest again or not."""

    names: Collection[str] = ("checkpoint", "run")
    folder = "run/checkpoints/step-00000001"

    def prepare(self, folder: Path) -> None:
        (folder / "secret").write_text("a secret outside the run")
        (folder / "run").mkdir()
        (folder / "run/secret").write_text("a secret outside the checkpoint")
        checkpoint = folder / self.folder
        for name in ("tensors", "random"):
            (checkpoint / name).mkdir(parents=True)
        storage.write(checkpoint / "tensors", _entries(), lambda key, chunk: torch.ones(chunk.sizes, dtype=_dtype(key)))
        torch.save({}, checkpoint / "tensors/common.pt")
        (checkpoint / "tensors/metadata.json").write_text('{"sharded_backend": "torch_dist"}')
        torch.save({"cpu": torch.get_rng_state()}, checkpoint / "random/00000.pt")
        (checkpoint / "state.json").write_text(json.dumps(_SAVED, indent=1))
        write_manifest(checkpoint)
        paths = [path for path in checkpoint.rglob("*") if path.is_file()]
        self.contents = {str(path.relative_to(checkpoint)): path.read_bytes() for path in paths}
        self.names = (*self.names, *self.contents)

    def cases(self) -> st.SearchStrategy[Case]:
        changes = {name: values.damaged(st.just(content)) for name, content in self.contents.items()}
        for name in (MANIFEST, "state.json", "tensors/metadata.json"):
            changes[name] = values.files(
                [self.contents[name]], [json.loads(self.contents[name])], [values.json_indented]
            )
        changes["tensors/.metadata"] = st.one_of(values.damaged(_lists(self.contents["tensors/.metadata"])), PICKLES)
        changes["random/00000.pt"] = st.one_of(changes["random/00000.pt"], PICKLES)
        changes |= {name: st.just(b"") for name in ("extra", "tensors/__9_9.distcp", "random/9.pt", "a\nb")}
        contents = {f"{self.folder}/{name}": values.file_or_not(content) for name, content in changes.items()}
        names = st.lists(st.sampled_from(sorted(contents)), max_size=2, unique=True)
        chosen = names.flatmap(lambda some: st.fixed_dictionaries({name: contents[name] for name in some}))
        return st.builds(Case, chosen, st.fixed_dictionaries({"rewritten": st.booleans()}))

    def act(self, folder: Path, case: Case) -> list[str]:
        run, checkpoint = folder / "run", folder / self.folder
        rewritten = case.options.get("rewritten") and not (checkpoint / MANIFEST).is_symlink()
        manifest = self.contents[MANIFEST] if rewritten else None
        if manifest is not None:
            (checkpoint / MANIFEST).unlink(missing_ok=True)
            write_manifest(checkpoint)
        try:
            return self._use(folder, run, checkpoint)
        finally:
            if manifest is not None:
                (checkpoint / MANIFEST).write_bytes(manifest)

    def _use(self, folder: Path, run: Path, checkpoint: Path) -> list[str]:
        refusals = attempt(lambda: self._look(run)) + attempt(lambda: self._look(checkpoint))
        trouble = listing.problem(checkpoint)
        assert list(tools.verify(run)) == [(checkpoint, trouble)]
        refusals += [trouble] if trouble else []
        refusals += attempt(lambda: self._anew(checkpoint, folder / "anew"))
        if (checkpoint / "random/00000.pt").is_file() and not trouble:
            refusals += attempt(lambda: save_load._load_rng_states(checkpoint / "random/00000.pt"))
        assert not EXECUTED, "what was read has run code"
        return refusals

    def _look(self, source: Path) -> None:
        contents = tools.inspect(source)
        assert printable(contents.table()) and json.dumps(contents.as_dict())

    def _anew(self, checkpoint: Path, out: Path) -> None:
        made = tools.reshard(checkpoint, out, overwrite=True)
        assert listing.problem(made) is None
        secrets = [path for path in made.rglob("*") if path.is_file() and b"a secret" in path.read_bytes()]
        assert not secrets, "a file from outside the checkpoint was copied"


EXECUTED: list[str] = []


def executed(text: str) -> None:
    """What a pickle calls that runs code."""
    EXECUTED.append(text)


_CALL = b"\x80\x02cfuzz_checkpoint\nexecuted\nX\x01\x00\x00\x00x\x85R."
_COUNTS = st.one_of(st.integers(0, 1 << 32 - 1), st.sampled_from([0x0FFFFFFF, 0xFFFFFFFF, 1 << 24]))
_SIZED = b"r X B T \x8a \x8b \x95 \x8e \x8d \x96 h j c".split(b" ")  # opcodes that a number follows
_WHOLE = [_CALL, b"", b"\x80\x04N.", b"(" * 100_000, b"\x80\x04]" + b"]a" * 3000 + b".", b"I" + b"1" * 5000]
PICKLES = st.one_of(
    st.sampled_from(_WHOLE),
    st.builds(
        lambda opcode, count, wide: b"\x80\x04N" + opcode + count.to_bytes(8 if wide else 4, "little") + b"N.",
        st.sampled_from(_SIZED), _COUNTS, st.booleans(),
    ),
)  # fmt: skip
_SAVED = {
    "layout": {"world_size": 1, "tensor": 1, "pipeline": 1, "expert": 1, "expert_tensor": 1, "zero_stage": 1},
    "optimizer_steps": 1,
    "state": {"step": 1, "tokens": 96, "tokenizer": "0" * 64},
}


def _dtype(key: str) -> torch.dtype:
    return torch.float32 if key.startswith(storage.OPTIMIZER) else torch.bfloat16


def _entries() -> dict[str, TensorStorageMetadata]:
    """A weight in two parts and a whole one, with their masters and moments."""
    shapes = {"embedding.weight": [(0, 0), (4, 0)], "norm.weight": [(0, 0)]}
    kinds = ("", storage.MASTER, f"{storage.OPTIMIZER}exp_avg.", f"{storage.OPTIMIZER}exp_avg_sq.")
    size = torch.Size((4, 6))
    return {
        kind + key: TensorStorageMetadata(
            TensorProperties(_dtype(kind + key)),
            torch.Size((4 * len(parts), 6)),
            [ChunkStorageMetadata(torch.Size(offsets), size) for offsets in parts],
        )
        for key, parts in shapes.items()
        for kind in kinds
    }


@st.composite
def _lists(draw: st.DrawFn, seed: bytes) -> bytes:
    """A list of tensors, valid as a pickle, with other sizes, types and places."""
    found = pickle.loads(seed)
    for what, place, value, number in draw(st.lists(_LIST_CHANGES, max_size=2)):
        try:
            _change_list(found, what, place, value, number)
        except (TypeError, ValueError, OverflowError, AttributeError):  # no tensor can be so, or an earlier change
            continue
    return pickle.dumps(found)


_LIST_CHANGES = st.tuples(
    st.sampled_from(("size", "sizes", "offsets", "dtype", "key", "file", "offset", "length", "chunks", "attribute")),
    values.PLACES,
    values.ANYTHING,
    st.sampled_from([0, 1, -1, 3, 5, 2**20, 2**31, 2**40, 2**62]),
)


def _change_list(found: Any, what: str, place: int, value: Any, number: int) -> None:
    entries, stored = found.state_dict_metadata, found.storage_data
    key = sorted(entries)[values.scaled(place, len(entries))]
    info = list(stored.values())[values.scaled(place, len(stored))]
    entry = entries[key]
    match what:
        case "size":
            entry.size = torch.Size([number, 6])
        case "sizes" | "offsets":
            object.__setattr__(entry.chunks[0], what, torch.Size([number, *entry.chunks[0].sizes[1 + place % 2 :]]))
        case "dtype":
            entry.properties.dtype = [torch.int8, torch.complex128, torch.float8_e4m3fn, torch.quint8][place % 4]
        case "key":
            entries[value] = entries.pop(key)
        case "file":
            info.relative_path = value
        case "offset" | "length":
            setattr(info, what, number)
        case "chunks":
            entry.chunks = entry.chunks * (number % 7) if place % 2 else value
        case "attribute":
            setattr(found, ("planner_data", "storage_meta", "version", "storage_data")[place % 4], value)
