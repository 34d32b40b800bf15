"""Suppress warnings of libraries that the user cannot act on."""

import logging
import warnings
from functools import partial

_IRRELEVANT = {  # logger: beginning of its message
    "megatron.core.transformer.transformer_layer": "Unknown MLP type",
    "megatron.core.models.gpt.gpt_model": "GPTModel IS DEPRECATED",
    "torch.utils.cpp_extension": "No CUDA runtime is found",
}


def quiet_libraries() -> None:
    """Suppress warnings of Megatron-Core and torch at import and set-up that no user can act on.

    Megatron warns that Apex and Transformer Engine are missing and that its own defaults are deprecated, torch warns
    that Megatron uses deprecated names. Megatron 0.16.1 warns that it does not know CoELayer, 0.19.2 that its GPTModel
    gets no new features; torch's CUDA build warns that there is no CUDA device. Errors are kept.
    """
    warnings.filterwarnings("ignore", module=r"megatron\.")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    for logger, message in _IRRELEVANT.items():
        logging.getLogger(logger).addFilter(partial(_is_other, message))


def _is_other(message: str, record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(message)
