"""What a dry run shows: targets, order, profiles, refused configurations."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from llava_steps.pipeline import arguments
from tests.workflow.project import MODULES, ROOT, RULES, Project


def test_all_is_the_default_and_needs_every_rule(fresh: Project) -> None:
    assert fresh.planned() == sorted(RULES)
    assert fresh.calls() == []
    assert not (fresh.root / "results").exists(), "a dry run writes no result"
    assert not (fresh.root / "store").exists()


def needed(rule: str) -> set[str]:
    """`rule` and every rule before it."""
    before = {
        "tar_shards": ["demo_assets"],
        "energon_dataset": ["tar_shards"],
        "hf_model": ["demo_assets"],
        "megatron_checkpoint": ["hf_model"],
        "stage1_audit": ["hf_model", "energon_dataset"],
        "stage2_audit": ["hf_model", "energon_dataset"],
        "stage1_checkpoint": ["stage1_audit", "megatron_checkpoint"],
        "stage1_export": ["stage1_checkpoint"],
        "stage2_checkpoint": ["stage2_audit", "stage1_checkpoint"],
        "hf_export": ["stage2_checkpoint"],
        "evaluation": ["demo_assets", "hf_model", "stage1_export", "hf_export"],
        "report": ["evaluation"],
    }.get(rule, [])
    return {rule}.union(*(needed(name) for name in before))


def test_every_rule_name_is_a_target_that_needs_what_it_reads(fresh: Project) -> None:
    assert needed("stage2_checkpoint") == {
        "demo_assets", "tar_shards", "energon_dataset", "hf_model", "megatron_checkpoint",
        "stage1_audit", "stage1_checkpoint", "stage2_audit", "stage2_checkpoint",
    }  # fmt: skip
    for rule in RULES:
        assert fresh.planned(rule) == sorted(needed(rule))
    assert fresh.planned("all") == sorted(RULES)


def test_the_default_profile_is_found_and_holds_what_holds_everywhere(fresh: Project) -> None:
    assert "profile workflow/profiles/default" in fresh.snakemake("-n", "--cores", "1")
    profile = yaml.safe_load((ROOT / "workflow/profiles/default/config.yaml").read_text())
    # It beats every --profile key by key.
    assert not profile.keys() & {"executor", "cores", "jobs", "default-resources", "retries"}
    # Running again after a SIGKILL asks for no option; see test_rerun.py.
    assert profile["nolock"] is True and profile["rerun-incomplete"] is True


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["stage2.lr=3e-4"], "stage2.lr=3e-4: a key within a section is written --config "
         "'stage2={lr: 3e-4}'"),
        (["run=a", "cluster.jobs.tar_shards=2"], "--config 'cluster={jobs: {tar_shards: 2}}'"),
        (["run=a", "all"], "all: not of the form KEY=VALUE; a target belongs before --config"),
        (["1=2"], "'1' is not a key"),
        (["run=#x"], "put the value in quotes: --config \"run='#x'\""),
    ],
)  # fmt: skip
def test_a_wrong_word_of_config_is_one_line(fresh: Project, words: list[str], message: str) -> None:
    text = fresh.snakemake("-n", "--config", *words, code=1)
    assert message in text.splitlines()[-1] and "Traceback" not in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "mine.yaml: no such file in "),
        (b"a: [1\nb: 2", "mine.yaml: not valid YAML: line 2: expected ',' or ']'"),
        (b"- a", "mine.yaml: expected keys and values"),
        (b"", "mine.yaml: expected keys and values"),
        (b"\xff\xfe", "mine.yaml: not text in UTF-8"),
        (b"a: !!int x", "mine.yaml: not valid YAML: "),
    ],
)
def test_a_wrong_configuration_file_is_one_line(
    fresh: Project, content: bytes | None, message: str
) -> None:
    if content is not None:
        (fresh.root / "mine.yaml").write_bytes(content)
    text = fresh.snakemake("-n", "--configfile", "mine.yaml", code=1)
    assert f"Error: --configfile {message}" in text.splitlines()[-1]
    text = fresh.snakemake("-n", "--configfile", "config", code=1)
    assert text.splitlines()[-1].endswith("config: is a directory; name a YAML file")


def test_values_of_config_are_read_as_in_a_file(fresh: Project) -> None:
    text = fresh.snakemake("-n", "-p", "--config", "run=001", "stage2={lr: 2e-5, name: 1e5}")
    assert "--lr=2e-05" in text and "results/001/stage2_checkpoint" in text
    assert "--name=1e5" in text


def test_only_the_words_of_config_are_checked() -> None:
    words = ["-n", "a.b", "--config=x.y=1", "z.y=1", "--cores", "1", "b.c=1", "-C", "d.e=1"]
    assert [*arguments.values(words, ("--config", "-C"))] == ["x.y=1", "z.y=1", "d.e=1"]
    for word in ("run=a.b=c", "stage2={lr: 1}", "image=", "under_score-d=1"):
        assert not arguments.mistake(word)


def test_order_of_the_chain(fresh: Project) -> None:
    text = fresh.snakemake("--cores", "1", "-n")
    order = re.findall(r"^rule (\w+):", text, flags=re.M)
    for earlier, later in [
        ("demo_assets", "tar_shards"),
        ("demo_assets", "hf_model"),
        ("tar_shards", "energon_dataset"),
        ("hf_model", "megatron_checkpoint"),
        ("energon_dataset", "stage1_checkpoint"),
        ("megatron_checkpoint", "stage1_checkpoint"),
        ("stage1_audit", "stage1_checkpoint"),
        ("stage2_audit", "stage2_checkpoint"),
        ("stage1_checkpoint", "stage1_export"),
        ("stage1_checkpoint", "stage2_checkpoint"),
        ("stage2_checkpoint", "hf_export"),
        ("hf_export", "evaluation"),
        ("stage1_export", "evaluation"),
    ]:
        assert order.index(earlier) < order.index(later)


def test_one_shell_call_of_one_module_that_can_be_pasted(fresh: Project) -> None:
    text = fresh.snakemake("--cores", "1", "-n")
    lines = re.findall(r"^Shell command: (python .*)$", text, flags=re.M)
    assert len(lines) == len(RULES)
    for line in lines:
        module = line.removeprefix("python -m llava_steps.").split()[0]
        assert module in MODULES
        # By hand, outside Snakemake: the very line.
        result = subprocess.run(
            ["bash", "-c", line], cwd=fresh.root, env=fresh.env, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr
    assert fresh.planned() == [], "what was computed by hand is there for Snakemake"


def test_data_of_ones_own_needs_no_demo(fresh: Project) -> None:
    (fresh.root / "mine.json").write_text("[]")
    overlay = fresh.overlay(
        "demo_assets: null\n"
        "tar_shards: {source: mine.json}\n"
        "hf_model: {vision_tower: hub/tower, text_model: hub/model}\n"
        "evaluation: {data: mine.json}\n"
    )
    assert fresh.planned("--configfile", overlay) == sorted(set(RULES) - {"demo_assets"})
    (fresh.root / "mine.json").unlink()
    text = fresh.snakemake("--cores", "1", "-n", "--configfile", overlay, code=1)
    assert "tar_shards.source: mine.json does not exist" in text
    assert "evaluation.data: mine.json does not exist" in text and "hub/" not in text


def test_benchmarks_are_run_where_they_are_asked_for(fresh: Project) -> None:
    overlay = fresh.overlay(
        "lmms_eval: {tasks: [mme, pope], limit: 8, python: /other/python}\n"
        "llm_jp_eval_mm: {tasks: {ja-vg-vqa-500: 'rougel'}}\n"
    )
    text = fresh.snakemake("-n", "--cores", "1", "--configfile", overlay)
    for rule in ("lmms_eval", "llm_jp_eval_mm", "report"):
        assert f"rule {rule}:" in text
    (line,) = re.findall(r"^Shell command: (python -m llava_steps.lmms_eval .*)$", text, flags=re.M)
    assert "--tasks=mme --tasks=pope" in line and "--python=/other/python" in line
    assert "--model=results/demo/hf_export" in line and "--tasks=ja-vg-vqa-500=rougel" in text


def test_demo_paths_need_the_demo(fresh: Project) -> None:
    overlay = fresh.overlay("demo_assets: null\n")
    text = fresh.snakemake("--cores", "1", "-n", "--configfile", overlay, code=1)
    assert "tar_shards.source" in text and "demo_assets" in text


def test_a_stage_can_start_from_and_read_something_else(fresh: Project) -> None:
    (fresh.root / "other").mkdir()
    overlay = fresh.overlay("stage2: {megatron_load_dir: other, data_path: other}\n")
    assert "stage1_checkpoint" not in fresh.planned("stage2_checkpoint", "--configfile", overlay)


def test_wrong_keys_are_refused_with_their_place(fresh: Project) -> None:
    overlay = fresh.overlay("stage2:\n  lr: '2e-5'\n  train_stepps: 3\n")
    text = fresh.snakemake("--cores", "1", "-n", "--configfile", overlay, code=1)
    assert "overlay.yaml:2: stage2.lr" in text and "write 2.0e-5" in text
    assert "overlay.yaml:3: stage2.train_stepps: unknown key; did you mean train_steps?" in text
    assert "Traceback" not in text
    text = fresh.snakemake("--cores", "1", "-n", "--config", "typo=1", code=1)
    assert "--config: typo: unknown key" in text
    text = fresh.snakemake(
        "-n", "--configfile", fresh.overlay("run: x"), "--replace-workflow-config", code=1
    )
    assert "standalone: true" in text


def test_a_float_of_yaml_1_2_reaches_the_command(fresh: Project) -> None:
    overlay = fresh.overlay("stage2:\n  lr: 2e-5\n")
    text = fresh.snakemake("--cores", "1", "-n", "--configfile", overlay)
    (line,) = re.findall(r"python -m llava_steps.train (.*--stage=2.*)$", text, flags=re.M)
    assert "--lr=2e-05" in line


def test_an_image_is_known_by_its_digest_and_needs_containers(fresh: Project) -> None:
    text = fresh.snakemake("-n", "--cores", "1", "--config", "image=missing.sif", code=1)
    assert "neither a file nor pinned" in text
    (fresh.root / "image.sif").write_text("an image")
    arguments = ("demo_assets", "--cores", "1", "--config", "image=image.sif")
    text = fresh.snakemake("-n", *arguments)
    digest = hashlib.sha256(b"an image").hexdigest()
    assert f"--image=sha256:{digest}" in text
    text = fresh.snakemake(*arguments, code=1)
    assert "containers are off" in text and fresh.calls() == []


@pytest.mark.parametrize("profile", ["slurm", "local"])
def test_profiles_plan_in_a_plain_clone(tmp_path: Path, profile: str) -> None:
    """With the real steps, from tracked files alone, without Slurm, Apptainer or installation."""
    clone = tmp_path / "clone"
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("not a git checkout")
    tracked = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z"], check=True, capture_output=True, text=True
    ).stdout
    for name in filter(None, tracked.split("\0")):
        if (ROOT / name).exists():
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, clone / name, follow_symlinks=False)
    text = Project(clone).snakemake("--profile", profile, "-n", "all")
    for rule in RULES:
        assert f"rule {rule}:" in text


def test_a_dry_run_ends_with_the_plan_of_what_it_takes(finished: Project) -> None:
    text = finished.snakemake("-n", "--cores", "1")
    plan = text[text.index("Plan of run demo") :]
    assert len(re.findall(r"^  done +\w+", plan, flags=re.M)) == len(RULES)
    assert "746,176 parameters" in plan and re.search(r"memory per process: [\d.]+ MiB", plan)
    overlay = finished.overlay("stage2: {lr: 5.0e-4}\n")
    text = finished.snakemake("-n", "--cores", "1", "--configfile", overlay)
    assert re.search(r"run +stage2_checkpoint +changed: lr 0.001 -> 0.0005\n", text)
    assert re.search(r"later +hf_export +reads the result of stage2_checkpoint\n", text)
    assert re.search(r"done +stage1_checkpoint", text)
    finished.overlay("run: other\nstage1: {train_steps: 151}\n")
    text = finished.snakemake("-n", "--cores", "1", "--configfile", "overlay.yaml")
    assert re.search(r"done +stage1_audit", text), "another run's values are found in the store"
    assert re.search(r"run +stage1_checkpoint +not computed with these settings", text)
    assert "Plan of run" not in finished.snakemake("-n", "--quiet", "--cores", "1")


def test_a_mistyped_path_is_told_where_results_of_another_file_are_there(finished: Project) -> None:
    """Snakemake alone keeps the old result and ends well."""
    overlay = finished.overlay("evaluation: {data: no such.json}\n")
    arguments = ("-n", "--cores", "1", "--configfile", overlay)
    text = finished.snakemake(*arguments, code=1)
    assert "evaluation.data: no such.json does not exist; results/demo/evaluation was made" in text
    data = finished.root / "mine.json"
    data.write_text("[]")
    finished.overlay("evaluation: {data: mine.json}\n")
    assert "evaluation" in finished.run("--configfile", "overlay.yaml")
    data.unlink()
    finished.overlay("evaluation: {data: mine.json}\n")
    assert finished.run("--configfile", "overlay.yaml") == [], "what it was made from may be gone"


def test_the_plan_says_what_a_result_no_longer_reads(finished: Project) -> None:
    asked = finished.overlay("llm_jp_eval_mm: {tasks: {a: rougel}}\n")
    finished.run("--configfile", asked)
    shown = finished.manifest("report")["fingerprint"]
    for entry in (finished.root / "store/report").iterdir():
        if entry.name != shown:
            shutil.rmtree(entry)
    text = finished.snakemake("-n", "--cores", "1")
    assert re.search(r"run +report +changed: llm_jp_eval_mm is no longer read\n", text)


def test_files_are_named_behind_one_configfile(fresh: Project) -> None:
    """Of two, Snakemake would take the second alone."""
    files = [
        fresh.overlay("stage2: {lr: 3.0e-4}\n", "a.yaml"),
        fresh.overlay("stage2: {warmup_steps: 7}\n", "b.yaml"),
    ]
    twice = ("-n", "--cores", "1", "--configfile", files[0], "--configfile", files[1])
    assert "--configfile is given twice" in fresh.snakemake(*twice, code=1)
    text = fresh.snakemake("-n", "--cores", "1", "--configfile", *files)
    assert "--lr=0.0003" in text and "--warmup-steps=7" in text


def test_a_layout_of_stage_2_that_cannot_be_is_told_before_stage_1(fresh: Project) -> None:
    overlay = fresh.overlay("stage2: {gpus: 16, tensor_model_parallel: 8}\n")
    arguments = ("--cores", "2", "--configfile", overlay)
    for call in ((), ("-n",)):
        text = fresh.snakemake(*arguments, *call, code=1)
        (line,) = [line for line in text.splitlines() if "tensor_model_parallel 8" in line]
        assert line.startswith(
            "Error: stage2: tensor_model_parallel 8 does not divide num_attention_heads 4"
        )
        assert ".smk" not in text and "Traceback" not in text
    assert fresh.calls() == []
    assert fresh.snakemake("stage1_checkpoint", *arguments)


def test_what_jobs_ask_a_cluster_for_is_shown_only_for_a_cluster(fresh: Project) -> None:
    title = "rule  .* GPUs a node .* partition"
    for call in (("-n", "--cores", "2"), ("--list-rules",), ("--profile", "slurm", "--list-rules")):
        assert not re.search(title, fresh.snakemake(*call)), call
    assert re.search(title, fresh.snakemake("--profile", "slurm", "-n"))


def test_a_wrong_setting_is_shown_without_the_lines_of_the_workflow(fresh: Project) -> None:
    text = fresh.snakemake("-n", "--config", "stage2={lr: x}", code=1)
    assert text.endswith(
        "Error: the configuration has a problem:\n"
        "  --config: stage2.lr: expected a number, got 'x'\n"
    )
    assert ".smk" not in text and "Traceback" not in text
