"""Chains in Megatron-LM's own training programs: the function for `--spec`, and the chain's options as arguments.

Without a change to Megatron-LM (Megatron-Core 0.19.2), start its program through this module:

    python -m coe_megatron.megatron_lm pretrain_gpt.py --coe-iterations 2 ...
    torchrun ... -m coe_megatron.megatron_lm pretrain_gpt.py --coe-iterations 2 ...

Or pass `extra_args_provider=add_coe_arguments` to `parse_and_validate_args` in a program of your own.
"""

import argparse
import runpy
import sys
from collections.abc import Sequence
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from coe_megatron.chain.settings import ChainSettings, Recompute
from coe_megatron.config.settings import MoESettings
from coe_megatron.config.settings_page import attribute_meanings
from coe_megatron.errors import ConfigError
from coe_megatron.local_backend.megatron_compat import has_transformer_engine
from coe_megatron.model import coe_block_spec

SPEC = ["coe_megatron.megatron_lm", "coe_spec"]


def add_coe_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add `--coe-iterations`, `--coe-recompute` and so on: an `extra_args_provider`.

    There is one for every field of ChainSettings. Each selects `coe_spec`, so that `--spec` can be omitted with them.
    """
    group = parser.add_argument_group("Chain-of-Experts")
    meanings = attribute_meanings(ChainSettings)
    for field in fields(ChainSettings):
        _add(group, field.name, field.type, field.default, meanings[field.name])
    ours = attribute_meanings(MoESettings)
    _add(group, "recompute", Recompute, "none", ours["recompute"])
    _add(group, "deduplicated", bool, False, "a token travels once to each rank that holds some of its experts")
    losses = "scale the losses of routers as Megatron-Core does, also where that is wrong"
    _add(group, "megatron_losses", bool, False, losses)
    chunks = "parts of the tokens that go through the chain in turns: experts work while tokens of other parts travel"
    _add(group, "overlap_chunks", int, 1, chunks)
    return parser


def coe_spec(config: Any, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """The layer specs of this pipeline stage: `--spec coe_megatron.megatron_lm coe_spec`.

    The chain is that of the `--coe-*` arguments; without them CoE-2 with the paper's defaults and `prenorm`.

    Args:
        config: Megatron's GPTModelConfig.
        vp_stage: virtual pipeline stage.

    Raises:
        ConfigError: an argument of Megatron's or of the chain is not valid for chains.
    """
    from megatron.training import get_args as megatron_arguments

    transformer, arguments = config.transformer, megatron_arguments()
    if transformer.num_moe_experts is None:
        raise ConfigError("--num-experts is missing: a chain needs at least one routed expert")
    if transformer.mtp_num_layers:
        raise ConfigError("--mtp-num-layers is given: Megatron-LM builds these layers without chains, leave it out")
    if transformer.transformer_impl not in ("local", "transformer_engine"):
        raise ConfigError(f"--transformer-impl is {transformer.transformer_impl}: use local or transformer_engine")
    use_transformer_engine = transformer.transformer_impl == "transformer_engine"
    if use_transformer_engine and not has_transformer_engine():
        raise ConfigError("--transformer-impl is transformer_engine: Transformer Engine is not installed, use local")
    chain = chain_settings(arguments)
    if chain.layers is not None:
        transformer.hetereogenous_dist_checkpoint = True  # Megatron-LM has no argument for it
    return coe_block_spec(
        transformer,
        chain,
        recompute=getattr(arguments, "coe_recompute", "none"),
        use_transformer_engine=use_transformer_engine,
        vp_stage=vp_stage,
        deduplicated=getattr(arguments, "coe_deduplicated", False),
        overlap_chunks=getattr(arguments, "coe_overlap_chunks", 1),
        megatron_losses=getattr(arguments, "coe_megatron_losses", False),
    )


def chain_settings(arguments: argparse.Namespace) -> ChainSettings:
    """The chain of Megatron's parsed arguments.

    Raises:
        ConfigError: a value is not valid; the message names it as `chain.iterations` for `--coe-iterations`.
    """
    values: dict[str, Any] = {}
    for field in fields(ChainSettings):
        value = getattr(arguments, f"coe_{field.name}", field.default)
        values[field.name] = tuple(value) if isinstance(value, list) else value
    return ChainSettings(**values)


def main() -> None:
    """Run a program of Megatron-LM's with the chain's arguments added to its own."""
    try:
        from megatron.training import arguments
    except ModuleNotFoundError:
        release = version("megatron-core")
        line = f"Megatron-Core is {release}: megatron.training comes with 0.19.2 (Python 3.12 or newer)"
        print(f"megatron_lm: error: {line}", file=sys.stderr)
        sys.exit(2)
    if len(sys.argv) < 2:
        sys.exit("usage: python -m coe_megatron.megatron_lm PROGRAM ARGUMENT ..., such as pretrain_gpt.py --coe-...")
    megatrons = arguments.add_megatron_arguments
    arguments.add_megatron_arguments = lambda parser: add_coe_arguments(megatrons(parser))
    program = sys.argv[1]
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(program).resolve().parent)
    try:
        runpy.run_path(program, run_name="__main__")
    except ConfigError as error:
        print(f"{Path(program).name}: error: {error}", file=sys.stderr)
        sys.exit(2)


class _ChainOption(argparse.Action):
    """Stores a value, and selects `coe_spec` unless `--spec` is given."""

    def __call__(
        self, _parser: Any, namespace: argparse.Namespace, values: str | Sequence[Any] | None, _option: Any = None
    ) -> None:
        setattr(namespace, self.dest, True if self.nargs == 0 else values)
        if namespace.spec is None:
            namespace.spec = SPEC


def _add(group: Any, name: str, hint: Any, default: Any, meaning: str) -> None:
    group.add_argument(
        f"--coe-{name.replace('_', '-')}",
        dest=f"coe_{name}",
        action=_ChainOption,
        default=default,
        help=f"{meaning.replace('%', '%%')} (default: {default})",
        **_kind(hint),
    )


def _kind(hint: Any) -> dict[str, Any]:
    """How argparse reads values of a setting's type."""
    if hint is bool:
        return {"nargs": 0}
    if get_origin(hint) is Literal:
        return {"choices": get_args(hint)}
    hint = next((part for part in get_args(hint) if part is not NoneType), hint)  # of X | None
    return {"type": int, "nargs": "+"} if get_origin(hint) is tuple else {"type": hint}


if __name__ == "__main__":
    main()
