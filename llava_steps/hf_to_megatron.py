"""Convert a Hugging Face LLaVA directory to a Megatron checkpoint.

    llava-steps hf_to_megatron --hf-dir results/demo/hf_model \\
        --megatron-dir results/demo/megatron_checkpoint

Converts tensor by tensor; needs no GPU. The checkpoint loads at any tensor, pipeline and data
parallel size; its files are split for --tp and --pp.
"""

from __future__ import annotations

from llava_steps.settings.conversion import MegatronCheckpoint
from llava_steps.store.run import main
from llava_steps.store.step import Context, Step


def run(ctx: Context, cfg: MegatronCheckpoint) -> dict[str, object]:
    """Write `iter_0000000/weights/` and commit it."""
    from llava_steps.conversion.convert import count_entries, hf_to_dcp
    from llava_steps.conversion.selfcheck import compare_layers
    from llava_steps.conversion.tensors import TensorDirectory
    from llava_steps.conversion.torch_dist_write import Reader
    from llava_steps.core import filesystem
    from llava_steps.geometry.geometry import Geometry
    from llava_steps.geometry.hf_directory import read_object
    from llava_steps.store.commit import commit_dir, iteration_name

    source = ctx.inputs["hf_dir"].path
    geometry = Geometry.load(source)
    final = ctx.entry / iteration_name(0)
    temporary = ctx.entry / f"{filesystem.TEMPORARY}{final.name}"
    with (
        TensorDirectory(source) as tensors,
        ctx.progress("converting", total=count_entries(geometry)) as bar,
    ):
        certificate = hf_to_dcp(
            geometry, tensors, temporary / "weights", bar.advance, cfg.tp, cfg.pp
        )
        text = read_object(source / "config.json")["text_config"]
        forward = compare_layers(geometry, text, tensors, Reader(temporary / "weights"))
    commit_dir(temporary, final, {"iteration": 0, "tp": cfg.tp, "pp": cfg.pp})
    ctx.log.info("%(hf_tensors)d HF tensors -> %(megatron_tensors)d Megatron tensors", certificate)
    return {"certificate": certificate, "forward": forward, "tp": cfg.tp, "pp": cfg.pp}


STEP = Step(
    name="megatron_checkpoint",
    config=MegatronCheckpoint,
    run=run,
    doc=__doc__,
    result_flags=("--save-dir", "--megatron-dir"),
)
if __name__ == "__main__":
    main(STEP)
