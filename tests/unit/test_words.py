"""Texts and names use the words of the field; modules stay short enough to read."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

PHRASES = {
    r"told|tells": "is reported, reports, shows, lists",
    r"(?:goes|go|went|going) on(?: with| from)?": "continues, resumes",
    r"stands? above|goes before it": "overrides, takes precedence",
    r"(?:is|are) there already|(?:is|are) there(?=[.,;]| when| twice)"
    r"|although (?:it is|they are) there": "is up to date, exists",
    r"there is none|(?:is|are|was|were|,) not there": "is missing, not found",
    r"(?<!leave\s)(?<!leaves\s)(?<!left\s)(?<!\sit\s)(?<!falls\s)(?<!messages\s)behind": "after",
    r"(?<!let\s)(?<!-)alone": "only",
    r"nobody|no one|none of them|somebody|anybody": "name the thing that does or does not do it",
    r"(?<!there\s)(?:is|are|was|were) no (?!longer|larger|more|less|fewer)\w+": "is not a",
    r"any more": "no longer",
    r"stands? (?:at|before|behind|below|beside|in(?! for)|there|together)": "is",
    r"at hand": "available",
    r"run me": "run it",
    r"in silence|without a word": "silently",
    r"mend(?:s|ed|ing)?": "fix",
    r"whoever": "the caller, the user",
    r"as asked|by hand of": "as configured",
    r"looks at|(?:is|are|was|were|be) looked at|looking at": "reads, validates, inspects",
    r"of (?:its|their|our|your) own": "separate, its own",
}
"""Regular expression (a space is any white space) -> what to say instead."""

NAMES = frozenset(
    ("ahead", "found", "place", "places", "sums", "surroundings", "tell", "tells", "told")
)
"""Names of variables, arguments, functions and classes that do not say what they hold or do."""

KEPT_NAMES = {
    ("llava_steps/checks/finding.py", "found"),
    ("llava_steps/data/shards/plan.py", "place"),
    ("llava_steps/data/sources/base.py", "place"),
}
"""Keys of an output format."""

LONGEST = 400


def finder(phrase: str) -> re.Pattern[str]:
    return re.compile(rf"\b(?:{phrase})\b".replace(" ", r"\s+"), flags=re.IGNORECASE)


FINDERS = {finder(phrase): instead for phrase, instead in PHRASES.items()}


FILES = (
    "*.md", "CITATION.cff", "Makefile", "mkdocs.yml", "pyproject.toml", ".pre-commit-config.yaml",
    ".snakemake-workflow-catalog.yml", ".ci/*", "config/README.md", "config/*.yaml",
    "config/recipes/*.yaml", "docs/**/*.md", "docs/*.py", "environments/Dockerfile",
    "environments/install", "environments/*.def", "environments/*.lock", "llava_steps/**/*.css",
    "llava_steps/**/*.j2", "llava_steps/**/*.py", "workflow/Snakefile", "workflow/**/*.rst",
    "workflow/**/*.smk", "workflow/**/*.yaml",
)  # fmt: skip
"""Glob patterns of the files with words for people, relative to the repository."""


def text_files() -> list[str]:
    """Every file with words for people, relative to the repository."""
    paths = {path for pattern in FILES for path in ROOT.glob(pattern)}
    return sorted(str(path.relative_to(ROOT)) for path in paths)


def python_texts(source: str) -> Iterator[tuple[int, str]]:
    """(first line, text) of string literals, f-strings with gaps, and comments."""
    tree = ast.parse(source)
    inside = {id(part) for n in ast.walk(tree) if isinstance(n, ast.JoinedStr) for part in n.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = [p.value if isinstance(p, ast.Constant) else "…" for p in node.values]
            yield node.lineno, "".join(map(str, parts))
        elif isinstance(node, ast.Constant) and id(node) not in inside:
            yield node.lineno, node.value if isinstance(node.value, str) else ""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def prose(source: str) -> str:
    """Text of any other file, without code in back quotes and without tags."""
    blank = re.compile(r"```.*?```|`[^`\n]*`|\{%.*?%\}|\{\{.*?\}\}|<[^>\n]*>", flags=re.DOTALL)
    return blank.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), source)


def texts(file: str) -> Iterator[tuple[int, str]]:
    source = (ROOT / file).read_text(encoding="utf-8")
    yield from python_texts(source) if file.endswith(".py") else [(1, prose(source))]


def bound_names(source: str) -> Iterator[tuple[int, str]]:
    """(line, name) of every variable, argument, function and class that the source defines."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.lineno, node.name


def listed_phrases(files: list[str]) -> list[str]:
    return [
        f"{file}:{line + text[: match.start()].count(chr(10))}: {match[0]!r}; say: {instead}"
        for file in files
        for line, text in texts(file)
        for pattern, instead in FINDERS.items()
        for match in pattern.finditer(text)
    ]


def listed_names(files: list[str]) -> list[str]:
    return [
        f"{file}:{line}: {name}"
        for file in files
        if file.endswith(".py")
        for line, name in bound_names((ROOT / file).read_text(encoding="utf-8"))
        if name.strip("_") in NAMES and (file, name) not in KEPT_NAMES
    ]


@pytest.mark.parametrize("pattern", FILES)
def test_every_pattern_names_files(pattern: str) -> None:
    assert [*ROOT.glob(pattern)]


def test_texts_use_the_words_of_the_field() -> None:
    assert listed_phrases(text_files()) == []


def test_names_say_what_they_hold() -> None:
    assert listed_names(text_files()) == []


def test_files_of_code_are_short_enough_to_read() -> None:
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for pattern in ("llava_steps/**/*.py", "workflow/**/*.smk")
        for path in ROOT.glob(pattern)
    }
    too_long = {file: n for file, n in lengths.items() if n > LONGEST}
    assert too_long == {}, "split these files"


@pytest.mark.parametrize(
    ("text", "listed"),
    [
        ("The user is told so.", True),
        ("It is no\nfile.", True),
        ("it goes on from there", True),
        ("padding is a sample of its own", True),
        ("by the name alone", True),
        ("a file that a crash left behind", False),
        ("there is no file yet", False),
        ("a share is no larger than the whole", False),
        ("recommended amendments", False),
        ("stand-alone, let alone used", False),
        ("compute again although it is there", True),
        ("config.json is not there", True),
        ("outside the root, not there, or too large", True),
        ("a path, which is no directory of ours", True),
        ("the run does not need it any more", True),
        ("the digest stands in the manifest", True),
        ("packages that stand in for both", False),
        ("an offset behind its padding", True),
        ("run me again", True),
        ("the file is there when a run has ended", True),
        ("Is there a file?", False),
    ],
)
def test_phrases_are_matched_precisely(text: str, listed: bool) -> None:
    assert any(pattern.search(text) for pattern in FINDERS) == listed
