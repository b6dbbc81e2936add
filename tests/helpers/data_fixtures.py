"""A tiny HF directory and tiny datasets for the tests of data/, made without our own code."""

from __future__ import annotations

import io
import json
import logging
import random
import tarfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

if TYPE_CHECKING:
    from llava_steps.data.loader.loader import TrainLoader

TEMPLATE = """{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>
{% for c in m.content %}{% if c.type == 'image' %}<image>
{% else %}{{ c.text }}{% endif %}{% endfor -%}
{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}
{% endfor %}{% if add_generation_prompt %}<|assistant|>
{% endif %}"""

TEXT = [
    "What digit is this? It is a seven.",
    "この数字は何ですか。これは七です。",
    "Is it odd or even? It is odd. 0 1 2 3 4 5 6 7 8 9",
    "Which of the two is larger? The first one.",
]
SPECIAL = ["<s>", "</s>", "<pad>", "<image>", "<|user|>", "<|assistant|>"]


def make_hf_dir(path: Path, template: str = TEMPLATE, size: int = 32, patch: int = 8) -> Path:
    """A LlavaProcessor directory: byte-level BPE, chat template, CLIP image processor."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",  # noqa: S106
        eos_token="</s>",  # noqa: S106
        pad_token="<pad>",  # noqa: S106
        extra_special_tokens={"image_token": "<image>"},
    )
    images = CLIPImageProcessorPil(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}
    )
    processor = LlavaProcessor(
        image_processor=images,
        tokenizer=fast,
        patch_size=patch,
        vision_feature_select_strategy="default",
        chat_template=template,
        num_additional_image_tokens=1,
    )
    processor.save_pretrained(path)
    (path / "generation_config.json").write_text(
        json.dumps({"eos_token_id": fast.eos_token_id, "pad_token_id": fast.pad_token_id})
    )
    return path


def jpeg(seed: int, size: tuple[int, int] = (40, 36), **options: Any) -> bytes:
    """A noisy picture as the bytes of a JPEG file."""
    random_ = random.Random(seed)
    small = Image.frombytes("RGB", (6, 5), random_.randbytes(90))
    out = io.BytesIO()
    small.resize(size, Image.Resampling.BICUBIC).save(out, "JPEG", quality=90, **options)
    return out.getvalue()


def sample_parts(number: int) -> dict[str, bytes]:
    """Sample `number`: one image, two images, text only, seed layout and two turns in rotation."""
    images, turns = [jpeg(number)], []
    kind = number % 5
    if kind == 1:
        images.append(jpeg(1000 + number, (33, 50)))
    if kind == 2:
        images = []
    question = f"What digit is this? {'odd or even ' * (number % 4)}{number}"
    answer = f"It is a {number % 10}."
    parts = {("jpg" if n == 0 else f"{n}.jpg"): data for n, data in enumerate(images)}
    parts["txt"] = answer.encode()
    meta: dict[str, Any] = {"question": question, "id": f"id-{number}"}
    if kind != 3:
        turns = [
            {"role": "user", "content": "<image>\n" * len(images) + question},
            {"role": "assistant", "content": answer},
        ]
        if kind == 4:
            turns += [
                {"role": "user", "content": "この数字は何ですか。"},
                {"role": "assistant", "content": f"これは{number}です。"},
            ]
        meta |= {"conversations": turns, "images": len(images)}
    parts["json"] = json.dumps(meta, ensure_ascii=False).encode()
    return parts


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    """A plain USTAR file written by Python's tarfile."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def members(samples: Mapping[str, Mapping[str, bytes]]) -> list[tuple[str, bytes]]:
    """Tar members of samples by key."""
    return [
        (f"{key}.{part}", data) for key, parts in samples.items() for part, data in parts.items()
    ]


def make_energon(
    root: Path, samples: int, per_tar: int, parts: Callable[[int], dict[str, bytes]] = sample_parts
) -> Path:
    """A dataset of `parts` of each number, prepared by energon itself; every tar is in `train`."""
    from megatron.energon.flavors import BaseWebdatasetFactory

    root.mkdir(parents=True)
    names = []
    for shard, start in enumerate(range(0, samples, per_tar)):
        names.append(f"{shard:06d}.tar")
        numbers = range(start, min(start + per_tar, samples))
        write_tar(root / names[-1], members({f"{n:06d}": parts(n) for n in numbers}))
    BaseWebdatasetFactory.prepare_dataset(
        root,
        names,
        split_parts_ratio=[("train", 1), ("val", 0), ("test", 0)],
        shuffle_seed=None,
        workers=1,
    )
    (root / ".nv-meta" / "dataset.yaml").write_text(
        "sample_type:\n  __module__: megatron.energon\n  __class__: VQASample\n"
        "field_map:\n  image: jpg\n  context: json[question]\n  answers: txt\n"
    )
    return root


def train_loader(
    dataset: Path, hf_dir: Path, start_samples: int = 0, **options: Any
) -> TrainLoader:
    """A loader of the split train: rows of one sample, in this process; `options` override."""
    from llava_steps.data.loader.loader import TrainLoader
    from llava_steps.data.loader.spec import LoaderSpec

    given: dict[str, Any] = {
        "split": "train", "seq_length": 256, "global_batch_size": 8, "micro_batch_size": 1,
        "seed": 7, "need_pixels": True, **options,
    }  # fmt: skip
    return TrainLoader(LoaderSpec(dataset, hf_dir=hf_dir, **given), start_samples)


def fake_context(entry: Path, **inputs: Path) -> Any:
    """A `Context` without store and lease, of a step that does not resume."""
    from llava_steps.store.run import clear
    from llava_steps.store.step import Context
    from llava_steps.store.store import Input

    log = logging.getLogger("test")
    if entry.exists():
        clear(entry)
    found = {name: Input(path, "digest") for name, path in inputs.items()}
    return Context(entry, found, log, entry / ".work")
