"""Texts of any language as the words that overlap metrics count.

A run of letters and digits is a word, as usual for English. Chinese characters, hiragana and
katakana are written without spaces, so each of them is a word of its own; this needs no dictionary
whose version would decide a score. Width and case do not count (NFKC, casefold), punctuation
neither.
"""

from __future__ import annotations

import unicodedata

import regex

_ALONE = r"\p{Han}\p{Hiragana}\p{Katakana}ー"
_WORD = regex.compile(rf"[{_ALONE}]|[\p{{L}}\p{{M}}\p{{N}}--[{_ALONE}]]+", regex.V1)


def words(text: str) -> list[str]:
    """The words of a text, in order."""
    found: list[str] = _WORD.findall(unicodedata.normalize("NFKC", text).casefold())
    return found
