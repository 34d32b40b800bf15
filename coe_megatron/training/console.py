"""Keeps the terminal for what concerns the user: libraries' remarks on optional packages and on themselves stay out."""

import logging
import warnings

_MEGATRON_LAYER = "megatron.core.transformer.transformer_layer"


def quiet_libraries() -> None:
    """Silence what Megatron-Core and torch say on import and set-up that no user can act on.

    Megatron warns that Apex and Transformer Engine are missing and that its own defaults are deprecated, torch that
    Megatron calls old names, and Megatron's layer that it does not know CoELayer by name. Errors are untouched.
    """
    warnings.filterwarnings("ignore", module=r"megatron\.")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    logging.getLogger(_MEGATRON_LAYER).addFilter(lambda record: "Unknown MLP type" not in record.getMessage())
