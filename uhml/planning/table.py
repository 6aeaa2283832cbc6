"""A plan as a table for people."""

from rich.table import Table

from uhml.hierarchy.memory import GIB
from uhml.planning.plan import Plan


def tables(plan: Plan) -> list[Table]:
    """Return what the run takes in time, in memory, and on wire and disk."""
    return [_time(plan), _memory(plan), _rest(plan)]


def _time(plan: Plan) -> Table:
    said = (
        f"{plan.config.train.num_steps:,} steps of {plan.config.train.global_batch_size:,} views, "
        f"{plan.sizes.train:,} training pictures, on {plan.machine}"
    )
    table = Table(title=said)
    table.add_column("part")
    for heading in ("time", "share", "of it, once"):
        table.add_column(heading, justify="right")
    parts = plan.seconds
    total = parts.total
    for name, seconds, times, unit in (
        ("reading every picture once", parts.reading, 1, ""),
        ("training steps", parts.steps, plan.config.train.num_steps, "step"),
        ("embedding training pictures", parts.embedding, plan.num_hierarchies, "hierarchy"),
        ("nearest neighbours", parts.search, plan.num_hierarchies, "hierarchy"),
        ("linkage", parts.linkage, plan.num_hierarchies, "hierarchy"),
        ("trees drawn, checkpoints", parts.recording, plan.num_hierarchies, "hierarchy"),
        ("evaluation", parts.evaluation, plan.num_evaluations, "time"),
    ):
        each = f"{_short(seconds / times)} a {unit}" if unit and times else ""
        table.add_row(name, _short(seconds), f"{100 * seconds / total:.0f} %" if total else "", each)
    table.add_section()
    table.add_row("all", _short(total), "", f"{plan.images_per_second:,.0f} images/s in steps", style="bold")
    return table


def _memory(plan: Plan) -> Table:
    parts = "network and the largest part" if plan.memory_main.reused else "network, steps, and the largest other part"
    table = Table(title="Memory, GiB", caption=f"peak: {parts}")
    headings = ("", "network, AdamW", "steps", "embedding", "clustering", "evaluation", "peak", "there is")
    for heading in headings:
        table.add_column(heading, justify="right" if heading else "left")
    device = "GPU" if plan.on_gpu else "host"
    rows = [(f"rank 0, {device}", plan.memory_main)]
    if plan.ranks.world_size > 1:
        rows.append((f"other ranks, {device}", plan.memory_others))
    for name, memory in rows:
        figures = (memory.network, memory.step, memory.embedding, memory.clustering, memory.evaluation, memory.peak)
        table.add_row(name, *(f"{figure / GIB:.2f}" for figure in figures), f"{plan.memory_of_rank / GIB:.1f}")
    there = "" if plan.memory_of_node is None else f"{plan.memory_of_node / GIB:.1f}"
    table.add_row("a node's host, in all", *[""] * 5, f"{plan.host_of_node / GIB:.2f}", there)
    return table


def _rest(plan: Plan) -> Table:
    table = Table(title="Wire and disk", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_column()
    if plan.ranks.world_size > 1:
        share = plan.wire / plan.least_wire
        table.add_row("a rank's exchange in a step", _size(plan.wire), f"{share:.3f} of the least possible")
    table.add_row("checkpoints", _size(plan.checkpoints), f"{plan.num_kept} at once, {_size(plan.checkpoint)} each")
    table.add_row("hierarchies", _size(plan.hierarchies), f"{plan.num_hierarchies}, {_size(plan.hierarchy)} each")
    if plan.cache:
        table.add_row("pictures in data.cache", _size(plan.cache), "kept for other runs")
    return table


def _size(num_bytes: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes / 1e3:.1f} kB"


def _short(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        if seconds >= 2 * size or (unit == "s" and seconds >= 1):
            return f"{seconds / size:.1f} {unit}"
    return f"{1000 * seconds:.0f} ms"
