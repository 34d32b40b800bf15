"""The data of a run: corpora to train on, and named sets to validate on."""

from dataclasses import dataclass
from pathlib import Path

from coe_megatron.config.settings import DataSettings
from coe_megatron.data.datasets import PreparedData, SampleSource
from coe_megatron.data.folders import check_folders, data_folders, training_parts, validation_paths
from coe_megatron.data.manifest import Split


@dataclass(frozen=True)
class RunData:
    """Prepared folders that share one tokenizer.

    Attributes:
        settings: the settings that name the folders.
        corpora: to train on.
        weights: of each corpus, in samples.
        validation: to validate on, by name.
    """

    settings: DataSettings
    corpora: list[PreparedData]
    weights: list[float]
    validation: dict[str, PreparedData]

    @classmethod
    def open(cls, settings: DataSettings) -> "RunData":
        """Open all folders that the settings name, after `check_folders`.

        Raises:
            ConfigError: a folder is missing, damaged, or has a different tokenizer.
        """
        check_folders(settings, needed=True)
        parts = training_parts(settings)
        named = {folder.path: folder.setting for folder in data_folders(settings)}
        opened = {path: PreparedData.open(path, setting) for path, setting in named.items()}
        return cls(
            settings,
            [opened[Path(part.path)] for part in parts],
            [part.weight for part in parts],
            {name: opened[Path(path)] for name, path in validation_paths(settings).items()},
        )

    @property
    def tokenizer_size(self) -> int:
        """Number of pieces of the tokenizer."""
        return self.corpora[0].manifest.vocab_size

    @property
    def tokenizer_sha256(self) -> str:
        """SHA-256 of the tokenizer: its identity."""
        return self.corpora[0].manifest.tokenizer_sha256

    @property
    def text_identity(self) -> list[list[str | float]]:
        """SHA-256 and weight of each corpus to train on, for JSON."""
        digests = [corpus.manifest.files["train.bin"].sha256 for corpus in self.corpora]
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

    def _samples(self, data: PreparedData, split: Split, seq_length: int, seed: int, cache_dir: Path) -> SampleSource:
        mode, reset = self.settings.samples, self.settings.reset_at_documents
        return data.samples(mode, split, seq_length, seed=seed, cache_dir=cache_dir, reset_at_documents=reset)
