"""Which chain a trained model can become so that the chain computes what the model did. Without torch.

    x(t) = a_t ⊙ F_t(x(t-1)) + r(t)     a_t: the gains of `chain.learned_scale`

A chain of C' iterations keeps the function of one of C (a mixture of experts has C = 1) if the added iterations begin
with gains of 0, and the others keep theirs, or 1:

    inner    Δ = Σ_t a_t F_t      the added ones are last: they add nothing
    init     Δ = a_C F_C          the added ones are first: they leave x(t) = 0 + x(0)
    outer    Δ = a_C F_C          none: an added iteration of gain 0 leaves x(t) = 0

docs/upcycling.md has more. N: experts, K: experts per token, F: width of an expert, M: shared experts.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from coe_megatron.config.layout import moe_pattern
from coe_megatron.config.load import flat, read, resolve
from coe_megatron.config.settings import MoESettings, RunConfig
from coe_megatron.errors import ConfigError

CONFIG = "chain.yaml"  # in the new checkpoint: the config of a run that starts from it
Routers = Literal["copy", "roll", "fresh"]
_SETTABLE = (
    "chain.gating", "chain.residual", "chain.norm_placement", "chain.no_return", "chain.conditioned",
    "chain.aux_loss_reduction", "moe.num_experts", "moe.topk", "moe.renormalise", "moe.layer_freq",
)  # fmt: skip


@dataclass(frozen=True)
class Origin:
    """What iteration t of the new chain is.

    Attributes:
        iteration: the source's iteration, from 1, that it continues, or whose router and norm it starts from.
        added: 0 if it continues it; otherwise its number among the added iterations, from 1.
    """

    iteration: int
    added: int


@dataclass(frozen=True)
class Upcycling:
    """A conversion that was found possible.

    Attributes:
        source: config of the checkpoint.
        target: config of the chain.
        routers: what the routers of added iterations are: copies; copies whose rows are shifted, so that other experts
            are chosen; or fresh.
        seed: of fresh weights.
    """

    source: RunConfig
    target: RunConfig
    routers: Routers
    seed: int

    def origins(self, dense: bool) -> list[Origin]:
        """The origin of every iteration of a layer; `dense` if it had no experts."""
        old, new = 1 if dense else self.source.chain.iterations, self.target.chain.iterations
        kept = [Origin(t, 0) for t in range(1, old + 1)]
        if self.target.chain.residual == "init":
            return [Origin(1, number) for number in range(1, new - old + 1)] + kept
        return kept + [Origin(old, number) for number in range(1, new - old + 1)]

    @property
    def new_experts(self) -> bool:
        """Whether the single expert of each layer becomes several."""
        return self.source.moe.num_experts != self.target.moe.num_experts

    @property
    def dense_layers(self) -> list[int]:
        """1-based numbers of the dense layers that get experts."""
        return _new_moe_layers(self.source, self.target)

    @property
    def keeps_function(self) -> bool:
        """Whether the first step computes exactly what the source did."""
        return self.new_experts or self.source.moe.topk == self.target.moe.topk

    @property
    def shared_takes_dense(self) -> bool:
        """Whether a dense feed-forward becomes the shared experts, beside routed ones whose output starts at 0."""
        moe = self.target.moe
        return moe.num_shared_experts * moe.ffn_hidden_size == _dense_width(self.target)

    def changes(self) -> list[str]:
        """The settings that differ from the source's, as overrides."""
        before, after = flat(self.source), flat(self.target)
        return [f"{name}={_shown(after[name])}" for name in after if after[name] != before[name] and name != "output"]


def find_config(source: Path, given: Path | None = None) -> Path:
    """The config of a run, of a checkpoint in its folder, or of a checkpoint made by this.

    Raises:
        ConfigError: there is none, and none is given.
    """
    if given is not None:
        return given
    candidates = [
        source / "config.yaml",
        source / CONFIG,
        *(above / "config.yaml" for above in source.absolute().parents[:2]),
    ]
    for path in candidates:
        if path.is_file():
            return path
    raise ConfigError(f"DIR is {source}: it is not in a run's folder, so name the config of its model with --config")


def plan(
    config: Path, out: Path, iterations: int, routers: str | None = None, changes: Sequence[str] = (), seed: int = 1234
) -> Upcycling:
    """Find out whether a conversion is possible, and the chain's config.

    Args:
        config: the source's.
        out: the checkpoint to be made; the chain's config starts from it.
        iterations: C'.
        routers: of `Routers`; None for `copy`.
        changes: overrides of other settings, of `_SETTABLE`.
        seed: of fresh weights.

    Raises:
        ConfigError: it is not possible; one line that says why.
    """
    values = read(config)
    source = resolve(values, source=str(config))
    if routers is not None and routers not in get_args(Routers):
        raise ConfigError(f"--routers is {routers}: it must be one of {', '.join(get_args(Routers))}")
    for change in changes:
        if (name := change.partition("=")[0]) not in _SETTABLE:
            raise ConfigError(f"--set {name}: only {', '.join(_SETTABLE)} can be set here")
    given = [*changes, f"chain.iterations={iterations}"]
    target = resolve(values, given, source="the chain's config")
    for problem in _problems(source, target, routers):
        raise ConfigError(problem)
    adds = iterations > source.chain.iterations or (iterations > 1 and _new_moe_layers(source, target))
    if source.chain.learned_scale is None and adds:
        given.append("chain.learned_scale=1.0")
    # Megatron stores the layers as one tensor with 1, and one by one with a list: as they are in the checkpoint.
    given.append(f"moe.layer_freq={1 if source.moe.layer_freq == 1 else list(moe_pattern(target))}")
    place = out.resolve()
    given += [f"training.warm_start={json.dumps(str(place))}", f"output={json.dumps(f'{place}-run')}"]
    target = resolve(values, given, source="the chain's config")
    return Upcycling(source, target, "copy" if routers is None else routers, seed)  # type: ignore[arg-type]


def _problems(source: RunConfig, target: RunConfig, routers: str | None) -> Iterator[str]:
    before, after = flat(source), flat(target)
    changed = [name for name in after if after[name] != before.get(name)]
    old, new, grows = source.chain.iterations, target.chain.iterations, _new_moe_layers(source, target)
    growing = bool(grows) or "moe.num_experts" in changed
    if new < old or (new == old and not growing):
        yield f"--iterations is {new}: the model has {old} already, so it must be at least {old + 1}"
    yield from _chain_problems(source, target, changed)
    yield from _router_problems(target, routers)
    if "moe.num_experts" in changed:
        yield from _expert_problems(source, target)
    elif "moe.renormalise" in changed:
        yield "--set moe.renormalise: other gates do not give the model's function"
    if grows:
        yield from _dense_problems(target)
    if any(now < then for then, now in zip(moe_pattern(source), moe_pattern(target), strict=True)):
        yield f"--set moe.layer_freq={_shown(target.moe.layer_freq)}: a layer would lose its experts"


def _chain_problems(source: RunConfig, target: RunConfig, changed: Sequence[str]) -> Iterator[str]:
    old, chain = source.chain.iterations, target.chain
    adds = chain.iterations > old or (chain.iterations > 1 and bool(_new_moe_layers(source, target)))
    if source.chain.layers is not None:
        yield (
            f"chain.layers is {list(source.chain.layers)}: the other layers would choose {chain.iterations} times "
            "moe.topk experts, which is another function"
        )
    for name in ("modulation_rank", "streams", "latent"):
        if getattr(chain, name) is not None:
            yield f"chain.{name} is {getattr(chain, name)}: only models without it can be converted"
    if adds and chain.residual == "outer":
        advice = "take --set chain.residual=inner or init" if old == 1 else "only inner and init chains can grow"
        yield f"chain.residual is outer: an iteration with gain 0 would leave nothing of its input, {advice}"
    if adds and chain.residual == "init" and chain.no_return:
        yield "chain.no_return is true: with chain.residual init added iterations would mask experts of the others"
    for name in ("chain.gating", "chain.residual", "chain.no_return") if old > 1 else ():
        if name in changed:
            yield f"--set {name}: a model of {old} iterations would compute something else"
    placements = {source.chain.norm_placement, chain.norm_placement}
    if len(placements) > 1 and (old > 1 or "reference" in placements):
        yield (
            f"--set chain.norm_placement={chain.norm_placement}: a model with {old} iterations and "
            f"{source.chain.norm_placement} would compute something else"
        )
    if source.chain.conditioned and not chain.conditioned:
        yield "--set chain.conditioned=false: the model has learned gains, which would be lost"


def _router_problems(target: RunConfig, routers: str | None) -> Iterator[str]:
    gating, experts, iterations = target.chain.gating, target.moe.num_experts, target.chain.iterations
    if routers is not None and gating != "independent":
        yield f"--routers is {routers}: chain.gating {gating} has no later routers, leave it away"
    if routers == "roll" and experts < iterations:
        yield f"--routers is roll: {iterations} iterations need as many experts, and a layer has {experts}"


def _expert_problems(source: RunConfig, target: RunConfig) -> Iterator[str]:
    """Of N experts that are copies of one, whose gate is 1."""
    new, old = target.moe.num_experts, source.moe.num_experts
    prefix = f"--set moe.num_experts={new}: "
    if old != 1:
        yield f"{prefix}the model has {old}, and only a single expert can be copied"
    if source.moe.score_function == "sigmoid":
        yield f"{prefix}the gate of the model's expert is not constant (moe.score_function sigmoid)"
    yield from (prefix + problem for problem in _copy_problems(target.moe))


def _copy_problems(moe: MoESettings) -> Iterator[str]:
    """Why copies of one feed-forward do not sum to it."""
    sigmoid = moe.score_function == "sigmoid"
    if not (moe.topk > 1 if sigmoid else moe.renormalise or moe.topk == moe.num_experts):
        advice = "moe.topk > 1" if sigmoid else "moe.renormalise true and moe.topk > 1"
        yield f"the gates of a token's copies must sum to 1, which needs {advice}"
    if moe.capacity_factor is not None:
        yield "moe.capacity_factor would drop some of a token's copies, it must be null"


def _dense_problems(target: RunConfig) -> Iterator[str]:
    """Of dense layers that get experts."""
    moe, width = target.moe, _dense_width(target)
    prefix = f"--set moe.layer_freq={_shown(target.moe.layer_freq)}: "
    if target.chain.norm_placement == "reference":
        yield f"{prefix}dense layers are pre-norm, and chain.norm_placement is reference"
    shared = moe.num_shared_experts * moe.ffn_hidden_size
    if shared == width:
        return
    if moe.num_shared_experts or moe.ffn_hidden_size != width:
        yield (
            f"{prefix}a dense layer of width {width} (model.ffn_hidden_size) becomes shared experts of that width "
            f"together, or experts of that width without shared ones; here {moe.num_shared_experts} shared and "
            f"{moe.num_experts} routed ones have width {moe.ffn_hidden_size}"
        )
    yield from (prefix + problem for problem in _copy_problems(moe))


def _new_moe_layers(source: RunConfig, target: RunConfig) -> list[int]:
    pairs = zip(moe_pattern(source), moe_pattern(target), strict=True)
    return [number for number, (then, now) in enumerate(pairs, start=1) if now > then]


def _dense_width(config: RunConfig) -> int:
    return config.model.ffn_hidden_size or 4 * config.model.hidden_size


def _shown(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
