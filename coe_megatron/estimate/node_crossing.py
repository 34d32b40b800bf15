"""Whether tokens travel across nodes to their experts though they need not."""

from dataclasses import replace

from coe_megatron.config.checks import problems
from coe_megatron.estimate.run_estimate import RunEstimate, estimate, size
from coe_megatron.estimate.run_shape import RunShape


def needless_crossing(run: RunShape, cost: RunEstimate) -> str | None:
    """A line with the bytes, and with the largest `parallel.expert` that would keep them inside nodes.

    None where nothing crosses. What crosses because an expert alone is spread over nodes (`parallel.expert_tensor`) has
    no remedy here.

    Args:
        cost: the run's estimate; `parallel.ranks_per_node` says what a node is.
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
                    f"the all-to-all sends {size(crossing)} a rank and step across nodes of "
                    f"{config.parallel.ranks_per_node}; parallel.expert={count} would keep it inside them, "
                    f"{_memory(other.needed - cost.needed)}"
                )
    return None


def _memory(more: int) -> str:
    return f"for {size(abs(more))} {'more' if more > 0 else 'less'} memory a rank"
