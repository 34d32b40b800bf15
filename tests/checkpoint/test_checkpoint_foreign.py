"""Checkpoints from elsewhere, each vouched for by a list that fits it: every command says in one line what is wrong."""

import json
import os
import pickle
import resource
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_build import WEIGHT, make_checkpoint, rewrite_manifest
from rights import as_nobody
from torch.distributed.checkpoint.metadata import Metadata, TensorProperties

from coe_megatron.checkpoint import listing, tools
from coe_megatron.checkpoint.integrity import MANIFEST, manifest_text
from coe_megatron.checkpoint.metadata import CheckpointMetadata
from coe_megatron.checkpoint.names import name_of
from coe_megatron.checkpoint.storage import Reader
from coe_megatron.checkpoint.tensor_index import TensorIndex
from coe_megatron.errors import ConfigError

Change = Callable[[Path], Any]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints."""
    folder = tmp_path_factory.mktemp("whole")
    for step in (1, 2):
        make_checkpoint(folder, step)
    return folder


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "run")


def test_a_whole_one_is_whole(run: Path) -> None:
    """Also by a link, and in another folder."""
    os.symlink(run / name_of(2), run.parent / "link")
    assert listing.problem(run.parent / "link") is None
    out = tools.reshard(run.parent / "link", run.parent / "out", files=10**9)
    assert listing.problem(out) is None
    assert len(list((out / "tensors").glob("*.distcp"))) == 4, "not more files than parts"
    assert tools.average([run / name_of(step) for step in (1, 2)], run.parent / "mean")
    mean = Reader(run.parent / "mean" / "tensors")
    assert mean.part(WEIGHT, mean.entries[WEIGHT].chunks[0]).unique().tolist() == [1.5]


def text(name: str, content: str) -> Change:
    return lambda checkpoint: (checkpoint / name).write_text(content)


def facts(**changes: Any) -> Change:
    """Changes in `state.json`, those with a dot in its `state`."""

    def change(checkpoint: Path) -> None:
        found = json.loads((checkpoint / "state.json").read_text())
        for name, value in changes.items():
            (found["state"] if name in STATE else found)[name] = value
        (checkpoint / "state.json").write_text(json.dumps(found))

    return change


def overflow(checkpoint: Path, old: str, new: str) -> None:
    """As no writer of JSON writes it."""
    path = checkpoint / "state.json"
    path.write_text(path.read_text().replace(old, new))


STATE = ("step", "tokens", "losses", "consecutive_skips", "rollbacks", "tokenizer", "skipped_steps")


def metadata(spoil: Callable[[Metadata], Any]) -> Change:
    def change(checkpoint: Path) -> None:
        found = Reader(checkpoint / "tensors").read_metadata()
        spoil(found)
        (checkpoint / "tensors" / ".metadata").write_bytes(pickle.dumps(found))

    return change


def place(**changes: Any) -> Change:
    """Where the first part lies."""
    return metadata(lambda found: vars(next(iter(found.storage_data.values()))).update(changes))


def chunk(number: int, **changes: tuple[int, ...]) -> Change:
    """One of the two parts of the weight."""
    sizes = {name: torch.Size(value) for name, value in changes.items()}
    return metadata(lambda found: vars(found.state_dict_metadata[WEIGHT].chunks[number]).update(sizes))


def entry(**changes: Any) -> Change:
    return metadata(lambda found: vars(found.state_dict_metadata[WEIGHT]).update(changes))


def cut(checkpoint: Path) -> None:
    path = checkpoint / "tensors" / "__0_0.distcp"
    os.truncate(path, path.stat().st_size - 20_000)


def sparse(name: str, size: int) -> Change:
    return lambda checkpoint: os.truncate(checkpoint / name, size)


LARGE = 70_000_000
GAP = "have gaps, overlap, or have another shape"
# What was changed before the list of files was made anew, and what is said.
VOUCHED: dict[str, tuple[Change, str]] = {
    "state nested 100 deep": (text("state.json", '{"layout": ' + "[" * 100 + "]" * 100 + "}"), "state.json cannot be"),
    "state nested 100,000 deep": (text("state.json", "[" * 100_000), "state.json cannot be read: it is nested too"),
    "state of 2 MB": (text("state.json", "[" + "[]," * 700_000 + "[]]"), "state.json is "),
    "state is a list": (text("state.json", "[1]"), "state.json is invalid: top level"),
    "state is empty": (text("state.json", ""), "state.json cannot be read"),
    "a layout without a field": (facts(layout={"world_size": 1}), "state.json is invalid: layout.tensor"),
    "ranks that are none": (facts(layout=[]), "state.json is invalid: layout"),
    "many ranks": (
        facts(layout={"world_size": 10**9, "zero_stage": 1, **dict.fromkeys(("tensor", "pipeline", "expert"), 1)}),
        "state.json is invalid: layout.expert_tensor",
    ),
    "a step that is text": (facts(step="\x1b[31m4"), "state.json is invalid: step"),
    "a negative step": (facts(step=-1), "state.json is invalid: step"),
    "a huge step": (facts(step=10**400), "state.json is invalid: step"),
    "a step that is true": (facts(step=True), "state.json is invalid: step"),
    "a step that is NaN": (facts(step=float("nan")), "state.json cannot be read: NaN is not valid JSON"),
    "an extra number that overflows": (
        lambda checkpoint: overflow(checkpoint, '"tokens"', '"extra": 1e400, "tokens"'),
        "state.json cannot be read: 1e400 is too large for a number",
    ),
    "a roll-back with a number that overflows": (
        lambda checkpoint: overflow(checkpoint, '"tokens"', '"rollbacks": [{"losses": [-1e400]}], "tokens"'),
        "state.json cannot be read: -1e400 is too large for a number",
    ),
    "losses that are none": (facts(losses=["x"]), "state.json is invalid: losses.0"),
    "roll-backs that are none": (facts(rollbacks=[3]), "state.json is invalid: rollbacks.0"),
    "a key of control characters": (facts(**{"\x1b[31m\n": 1}), "is invalid: \\x1b[31m\\n"),
    "a list of tensors cut short": (sparse("tensors/.metadata", 100), "tensors/.metadata is not a tensor index"),
    "a large list of tensors": (sparse("tensors/.metadata", LARGE), "tensors/.metadata "),
    "a memo of 64 GB": (text("tensors/.metadata", "Nr\x7f\x7f\x7f\x7f."), "tensors/.metadata is not a tensor index"),
    "no tensors": (
        metadata(lambda found: (found.state_dict_metadata.clear(), found.storage_data.clear())),
        "it lists no tensors",
    ),
    "a part nowhere": (metadata(lambda found: found.storage_data.popitem()), "has no location"),
    "a part of no tensor": (metadata(lambda found: found.state_dict_metadata.popitem()), "or parts of unlisted ones"),
    "a part in another folder": (place(relative_path="../state.json"), "needs the file ../state.json"),
    "a part in another file": (place(relative_path="__9_9.distcp"), "__9_9.distcp, which is missing"),
    "a part beyond its file": (place(offset=10**15), "__0_0.distcp, which is too short"),
    "a part before its file": (place(offset=-1), "__0_0.distcp, which is too short"),
    "a part of negative length": (place(length=-5), "__0_0.distcp, which is too short"),
    "a part at half a byte": (place(offset=0.5), "is not a pickle of plain data"),
    "a part that is cut": (cut, "__0_0.distcp, which is too short"),
    "a part of 10^15 numbers": (
        metadata(
            lambda found: (
                vars(found.state_dict_metadata[WEIGHT]).update(size=torch.Size([4, 10**15])),
                [vars(each).update(sizes=torch.Size([2, 10**15])) for each in found.state_dict_metadata[WEIGHT].chunks],
            )
        ),
        "__0_0.distcp, which is too short",
    ),
    "parts that overlap": (chunk(1, offsets=(1, 0)), GAP),
    "parts with a gap": (chunk(1, sizes=(1, 2_000)), GAP),
    "a part of negative size": (
        metadata(lambda f: setattr(f.state_dict_metadata[WEIGHT].chunks[0], "sizes", (-1,))),
        "",
    ),
    "a part of other dimensions": (chunk(0, sizes=(2, 2_000, 1)), GAP),
    "no parts": (entry(chunks=[]), GAP),
    "parts that are none": (entry(chunks=[3]), "is not a pickle of plain data"),
    "a shape that is none": (entry(size=(4, 2_000)), "has invalid fields"),
    "twenty dimensions": (entry(size=torch.Size([1] * 20)), "more than 16 dimensions"),
    "parts of another type": (
        entry(properties=TensorProperties(torch.float16)),
        "is damaged: it has another dtype or shape",
    ),
    "a name of control characters": (
        metadata(
            lambda found: found.state_dict_metadata.update({"\x1b[31m": found.state_dict_metadata.pop(WEIGHT)}),
        ),
        "too long or not printable",
    ),
    "no generators' states": (lambda checkpoint: (checkpoint / "random" / "00000.pt").unlink(), "it holds random"),
    "another rank's states": (
        lambda checkpoint: (checkpoint / "random" / "00000.pt").rename(checkpoint / "random" / "00001.pt"),
        "random/00000.pt is missing",
    ),
    "too many generators' states": (text("random/00001.pt", ""), "random has 2 files, but state.json says 1 ranks"),
    "generators' states that are none": (
        text("random/00000.pt", "x"),
        "random/00000.pt is damaged: it was not",
    ),
    "large generators' states": (sparse("random/00000.pt", LARGE), f"random/00000.pt has {LARGE} bytes"),
    "a common.pt that is none": (text("tensors/common.pt", "x"), "tensors/common.pt is damaged"),
}


@pytest.mark.thorough
@pytest.mark.parametrize("name", VOUCHED)
def test_what_a_list_of_files_vouches_for_is_looked_at_all_the_same(
    name: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, said = VOUCHED[name]
    newest = run / name_of(2)
    change(newest)
    rewrite_manifest(newest)
    require_refused(newest, said, capsys)


def link(name: str) -> Change:
    """What lies there is moved out, and a link leads to it."""

    def change(checkpoint: Path) -> None:
        moved = (checkpoint / name).rename(checkpoint.parents[1] / "moved")
        os.symlink(moved, checkpoint / name)

    return change


def listed(*names: str) -> Change:
    """More files in the manifest, with the right checksum."""

    def change(checkpoint: Path) -> None:
        files = json.loads((checkpoint / MANIFEST).read_text())["files"]
        files |= {name: {"bytes": 1, "sha256": "0" * 64} for name in names}
        (checkpoint / MANIFEST).write_text(manifest_text(files))

    return change


def replaced(make: Change) -> Change:
    return lambda checkpoint: ((checkpoint / MANIFEST).unlink(), make(checkpoint / MANIFEST))


UNLISTED = f", which {MANIFEST} does not list"
# What was changed afterwards, and what is said.
CHANGED: dict[str, tuple[Change, str]] = {
    "a link to a file": (link("random/00000.pt"), "random/00000.pt is a link or"),
    "a link to a folder": (link("random"), "random is a link or"),
    "a link to the tensors": (link("tensors"), "tensors is a link or"),
    "a link to the list": (link(MANIFEST), f"{MANIFEST} is a link or"),
    "a link that leads nowhere": (lambda c: os.symlink("/nowhere", c / "x"), f"it holds x{UNLISTED}"),
    "a file that is not listed": (text("random/99999.pt", "secret"), f"it holds random/99999.pt{UNLISTED}"),
    "a hidden file": (text(".hidden", ""), f"it holds .hidden{UNLISTED}"),
    "control characters": (text("random/\x1b[31m\n", ""), f"it holds random/\\x1b[31m\\n{UNLISTED}"),
    "a name that is no text": (lambda c: open(os.fsencode(c) + b"/\xff", "w").close(), "it holds \\udcff"),
    "a folder that is not listed": (lambda c: (c / "more").mkdir(), f"it holds more{UNLISTED}"),
    "a pipe": (lambda c: os.mkfifo(c / "pipe"), f"it holds pipe{UNLISTED}"),
    "a pipe for a file": (lambda c: ((c / "state.json").unlink(), os.mkfifo(c / "state.json")), "state.json is a link"),
    "a pipe for the list": (replaced(os.mkfifo), f"{MANIFEST} is a link or"),
    "a folder for the list": (replaced(Path.mkdir), f"{MANIFEST} is a link or"),
    "a list nested 100 deep": (text(MANIFEST, "[" * 100 + "]" * 100), f"{MANIFEST} cannot be read: it is nested"),
    "a list nested 100,000 deep": (
        text(MANIFEST, '{"files":' + "[" * 100_000),
        f"{MANIFEST} cannot be read: it is nested",
    ),
    "a list of 10 GB": (sparse(MANIFEST, 10**10), f"{MANIFEST} is "),
    "a list of numbers": (text(MANIFEST, '{"files": {"a": 1}}'), f"{MANIFEST} cannot be read: it is not a list"),
    "a list that is text": (text(MANIFEST, '"files"'), f"{MANIFEST} cannot be read: it is not a list"),
    "a file above": (listed("../x"), f"{MANIFEST} cannot be read: it is not a list"),
    "a file elsewhere": (listed("/etc/passwd"), f"{MANIFEST} cannot be read: it is not a list"),
    "a file deep inside": (listed("a/b/c"), f"{MANIFEST} cannot be read: it is not a list"),
    "itself": (listed(MANIFEST), f"{MANIFEST} cannot be read: it is not a list"),
    "a listed name of control characters": (listed("\x1b[31m"), f"{MANIFEST} cannot be read: it is not a list"),
    "a listed name with a NUL": (listed("a\0b"), f"{MANIFEST} cannot be read: it is not a list"),
    "a listed name of 300 bytes": (listed("x" * 300), "x" * 300 + " is missing"),
    "a list with a file twice": (
        lambda c: (c / MANIFEST).write_text(
            (c / MANIFEST).read_text().replace('"files": {', '"files": {"state.json": {},')
        ),
        f"{MANIFEST} cannot be read: it has",
    ),
}


@pytest.mark.parametrize("name", CHANGED)
def test_a_folder_that_is_not_as_it_was_listed_is_not_used(
    name: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, said = CHANGED[name]
    change(run / name_of(2))
    require_refused(run / name_of(2), said, capsys)


def require_refused(checkpoint: Path, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """By `verify` and in resuming, which takes the one before; by the others, which leave nothing behind."""
    run, out = checkpoint.parent, checkpoint.parents[1] / "out"
    ((_, trouble), (_, older)) = tools.verify(run)
    assert trouble is not None and said in trouble and older is None
    assert "\n" not in trouble and trouble.isprintable() and len(trouble) < 500
    assert listing.latest_complete(run) == run / name_of(1)
    assert capsys.readouterr().err == f"checkpoint {checkpoint} is skipped: {trouble}\n"
    for use in (
        lambda: listing.find(checkpoint),
        lambda: tools.reshard(checkpoint, out),
        lambda: tools.average([run / name_of(1), checkpoint], out),
    ):
        with pytest.raises(ConfigError) as raised:
            use()
        assert said in str(raised.value) and "\n" not in str(raised.value)
    assert not [path for path in out.parent.iterdir() if "out" in path.name]
    try:  # it does not read the tensors, so it may still tell what is there
        shown = tools.inspect(checkpoint).table()
        assert all(line.isprintable() for line in shown.splitlines())
    except ConfigError as error:
        assert said in str(error)


def test_facts_that_could_not_be_read_again_are_not_written(run: Path) -> None:
    saved = CheckpointMetadata.read(run / name_of(2))
    with pytest.raises(ValueError, match="not JSON compliant"):
        replace(saved, state={**saved.state, "extra": float("inf")}).as_json()


def test_what_is_shown_of_a_checkpoint_can_be_shown(run: Path) -> None:
    newest = run / name_of(2)
    facts(derived_from=["\x1b[31mred\n", "\udcff"], tokens=10**15)(newest)
    rewrite_manifest(newest)
    lines = tools.inspect(run).table().splitlines()
    assert "derived from  \\x1b[31mred\\n, \\udcff" in lines and all(line.isprintable() for line in lines)
    assert CheckpointMetadata.read(newest).state["tokens"] == 10**15


def test_only_what_is_listed_is_copied(run: Path) -> None:
    """Should anything else come into the folder after it was looked at."""
    newest, folder = run / name_of(2), run.parent / "copy"
    folder.mkdir()
    tools._copy_random(newest, folder)
    assert [path.name for path in folder.rglob("*")] == ["random", "00000.pt"]


@pytest.mark.parametrize("weights_only", [False, True])
def test_a_full_disk_is_one_line_and_leaves_nothing(weights_only: bool, run: Path) -> None:
    for size in (0, 500, 20_000):  # of facts, of generators' states, of tensors
        for use in (
            lambda out: tools.reshard(run, out, weights_only=weights_only),
            lambda out: tools.average([run / name_of(step) for step in (1, 2)], out),
        ):
            with pytest.raises(ConfigError, match=r"out could not be written: \[Errno 27\]") as raised, files_of(size):
                use(run.parent / "out")
            assert "\n" not in str(raised.value)
            assert [path.name for path in run.parent.iterdir()] == ["run"]


@contextmanager
def files_of(size: int) -> Iterator[None]:
    """No file can be larger."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def test_a_mistake_of_our_own_keeps_its_traceback(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Reader, "part", lambda *_: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        tools.reshard(run, run.parent / "out")
    assert [path.name for path in run.parent.iterdir()] == ["run"]


def test_a_checkpoint_and_what_is_made_of_it_do_not_lie_in_one_another(run: Path) -> None:
    newest = run / name_of(2)
    with pytest.raises(ConfigError, match="contain each other"):
        tools.reshard(newest, newest / "inner")
    inside = shutil.copytree(newest, run / "step-9" / name_of(2))
    with pytest.raises(ConfigError, match="contain each other"):
        tools.reshard(inside, run / "step-9", overwrite=True)
    tools.reshard(newest, newest, weights_only=True, overwrite=True)
    assert CheckpointMetadata.read(newest).optimizer_steps is None and listing.problem(newest) is None


def test_of_a_link_the_link_alone_is_deleted(run: Path) -> None:
    kept = (run / name_of(1)).rename(run.parent / "kept")
    os.symlink(kept, run / name_of(1))
    with pytest.raises(ConfigError, match="is not a checkpoint and will not be replaced"):
        tools.reshard(run, run / name_of(1), overwrite=True)
    listing.delete_between(run, 1, 1)
    assert listing.newest_first(run) == [run / name_of(2)] and listing.problem(kept) is None


def test_without_rights_it_is_said_what_cannot_be_read() -> None:
    with tempfile.TemporaryDirectory() as parent:
        os.chmod(parent, 0o755)
        newest = make_checkpoint(Path(parent) / "run", 1)
        for name in (".", "tensors", "state.json", "tensors/.metadata"):
            with taken_from_others(newest / name), as_nobody():
                said = f"{MANIFEST if name == '.' else name} cannot be read: permission denied"
                assert listing.problem(newest) == said
        with taken_from_others(newest.parent), as_nobody(), pytest.raises(ConfigError, match="permission denied"):
            listing.newest_first(newest.parent)


@contextmanager
def taken_from_others(path: Path) -> Iterator[None]:
    mode = path.stat().st_mode
    path.chmod(0o700 if os.getuid() == 0 else 0)
    try:
        yield
    finally:
        path.chmod(mode)


def test_the_size_of_a_list_follows_from_the_tensors_beside_it(run: Path) -> None:
    tensors = run / name_of(2) / "tensors"
    size = (tensors / ".metadata").stat().st_size
    assert size < 10_000 < sum(TensorIndex.read(tensors).sizes.values()) // 4
    os.truncate(tensors / ".metadata", 100_000)
    with pytest.raises(ConfigError, match=r"tensors/\.metadata is .* has more than .* bytes"):
        TensorIndex.read(tensors)
    assert sys.getsizeof(TensorIndex.read(run / name_of(1) / "tensors").content) < 10_000
