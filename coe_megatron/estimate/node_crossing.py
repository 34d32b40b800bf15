"""Warns if the experts' all-to-all crosses nodes although another layout would avoid it."""

from dataclasses import replace

from coe_megatron.config.checks import problems
from coe_megatron.estimate.run_estimate import RunEstimate, estimate, size
from coe_megatron.estimate.run_shape import RunShape


def needless_crossing(run: RunShape, cost: RunEstimate) -> str | None:
    """A line with the bytes, and with the largest `parallel.expert` that keeps the all-to-all inside nodes.

    None if it does not cross nodes, or if only `parallel.expert_tensor` makes it cross.

    Args:
        cost: the run's estimate; `parallel.ranks_per_node` defines nodes.
    """
    crossing = cost.communication["all_to_all"].across_nodes
    if not crossing:
        return None
    config = run.config
    for count in range(config.parallel.expert - 1, 0, -1):
        changed = replace(config, parallel=replace(config.parallel, expert=count))
        if next(problems(changed, run.layout.world_size), None) is None:
            other = estimate(run.changed(changed))
            if not other.communication["all_to_all"].across_nodes:
                return (
                    f"the all-to-all sends {size(crossing)} per rank and step across nodes of "
                    f"{config.parallel.ranks_per_node} ranks; parallel.expert={count} would keep it inside nodes, "
                    f"{_memory_change(other.needed - cost.needed)}"
                )
    return None


def _memory_change(more: int) -> str:
    return f"with {size(abs(more))} {'more' if more > 0 else 'less'} memory per rank"
