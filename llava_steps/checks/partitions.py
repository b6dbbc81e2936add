"""What jobs request from Slurm against what its partitions have: runs `sinfo`, submits nothing."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from llava_steps.checks.finding import Finding
from llava_steps.core.errors import ConfigError, reason
from llava_steps.pipeline import slurm
from llava_steps.pipeline.rules import Rule
from llava_steps.settings.cluster import Cluster

FORMAT = "%P|%a|%l|%D|%c|%m|%G"
"""Of sinfo: partition, state, time limit, nodes, CPUs, MB, GPUs; a row for nodes of one kind."""
FOREVER = 10**9


@dataclass(frozen=True)
class Row:
    """Nodes of one kind in a partition; minutes and memory in MB."""

    partition: str
    default: bool
    minutes: int
    nodes: int
    cpus: int
    mem_mb: int
    gpus: Mapping[str, int]
    """Number of a node's GPUs by name, `gpu` and `gpu:h100` alike."""


def check(rules: Mapping[str, Rule], cluster: Cluster, profile: Path) -> Iterator[Finding]:
    """Whether each rule's job could ever run; rules with equal requests share one finding.

    Raises:
        ConfigError: the profile cannot be read.
    """
    site = settings(profile)
    if not shutil.which("sinfo"):
        yield Finding(
            "note", "Slurm", "sinfo is missing here: jobs cannot be compared with partitions"
        )
        return
    answer = subprocess.run(
        ["sinfo", "--noheader", f"--format={FORMAT}"], capture_output=True, text=True
    )
    if answer.returncode:
        last = (answer.stderr.strip().splitlines() or [f"sinfo ended with {answer.returncode}"])[-1]
        yield Finding(
            "fail", "Slurm", last, "Check that slurmctld is running and SLURM_CONF is set"
        )
        return
    rows = parse(answer.stdout)
    alike: dict[str, list[str]] = {}
    for name, rule in rules.items():
        wanted = site["default-resources"] | slurm.asks(rule.names, rule.settings, cluster)
        wanted |= site["set-resources"].get(name, {})
        asked = {key: wanted.get(key) for key in ("slurm_partition", *LIMITS) if wanted.get(key)}
        alike.setdefault(yaml.safe_dump(asked), []).append(name)
    for text, names in alike.items():
        yield _one(", ".join(names), yaml.safe_load(text), rows)


LIMITS = ("nodes", "gres", "cpus_per_task", "mem_mb", "runtime")


def settings(profile: Path) -> dict[str, Any]:
    """Resources that a profile's site part names: default-resources and set-resources.

    Raises:
        ConfigError: the file is not a profile.
    """
    try:
        loaded = yaml.safe_load(profile.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"--profile {profile} cannot be read: {reason(error)}") from None
    if not isinstance(loaded, dict):
        raise ConfigError(f"--profile {profile}: expected keys and values at the top level")
    sets = loaded.get("set-resources") or {}
    if isinstance(sets, list):  # as on a command line: RULE:NAME=VALUE
        pairs = [str(item).partition(":") for item in sets]
        sets = {rule: [text for name, _, text in pairs if name == rule] for rule, _, _ in pairs}
    if not isinstance(sets, dict):
        raise ConfigError(f"--profile {profile}: set-resources: expected rules with resources")
    named = {rule: _resources(values, profile) for rule, values in sets.items()}
    return {
        "default-resources": _resources(loaded.get("default-resources") or {}, profile),
        "set-resources": named,
    }


def _resources(values: Any, profile: Path) -> dict[str, Any]:
    """Names and values, which a profile may also list as NAME=VALUE."""
    if isinstance(values, list):
        pairs = [str(item).partition("=") for item in values]
        return {name: int(text) if text.isdecimal() else text for name, _, text in pairs}
    if not isinstance(values, dict):
        raise ConfigError(f"--profile {profile}: expected resources, got {values!r}")
    return values


def parse(text: str) -> list[Row]:
    """Rows of sinfo in FORMAT, without partitions that are down."""
    rows = []
    for line in text.splitlines():
        name, state, limit, nodes, cpus, memory, gres = line.split("|")
        if state != "up":
            continue
        gpus: dict[str, int] = {}
        # Without the sockets that Slurm adds in brackets, as in gpu:h100:8(S:0-1).
        for kind, number in re.findall(r"([\w:.-]+):(\d+)", re.sub(r"\([^)]*\)", "", gres)):
            plain = kind.partition(":")[0]
            gpus[kind] = gpus.get(kind, 0) + int(number)
            if plain != kind:
                gpus[plain] = gpus.get(plain, 0) + int(number)
        count, cores, mem = (int(word.rstrip("+")) for word in (nodes, cpus, memory))
        name, star, _ = name.partition("*")
        rows.append(Row(name, bool(star), minutes(limit), count, cores, mem, gpus))
    return rows


def minutes(limit: str) -> int:
    """Slurm's [days-]hours:minutes:seconds, or minutes:seconds, as whole minutes."""
    if not re.fullmatch(r"[\d:-]+", limit):
        return FOREVER
    days, _, rest = limit.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    hours, mins = (parts[0], parts[1]) if days or len(parts) == 3 else (0, parts[0])
    return int(days or 0) * 1440 + hours * 60 + mins


def _one(names: str, asked: Mapping[str, Any], rows: list[Row]) -> Finding:
    partition = asked.get("slurm_partition")
    mine = [row for row in rows if (row.partition == partition if partition else row.default)]
    what = f"Slurm, {names}"
    if not mine:
        known = ", ".join(sorted({row.partition for row in rows})) or "none"
        named = f"partition {partition!r}" if partition else "the default partition"
        fix = "Set slurm_partition in the site's part of the profile"
        return Finding("fail", what, f"{named} is not up; partitions: {known}", fix)
    lacks = [_lacks(asked, row) for row in mine]
    if not all(lacks):
        words = " ".join(f"{key}={asked[key]}" for key in LIMITS if key in asked)
        return Finding("ok", what, f"{words} fits partition {mine[0].partition}")
    best = min(lacks, key=len)
    fix = "Change `cluster` or the stage in the configuration, or the partition in the profile"
    return Finding("fail", what, f"partition {mine[0].partition} has {'; '.join(best)}", fix)


def _lacks(asked: Mapping[str, Any], row: Row) -> list[str]:
    """Resources that nodes of this kind have too little of."""
    missing = []
    gres, _, number = str(asked.get("gres", "")).rpartition(":")
    for have, want, unit in (
        (row.nodes, asked.get("nodes", 1), "nodes"),
        (row.gpus.get(gres, 0), int(number or 0), f"{gres} per node"),
        (row.cpus, asked.get("cpus_per_task", 1), "CPUs per node"),
        (row.mem_mb, asked.get("mem_mb", 0), "MB per node"),
        (row.minutes, asked.get("runtime", 0), "minutes at most"),
    ):
        if isinstance(want, int) and have < want:
            missing.append(f"{have} {unit}, {want} are requested")
    return missing
