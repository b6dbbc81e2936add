"""Convert a Megatron checkpoint to a Hugging Face LLaVA directory.

    llava-steps megatron_to_hf --megatron-dir results/demo/stage2_checkpoint \\
        --tokenizer-dir results/demo/hf_model --hf-dir results/demo/hf_export

The newest committed iteration is converted. Config, tokenizer, processor, chat template and
generation config are copied from --tokenizer-dir, whose weight files also give names, shards and
dtypes. Weights that were not trained are byte-identical to it. --export-format transformers-4
writes names and files that transformers 4.45 to 4.57 read too.
"""

from __future__ import annotations

from llava_steps.core.errors import StepError
from llava_steps.settings.conversion import HfExport
from llava_steps.store.run import main
from llava_steps.store.step import Context, Step


def run(ctx: Context, cfg: HfExport) -> dict[str, object]:
    """Write the HF directory into the entry."""
    from llava_steps.conversion.convert import copy_companions, count_entries, dcp_to_hf
    from llava_steps.conversion.export_format import (
        complete_processor,
        older_layout,
        rewrite_companions,
    )
    from llava_steps.conversion.lora import open_weights
    from llava_steps.conversion.selfcheck import compare_layers
    from llava_steps.conversion.tensors import TensorDirectory
    from llava_steps.data.samples import saved_prompts
    from llava_steps.geometry.geometry import Geometry
    from llava_steps.geometry.hf_directory import read_object
    from llava_steps.store.commit import latest_commit, read_commit

    template = ctx.inputs["tokenizer_dir"].path
    checkpoint = latest_commit(ctx.inputs["megatron_dir"].path)
    # Every byte: values that changed on disk would silently make the model worse.
    read_commit(checkpoint)
    geometry = Geometry.load(template)
    with (
        TensorDirectory(template) as tensors,
        ctx.progress("converting", total=count_entries(geometry)) as bar,
    ):
        copied = copy_companions(tensors, ctx.entry)
        complete_processor(ctx.entry)
        try:
            saved_prompts.rewrite(ctx.entry)
        except StepError as error:
            ctx.log.warning("tokenizer and chat template are exported as they are: %s", error)
        weights, layout = checkpoint / "weights", tensors
        if cfg.export_format == "transformers-4":
            rewrite_companions(ctx.entry, geometry)
            layout = older_layout(tensors)
        certificate = dcp_to_hf(geometry, weights, layout, ctx.entry, bar.advance)
    text = read_object(template / "config.json")["text_config"]
    with TensorDirectory(ctx.entry) as written:
        forward = compare_layers(geometry, text, written, open_weights(weights))
    ctx.log.info("%s -> %d tensors", checkpoint.name, certificate["hf_tensors"])
    return {
        "certificate": certificate,
        "forward": forward,
        "checkpoint": checkpoint.name,
        "export_format": cfg.export_format,
        "copied": copied,
        "tp": cfg.tp,
        "pp": cfg.pp,
    }


STEP = Step(
    name="hf_export", config=HfExport, run=run, doc=__doc__, result_flags=("--save-dir", "--hf-dir")
)
if __name__ == "__main__":
    main(STEP)
