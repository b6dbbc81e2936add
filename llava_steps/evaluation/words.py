"""Splits texts of any language into the words that overlap metrics count.

A run of letters and digits is a word, as usual for English. Chinese characters, hiragana and
katakana are written without spaces, so each character is a word, and scores do not depend on the
version of a dictionary. Width, case (NFKC, casefold) and punctuation are ignored.
"""

from __future__ import annotations

import unicodedata

import regex

_ALONE = r"\p{Han}\p{Hiragana}\p{Katakana}ー"
_WORD = regex.compile(rf"[{_ALONE}]|[\p{{L}}\p{{M}}\p{{N}}--[{_ALONE}]]+", regex.V1)


def words(text: str) -> list[str]:
    """The words of a text, in order."""
    matches: list[str] = _WORD.findall(unicodedata.normalize("NFKC", text).casefold())
    return matches
