"""How large DeepSpeed's buckets and thresholds are: they follow the model, so no constant hides what models differ in.

DeepSpeed's own sizes are for models of billions of parameters: below some 50 million a bucket would be larger than the
gradients it is for, and stage 3 would cut nothing and let go of nothing. What the keys of `zero_optimization` do, read
in the source of 0.19.8 (`runtime/zero`, `runtime/engine.py`), and what we take of a rank's P parameters:

* `reduce_bucket_size`, P / 8: gradients reduced at once, in a buffer of that size in stages 1 to 3, and in two of them
  where stages 1 and 2 overlap; a larger tensor is reduced without. Stage 0, and stage 1 in bf16, have no buffer but
  copy so many (DeepSpeed has them copy 500 million, and we tell them otherwise);
* `allgather_bucket_size`, P / 8: weights gathered at once after a step, in place; it must be even;
* `stage3_prefetch_bucket_size`, P / 8: weights gathered ahead, anew whenever a module is entered;
* `stage3_max_live_parameters`, P / 4: where so many weights are whole none are gathered ahead;
* `stage3_max_reuse_distance`, P / 8: weights that are needed again within so many parameters stay whole;
* `stage3_param_persistence_threshold`, P / 1000: tensors of at most so many parameters are never cut.

`sub_group_size` only cuts a step into smaller ones, and offloading keeps a buffer of the largest tensor: these cost
nothing that does not follow the model anyway.
"""

from dataclasses import dataclass
from typing import Any

_MOST = {"live": 1_000_000_000, "never_cut": 100_000}  # DeepSpeed's own
_MOST_BUCKET = 50_000_000  # as DeepSpeed has it for gathering ahead; 500 million for reducing is much


@dataclass(frozen=True)
class ZeroSizes:
    """In parameters.

    Attributes:
        reduce_bucket: gradients reduced at once.
        allgather_bucket: weights gathered at once after a step.
        prefetch_bucket: weights that stage 3 gathers ahead.
        reuse_distance: stage 3 keeps gathered what it needs again within so many.
        live: stage 3 gathers nothing ahead where so many are there.
        never_cut: a tensor of at most so many is whole on every rank in stage 3.
        overlap: `overlap_comm`: stages 1 and 2 reduce gradients while the backward pass goes on, from a second buffer.
    """

    reduce_bucket: int
    allgather_bucket: int
    prefetch_bucket: int
    reuse_distance: int
    live: int
    never_cut: int
    overlap: bool

    @classmethod
    def of(cls, parameters: int, native: dict[str, Any]) -> "ZeroSizes":
        """Those of a rank with so many parameters before ZeRO cuts them; `native`, of `zero.deepspeed`, goes first."""
        bucket = min(_MOST_BUCKET, 2 * -(-parameters // 16))
        shares = {"live": parameters // 4, "never_cut": parameters // 1000}
        ours = dict.fromkeys(_KEYS, bucket) | {name: min(_MOST[name], share) for name, share in shares.items()}
        own = native.get("zero_optimization", {})
        given = {name: int(own[key]) for name, keys in _KEYS.items() for key in keys if key in own}
        return cls(**ours | given, overlap=own.get("overlap_comm", True))

    def as_native(self) -> dict[str, int]:
        """In DeepSpeed's words."""
        return {keys[0]: getattr(self, name) for name, keys in _KEYS.items()}


_KEYS = {  # DeepSpeed takes either name of a setting
    "reduce_bucket": ("reduce_bucket_size",),
    "allgather_bucket": ("allgather_bucket_size",),
    "prefetch_bucket": ("stage3_prefetch_bucket_size", "prefetch_bucket_size"),
    "reuse_distance": ("stage3_max_reuse_distance", "max_reuse_distance"),
    "live": ("stage3_max_live_parameters", "max_live_parameters"),
    "never_cut": ("stage3_param_persistence_threshold", "param_persistence_threshold"),
}
_MAY_BE_0 = {"prefetch_bucket", "reuse_distance", "never_cut"}


def sizes_trouble(native: dict[str, Any]) -> str | None:
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
