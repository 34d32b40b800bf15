"""Suppress warnings of libraries that the user cannot act on."""

import logging
import warnings

_MEGATRON_LAYER = "megatron.core.transformer.transformer_layer"


def quiet_libraries() -> None:
    """Suppress warnings of Megatron-Core and torch at import and set-up that no user can act on.

    Megatron warns that Apex and Transformer Engine are missing and that its own defaults are deprecated, torch warns
    that Megatron uses deprecated names, and Megatron's layer warns that it does not know CoELayer. Errors are kept.
    """
    warnings.filterwarnings("ignore", module=r"megatron\.")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    logging.getLogger(_MEGATRON_LAYER).addFilter(lambda record: "Unknown MLP type" not in record.getMessage())
