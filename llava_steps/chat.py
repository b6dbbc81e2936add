"""Ask a Hugging Face LLaVA directory a question about an image.

    python -m llava_steps.chat results/demo/hf_export image.jpg "What digit is this?"

Several images are numbered as they are given; with none the question is about text alone.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from llava_steps.core.errors import InputError, StepError
from llava_steps.core.log import ignore_known_warnings


def main(arguments: list[str] | None = None) -> int:
    """Print the answer; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m llava_steps.chat",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", type=Path, help="Hugging Face LLaVA directory")
    parser.add_argument("images", type=Path, nargs="*", help="image files")
    parser.add_argument("question", help="the question")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="at most (default: 256)")
    given = parser.parse_args(arguments)
    ignore_known_warnings()
    try:
        print(answer(given.model, given.images, given.question, given.max_new_tokens))
    except StepError as error:
        print(f"chat: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def answer(model: Path, images: list[Path], question: str, max_new_tokens: int) -> str:
    """The model's greedy answer.

    Raises:
        InputError: a file that is not there or no image, or a question that says `<image>`.
    """
    for path in (model / "config.json", *images):
        if not path.is_file():
            raise InputError(f"{path} is not there")
    from llava_steps.data.decode import check_image
    from llava_steps.data.samples import PLACEHOLDER, SampleError
    from llava_steps.evaluation import ask

    if PLACEHOLDER in question:
        raise InputError(
            f"the question contains {PLACEHOLDER}, which stands for an image; leave it out, images "
            "come before the question"
        )
    for path in images:
        try:
            check_image(path.read_bytes())
        except SampleError as error:
            raise InputError(f"{path}: {error}") from error
    content = "<image>\n" * len(images) + question
    asked = ask.Question(
        id="",
        group="",
        turns=({"role": "user", "content": content},),
        images=tuple(path.read_bytes() for path in images),
        reference="",
    )
    return ask.Model(model).answers([asked], 1, max_new_tokens)[0].strip()


if __name__ == "__main__":
    sys.exit(main())
