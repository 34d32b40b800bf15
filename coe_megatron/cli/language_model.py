"""What programs that generate text have in common: options of the model, and how it is opened. Without torch."""

import argparse
import re
from pathlib import Path
from typing import Any

from coe_megatron.errors import ConfigError
from coe_megatron.files import require_file, require_folder, user_path

_DTYPES = ("float32", "bfloat16", "float16")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", metavar="DEVICE", help="cpu, cuda or cuda:N (default: cuda if there is one)")
    parser.add_argument("--dtype", choices=_DTYPES, help="of weights (default: as trained)")
    parser.add_argument("--tokenizer", type=user_path, metavar="FILE", help="if the run's data are elsewhere now")
    parser.add_argument("--batch", type=int, default=16, metavar="N", help="texts generated together (default: 16)")


def check_options(options: argparse.Namespace) -> None:
    """Raise a ConfigError if one is invalid."""
    require_folder(options.run, "RUN")
    if options.device is not None and not re.fullmatch(r"cpu|cuda(:\d{1,4})?", options.device, re.ASCII):
        raise ConfigError(f"--device is {options.device!r}: it must be cpu, cuda or cuda:N")
    if options.tokenizer is not None:
        require_file(options.tokenizer, "--tokenizer")
        if is_exported(options.run):
            raise ConfigError(f"--tokenizer is for a run: {options.run} is an exported model and has its own")
    if options.batch < 1:
        raise ConfigError(f"--batch is {options.batch}: it must be at least 1")


def is_exported(folder: Path) -> bool:
    """Whether a folder is a model in Hugging Face's form."""
    return (folder / "config.json").exists()


def open_model(options: argparse.Namespace) -> tuple[Any, Any, Any]:
    """The model, its tokenizer, and the checkpoint that it comes from, None for an exported model.

    Raises:
        ConfigError: as `convert.load.load`; or there is no such device, or no tokenizer.
    """
    from coe_megatron import extras

    transformers = extras.require("transformers")  # before torch, which takes seconds

    import torch

    from coe_megatron.convert.load import load_with_source

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device != "cpu" and int(device.partition(":")[2] or 0) >= torch.cuda.device_count():
        raise ConfigError(f"--device is {device}: this machine has {torch.cuda.device_count()} CUDA devices")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model, tokenizer, source = load_with_source(options.run, device, options.dtype, options.tokenizer)
    if tokenizer is None:
        raise ConfigError(f"{options.run} has no tokenizer: name its file with --tokenizer")
    return model, tokenizer, source
