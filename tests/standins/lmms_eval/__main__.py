"""Takes the flags of lmms-eval 0.7.3 that we use and writes a result as it does.

A task is a file TASK.json below --include_path: its numbers. `broken` ends with an error.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for name in ("model", "model_args", "tasks", "batch_size", "device", "output_path"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--include_path", type=Path, required=True)
    parser.add_argument("--limit", type=float)
    parser.add_argument("--log_samples", action="store_true")
    given = parser.parse_args()
    pretrained = Path(dict(pair.split("=") for pair in given.model_args.split(","))["pretrained"])
    assert json.loads((pretrained / "config.json").read_bytes())["model_type"] == "llava"
    results = {}
    for task in given.tasks.split(","):
        print(f"Running {task}\r", flush=True)
        if task == "broken":
            raise SystemExit("the stand-in was told to fail")
        row = json.loads((given.include_path / f"{task}.json").read_bytes())
        results[task] = {"alias": task, " ": "", **row}
    out = Path(given.output_path, pretrained.name)
    out.mkdir(parents=True)
    text = json.dumps({"results": results, "config": vars(given)}, default=str)
    (out / "20260102_030405_results.json").write_text(text)


if __name__ == "__main__":
    main()
