"""Texts that go wrong wherever one is taken for code: by shells, formats, YAML, Slurm."""

from __future__ import annotations

from itertools import product

VALUES = [
    "two words",
    "it's",
    'say "yes"',
    "; touch canary",
    "$(touch canary)",
    "`touch canary`",
    "| touch canary",
    "&& touch canary",
    "> canary",
    "a\ntouch canary\nb",
    "'; touch canary; '",
    '"; touch canary; "',
    "\\",
    "\\'$(touch canary)",
    "{output}",
    "{{x}}",
    "{config[run]}",
    "{wildcards.x!r:>9}",
    "*",
    "[a-z]*?",
    "~",
    "#",
    "!!",
    "%s%n",
    "${HOME}",
    "日本語",
    "\u00e9\u0301\u202e",
    "-x",
    "--force",
    "=",
    "\t",
    " ",
]
"""No empty one: an empty text means "not given" in the settings that take a path."""

MORE = [
    "", "\n", "\r\n", "\x01", "\x1b[2J", "\x7f", "\u0085", "\u2028", "\ufeff", "\u200b", "𝒳🙂",
    "& touch canary &", "|| touch canary", "<(touch canary)", ">(touch canary)", "$((touch=1))",
    "$'\\x27; touch canary'", '$"touch canary"', "${IFS}touch${IFS}canary", "$0", "$@", "$*", "$!",
    "<<E\ntouch canary\nE", "<<< canary", "2>canary", ">&canary", "a\\\nb", "a\\", "\\\n", "!touch",
    "^a^touch canary", "{touch,canary}", "{1..3}", "~root", "~+", "?", "+(a)", "@(a|b)", "/*",
    "x=1 touch canary", "function f { touch canary; }; f", "exec touch canary", ". canary", ":",
    "{", "}", "{}", "{0}", "{params.flags}", "{input:q}", "{config}", "{self.__class__}", "{{",
    "}}",
    "{flags[0].__class__.__mro__}", "%(x)s", "%%", "%j", "%A_%a", "\\0", "\\n", "\\x00", "@file",
    "-", "--", "---", "--help", "-h", "--store=x", "--save-dir", "-c 'touch canary'", "yes",
    "null",
    "1e3", "0x10", "1_000", "2026-01-01", "&anchor", "*anchor", "!!python/object:os.system", "- x",
    "key: value", "[1, 2]", "{a: 1}", "'", '"', "`", "''", '""', "'\"'\"'", "\"'\"", "'\\''",
    "\\\"",
    "|", ">", "<", "&", ";", "(", ")", "$", ",", "a,b", "a=b", "a:b", "#SBATCH --uid=0", "x" * 300,
    "../../other", "/dev/null", "file:///etc/passwd", "http://a/?b=c&d=e", "(touch canary)",
    "\v\f",
]  # fmt: skip

WRAPS = ("'{}'", '"{}"', "a{}'b", "\n{}", "\\{}", '$("{}")', "日{}本")
HOSTILE = [*VALUES, *MORE]
HOSTILE += [wrap.replace("{}", text) for text, wrap in product(VALUES[3:12], WRAPS)]
