"""Chain-of-Experts for Megatron-Core: the method, its layer specs, and a training program.

Importing this package imports neither torch nor DeepSpeed nor Megatron-Core, and patches nothing. Import the parts you
need: `coe_megatron.chain` (the method), `coe_megatron.model` (specs for Megatron-Core), `coe_megatron.training` (the
program behind `launch/pretrain_coe.py`), and `load`, which returns a trained model for a notebook.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from coe_megatron.convert.load import load as load

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "load":
        from coe_megatron.convert.load import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
