"""Optional packages: what they are for is installed only by those who want it."""

from importlib import import_module
from types import ModuleType

from coe_megatron.errors import ConfigError

EXTRAS = {
    "transformers": "hf",
    "tokenizers": "hf",
    "safetensors": "hf",
    "tiktoken": "hf",
    "tiktoken_ext": "hf",
    "lm_eval": "eval",
}


def require(name: str) -> ModuleType:
    """Import an optional package, or a module of one.

    Raises:
        ConfigError: it is not installed; the line says what to install.
    """
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        package = name.partition(".")[0]
        if error.name != package:
            raise
        raise ConfigError(
            f"{package} is not installed: pip install 'coe-megatron[{EXTRAS[package]}]', or from a clone "
            f"pip install -c constraints.txt -e '.[{EXTRAS[package]}]'"
        ) from None
