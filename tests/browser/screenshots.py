"""Build the report of a run anew, look at it in Chromium, keep the pictures, print one JSON line.

python -m tests.browser.screenshots --run results/demo --to screenshots
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from llava_steps.settings.steps import STEPS
from tests.helpers.chain import ROOT, environment


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=ROOT / "results/demo")
    parser.add_argument("--to", type=Path, default=Path("screenshots"))
    given = parser.parse_args()
    names = [n for n in STEPS["report"].feeds if (given.run / n / "manifest.json").is_file()]
    flags = [f"--{name.replace('_', '-')}={(given.run / name).resolve()}" for name in names]
    with tempfile.TemporaryDirectory() as place:
        start = time.monotonic()
        line = [sys.executable, "-m", "llava_steps.report", f"--title={given.run.name}", *flags]
        where = [f"--save-dir={place}/out", f"--store={place}/store"]
        subprocess.run([*line, *where], env=environment(), check=True)
        seconds = time.monotonic() - start
        page = Path(place, "out/report.html")
        size = page.stat().st_size
        known = {
            "LLAVA_STEPS_REPORT": str(page),
            "LLAVA_STEPS_SCREENSHOTS": str(given.to.resolve()),
        }
        test = [sys.executable, "-m", "pytest", "-n", "0", "-q", "-p", "no:cacheprovider"]
        checks = subprocess.run(
            [*test, str(Path(__file__).with_name("test_report_page.py"))],
            cwd=ROOT,
            env=os.environ | environment() | known,
        )
    good = checks.returncode == 0 and size <= 5_000_000 and seconds <= 20
    print(
        json.dumps(
            {"seconds": round(seconds, 2), "bytes": size, "pictures": str(given.to), "passed": good}
        )
    )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
