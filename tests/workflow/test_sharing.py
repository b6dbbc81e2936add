"""Two runs of different names that are started together on an empty store."""

from __future__ import annotations

import json

import pytest

from tests.benchmarks.sharing import killed, together
from tests.workflow.project import Project


@pytest.mark.parametrize("differ", [False, True])
def test_both_end_well_and_compute_each_shared_step_once(fresh: Project, differ: bool) -> None:
    together(fresh, differ)


def test_one_is_killed_in_a_shared_step_and_the_other_takes_over(fresh: Project) -> None:
    killed(fresh, "stage1_checkpoint")


@pytest.mark.parametrize("content", ["", '{"pid": '])
def test_a_damaged_lease_on_the_name_of_a_run_is_replaced(fresh: Project, content: str) -> None:
    work = fresh.root / "results/demo/.work"
    work.mkdir(parents=True)
    (work / "lease.json").write_text(content)
    text = fresh.snakemake("demo_assets", "--cores", "1")
    assert "run 'demo': held by an unknown process" in text and "is damaged" in text
    events = [json.loads(row)["event"] for row in (work / "lease.log").read_text().splitlines()]
    assert events == ["taken over", "given back"]
