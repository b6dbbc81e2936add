"""Gradients of a small compiled model, and those of transformers in float64."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.helpers.model_fixtures import Tiny, _tiny, hf_model, pack_samples, samples

ROOT = Path(__file__).parents[2]


def _of_sizes(name: str, hidden: int, ffn: int, head_dim: int, scale: float = 0.1) -> Tiny:
    """Two layers, with a group of two query heads for each key head; weights of `scale`."""
    sizes = {"hidden_size": hidden, "intermediate_size": ffn, "head_dim": head_dim}
    return _tiny(name, text={**sizes, "num_hidden_layers": 2, "initializer_range": scale})


SMALL = _of_sizes("compiled", 64, 96, 16)
"""Flash attention wants multiples of 8."""
USUAL = _of_sizes("usual", 64, 96, 16, 0.02)
"""With the weights that transformers draws; the larger ones of the others show mistakes better, and
rounding too."""
WIDE = _of_sizes("wide", 128, 256, 32)
"""Sizes that FP8 products take by blocks: multiples of 128."""


@dataclass(frozen=True)
class Way:
    """How which model computes; all but `wide` and `usual` as in ModelOptions."""

    precision: str
    compiled: bool = False
    spec: str = "local"
    fp8: str | None = None
    recompute: str = "none"
    wide: bool = False
    usual: bool = False

    @property
    def tiny(self) -> Tiny:
        return WIDE if self.wide else USUAL if self.usual else SMALL

    @property
    def rows(self) -> tuple[int, int]:
        """Lengths of the two rows."""
        return (128, 128) if self.wide else (32, 20)

    @property
    def options(self) -> dict[str, Any]:
        return {k: value for k, value in asdict(self).items() if k not in ("wide", "usual")}


def megatron(get: Callable[[str], Tensor], layers: int, groups: int) -> dict[str, Tensor]:
    """What `get` gives for transformers' names, by megatron-core's names and in its form."""
    lm = "model.language_model"
    found = {
        "language_model.embedding.word_embeddings.weight": get(f"{lm}.embed_tokens.weight"),
        "language_model.decoder.final_layernorm.weight": get(f"{lm}.norm.weight"),
        "language_model.output_layer.weight": get("lm_head.weight"),
    }
    for part in ("linear_1.weight", "linear_1.bias", "linear_2.weight", "linear_2.bias"):
        found[f"mm_projector.{part}"] = get(f"model.multi_modal_projector.{part}")
    for i in range(layers):
        old, new = f"{lm}.layers.{i}", f"language_model.decoder.layers.{i}"
        q, k, v = (get(f"{old}.self_attn.{x}_proj.weight") for x in "qkv")
        parts = [x.view(groups, -1, x.shape[1]) for x in (q, k, v)]
        found[f"{new}.self_attention.linear_qkv.weight"] = torch.cat(parts, 1).flatten(0, 1)
        found[f"{new}.self_attention.linear_proj.weight"] = get(f"{old}.self_attn.o_proj.weight")
        gate, up = (get(f"{old}.mlp.{x}_proj.weight") for x in ("gate", "up"))
        found[f"{new}.mlp.linear_fc1.weight"] = torch.cat((gate, up))
        found[f"{new}.mlp.linear_fc2.weight"] = get(f"{old}.mlp.down_proj.weight")
        found[f"{new}.input_layernorm.weight"] = get(f"{old}.input_layernorm.weight")
        found[f"{new}.pre_mlp_layernorm.weight"] = get(f"{old}.post_attention_layernorm.weight")
    return found


def _model(tiny: Tiny, dtype: torch.dtype) -> Any:
    """In float64, with weights that `dtype` can hold."""
    model = hf_model(tiny)
    return model.to(dtype).double()


def expected(tiny: Tiny, dtype: torch.dtype) -> tuple[float, dict[str, Tensor]]:
    """Sum of the losses and its gradients, sample by sample, in float64."""
    return _gradients(_model(tiny, dtype), dtype)


def transformers_alone(tiny: Tiny, dtype: torch.dtype) -> float:
    """How far transformers' own gradient in `dtype` is from that in float64."""
    _, wanted = expected(tiny, dtype)
    _, found = _gradients(hf_model(tiny).to(dtype), dtype)
    apart = sum(float((found[n].double() - wanted[n]).square().sum()) for n in wanted)
    return float((apart / sum(float(w.square().sum()) for w in wanted.values())) ** 0.5)


def _gradients(model: Any, dtype: torch.dtype) -> tuple[float, dict[str, Tensor]]:
    total = 0.0
    for sample in samples(4)[:3]:
        pixels = None if sample.pixels is None else sample.pixels.to(dtype).to(model.dtype)
        out = model(input_ids=sample.tokens[None], pixel_values=pixels).logits[0]
        kept = sample.targets != -100
        out = out[kept] if out.dtype == torch.float64 else out[kept].float()
        loss = torch.nn.functional.cross_entropy(out, sample.targets[kept], reduction="sum")
        loss.backward()
        total += float(loss)
    named = dict(model.named_parameters())
    return total, megatron(lambda name: named[name].grad, 2, 2)


def build(way: Way) -> Any:
    """Our model, in Megatron's wrapper, with the weights of the reference."""
    from llava_steps.geometry.geometry import Geometry
    from llava_steps.model.llava import build_llava
    from llava_steps.model.options import DTYPES, ModelOptions
    from llava_steps.settings.stage.stage import Stage
    from llava_steps.training.optimizer import wrap

    reference = _model(way.tiny, DTYPES[way.precision])
    options = ModelOptions(**way.options)
    model = build_llava(Geometry.from_hf(reference.config.to_dict()), options)
    weights = dict(reference.named_parameters())
    named = megatron(lambda name: weights[name].data, 2, 2)
    tower = "model.vision_tower."
    named |= {
        f"vision_tower.{n.removeprefix(tower).removeprefix('vision_model.')}": p.data
        for n, p in weights.items()
        if n.startswith(tower)
    }
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(named[name])
    return wrap(Stage(stage=2), [model])[0]


def run(wrapped: Any, lengths: tuple[int, int] = (32, 20)) -> float:
    """Two rows forward and backward; the sum of their losses."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    everything, sums = samples(4), []
    chosen = ((0, 1), (2,))
    rows = [pack_samples(everything, c, n) for c, n in zip(chosen, lengths, strict=True)]

    def loss(out: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        sums.append(out.detach().double().sum())
        return out.sum(), torch.ones((), dtype=torch.int, device=out.device), {}

    def step(iterator: Any, chunk: Any) -> tuple[Tensor, Any]:
        b = next(iterator)
        place = b.tokens, b.position_ids, b.cu_seqlens, b.max_seqlen
        return chunk(*place, b.pixel_values, b.labels), loss

    wrapped.zero_grad_buffer()
    get_forward_backward_func()(
        forward_step_func=step, data_iterator=iter(rows), model=[wrapped], num_microbatches=2,
        seq_length=lengths[0], micro_batch_size=1, forward_only=False,
    )  # fmt: skip
    return float(sum(sums))


def gradients(way: Way, directory: Path) -> tuple[float, dict[str, Tensor], int]:
    """The same of our model, and the number of graphs that were compiled. Saves its weights."""
    from torch._dynamo.utils import counters

    from llava_steps.model.weights import save_weights

    if way.precision == "fp32":
        torch.backends.cudnn.allow_tf32 = False
    wrapped = build(way)
    total = run(wrapped, way.rows)
    if way.spec != "local":
        save_weights(wrapped, directory / "weights")
    named = wrapped.module.named_parameters()
    found = {n: p.main_grad.cpu().clone() for n, p in named if p.requires_grad}
    return total, found, int(counters["stats"]["unique_graphs"])


def updates(directory: Path) -> None:
    """Weights before and after three clipped updates, plain and fused."""
    from safetensors.torch import save_file

    from llava_steps.settings.stage.stage import Stage
    from llava_steps.training.optimizer import Optimizer

    stage = Stage(precision="fp32", stage=2, weight_decay=0.1, clip_grad=0.5)
    for kind in ("plain", "fused"):
        wrapped = build(Way("fp32"))

        def weights(wrapped: Any = wrapped) -> dict[str, Tensor]:
            named = wrapped.module.named_parameters()
            return {n: p.detach().clone() for n, p in named if p.requires_grad}

        optimizer = Optimizer(stage, [wrapped], fused=kind == "fused")
        optimizer.reload_weights()
        save_file(weights(), directory / "start.safetensors")
        for _ in range(3):
            optimizer.zero_grad()
            run(wrapped)
            norm = optimizer.gradient_norm()
            assert norm > 2 * stage.clip_grad
            optimizer.step(1e-2, norm)
        save_file(weights(), directory / f"{kind}.safetensors")


def command(task: str, directory: Path, way: Way | None = None) -> None:
    """Have `main` do a task in a process of its own; AssertionError with what it said."""
    line = [sys.executable, "-m", "tests.helpers.fast_model", task, str(directory)]
    line += [json.dumps(asdict(way))] if way else []
    ran = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr[-6000:]


def compare(
    directory: Path, precision: str, compiled: bool = False, **how: Any
) -> tuple[float, float, int]:
    """Relative deviations of loss and whole gradient, and the number of graphs."""
    from safetensors.torch import load_file

    from llava_steps.model.options import DTYPES

    way = Way(precision, compiled, **how)
    wanted_loss, wanted = expected(way.tiny, DTYPES[precision])
    command("gradients", directory, way)
    loss, graphs = json.loads((directory / "sums.json").read_text())
    found = load_file(directory / "gradients.safetensors")
    assert set(found) == set(wanted)
    off = {n: (found[n].double() - wanted[n]).norm() / wanted[n].norm() for n in found}
    for name, value in sorted(off.items(), key=lambda item: -item[1])[:3]:
        print(f"{way}: {name} {value:.1e}")
    error = torch.cat([(found[n].double() - wanted[n]).flatten() for n in found]).norm()
    whole = torch.cat([wanted[n].flatten() for n in found]).norm()
    return abs(loss - wanted_loss) / wanted_loss, float(error / whole), graphs


def load(directory: Path) -> None:
    """Load the weights that another spec saved into the local one; they must be the reference's."""
    from llava_steps.model.weights import load_weights

    wanted = build(Way("bf16", wide=True)).module
    found = build(Way("bf16", wide=True)).module
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.zero_()
    load_weights(found, directory / "weights")
    for name, parameter in found.named_parameters():
        assert torch.equal(parameter, wanted.get_parameter(name)), name


def main() -> None:
    """Do a task in a process of its own: a forked one cannot use CUDA."""
    from safetensors.torch import save_file

    from llava_steps.model import cpu_shim
    from tests.helpers.dist_helpers import model_parallel

    cpu_shim.install()
    task, directory = sys.argv[1], Path(sys.argv[2])
    store = dist.FileStore(str(directory / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    with model_parallel(1, 1):
        if task == "updates":
            updates(directory)
        elif task == "load":
            load(directory)
        else:
            way = Way(**json.loads(sys.argv[3]))
            if way.spec == "te" and not torch.cuda.is_available():
                from tests.helpers import te_stand_in

                te_stand_in.install()
            loss, found, graphs = gradients(way, directory)
            save_file(found, directory / "gradients.safetensors")
            (directory / "sums.json").write_text(json.dumps([loss, graphs]))
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
