"""`clean` on a store of real runs: it lists what no run shows, and what is left is enough."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llava_steps.commands import clean
from tests.helpers.patience import PATIENCE, wait_for
from tests.workflow.project import RULES, Project


@pytest.fixture
def listed(capsys: pytest.CaptureFixture[str]) -> Callable[..., set[str]]:
    """The entries, as step/fingerprint, that a call of `clean` names."""

    def call(project: Project, *flags: str) -> set[str]:
        assert clean.main(["--store", str(project.root / "store"), "--json", *flags]) == 0
        items: list[dict[str, Any]] = json.loads(capsys.readouterr().out)["items"]
        return {"/".join(Path(item["path"]).parts[-2:]) for item in items}

    return call


def run(project: Project, name: str, overlay: str = "", results: str = "results") -> None:
    """A whole run of this name."""
    flags = ["--configfile", project.overlay(overlay + "\n")] if overlay else []
    project.snakemake("--cores", "2", *flags, "--config", f"run={name}", f"results={results}")


def entries(project: Project) -> set[str]:
    """Everything in the store."""
    store = project.root / "store"
    return {f"{p.parent.name}/{p.name}" for p in store.glob("*/*") if p.is_dir()}


def shown(project: Project, *results: str) -> set[str]:
    """What the manifests and `work` links of all runs name, without any code of `clean`."""
    found = set()
    for folder in results:
        for path in (project.root / folder).glob("*/*/manifest.json"):
            manifest = json.loads(path.read_bytes())
            found.add(f"{manifest['step']}/{manifest['fingerprint']}")
        for link in (project.root / folder).glob("*/*/work"):
            found.add("/".join(Path(os.readlink(link)).parts[-2:]))
    return found


def test_ten_runs_in_two_directories_beside_a_live_training(
    finished: Project, listed: Callable[..., set[str]]
) -> None:
    rates = {f"a{n}": f"stage2: {{lr: {n}.0e-4}}" for n in range(1, 5)}
    rates |= {f"b{n}": f"stage1: {{lr: {n}.0e-4}}" for n in range(1, 6)}
    for name, overlay in rates.items():
        run(finished, name, overlay, "results" if name < "b" else "elsewhere")
    assert len(list(finished.root.glob("results/*"))) == 5
    assert len(list(finished.root.glob("elsewhere/*"))) == 5
    assert listed(finished) == set()

    shutil.rmtree(finished.root / "results/a1")
    shutil.rmtree(finished.root / "elsewhere/b2")
    run(finished, "a2", "stage2: {lr: 9.0e-4}")  # shows other values from now on
    finished.snakemake("--cores", "2", "--forcerun", "stage2_checkpoint")
    hold = finished.root / "hold-stage2_checkpoint"
    hold.touch()
    finished.forget_calls()
    overlay = finished.overlay("stage2: {lr: 8.0e-4}\n")
    live = finished.start("--cores", "2", "--configfile", overlay, "--config", "run=live")
    wait_for(lambda: "stage2_checkpoint" in [c["step"] for c in finished.calls()], live)

    everything = entries(finished)
    expected = everything - shown(finished, "results", "elsewhere")
    # Of a run each: stage 2, export, evaluation, report; b2 also stage 1 and its export.
    kinds = sorted(name.split("/")[0] for name in expected)
    assert len(kinds) == 4 + 6 + 4 + 1 and kinds.count("stage1_checkpoint") == 1
    assert sum(".replaced-1" in name for name in expected) == 1
    assert listed(finished) == expected
    assert listed(finished, "--unfinished") == expected, "the live one is held"
    assert listed(finished, "--yes") == expected
    assert entries(finished) == everything - expected

    hold.unlink()
    assert live.wait(PATIENCE) == 0
    assert finished.manifest("stage2_checkpoint", "live")["attempts"] == 1
    finished.forget_calls()
    for folder in ("results", "elsewhere"):
        for manifest in finished.root.glob(f"{folder}/*/*/manifest.json"):
            manifest.unlink()
    rates["a2"] = "stage2: {lr: 9.0e-4}"
    for name in {*rates} - {"a1", "b2"}:
        run(finished, name, rates[name], "results" if name < "b" else "elsewhere")
    run(finished, "demo")
    run(finished, "live", "stage2: {lr: 8.0e-4}")
    assert finished.calls() == [], "what is left is enough for all runs"
    assert listed(finished) == set()


def test_a_killed_attempt_is_kept_while_a_run_would_resume_it(
    fresh: Project, listed: Callable[..., set[str]]
) -> None:
    hold = fresh.root / "hold-stage1_checkpoint"
    hold.touch()
    process = fresh.start("--cores", "2")
    wait_for(lambda: "stage1_checkpoint" in [c["step"] for c in fresh.calls()], process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    wait_for(lambda: not _runs(fresh))
    (entry,) = (fresh.root / "store/stage1_checkpoint").iterdir()
    for path in (entry, *entry.rglob("*")):
        os.utime(path, (0, 0))
    assert listed(fresh) == set()
    shutil.rmtree(fresh.root / "results/demo/stage1_checkpoint")
    assert listed(fresh) == {f"stage1_checkpoint/{entry.name}"}


def _runs(project: Project) -> bool:
    """Whether a step of the killed group is still there."""
    (lease,) = project.root.glob("store/stage1_checkpoint/*/.work/lease.json")
    stat = Path(f"/proc/{json.loads(lease.read_bytes())['pid']}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] not in "ZX"


def test_a_run_keeps_the_values_that_it_will_show_later(
    finished: Project, listed: Callable[..., set[str]]
) -> None:
    shutil.rmtree(finished.root / "results/demo")
    (finished.root / "results/other").mkdir()
    assert listed(finished) == entries(finished)
    hold = finished.root / "hold-demo_assets"
    hold.touch()
    process = finished.start("--cores", "2", "--forcerun", "demo_assets")
    wait_for(lambda: finished.calls(), process)
    assert listed(finished, "--yes") == set()
    hold.unlink()
    assert process.wait(PATIENCE) == 0
    assert [call["step"] for call in finished.calls()] == ["demo_assets"]
    assert not (finished.root / "results/demo/.work/claims").exists()
    assert {name.split(".")[-1] for name in listed(finished)} == {"replaced-1"}


def _clean_again_and_again(store: str, end: Any) -> None:
    while not end.is_set():
        assert clean.main(["--store", store, "--yes"]) == 0


def test_runs_that_publish_while_clean_removes_lose_nothing(finished: Project) -> None:
    keep = {rule: finished.manifest(rule)["content"] for rule in RULES}
    end = multiprocessing.get_context("spawn").Event()
    cleaner = multiprocessing.get_context("spawn").Process(
        target=_clean_again_and_again, args=(str(finished.root / "store"), end)
    )
    cleaner.start()
    for number in range(2):
        run(finished, f"again{number}")
        for manifest in finished.root.glob("results/demo/*/manifest.json"):
            manifest.unlink()
        run(finished, "demo")
    end.set()
    cleaner.join()
    assert cleaner.exitcode == 0
    assert {call["step"] for call in finished.calls()} == {"report"}, "only titles are new"
    assert {rule: finished.manifest(rule)["content"] for rule in RULES} == keep
    for link in finished.root.glob("results/*/*/*"):
        assert link.exists(), link
