"""Chat: several images, text alone, answers that grow, and the page."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llava_steps.commands import chat
from llava_steps.conversion.build import build
from llava_steps.core.errors import ConfigError
from llava_steps.evaluation import ask
from llava_steps.settings.conversion import HfModel
from tests.helpers.data_fixtures import jpeg
from tests.helpers.hf_fixtures import make_text, make_tokenizer, make_tower


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("chat")
    text = make_text(root / "text", make_tokenizer(None))
    build(make_tower(root / "tower"), text, root / "model", HfModel(vision_tower="", text_model=""))
    return root / "model"


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    for number in range(3):
        (tmp_path / f"{number}.jpg").write_bytes(jpeg(number, (40, 30)))
    return sorted(tmp_path.glob("*.jpg"))


@pytest.mark.parametrize("count", [0, 1, 3])
def test_answers_with_any_number_of_images(
    directory: Path, images: list[Path], count: int, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = chat.as_question(images[:count], "数字は？")
    assert asked.turns[0]["content"] == "<image>\n" * count + "数字は？"
    (expected,) = ask.Model(directory).answers([asked], 1, 12)
    line = [str(directory), *map(str, images[:count]), "数字は？", "--max-new-tokens=12"]
    capsys.readouterr()
    assert chat.main(line) == 0
    assert capsys.readouterr().out == expected.strip() + "\n"


def test_an_answer_grows_piece_by_piece(directory: Path, images: list[Path]) -> None:
    model, asked = ask.Model(directory), chat.as_question(images[:1], "What digit is this?")
    pieces: list[str] = []
    model.stream(asked, 12, pieces.append)
    assert len(pieces) > 1 and [("".join(pieces))] == model.answers([asked], 1, 12)


def test_a_character_of_several_tokens_comes_whole() -> None:
    """A tokenizer of bytes: after each token of a character but the last there is none yet."""

    class Bytes:
        def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
            return bytes(ids).decode("utf-8", errors="replace")

    pieces: list[str] = []
    stream = ask.Stream(Bytes(), pieces.append)
    stream.put(torch.tensor([[1, 2, 3]]))
    for byte in "7 は七".encode():
        stream.put(torch.tensor([byte]))
    assert pieces == ["7", " ", "は", "七"]
    stream.put(torch.tensor(["は".encode()[0]]))
    stream.end()
    assert "".join(pieces) == "7 は七\ufffd"


def test_white_space_at_the_ends_is_left_out() -> None:
    def pieces(*texts: str) -> list[str]:
        return list(chat._stripped(iter(texts)))

    assert pieces(" ", "\n a", " b ", " ", "c", " \n") == ["a", " b", "  c"]
    assert pieces(" ", "\n") == [] and pieces() == []


def test_the_page_answers_and_stays_on_this_machine(
    directory: Path, images: list[Path], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    opened: dict[str, Any] = {}

    class Interface:
        def __init__(self, reply: Any, **options: Any) -> None:
            opened.update(options, reply=reply)

        def launch(self, **options: Any) -> None:
            opened.update(options)

    monkeypatch.setitem(sys.modules, "gradio", SimpleNamespace(ChatInterface=Interface))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for wrong, said in ((port, "in use"), (99999, "give one from 1")):
            assert chat.main([str(directory), "--page", f"--port={wrong}"]) == ConfigError.exit_code
            assert f"--port {wrong}: " in (told := capsys.readouterr().err) and said in told
    assert chat.main([str(directory), "--page", f"--port={port}", "--max-new-tokens=12"]) == 0
    assert f"http://127.0.0.1:{port} answers" in capsys.readouterr().out
    assert opened["server_name"] == "127.0.0.1" and opened["share"] is False
    assert opened["server_port"] == port and opened["multimodal"] is True
    answers: Iterator[str] = opened["reply"]({"text": "What?", "files": [str(images[0])]}, [])
    grown = list(answers)
    expected = "".join(chat.answer(directory, images[:1], "What?", 12))
    assert grown[-1] == expected and all(b.startswith(a) for a, b in pairwise(grown))
    assert "stands for an image" in next(opened["reply"]({"text": "<image>", "files": []}, []))


def test_without_gradio_the_page_says_what_to_install(
    directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert chat.main([str(directory), "--page"]) == ConfigError.exit_code
    assert "pip install gradio" in capsys.readouterr().err
    assert chat.main([str(directory), "What?", "--page"]) == ConfigError.exit_code
    for words in ([], [""], [" "]):
        with pytest.raises(SystemExit):
            chat.main([str(directory), *words])
