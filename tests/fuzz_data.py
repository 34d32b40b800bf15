"""Fuzz targets of data: a folder that was prepared, and files to prepare it from."""

import base64
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
import tokenizers
from fuzz_bounds import Bounds, Case, attempt
from fuzz_targets import Target
from hypothesis import strategies as st

from coe_megatron.config import parse
from coe_megatron.data.datasets import PreparedData
from coe_megatron.data.encode import Recipe
from coe_megatron.data.folders import check_data
from coe_megatron.data.manifest import MANIFEST, TOKENIZER_CONFIG
from coe_megatron.data.prepare import prepare
from coe_megatron.data.prepare_settings import PrepareSettings
from coe_megatron.data.run_data import RunData
from coe_megatron.data.sources import MalformedRecord, Templates, check_readable, read_chunks
from coe_megatron.data.tokenizer import Tokenizer
from coe_megatron.files import remove


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


class OtherTokenizer(Target):
    """A tokenizer.json or a file of tiktoken, with the configuration beside it, as --tokenizer opens them."""

    names = ("--tokenizer",)

    def prepare(self, folder: Path) -> None:
        library = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True))
        library.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
        trainer = tokenizers.trainers.BpeTrainer(vocab_size=60, special_tokens=["</s>"], show_progress=False)
        library.train_from_iterator(["some words and some other words"], trainer)
        library.save(str(folder / "tokenizer.json"))
        tokens = [*(bytes([value]) for value in range(256)), b"he", b"the"]
        lines = (b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens))
        (folder / "cl100k_base.tiktoken").write_bytes(b"".join(lines))
        (folder / TOKENIZER_CONFIG).write_text('{"eos_token": {"content": "</s>"}, "pad_token": null}')
        names = ("tokenizer.json", "cl100k_base.tiktoken", TOKENIZER_CONFIG)
        self.contents = {name: (folder / name).read_bytes() for name in names}

    def cases(self) -> st.SearchStrategy[Case]:
        changes = {}
        for name, content in self.contents.items():
            trees = [json.loads(content)] if name.endswith(".json") else []
            some = values.files([content], trees, [values.json_dump]) if trees else values.damaged(st.just(content))
            changes[name] = values.file_or_not(some)
        files = st.fixed_dictionaries({}, optional=changes)
        option = st.sampled_from((None, None, "</s>", "<|endoftext|>", *values.TEXTS))
        options = st.fixed_dictionaries({"name": st.sampled_from(["tokenizer.json", "cl100k_base.tiktoken"])})
        options = st.tuples(options, st.fixed_dictionaries({}, optional={"eos": option})).map(
            lambda two: two[0] | two[1]
        )
        return st.builds(Case, files, options)

    def act(self, folder: Path, case: Case) -> list[str]:
        name = case.options.get("name", "tokenizer.json")
        eos = case.options.get("eos") or (None if name == "tokenizer.json" else "<|endoftext|>")
        tokenizer = Tokenizer(folder / name, "--tokenizer", eos=eos)
        assert 0 <= tokenizer.eos_id < tokenizer.vocab_size and 0 <= tokenizer.pad_id < tokenizer.vocab_size
        assert tokenizer.config is not None and json.loads(tokenizer.config)["eos_token"]
        ids = tokenizer.encode("some words").tolist()
        assert all(0 <= id_ < tokenizer.vocab_size for id_ in ids)
        tokenizer.decode(ids)
        return []


class Indexed(Target):
    """An indexed dataset of Megatron, checked and opened as a run does."""

    names = ("data.path", "model.seq_length", "is damaged", "do not all end")

    def prepare(self, folder: Path) -> None:
        prepare(PrepareSettings(folder / "prepared", builtin=20, vocab_size=512))
        self.contents = {name: (folder / "prepared" / name).read_bytes() for name in ("train.bin", "train.idx")}
        remove(folder / "prepared")
        for name, content in self.contents.items():
            (folder / name).write_bytes(content)

    def cases(self) -> st.SearchStrategy[Case]:
        index = values.damaged(st.just(self.contents["train.idx"]))
        head = st.tuples(st.binary(max_size=34), index).map(lambda two: two[0] + two[1][len(two[0]) :])
        files = {"train.idx": values.file_or_not(st.one_of(index, index, head))}
        files["train.bin"] = values.file_or_not(values.damaged(st.just(self.contents["train.bin"])))
        return st.builds(Case, st.fixed_dictionaries({}, optional=files))

    def act(self, folder: Path, case: Case) -> list[str]:
        prefix = str(folder / "train")
        data = {"path": prefix, "validation": {"all": prefix}}
        config = parse({"data": data, "model": {"seq_length": 16, "vocab_size": 512}})
        check_data(config, needed=True)
        opened = RunData.open(config.data, 512)
        (rows,) = opened.training_samples(16, seed=0, cache_dir=folder)
        assert all(0 <= int(token) < 512 for index in range(min(len(rows), 5)) for token in rows[index]["tokens"])
        return []


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
