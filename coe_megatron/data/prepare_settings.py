"""What `launch/prepare_data.py` is asked for, checked before anything is written."""

from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import get_args

from coe_megatron.corpus.fact_hops import FactTask
from coe_megatron.data.encode import Recipe
from coe_megatron.data.manifest import (
    DATA_FILES,
    MANIFEST,
    TOKENIZER_CONFIG,
    TOKENIZERS,
    Split,
)
from coe_megatron.data.records import Templates
from coe_megatron.data.sources import (
    DEFAULT_RECORD_BYTES,
    MAX_RECORD_BYTES,
    check_readable,
    read_chunks,
)
from coe_megatron.data.staging import check_staging_folder
from coe_megatron.data.tokenizer import (
    MAX_VOCAB_SIZE,
    MIN_VOCAB_SIZE,
    OTHER_SUFFIXES,
    find_tokenizer,
)
from coe_megatron.errors import ConfigError
from coe_megatron.files import kind_of, require_file, require_folder, require_writable

SPLITS: tuple[Split, ...] = get_args(Split)
PROBLEM_TEMPLATE = "query : {query} response : {response}"
FACT_TEMPLATE = "{prompt} {answer}"
TEXT_TEMPLATE = "{text}"
_FIRST_RECORDS = 1000  # of each input, checked before anything is written
MAX_PROBLEMS = 10**12  # of the built-in corpus; more than any disk holds
MAX_WORKERS = 1024  # more than the processors of a host


@dataclass(frozen=True)
class PrepareSettings:
    """What to prepare, and into which folder.

    Attributes:
        output: the folder to make.
        inputs: files of documents (see `sources` for the formats); excludes `builtin`.
        builtin: number of training documents to draw from the built-in corpus; excludes `inputs`.
        task: of the built-in corpus: questions on facts, whose words are the tokens; None for word problems.
        vocab_size: pieces of the tokenizer to train; with `tokenizer`, the size that it must have.
        tokenizer: a SentencePiece model, a tokenizer.json, a .tiktoken file, or a folder that holds one of them, to use
            instead of training one.
        eos: the token that ends a document, if `tokenizer` is no SentencePiece model; see `OtherTokenizer`.
        encoding: tiktoken's name of the encoding of a .tiktoken file; see `OtherTokenizer`.
        template: templates of a document; a record uses the first whose fields it has. The default is "{text}"; for
            the built-in corpus "query : {query} response : {response}", and with a task "{prompt} {answer}".
        valid_inputs: files of validation documents; if empty, `valid_fraction` applies.
        valid_fraction: fraction of documents held out by their hash (equal documents stay together); for the built-in
            corpus the number of held-out problems relative to `builtin`.
        seed: seed of that hash and of the built-in corpus.
        skip_malformed: count malformed records instead of stopping at the first.
        max_record_bytes: limit for a line, a block of text, or a cell of Parquet; a larger record is malformed.
        overwrite: replace a folder that an earlier preparation wrote.
        workers: processes that parse and encode; their number affects only the time.

    Raises:
        ConfigError: a field is not valid, or contradicts another; the message names the option of
            launch/prepare_data.py, the only program that makes these settings.
    """

    output: Path
    inputs: tuple[Path, ...] = ()
    builtin: int | None = None
    task: FactTask | None = None
    vocab_size: int | None = None
    tokenizer: Path | None = None
    eos: str | None = None
    encoding: str | None = None
    template: tuple[str, ...] = ()
    valid_inputs: tuple[Path, ...] = ()
    valid_fraction: float = 0.02
    seed: int = 0
    skip_malformed: bool = False
    max_record_bytes: int = DEFAULT_RECORD_BYTES
    overwrite: bool = False
    workers: int = 1

    def __post_init__(self) -> None:
        self._check_source()
        if self.vocab_size is None and self.tokenizer is None and self.task is None:
            raise ConfigError("--vocab-size is missing: give it, or a --tokenizer")
        if self.vocab_size is not None and not MIN_VOCAB_SIZE <= self.vocab_size <= MAX_VOCAB_SIZE:
            raise ConfigError(
                f"--vocab-size is {self.vocab_size}: it must be at least {MIN_VOCAB_SIZE}, and at most {MAX_VOCAB_SIZE}"
            )
        if not 0 < self.valid_fraction < 1:
            raise ConfigError(f"--valid-fraction is {self.valid_fraction}: it must be between 0 and 1")
        if self.seed < 0:
            raise ConfigError(f"--seed is {self.seed}: it must be at least 0")
        if not 1 <= self.max_record_bytes <= MAX_RECORD_BYTES:
            raise ConfigError(
                f"--max-record-bytes is {self.max_record_bytes}: it must be at least 1, and at most {MAX_RECORD_BYTES}"
            )
        if not 1 <= self.workers <= MAX_WORKERS:
            raise ConfigError(f"--workers is {self.workers}: it must be at least 1, and at most {MAX_WORKERS}")

    @property
    def tokenizer_file(self) -> Path | None:
        """The file that `tokenizer` names, or that is in the folder of this name; None to train one.

        Raises:
            ConfigError: the folder holds no tokenizer.
        """
        return None if self.tokenizer is None else find_tokenizer(self.tokenizer, "--tokenizer")

    @property
    def templates(self) -> Templates:
        """The templates to use."""
        builtin = PROBLEM_TEMPLATE if self.task is None else FACT_TEMPLATE
        return Templates.of(self.template or (TEXT_TEMPLATE if self.inputs else builtin,))

    @property
    def recipe(self) -> Recipe:
        """How records become documents."""
        return Recipe(self.templates, self.seed, self.valid_fraction, self.skip_malformed)

    def check_files(self) -> None:
        """Check the inputs and the output path without writing anything.

        Raises:
            ConfigError: a file is missing, cannot be read or has an unknown format; or the output cannot be written, or
                must not be replaced.
            InputError: one of the first records of an input is malformed, and `skip_malformed` is false.
        """
        self.check_inputs()
        check_output(self.output, self.overwrite)

    def check_inputs(self) -> None:
        """The checks of `check_files` that concern the inputs."""
        for path in self.inputs:
            check_readable(path, "--input")
        for path in self.valid_inputs:
            check_readable(path, "--valid")
        inputs = {path.resolve() for path in self.inputs}
        if shared := [path for path in self.valid_inputs if path.resolve() in inputs]:
            raise ConfigError(
                f"--valid names {shared[0]}, as --input does: training and validation text must be different files"
            )
        if not self.skip_malformed:
            self._check_first_records()
        if (tokenizer := self.tokenizer_file) is not None:
            require_file(tokenizer, "--tokenizer")
        suffix = "" if tokenizer is None else tokenizer.suffix
        if self.eos is not None and suffix not in OTHER_SUFFIXES:
            raise ConfigError(f"--eos is {self.eos}: only a --tokenizer that is no SentencePiece model needs it")
        if self.encoding is not None and suffix != ".tiktoken":
            raise ConfigError(f"--encoding is {self.encoding}: only a --tokenizer that is a .tiktoken file has one")

    def _check_first_records(self) -> None:
        for path in (*self.inputs, *self.valid_inputs):
            for chunk in islice(read_chunks(path, self.templates, self.max_record_bytes), 1):
                for _ in islice(self.recipe.documents(chunk, None), _FIRST_RECORDS):
                    pass

    def _check_source(self) -> None:
        if bool(self.inputs) == (self.builtin is not None):
            raise ConfigError("exactly one of --input and --builtin must be given")
        names = [name for template in self.templates.choices for name in template.fields]
        if self.builtin is None:
            if self.task is not None:
                raise ConfigError(f"--task is {self.task.kind}: it requires --builtin, the number of documents")
            return
        if not 1 <= self.builtin <= MAX_PROBLEMS:
            raise ConfigError(f"--builtin is {self.builtin}: it must be at least 1, and at most {MAX_PROBLEMS}")
        if self.valid_inputs:
            raise ConfigError("--valid requires --input: the built-in corpus has its own validation problems")
        fields = ("query", "response") if self.task is None else ("prompt", "answer")
        if unknown := [name for name in names if name not in fields]:
            raise ConfigError(f"--template names field {unknown[0]!r}: built-in problems have {' and '.join(fields)}")
        if self.task is not None:
            self._check_task(self.task)

    def _check_task(self, task: FactTask) -> None:
        for name, value in (("vocab-size", self.vocab_size), ("tokenizer", self.tokenizer)):
            if value is not None:
                raise ConfigError(f"--{name} is {value}: leave it out, the words of --task {task.kind} are its tokens")
        if self.builtin is not None and self.builtin < task.facts:
            raise ConfigError(f"--builtin is {self.builtin}: it must be at least {task.facts}, the number of facts")


def check_output(output: Path, overwrite: bool) -> None:
    require_writable(output, "--output", "folder")
    if not output.resolve().name:
        raise ConfigError(f"--output is {output}: name a new folder")
    check_staging_folder(output.resolve())
    if kind_of(output, "--output") is None:
        return
    present = {path.name for path in require_folder(output, "--output").iterdir()}
    if present and not overwrite:
        raise ConfigError(f"--output is {output}: it is not empty; choose another folder, or use --overwrite")
    if foreign := sorted(present - {*DATA_FILES, *TOKENIZERS, TOKENIZER_CONFIG, MANIFEST}):
        raise ConfigError(
            f"--output is {output}: it contains {foreign[0]}, which no preparation wrote; remove it or choose another"
        )
