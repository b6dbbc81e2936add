"""A table of what the jobs of a run ask the cluster for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

COLUMNS = ("nodes", "gres", "cpus_per_task", "mem_mb", "runtime", "slurm_partition")
TITLES = "rule,jobs,nodes,GPUs a node,cpus,MB,min,partition,image"


def lines(workflow: Any, counts: Mapping[str, int], image: str) -> Iterator[str]:
    """The table line by line; `counts` has the number of jobs of each rule of Snakemake."""
    table: list[tuple[Any, ...]] = [tuple(TITLES.split(","))]
    for name, count in counts.items():
        resources = workflow.get_rule(name).resources
        asked = {key: _as_given(resources.get(key)) for key in COLUMNS}
        asked["cpus_per_task"] = asked["cpus_per_task"] or _as_given(resources.get("_cores"))
        asked["nodes"] = asked["nodes"] or 1
        cells = [asked[key] or "-" for key in COLUMNS]
        table.append((name, count, *cells, image or "-"))
    widths = [max(len(str(line[i])) for line in table) for i in range(len(table[0]))]
    for line in table:
        padded = (str(cell).ljust(width) for cell, width in zip(line, widths, strict=True))
        yield "  ".join(padded).rstrip()


def _as_given(resource: Any) -> Any:
    """A resource as profile or rule gave it; a computed one is known once there is a job."""
    raw = getattr(resource, "raw", resource)
    return "computed" if callable(raw) else raw
