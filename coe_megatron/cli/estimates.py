"""What `coe-pretrain` predicts: the cost of a run (--dry-run), the fastest layouts for it (--suggest), its goodput on
nodes that fail (--simulate), and what all its ranks would have (--rehearse).
"""

import json
import os
from dataclasses import replace
from pathlib import Path

from coe_megatron.config import RunConfig
from coe_megatron.config.checks import check
from coe_megatron.config.load import dump
from coe_megatron.data.folders import missing_folders
from coe_megatron.errors import ConfigError
from coe_megatron.estimate.advice import device_memory_option, refusal
from coe_megatron.estimate.dispatch import resolved
from coe_megatron.estimate.load_imbalance import load_imbalance
from coe_megatron.estimate.machine import Machine, machine, machines
from coe_megatron.estimate.node_crossing import needless_crossing
from coe_megatron.estimate.run_estimate import RunEstimate, estimate, size, vocabulary
from coe_megatron.estimate.run_shape import RunShape
from coe_megatron.estimate.step_time import step_time
from coe_megatron.estimate.traffic import Sent
from coe_megatron.files import problem, require_folder, require_writable, write_atomically
from coe_megatron.lean_imports import import_megatron, without_collection
from coe_megatron.run.metrics_log import read_metrics
from coe_megatron.scale.failures import Goodput, Job, best_interval, between_stops, daly, simulate, young
from coe_megatron.scale.search import MARGIN, Found, Result, Search
from coe_megatron.scale.step_picture import draw_step
from coe_megatron.text import aligned, aligned_facts, duration, format_duration


def estimated(
    config: RunConfig,
    machine_name: str | None,
    device_memory: str | None,
    routing: Path | None,
    picture: Path | None,
    as_json: bool,
) -> str:
    """The cost as a table, or as a JSON object.

    Args:
        machine_name, device_memory, routing, picture: the options; None if they were not given.

    Raises:
        ConfigError: an option is not valid, or the run does not fit.
    """
    if picture is not None:
        if machine_name is None:
            raise ConfigError("--picture needs --machine, on which a step takes the time that is drawn")
        require_writable(picture, "--picture", "file")
    if routing is not None and machine_name is None:
        raise ConfigError("--routing needs --machine, on which the busiest rank takes longer")
    available = None if device_memory is None else device_memory_option(device_memory)
    run, found = resolved(config, vocabulary(config)), None if machine_name is None else machine_of(machine_name)
    cost = estimate(run, machine=found, imbalance=1.0 if routing is None else _imbalance(routing, run))
    if available is not None and (refused := refusal(run, cost, available)):
        raise ConfigError(f"--device-memory {device_memory}: {refused}")
    warnings = [*missing_folders(config.data), *filter(None, [needless_crossing(run, cost)])]
    if picture is not None:
        _draw(cost, picture)
    if as_json:
        return json.dumps({**cost.as_dict(), "warnings": warnings}, indent=2)
    return "\n".join([cost.table(), *(f"warning: {each}" for each in warnings)])


def _draw(cost: RunEstimate, path: Path) -> None:
    assert cost.time is not None and cost.machine is not None
    title = f"a step on {cost.layout.world_size:,} ranks: {cost.layout}\n{cost.machine.name}"
    _write(path, "--picture", draw_step(cost.time, title))


def _write(path: Path, option: str, content: str | bytes) -> None:
    """Write the file that an option names, and its folder if there is none."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content)
    except OSError as error:
        raise problem(path, option, error) from None


def _imbalance(folder: Path, run: RunShape) -> float:
    """Of the loads that the last logged step of a run had."""
    require_folder(folder, "--routing")
    try:
        lines = read_metrics(folder / "metrics.jsonl")
        routed = [line["routing"] for line in lines if line.get("routing")]
        loads = [[float(load) for load in part["load"]] for part in routed[-1]] if routed else []
    except (ValueError, LookupError, TypeError) as error:
        raise problem(folder, "--routing", f"its metrics.jsonl cannot be used ({error})") from None
    if not loads or not all(sum(load) > 0 for load in loads):
        raise problem(folder, "--routing", "no step with the loads of experts is logged there")
    try:
        return load_imbalance(loads, run.layout.expert)
    except ConfigError as error:
        raise problem(folder, "--routing", str(error)) from None


def best_save_interval(config: RunConfig, machine_name: str, ranks: int, spare_nodes: int) -> int:
    """The steps between checkpoints with the highest simulated goodput, for a job with so many spare nodes.

    Raises:
        ConfigError: there is no such machine.
    """
    found = machine_of(machine_name, "COE_MACHINE")
    run = resolved(config, vocabulary(config), ranks)
    failures = replace(found.failures, spare_nodes=spare_nodes)
    return best_interval(Job.of(run, found, step_time(run, found).total), failures)


def simulated(config: RunConfig, machine_name: str | None, gpus: int | None) -> str:
    """The goodput of a run whose nodes fail, with its own interval of saves and with the best one.

    Raises:
        ConfigError: an option is missing or not valid.
    """
    found = _required(machine_name, "--simulate")
    run = resolved(config, vocabulary(config), _ranks(config, gpus, found))
    check(run.config, run.layout.world_size)
    job = Job.of(run, found, step_time(run, found).total)
    failures, between = found.failures, between_stops(job, found.failures)
    best = replace(job, interval=best_interval(job, failures))
    rules = [f"{name}'s rule {max(1, round(rule(job.save, between) / job.step)):,}" for name, rule in _RULES.items()]
    rules.insert(0, f"{best.interval:,} steps ({format_duration(best.interval * job.step)})")
    node = format_duration(failures.between_failures)
    facts = {
        "run": f"{job.steps:,} steps of {duration(job.step)} on {job.nodes:,} nodes of {found.name}",
        "stops": f"one in {format_duration(between)}; a node fails once in {node}",
        "a save": f"{duration(job.save)}, and {duration(job.written)} in the background; reading {duration(job.load)}",
        "as configured": f"{_goodput(simulate(job, failures))}; training.save_every is {job.interval:,}",
        "best interval": f"{_goodput(simulate(best, failures))}; {', '.join(rules)}",
        "with one spare node more": _goodput(simulate(best, replace(failures, spare_nodes=failures.spare_nodes + 1))),
        f"{'not ' * failures.elastic}elastic": _goodput(
            simulate(best, replace(failures, elastic=not failures.elastic))
        ),
    }
    return aligned_facts(facts)


def _goodput(found: Goodput) -> str:
    lost = ", ".join(f"{name} {seconds / found.seconds:.1%}" for name, seconds in found.lost.items() if seconds > 0)
    range_ = f"{found.quantile(0.05):.1%} to {found.quantile(0.95):.1%} in 90 % of runs"
    return f"goodput {found.mean:.1%} ({range_}; {found.failures:.3g} stops; lost to {lost or 'nothing'})"


def _required(machine_name: str | None, option: str) -> Machine:
    if machine_name is None:
        raise ConfigError(f"{option} needs --machine: a machine file, or one of {', '.join(machines())}")
    return machine_of(machine_name)


def rehearsed(config: RunConfig, gpus: int | None) -> str:
    """What all ranks of the run would have, made in this process and checked; a GPU is not used.

    Raises:
        ConfigError: the option is not valid, or a check fails.
    """
    _require_number(gpus)
    if config.model.backend == "transformer_engine":  # whose checkpoints have the same parts
        config = replace(config, model=replace(config.model, backend="local"))
    if gpus is not None:
        config = replace(config, parallel=replace(config.parallel, world_size=gpus))
    run = resolved(config, vocabulary(config), gpus)
    check(run.config, run.layout.world_size)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # torch, which is not imported yet, then behaves alike everywhere
    from coe_megatron.training.console import quiet_libraries

    quiet_libraries()
    with without_collection():
        import_megatron()
        from coe_megatron.scale.rehearsal.rehearsal import rehearse

    return aligned_facts(rehearse(run))


def _require_number(gpus: int | None) -> None:
    if gpus is not None and not 1 <= gpus <= _MOST_RANKS:
        raise ConfigError(f"--gpus is {gpus}: it must be a number from 1 to {_MOST_RANKS:,}")


def _ranks(config: RunConfig, gpus: int | None, found: Machine) -> int:
    _require_number(gpus)
    return gpus or config.parallel.world_size or found.ranks_per_node


_RULES = {"Young": young, "Daly": daly}
_SHOWN, _MOST_RANKS = 5, 1_000_000


def suggest(
    config: RunConfig, machine_name: str | None, gpus: int | None, device_memory: str | None, save: Path | None
) -> str:
    """The fastest layouts as a table; the first one is also written as a config.

    Args:
        save: the new config; None for none. The other arguments are the options.

    Raises:
        ConfigError: an option is missing or not valid, or no layout fits.
    """
    if save is not None:
        require_writable(save, "--save-config", "file")
    found = _required(machine_name, "--suggest")
    available = found.memory.capacity and MARGIN * found.memory.capacity
    available = available if device_memory is None else device_memory_option(device_memory)
    if available is None:
        raise ConfigError(f"--suggest needs --device-memory: the memory of {machine_name} is unknown")
    ranks = _ranks(config, gpus, found)
    result = Search(resolved(config, vocabulary(config), ranks), found, available).best(_SHOWN)
    if save is not None:
        best = result.best[0]
        why = f"# The fastest of {result.layouts:,} layouts of {ranks:,} ranks: {duration(best.time.total)} a step"
        _write(save, "--save-config", f"{why} predicted\n# on {found.name}.\n{dump(best.run.config)}")
    return _table(result, found, ranks, available) + (f"\n{save} has the first one" if save is not None else "")


def _table(result: Result, found: Machine, ranks: int, available: float) -> str:
    best = result.best[0]
    head = f"{ranks:,} ranks of {found.name}, {size(int(available))} each"
    head += f": {result.layouts:,} layouts, {result.tried:,} timed"
    rows = [["", "a step", "MFU", "memory", "sent", *(["price a step"] if found.price else []), "layout", "slower by"]]
    for number, each in enumerate(result.best, start=1):
        cost = estimate(each.run, machine=found)
        sent = sum(cost.communication.values(), Sent(0, 0)).total
        price = [f"{each.time.total / 3600 * ranks * found.price:.3g}"] if found.price else []
        mfu = "-" if cost.mfu is None else f"{cost.mfu:.1%}"
        slower = each.time.total / best.time.total - 1
        why = f"{slower:.1%}: {each.why_slower(best)}" if number > 1 else "-"
        rows.append(
            [str(number), duration(each.time.total), mfu, size(each.needed), size(sent), *price, _layout(each), why]
        )
    return "\n".join([head, *aligned(rows, "<>>>>" + ">" * bool(found.price) + "<")])


def _layout(found: Found) -> str:
    config = found.run.config
    parts = [f"{found.run.layout}", f"micro-batch {config.training.micro_batch}", f"ZeRO {config.zero.stage}"]
    parts += ["optimizer offloaded"] if config.zero.offload_optimizer else []
    parts += [f"recompute {config.moe.recompute}"] if config.moe.recompute != "none" else []
    if config.parallel.expert > 1:
        chunks = config.moe.resolved_chunks()
        parts.append(f"{config.moe.dispatcher}, {chunks} chunk{'s' * (chunks > 1)}")
    return ", ".join(parts)


def machine_of(name: str, said_by: str = "--machine") -> Machine:
    """The machine that an option or variable names."""
    try:
        return machine(name)
    except ConfigError as error:
        raise ConfigError(f"{said_by} {error}") from error
