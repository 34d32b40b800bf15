"""Fuzz targets of data: a folder that was prepared, and files to prepare it from."""

import gzip
import io
import json
import lzma
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fuzz_values as values
import pyarrow
import pyarrow.parquet
from fuzz_bounds import Bounds, Case, attempt
from fuzz_targets import Target
from hypothesis import strategies as st

from coe_megatron.config import parse
from coe_megatron.data.datasets import PreparedData
from coe_megatron.data.encode import Recipe
from coe_megatron.data.folders import check_data
from coe_megatron.data.manifest import MANIFEST
from coe_megatron.data.prepare import PrepareSettings, prepare
from coe_megatron.data.sources import MalformedRecord, Templates, check_readable, read_chunks
from coe_megatron.data.tokenizer import Tokenizer


class Manifest(Target):
    """A folder of prepared data, checked and opened as a run does; its tokenizer also alone, as --tokenizer does."""

    names = ("data.path", "prepared", "model.seq_length")

    def prepare(self, folder: Path) -> None:
        prepare(PrepareSettings(folder / "prepared", builtin=60, vocab_size=512))
        self.contents = {path.name: path.read_bytes() for path in (folder / "prepared").iterdir()}

    def cases(self) -> st.SearchStrategy[Case]:
        text = self.contents[MANIFEST]
        changes = {MANIFEST: values.files([text], [json.loads(text)], [values.json_dump])}
        changes |= {name: values.damaged(st.just(content)) for name, content in self.contents.items()} | changes
        optional = {f"prepared/{name}": values.file_or_not(content) for name, content in changes.items()}
        manifest = optional[f"prepared/{MANIFEST}"]
        some = st.fixed_dictionaries({}, optional=optional)
        return st.builds(Case, st.one_of(st.fixed_dictionaries({f"prepared/{MANIFEST}": manifest}), some))

    def act(self, folder: Path, case: Case) -> list[str]:
        prepared = folder / "prepared"
        config = parse({"data": {"path": str(prepared)}, "model": {"seq_length": 16}})
        alone = attempt(lambda: Tokenizer(prepared / "tokenizer.model")) if "tokenizer" in str(case.files) else []
        manifest = check_data(config, needed=True)
        assert manifest is not None and json.dumps(str(manifest))
        row = PreparedData.open(prepared).rows("train", 16)[0]
        assert all(int(token) < manifest.vocab_size for token in row["tokens"])
        return alone + attempt(lambda: manifest.verify(prepared))


class Text(Target):
    """Files of documents, also compressed, read as a preparation reads them."""

    names = ("input", "template")
    bounds = Bounds(cpu_seconds=10.0)  # some inputs are packed so well that they come to hundreds of megabytes
    name = "input.jsonl"
    suffixes: Sequence[str] = (".jsonl", ".txt", ".jsonl.gz", ".txt.gz", ".jsonl.xz", ".jsonl.zst", ".txt.zst")

    def prepare(self, folder: Path) -> None:
        self.records = [{"text": f"Hello {number}.", "n": number, "x": {"y": [1, None]}} for number in range(8)]
        (folder / self.name).write_bytes(values.json_lines(self.records))

    def cases(self) -> st.SearchStrategy[Case]:
        mixed = [*self.records[:2], {"query": "1 + 1?", "response": "2"}, {"text": "é\n\n🙂", "": 1.5}]
        lines = [values.json_lines(self.records), b"One.\n\nTwo.\r\n\r\nThree"]
        plain = values.files(lines, [self.records, self.records, mixed], [values.json_lines])
        return st.one_of([_case(self._packed(plain, suffix), suffix) for suffix in self.suffixes])

    def _packed(self, plain: st.SearchStrategy[bytes], suffix: str) -> st.SearchStrategy[bytes]:
        if (pack := PACKERS.get(Path(f"x{suffix}").suffix)) is None:
            return plain
        bombs = [pack(begin + b"a" * (8 << 20)) * 50 for begin in (b"", b'{"text": "')]  # 400 MB without a line break
        packed = plain.map(pack)
        files = st.one_of(values.damaged(packed), st.tuples(packed, packed).map(b"".join))
        return values.rarely(st.sampled_from(bombs), files, 50)

    def act(self, folder: Path, case: Case) -> list[str]:
        path = folder / next(iter(case.files), self.name)
        check_readable(path, "input")
        templates = Templates.of(case.options.get("templates", ["{text}"]))
        recipe, refusals = Recipe(templates, 0, 0.5, bool(case.options.get("skip", True))), []
        for chunk in read_chunks(path, templates):
            for item in recipe.documents(chunk, None):
                if isinstance(item, MalformedRecord):
                    refusals.append(str(item))
                else:
                    assert item[1].encode()
        return refusals


class Parquet(Text):
    """Parquet files, with a valid footer or without."""

    name = "input.parquet"

    def prepare(self, folder: Path) -> None:
        texts = [f"Hello {number}." for number in range(40)]
        columns: dict[str, Any] = {"text": texts, "n": range(40), "x": [[1, None]] * 40, "query": [None, "a"] * 20}
        table = pyarrow.table({**columns, "response": [b"\xff"] * 40, "t": pyarrow.array([None] * 40)})
        wide = pyarrow.table({"text": pyarrow.array(["a" * (1 << 20)] * 600).dictionary_encode()})  # 600 MB out of 1 KB
        empty = table.slice(0, 0)
        kinds = ({}, {"row_group_size": 8, "compression": "zstd"}, {"data_page_version": "2.0", "compression": "none"})
        self.seeds = [_parquet(table, **kind) for kind in kinds] + [_parquet(empty)]
        self.wide = _parquet(wide, compression="zstd")
        (folder / self.name).write_bytes(self.seeds[0])

    def cases(self) -> st.SearchStrategy[Case]:
        content = values.damaged(st.sampled_from(self.seeds))
        return _case(values.rarely(st.just(self.wide), content, 50), ".parquet")


def _case(content: st.SearchStrategy[bytes], suffix: str) -> st.SearchStrategy[Case]:
    """A file, and how to read it."""
    templates = st.sampled_from((["{text}"], ["{text}"], ["{query} {response}", "{text}"], ["{text}{n}{x}"], ["{"]))
    options = {"skip": st.booleans(), "templates": templates}
    return st.builds(Case, st.fixed_dictionaries({f"input{suffix}": content}), st.fixed_dictionaries(options))


def _zstd(content: bytes) -> bytes:
    return pyarrow.compress(content, codec="zstd", asbytes=True)


PACKERS = {".gz": lambda it: gzip.compress(it, mtime=0), ".xz": lambda it: lzma.compress(it, preset=0), ".zst": _zstd}


def _parquet(table: pyarrow.Table, **options: Any) -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(table, file, **options)
    return file.getvalue()
