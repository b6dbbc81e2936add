"""Other ways to save the same model: what lies on hubs and disks, made from a plain directory.

Each function changes a directory in place. What it holds stays the model that transformers loads.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

SINGLE = "model.safetensors"
Save = Callable[[Path], None]


def edit(path: Path, drop: tuple[str, ...] = (), **keys: Any) -> None:
    """Set and drop keys of a JSON file."""
    content = json.loads(path.read_text(encoding="utf-8"))
    kept = {key: value for key, value in content.items() if key not in drop} | keys
    path.write_text(json.dumps(kept, indent=1), encoding="utf-8")


def weights(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a directory with one safetensors file."""
    return load_file(path / SINGLE)


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, Any]]) -> None:
    """Save other tensors in place of those of a directory."""
    changed = {name: value.contiguous() for name, value in change(weights(path)).items()}
    save_file(changed, path / SINGLE, {"format": "pt"})


def sharded(path: Path) -> None:
    """Three safetensors files with an index."""
    found = weights(path)
    (path / SINGLE).unlink()
    _shards(path, found, "model", "safetensors", lambda part, file: save_file(part, file))


def one_shard(path: Path) -> None:
    """One safetensors file whose name only the index tells."""
    name = "model-00001-of-00001.safetensors"
    (path / SINGLE).rename(path / name)
    weight_map = dict.fromkeys(load_file(path / name), name)
    _write(path / f"{SINGLE}.index.json", {"metadata": {}, "weight_map": weight_map})


def pickled(path: Path) -> None:
    """pytorch_model.bin."""
    torch.save(weights(path), path / "pytorch_model.bin")
    (path / SINGLE).unlink()


def sharded_pickles(path: Path) -> None:
    """Three pickles with an index."""
    found = weights(path)
    (path / SINGLE).unlink()
    _shards(path, found, "pytorch_model", "bin", lambda part, file: torch.save(part, file))


def before_zip(path: Path) -> None:
    """pytorch_model.bin as torch wrote it before 1.6, without a zip archive."""
    torch.save(weights(path), path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    (path / SINGLE).unlink()


def cast(dtype: torch.dtype) -> Save:
    """All weights in another dtype, with the config saying so."""

    def save(path: Path) -> None:
        rewrite(path, lambda found: {name: value.to(dtype) for name, value in found.items()})
        edit(path / "config.json", dtype=str(dtype).removeprefix("torch."))

    return save


def mixed(path: Path) -> None:
    """Norms in float32, all else in bfloat16, and no dtype in the config."""
    rewrite(
        path,
        lambda found: {
            name: value if value.dim() == 1 else value.to(torch.bfloat16)
            for name, value in found.items()
        },
    )
    edit(path / "config.json", drop=("dtype", "torch_dtype"))


def older_config(path: Path) -> None:
    """config.json as transformers 4.30 wrote it."""
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    rope = config.pop("rope_parameters", {})
    config.pop("architectures", None)
    config.pop("head_dim", None)
    config["torch_dtype"] = config.pop("dtype", "float32")
    config["rope_theta"] = rope.get("rope_theta", 10000.0)
    config["rope_scaling"] = {"type": "linear", "factor": 2.0}
    config["transformers_version"] = "4.30.0"
    _write(path / "config.json", config)


def with_buffers(path: Path) -> None:
    """The buffers that transformers 4.30 and older saved beside the weights."""
    rewrite(
        path,
        lambda found: (
            found
            | {
                f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(6)
                for layer in range(2)
            }
        ),
    )


def renamed(change: Callable[[str], str]) -> Save:
    """Weights under other names."""
    return lambda path: rewrite(
        path, lambda found: {change(name): value for name, value in found.items()}
    )


def make_clip(path: Path, tower: Path) -> Path:
    """A whole CLIPModel directory with the image processor of `tower`."""
    from transformers import CLIPConfig, CLIPModel

    from tests.helpers.hf_fixtures import PATCH, SIDE, randomize

    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
    }
    model = CLIPModel(
        CLIPConfig(
            vision_config={**sizes, "image_size": SIDE, "patch_size": PATCH},
            text_config={**sizes, "vocab_size": 50, "bos_token_id": 0, "eos_token_id": 1},
            projection_dim=16,
        )
    )
    randomize(model, 5)
    model.save_pretrained(path)
    shutil.copy(tower / "preprocessor_config.json", path)
    return path


def section_of_4_25(path: Path) -> None:
    """The tower's section of a whole clip as transformers 4.25 and older wrote it."""
    section = json.loads((path / "config.json").read_text())["vision_config"]
    edit(path / "config.json", ("vision_config",), vision_config_dict=section)


def fewer_vision_layers(path: Path) -> None:
    """A whole clip whose config.json describes a smaller tower than the files hold."""
    section = json.loads((path / "config.json").read_text())["vision_config"]
    edit(path / "config.json", vision_config=section | {"num_hidden_layers": 2})


def vocab_and_merges(kind: str) -> Save:
    """vocab.json and merges.txt in place of tokenizer.json, for the class `kind`."""

    def save(path: Path) -> None:
        whole = json.loads((path / "tokenizer.json").read_text(encoding="utf-8"))
        merges = [" ".join(pair) for pair in whole["model"]["merges"]]
        _write(path / "vocab.json", whole["model"]["vocab"])
        text = "\n".join(["#version: 0.2", *merges, ""])
        (path / "merges.txt").write_text(text, encoding="utf-8")
        (path / "tokenizer.json").unlink()
        added = {str(token.pop("id")): token for token in whole["added_tokens"]}
        edit(path / "tokenizer_config.json", tokenizer_class=kind, added_tokens_decoder=added)

    return save


def template_in_config(path: Path, change: Callable[[str], Any]) -> None:
    """The chat template within tokenizer_config.json."""
    text = (path / "chat_template.jinja").read_text(encoding="utf-8")
    (path / "chat_template.jinja").unlink()
    edit(path / "tokenizer_config.json", chat_template=change(text))


def truncated(path: Path, longest: int) -> None:
    """A tokenizer.json that was saved with a truncation."""
    settings = {"direction": "Right", "strategy": "LongestFirst", "stride": 0}
    edit(path / "tokenizer.json", truncation={**settings, "max_length": longest})


def sentencepiece_only(path: Path, kind: str, described: bool) -> None:
    """tokenizer.model in place of tokenizer.json, with or without tokenizer_config.json."""
    import sentencepiece

    texts = (f"What digit is this? It is {n} これは数字です {n * 7}" for n in range(300))
    with (path / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=texts,
            model_writer=file,
            vocab_size=360,
            model_type=kind,
            byte_fallback=True,
            character_coverage=1.0,
            hard_vocab_limit=False,
            minloglevel=2,
        )
    (path / "tokenizer.json").unlink()
    (path / "tokenizer_config.json").unlink()
    if described:
        special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        _write(path / "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer", **special})


def _shards(
    path: Path,
    found: dict[str, torch.Tensor],
    stem: str,
    suffix: str,
    save: Callable[[dict[str, torch.Tensor], Path], None],
) -> None:
    names, weight_map = sorted(found), {}
    for number in range(3):
        file = f"{stem}-{number + 1:05d}-of-00003.{suffix}"
        part = {name: found[name] for name in names[number::3]}
        save(part, path / file)
        weight_map |= dict.fromkeys(part, file)
    _write(
        path / f"{stem}.{suffix}.index.json",
        {"metadata": {"total_size": 1}, "weight_map": weight_map},
    )


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")
