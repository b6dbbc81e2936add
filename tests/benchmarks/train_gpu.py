"""python -m tests.benchmarks.train_gpu [--parts ...]: training speed on one GPU, against peers.

The work: a LLaVA with the language model of `--shape` and the tower CLIP ViT-L/14-336, random
weights; text of lognormal(5.3, 0.8) tokens clipped to 32..1472 with one JPEG image each, through
our loader with 8 workers; bf16 with fp32 masters and gradients, AdamW, clipping, global batch 128.
Ours is the real training loop. Peers see gpu_peers.py.

Figures: useful (non-padding) tokens per second, and the model's floating-point operations per
second (geometry/costs.py, the head counted for every useful token, nothing for computing again)
over the peak of bf16 matrix products, measured in the same run.

Prints a line as soon as a part is done, a table, and one JSON line. Parts: see PARTS.
`--tiny --device cpu` runs everything in little, to see that it works.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.benchmarks import gpu_work

ROOT = Path(__file__).parents[2]
OURS: dict[str, Any] = {
    "module": "gpu_ours", "stage": 2, "compile": "auto", "precision": "bf16", "warm": 3,
    "measured": 5, "profile": False, "deterministic": True,
    "flash_attention": "auto", "lr": 1e-4, "seconds": 150, "gpus": 1,
}  # fmt: skip
SPREAD = OURS | {"warm": 2, "measured": 3}
OVERLAP = {"overlap_grad_reduce": True}
LOCAL_FP8 = {"fp8": True, "layer_spec": "local"}
PEER: dict[str, Any] = {
    "module": "gpu_peers", "stage": 2, "compile": "none", "warm": 1, "measured": 2, "multiple": 8,
    "seconds": 120,
}  # fmt: skip
PARTS: dict[str, dict[str, Any]] = {
    "ours": OURS | {"profile": True},
    "ours-eager": OURS | {"compile": "none", "measured": 3},
    "ours-free": OURS | {"deterministic": False},
    "ours-torch": OURS | {"flash_attention": "torch", "profile": True},
    "ours-stage1-torch": OURS | {"stage": 1, "flash_attention": "torch"},
    "ours-stage1": OURS | {"stage": 1},
    "ours-dp2": SPREAD | {"gpus": 2, "engine": OVERLAP},
    "ours-dp4": SPREAD | {"gpus": 4, "engine": OVERLAP},
    "ours-dp4-late": SPREAD | {"gpus": 4},
    "ours-pp2": SPREAD | {"gpus": 2, "engine": {"pipeline_model_parallel": 2}},
    "ours-tp2": SPREAD
    | {"gpus": 2, "engine": {"tensor_model_parallel": 2, "sequence_parallel": True}},
    "ours-stage1-fp8": OURS | {"stage": 1, "engine": {"fp8": True}},
    "ours-stage1-fp8-local": OURS | {"stage": 1, "engine": LOCAL_FP8},
    "ours-fp8-local": OURS | {"engine": LOCAL_FP8, "profile": True},
    "ours-te": OURS | {"engine": {"layer_spec": "te"}, "profile": True},
    "ours-fp8": OURS | {"engine": {"fp8": True}, "profile": True},
    "ours-fp8-blocks": OURS | {"engine": {"fp8": True, "fp8_recipe": "blockwise"}},
    "peer-a": PEER,
    "peer-b": PEER | {"compile": "layers", "multiple": 64, "warm": 2},
    "peer-a-stage1": PEER | {"stage": 1},
}
"""Ours as by default, uncompiled, with kernels whose sums may differ from run to run, and with the
attention that torch ships; peer (a) eager, (b) with compiled layers. `te` and `fp8` need
Transformer Engine. dp, pp and tp need several GPUs: dp has a global batch for each replica and
sends gradients during the backward pass (`late`: after it); "of peak" is of all GPUs together,
memory the highest of them. A further part, `losses`, trains a small model 50 steps in several ways,
side by side."""
LOSSES = {"warm": 1, "measured": 49, "lr": 1e-3, "batch": 16, "capacity": 8192, "seconds": 150}
WAYS: dict[str, dict[str, Any]] = {
    "fp32": {"precision": "fp32", "compile": "none"},
    "bf16 eager": {"compile": "none"},
    "bf16 compiled": {"compile": "layers"},
    "bf16 compiled fp8": {"engine": LOCAL_FP8},
}
if importlib.util.find_spec("transformer_engine"):
    WAYS |= {
        "bf16 te": {"engine": {"layer_spec": "te"}},
        "bf16 te fp8": {"engine": {"fp8": True}},
        "bf16 te fp8 blocks": {"engine": {"fp8": True, "fp8_recipe": "blockwise"}},
    }
    LOSSES["seconds"] = 300


def matrix_peak() -> float:
    """bf16 operations per second of 8192^3 products of random matrices, the median of 50."""
    import torch

    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    times = []
    for number in range(70):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        torch.mm(a, b, out=out)
        end.record()
        times.append((number, start, end))
    torch.cuda.synchronize()
    seconds = sorted(s.elapsed_time(e) / 1000 for n, s, e in times if n >= 20)
    return 2 * 8192**3 / seconds[len(seconds) // 2]


class Bench:
    """Runs parts one after another, each in a process of its own."""

    def __init__(self, args: argparse.Namespace, root: Path) -> None:
        self.args, self.root = args, root
        cpus = len(os.sched_getaffinity(0))
        self.batch = 8 if args.tiny else 128
        self.dataset = gpu_work.dataset(root, self.batch * (4 if args.tiny else 16), cpus)
        self.environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path[1:]])}
        if args.device == "cpu":
            self.environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}

    def spec(self, part: str, shape: str, number: int = 0) -> dict[str, Any]:
        """What the process of a part is told."""
        spec = dict(PARTS[part]) | json.loads(self.args.set)
        if self.args.tiny:
            spec |= {"warm": 1, "measured": 1, "seconds": 3600}
        engine, gpus = spec.get("engine", {}), spec.get("gpus", 1)
        alike = engine.get("pipeline_model_parallel", 1) * engine.get("tensor_model_parallel", 1)
        name = f"{shape}-{part}-{number}"
        return spec | {
            "name": name, "shape": shape, "out": str(self.root / f"{name}.json"),
            "hf_dir": str(gpu_work.hf_dir(self.root, shape)), "dataset": str(self.dataset),
            "batch": self.batch * gpus // alike,
            "workers": self.args.workers, "micro": self.args.micro,
            "capacity": spec.get("capacity", self.args.capacity),
        }  # fmt: skip

    def losses(self, peak: float) -> dict[str, Any]:
        """Mean and largest relative deviation of the losses of 50 steps from those in fp32."""
        PARTS.update({way: OURS | LOSSES | how for way, how in WAYS.items()})
        specs = {way: self.spec(way, "tiny" if self.args.tiny else "mid") for way in WAYS}
        for way, spec in specs.items():
            spec |= {k: LOSSES[k] for k in ("batch", "capacity")} | WAYS[way]
            spec["name"] = spec["name"].replace(" ", "-")
            spec["out"] = spec["out"].replace(" ", "-")
        running = {way: self.start(spec) for way, spec in specs.items()}
        done = {way: self.finish(specs[way], process) for way, process in running.items()}
        if wrong := [result for result in done.values() if "error" in result]:
            return wrong[0]
        exact = done.pop("fp32")["losses"]
        found: dict[str, Any] = {"steps": len(exact), "loss": [exact[0], exact[-1]]}
        for way, result in done.items():
            off = [abs(a - b) / b for a, b in zip(result["losses"], exact, strict=True)]
            found[way] = {"mean": sum(off) / len(off), "largest": max(off)}
        return found

    def start(self, spec: dict[str, Any]) -> subprocess.Popen[bytes]:
        path = self.root / f"{spec['name']}.spec.json"
        path.write_text(json.dumps(spec | {"started": time.time()}))
        line = [sys.executable, "-m", f"tests.benchmarks.{spec['module']}", str(path)]
        log = (self.root / f"{spec['name']}.log").open("wb")
        return subprocess.Popen(line, cwd=ROOT, env=self.environment, stdout=log, stderr=log)

    def finish(self, spec: dict[str, Any], process: subprocess.Popen[bytes]) -> dict[str, Any]:
        """The part's result, or its error; never raises because of it."""
        try:
            code: int | str = process.wait(spec["seconds"])
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            code = f"over {spec['seconds']} s"
        out = Path(spec["out"])
        if code == 0 and out.exists():
            return json.loads(out.read_text())
        log = (self.root / f"{spec['name']}.log").read_text(errors="replace")
        return {"error": str(code), "log": log[-3000:]}


def figures(result: dict[str, Any], spec: dict[str, Any], peak: float) -> dict[str, Any]:
    """What the table shows of a part."""
    from llava_steps.geometry.costs import Trained, Work, flops
    from llava_steps.geometry.geometry import Geometry

    if "error" in result:
        return result
    work, seconds = Work(**result["work"]), result["seconds"]
    trained = Trained(False, True, spec["stage"] == 2)
    done = flops(Geometry.load(spec["hf_dir"]), trained, work, "tokens").total / seconds
    kept = ("peak_gib", "reserved_gib", "first_step_s", "compilations", "microbatch", "profile")
    row = {
        "tokens_per_s": round(work.tokens / seconds), "tflops": round(done / 1e12, 1),
        "of_peak": round(done / peak / spec.get("gpus", 1), 4) if peak else None,
        "step_s": round(seconds / spec["measured"], 3),
    } | {k: result[k] for k in kept if k in result}  # fmt: skip
    if "positions" in result:
        row["fill"] = round(work.tokens / result["positions"], 4)
        row["data_wait"] = round(result["data_wait_s"] / seconds, 5)
        row["rows"], row["largest_row"] = result["rows"], result["largest"]
        row["data_waits_s"] = result["data_waits_s"]
        row["supervised"] = round(work.supervised / work.tokens, 3)
        row["compilations"] = result["compilations_end"]
        row["losses"] = [round(x, 4) for x in result["losses"][:3]]
    return row


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Plain text; a line a part."""
    columns = (
        "tokens_per_s", "tflops", "of_peak", "step_s", "peak_gib", "first_step_s", "compilations",
        "fill", "data_wait",
    )  # fmt: skip
    lines = ["part".ljust(22) + "".join(c.rjust(14) for c in columns)]
    for name, row in rows.items():
        cells = ["error" if "error" in row else str(row.get(c, "")) for c in columns]
        lines.append(name.ljust(22) + "".join(c.rjust(14) for c in cells))
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--parts",
        default="ours,peer-b,peer-a",
        help=f"of {', '.join(PARTS)}, losses; 3.7b:ours has its own shape",
    )
    parser.add_argument("--shape", default="1.8b", choices=tuple(gpu_work.SHAPES))
    parser.add_argument("--capacity", type=int, default=0, help="tokens of a packed row at most")
    parser.add_argument("--micro", type=int, default=16, help="microbatch of the peers at most")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--set", default="{}", help="JSON that overrides settings of every part")
    parser.add_argument("--keep", default="", help="directory for data and logs, to use it again")
    args = parser.parse_args()
    peak, card = 0.0, "cpu"
    if args.device == "cuda":
        import torch

        card = torch.cuda.get_device_name()
        memory = torch.cuda.get_device_properties(0).total_memory
        small = memory < 100e9
        args.capacity = args.capacity or (4096 if small and args.shape == "3.7b" else 16384)
        args.micro = min(args.micro, 8 if small else 16)
        peak = matrix_peak()
        torch.cuda.empty_cache()
        print(
            f"{card}, {memory / 2**30:.0f} GiB, matrix peak {peak / 1e12:.1f} TFLOP/s", flush=True
        )
    if args.tiny:
        args.shape, args.capacity, args.workers = "tiny", 4096, min(args.workers, 1)
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="llava-steps-gpu-") as temporary:
        root = Path(args.keep or temporary)
        root.mkdir(parents=True, exist_ok=True)
        bench = Bench(args, root)
        for number, part in enumerate(args.parts.split(",")):
            if part == "losses":
                rows[part] = bench.losses(peak)
                print(json.dumps({"part": part} | rows[part]), flush=True)
                continue
            shape, _, part = f"{args.shape}:{part}".rpartition(":")
            spec = bench.spec(part, shape.rpartition(":")[2], number)
            row = figures(bench.finish(spec, bench.start(spec)), spec, peak)
            rows[f"{spec['shape']} {part}"] = row
            print(json.dumps({"part": part} | row), flush=True)
    print(table(rows))
    for row in rows.values():
        row.pop("log", None)
    print(json.dumps({"card": card, "peak_tflops": round(peak / 1e12, 1), "rows": rows}))
    return 1 if any("error" in row for row in rows.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
