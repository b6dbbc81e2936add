"""The comparison of a sweep in a real browser: phone and desktop, light and dark."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.browser.pages import CHROMIUM, VIEWS, checked
from tests.helpers.chain import run_step
from tests.helpers.comparison_fixtures import Made, make_sweep
from tests.helpers.report_fixtures import HOSTILE

pytestmark = pytest.mark.skipif(
    not CHROMIUM, reason="NO BROWSER: the comparison was not opened; apt install chromium"
)


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("page")
    variants = {
        f"lr_{rate},train_steps_{steps}": Made(
            0.3 + 0.05 * steps + 1000 * rate,
            0.5,
            {"stages.stage2.lr": rate, "stages.stage2.train_steps": steps, "x.text": HOSTILE[4]},
        )
        for rate in (1e-5, 2e-5)
        for steps in (1, 2, 3, 4)
    }
    variants |= {HOSTILE[0].replace("=", "-"): Made(0.2, 0.3, {"x.text": HOSTILE[1]})}
    run_step("compare", f"--title={HOSTILE[0]}", *make_sweep(root, variants), "--save-dir=out",
             cwd=root)  # fmt: skip
    return root / "out/comparison.html"


@pytest.mark.parametrize(("width", "scheme"), VIEWS, ids=lambda value: str(value))
def test_the_comparison_is_whole_readable_and_quiet(
    browser: Any, comparison: Path, tmp_path: Path, width: int, scheme: str
) -> None:
    with checked(browser, comparison, tmp_path, width, scheme) as page:
        for name in ("scores", "losses"):
            box = page.locator(f"section#{name}").bounding_box()
            assert box is not None and box["width"] > width * 0.8 and box["height"] > 100, name
        assert page.locator("svg.chart .curve").count() == 9 + 9 + 1
        # The score over all questions is seen without scrolling inside the table.
        score = page.locator("#scores tbody tr:first-child td").first.bounding_box()
        assert score is not None and score["x"] + score["width"] <= width
        rows = [row.bounding_box() for row in page.locator("#scores tbody tr").all()]
        assert max(row["height"] for row in rows) < 260, "a long setting makes its row tall"
