"""Sizes of DeepSpeed's buckets and thresholds, as fractions of a rank's parameters.

DeepSpeed's defaults are for models of billions of parameters: with fewer than about 50 million, a bucket would be
larger than all gradients, and stage 3 would neither partition parameters nor release gathered ones. In DeepSpeed 0.19.8
(`runtime/zero`, `runtime/engine.py`) the keys of `zero_optimization` have these meanings; the fractions of a rank's P
parameters are ours:

* `reduce_bucket_size`, P / 8: gradients reduced at once, in a buffer of this size in stages 1 to 3 (two buffers if
  stages 1 and 2 overlap); a larger tensor is reduced without a buffer. Stage 0, and stage 1 in bf16, have no buffer but
  copy this many gradients (500 million by default; `zero.engine.build_engine` passes our size). At least half a
  megabyte is reduced at once, or all of a smaller model: with less, ranks mostly wait for each other;
* `allgather_bucket_size`, P / 8: weights gathered at once after a step, in place; must be even;
* `stage3_prefetch_bucket_size`, P / 8: weights prefetched each time a module is entered;
* `stage3_max_live_parameters`, P / 4: prefetching stops while this many weights are gathered;
* `stage3_max_reuse_distance`, P / 8: weights that are used again within this many parameters stay gathered;
* `stage3_param_persistence_threshold`, P / 1000: tensors up to this size are never partitioned.

`sub_group_size` only splits the optimizer step, and offloading buffers the largest tensor; both costs scale with the
model already.
"""

from dataclasses import dataclass
from typing import Any

_MOST = {"max_live": 1_000_000_000, "persistence_threshold": 100_000}  # DeepSpeed's defaults
_LEAST_REDUCED = 1 << 17
_MOST_BUCKET = 50_000_000  # DeepSpeed's default for prefetching; its 500 million for reducing takes much memory


@dataclass(frozen=True)
class ZeroSizes:
    """Sizes in parameters; see the docstring of the module.

    Attributes:
        reduce_bucket: gradients reduced at once.
        allgather_bucket: weights gathered at once after a step.
        prefetch_bucket: weights that stage 3 prefetches.
        reuse_distance: stage 3 keeps weights gathered that are used again within this distance.
        max_live: stage 3 does not prefetch while this many weights are gathered.
        persistence_threshold: stage 3 replicates tensors up to this size on every rank.
        overlap: `overlap_comm`: stages 1 and 2 reduce gradients during the backward pass, with a second buffer.
    """

    reduce_bucket: int
    allgather_bucket: int
    prefetch_bucket: int
    reuse_distance: int
    max_live: int
    persistence_threshold: int
    overlap: bool

    @classmethod
    def of(cls, parameters: int, native: dict[str, Any]) -> "ZeroSizes":
        """The sizes of a rank with this many unpartitioned parameters; `native` (`zero.deepspeed`) overrides them."""
        bucket = min(_MOST_BUCKET, 2 * -(-parameters // 16))
        fractions = {"max_live": parameters // 4, "persistence_threshold": parameters // 1000}
        ours = dict.fromkeys(_KEYS, bucket) | {name: min(_MOST[name], size) for name, size in fractions.items()}
        ours["reduce_bucket"] = max(bucket, min(_LEAST_REDUCED, parameters))
        own = native.get("zero_optimization", {})
        given = {name: int(own[key]) for name, keys in _KEYS.items() for key in keys if key in own}
        return cls(**ours | given, overlap=own.get("overlap_comm", True))

    def as_native(self) -> dict[str, int]:
        """The keys of DeepSpeed's `zero_optimization`."""
        return {keys[0]: getattr(self, name) for name, keys in _KEYS.items()}


_KEYS = {  # DeepSpeed accepts either name
    "reduce_bucket": ("reduce_bucket_size",),
    "allgather_bucket": ("allgather_bucket_size",),
    "prefetch_bucket": ("stage3_prefetch_bucket_size", "prefetch_bucket_size"),
    "reuse_distance": ("stage3_max_reuse_distance", "max_reuse_distance"),
    "max_live": ("stage3_max_live_parameters", "max_live_parameters"),
    "persistence_threshold": ("stage3_param_persistence_threshold", "param_persistence_threshold"),
}
_MAY_BE_0 = {"prefetch_bucket", "reuse_distance", "persistence_threshold"}


def sizes_problem(native: dict[str, Any]) -> str | None:
    """What is wrong with the sizes in DeepSpeed's JSON, in one line; None if nothing is."""
    own = native.get("zero_optimization", {})
    if not isinstance(own, dict):
        return "zero_optimization must hold an object"
    if type(overlap := own.get("overlap_comm", True)) is not bool:
        return f"zero_optimization.overlap_comm is {overlap!r}: it must be true or false"
    for name, keys in _KEYS.items():
        for key in set(keys) & own.keys():
            value, least = own[key], 0 if name in _MAY_BE_0 else 1
            if type(value) not in (int, float) or value != value // 1 or value < least:
                return f"zero_optimization.{key} is {value!r}: it must be a whole number of at least {least}"
            if name == "allgather_bucket" and value % 2:
                return f"zero_optimization.{key} is {value}: it must be even"
    return None
