"""make mutants: every way to break a row of the mapping table makes a check fail.

    python -m tests.benchmarks.mutants

A row is broken by deleting it, by giving it each other transform, by turning the order of its HF
tensors and by exchanging those with a row of the same shapes. The checks are the ones of the test
suite: the conversion's own certificate, the round trip byte for byte, and the parallel model's
logits against transformers'. The last line is JSON, {"rows", "killed"}: a row counts as killed if
no mutant of it survives. Exit code 1 if one does.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from llava_steps.conversion.convert import dcp_to_hf, hf_to_dcp
from llava_steps.conversion.mapping import ROWS, Row, entries
from llava_steps.conversion.tensors import TensorDirectory
from llava_steps.conversion.transforms import TRANSFORMS
from llava_steps.core.errors import IntegrityError
from llava_steps.geometry.geometry import Geometry
from tests.helpers.dist_helpers import spawn
from tests.helpers.model_fixtures import TINY, pack_samples, reference, samples, save_hf

MODELS = ("biases-uneven", "qwen3")
"""Between them every row of the table is in use."""
LOGITS = 1e-4
Table = tuple[Row, ...]


def active(row: Row, geometry: Geometry) -> bool:
    """Whether the model has tensors of this row."""
    prefix = row.megatron.removesuffix("*")
    return any(
        entry.megatron.startswith(prefix) for entry in entries(geometry, {"x": (1,)}, (row,))
    )


def mutants(place: int) -> Iterator[tuple[str, Table]]:
    """All broken tables that differ in row `place`, with a word for what was done."""
    row = ROWS[place]

    def changed(**parts: Any) -> Table:
        return (*ROWS[:place], replace(row, **parts), *ROWS[place + 1 :])

    yield "deleted", (*ROWS[:place], *ROWS[place + 1 :])
    for transform in sorted(set(TRANSFORMS) - {row.transform}):
        yield f"transform {transform}", changed(transform=transform)
    if len(row.hf) > 1:
        yield "parts reversed", changed(hf=row.hf[::-1], shapes=row.shapes[::-1])
        yield "last two parts exchanged", changed(hf=(*row.hf[:-2], row.hf[-1], row.hf[-2]))
    for other, twin in enumerate(ROWS):
        same = twin.shapes == row.shapes and ("{i}" in twin.hf[0]) == ("{i}" in row.hf[0])
        if other != place and same:
            table = list(ROWS)
            table[place], table[other] = replace(row, hf=twin.hf), replace(twin, hf=row.hf)
            yield f"sources exchanged with {twin.megatron}", tuple(table)


class Checks:
    """One tiny model, and what must hold for a right table."""

    def __init__(self, name: str, root: Path) -> None:
        from llava_steps.model.llava import build_llava
        from llava_steps.model.options import ModelOptions

        self.hf, self.work = root / name, root / "work"
        model = save_hf(TINY[name], self.hf)
        self.geometry = Geometry.load(self.hf)
        rows = samples(self.geometry.tokens_per_image)
        length = sum(len(sample.tokens) for sample in rows)
        self.batch = pack_samples(rows, tuple(range(len(rows))), length)
        with torch.no_grad():
            self.expected = torch.cat(reference(model, rows)[0])
        self.model = build_llava(self.geometry, ModelOptions(freeze_lm=True)).eval()

    def failure(self) -> str:
        """What fails with the table as it is now; empty if nothing does."""
        shutil.rmtree(self.work, ignore_errors=True)
        out = self.work / "out"
        out.mkdir(parents=True)
        try:
            with TensorDirectory(self.hf) as hf:
                hf_to_dcp(self.geometry, hf, self.work / "weights")
                dcp_to_hf(self.geometry, self.work / "weights", hf, out)
        except (IntegrityError, ValueError, RuntimeError) as error:
            return f"certificate: {str(error)[-90:]}"
        name = "model.safetensors"
        if (out / name).read_bytes() != (self.hf / name).read_bytes():
            return "round trip"
        return self._forward()

    def _forward(self) -> str:
        from llava_steps.model.weights import load_weights

        load_weights(self.model, self.work / "weights")
        batch = self.batch
        with torch.no_grad():
            logits = self.model(
                batch.tokens, batch.position_ids, batch.cu_seqlens, batch.max_seqlen,
                batch.pixel_values,
            )  # fmt: skip
        delta = (logits - self.expected).abs().max().item()
        return f"logits differ by {delta:.1e}" if not delta <= LOGITS else ""


def attack(rank: int, root: Path, places: list[int]) -> list[tuple[int, str, str]]:
    """(row, mutation, first check that fails or "") for all mutants of the rows `places`."""
    from tests.helpers.dist_helpers import model_parallel

    found = []
    with model_parallel(1, 1):
        models = [Checks(name, root) for name in MODELS]
        for checks in models:
            if said := checks.failure():
                raise AssertionError(f"the table itself does not pass: {said}")
        for place in places:
            fitting = [m for m in models if active(ROWS[place], m.geometry)]
            for name, table in mutants(place):
                said = with_table(table, lambda f=fitting: first_failure(f))
                found.append((place, name, said))
    return found


def first_failure(models: list[Checks]) -> str:
    for checks in models:
        if said := checks.failure():
            return said
    return ""


def with_table(table: Table, call: Callable[[], Any]) -> Any:
    """`call` with another table in the place of ROWS, for all who use it."""
    entries.__defaults__ = (table,)
    try:
        return call()
    finally:
        entries.__defaults__ = (ROWS,)


def main() -> int:
    places = list(range(len(ROWS)))
    with tempfile.TemporaryDirectory(prefix="mutants-") as root:
        (found,) = spawn("tests.benchmarks.mutants:attack", 1, Path(root), Path(root), places)
    survivors = set()
    for place, name, said in found:
        print(f"{ROWS[place].megatron}: {name}: {said or 'SURVIVES'}")
        if not said:
            survivors.add(place)
    print(json.dumps({"rows": len(places), "killed": len(places) - len(survivors)}))
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
