"""A tokenizer and a tiny Llama trained on text about digits, without images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from llava_steps.data.samples.encoded import IGNORED
from llava_steps.demo import questions as ask
from llava_steps.demo.schedule import adamw, descend, seeded

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
SYSTEM, USER, ASSISTANT = "<|system|>", "<|user|>", "<|assistant|>"
BATCH = 32
LEARNING_RATE = 2e-3
CORPUS_SIZE = 4096
CHAT_TEMPLATE = """\
{%- macro written(content) %}
    {%- if content is string %}
        {{- content }}
    {%- else %}
        {%- for part in content %}
            {{- '<image>\n' if part['type'] == 'image' else part['text'] }}
        {%- endfor %}
    {%- endif %}
{%- endmacro %}
{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] == 'assistant' %}
        {{- '<|assistant|>' + written(message['content']) + eos_token }}
    {%- elif message['role'] in ['system', 'user'] %}
        {{- '<|' + message['role'] + '|>' + written(message['content']) }}
    {%- else %}
        {{- raise_exception('unknown role: ' + message['role']) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>' }}
{%- endif %}
"""
# Text in place of the image of a conversation about a scan.
PICTURES = {
    "en": ("a handwritten {0}", "a scan of the digit {0}", "the number {0}"),
    "ja": ("手書きの{0}", "数字の{0}の画像", "数の{0}"),
}
REPEATS = 16
TEXT_SHARE, PAIR_SHARE = 0.1, 0.4
"""Comparing takes the model far more examples than reading; with few it answers at chance."""


def corpus(size: int, seed: int) -> list[list[dict[str, str]]]:
    """`size` conversations (role/content) about digits that the text itself names."""
    rng = np.random.default_rng([seed, 3])
    return [_conversation(rng) for _ in range(size)]


def _conversation(rng: np.random.Generator) -> list[dict[str, str]]:
    lang = ask.LANGS[int(rng.integers(len(ask.LANGS)))]
    digit = int(rng.integers(10))
    style = rng.random()
    if style < TEXT_SHARE:
        turns = ask.text_turns(lang, digit, int(rng.integers(2)))
    elif style < TEXT_SHARE + PAIR_SHARE:
        other = (digit + int(rng.integers(1, 10))) % 10
        turns = ask.turns([ask.TWO_SCANS], lang, [digit, other], rng)
        turns = _in_words(turns, lang, [digit, other], rng)
    else:
        kinds = rng.permutation(ask.ABOUT_ONE_SCAN)[: int(rng.integers(1, 4))].tolist()
        turns = _in_words(ask.turns(kinds, lang, [digit], rng), lang, [digit], rng)
    roles = {"human": "user", "gpt": "assistant"}
    return [{"role": roles[turn["from"]], "content": turn["value"]} for turn in turns]


def _in_words(
    turns: list[dict[str, str]], lang: str, digits: list[int], rng: np.random.Generator
) -> list[dict[str, str]]:
    """Replace each <image> of the first question by words, or by the digit several times."""
    question = turns[0]["value"]
    for digit in digits:
        if rng.random() < 0.5:
            picture = str(digit) * int(rng.integers(1, REPEATS + 1))
        else:
            picture = PICTURES[lang][int(rng.integers(len(PICTURES[lang])))].format(digit)
        question = question.replace(ask.IMAGE, picture, 1)
    return [turns[0] | {"value": question}, *turns[1:]]


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with one token per digit; the chat markers and <s> </s> <pad> are special."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, PAD, SYSTEM, USER, ASSISTANT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    # Like Llama's tokenizer: plain text gets a <s> before it, rendered chats contain theirs.
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, bpe.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def build_llama(
    tokenizer: PreTrainedTokenizerFast, hidden: int, layers: int, heads: int, kv_heads: int
) -> LlamaForCausalLM:
    """A randomly initialised Llama (float32) with grouped-query attention and an untied head."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


def pretrain_llama(
    model: LlamaForCausalLM,
    tokenizer: Any,
    talks: list[list[dict[str, str]]],
    steps: int,
    seed: int,
    advance: Callable[[float], None],
) -> None:
    """Train in place to answer: the loss is that of the answers' tokens, as in both stages."""
    rendered = [tokenizer.apply_chat_template(talk, tokenize=False) for talk in talks]
    rows = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    assistant, end = tokenizer.convert_tokens_to_ids([ASSISTANT, EOS])
    with seeded(seed):
        optimizer, schedule = adamw(model.parameters(), LEARNING_RATE, steps)
        model.train()
        for batch in _batches(rows, tokenizer.pad_token_id, steps):
            ids, real = batch
            logits = model(input_ids=ids, attention_mask=real.long()).logits[:, :-1]
            wanted = ids.masked_fill(~_answers(ids, assistant, end), IGNORED)[:, 1:]
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten())
            descend(loss, optimizer, schedule)
            advance(loss.item())
        model.eval()


def _answers(ids: Tensor, assistant: int, end: int) -> Tensor:
    """Where `ids` int64 (n, t) hold an answer or its end token, bool of the same shape."""
    marker, closed = ids == assistant, ids == end
    unfinished = marker.cumsum(1) > closed.cumsum(1)
    return (unfinished & ~marker) | closed


def _batches(rows: list[list[int]], pad: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(ids int64 (BATCH, longest), real bool of the same shape), right padded, `steps` times.

    A batch is a random window of the rows in order of length, so that little of it is padding.
    """
    ordered = sorted(rows, key=len)
    for _ in range(steps):
        start = int(torch.randint(len(ordered) - BATCH + 1, ()))
        chosen = [torch.tensor(row) for row in ordered[start : start + BATCH]]
        ids = nn.utils.rnn.pad_sequence(chosen, batch_first=True, padding_value=pad)
        lengths = torch.tensor([len(row) for row in chosen])
        yield ids, torch.arange(ids.shape[1]) < lengths[:, None]
