"""python tests/cluster/eager.py ARGUMENTS: snakemake, which asks Slurm about its jobs every 2 s.

Its plugin waits ten seconds longer each time, three minutes at most: right for jobs of hours, but
the minutes of this test would be spent waiting. Nothing else is different.
"""

from __future__ import annotations

import sys

from snakemake.cli import main
from snakemake_interface_executor_plugins.executors.remote import RemoteExecutor

SECONDS = 2

if __name__ == "__main__":
    sys.path[0] = ""  # as `python -m snakemake` has it
    RemoteExecutor.next_seconds_between_status_checks = property(
        lambda executor: SECONDS, lambda executor, seconds: None
    )
    main()
