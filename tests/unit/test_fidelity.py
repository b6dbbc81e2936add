"""The mapping table withstands every mutant; one cell of the matrix in all layouts."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import pytest

from llava_steps.conversion.mapping import ROWS
from tests.benchmarks import matrix
from tests.helpers.dist_helpers import spawn


def test_every_mutant_of_every_row_of_the_mapping_table_is_killed(tmp_path: Path) -> None:
    places = list(range(len(ROWS)))
    (found,) = spawn("tests.benchmarks.mutants:attack", 1, tmp_path, tmp_path, places)
    said = defaultdict(list)
    for place, name, failure in found:
        assert failure, f"{ROWS[place].megatron}: {name} survives"
        said[place].append(name)
    assert sorted(said) == places
    for names in said.values():  # deleted, and each of the two other transforms
        assert names[0] == "deleted" and sum(n.startswith("transform") for n in names) == 2


def test_a_cell_of_the_matrix_in_all_layouts(tmp_path: Path) -> None:
    found = matrix.run(tmp_path, "siglip2:qwen3-tied")
    assert found["combinations"] == found["passed"] == 4
    assert 0 < found["max_logit_delta"] <= matrix.LOGITS


def test_a_wrong_logit_fails_its_cell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(matrix, "LAYOUTS", matrix.LAYOUTS[:1])
    prepare = matrix.prepare

    def shifted(*arguments):
        wanted = prepare(*arguments)
        wanted.fp32[3, 4] += 2e-4
        return wanted

    monkeypatch.setattr(matrix, "prepare", shifted)
    found = matrix.run(tmp_path, "clip:llama-gqa")
    assert found["combinations"] == 1 and found["passed"] == 0
    assert "FAILED" in capsys.readouterr().out
