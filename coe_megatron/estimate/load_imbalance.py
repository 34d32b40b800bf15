"""How much longer the experts of the busiest rank work than the mean, from the loads that a run has measured."""

from collections.abc import Sequence

from coe_megatron.errors import ConfigError


def load_imbalance(loads: Sequence[Sequence[float]], ranks: int) -> float:
    """The load of the busiest rank over the mean, as a mean over layers and iterations, which wait for it one by one.

    Args:
        loads: of the experts, for each layer and iteration.
        ranks: that hold an equal number of consecutive experts each.

    Raises:
        ConfigError: the ranks cannot divide the experts.
    """
    found = []
    for load in loads:
        if len(load) % ranks:
            raise ConfigError(f"the run has {len(load)} experts, and {ranks} expert-parallel ranks cannot divide them")
        each = len(load) // ranks
        found.append(max(sum(load[first : first + each]) for first in range(0, len(load), each)) * ranks / sum(load))
    return sum(found) / len(found)
