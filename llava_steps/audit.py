"""Check a dataset as training will see it, and refuse it if training would fail on it.

    llava-steps audit --data-path results/demo/energon_dataset \\
        --tokenizer-load-dir results/demo/hf_model --seq-length 256 --save-dir results/demo/audit

Reads, tokenizes and decodes --samples of it (0: all) with the code of training. Each answer must be
supervised up to its end token, padding and image tokens must not be, and every image must have its
tokens. Images that the resize would make too large are found in all samples, by the sizes that
prepare_energon lists. Writes report.json (shares, lengths, names of samples that are refused or
truncated) and examples.txt, three samples with their supervised text in [[ ]], in colour on a
terminal. Exit code 3 when samples are refused, 4 when labels or image tokens are wrong; the report
is then in the store entry that the log names. Also writes examples.json, the same samples, and
--thumbnails of the images, for report.html.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llava_steps.core import filesystem
from llava_steps.core.errors import InputError, IntegrityError
from llava_steps.settings.dataset import Audit
from llava_steps.store.run import main
from llava_steps.store.step import Context, Step

if TYPE_CHECKING:
    from llava_steps.data.loader.audit import Example

REPORT, EXAMPLES, PICTURES = "report.json", "examples.txt", "examples.json"
LISTED = 3
"""Samples that an error message lists; the report lists more."""


def run(ctx: Context, cfg: Audit) -> Mapping[str, Any]:
    """Check the samples, write the report, and raise if one of them breaks a rule.

    Raises:
        InputError: training would refuse samples.
        IntegrityError: labels or image tokens are wrong.
    """
    from llava_steps.data.loader import audit
    from llava_steps.data.loader.corpus import Corpus
    from llava_steps.data.samples.thumbnails import Thumbnails

    # Not resolved: paths in a blend are relative to the directory of its file, link or not.
    corpus = Corpus(ctx.inputs["data_path"].path.absolute(), cfg.split, cfg.seed)
    auditor = audit.Auditor(
        corpus, ctx.inputs["tokenizer_load_dir"].path, cfg.seq_length, cfg.too_long == "truncate"
    )
    auditor.inspect_sizes()
    chosen = audit.choose(corpus, cfg.samples, cfg.seed)
    examples: list[Example] = []
    pictures: list[dict[str, str]] = []
    thumbnails = Thumbnails(ctx.entry, "thumbnails")
    every = max(1, len(chosen) // max(1, cfg.thumbnails))
    with ctx.progress("checking samples", len(chosen)) as bar:
        for number, index in enumerate(chosen):
            example = auditor.inspect(index)
            if example and number % every == 0 and len(pictures) < cfg.thumbnails:
                added = thumbnails.add(example.images[:1])
                pictures += [{"image": image, "sample": example.where} for image in added]
            if example is not None and len(examples) < cfg.examples:
                examples.append(example)
            bar.advance(1)
    report = auditor.report()
    filesystem.write_json(ctx.entry / REPORT, report)
    filesystem.write_bytes(
        ctx.entry / EXAMPLES, "\n\n".join(map(marked, examples)).encode() + b"\n"
    )
    filesystem.write_json(
        ctx.entry / PICTURES,
        {
            "examples": [
                {
                    "sample": example.where,
                    "tokens": example.tokens,
                    "supervised": example.supervised,
                    "pieces": [[piece.text, piece.supervised] for piece in example.pieces],
                    "images": thumbnails.add(example.images),
                }
                for example in examples
            ],
            "thumbnails": pictures,
        },
    )
    show(examples)
    ctx.log.info(
        "%d of %d samples, %d tokens, %.1f %% supervised; lengths %s to %s of at most %d",
        report["samples"], report["samples_in_split"], report["tokens"],
        100 * report["supervised_share"], report["lengths"].get("min"),
        report["lengths"].get("max"), cfg.seq_length,
    )  # fmt: skip
    if report["broken"]:
        raise IntegrityError(_message(report, "broken", "wrong labels or image tokens", ctx))
    if report["refused"]:
        raise InputError(_message(report, "refused", "training would refuse", ctx))
    names = ("refused_samples", "broken_samples", "truncated_samples")
    return {key: value for key, value in report.items() if key not in names}


def _message(report: Mapping[str, Any], kind: str, what: str, ctx: Context) -> str:
    rows: Sequence[Mapping[str, str]] = report[f"{kind}_samples"]
    named = "; ".join(f"{row['sample']}: {row['why']}" for row in rows[:LISTED])
    more = f"; and {report[kind] - LISTED} more" if report[kind] > LISTED else ""
    return f"{what}: {named}{more} (all in {ctx.entry / REPORT})"


def marked(example: Example) -> str:
    """An example as plain text, supervised pieces between [[ and ]]."""
    body = "".join(f"[[{p.text}]]" if p.supervised else p.text for p in example.pieces)
    return f"{_head(example)}\n{body}"


def _head(example: Example) -> str:
    return f"--- {example.where}: {example.tokens} tokens, {example.supervised} supervised"


def show(examples: Sequence[Example]) -> None:
    """Print examples to stderr: in colour on a terminal, with markers elsewhere."""
    if not sys.stderr.isatty():
        print("\n\n".join(map(marked, examples)), file=sys.stderr)
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True)
    for example in examples:
        console.print(Text(_head(example), style="bold"))
        parts = [(p.text, "black on green" if p.supervised else "dim") for p in example.pieces]
        console.print(Text.assemble(*parts))


STEP = Step(
    name=lambda cfg: f"stage{cfg.stage}_audit",
    config=Audit,
    run=run,
    doc=__doc__,
)

if __name__ == "__main__":
    main(STEP)
