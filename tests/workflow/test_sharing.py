"""Two runs of different names that are started together on an empty store."""

from __future__ import annotations

import pytest

from tests.benchmarks.sharing import killed, together
from tests.workflow.project import Project


@pytest.mark.parametrize("differ", [False, True])
def test_both_end_well_and_compute_each_shared_step_once(fresh: Project, differ: bool) -> None:
    together(fresh, differ)


def test_one_is_killed_in_a_shared_step_and_the_other_takes_over(fresh: Project) -> None:
    killed(fresh, "stage1_checkpoint")
