"""What runs again after a change, and what does not; killed and forced runs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llava_steps.commands import verify
from tests.helpers.patience import PATIENCE, wait_for
from tests.workflow.project import ROOT, RULES, Project

AFTER_STAGE_2 = ["evaluation", "hf_export", "report", "stage2_checkpoint"]


def steps(project: Project) -> list[str]:
    """Names of the steps that computed something."""
    return [call["step"] for call in project.calls()]


def test_a_finished_run_has_nothing_to_do(finished: Project) -> None:
    assert "Nothing to be done" in finished.snakemake("--cores", "2")
    assert finished.calls() == []


def test_verify_finds_every_result_of_a_run(
    finished: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verify.main([str(finished.root / "results")]) == 0
    assert f"{len(RULES)} artefacts, 0 damaged" in capsys.readouterr().out


def test_one_setting_of_stage_2_and_back(finished: Project) -> None:
    overlay = ("--configfile", finished.overlay("stage2: {lr: 5.0e-4}\n"))
    before = finished.manifest("stage2_checkpoint")
    assert finished.run(*overlay) == AFTER_STAGE_2
    assert steps(finished) == ["stage2_checkpoint", "hf_export", "evaluation", "report"]
    assert finished.calls()[0]["lr"] == 5.0e-4

    finished.forget_calls()
    assert finished.run() == AFTER_STAGE_2
    assert finished.calls() == [], "the store knows these values"
    assert finished.manifest("stage2_checkpoint") == before
    assert finished.run() == []


@pytest.mark.parametrize(
    ("overlay", "audits"),
    [
        ("stage2: {seq_length: 240, lr: 5.0e-4}", {"stage2_audit"}),
        ("audit: {samples: 500}\nstage2: {lr: 5.0e-4}", {"stage1_audit", "stage2_audit"}),
        ("stage2: {too_long: truncate, warmup_steps: 3}", {"stage2_audit"}),
        ("energon_dataset: {seed: 5}\nstage2: {lr: 5.0e-4, data_path: other}", {"stage2_audit"}),
    ],
)
def test_settings_of_a_stage_and_of_its_audit_together(
    finished: Project, overlay: str, audits: set[str]
) -> None:
    """Snakemake alone plans the audit and leaves out the stage behind it."""
    (finished.root / "other").mkdir()
    arguments = ("hf_export", "--configfile", finished.overlay(overlay + "\n"))
    planned = finished.planned("all", *arguments[1:])
    assert {*AFTER_STAGE_2, *audits} <= {*planned}
    finished.run("all", *arguments[1:])
    assert {*AFTER_STAGE_2, *audits} <= {*steps(finished)}
    order = [name for name in steps(finished) if name in ("stage2_audit", "stage2_checkpoint")]
    assert order == ["stage2_audit", "stage2_checkpoint"]
    shown = finished.manifest("stage2_checkpoint")["config"]
    assert shown["lr"] == (1e-3 if "warmup" in overlay else 5e-4)
    assert finished.planned("all", *arguments[1:]) == []


def test_what_a_new_audit_does_not_change_is_no_cover_for_what_is_behind(
    finished: Project,
) -> None:
    overlay = finished.overlay("audit: {examples: 4}\nevaluation: {max_new_tokens: 5}\n")
    executed = ["evaluation", "report", "stage1_audit", "stage2_audit"]
    assert finished.run("--configfile", overlay) == executed
    assert sorted(steps(finished)) == executed


@pytest.mark.parametrize(
    "options", [(), ("--rerun-triggers", "mtime"), ("--ignore-incomplete",)], ids=str
)
def test_a_changed_setting_counts_without_any_record_of_snakemake(
    finished: Project, options: tuple[str, ...]
) -> None:
    shutil.rmtree(finished.root / ".snakemake")
    assert finished.planned(*options) == []
    overlay = ("--configfile", finished.overlay("stage2: {lr: 5.0e-4}\n"))
    assert finished.planned(*options, *overlay) == AFTER_STAGE_2
    finished.run(*options, *overlay)
    assert finished.manifest("stage2_checkpoint")["config"]["lr"] == 5e-4


def test_what_was_computed_by_hand_with_other_settings_is_not_taken_for_the_result(
    finished: Project,
) -> None:
    text = finished.snakemake("--cores", "1", "-n", "--forcerun", "stage2_checkpoint")
    (line,) = [x for x in text.splitlines() if "-m llava_steps.train" in x and "--stage=2" in x]
    by_hand = f"{line.removeprefix('Shell command: ')} --lr 0.25"
    subprocess.run(["bash", "-c", by_hand], cwd=finished.root, env=finished.env, check=True)
    assert finished.manifest("stage2_checkpoint")["config"]["lr"] == 0.25
    finished.forget_calls()
    assert finished.run("hf_export") == ["stage2_checkpoint"]
    assert finished.manifest("stage2_checkpoint")["config"]["lr"] == 1e-3
    assert steps(finished) == [], "the store knows the value"


def test_a_run_whose_data_changed_meanwhile_is_not_done(finished: Project) -> None:
    mine, hold = finished.root / "mine.json", finished.root / "hold-energon_dataset"
    mine.write_text("one")
    hold.touch()
    overlay = finished.overlay("tar_shards: {source: mine.json}\n")
    process = finished.start("energon_dataset", "--cores", "1", "--configfile", overlay)
    wait_for(lambda: "energon_dataset" in steps(finished), process)
    mine.write_text("two")
    hold.unlink()
    assert process.wait(PATIENCE) == 1
    assert finished.run("energon_dataset", "--configfile", overlay) == [
        "energon_dataset", "tar_shards",
    ]  # fmt: skip


def test_checks_of_a_run_cannot_be_left_out(finished: Project) -> None:
    assert "--no-hooks" in finished.snakemake("--cores", "1", "--no-hooks", code=1)


def test_a_missing_file_and_a_changed_setting_end_the_run_by_name(finished: Project) -> None:
    """Snakemake alone keeps the old result: what cannot be made again, it leaves."""
    (finished.root / "mine.json").write_text("[]")
    overlay = ("--configfile", finished.overlay("evaluation: {data: mine.json}\n"))
    finished.run(*overlay)
    (finished.root / "mine.json").unlink()
    assert finished.planned(*overlay) == []
    finished.overlay("evaluation: {data: mine.json, max_new_tokens: 5}\n")
    text = finished.snakemake("--cores", "1", *overlay, code=1)
    assert "Error: evaluation.data: mine.json does not exist" in text
    assert finished.manifest("evaluation")["config"]["max_new_tokens"] == 16


def test_files_that_were_only_touched_rerun_nothing(finished: Project) -> None:
    (finished.root / "mine.json").write_text("[]")
    overlay = ("--configfile", finished.overlay("tar_shards: {source: mine.json}\n"))
    finished.run(*overlay)
    (finished.root / "mine.json").touch()
    (finished.root / "results/demo/hf_model/manifest.json").touch()
    assert finished.planned(*overlay) == []


@pytest.mark.parametrize(
    ("given", "change", "rerun"),
    [
        (
            "hf_export: {megatron_dir: results/demo/stage1_checkpoint}",
            "stage1: {lr: 5.0e-3}",
            ["evaluation", "hf_export", "report", "stage1_checkpoint", "stage1_export"],
        ),
        (
            "stage2: {megatron_load_dir: ./results/../results/demo/stage1_checkpoint}",
            "stage1: {lr: 5.0e-3}",
            ["evaluation", "hf_export", "report", "stage1_checkpoint", "stage1_export",
             "stage2_checkpoint"],
        ),
        (
            "stage2: {data_path: blend.yaml}",
            "energon_dataset: {seed: 7}",
            ["energon_dataset", "evaluation", "hf_export", "report", "stage1_audit",
             "stage1_checkpoint", "stage1_export", "stage2_audit", "stage2_checkpoint"],
        ),
    ],
)  # fmt: skip
def test_a_source_that_names_a_result_of_the_run_is_read_like_any_other(
    finished: Project, given: str, change: str, rerun: list[str]
) -> None:
    (finished.root / "blend.yaml").write_text(
        "__module__: megatron.energon\n__class__: MetadatasetV2\nsplits:\n  train:\n"
        "    blend:\n      - {path: results/demo/energon_dataset, weight: 1}\n"
    )
    overlay = finished.overlay(given + "\n", "given.yaml")
    finished.run("--configfile", overlay)
    both = ("--configfile", overlay, finished.overlay(change + "\n"))
    assert finished.planned(*both) == rerun
    assert finished.run(*both) == rerun
    assert finished.planned(*both) == []


def test_a_model_of_a_hub_is_not_asked_for_again(fresh: Project) -> None:
    """Its snapshot may lie on the nodes that run the steps, and not where Snakemake runs."""
    local = (
        "def local(text, hub):\n"
        "    if not hub.fetch:\n        raise InputError(f'{text} could not be fetched')\n"
        "    return Path('config')\n\n"
    )
    module = fresh.root / "llava_steps/build_hf.py"
    module.write_text(
        module.read_text()
        .replace("def run(", local + "def run(", 1)
        .replace("resolve=stub.hub('hf_model')", "resolve={'vision_tower': local}")
        .replace(
            "from llava_steps import stub",
            "from pathlib import Path\nfrom llava_steps.core.errors import InputError\n"
            "from llava_steps import stub",
        )
    )
    overlay = fresh.overlay("hf_model: {vision_tower: org/tower}\n")
    fresh.run("hf_model", "--configfile", overlay)
    assert fresh.planned("hf_model", "--configfile", overlay) == []
    fresh.overlay("hf_model: {vision_tower: org/other}\n")
    assert fresh.run("hf_model", "--configfile", overlay) == ["hf_model"]


def test_files_of_others_beside_a_result_do_not_count(finished: Project) -> None:
    result = finished.root / "results/demo/hf_export"
    (result / "notes.txt").write_text("mine")
    assert finished.planned() == []
    overlay = finished.overlay("hf_export: {seed: 5}\n")
    text = finished.snakemake("hf_export", "--cores", "1", "--configfile", overlay, code=1)
    assert "notes.txt was not written by this step" in text
    assert (result / "out.json").exists(), "the old result is still shown"


@pytest.mark.parametrize("lost", ["store", "store/hf_model", "store/stage1_checkpoint"])
def test_a_store_that_is_not_there_trains_nothing(finished: Project, lost: str) -> None:
    moved = finished.root / "elsewhere"
    (finished.root / lost).rename(moved)
    text = finished.snakemake("--cores", "1", code=1)
    assert "is the store mounted?" in text and steps(finished) == []
    shutil.rmtree(finished.root / lost, ignore_errors=True)
    moved.rename(finished.root / lost)
    assert finished.planned() == []


def test_a_broken_input_stops_only_what_reads_it(finished: Project) -> None:
    (finished.root / "mine").mkdir()
    (finished.root / "mine/x").write_text("1")
    overlay = ("--configfile", finished.overlay("stage2: {data_path: mine}\n"))
    finished.run(*overlay)
    (finished.root / "mine/y").symlink_to("nowhere")
    assert finished.run("tar_shards", *overlay) == []
    assert "stage2_checkpoint" in finished.planned(*overlay)


def test_touch_computes_nothing_and_leaves_no_request(finished: Project) -> None:
    finished.snakemake("--cores", "1", "--touch", "--forceall")
    assert finished.planned() == [] and steps(finished) == []


def test_a_run_says_what_runs_and_why(finished: Project) -> None:
    overlay = finished.overlay("stage2: {lr: 5.0e-4}\n")
    text = finished.snakemake("--cores", "2", "--configfile", overlay)
    reasons = text[text.index("What runs, and why:") :]
    assert "\n  stage2_checkpoint: changed: lr 0.001 -> 0.0005\n" in reasons
    assert "\n  hf_export: reads the result of stage2_checkpoint\n" in reasons


@pytest.mark.parametrize("rule", ["tar_shards", "hf_export", "report"])
def test_a_result_that_is_gone_is_shown_again_alone(finished: Project, rule: str) -> None:
    shutil.rmtree(finished.root / "results/demo" / rule)
    assert rule in finished.run()
    assert steps(finished) == [] and finished.planned() == []
    page = finished.root / "results/demo/report.html"
    page.write_text("cut")
    assert finished.run() == ["report"] and page.read_text() == "report"


def test_changes_are_computed_as_an_independent_table_says() -> None:
    command = [sys.executable, "-m", "tests.benchmarks.reruns", "--changes", "16", "--jobs", "1"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout.splitlines()[-1]) == {"changes": 16, "right": 16}


def test_another_run_shares_equal_steps(finished: Project) -> None:
    finished.snakemake("--cores", "2", "--config", "run=other")
    assert steps(finished) == ["report"], "only its title is another"
    for rule in set(RULES) - {"report"}:
        assert finished.manifest(rule, "other") == finished.manifest(rule)


def test_labels_logs_and_resources_recompute_nothing(finished: Project) -> None:
    overlay = finished.overlay(
        "stage2: {log_interval: 7, save_interval: 3, name: x, wandb: true}\n"
        "tar_shards: {workers: 1}\n"
        "cluster: {jobs: {tar_shards: 3}, mem_mb: {tar_shards: 9}}\n"
    )
    assert finished.planned("--configfile", overlay) == []


def test_another_audit_trains_nothing(finished: Project) -> None:
    overlay = ("--configfile", finished.overlay("audit: {samples: 7}\n"))
    assert finished.run(*overlay) == ["report", "stage1_audit", "stage2_audit"]
    assert sorted(steps(finished)) == ["report", "stage1_audit", "stage2_audit"]
    assert finished.planned(*overlay) == []


def test_a_failed_audit_of_either_stage_ends_the_run_before_stage_1(fresh: Project) -> None:
    module = fresh.root / "llava_steps/audit.py"
    module.write_text(
        module.read_text().replace(
            "    return stub", "    assert cfg.stage == 1, 'planted'\n    return stub"
        )
    )
    text = fresh.snakemake("--cores", "1", code=1)
    assert "planted" in text and "energon_dataset" in steps(fresh)
    assert not {"stage1_checkpoint", "stage2_checkpoint"} & set(steps(fresh))


def test_code_of_a_step_reruns_it_and_a_comment_does_not(finished: Project) -> None:
    module = finished.root / "llava_steps/build_hf.py"
    module.write_text("# a comment\n" + module.read_text())
    assert finished.planned() == []
    module.write_text(module.read_text() + "\nWIDTH = 3\n")
    # Everything behind it is planned; what is found unchanged is not computed again.
    executed = finished.run()
    assert "hf_model" in executed and "tar_shards" not in executed
    assert steps(finished) == ["hf_model"]


def test_a_file_of_the_user_that_changed_is_read_again(finished: Project) -> None:
    (finished.root / "mine.json").write_text("one")
    overlay = ("--configfile", finished.overlay("tar_shards: {source: mine.json}\n"))
    finished.snakemake("energon_dataset", "--cores", "1", *overlay)
    finished.forget_calls()
    time.sleep(0.02)
    (finished.root / "mine.json").write_text("two")
    finished.snakemake("energon_dataset", "--cores", "1", *overlay)
    assert steps(finished) == ["tar_shards", "energon_dataset"]


def test_forced_training_trains_and_equal_results_stop_there(finished: Project) -> None:
    before = finished.manifest("stage1_checkpoint")
    finished.snakemake("--cores", "2", "--forcerun", "stage1_checkpoint")
    assert steps(finished) == ["stage1_checkpoint"]
    after = finished.manifest("stage1_checkpoint")
    assert after["content"] == before["content"] and after["created"] >= before["created"]
    assert "Nothing to be done" in finished.snakemake("--cores", "2")

    finished.forget_calls()
    finished.snakemake("hf_export", "--cores", "2", "--force")
    assert steps(finished) == ["hf_export"]


def test_a_request_left_by_a_broken_run_is_forgotten(finished: Project) -> None:
    request = finished.root / "results/demo/stage1_checkpoint/.force"
    assert "stage1_checkpoint" in finished.planned("--forcerun", "stage1_checkpoint")
    assert not request.exists(), "a dry run asks for nothing"
    request.touch()
    finished.snakemake("tar_shards", "--cores", "1", "--force")
    assert steps(finished) == ["tar_shards"] and not request.exists()


def test_an_end_that_snakemake_did_not_see_computes_nothing_again(fresh: Project) -> None:
    """Its job published the value and was killed before Snakemake took back its mark."""
    hold = fresh.root / "hold-demo_assets"
    hold.touch()
    process = fresh.start("demo_assets", "--cores", "1")
    marks, kept = fresh.root / ".snakemake/incomplete", fresh.root / "kept"
    wait_for(lambda: "demo_assets" in steps(fresh) and any(marks.iterdir()), process)
    shutil.copytree(marks, kept)
    hold.unlink()
    assert process.wait(PATIENCE) == 0
    shutil.copytree(kept, marks, dirs_exist_ok=True)
    assert "Forced execution" in fresh.snakemake("demo_assets", "--cores", "1")
    assert steps(fresh) == ["demo_assets"]
    assert "Nothing to be done" in fresh.snakemake("demo_assets", "--cores", "1")


def test_killed_in_the_middle_then_run_again(fresh: Project) -> None:
    """SIGKILL to snakemake and its steps; the same command continues, without any option."""
    hold = fresh.root / "hold-stage1_checkpoint"
    hold.touch()
    process = fresh.start("--cores", "2")
    try:
        wait_for(lambda: "stage1_checkpoint" in steps(fresh), process)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert not (fresh.root / "results/demo/stage1_checkpoint/manifest.json").exists()
    logs = list((fresh.root / "results/demo/stage1_checkpoint/work/.work/logs").iterdir())
    assert logs, "what a killed step logged is found beside its result"
    hold.unlink()
    done = [name for name in steps(fresh) if name != "stage1_checkpoint"]
    fresh.forget_calls()
    fresh.snakemake("--cores", "2")
    assert not set(done) & set(steps(fresh))
    assert fresh.manifest("stage1_checkpoint")["attempts"] == 2
    assert "Nothing to be done" in fresh.snakemake("--cores", "2")


def test_a_second_run_beside_the_first_is_refused_and_does_no_harm(fresh: Project) -> None:
    hold = fresh.root / "hold-tar_shards"
    hold.touch()
    first = fresh.start("energon_dataset", "--cores", "2")
    wait_for(lambda: "tar_shards" in steps(fresh), first)
    text = fresh.snakemake("energon_dataset", "--cores", "2", code=1)
    assert "run 'demo'" in text and "is being written by process" in text
    # Other settings, so other entries of the store, but the same names in results/.
    other = fresh.overlay("tar_shards: {samples_per_shard: 7}\n")
    text = fresh.snakemake("energon_dataset", "--cores", "2", "--configfile", other, code=1)
    assert "run 'demo'" in text
    hold.unlink()
    assert first.wait(PATIENCE) == 0
    assert steps(fresh) == ["demo_assets", "tar_shards", "energon_dataset"]
    assert "Nothing to be done" in fresh.snakemake("energon_dataset", "--cores", "2")


def test_a_lost_store_is_an_error_and_not_a_silent_rebuild(finished: Project) -> None:
    (entry,) = (finished.root / "store/tar_shards").iterdir()
    (Path(entry) / "out.json").unlink()
    overlay = ("--configfile", finished.overlay("energon_dataset: {split: [2, 1, 0]}\n"))
    text = finished.snakemake("energon_dataset", "--cores", "1", *overlay, code=1)
    assert "out.json is missing" in text
