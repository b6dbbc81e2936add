"""HF -> Megatron -> HF through the two steps: byte for byte, or an error that names the tensor."""

from __future__ import annotations

import hashlib
import json
import pickle
import random
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava_steps import hf_to_megatron, megatron_to_hf
from llava_steps.__main__ import main as llava_steps
from llava_steps.conversion import torch_dist_write
from llava_steps.conversion.convert import dcp_to_hf, hf_to_dcp
from llava_steps.conversion.tensors import INDEX, LikeWriter, TensorDirectory
from llava_steps.core.errors import ConfigError, InputError, IntegrityError, StepError
from llava_steps.geometry.geometry import Geometry
from llava_steps.settings.conversion import HfExport, MegatronCheckpoint
from llava_steps.store import commit, store
from llava_steps.store.run import execute
from tests.helpers.data_fixtures import fake_context
from tests.helpers.model_fixtures import TINY, save_hf

SINGLE = "model.safetensors"
Q0 = "language_model.model.layers.0.self_attn.q_proj.weight"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def to_megatron(hf: str = "hf", out: str = "megatron") -> int:
    return execute(hf_to_megatron.STEP, [f"--hf-dir={hf}", f"--save-dir={out}"])


def to_hf(megatron: str = "megatron", template: str = "hf", out: str = "export") -> int:
    flags = [f"--megatron-dir={megatron}", f"--tokenizer-dir={template}", f"--save-dir={out}"]
    return execute(megatron_to_hf.STEP, flags)


def digests(directory: str) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in Path(directory).iterdir()
        if path.name != store.MANIFEST
    }


def unsealed(directory: str) -> Path:
    """A copy of the checkpoint outside the store, as another machine would get it."""
    (checkpoint,) = Path(directory).glob("iter_*")
    return Path(shutil.copytree(checkpoint, f"copy/{checkpoint.name}")).parent


FORMER_TO_MEGATRON = "--tp 2 --pp 1 --hf-dir hf --megatron-dir out/megatron"
FORMER_TO_HF = "--tp 2 --pp 1 --megatron-dir out/megatron --hf-dir out/hf --tokenizer-dir hf"
"""What the scripts convert_hf_to_megatron.py and convert_megatron_to_hf.py were given."""


def test_commands_of_the_former_scripts() -> None:
    save_hf(TINY["untied-default"], Path("hf"))
    assert llava_steps(["hf-to-megatron", *FORMER_TO_MEGATRON.split()]) == 0
    assert llava_steps(["megatron-to-hf", *FORMER_TO_HF.split()]) == 0
    assert digests("out/hf") == digests("hf")
    for directory, step in (("out/megatron", "megatron_checkpoint"), ("out/hf", "hf_export")):
        manifest = json.loads(Path(directory, store.MANIFEST).read_bytes())
        assert manifest["step"] == step
        assert (manifest["config"]["tp"], manifest["config"]["pp"]) == (2, 1)


@pytest.mark.parametrize(
    ("step", "flags", "alias"),
    [
        (hf_to_megatron.STEP, ["--hf-dir=hf"], "--megatron-dir"),
        (megatron_to_hf.STEP, ["--megatron-dir=megatron", "--tokenizer-dir=hf"], "--hf-dir"),
    ],
)
def test_a_result_goes_to_one_directory(
    step: Any, flags: list[str], alias: str, capsys: pytest.CaptureFixture[str]
) -> None:
    save_hf(TINY["untied-default"], Path("hf"))
    assert to_megatron() == 0
    capsys.readouterr()
    assert execute(step, [*flags, "--save-dir=one", f"{alias}=two"]) == ConfigError.exit_code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(f"--save-dir one and {alias} two both name the result; give one of them")
    assert not Path("one").exists() and not Path("two").exists()
    assert execute(step, [*flags, "--save-dir=one", f"{alias}=one/"]) == 0
    assert Path("one", store.MANIFEST).exists()
    with pytest.raises(SystemExit) as ended:
        execute(step, flags)
    assert ended.value.code == ConfigError.exit_code
    assert f"required: --save-dir/{alias}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("step", "flags", "message"),
    [
        (hf_to_megatron.STEP, "--hf-dir=hf --megatron-dir=hf", "--megatron-dir hf would replace "
         "--hf-dir hf"),
        (hf_to_megatron.STEP, "--hf-dir=hf --save-dir=hf", "--save-dir hf would replace --hf-dir"),
        (megatron_to_hf.STEP, "--megatron-dir=megatron --tokenizer-dir=hf --hf-dir=hf",
         "--hf-dir hf would replace --tokenizer-dir hf"),
    ],
)  # fmt: skip
def test_a_result_over_an_input_is_reported_by_the_given_flag(
    step: Any, flags: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert execute(step, flags.split()) == ConfigError.exit_code
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


@pytest.mark.parametrize("shard", ["5GB", "20KB"], ids=["one-file", "sharded"])
@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("model", TINY)
def test_round_trip_is_byte_identical(model: str, precision: str, shard: str) -> None:
    save_hf(TINY[model], Path("hf"), DTYPES[precision], shard)
    Path("hf/chat_template.jinja").write_text("{{ messages }}")
    assert Path("hf", INDEX).exists() == (shard == "20KB")
    assert to_megatron() == 0
    assert to_hf() == 0
    assert digests("export") == digests("hf")
    certificate = json.loads(Path("export/manifest.json").read_bytes())["metrics"]["certificate"]
    assert certificate["hf_tensors"] == sum(
        len(load_file(path)) for path in Path("hf").glob("*.safetensors")
    )


def test_the_values_come_from_the_checkpoint_and_only_the_form_from_the_template() -> None:
    save_hf(TINY["biases-uneven"], Path("hf"), shard="20KB")
    save_hf(TINY["biases-uneven"], Path("other"), seed=5)
    assert to_megatron("other") == 0
    assert to_hf("megatron", "hf") == 0
    merged: dict[str, torch.Tensor] = {}
    for path in Path("export").glob("*.safetensors"):
        merged |= load_file(path)
    expected = load_file(f"other/{SINGLE}")
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[name], value) for name, value in expected.items())
    assert digests("export").keys() == digests("hf").keys()


def test_each_tensor_keeps_its_own_dtype() -> None:
    save_hf(TINY["untied-default"], Path("hf"), torch.bfloat16)
    tensors = load_file(f"hf/{SINGLE}")
    save_file(
        {n: t.float() if "vision" in n or "norm" in n else t for n, t in tensors.items()},
        f"hf/{SINGLE}",
    )
    assert (to_megatron(), to_hf()) == (0, 0)
    assert digests("export") == digests("hf")


def test_names_of_older_transformers_come_back_as_they_were() -> None:
    save_hf(TINY["untied-default"], Path("hf"))
    tensors = load_file(f"hf/{SINGLE}")
    older = {
        n.replace("vision_tower.", "vision_tower.vision_model."): t for n, t in tensors.items()
    }
    save_file(older, f"hf/{SINGLE}")
    assert older.keys() != tensors.keys()
    assert (to_megatron(), to_hf()) == (0, 0)
    assert digests("export") == digests("hf")


def test_one_weight_under_two_names_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    save_hf(TINY["untied-default"], Path("hf"))
    tensors = load_file(f"hf/{SINGLE}")
    save_file({**tensors, "lm_head.weight": torch.zeros(96, 48)}, f"hf/{SINGLE}")
    assert to_megatron() == 4
    assert "'lm_head.weight'" in (error := capsys.readouterr().err)
    assert "two names of one weight" in error


def test_the_checkpoint_has_the_same_bytes_each_time() -> None:
    save_hf(TINY["biases-uneven"], Path("hf"))
    shutil.copytree("hf", "again")
    assert (to_megatron("hf", "one"), to_megatron("again", "two")) == (0, 0)
    flags = ["--hf-dir=hf", "--save-dir=three", "--force"]
    assert execute(hf_to_megatron.STEP, flags) == 0
    found = [digests(f"{name}/iter_0000000/weights") for name in ("one", "two", "three")]
    assert found[0] == found[1] == found[2]


def test_the_remains_of_a_killed_attempt_do_no_harm() -> None:
    save_hf(TINY["untied-default"], Path("hf"), shard="20KB")
    Path("entry/.tmp-iter_0000000/weights").mkdir(parents=True)
    Path("entry/.tmp-iter_0000000/weights/.metadata").write_bytes(b"half")
    for _ in range(2):  # the second finds the committed result of the first
        context = fake_context(Path("entry"), hf_dir=Path("hf"))
        hf_to_megatron.run(context, MegatronCheckpoint(hf_dir="hf"))
    assert [path.name for path in Path("entry").iterdir()] == ["iter_0000000"]
    Path("out").mkdir()
    for file in Path("hf").glob("*.safetensors"):
        Path("out", file.name).write_bytes(b"z" * 2 * file.stat().st_size)
    context = fake_context(Path("out"), megatron_dir=Path("entry"), tokenizer_dir=Path("hf"))
    megatron_to_hf.run(context, HfExport(megatron_dir="entry", tokenizer_dir="hf"))
    assert digests("out") == digests("hf")


def edit(change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(f"hf/{SINGLE}")
    change(tensors)
    save_file(tensors, f"hf/{SINGLE}")


EDITS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "missing": (lambda t: t.pop(Q0), f"'{Q0}' is missing"),
    "missing in the tower": (
        lambda t: t.pop("vision_tower.post_layernorm.bias"),
        "'vision_tower.post_layernorm.bias' is missing",
    ),
    "unknown": (lambda t: t.update(extra=torch.ones(2)), "'extra' is unknown"),
    "a bias that config.json does not have": (
        lambda t: t.update({Q0.replace("weight", "bias"): torch.ones(48)}),
        f"'{Q0.replace('weight', 'bias')}' is unknown",
    ),
    "another layer": (
        lambda t: t.update({Q0.replace(".0.", ".2."): torch.ones(48, 48)}),
        f"'{Q0.replace('.0.', '.2.')}' is unknown",
    ),
    "wrong shape": (
        lambda t: t.update({Q0: torch.ones(47, 48)}),
        f"'{Q0}' has shape [47, 48], config.json implies [48, 48]",
    ),
    "transposed": (
        lambda t: t.update({Q0.replace("q_proj", "k_proj"): torch.ones(48, 24)}),
        "k_proj.weight' has shape [48, 24], config.json implies [24, 48]",
    ),
    "another dtype within one tensor": (
        lambda t: t.update({Q0: t[Q0].bfloat16()}),
        "save the model in one dtype",
    ),
}


@pytest.mark.parametrize("name", EDITS)
def test_tensors_that_do_not_fit_are_named(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    change, message = EDITS[name]
    save_hf(TINY["untied-default"], Path("hf"))
    assert to_megatron() == 0
    edit(change)
    assert to_megatron(out="second") == 4
    assert message in capsys.readouterr().err
    assert not Path("second/manifest.json").exists()
    assert not list(Path("second").glob("work/iter_*"))
    if "dtype" not in name:  # as a template too; there the dtype is the template's to say
        assert to_hf() == 4
        assert message in capsys.readouterr().err


def test_a_head_beside_tied_embeddings_is_unknown(capsys: pytest.CaptureFixture[str]) -> None:
    save_hf(TINY["tied-full"], Path("hf"))
    edit(lambda t: t.update({"language_model.lm_head.weight": torch.ones(96, 48)}))
    assert to_megatron() == 4
    assert "'language_model.lm_head.weight' is unknown" in capsys.readouterr().err


@pytest.mark.parametrize("keep", [0, 5, 8, 300, 20_000, -1], ids=lambda n: f"{n}-bytes")
def test_a_truncated_safetensors_file(keep: int, capsys: pytest.CaptureFixture[str]) -> None:
    save_hf(TINY["untied-default"], Path("hf"))
    path = Path("hf", SINGLE)
    path.write_bytes(path.read_bytes()[:keep])
    assert to_megatron() == 4
    assert SINGLE in capsys.readouterr().err


def test_a_shard_that_is_gone_or_in_the_wrong_place(capsys: pytest.CaptureFixture[str]) -> None:
    save_hf(TINY["untied-default"], Path("hf"), shard="20KB")
    index = json.loads(Path("hf", INDEX).read_bytes())
    shards = sorted(set(index["weight_map"].values()))
    # Another tensor stays in the shard, so that the shard itself is still looked at.
    moved = next(n for n, f in index["weight_map"].items() if f == shards[-1])
    assert list(index["weight_map"].values()).count(shards[-1]) > 1
    for wrong in (shards[1], "../model.safetensors", "/tmp/x.safetensors", "config.json"):
        damaged = {**index, "weight_map": {**index["weight_map"], moved: wrong}}
        Path("hf", INDEX).write_text(json.dumps(damaged))
        assert to_megatron() == 4
        assert (moved if wrong == shards[1] else repr(wrong)) in capsys.readouterr().err
    Path("hf", INDEX).write_text(json.dumps(index))
    Path("hf", shards[0]).unlink()
    assert to_megatron() == 3
    assert shards[0] in capsys.readouterr().err


def test_an_hf_directory_without_weights_is_an_input_error() -> None:
    save_hf(TINY["untied-default"], Path("hf"))
    Path("hf", SINGLE).unlink()
    assert to_megatron() == 3
    Path("hf/config.json").unlink()
    assert to_megatron() == 3


@pytest.mark.parametrize("sealed", [True, False])
@pytest.mark.parametrize("file", [".metadata", "__0_0.distcp", "common.pt"])
def test_one_changed_byte_of_a_checkpoint(
    file: str, sealed: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    save_hf(TINY["untied-default"], Path("hf"))
    assert to_megatron() == 0
    root = Path("megatron") if sealed else unsealed("megatron")
    path = root / "iter_0000000" / "weights" / file
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert to_hf(str(root)) == 4
    assert f"{file} has another sha256" in capsys.readouterr().err
    path.unlink()
    assert to_hf(str(root)) == 4
    assert file in capsys.readouterr().err


def test_one_changed_byte_of_a_sealed_hf_directory(capsys: pytest.CaptureFixture[str]) -> None:
    save_hf(TINY["untied-default"], Path("made"))
    store.seal(Path("made"), {"step": "hf_model"})
    store.publish(Path("made"), Path("hf"))
    assert to_megatron() == 0
    data = bytearray(Path("made", SINGLE).read_bytes())
    data[-3] ^= 1
    Path("made", SINGLE).write_bytes(data)
    assert execute(hf_to_megatron.STEP, ["--hf-dir=hf", "--save-dir=b", "--store=other"]) == 4
    assert f"{SINGLE} has another sha256" in capsys.readouterr().err


def test_a_checkpoint_of_another_model_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    save_hf(TINY["untied-default"], Path("hf"))
    save_hf(TINY["siglip-mha"], Path("other"))
    assert to_megatron("other") == 0
    assert to_hf("megatron", "hf") == 4
    assert "megatron" in (error := capsys.readouterr().err)
    assert "mm_projector.linear_1.bias' is missing" in error
    assert to_hf("hf", "hf") == 3
    assert "no committed checkpoint" in capsys.readouterr().err


def test_the_newest_committed_iteration_is_exported() -> None:
    for seed in (0, 1, 2):
        save_hf(TINY["untied-default"], Path(f"hf{seed}"), seed=seed)
        geometry = Geometry.load(f"hf{seed}")
        with TensorDirectory(f"hf{seed}") as tensors:
            hf_to_dcp(geometry, tensors, Path(f"tmp{seed}/weights"))
    root = Path("run")
    root.mkdir()
    for seed, step in ((0, 9), (1, 10)):
        commit.commit_dir(Path(f"tmp{seed}"), root / commit.iteration_name(step))
    Path("tmp2").rename(root / commit.iteration_name(11))  # never committed
    assert to_hf("run", "hf0") == 0
    assert digests("export")[SINGLE] == digests("hf1")[SINGLE]


def flipped(data: bytes, rng: random.Random, header: int) -> bytes:
    changed = bytearray(data)
    changed[rng.randrange(header)] = rng.randrange(256)
    return bytes(changed[: rng.randrange(len(changed))] if rng.random() < 0.3 else changed)


@pytest.mark.parametrize("what", ["header", "index", ".metadata", "__0_0.distcp", "metadata.json"])
def test_damage_is_reported_as_such_whatever_it_is(what: str) -> None:
    """150 random damages each: a step error or a clean read, never another exception."""
    save_hf(TINY["untied-default"], Path("hf"), shard="20KB" if what == "index" else "5GB")
    with TensorDirectory("hf") as tensors:
        hf_to_dcp(Geometry.load("hf"), tensors, Path("weights"))
    path = {"header": Path("hf", SINGLE), "index": Path("hf", INDEX)}.get(
        what, Path("weights", what)
    )
    data = path.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little") if what == "header" else len(data)
    rng, refused = random.Random(7), 0
    for _ in range(150):
        path.write_bytes(flipped(data, rng, header))
        try:
            if path.parent.name == "hf":
                with TensorDirectory("hf") as tensors:
                    for name in tensors.slots:
                        tensors.read(name)
            else:
                reader = torch_dist_write.Reader("weights")
                for name in reader.shapes():
                    reader.read(name)
        except StepError as error:
            assert isinstance(error, InputError | IntegrityError)
            refused += 1
    assert refused > 50


def test_a_foreign_checkpoint_cannot_run_code() -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (Path("ran"),)

    save_hf(TINY["untied-default"], Path("hf"))
    with TensorDirectory("hf") as tensors:
        hf_to_dcp(Geometry.load("hf"), tensors, Path("weights"))
    for payload in (Evil(), [1], {"state_dict_metadata": {}}):
        Path("weights/.metadata").write_bytes(pickle.dumps(payload))
        with pytest.raises(IntegrityError, match=r"\.metadata cannot be read"):
            torch_dist_write.Reader("weights")
    assert not Path("ran").exists()


def test_what_goes_wrong_while_writing_arrives_as_it_is(place: Path) -> None:
    """torch wraps it in an exception that is no Exception."""
    chunks = [
        torch_dist_write.Chunk("a", (2, 3), (0, 0), (1, 3), torch.float32),
        torch_dist_write.Chunk("a", (2, 3), (1, 0), (1, 3), torch.float32),
    ]

    def resolve(error: BaseException) -> Callable[[torch_dist_write.Chunk], torch.Tensor]:
        def fail(chunk: torch_dist_write.Chunk) -> torch.Tensor:
            raise error

        return fail

    for error in (IntegrityError("x ended inside 'a'"), OSError(28, "No space left on device")):
        with pytest.raises(type(error)) as caught:
            torch_dist_write.write(place / type(error).__name__, chunks, resolve(error))
        assert caught.value is error
    with pytest.raises(IntegrityError, match="planned"):
        torch_dist_write.write(
            place / "dtype", chunks, lambda chunk: torch.zeros(1, 3, dtype=torch.float64)
        )
    for wrong in (
        chunks[:1],
        [chunks[0], torch_dist_write.Chunk("a", (2, 3), (0, 1), (2, 2), torch.float32)],
    ):
        with pytest.raises(IntegrityError):
            torch_dist_write.write(
                place / str(len(wrong)), wrong, lambda chunk: torch.zeros(chunk.shape)
            )
    assert not list(place.glob("*/metadata.json"))


def test_the_export_takes_each_tensor_once_and_in_its_shape(place: Path) -> None:
    save_hf(TINY["untied-default"], Path("hf"))
    name = "language_model.model.norm.weight"
    with TensorDirectory("hf") as template:
        Path("out").mkdir()
        for values, message in (
            ([(name, torch.ones(47))], r"has shape \[47\]"),
            ([(name, torch.ones(48))] * 2, "was written already"),
            ([("more", torch.ones(48))], "is not in the template"),
            ([(name, torch.ones(48))], "was never written"),
        ):
            with (
                pytest.raises(IntegrityError, match=message),
                LikeWriter(template, Path("out")) as put,
            ):
                for key, value in values:
                    put(key, value)


def test_memory_stays_at_a_few_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes of tensors that are alive at once while converting a model of 40 such tensors."""
    alive = peak = 0

    def counting(read: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def counted(*arguments: Any) -> torch.Tensor:
            nonlocal alive, peak
            value = read(*arguments)
            size = value.nbytes

            def gone() -> None:
                nonlocal alive
                alive -= size

            alive += size
            peak = max(peak, alive)
            weakref.finalize(value.untyped_storage(), gone)
            return value

        return counted

    save_hf(TINY["biases-uneven"], Path("hf"))
    geometry = Geometry.load("hf")
    with TensorDirectory("hf") as template:
        sizes = sorted(slot.size for slot in template.slots.values())
        monkeypatch.setattr(TensorDirectory, "read", counting(TensorDirectory.read))
        hf_to_dcp(geometry, template, Path("weights"))
        assert 0 < peak <= 4 * sizes[-1] < sum(sizes) / 4
        alive = peak = 0
        monkeypatch.setattr(torch_dist_write.Reader, "read", counting(torch_dist_write.Reader.read))
        Path("export").mkdir()
        dcp_to_hf(geometry, Path("weights"), template, Path("export"))
        assert 0 < peak <= 4 * sizes[-1]
