"""The data of a run: corpora to train on, and named sets to validate on."""

from dataclasses import dataclass
from pathlib import Path

from coe_megatron.config.settings import DataSettings
from coe_megatron.data.datasets import PreparedData
from coe_megatron.data.folders import check_folders, data_folders, training_parts, validation_paths
from coe_megatron.data.manifest import Split
from coe_megatron.data.megatron_files import MegatronFiles
from coe_megatron.data.samples import Corpus, SampleSource
from coe_megatron.errors import ConfigError


@dataclass(frozen=True)
class RunData:
    """Prepared folders that share one tokenizer, and indexed datasets of Megatron.

    Attributes:
        settings: the settings that name the folders and prefixes.
        corpora: to train on.
        weights: of each corpus, in samples.
        validation: to validate on, by name.
        tokenizer_size: number of pieces of the tokenizer; `model.vocab_size` if there are prefixes alone.
        tokenizer_sha256: identity of the tokenizer; empty if there are prefixes alone.
    """

    settings: DataSettings
    corpora: list[Corpus]
    weights: list[float]
    validation: dict[str, Corpus]
    tokenizer_size: int
    tokenizer_sha256: str

    @classmethod
    def open(cls, settings: DataSettings, vocab_size: int | None = None) -> "RunData":
        """Open all that the settings name, after `check_folders`.

        Args:
            vocab_size: `model.vocab_size`, which is needed if the settings name no prepared folder.

        Raises:
            ConfigError: a folder is missing, damaged, or has a different tokenizer; a prefix is not valid or has ids
                beyond the vocabulary; or the vocabulary is not known.
        """
        manifest = check_folders(settings, needed=True)
        size, limit = (
            (vocab_size, "model.vocab_size") if manifest is None else (manifest.vocab_size, "the tokenizer's size")
        )
        if size is None:
            raise ConfigError(f"model.vocab_size is null: {next(data_folders(settings)).without_tokenizer}")
        parts = training_parts(settings)
        named = {folder.path: folder for folder in data_folders(settings)}
        opened: dict[Path, Corpus] = {
            path: MegatronFiles.open(path, folder.setting, size, limit)
            if folder.is_prefix
            else PreparedData.open(path, folder.setting)
            for path, folder in named.items()
        }
        return cls(
            settings,
            [opened[Path(part.path)] for part in parts],
            [part.weight for part in parts],
            {name: opened[Path(path)] for name, path in validation_paths(settings).items()},
            size,
            "" if manifest is None else manifest.tokenizer_sha256,
        )

    @property
    def text_identity(self) -> list[list[str | float]]:
        """SHA-256 and weight of each corpus to train on, for JSON."""
        digests = [corpus.identity("train") for corpus in self.corpora]
        return [[digest, weight] for digest, weight in zip(digests, self.weights, strict=True)]

    def training_samples(self, seq_length: int, *, seed: int, cache_dir: Path) -> list[SampleSource]:
        """The training split of each corpus.

        Raises:
            ConfigError: a corpus has too few tokens for one window.
        """
        return [self._samples(corpus, "train", seq_length, seed, cache_dir) for corpus in self.corpora]

    def validation_samples(self, seq_length: int, *, seed: int, cache_dir: Path) -> dict[str, SampleSource]:
        """The validation split of each named set."""
        return {
            name: self._samples(data, "valid", seq_length, seed, cache_dir) for name, data in self.validation.items()
        }

    def truncated_fraction(self, seq_length: int) -> float:
        """The fraction of training documents that are truncated; 0 if samples are packed."""
        if self.settings.samples == "packed":
            return 0.0
        parts = zip(self.corpora, self.weights, strict=True)
        return sum(weight * corpus.truncated_fraction(seq_length) for corpus, weight in parts) / sum(self.weights)

    def _samples(self, data: Corpus, split: Split, seq_length: int, seed: int, cache_dir: Path) -> SampleSource:
        settings = self.settings
        return data.samples(
            settings.samples,
            split,
            seq_length,
            seed=seed,
            cache_dir=cache_dir,
            reset_at_documents=settings.reset_at_documents,
            answer_tokens=settings.answer_tokens,
        )
