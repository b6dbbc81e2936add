"""Takes the flags of lmms-eval 0.7.3 that we use, and says and writes what it does.

A task is a file TASK.json below --include_path: its numbers, or the tasks of a group. What ends
lmms-eval ends with code 0, after a traceback: `broken` is such a task. `wordless` has questions
that its llava_hf cannot answer.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

RED, PLAIN = "\x1b[31m", "\x1b[0m"


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for name in ("model", "model_args", "tasks", "batch_size", "device", "output_path"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--include_path", type=Path, required=True)
    parser.add_argument("--limit", type=float)
    parser.add_argument("--log_samples", action="store_true")
    given = parser.parse_args()
    if not sys.dont_write_bytecode:
        Path(given.include_path, "__pycache__").mkdir()
    print({"output_path": given.output_path, "token": os.environ.get("HF_TOKEN")})
    try:
        evaluate(given)
    except Exception as error:
        traceback.print_exc()
        print(f"{RED}ERROR{PLAIN} Error during evaluation: {error}.", flush=True)


def evaluate(given: argparse.Namespace) -> None:
    model = dict(pair.split("=", 1) for pair in given.model_args.split(","))
    pretrained = Path(model.pop("pretrained"))
    assert model.pop("device_map") in ("cpu", "cuda")
    assert not model, f"Unexpected kwargs: {model}"
    assert given.batch_size == "1", "Do not support batch_size_per_gpu > 1 for now"
    assert json.loads((pretrained / "config.json").read_bytes())["model_type"] == "llava"
    known = {path.stem: path for path in given.include_path.glob("*.json")}
    results: dict[str, Any] = {}
    groups: dict[str, list[str]] = {}
    wanted = given.tasks.split(",")
    while wanted:
        asked = wanted.pop()
        if "*" not in asked and asked not in known:
            raise ValueError(f"Tasks not found: {asked}.")
        for task in fnmatch.filter(known, asked):
            print(f"Running {task}\r", flush=True)
            if task == "broken":
                raise ValueError("the stand-in was told to fail")
            if task == "wordless":
                print(f"{RED}ERROR{PLAIN} Error the stand-in has no words in generating")
            row = json.loads(known[task].read_bytes())
            groups[task] = row if isinstance(row, list) else []
            wanted += groups[task]
            results[task] = {"alias": task, " ": " "} | ({} if groups[task] else row)
    out = Path(given.output_path, "__".join(pretrained.parts[-2:]))
    out.mkdir(parents=True)
    told = {"results": results, "group_subtasks": groups, "config": vars(given)}
    (out / "20260102_030405_results.json").write_text(json.dumps(told, default=str))


if __name__ == "__main__":
    main()
