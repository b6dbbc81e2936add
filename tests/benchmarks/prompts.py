"""Compares the prompts of training, evaluation, chat and transformers for many tokenizers.

    python -m tests.benchmarks.prompts --conversations 200

The last line is JSON: cases, and those in which all ids are equal.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from tests.helpers.prompt_cases import CASES, Asked, conversation, differences, make, picture


def main() -> int:
    """Print where ids differ, and the counts; 1 if any do."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--conversations", type=int, default=200)
    count = parser.parse_args().conversations
    equal = 0
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "image.png")
        file.write_bytes(picture())
        for case in CASES:
            asked = Asked(make(case, Path(folder, case.name)))
            for number in range(count):
                found = differences(case, asked, conversation(number, case.system), file)
                equal += not found
                if found:
                    print(f"{case.name}, conversation {number}: {'; '.join(found)}")
            print(f"{case.name}: done", flush=True)
    print(json.dumps({"cases": count * len(CASES), "equal": equal}))
    return int(equal < count * len(CASES))


if __name__ == "__main__":
    sys.exit(main())
