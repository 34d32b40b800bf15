"""Makes a chain's checkpoint of a model's, part by part and without a model, as `upcycle_plan` has found possible.

Of the tensors of a layer, routers, expert biases, norms and gains are made anew, per iteration; with new experts also
the experts. All others are copied. AdamW's moments are left out: a run starts from it with `training.warm_start`.

N: experts, D: hidden. Keys are `decoder.layers.mlp...` with all layers in one tensor, or `decoder.layers.3.mlp...`.
"""

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorProperties, TensorStorageMetadata

from coe_megatron.checkpoint import listing, storage
from coe_megatron.checkpoint.metadata import METADATA, CheckpointMetadata
from coe_megatron.checkpoint.storage import MASTER, Reader
from coe_megatron.checkpoint.tools import new_checkpoint, without_moments
from coe_megatron.config.layout import moe_pattern
from coe_megatron.config.load import dump
from coe_megatron.convert.upcycle_plan import CONFIG, Origin, Upcycling
from coe_megatron.errors import ConfigError
from coe_megatron.files import write_atomically

_LAYERS = "decoder.layers."
_PER_ITERATION = ("router.", "later_routers.", "norms.", "variants.")
_NORMS = ("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm.")  # the second with MLA
Make = Callable[[str, ChunkStorageMetadata], torch.Tensor]


@dataclass(frozen=True)
class _Recipe:
    """A tensor of the new checkpoint.

    Attributes:
        entry: shape, dtype and parts of the weight.
        make: from prefix (that of master weights, or none) and part to its values.
        has_master: False for a buffer.
    """

    entry: TensorStorageMetadata
    make: Make
    has_master: bool = True


def upcycle(source: Path, out: Path, plan: Upcycling, overwrite: bool = False) -> Path:
    """Write the checkpoint of the chain, with the chain's config in it as `chain.yaml`; returns its folder.

    Raises:
        ConfigError: `source` is not a complete checkpoint, or not one of the plan's model; or `out` as in
            `tools.reshard`.
    """
    checkpoint = listing.find(source)
    reader, metadata = Reader(checkpoint / "tensors"), CheckpointMetadata.read(checkpoint)
    recipes = dict(_Conversion(reader, plan).recipes())
    entries = {key: recipe.entry for key, recipe in recipes.items()}
    entries |= {MASTER + key: _as(r.entry, torch.float32) for key, r in recipes.items() if r.has_master}

    def make(key: str, chunk: ChunkStorageMetadata) -> torch.Tensor:
        prefix = MASTER if key.startswith(MASTER) else ""
        return recipes[key.removeprefix(MASTER)].make(prefix, chunk).to(entries[key].properties.dtype)

    with new_checkpoint(out, overwrite, [checkpoint]) as folder:
        metadata = replace(metadata, optimizer_steps=None, derived_from=[checkpoint.name])
        write_atomically(folder / METADATA, metadata.as_json())
        write_atomically(folder / CONFIG, dump(plan.target))
        storage.write(folder / "tensors", entries, make)
    return out


class _Conversion:
    def __init__(self, reader: Reader, plan: Upcycling) -> None:
        self.reader, self.plan = reader, plan
        self.entries = without_moments(reader.entries)
        self.experts = plan.target.moe.num_experts

    def recipes(self) -> Iterator[tuple[str, _Recipe]]:
        """Every tensor of the new checkpoint."""
        made: dict[str, _Recipe] = {}
        replaced: set[str] = set()
        for prefix, is_dense in self._layers():
            self._require(prefix, is_dense)
            made |= self._layer(prefix, is_dense)
            names = [f"{prefix}mlp.{name}" for name in _PER_ITERATION]
            if is_dense:
                names += [f"{prefix}mlp.linear_fc{n}.weight" for n in (1, 2)]
            replaced |= {key for key in self.entries if key.startswith(tuple(names))}
        kept = [key for key in self.entries if not key.startswith(MASTER) and key not in replaced and key not in made]
        yield from {key: self._copy(key) for key in kept}.items()
        yield from made.items()

    def _layers(self) -> Iterator[tuple[str, bool]]:
        """Prefix of every layer with experts, or of all in one, and whether it was dense."""
        before, after = moe_pattern(self.plan.source), moe_pattern(self.plan.target)
        if self.plan.source.moe.layer_freq == 1:
            yield _LAYERS, False
            return
        for number, (then, now) in enumerate(zip(before, after, strict=True)):
            if now:
                yield f"{_LAYERS}{number}.", not then

    def _require(self, prefix: str, is_dense: bool) -> None:
        """Check that the layer is of the source's config, as far as the conversion depends on it."""
        moe, chain = self.plan.source.moe, self.plan.source.chain
        if is_dense:
            self._entry(f"{prefix}mlp.linear_fc1.weight")
            return
        routers = chain.iterations if chain.gating == "independent" else 1
        hidden = self.plan.source.model.hidden_size
        for t in range(1, routers + 1):
            key = f"{prefix}mlp.{_router(t)}.weight"
            size = list(self._entry(key).size[-2:])
            if size != [moe.num_experts, hidden]:
                raise self._other(f"{key} is {size}, not {[moe.num_experts, hidden]}")
        gains = {"increment": chain.learned_scale is not None, "state": chain.conditioned}
        unexpected = [f"{prefix}mlp.{_router(routers + 1)}.weight"]
        unexpected += [f"{prefix}mlp.variants.{name}_gains.0" for name, has in gains.items() if not has]
        if found := [key for key in unexpected if key in self.entries]:
            raise self._other(f"it has {found[0]}")

    def _entry(self, key: str) -> TensorStorageMetadata:
        if key not in self.entries:
            raise self._other(f"it has no {key}")
        return self.entries[key]

    def _other(self, what: str) -> ConfigError:
        return ConfigError(f"checkpoint {self.reader.folder.parent} is not of the config's model: {what}")

    def _layer(self, prefix: str, is_dense: bool) -> dict[str, _Recipe]:
        """All tensors that are made anew."""
        made: dict[str, _Recipe] = {}
        if is_dense:
            made |= self._experts_of_dense(prefix)
        elif self.plan.new_experts:
            made |= {key: self._copied_experts(key) for n in (1, 2) for key in [_expert_key(prefix, n)]}
        for t, origin in enumerate(self.plan.origins(is_dense), start=1):
            made |= self._routing(prefix, t, origin, is_dense)
            made |= self._norms(prefix, t, origin)
            made |= self._gains(prefix, t, origin, is_dense)
        return made

    def _routing(self, prefix: str, t: int, origin: Origin, is_dense: bool) -> dict[str, _Recipe]:
        """Router W_t and its expert bias, where iteration t has them."""
        chain, moe = self.plan.target.chain, self.plan.target.moe
        made: dict[str, _Recipe] = {}
        is_new = is_dense or self.plan.new_experts
        key, model = (f"{prefix}mlp.{_router(i)}" for i in (t, origin.iteration))
        is_fresh = bool(origin.added) and self.plan.routers == "fresh"
        if t == 1 or chain.gating == "independent":
            drawn_as = key if is_fresh else model
            make = (
                self._fresh(f"{drawn_as}.weight", self.experts) if is_fresh or is_new else self._read(f"{model}.weight")
            )
            made[f"{key}.weight"] = _Recipe(self._shaped(prefix, self.experts), self._rolled(make, origin, 1))
        if moe.expert_bias and (t == 1 or chain.gating != "fixed"):
            make = _filled(0.0) if is_fresh or is_new else self._read(f"{model}.expert_bias", has_master=False)
            entry = _as(_resized(self._norm(prefix), self.experts), torch.float32)
            made[f"{key}.expert_bias"] = _Recipe(entry, self._rolled(make, origin, 0), has_master=False)
        return made

    def _norms(self, prefix: str, t: int, origin: Origin) -> dict[str, _Recipe]:
        """The norm of iteration t > 1; that of the first is where a layer without chain has it."""
        if self.plan.target.chain.norm_placement != "iteration_norm" or t == 1:
            return {}
        first = self._norm_name(prefix)
        names = ("weight", "bias") if f"{first}bias" in self.entries else ("weight",)
        model = f"{prefix}mlp.norms.{origin.iteration - 1}." if origin.iteration > 1 else first
        return {f"{prefix}mlp.norms.{t - 1}.{name}": self._copy(f"{model}{name}") for name in names}

    def _gains(self, prefix: str, t: int, origin: Origin, is_dense: bool) -> dict[str, _Recipe]:
        """a_t and c_t, where the chain has them."""
        chain, source = self.plan.target.chain, self.plan.source.chain
        entry, made = self._norm(prefix), {}
        for name, has, had in (
            ("increment", chain.learned_scale is not None, source.learned_scale is not None),
            ("state", chain.conditioned, source.conditioned),
        ):
            key, model = (f"{prefix}mlp.variants.{name}_gains.{i - 1}" for i in (t, origin.iteration))
            if not has:
                continue
            if name == "increment" and origin.added:
                make = _filled(0.0)
            else:
                make = self._read(model) if had and not is_dense else _filled(1.0)
            made[key] = _Recipe(entry, make)
        return made

    def _copied_experts(self, key: str) -> _Recipe:
        """N copies of the only expert, whose axis is the third last."""
        entry = self._entry(key)
        axis = len(entry.size) - 3
        chunks = [_moved(chunk, axis, i, 1) for i in range(self.experts) for chunk in entry.chunks]
        size = [*entry.size]
        size[axis] = self.experts
        read = self._read(key)

        def make(prefix: str, chunk: ChunkStorageMetadata) -> torch.Tensor:
            return read(prefix, _moved(chunk, axis, 0, 1)).expand(chunk.sizes)

        return _Recipe(TensorStorageMetadata(entry.properties, torch.Size(size), chunks), make)

    def _experts_of_dense(self, prefix: str) -> dict[str, _Recipe]:
        """Experts, and shared ones if they take the dense feed-forward."""
        keys = [f"{prefix}mlp.linear_fc{n}.weight" for n in (1, 2)]
        if not self.plan.shared_takes_dense:
            factors = (1.0, 1.0 / self.plan.target.moe.scaling)
            return {
                _expert_key(prefix, n): self._copies_of_dense(key, factor)
                for n, key, factor in zip((1, 2), keys, factors, strict=True)
            }
        made = {f"{prefix}mlp.shared_experts.linear_fc{n}.weight": self._copy(keys[n - 1]) for n in (1, 2)}
        hidden, ffn = self.plan.target.model.hidden_size, self.plan.target.moe.ffn_hidden_size
        rows = 2 * ffn if self.plan.target.model.activation == "swiglu" else ffn
        first, properties = _expert_key(prefix, 1), self._entry(keys[0]).properties
        made[first] = _Recipe(_per_expert(properties, self.experts, rows, hidden), self._fresh(first, rows, False))
        second = _per_expert(properties, self.experts, hidden, ffn)
        return {**made, _expert_key(prefix, 2): _Recipe(second, _filled(0.0))}

    def _copies_of_dense(self, key: str, factor: float) -> _Recipe:
        entry, read = self._entry(key), self._read(key)
        chunks = [_inserted(chunk, 0, i, 1) for i in range(self.experts) for chunk in entry.chunks]

        def make(prefix: str, chunk: ChunkStorageMetadata) -> torch.Tensor:
            inner = ChunkStorageMetadata(torch.Size(chunk.offsets[1:]), torch.Size(chunk.sizes[1:]))
            return (read(prefix, inner) * factor).expand(chunk.sizes)

        return _Recipe(TensorStorageMetadata(entry.properties, torch.Size([self.experts, *entry.size]), chunks), make)

    def _copy(self, key: str) -> _Recipe:
        has_master = MASTER + key in self.entries
        return _Recipe(self._entry(key), self._read(key, has_master), has_master)

    def _read(self, key: str, has_master: bool = True) -> Make:
        self._entry((MASTER if has_master else "") + key)
        return lambda prefix, chunk: self.reader.part(prefix + key, chunk)

    def _fresh(self, key: str, rows: int, is_router: bool = True) -> Make:
        """Matrices [rows, D] as training initialises them, each from a seed of its own."""
        model, kaiming = self.plan.target.model, self.plan.target.moe.router_init == "kaiming_uniform"

        def draw(index: tuple[int, ...]) -> torch.Tensor:
            digest = hashlib.sha256(f"{self.plan.seed} {key} {index}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
            matrix = torch.empty(rows, model.hidden_size)
            if is_router and kaiming:
                return torch.nn.init.kaiming_uniform_(matrix, a=math.sqrt(5), generator=generator)
            return torch.nn.init.normal_(matrix, std=model.init_method_std, generator=generator)

        def make(_prefix: str, chunk: ChunkStorageMetadata) -> torch.Tensor:
            spans = [slice(o, o + s) for o, s in zip(chunk.offsets, chunk.sizes, strict=True)]
            indices = product(*(range(span.start, span.stop) for span in spans[:-2]))
            return torch.stack([draw(index)[*spans[-2:]] for index in indices]).reshape(chunk.sizes)

        return make

    def _rolled(self, make: Make, origin: Origin, after: int) -> Make:
        """With `roll`, the experts of an added iteration moved on; `after`: axes behind that of the experts."""
        if self.plan.routers != "roll" or not origin.added:
            return make
        shift = origin.added * (self.experts // self.plan.target.chain.iterations)

        def rolled(prefix: str, chunk: ChunkStorageMetadata) -> torch.Tensor:
            axis = len(chunk.sizes) - 1 - after
            whole = make(prefix, _moved(chunk, axis, 0, self.experts)).roll(shift, axis)
            return whole.narrow(axis, chunk.offsets[axis], chunk.sizes[axis])

        return rolled

    def _norm_name(self, prefix: str) -> str:
        return next((prefix + name for name in _NORMS if f"{prefix}{name}weight" in self.entries), prefix + _NORMS[0])

    def _norm(self, prefix: str) -> TensorStorageMetadata:
        """The norm before the experts, [.., D]: new tensors have its dtype, and are split over layers as it is."""
        return self._entry(f"{self._norm_name(prefix)}weight")

    def _shaped(self, prefix: str, rows: int) -> TensorStorageMetadata:
        """[.., rows, D]."""
        norm = self._norm(prefix)
        axis = len(norm.size) - 1
        size = torch.Size([*norm.size[:axis], rows, *norm.size[axis:]])
        return TensorStorageMetadata(norm.properties, size, [_inserted(c, axis, 0, rows) for c in norm.chunks])


def _router(t: int) -> str:
    return "router" if t == 1 else f"later_routers.{t - 2}"


def _expert_key(prefix: str, n: int) -> str:
    return f"{prefix}mlp.experts.experts.linear_fc{n}.weight"


def _filled(value: float) -> Make:
    return lambda _prefix, chunk: torch.full(chunk.sizes, value)


def _as(entry: TensorStorageMetadata, dtype: torch.dtype) -> TensorStorageMetadata:
    return replace(entry, properties=TensorProperties(dtype))


def _resized(entry: TensorStorageMetadata, last: int) -> TensorStorageMetadata:
    """With another last axis, which is in one part."""
    chunks = [_moved(chunk, len(entry.size) - 1, 0, last) for chunk in entry.chunks]
    return replace(entry, size=torch.Size([*entry.size[:-1], last]), chunks=chunks)


def _per_expert(properties: TensorProperties, experts: int, rows: int, columns: int) -> TensorStorageMetadata:
    """[N, rows, columns] in a part for each expert."""
    whole = ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([rows, columns]))
    chunks = [_inserted(whole, 0, i, 1) for i in range(experts)]
    return TensorStorageMetadata(properties, torch.Size([experts, rows, columns]), chunks)


def _moved(chunk: ChunkStorageMetadata, axis: int, offset: int, size: int) -> ChunkStorageMetadata:
    """The part with another span along an axis."""
    offsets, sizes = [*chunk.offsets], [*chunk.sizes]
    offsets[axis], sizes[axis] = offset, size
    return ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))


def _inserted(chunk: ChunkStorageMetadata, axis: int, offset: int, size: int) -> ChunkStorageMetadata:
    """The part with one more axis."""
    offsets, sizes = [*chunk.offsets], [*chunk.sizes]
    offsets.insert(axis, offset)
    sizes.insert(axis, size)
    return ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
