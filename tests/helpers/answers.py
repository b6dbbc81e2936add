"""What a transformers of any version makes of LLaVA directories; run as a program of its own.

    python tests/helpers/answers.py OUT.npz DIRECTORY...

Uses what the directory holds and nothing of this project: processor, tokenizer, chat template and
generation config. For each directory the arrays `{n}.ids` int64 [batch, tokens], `{n}.pixels`
float32 [images, 3, H, W], `{n}.logits` float32 [batch, tokens, vocab] and `{n}.answer` int64
[batch, new tokens], greedy; `{n}.text` int64 [tokens], a question without an image answered.
"""

import sys

import numpy as np
import torch
import transformers
from PIL import Image
from transformers import AutoProcessor, GenerationConfig, LlavaForConditionalGeneration

FIVE = int(transformers.__version__.split(".")[0]) >= 5
QUESTIONS = ("Which digit is written here?", "この数字は何ですか？")


def picture(number: int) -> Image.Image:
    random = np.random.default_rng(number)
    small = Image.fromarray(random.integers(0, 256, (7, 6, 3), dtype=np.uint8))
    return small.resize((37 + 8 * number, 52), Image.Resampling.BICUBIC)


@torch.no_grad()
def answers(directory: str) -> dict[str, np.ndarray]:
    processor = AutoProcessor.from_pretrained(
        directory, **({"backend": "pil"} if FIVE else {"use_fast": False})
    )
    processor.tokenizer.padding_side = "left"
    model, report = LlavaForConditionalGeneration.from_pretrained(
        directory, output_loading_info=True
    )
    wrong = {k: v for k, v in report.items() if v and k != "error_msgs"}
    assert not wrong, f"{directory}: {wrong}"
    model.eval()
    config = GenerationConfig.from_pretrained(directory)
    assert config.eos_token_id is not None
    prompts = []
    for question in QUESTIONS:
        parts = [{"type": "image"}, {"type": "text", "text": question}]
        prompts.append(
            processor.apply_chat_template(
                [{"role": "user", "content": parts}], add_generation_prompt=True
            )
        )
    options = {"padding": True, "return_tensors": "pt", "add_special_tokens": False}
    images = [picture(number) for number in range(len(QUESTIONS))]
    inputs = processor(text=prompts, images=images, **options)
    found = {
        "ids": inputs["input_ids"],
        "pixels": inputs["pixel_values"],
        # What stands on padding is nobody's, and differs between versions.
        "logits": model(**inputs).logits * inputs["attention_mask"][..., None],
        "answer": model.generate(**inputs, max_new_tokens=8, do_sample=False),
    }
    plain = [{"role": "user", "content": [{"type": "text", "text": QUESTIONS[0]}]}]
    prompt = processor.apply_chat_template(plain, add_generation_prompt=True)
    inputs = processor.tokenizer([prompt], return_tensors="pt", add_special_tokens=False)
    found["text"] = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0]
    return {key: value.numpy() for key, value in found.items()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    arrays = {}
    for place, path in enumerate(sys.argv[2:]):
        arrays |= {f"{place}.{key}": value for key, value in answers(path).items()}
    np.savez(sys.argv[1], version=np.array(transformers.__version__), **arrays)
