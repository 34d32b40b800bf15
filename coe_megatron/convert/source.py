"""A checkpoint to convert, with the config of its run and its tokenizer."""

import shutil
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from coe_megatron.checkpoint import listing
from coe_megatron.checkpoint.metadata import CheckpointMetadata
from coe_megatron.config import RunConfig, load
from coe_megatron.convert.fast_tokenizer import open_fast_tokenizer, write_fast_tokenizer
from coe_megatron.data.folders import data_folders
from coe_megatron.data.manifest import TOKENIZER, TOKENIZERS
from coe_megatron.data.tokenizer import Tokenizer
from coe_megatron.errors import ConfigError
from coe_megatron.run.metrics_log import read_metrics
from coe_megatron.run.output_check import CONFIG, METRICS


@dataclass(frozen=True)
class Source:
    """A complete checkpoint of a run.

    Attributes:
        run: the folder of the run.
        config: of the run.
        tokenizer: its SentencePiece model or tokenizer.json; None if the run does not name one that exists.
    """

    checkpoint: Path
    run: Path
    config: RunConfig
    tokenizer: Path | None

    @classmethod
    def find(cls, source: Path, tokenizer: Path | None = None) -> "Source":
        """The most recent complete checkpoint of a run, or a checkpoint in a run's folder.

        Args:
            tokenizer: the tokenizer's file; None for that of the run's data.

        Raises:
            ConfigError: there is no complete checkpoint or no config.
        """
        checkpoint = listing.find(source)
        run = next((folder for folder in checkpoint.absolute().parents[:2] if (folder / CONFIG).exists()), None)
        if run is None:
            raise ConfigError(f"{checkpoint} is not in the folder of a run: there is no {CONFIG} that says what it is")
        config = load(run / CONFIG)
        return cls(checkpoint, run, config, tokenizer or tokenizer_of(run, config))

    @cached_property
    def metadata(self) -> CheckpointMetadata:
        """The contents of the checkpoint's state.json."""
        return CheckpointMetadata.read(self.checkpoint)

    @property
    def tokenizer_sha256(self) -> str | None:
        """SHA-256 of the tokenizer that the model was trained with, if known."""
        return self.metadata.state.get("tokenizer")

    def losses(self) -> dict[str, float]:
        """The last losses that the run logged up to this checkpoint."""
        found: dict[str, float] = {}
        with suppress(ValueError, OSError, ConfigError):
            for line in read_metrics(self.run / METRICS):
                if line["step"] <= self.metadata.state.get("step", 0):
                    names = ("train_loss", "valid_loss", "valid_bits_per_byte")
                    found |= {name: line[name] for name in names if isinstance(line.get(name), float)}
        return found

    def special_tokens(self) -> dict[str, int | None]:
        """Ids of the special tokens, as config.json names them; in training no text begins with a bos token."""
        if self._tokenizer is None:
            return {}
        return {"bos_token_id": None, "eos_token_id": self._tokenizer.eos_id, "pad_token_id": self._tokenizer.pad_id}

    @property
    def tokenizer_size(self) -> int | None:
        """Number of tokens, without padded rows of the embedding; None if the tokenizer is not to be found."""
        return None if self._tokenizer is None else self._tokenizer.vocab_size

    def write_tokenizer(self, folder: Path) -> None:
        """Write the tokenizer in Hugging Face's form, and its own file; nothing if it is not to be found."""
        if self.tokenizer is not None:
            write_fast_tokenizer(self.tokenizer, folder, self.config.model.seq_length)
            if self.tokenizer.name == TOKENIZER:  # by which an import knows the training data again
                shutil.copyfile(self.tokenizer, folder / TOKENIZER)

    def fast_tokenizer(self) -> Any:
        """The tokenizer of transformers; None if it is not to be found."""
        return None if self.tokenizer is None else open_fast_tokenizer(self.tokenizer, self.config.model.seq_length)

    @cached_property
    def _tokenizer(self) -> Tokenizer | None:
        """The tokenizer; checked.

        Raises:
            ConfigError: it is another one than that of the checkpoint.
        """
        if self.tokenizer is None:
            return None
        found = Tokenizer(self.tokenizer, "--tokenizer")
        if self.tokenizer_sha256 not in (None, found.sha256):
            raise ConfigError(
                f"{self.tokenizer} is another tokenizer than that of {self.checkpoint}: name its own file"
            )
        return found


def tokenizer_of(run: Path, config: RunConfig) -> Path | None:
    """The tokenizer's file in the folder of a run or of its data; None if there is none."""
    folders = [run, *(folder.path for folder in data_folders(config.data))]
    files = (folder / name for folder in folders for name in TOKENIZERS)
    return next((path for path in files if path.is_file()), None)
