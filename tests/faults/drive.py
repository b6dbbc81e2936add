"""python -m tests.faults.drive [--every N]: a fault in every file operation of a checkpoint's save.

Kills the process in it, or lets it fail with ENOSPC, EIO or EDQUOT. After each the newest valid
checkpoint must be the old or the new one, byte for byte, and a second try must save the new one.
The last line is JSON: {"operations", "cases", "safe"}.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from tests.helpers import chain

KILL = -1
ACTIONS = (KILL, errno.ENOSPC, errno.EIO, errno.EDQUOT)
HERE = Path(__file__).parent


def compiled(room: Path) -> Path:
    """The shim as a shared library."""
    library = room / "shim.so"
    source = str(HERE / "shim.c")
    line = ["cc", "-shared", "-fPIC", "-O1", "-o", str(library), source, "-ldl"]
    subprocess.run(line, check=True)
    return library


def outcomes(
    made: chain.Chain, room: Path, cases: list[tuple[int, int]], workers: int
) -> list[dict[str, Any]]:
    """The line of tests.faults.save for each case."""
    environment = chain.environment() | {"LD_PRELOAD": str(compiled(room)), "OMP_NUM_THREADS": "1"}
    processes = []
    for number in range(workers):
        own = room / f"worker-{number}"
        own.mkdir()
        line = [sys.executable, "-W", "ignore", "-m", "tests.faults.save", str(made.root), str(own)]
        part = json.dumps([(0, 0), *cases[number::workers]])
        with (own / "out").open("w") as out:
            processes.append(
                subprocess.Popen([*line, part], env=environment, cwd=chain.ROOT, stdout=out)
            )
    codes = [process.wait() for process in processes]
    assert not any(codes), codes
    lines = [(room / f"worker-{n}/out").read_text().splitlines() for n in range(workers)]
    return [json.loads(line) for part in lines for line in part]


def verdicts(rows: list[dict[str, Any]]) -> tuple[int, Counter[str]]:
    """(operations of one save, what happened how often); "BAD ..." is what must not happen."""
    whole = next(row for row in rows if row["case"] == [0, 0])
    new, counts = whole["after"], Counter[str]()
    assert new[0] == 3, whole
    old = None
    for row in (r for r in rows if r["case"] != [0, 0]):
        (number, action), after = row["case"], row["after"]
        if isinstance(after, str) or after[0] not in (2, 3) or (after[0] == 3 and after != new):
            counts[f"BAD newest checkpoint: {row}"] += 1
            continue
        if after[0] == 2:
            old = old or after
        if after[0] == 2 and after != old:
            counts[f"BAD old checkpoint changed: {row}"] += 1
        elif row["at_last"] != new:
            counts[f"BAD second try: {row}"] += 1
        elif action == KILL and row["ended"] != 9:
            counts[f"BAD not killed: {row}"] += 1
        elif action != KILL and not row["error"]:
            counts[f"BAD error swallowed at operation {number}: {row}"] += 1
        else:
            counts["old one" if after[0] == 2 else "new one"] += 1
    return int(whole["operations"]), counts


def drive(made: chain.Chain, room: Path, every: int, workers: int) -> tuple[int, Counter[str]]:
    """All faults, or those of each `every`-th operation."""
    (room / "count").mkdir()
    (whole,) = outcomes(made, room / "count", [], 1)
    operations = int(whole["operations"])
    numbers = sorted({*range(1, operations + 1, every), operations - 1, operations})
    cases = [(number, action) for number in numbers for action in ACTIONS]
    return verdicts(outcomes(made, room, cases, workers))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--every", type=int, default=1, help="only each N-th operation")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    given = parser.parse_args()
    room = Path(tempfile.mkdtemp(prefix="faults-"))
    try:
        made = chain.make(room / "chain")
        operations, counts = drive(made, room, given.every, given.workers)
    finally:
        shutil.rmtree(room)
    for text, count in sorted(counts.items()):
        print(f"{count:6d} {text}")
    cases, bad = sum(counts.values()), sum(n for t, n in counts.items() if t.startswith("BAD"))
    print(f"{cases - bad}/{cases} faults left the old or the new checkpoint")
    print(json.dumps({"operations": operations, "cases": cases, "safe": cases - bad}))
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
