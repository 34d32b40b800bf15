"""How large DeepSpeed's buckets and thresholds are. They follow the model, so that no constant hides what models differ in.

DeepSpeed's own sizes are for models of billions of parameters: below some 50 million a bucket would be larger than the
gradients it is for, and stage 3 would cut nothing and let go of nothing. Read in the source of 0.19.8 (`runtime/zero`):

| key of `zero_optimization` | what has that size | ours |
|---|---|---|
| `reduce_bucket_size` | gradients reduced at once: a buffer of stages 1 to 3 (1 and 2 have two if they overlap); larger tensors are reduced without it. We give stage 0, and stage 1 in bf16, the same | 1/8 of the parameters |
| `allgather_bucket_size` | weights gathered at once after a step, in place; must be even | the same |
| `stage3_prefetch_bucket_size` | weights of stage 3 gathered ahead, anew whenever a module is entered | the same |
| `stage3_max_reuse_distance` | weights of stage 3 that are needed again within so many parameters stay gathered | the same |
| `stage3_max_live_parameters` | weights of stage 3 beyond which none are gathered ahead | 1/4 of the parameters |
| `stage3_param_persistence_threshold` | tensors of stage 3 that are never cut | 1/1000 of the parameters |

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
    """

    reduce_bucket: int
    allgather_bucket: int
    prefetch_bucket: int
    reuse_distance: int
    live: int
    never_cut: int

    @classmethod
    def of(cls, parameters: int, native: dict[str, Any]) -> "ZeroSizes":
        """Those of a rank that has so many parameters before ZeRO cuts them; `native` (`zero.deepspeed`) goes first."""
        bucket = min(_MOST_BUCKET, 2 * -(-parameters // 16))
        shares = {"live": parameters // 4, "never_cut": parameters // 1000}
        ours = dict.fromkeys(_KEYS, bucket) | {name: min(_MOST[name], share) for name, share in shares.items()}
        own = native.get("zero_optimization", {})
        given = {name: int(own[key]) for name, keys in _KEYS.items() for key in keys if key in own}
        return cls(**ours | given)

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
