"""python -m tests.benchmarks.damage [--damages N]: N damaged copies of a model's checkpoint.

Each copy has one bit flipped, a file cut, longer, missing, surplus, emptied, or exchanged with
another one. All must be noticed when the checkpoint is verified, which is before a tensor is used.
The last line is JSON: {"damages", "noticed", "files"}.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

from llava_steps.core.errors import InputError, IntegrityError
from llava_steps.store import commit
from tests.helpers import chain
from tests.unit.test_core_commit import damage


def noticed(whole: Path, room: Path, damages: int, seed: int) -> tuple[int, Counter[str]]:
    """(noticed damages, how many of each kind went unnoticed) for copies of `whole` in `room`."""
    chooser, found, missed = random.Random(seed), 0, Counter[str]()
    for _ in range(damages):
        broken = room / "broken"
        shutil.copytree(whole, broken)
        what = damage(broken, chooser)
        try:
            commit.read_commit(broken)
        except (IntegrityError, InputError):
            found += 1
        else:
            missed[what] += 1
        shutil.rmtree(broken)
    return found, missed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--damages", type=int, default=500)
    parser.add_argument("--seed", type=int, default=20240607)
    given = parser.parse_args()
    room = Path(tempfile.mkdtemp(prefix="damage-"))
    try:
        made = chain.make(room / "chain")
        source = commit.latest_commit(made.checkpoint.resolve())
        shutil.copytree(source, room / "copy")
        (room / "copy" / commit.MARKER).unlink()
        whole = room / commit.iteration_name(1)
        commit.commit_dir(room / "copy", whole)
        files = sum(path.is_file() for path in whole.rglob("*"))
        found, missed = noticed(whole, room, given.damages, given.seed)
        commit.read_commit(whole)
    finally:
        shutil.rmtree(room)
    for text, count in sorted(missed.items()):
        print(f"{count:6d} NOT NOTICED: {text}")
    print(json.dumps({"damages": given.damages, "noticed": found, "files": files}))
    return found != given.damages


if __name__ == "__main__":
    sys.exit(main())
