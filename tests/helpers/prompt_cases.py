"""Small tokenizers of many kinds with templates of many models, and conversations to ask them."""

from __future__ import annotations

import datetime
import io
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image

from llava_steps.commands import chat
from llava_steps.data.samples import saved_prompts
from llava_steps.data.samples.conversation import ConversationEncoder
from llava_steps.data.samples.images import ImageReader
from llava_steps.data.samples.processor import load_processor
from llava_steps.data.samples.prompt import Prompts
from llava_steps.data.samples.sample import Turn
from llava_steps.data.samples.template import message_parts
from llava_steps.demo.text import CHAT_TEMPLATE
from llava_steps.evaluation import ask
from tests.helpers import chat_templates as templates

WORDS = [
    "What",
    "digit",
    "is",
    "this?",
    "It",
    "a",
    "seven,",
    "the",
    "left",
    "one;",
    "3.14",
    "+",
    "2",
    "=",
    "5!",
    "naïve",
    "café",
    "これは何ですか。七です",
    "한국어",
    "\n",
    "\n\n",
    "\t",
    "x_y",
    "def",
    "f():",
    "return",
    "<b>bold</b>",
    "user",
    "assistant",
    "final",
    "...",
    "",
    "two",
]
DATE = datetime.date(2024, 7, 26)
SIDE, PATCH = 32, 8


@dataclass(frozen=True)
class Case:
    """A tokenizer with a template."""

    name: str
    template: str | dict[str, str]
    kind: str
    special: tuple[str, ...]
    """Control tokens besides bos, eos, <pad> and <image>."""
    bos: str | None = None
    eos: str = "</s>"
    ends: tuple[str, ...] = ()
    """Tokens that end a generation; the eos token if there are none."""
    adds: tuple[bool, bool] = (False, False)
    """Whether the tokenizer puts bos before and eos after every text by itself."""
    system: bool = True
    """Whether the template takes a system turn."""
    header: bool = True
    """Whether an answer begins as its prompt ends; otherwise only the last one is supervised, and
    the ids of transformers for the whole conversation are not those of training."""
    plain: tuple[str, ...] = ()
    """Added tokens that are not special."""


IM = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
CASES = (
    Case("qwen3", templates.QWEN3, "split", IM, None, "<|im_end|>", IM[1:],
         plain=("<think>", "</think>")),
    Case("qwen2", templates.QWEN2, "split", IM, None, "<|im_end|>"),
    Case("llama3", templates.LLAMA3, "split",
         ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
         "<|begin_of_text|>", "<|eot_id|>", adds=(True, False)),
    Case("gemma", templates.GEMMA, "metaspace", ("<start_of_turn>", "<end_of_turn>"), "<bos>",
         "<eos>", ("<eos>", "<end_of_turn>"), (True, False), system=False),
    Case("chatml on a base model", templates.CHATML, "bytes", IM[:2], "<s>", "</s>",
         ("</s>", "<|im_end|>"), (True, False)),
    Case("harmony", templates.HARMONY, "split",
         ("<|start|>", "<|message|>", "<|channel|>", "<|end|>"), None, "<|return|>"),
    Case("named templates", {"default": templates.CHATML, "tool_use": "{{ tools }}"}, "bytes",
         IM[:2], None, "<|im_end|>"),
    Case("llava 1.5 with end tokens", templates.LLAVA15.replace("END", "eos_token"), "legacy", (),
         "<s>", adds=(True, False)),
    Case("llava next mistral", templates.LLAVA_NEXT_MISTRAL, "legacy", (), "<s>",
         adds=(True, False)),
    Case("llava interleave", templates.LLAVA_INTERLEAVE, "split", IM, None, "<|im_end|>",
         header=False),
    Case("mistral", templates.MISTRAL, "metaspace", ("[INST]", "[/INST]"), "<s>",
         adds=(True, False), system=False),
    Case("pixtral", templates.PIXTRAL, "split", ("[INST]", "[/INST]"), "<s>", system=False),
    Case("llama 2", templates.LLAMA2, "legacy", (), "<s>", adds=(True, False)),
    Case("vicuna", templates.VICUNA, "legacy", (), "<s>", adds=(True, False)),
    Case("zephyr, prefix space", templates.ZEPHYR, "prefix", (), "<s>", adds=(True, False)),
    Case("phi 3", templates.PHI3, "legacy",
         ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"), "<s>", "<|endoftext|>",
         ("<|endoftext|>", "<|end|>"), (True, False)),
    Case("deepseek", templates.DEEPSEEK, "split", ("<｜User｜>", "<｜Assistant｜>"),
         "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", adds=(True, False)),
    Case("bos and eos", templates.PLAIN, "bytes", (), "<s>", adds=(True, True)),
    Case("only eos", templates.PLAIN, "unigram", (), None, adds=(False, True)),
    Case("bos in both, and eos", "{{ bos_token }}" + templates.CHATML, "metaspace", IM[:2], "<s>",
         "<|im_end|>", adds=(True, True)),
    Case("demo", CHAT_TEMPLATE, "bytes", ("<|user|>", "<|assistant|>"), "<s>", adds=(True, False)),
)  # fmt: skip


@cache
def _trained(kind: str) -> str:
    """A tokenizer of a kind, without special tokens, as JSON."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    texts = [" ".join(random.Random(n).choices(WORDS, k=12)) for n in range(200)]
    texts += [str(template) for template in vars(templates).values() if isinstance(template, str)]
    texts += ["assistant\n\n"] * 50
    if kind == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
        trainer: Any = trainers.UnigramTrainer(
            vocab_size=600, special_tokens=["<unk>"], unk_token="<unk>",  # noqa: S106
            show_progress=False,
            initial_alphabet=sorted(set("".join(WORDS) + "0123456789.?")),
        )  # fmt: skip
        tokenizer.train_from_iterator(texts, trainer)
        return str(tokenizer.to_str())
    tokenizer = Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel
    if kind in ("bytes", "prefix"):
        tokenizer.pre_tokenizer = level(add_prefix_space=kind == "prefix")
    elif kind == "split":
        pattern = (
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
            r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        )
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            level(add_prefix_space=False, use_regex=False),
        ])  # fmt: skip
    if kind in ("bytes", "prefix", "split"):
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=500, initial_alphabet=level.alphabet(), show_progress=False
        )
        tokenizer.train_from_iterator(texts, trainer)
        return str(tokenizer.to_str())
    replace = normalizers.Replace(" ", "▁")
    if kind == "legacy":  # that of Llama 2: a space before every stretch of text
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.train_from_iterator(
        [text.replace("\n", " ") for text in texts],
        trainers.BpeTrainer(vocab_size=400, show_progress=False),
    )
    described = json.loads(tokenizer.to_str())
    names = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *described["model"]["vocab"]]
    described["model"] |= {
        "vocab": {name: number for number, name in enumerate(dict.fromkeys(names))},
        "byte_fallback": True, "fuse_unk": True, "unk_token": "<unk>",
    }  # fmt: skip
    tokenizer = Tokenizer.from_str(json.dumps(described))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return str(tokenizer.to_str())


def make(case: Case, directory: Path, rewrite: bool = True) -> Path:
    """The HF directory of a case; without `rewrite` as a stranger would have saved it."""
    from tokenizers import AddedToken, Tokenizer, processors
    from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

    tokenizer = Tokenizer.from_str(_trained(case.kind))
    names = {case.eos, *case.special, *([case.bos] if case.bos else [])}
    added = [AddedToken(name, special=True, normalized=False) for name in sorted(names)]
    tokenizer.add_special_tokens(added)
    tokenizer.add_tokens([AddedToken(name, normalized=False) for name in case.plain])
    before = f"{case.bos} " if case.adds[0] else ""
    after = f" {case.eos}" if case.adds[1] else ""
    around = [name for name in {case.bos, case.eos} if name]
    adding = processors.TemplateProcessing(
        single=f"{before}$A{after}",
        pair=f"{before}$A $B:1{after}",
        special_tokens=[(name, tokenizer.token_to_id(name)) for name in around],
    )
    parts = [processors.ByteLevel(trim_offsets=True)] if case.kind == "bytes" else []
    tokenizer.post_processor = processors.Sequence([*parts, adding])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=case.bos, eos_token=case.eos, pad_token="<pad>",  # noqa: S106
        extra_special_tokens={"image_token": "<image>"}, clean_up_tokenization_spaces=False,
    )  # fmt: skip
    sizes = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    LlavaProcessor(
        image_processor=CLIPImageProcessorPil(**sizes),
        tokenizer=fast,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        chat_template=case.template,
        num_additional_image_tokens=1,
    ).save_pretrained(directory)
    ends = [fast.convert_tokens_to_ids(name) for name in case.ends or (case.eos,)]
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    (directory / "config.json").write_text('{"model_type": "llava"}')
    if rewrite:
        saved_prompts.rewrite(directory, DATE)
    return directory


def picture() -> bytes:
    """A small PNG."""
    out = io.BytesIO()
    Image.new("RGB", (40, 30), (200, 10, 10)).save(out, "PNG")
    return out.getvalue()


def conversation(number: int, system: bool) -> tuple[Turn, ...]:
    """Conversation `number`: one to four rounds, none to two images, perhaps a system turn."""
    rng = random.Random(number)

    def text() -> str:
        return "word" + " ".join(rng.choices(WORDS, k=rng.randint(1, 9))) + rng.choice((".", "?7"))

    turns = [Turn("system", text())] if system and rng.random() < 0.3 else []
    for turn in range(rng.randint(1, 4)):
        images = rng.choice((0, 0, 1, 2)) if turn else rng.choice((0, 1, 1, 2))
        turns += [Turn("user", "<image>\n" * images + text()), Turn("assistant", text())]
    return tuple(turns)


class Asked:
    """The ways in which a directory is asked."""

    def __init__(self, directory: Path) -> None:
        self.encoder = ConversationEncoder(directory, 1 << 20)
        self.processor = load_processor(directory)
        self.model = object.__new__(ask.Model)
        self.model._processor = self.processor
        self.model._prompts = Prompts(self.processor)
        self.model._read = ImageReader(self.processor.image_processor)
        self.image = Image.open(io.BytesIO(picture()))

    def evaluation(self, turns: Sequence[Turn]) -> list[int]:
        """As evaluate and llm-jp-eval-mm ask."""
        rows = tuple({"role": turn.role, "content": turn.content} for turn in turns)
        images = sum(turn.content.count("<image>") for turn in turns)
        question = ask.Question("1", "q", rows, (picture(),) * images, "")
        return list(self.model.inputs([question])["input_ids"][0].tolist())

    def chat(self, turn: Turn, file: Path) -> list[int]:
        """As chat asks about a question with its images before it."""
        images = turn.content.count("<image>")
        question = chat.as_question([file] * images, turn.content.replace("<image>\n", ""))
        return list(self.model.inputs([question])["input_ids"][0].tolist())

    def transformers(self, turns: Sequence[Turn], prompt: bool) -> Iterator[list[int]]:
        """What transformers makes of contents as parts, and of contents as text."""
        messages: list[dict[str, Any]] = []
        for turn in turns:
            parts: list[dict[str, Any]] = list(message_parts(turn.content))
            parts = [p | {"image": self.image} if p["type"] == "image" else p for p in parts]
            messages.append({"role": turn.role, "content": parts})
        out = self.processor.apply_chat_template(
            messages, tokenize=True, return_dict=True, add_generation_prompt=prompt
        )
        yield list(out["input_ids"][0])
        plain = [{"role": turn.role, "content": turn.content} for turn in turns]
        images = [self.image] * sum(turn.content.count("<image>") for turn in turns)
        text = self.processor.apply_chat_template(plain, add_generation_prompt=prompt)
        bos = self.processor.tokenizer.bos_token
        special = not (bos and text.startswith(bos))
        out = self.processor(text=text, images=images or None, add_special_tokens=special)
        yield list(out["input_ids"][0])


def differences(case: Case, asked: Asked, turns: tuple[Turn, ...], file: Path) -> list[str]:
    """Where the ids of training, evaluation, chat and transformers differ."""
    found = []
    encoded = asked.encoder.encode(turns)
    ids, labels = encoded.tokens.tolist(), encoded.shifted_labels.tolist()
    if case.header and any(other != ids for other in asked.transformers(turns, prompt=False)):
        found.append("the conversation of transformers")
    begins = [n for n, label in enumerate(labels) if label >= 0 and (n == 0 or labels[n - 1] < 0)]
    answers = [n for n, turn in enumerate(turns) if turn.role == "assistant"]
    learned = answers if case.header else answers[-1:]
    if len(begins) != len(learned):
        found.append(f"{len(begins)} of {len(learned)} answers are supervised")
    for begin, answer in zip(begins[::-1], learned[::-1], strict=False):
        prompt = asked.evaluation(turns[:answer])
        if ids[: begin + 1] != prompt:
            found.append(f"the prompt of training for turn {answer}")
        if any(other != prompt for other in asked.transformers(turns[:answer], prompt=True)):
            found.append(f"the prompt of transformers for turn {answer}")
        said = asked.encoder.decode([label for label in labels[begin:] if label >= 0][:4000])
        if turns[answer].content.strip() not in said:
            found.append(f"the answer of turn {answer}: {said!r}")
        if answer == 1 and asked.chat(turns[0], file) != prompt:
            found.append("the prompt of chat")
    return found
