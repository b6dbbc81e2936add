"""Ask a Hugging Face LLaVA directory a question about an image.

    llava-steps chat results/demo/hf_export image.jpg "What digit is this?"

Several images are numbered in the given order; the question may also come without an image. The
answer appears while it is generated. --page opens a page in the browser instead, on this machine
only. It needs gradio (pip install gradio).
"""

from __future__ import annotations

import argparse
import os
import re
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_steps.core.errors import ConfigError, InputError, StepError, report_error
from llava_steps.core.log import ignore_known_warnings
from llava_steps.settings import cli

if TYPE_CHECKING:
    from llava_steps.evaluation.ask import Model, Question


def main(arguments: list[str] | None = None) -> int:
    """Print the answer; returns the exit code."""
    given = parser().parse_intermixed_args(arguments)
    ignore_known_warnings()
    try:
        if given.max_new_tokens < 1:
            raise ConfigError(f"--max-new-tokens {given.max_new_tokens}: give at least 1")
        if given.page:
            if given.words:
                raise ConfigError("--page takes questions and images on the page itself")
            page(given.model, given.max_new_tokens, given.port)
        elif not given.words or not given.words[-1].strip():
            parser().error("a question is needed, or --page")
        else:
            *images, question = given.words
            if os.path.isfile(question):
                raise ConfigError(f"the last word is the question, but {question} is a file")
            for piece in answer(
                given.model, [Path(image) for image in images], question, given.max_new_tokens
            ):
                print(piece, end="", flush=True)
            print()
    except KeyboardInterrupt:
        print()
        return 130  # as a shell counts it
    except Exception as error:
        return report_error("chat", error)
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = cli.tool_parser(
        "chat",
        __doc__,
        usage="%(prog)s [options] MODEL [IMAGE ...] QUESTION\n       %(prog)s --page MODEL",
    )
    made.add_argument("model", type=Path, metavar="MODEL", help="Hugging Face LLaVA directory")
    # One list: argparse would give all words to the images and none to the question.
    made.add_argument(
        "words", nargs="*", metavar="IMAGE|QUESTION", help="image files, then the question"
    )
    made.add_argument(
        "--max-new-tokens",
        type=int,
        default=256,
        help="length of the answer (default: at most 256)",
    )
    made.add_argument("--page", action="store_true", help="serve a page to ask on, with gradio")
    made.add_argument("--port", type=int, default=7860, help="port of the page (default: 7860)")
    return made


def answer(
    model: Path, images: Sequence[Path], question: str, max_new_tokens: int
) -> Iterator[str]:
    """The model's greedy answer in pieces, without white space at its ends.

    Raises:
        InputError: a file that is missing or not an image, or a question that says `<image>`.
    """
    refuse_absent(model)
    asked = as_question(images, question)
    from llava_steps.evaluation import ask

    return _stripped(_pieces(ask.Model(model), asked, max_new_tokens))


def refuse_absent(model: Path) -> None:
    """InputError unless there is a config.json."""
    path = model / "config.json"
    if path.is_symlink() and not path.exists():
        raise InputError(f"{path} leads to {path.readlink()}, which is gone: was the store moved?")
    if not path.is_file():
        raise InputError(f"{path} is missing: MODEL is a Hugging Face LLaVA directory")


def as_question(images: Sequence[Path], question: str) -> Question:
    """A question about image files, checked.

    Raises:
        InputError: a file that is missing or not an image, or a question that says `<image>`.
    """
    for path in images:
        if not os.path.isfile(path):  # Path.is_file raises for a text too long for a name
            if re.match(r"(https?|ftp|s3|gs):/|data:", str(path)):
                raise InputError(f"{str(path)[:60]}: images are files; download it first")
            raise InputError(f"{path} is not a file; the question is the last word, in quotes")
    from llava_steps.data.samples.decode import check_image
    from llava_steps.data.samples.sample import PLACEHOLDER, SampleError, images_first
    from llava_steps.evaluation.ask import Question

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
    return Question(
        id="",
        group="",
        turns=({"role": "user", "content": images_first(question, len(images))},),
        images=tuple(path.read_bytes() for path in images),
        reference="",
    )


def _pieces(model: Model, asked: Question, max_new_tokens: int) -> Iterator[str]:
    """Pieces of the answer as they come, from a thread that generates."""
    import queue
    import threading

    pieces: queue.Queue[str | BaseException | None] = queue.Queue()

    def work() -> None:
        end: BaseException | None = None
        try:
            model.stream(asked, max_new_tokens, pieces.put)
        except BaseException as error:  # handed over, and raised where the answer is read
            end = error
        pieces.put(end)

    threading.Thread(target=work, daemon=True).start()
    while isinstance(piece := pieces.get(), str):
        yield piece
    if piece is not None:
        raise piece


def _stripped(pieces: Iterator[str]) -> Iterator[str]:
    """The pieces without white space at the beginning and the end of them all."""
    begun, held = False, ""
    for piece in pieces:
        text = held + piece if begun else (held + piece).lstrip()
        begun = begun or bool(text)
        shown = text.rstrip()
        held = text[len(shown) :]
        if shown:
            yield shown


def page(model: Path, max_new_tokens: int, port: int) -> None:
    """Serve a page on this machine until it is interrupted.

    Raises:
        ConfigError: gradio is not installed, or the port cannot be opened.
        InputError: the directory does not hold a LLaVA model.
    """
    try:
        import gradio
    except ImportError:
        raise ConfigError("--page needs gradio: pip install gradio") from None
    try:
        with socket.create_server(("127.0.0.1", port)):
            pass
    except OSError as error:
        raise ConfigError(f"--port {port}: {error.strerror}; give another") from None
    except OverflowError:
        raise ConfigError(f"--port {port}: give one from 1 to 65535") from None
    refuse_absent(model)
    from llava_steps.evaluation import ask

    reply = replier(ask.Model(model), max_new_tokens)
    chat: Any = gradio.ChatInterface(
        reply, multimodal=True, title=model.name, analytics_enabled=False
    )
    print(f"http://127.0.0.1:{port} answers until Ctrl-C", flush=True)
    chat.launch(server_name="127.0.0.1", server_port=port, share=False, quiet=True)


def replier(model: Model, max_new_tokens: int) -> Callable[[dict[str, Any], Any], Iterator[str]]:
    """What gradio calls with {"text": ..., "files": [...]}; yields the growing answer."""

    def reply(message: dict[str, Any], history: Any) -> Iterator[str]:
        text = ""
        try:
            files = [Path(str(file)) for file in message.get("files") or []]
            asked = as_question(files, str(message.get("text") or ""))
        except StepError as error:
            yield str(error)
            return
        for piece in _stripped(_pieces(model, asked, max_new_tokens)):
            text += piece
            yield text

    return reply
