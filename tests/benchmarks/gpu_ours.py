"""One timed training with the real loop, in a process of its own: python -m ... SPEC.json.

Two of the loop's functions are replaced: weights are drawn instead of loaded, and nothing is saved.
Writes SPEC.json's `out`: what train_gpu.py makes its table from. With several GPUs the process
starts one for each of them, and tells the work of all.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


class Meter:
    """In the place of the loop's sign of life, which has settled after every step."""

    def __init__(self, spec: dict[str, Any], work: list[Any]) -> None:
        self._spec, self._work = spec, work
        self._first, self._last = spec["warm"], spec["warm"] + spec["measured"]
        self._seen = 0
        self._profiler: Any = None
        self.result: dict[str, Any] = {}

    def __call__(self) -> None:
        """A microbatch begins."""

    def busy(self) -> Any:
        """Something without microbatches."""
        return contextlib.nullcontext()

    def ending(self) -> Any:
        """The steps, behind which it may take long."""
        return contextlib.nullcontext()

    def settled(self) -> None:
        """A step is over."""
        import torch

        done = len(self._work)
        if done == self._seen:
            return
        self._seen = done
        cuda = torch.cuda.is_available()
        if done in (1, self._first, self._last) and cuda:
            torch.cuda.synchronize()
        now = time.time()
        if done == 1:
            self.result["first_step_s"] = round(now - self._spec["started"], 1)
        if done == self._first:
            self._began = now
        if done == self._last:
            self.result["seconds"] = now - self._began
            self.result["compilations"] = compilations()
            if cuda:
                self.result["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 1)
                self.result["reserved_gib"] = round(torch.cuda.max_memory_reserved() / 2**30, 1)
            print(json.dumps(self.result), flush=True)
            if self._spec["profile"]:
                kinds = [
                    torch.profiler.ProfilerActivity.CUDA
                    if cuda
                    else torch.profiler.ProfilerActivity.CPU
                ]
                self._profiler = torch.profiler.profile(activities=kinds)
                self._profiler.__enter__()
        elif self._profiler is not None:
            if cuda:
                torch.cuda.synchronize()
            self._profiler.__exit__(None, None, None)
            self.result["profile"] = kernels(self._profiler) | {"tokens": self._work[-1].tokens}
            self._profiler = None


def compilations() -> int:
    """Graphs that torch.compile made so far in this process."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


KINDS = (
    ("attention", ("flash", "fmha", "attention", "cudnn")),
    ("matrix products", ("gemm", "nvjet", "cutlass", "xmma", "cublas", "splitk")),
    ("optimizer", ("multi_tensor", "adam", "lpnorm")),
    ("compiled", ("triton",)),
    ("copies", ("memcpy", "memset")),
)


def kernels(profiler: Any) -> dict[str, Any]:
    """Time by kind and by kernel, and the share of the step in which no kernel ran."""
    import torch

    spans, by_name = [], {}
    for event in profiler.profiler.kineto_results.events():
        if torch.cuda.is_available() and event.device_type() != torch.profiler.DeviceType.CUDA:
            continue
        if event.duration_ns() <= 0:
            continue
        spans.append((event.start_ns(), event.start_ns() + event.duration_ns()))
        total, calls = by_name.get(event.name(), (0, 0))
        by_name[event.name()] = (total + event.duration_ns(), calls + 1)
    if not spans:
        return {}
    spans.sort()
    busy, end = 0, spans[0][0]
    gaps = []
    for start, stop in spans:
        if start > end:
            gaps.append(start - end)
        busy += max(0, stop - max(start, end))
        end = max(end, stop)
    whole = end - spans[0][0]
    kinds: dict[str, float] = {}
    for name, (total, _) in by_name.items():
        low = name.lower()
        kind = next((k for k, words in KINDS if any(w in low for w in words)), "other")
        kinds[kind] = kinds.get(kind, 0) + total
    top = sorted(by_name.items(), key=lambda item: -item[1][0])[:40]
    gaps.sort(reverse=True)
    return {
        "step_ms": round(whole * 1e-6, 1),
        "gap_share": round(1 - busy / whole, 4),
        "largest_gaps_us": [round(g / 1000) for g in gaps[:12]],
        "kinds_ms": {k: round(v * 1e-6, 1) for k, v in sorted(kinds.items(), key=lambda i: -i[1])},
        "top_ms": [[name[:110], round(t * 1e-6, 2), n] for name, (t, n) in top],
    }


def settings(spec: dict[str, Any]) -> dict[str, Any]:
    """The stage's settings for a spec."""
    steps = spec["warm"] + spec["measured"] + bool(spec["profile"])
    return {
        "stage": spec["stage"], "gpus": spec["gpus"], "global_batch_size": spec["batch"],
        "packing": True,
        "seq_length": 2048 + 128, "pack_length": spec["capacity"], "train_steps": steps,
        "lr": spec["lr"], "warmup_steps": min(2, steps - 1), "weight_decay": 0.05, "clip_grad": 1.0,
        "precision": spec["precision"], "compile": spec["compile"],
        "deterministic": spec["deterministic"], "flash_attention": spec["flash_attention"],
        "num_workers": spec["workers"], "save_interval": 10**6, "seed": 7,
        **spec.get("engine", {}),
    }  # fmt: skip


def several(spec: dict[str, Any]) -> int:
    """A process for each GPU; `out` is what the first says, with the work of all replicas."""
    gpus, out = spec["gpus"], Path(spec["out"])
    line = [sys.executable, "-m", "tests.benchmarks.gpu_ours", sys.argv[1]]
    world = {"WORLD_SIZE": str(gpus), "LOCAL_WORLD_SIZE": str(gpus)}
    places = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(gpus)]
    running = [subprocess.Popen(line, env=os.environ | world | place) for place in places]
    try:
        while any(process.poll() is None for process in running):
            if any(process.poll() for process in running):
                return 1
            time.sleep(0.1)
    finally:
        for process in running:
            process.kill()
    found = [json.loads(out.with_suffix(f".{rank}.json").read_text()) for rank in range(gpus)]
    replicas = [*{f["replica"]: f for f in found}.values()]
    work = {key: sum(f["work"][key] for f in replicas) for key in replicas[0]["work"]}
    whole = {"work": work, "positions": sum(f["positions"] for f in replicas)}
    highest = {key: max(f[key] for f in found if key in f) for key in found[0] if "_gib" in key}
    out.write_text(json.dumps(found[0] | whole | highest))
    return 0


def main() -> int:
    spec = json.loads(Path(sys.argv[1]).read_text())
    if spec["gpus"] > 1 and "RANK" not in os.environ:
        return several(spec)
    out = Path(spec["out"])
    entry = out.parent / f"{out.stem}-entry"
    entry.mkdir(parents=True, exist_ok=True)
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    os.environ |= {key: os.environ.get(key, value) for key, value in alone.items()}
    os.environ |= {
        "LLAVA_STEPS_RENDEZVOUS": f"file://{entry}/rendezvous", "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false", "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    }  # fmt: skip
    import torch

    from llava_steps.geometry.costs import Work
    from llava_steps.launch.job import Job
    from llava_steps.launch.stop import StopRequest
    from llava_steps.settings.stage.stage import Stage
    from llava_steps.training import loop, parallel, start
    from llava_steps.training.guard import Counters

    stage = Stage.model_validate(settings(spec))
    log = logging.getLogger("train_gpu")
    logging.basicConfig(level=logging.INFO)
    paths = {k: Path(spec[k]) for k in ("hf_dir", "dataset")}
    job = Job(stage=stage, entry=entry, work=entry, checkpoint=entry, fingerprint="0", **paths)

    def draw(job: Job, model: Any, optimizer: Any, log: logging.Logger) -> Any:
        for chunk in model if isinstance(model, list) else [model]:
            for name, p in chunk.named_parameters():
                generator = torch.Generator(p.device).manual_seed(hash_of(name))
                if "norm" in name and name.endswith("weight"):
                    torch.nn.init.ones_(p)
                elif name.endswith("bias"):
                    torch.nn.init.zeros_(p)
                else:
                    torch.nn.init.normal_(p, std=0.02, generator=generator)
        optimizer.reload_weights()
        return Counters(), start.TrainLoader(start.loader_spec(job, "train"))

    work: list[Work] = []
    inner = loop.forward_backward

    def recorded(wrapped: Any, optimizer: Any, batch: Any, *more: Any) -> Any:
        total = Work()
        for m in batch:
            lengths = m.cu_seqlens.diff()[: len(m.sample_ids)].tolist()
            total += Work.of(lengths, m.num_supervised, m.num_images)
            row = (m.tokens.shape[1], len(lengths), max(lengths), m.num_images, m.num_supervised)
            largest[:] = max(largest, [len(batch), *row], key=lambda found: found[1:2])
        rows.append([m.tokens.shape[1] for m in batch])
        sums = inner(wrapped, optimizer, batch, *more)
        work.append(total)
        return sums

    rows: list[list[int]] = []
    largest: list[int] = []
    """Microbatches of its step: tokens, samples, longest, images, supervised, as in
    geometry/memory.py."""
    meter = Meter(spec, work)
    loop.forward_backward = recorded
    loop.restore_or_start = draw
    loop.checkpoints.check_space = lambda *a, **k: None
    loop.checkpoints.save = lambda *a, **k: entry
    with parallel.processes(stage):
        loop.train(job, log, StopRequest(), meter)
        replica = parallel.ps.get_data_parallel_rank()
    lines = [json.loads(line) for line in (entry / "metrics.jsonl").read_text().splitlines()]
    first, last = spec["warm"], spec["warm"] + spec["measured"]
    measured = sum(work[first:last], Work())
    result = meter.result | {
        "work": vars(measured), "losses": [line["loss"] for line in lines],
        "norms": [line["grad_norm"] for line in lines],
        "positions": sum(sum(r) for r in rows[first:last]), "rows": rows[first],
        "data_wait_s": round(sum(line["data_wait_s"] for line in lines[first:last]), 3),
        "data_waits_s": [line["data_wait_s"] for line in lines],
        "compilations_end": compilations(), "replica": replica, "largest": largest,
    }  # fmt: skip
    if spec["gpus"] > 1:
        out = out.with_suffix(f".{os.environ['RANK']}.json")
    out.write_text(json.dumps(result))
    sys.stdout.flush()
    os._exit(0)


def hash_of(name: str) -> int:
    """A seed for a parameter's name."""
    import zlib

    return zlib.crc32(name.removeprefix("module.").encode())


if __name__ == "__main__":
    sys.exit(main())
