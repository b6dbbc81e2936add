"""Each training option of the former scripts: one row in docs/reference/options.md, accepted by its
name on the command line, and a test here that asserts what it does (`test_OPTION`).

Three small trainings serve most of them; what needs hardware or several machines is asserted on
what the workers are started with.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import re
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llava_steps.core.errors import ConfigError, InputError
from llava_steps.launch import launch, preflight
from llava_steps.launch.group import LauncherGroup
from llava_steps.launch.launcher import Launcher, this_launcher
from llava_steps.settings import cli
from llava_steps.settings.former import OPTIONS, field_of
from llava_steps.settings.stage.stage import Stage
from llava_steps.store import container
from llava_steps.training import checkpoints, parallel
from llava_steps.training.async_save import Commits
from llava_steps.training.guard import Counters, Guard
from llava_steps.training.trackers import Trackers
from tests.helpers.chain import Chain, logged, metrics, run_step, sample_ids

ROOT = Path(__file__).parents[2]
NAMED = (
    "gpus gpu-ids save name wandb log-interval megatron-load-dir tokenizer-load-dir save-dir "
    "sif-path save-optim load-optim init save-interval skip-train-iteration-range tp pp "
    "micro-batch-size global-batch-size num-workers node rank master-addr master-port backend "
    "interface rdzv-port dist-optim image-token-id pad-token-id freeze-lm stage lang slurm-job-id "
    "slurm-output-name fp8 no-add-class-token debug deterministic data-path"
)
SEED_DOCUMENT = NAMED.split(" ")


def parsed(*line: str) -> Stage:
    return cli.parse(Stage, line)


def worker_environment(*line: str, rank: int = 0) -> dict[str, str]:
    stage = parsed(*line)
    alone = LauncherGroup(Launcher(0, 1, 0, stage.gpus))
    return dict(launch._environment(stage, alone, rank, Path("scratch")))


def test_each_option_has_one_row_and_one_test() -> None:
    assert list(OPTIONS) == SEED_DOCUMENT
    page = (
        (ROOT / "docs/reference/options.md").read_text(encoding="utf-8").partition("## Training")[2]
    )
    assert re.findall(r"^\| `--([\w-]+)`", page, flags=re.M) == SEED_DOCUMENT
    here = globals()
    assert not [o for o in OPTIONS if f"test_{o.replace('-', '_')}" not in here]


def test_each_option_is_on_the_command_line() -> None:
    shown = run_step("train", "--help", cwd=ROOT).stdout
    assert not [option for option in OPTIONS if not re.search(rf"--{option}\b", shown)]
    assert all(f"{short}," in shown or f"{short} " in shown for short in ("-g", "-r", "-m", "-p"))


SIF_WRAPPER = """#!{python}
import json, os, sys
from pathlib import Path
line = sys.argv[1:]
image = next(word for word in line if word.endswith(".sif"))
Path({note!r}).write_text(json.dumps(line))
os.environ["APPTAINER_CONTAINER"] = image
os.execv(sys.executable, [sys.executable, *line[line.index(image) + 2:]])
"""


@pytest.fixture(scope="module")
def trial(chain: Chain, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A training from nothing, in an image, that keeps nothing; with a stand-in for apptainer."""
    place = tmp_path_factory.mktemp("trial")
    sif, note = place / "llava.sif", place / "line.json"
    sif.write_bytes(b"an image")
    runtime = place / "bin/apptainer"
    runtime.parent.mkdir()
    runtime.write_text(SIF_WRAPPER.format(python=sys.executable, note=str(note)))
    runtime.chmod(0o755)
    flags = [f for f in chain.train_flags("trial") if "megatron-load" not in f]
    with pytest.MonkeyPatch.context() as patch:
        import os

        patch.setenv("PATH", f"{runtime.parent}{os.pathsep}{os.environ['PATH']}")
        run_step(
            "train", *flags, "--stage=2", "-g", "2", "--tp=2", "--init", "--no-save", "--seed=61",
            f"--sif-path={sif}", "--train-steps=4", "--global-batch-size=6",
            "--micro-batch-size=2", "--log-interval=2", "--num-workers=1", "--save-interval=1",
            "--skip-train-iteration-range", "2-2", "--slurm-job-id=77",
            "--slurm-output-name=out-77.txt", "--interface=lo", "--backend=gloo", cwd=chain.root,
        )  # fmt: skip
    out = chain.root / "results/trial"
    return SimpleNamespace(
        out=out,
        log=logged(out),
        sif=sif,
        line=json.loads(note.read_text()),
    )


COMMON = (
    "--stage=2", "--lr=1e-3", "--lr-schedule=constant", "--global-batch-size=4",
    "--micro-batch-size=2", "--train-steps=3", "--seed=62", "--freeze-lm",
)  # fmt: skip


@pytest.fixture(scope="module")
def whole(chain: Chain) -> SimpleNamespace:
    """Three steps in a pipeline, a checkpoint after the second one kept."""
    line = ("train", *chain.train_flags("options"), *COMMON, "-g2", "--pp=2")
    run_step(*line, "--save-interval=2", "--keep-every=2", cwd=chain.root)
    out = chain.root / "results/options"
    (entry,) = {path.resolve().parent for path in out.glob("iter_*")}
    return SimpleNamespace(out=out, entry=entry, log=logged(out))


@pytest.fixture(scope="module")
def going_on(chain: Chain, whole: SimpleNamespace) -> Path:
    """The third step again, from the checkpoint after the second, in another layout."""
    flags = chain.train_flags("options_on")[1:]
    start = f"--megatron-load-dir={whole.entry / '.work/kept'}"
    line = ("train", start, *flags, *COMMON, "-g2", "--tp=2", "--load-optim", "--no-save-optim")
    run_step(*line, cwd=chain.root)
    return chain.root / "results/options_on"


def layout(out: Path) -> dict[str, int]:
    return json.loads(next(out.glob("iter_*/train_state.json")).read_text())["layout"]


def test_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, whole: SimpleNamespace) -> None:
    assert worker_environment("-g", "3", "--global-batch-size=3")["WORLD_SIZE"] == "3"
    assert len(list(whole.out.glob("iter_*/rng/rank_*"))) == 2, "as many processes"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(cli, "NVIDIA", tmp_path / "none")
    with pytest.raises(argparse.ArgumentTypeError, match="this machine has none"):
        cli._gpus("-1")
    for number in range(4):
        (tmp_path / f"gpus/0000:0{number}").mkdir(parents=True)
    monkeypatch.setattr(cli, "NVIDIA", tmp_path / "gpus")
    assert parsed("-g", "-1", "--global-batch-size=4").gpus == 4
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    assert parsed("--gpus=-1", "--global-batch-size=4").gpus == 2


def test_gpu_ids() -> None:
    assert worker_environment("--gpus=1", "--gpu-ids=3,1")["CUDA_VISIBLE_DEVICES"] == "3,1"
    with pytest.raises(ConfigError, match="at least gpus = 2"):
        parsed("--gpus=2", "--gpu-ids=0", "--global-batch-size=2")


def test_save(trial: SimpleNamespace, whole: SimpleNamespace) -> None:
    assert list(whole.out.glob("iter_0000003/weights")) and not list(trial.out.rglob("iter_*"))
    assert (trial.out / "manifest.json").exists() and len(metrics(trial.out)) == 4


class FakeWandb:
    """Takes what it is told."""

    def __init__(self) -> None:
        self.settings: dict[str, object] = {}
        self.rows: list[dict[str, object]] = []

    def init(self, **settings: object) -> FakeWandb:
        self.settings = settings
        return self

    def Settings(self, **_: object) -> None:
        return None

    def log(self, row: dict[str, object], step: int) -> None:
        self.rows.append(row | {"step": step})

    def finish(self) -> None:
        return None


def tracked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *line: str) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    tracker = Trackers.of(parsed(*line), tmp_path, 0, logging.getLogger("test"))
    tracker.write({"step": 5, "loss": 1.5})
    tracker.close()
    return fake


def test_wandb(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    on = tracked(monkeypatch, tmp_path, "--wandb", "--wandb-project=mine")
    assert on.settings["project"] == "mine" and on.rows == [{"step": 5, "loss": 1.5}]
    assert not tracked(monkeypatch, tmp_path).settings


def test_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert tracked(monkeypatch, tmp_path, "--wandb", "--name=try").settings["name"] == "try"


def test_lang(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert "jp" in tracked(monkeypatch, tmp_path, "--wandb", "--lang=jp").settings["tags"]


def test_log_interval(trial: SimpleNamespace, whole: SimpleNamespace) -> None:
    assert re.findall(r"stage 2 (\d)/4", trial.log) == ["2", "4"]
    assert re.findall(r"stage 2 (\d)/3", whole.log) == ["1", "2", "3"]


def test_megatron_load_dir(chain: Chain, whole: SimpleNamespace) -> None:
    manifest = json.loads((whole.out / "manifest.json").read_text())
    content = json.loads((chain.checkpoint / "manifest.json").read_text())["content"]
    assert manifest["inputs"]["megatron_load_dir"]["digest"] == content
    flags = [f for f in chain.train_flags("nothing") if "megatron-load" not in f]
    result = run_step("train", *flags, cwd=chain.root, check=False)
    assert result.returncode == 2 and "give --megatron-load-dir, or --init" in result.stderr


def test_tokenizer_load_dir(chain: Chain) -> None:
    flags = [f for f in chain.train_flags("nothing") if "tokenizer" not in f]
    result = run_step("train", *flags, "--tokenizer-load-dir=no", cwd=chain.root, check=False)
    assert result.returncode == 3 and "--tokenizer-load-dir: no does not exist" in result.stderr


def test_data_path(chain: Chain, whole: SimpleNamespace) -> None:
    manifest = json.loads((whole.out / "manifest.json").read_text())
    content = json.loads((chain.dataset / "manifest.json").read_text())["content"]
    assert manifest["inputs"]["data_path"]["digest"] == content
    assert all(i.startswith("train-") for step in sample_ids(whole.out) for i in step)


def test_save_dir(whole: SimpleNamespace) -> None:
    assert (whole.out / "manifest.json").is_file() and (whole.out / "metrics.jsonl").is_file()


def test_sif_path(trial: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The whole step runs in the image, whose digest is part of what it computed."""
    image = f"sha256:{hashlib.sha256(b'an image').hexdigest()}"
    assert json.loads((trial.out / "manifest.json").read_text())["image"] == image
    line = trial.line
    bound = [line[i + 1] for i, word in enumerate(line) if word == "--bind"]
    assert line[0] == "exec" and str(trial.sif.parent) in bound and str(ROOT) in bound
    assert line[line.index(str(trial.sif)) + 1 :][:3] == ["python", "-m", "llava_steps.train"]
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="neither apptainer nor singularity"):
        container.enter(trial.sif, "llava_steps.train", [], [])
    monkeypatch.setenv("APPTAINER_CONTAINER", "/other.sif")
    with pytest.raises(ConfigError, match=r"already runs in the image /other\.sif"):
        container.enter(trial.sif, "llava_steps.train", [], [])
    (tmp_path / "a:b").mkdir()
    with pytest.raises(ConfigError, match="cannot be bound"):
        container.command("apptainer", trial.sif, "m", [], [tmp_path / "a:b/c"])


def test_save_optim(whole: SimpleNamespace, going_on: Path) -> None:
    assert list(whole.out.glob("iter_*/optimizer/*")) and not list(going_on.glob("iter_*/optim*"))
    (last,) = going_on.glob("iter_*")
    with pytest.raises(InputError, match="without save_optim"):
        checkpoints.load(last, Stage(), None, None)  # type: ignore[arg-type]


def test_load_optim(chain: Chain, whole: SimpleNamespace, going_on: Path) -> None:
    expected, (row,) = metrics(whole.out)[2], metrics(going_on)
    assert row["step"] == expected["step"] and row["loss"] == pytest.approx(expected["loss"], 1e-5)
    assert sample_ids(going_on) == sample_ids(whole.out)[2:], "the place in the data too"
    start = f"--megatron-load-dir={whole.entry / '.work/kept'}"
    line = ("train", start, *chain.train_flags("options_more")[1:], *COMMON, "--load-optim")
    result = run_step(*line, "-g2", "--pp=2", "--no-freeze-vision", cwd=chain.root, check=False)
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    assert re.search(
        r"has no optimizer\.state\.\S*vision.* frozen there: set freeze_v", result.stderr
    )


def test_init(trial: SimpleNamespace) -> None:
    assert "starting from random weights with deviation 0.02" in trial.log
    assert "these parts are frozen and so stay random: vision tower" in trial.log
    losses = [row["loss"] for row in metrics(trial.out) if "loss" in row]
    assert len(losses) == 3 and losses[0] == pytest.approx(6.0, abs=1.0), "that of a guess"
    with pytest.raises(ConfigError, match="give one of them"):
        parsed("--init", "--load-optim")


def test_save_interval(whole: SimpleNamespace) -> None:
    assert re.findall(r"saved (iter_\d+)", whole.log) == ["iter_0000002", "iter_0000003"]


def test_async_save(chain: Chain, whole: SimpleNamespace) -> None:
    """Beside the training, and with the same result; a failed commit is not passed over."""
    # In a store of its own: it is no part of the value, which else were there already.
    beside = ("--save-interval=1", "--async-save", "--store=async")
    out = chain.train("options_async", *COMMON, "-g2", "--pp=2", *beside)
    committed = re.findall(r"committing (iter_\d+)", logged(out))
    assert committed == ["iter_0000001", "iter_0000002", "iter_0000003"]
    assert [row["loss_hex"] for row in metrics(out)] == [r["loss_hex"] for r in metrics(whole.out)]
    files = {p.relative_to(whole.out): p for p in whole.out.glob("iter_*/**/*") if p.is_file()}
    assert files and all((out / name).read_bytes() == p.read_bytes() for name, p in files.items())
    gate, order = threading.Event(), []

    def slow() -> None:
        gate.wait()
        order.append("committed")

    def failing() -> None:
        raise OSError("the disk is full")

    with Commits(beside=True) as commits:
        commits.begin(slow)
        order.append("trained on")
        gate.set()
        commits.begin(lambda: order.append("the next one"))
    assert order == ["trained on", "committed", "the next one"]
    with pytest.raises(OSError, match="full"), Commits(beside=True) as commits:
        commits.begin(failing)
    with pytest.raises(ValueError, match="another") as raised, Commits(beside=True) as commits:
        commits.begin(failing)
        raise ValueError("another")
    assert "the disk is full" in raised.value.__notes__[0]


def test_skip_train_iteration_range(trial: SimpleNamespace) -> None:
    assert [row["step"] for row in metrics(trial.out) if "skipped" in row] == [1]
    guard = Guard(parsed("--skip-train-iteration-range", "2-3", "5-5"), Counters(), None)  # type: ignore[arg-type]
    skipped = []
    for guard._counters.step in range(6):
        skipped.append(guard.skips())
    assert skipped == [False, True, True, False, True, False]


def test_tp(going_on: Path) -> None:
    assert layout(going_on)["tensor_model_parallel"] == 2


def test_pp(whole: SimpleNamespace) -> None:
    assert layout(whole.out)["pipeline_model_parallel"] == 2


def rows_of_a_step(out: Path) -> list[list[str]]:
    return json.loads(next((out / "samples").glob("*")).read_text().splitlines()[0])["ids"]


def test_micro_batch_size(trial: SimpleNamespace) -> None:
    assert [len(row) for row in rows_of_a_step(trial.out)] == [2, 2, 2]


def test_global_batch_size(trial: SimpleNamespace, whole: SimpleNamespace) -> None:
    assert [len(step) for step in sample_ids(trial.out)] == [6] * 4
    assert [len(step) for step in sample_ids(whole.out)] == [4] * 3


def test_num_workers(chain: Chain, trial: SimpleNamespace) -> None:
    from tests.helpers.data_fixtures import train_loader

    assert len(metrics(trial.out)) == 4, "with a worker"
    loader = train_loader(
        chain.dataset,
        chain.hf,
        global_batch_size=2,
        micro_batch_size=2,
        seed=1,
        num_workers=2,
        need_pixels=False,
    )
    me = Path("/proc/self/task")
    steps = iter(loader)
    next(steps)
    children = {c for task in me.iterdir() for c in (task / "children").read_text().split()}
    steps.close()  # type: ignore[attr-defined]
    assert children, "a fork server with the workers"


def test_master_addr() -> None:
    found = worker_environment("-m", "10.0.0.7", "-p", "29500")["LLAVA_STEPS_RENDEZVOUS"]
    assert found == "tcp://10.0.0.7:29500"


def test_master_port() -> None:
    assert worker_environment()["LLAVA_STEPS_RENDEZVOUS"] == "file://scratch/store"
    assert worker_environment("-p", "29501")["LLAVA_STEPS_RENDEZVOUS"] == "tcp://127.0.0.1:29501"


def test_rdzv_port() -> None:
    line = ("--master-port=29500", "--rdzv-port=29600")
    assert worker_environment(*line)["LLAVA_STEPS_RENDEZVOUS"].endswith(":29600")


def test_backend() -> None:
    assert parallel.choose_backend(parsed("--backend=gloo").backend) == "gloo"
    if torch.cuda.is_available():
        assert parallel.choose_backend("auto") == "nccl"
    else:
        with pytest.raises(ConfigError, match="nccl needs a GPU"):
            parallel.choose_backend(parsed("--backend=nccl").backend)


def test_interface(trial: SimpleNamespace) -> None:
    environment = worker_environment("--interface=ib0")
    assert environment["NCCL_SOCKET_IFNAME"] == environment["GLOO_SOCKET_IFNAME"] == "ib0"
    assert len(metrics(trial.out)) == 4, "over lo"
    preflight.check_interface("")
    preflight.check_interface("lo")
    preflight.check_interface("^docker,veth")
    with pytest.raises(
        ConfigError, match=r"--interface eth99 does not exist here; there are: .*\blo\b"
    ):
        preflight.check_interface("eth99")


def test_dist_optim() -> None:
    assert parsed("--dist-optim").dist_optim
    with pytest.raises(ConfigError, match="always on"):
        parsed("--no-dist-optim")


def test_image_token_id(chain: Chain) -> None:
    right = json.loads((chain.hf / "config.json").read_text())["image_token_index"]
    preflight.check(parsed(f"--image-token-id={right}"), chain.hf)
    with pytest.raises(ConfigError, match=f"has {right} for <image>"):
        preflight.check(parsed(f"--image-token-id={right + 1}"), chain.hf)


def test_pad_token_id(chain: Chain) -> None:
    right = preflight.pad_token(chain.hf)
    preflight.check(parsed(f"--pad-token-id={right}"), chain.hf)
    with pytest.raises(ConfigError, match=f"pads with {right}"):
        preflight.check(parsed("--pad-token-id=999"), chain.hf)


def test_no_add_class_token(chain: Chain, tmp_path: Path) -> None:
    preflight.check(parsed("--no-add-class-token"), chain.hf)
    config = json.loads((chain.hf / "config.json").read_text())
    config["vision_feature_select_strategy"] = "full"
    config["image_seq_length"] = config["image_seq_length"] + 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="keeps the class token"):
        preflight.check(parsed("--no-add-class-token"), tmp_path)


def test_freeze_lm(chain: Chain, whole: SimpleNamespace) -> None:
    """Only the projector has moved, also in stage 2."""
    from llava_steps.conversion import torch_dist_write

    def values(place: Path) -> dict[str, torch.Tensor]:
        reader = torch_dist_write.Reader(next(place.glob("iter_*")) / "weights")
        return {name: reader.read(name) for name in reader.shapes()}

    before, after = values(chain.checkpoint), values(whole.out)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all(name.startswith("mm_projector") for name in moved)
    assert not parsed("--stage=2").freeze_lm


def test_stage() -> None:
    assert parsed("--stage=1").freeze_lm and not parsed("--stage=2").freeze_lm
    from llava_steps.train import STEP

    assert STEP.name(parsed("--stage=1")) == "stage1_checkpoint"  # type: ignore[operator]


def test_slurm_job_id(
    trial: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert "Slurm job 77" in trial.log
    noted = tracked(monkeypatch, tmp_path, "--wandb", "--slurm-job-id=78").settings["config"]
    assert noted["slurm_job_id"] == "78"  # type: ignore[index]


def test_slurm_output_name(trial: SimpleNamespace) -> None:
    assert "job output out-77.txt" in trial.log


def test_debug() -> None:
    environment = worker_environment("--debug")
    assert (
        environment["TORCH_DISTRIBUTED_DEBUG"] == "DETAIL" and environment["NCCL_DEBUG"] == "INFO"
    )
    assert "NCCL_DEBUG" not in worker_environment()


def test_deterministic() -> None:
    program = (
        "import torch; from llava_steps.training import parallel; parallel.make_deterministic();"
        "print(torch.are_deterministic_algorithms_enabled())"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.split()[-1] == "True"


def test_fp8(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = parsed("--fp8")
    assert stage.fp8 and stage.transformer_engine and stage.fp8_recipe == "tensorwise"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="Transformer Engine"):
        preflight.check(stage, chain.hf)


def test_node() -> None:
    two = parsed("--node=2", "--gpus=2", "--global-batch-size=4")
    assert two.world_size == 4, "trained in tests/e2e/test_nodes.py"


def test_rank() -> None:
    second = this_launcher(parsed("--node=2", "--gpus=2", "--global-batch-size=4", "-r", "1"), {})
    assert (second.first, second.workers) == (2, 2)


def test_settings_are_named_after_the_option() -> None:
    assert field_of("tp") == "tensor_model_parallel" and field_of("sif-path") is None
