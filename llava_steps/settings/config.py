"""The configuration: one frozen model per step, one `Config` for a whole run.

The YAML of a run, the flags of every step, the JSON schema in workflow/schemas and the table in
config/README.md all come from these classes. Values are checked strictly: an unknown key, a wrong
type or a number written as a string is a `ConfigError` that carries the path of the key.

A field's role is declared beside it:

* `value(...)`   an ordinary setting, part of the step's fingerprint
* `source(...)`  a path to an artefact or to a file of the user; its *content* is in the fingerprint
* `quiet(...)`   logging, labels and resources: changing it never recomputes anything
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveInt,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic import NonNegativeInt as Count

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Port = Annotated[int, Field(ge=0, le=65535)]
StepRange = Annotated[str, Field(pattern=r"^[1-9]\d*-[1-9]\d*$")]
LoraTarget = Literal["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]
Ratio3 = Annotated[list[Count], Field(min_length=3, max_length=3)]


def value(
    default: Any = ...,
    help: str = "",
    flag: str | None = None,
    bare: int | None = None,
    **bounds: Any,
) -> Any:
    """A setting that is part of the fingerprint.

    `flag` names it on the command line; `bare` is its value when the flag is given without one.
    """
    extra = _extra("value", flag) | ({} if bare is None else {"bare": bare})
    return Field(default, description=help, json_schema_extra=extra, **bounds)


def source(default: Any = ..., help: str = "", flag: str | None = None) -> Any:
    """A path whose content is part of the fingerprint. The workflow fills in upstream artefacts."""
    return Field(default, description=help, json_schema_extra=_extra("source", flag))


def quiet(default: Any = ..., help: str = "", flag: str | None = None, **bounds: Any) -> Any:
    """A logging, label or resource setting: never part of the fingerprint."""
    return Field(default, description=help, json_schema_extra=_extra("quiet", flag), **bounds)


def _extra(role: str, flag: str | None) -> dict[str, Any]:
    return {"role": role} | ({"flag": flag} if flag else {})


class StepConfig(BaseModel):
    """Base of all step settings: frozen, strict, no unknown keys.

    Validators are built when the first settings are checked: `--help` needs none of them.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, defer_build=True
    )

    seed: Count = value(1234, "seed of everything random in this step")


class DemoAssets(StepConfig):
    """Real handwritten digits, questions about them, a tiny CLIP tower and a tiny Llama."""

    image_size: PositiveInt = value(32, "side of the square scans and of the tower's input, pixels")
    patch_size: PositiveInt = value(8, "side of a patch of the tower, pixels")
    heldout_scans: PositiveInt = value(297, "scans that training never sees")
    vision_hidden_size: PositiveInt = value(64, "width of the vision tower")
    vision_layers: PositiveInt = value(3, "layers of the vision tower")
    text_hidden_size: PositiveInt = value(64, "width of the language model")
    text_layers: PositiveInt = value(4, "layers of the language model")
    text_heads: PositiveInt = value(4, "attention heads of the language model")
    text_kv_heads: PositiveInt = value(2, "key/value heads of the language model (GQA)")
    vocab_size: PositiveInt = value(512, "upper limit of the tokenizer's vocabulary")
    pretrain_vision_steps: Count = value(800, "contrastive steps of the tower on training scans")
    pretrain_text_steps: Count = value(400, "language-modelling steps on the training text")


class TarShards(StepConfig):
    """Raw images and conversations to tar shards in the webdataset layout."""

    source: str = source(
        help="LLaVA JSON or JSONL beside its images; parquet with embedded images; CSV, TSV or "
        "JSONL beside its images; webdataset tars; a file or a folder"
    )
    source_format: Literal["auto", "llava", "parquet", "table", "webdataset"] = value(
        "auto", "kind of source; auto: told from the names of the files"
    )
    columns: dict[str, str] = value(
        {},
        "columns of table, parquet or JSON with names of their own, as FIELD=COLUMN; fields: id, "
        "image, conversations, question, answer",
    )
    question: str = value("", "question for texts that have none, such as captions")
    other_images: Literal["refuse", "jpeg"] = value(
        "refuse",
        "images that are no JPEG: quarantined, or turned into JPEG; JPEG files stay as they are",
    )
    decode_images: bool = value(
        False, "decode every image in full; otherwise plain JPEG files are checked by structure"
    )
    samples_per_shard: PositiveInt = value(
        1000, "samples in each tar; shard k holds [k*N, (k+1)*N)"
    )
    max_pixels: PositiveInt = value(25_000_000, "larger images are quarantined before decoding")
    quarantine_limit: Fraction = value(0.01, "share of refused samples above which the step fails")
    part: str = value(
        "",
        "I/N: only share I of N of the work, for a job of its own; a call with `parts` ends it",
        pattern=r"^([1-9]\d*/[1-9]\d*)?$",
    )
    parts: str = quiet("", "directory of the results of all calls with `part`: put them together")
    remove_parts: bool = quiet(
        False, "remove what is in `parts`, in the store too, once the whole is there"
    )
    workers: PositiveInt = quiet(2, "processes that read and check images")

    @model_validator(mode="after")
    def _share(self) -> TarShards:
        number, _, count = self.part.partition("/")
        if self.part and int(number) > int(count):
            raise ValueError(f"part {self.part}: there are shares 1/{count} to {count}/{count}")
        if self.part and self.parts:
            raise ValueError("part makes one share, parts puts all of them together: give one")
        if self.remove_parts and not self.parts:
            raise ValueError("remove_parts is for parts; name their directory, or leave it out")
        return self


class EnergonDataset(StepConfig):
    """Tar shards to a megatron-energon dataset, without a prompt."""

    tar_dir: str = source("", "directory of tar shards")
    split: Ratio3 = value([9, 1, 0], "parts of train, val and test, by shard; train is never empty")
    sample_type: Literal["VQAWebdataset"] = value("VQAWebdataset", "energon class of dataset.yaml")
    field_map: dict[str, str] = value(
        {"image": "jpg", "context": "json[question]", "answers": "txt"},
        "energon field map, as NAME=WHERE",
    )
    workers: PositiveInt = quiet(2, "processes that index tars")


class HfModel(StepConfig):
    """Vision tower + language model + a new projector to one Hugging Face LLaVA directory."""

    vision_tower: str = source(help="CLIP directory or hub id", flag="--vision-tower")
    text_model: str = source(help="language model directory or hub id", flag="--text-model")
    chat_template: str = source("", "Jinja file instead of the text model's own chat template")
    vision_feature_layer: int = value(-2, "hidden state of the tower that the projector reads")
    vision_feature_select_strategy: Literal["default", "full"] = value(
        "default", "'default' drops the class token, 'full' keeps it"
    )
    projector_hidden_act: Literal["gelu"] = value("gelu", "activation between the projector layers")
    vocab_size_padding: Count = value(
        128,
        "embedding rows are padded to a multiple of this times tp, if they are not one; 0 pads "
        "nothing",
        flag="--vocab-size-padding",
        bare=128,
    )
    tp: PositiveInt = value(
        1, "tensor parallel size that the rows are padded for; any that divides them can train"
    )
    dtype: Literal["fp32", "bf16", "source"] = value(
        "source",
        "dtype of the saved weights; 'source' keeps the tower's and the language model's own, "
        "the projector gets the language model's",
    )


class MegatronCheckpoint(StepConfig):
    """HF safetensors to a Megatron checkpoint (torch_dist), layout-free."""

    hf_dir: str = source("", "HF LLaVA directory", flag="--hf-dir")
    tp: PositiveInt = value(
        1, "the files are cut for this tensor parallel size; they load in any layout"
    )
    pp: PositiveInt = value(
        1, "the files are cut for this pipeline parallel size; they load in any layout"
    )


class Stage(StepConfig):
    """One training stage."""

    stage: Literal[1, 2] = value(1, "1: projector; 2: projector and language model")
    megatron_load_dir: str = source("", "Megatron checkpoint to start from")
    init: bool = value(
        False,
        "draw all weights anew instead of reading megatron_load_dir, which is then not needed; "
        "what is frozen stays as drawn",
    )
    tokenizer_load_dir: str = source("", "HF directory with tokenizer, processor and config")
    data_path: str = source("", "energon dataset, or the YAML file of a blend of them")

    freeze_vision: bool = value(True, "keep the vision tower as it is")
    freeze_projector: bool = value(False, "keep the projector as it is")
    freeze_lm: bool | None = value(
        None, "keep the language model as it is; unless given, true in stage 1 and false in stage 2"
    )

    gpus: PositiveInt = value(
        1, "processes per node: GPUs, or CPU processes without one", flag="--gpus"
    )
    nodes: PositiveInt = value(1, "nodes", flag="--node")
    tensor_model_parallel: PositiveInt = value(1, "tensor parallel size", flag="--tp")
    pipeline_model_parallel: PositiveInt = value(1, "pipeline parallel size", flag="--pp")
    virtual_pipeline: PositiveInt = value(
        1,
        "chunks of layers on each pipeline rank: above 1 the interleaved schedule, with less idle "
        "time and more communication",
    )
    pipeline_split: str = value(
        "auto",
        "decoder layers of each pipeline chunk, in the order of the model, as 6,9,9; even; or "
        "auto: computed, so that the chunk with the vision tower and the one with the head have no "
        "more to do than the others",
        pattern=r"^(auto|even|[1-9]\d*(,[1-9]\d*)*)$",
    )
    sequence_parallel: bool = value(False, "shard activations between tensor-parallel regions")

    micro_batch_size: PositiveInt = value(1, "samples that go through the model together")
    global_batch_size: PositiveInt = value(1, "samples of one optimizer step, over all ranks")
    seq_length: PositiveInt = value(2048, "longest sample in tokens, image tokens included")
    too_long: Literal["refuse", "truncate"] = value(
        "refuse",
        "a longer sample: ends the training by name, or is cut after its last answer that fits",
    )
    packing: bool = value(False, "fill each microbatch with samples; micro_batch_size must be 1")
    pack_length: Count = value(0, "longest packed microbatch in tokens; 0: seq_length")
    pad_to: Literal["row", "budget"] = value(
        "row", "length of a packed microbatch: what it holds, or always pack_length"
    )
    train_steps: PositiveInt = value(1, "optimizer steps")

    lr: float = value(1e-3, "peak learning rate", gt=0)
    min_lr: float = value(0.0, "learning rate that the schedule ends with", ge=0)
    vision_lr: float | None = value(
        None, "peak learning rate of the vision tower, min_lr in proportion; unless given, lr", gt=0
    )
    projector_lr: float | None = value(
        None, "peak learning rate of the projector, min_lr in proportion; unless given, lr", gt=0
    )
    lm_lr: float | None = value(
        None,
        "peak learning rate of the language model, min_lr in proportion; unless given, lr",
        gt=0,
    )
    lr_schedule: Literal["cosine", "linear", "constant", "wsd"] = value(
        "cosine", "decay after warm-up; wsd: constant, then linear over decay_steps"
    )
    decay_steps: Count = value(0, "last steps in which the schedule wsd decays")
    warmup_steps: Count = value(0, "steps of linear warm-up; the first step already learns")
    lora_rank: Count = value(
        0, "rank of LoRA adapters on the language model, which stays frozen; 0: train it whole"
    )
    lora_alpha: float = value(16.0, "LoRA: adapters count lora_alpha / lora_rank", gt=0)
    lora_targets: list[LoraTarget] = value(
        ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"],
        "LoRA: Megatron's fused linears with adapters: query, key and value; attention output; "
        "gate and up; down",
    )
    weight_decay: float = value(
        0.0, "AdamW decay; never on norms, biases and other 1-d weights", ge=0
    )
    adam_beta1: float = value(0.9, "AdamW beta1", ge=0, lt=1)
    adam_beta2: float = value(0.999, "AdamW beta2", ge=0, lt=1)
    adam_eps: float = value(1e-8, "AdamW epsilon", gt=0)
    clip_grad: float = value(1.0, "global gradient norm limit; 0 switches clipping off", ge=0)
    precision: Literal["bf16", "fp32"] = value("bf16", "compute dtype; masters stay fp32")
    recompute: Literal["none", "core_attn", "full"] = value(
        "none", "activations that the backward pass computes again instead of keeping them"
    )
    compile: Literal["auto", "layers", "none"] = value(
        "auto",
        "layers: decoder layers, vision layers and head are compiled once, for any length; needs "
        "tensor_model_parallel 1; auto: layers on a GPU in bf16 where that can be, else none; with "
        "layer_spec te the decoder layers are left as they are",
    )
    flash_attention: Literal["auto", "torch", "fa4"] = value(
        "auto",
        "attention on a GPU in bf16: torch's kernels, or FlashAttention 4 (package flash-attn-4; "
        "Hopper and Blackwell); auto: fa4 on Hopper where that can be, else torch",
    )
    overlap_grad_reduce: bool = value(
        False, "data parallel: send gradients while the backward pass goes on"
    )
    overlap_param_gather: bool = value(
        False,
        "data parallel: fetch updated weights while the next forward pass goes on; layers are not "
        "compiled then",
    )
    bucket_size: Count = value(
        0,
        "weights whose gradients are sent together with overlap_grad_reduce; 0: 40 million, or one "
        "million for each data parallel rank if that is more",
    )
    fp8: bool = value(
        False,
        "matrix products of the decoder layers in FP8; needs a GPU from Hopper (or Ada) on, and "
        "precision bf16; layer_spec says by whose linears",
    )
    fp8_recipe: Literal["tensorwise", "blockwise"] = value(
        "tensorwise",
        "FP8: one scale for a tensor, or one for each 128 values (128 x 128 of a weight); taken "
        "anew from the values of every microbatch, nothing is kept",
    )
    layer_spec: Literal["auto", "local", "te"] = value(
        "auto",
        "linears of the decoder layers: our own, or Transformer Engine's; the checkpoint is the "
        "same; auto: te with fp8, else local; fp8 with local: products of torch within compiled "
        "layers, tensorwise",
    )
    deterministic: bool = value(True, "refuse kernels that give other bits in a second run")

    load_optim: bool = value(
        False,
        "go on with the training that megatron_load_dir was saved by: optimizer, step and place in "
        "the data too, in any parallel layout; a checkpoint inside an unfinished one will do",
    )
    save: bool = value(
        True,
        "keep the trained weights; without it no checkpoint is written at any time, for trials "
        "that nothing follows and that start anew after a stop",
    )
    save_optim: bool = value(True, "keep the optimizer in the final checkpoint, for load_optim")
    dist_optim: bool = value(True, "optimizer sharded over data parallel ranks; always on")
    image_token_id: Count | None = value(
        None, "refuse to train unless this is the id of <image> in tokenizer_load_dir"
    )
    pad_token_id: Count | None = value(
        None, "refuse to train unless this is the id of padding in tokenizer_load_dir"
    )
    no_add_class_token: bool = value(
        False, "refuse to train unless the model leaves the tower's class token out"
    )

    skip_train_iteration_range: list[StepRange] = value(
        [],
        "steps to skip, counted from 1 with both ends, as 100-110 300-400: their global batches "
        "are passed over and the schedule goes on",
    )
    spike_factor: float = value(
        0.0,
        "a loss or gradient norm above this many times the median of the last 64 updates is "
        "treated like one that is not finite; 0 looks for no spikes",
        ge=0,
    )
    max_rejected_steps: Count = value(
        10,
        "steps whose loss or gradient is not finite: their update is left out, their samples are "
        "named; one step more than this and the training rolls back",
    )
    max_rollbacks: Count = value(
        1,
        "times that weights and optimizer go back to the last checkpoint, while the stream of "
        "samples goes on; one time more ends the training with exit code 6",
    )

    exit_before: float = quiet(
        0.0,
        "minutes after its start, inputs included that are read first, at which the training has "
        "stopped in order, saved, with exit code 75; time for a save is set aside; 0 is no limit",
        ge=0,
    )
    stall_timeout: Count = quiet(
        60,
        "seconds without a further microbatch on any rank after which the job ends, with the stack "
        "of each process in its log; 0 waits for ever",
    )
    io_timeout: Count = quiet(
        1800,
        "the same for what takes longer: the start with the first step, saves, going back to a "
        "checkpoint; 0 waits for ever",
    )
    num_workers: Count = quiet(2, "loader worker processes per rank")
    loader_timeout: PositiveInt = quiet(
        600, "seconds without a further sample after which a loader worker is given up"
    )
    save_interval: PositiveInt = quiet(1000, "steps between checkpoints")
    async_save: bool = quiet(
        False,
        "train on while a checkpoint is digested and flushed; a kill meanwhile goes back to the "
        "one before",
    )
    keep_checkpoints: PositiveInt = quiet(2, "newest checkpoints that are kept while training")
    keep_every: Count = quiet(
        0, "also keep each checkpoint whose step is a multiple of this, in `.work/kept` at the end"
    )
    eval_interval: Count = quiet(
        0, "steps between looks at the val split: loss and token accuracy, also at the end; 0: none"
    )
    eval_samples: PositiveInt = quiet(256, "samples of the val split that are looked at, at most")
    eval_answers: Count = quiet(
        0, "questions of the val split that are answered, greedily, before each checkpoint"
    )
    eval_new_tokens: PositiveInt = quiet(32, "tokens of such an answer, at most")
    log_interval: PositiveInt = quiet(1, "steps between progress lines")
    name: str = quiet("", "label of the run in logs and trackers")
    peak_tflops: float = quiet(
        0.0,
        "what a GPU can do at most at this precision, in 10^12 operations a second, for the share "
        "of it that training uses (MFU); 0: known from the GPU's name, or else not told",
        ge=0,
    )
    wandb: bool = quiet(False, "log to Weights & Biases")
    wandb_mode: Literal["offline", "online"] = quiet(
        "offline", "keep in `.work/wandb`, or send to W&B at once; WANDB_MODE goes before it"
    )
    wandb_project: str = quiet("llava-steps", "W&B project")
    wandb_entity: str = quiet("", "W&B user or team; your default one unless given")
    wandb_group: str = quiet("", "W&B group of runs")
    wandb_tags: list[str] = quiet([], "W&B tags, beside the stage and the language")
    tensorboard: bool = quiet(
        False, "TensorBoard files in `.work/tensorboard` (pip install 'llava-steps[tensorboard]')"
    )
    lang: Literal["", "jp", "en"] = quiet("", "main language, a tag in trackers")
    slurm_job_id: str = quiet("", "job id in logs and trackers; SLURM_JOB_ID unless given")
    slurm_output_name: str = quiet("", "output file of the job, a note in logs and trackers")
    debug: bool = quiet(False, "verbose collectives (torch, NCCL) and C++ stacks in the logs")
    gpu_ids: str = quiet("", "GPUs to use, as 0,1,2; all visible ones unless given")
    interface: str = quiet("", "network interface of NCCL and Gloo, such as eth0")
    backend: Literal["auto", "nccl", "gloo"] = quiet("auto", "collectives; auto: nccl with GPUs")
    master_addr: str = quiet(
        "", "address of the first node; that of its interface, or its name, unless given"
    )
    master_port: Port = quiet(0, "port on the first node where all processes meet; 0: a free one")
    rdzv_port: Port = quiet(0, "port on the first node where launchers meet; 0: a free one")
    rank: Count = quiet(0, "number of this node; not needed under srun and torchrun", flag="--rank")

    @property
    def world_size(self) -> int:
        """Processes in all: nodes x processes per node."""
        return self.gpus * self.nodes

    @property
    def data_parallel(self) -> int:
        """World size over tensor and pipeline parallel sizes."""
        return self.world_size // (self.tensor_model_parallel * self.pipeline_model_parallel)

    @property
    def transformer_engine(self) -> bool:
        """Whether the decoder layers have Transformer Engine's linears."""
        return self.layer_spec == "te" or (self.fp8 and self.layer_spec == "auto")

    def compiles(self, cuda: bool) -> bool:
        """Whether layers are compiled, on a machine with GPUs (`cuda`) or without."""
        if self.compile != "auto":
            return self.compile == "layers"
        return cuda and self.precision == "bf16" and not self.not_compiled()

    def not_compiled(self) -> str:
        """What these settings would need for compiled layers; empty when nothing is in the way."""
        if self.tensor_model_parallel > 1:
            return f"tensor_model_parallel 1, not {self.tensor_model_parallel}"
        if self.recompute == "core_attn":
            return "recompute none or full: compiled attention keeps no scores"
        for name in ("lora_rank", "overlap_param_gather"):
            if getattr(self, name, False):
                return f"no {name}: compiled layers pass over the hooks that it works with"
        return ""

    def no_fp8_of_torch(self) -> str:
        """What these settings would need for it; empty when nothing is in the way."""
        if self.fp8_recipe != "tensorwise":
            return f"fp8_recipe tensorwise, not {self.fp8_recipe}"
        if self.compile == "none":
            return "compile auto or layers"
        return self.not_compiled()

    def _check_transformer_engine(self) -> None:
        if self.fp8_recipe != "tensorwise" and not self.fp8:
            raise ValueError(f"fp8_recipe {self.fp8_recipe} is for fp8; set that, or remove it")
        if self.fp8 and self.layer_spec == "local" and (obstacle := self.no_fp8_of_torch()):
            raise ValueError(
                f"fp8 with layer_spec local is for compiled layers, and needs {obstacle}; or set "
                "layer_spec to te"
            )
        if not (self.fp8 or self.transformer_engine):
            return
        asked = "fp8" if self.fp8 else "layer_spec te"
        if self.precision != "bf16":
            raise ValueError(f"{asked} needs precision bf16, not {self.precision}")
        if self.recompute == "core_attn":
            raise ValueError(
                f"{asked}: the attention of its layers keeps no scores to compute again; set "
                "recompute to none or full"
            )
        if self.lora_rank:
            raise ValueError(
                f"{asked} is not for LoRA, whose adapters are added to our own linears: set "
                "lora_rank to 0, or leave it out"
            )

    def _check_pipeline(self) -> None:
        pp, vp = self.pipeline_model_parallel, self.virtual_pipeline
        if vp > 1 and pp == 1:
            raise ValueError(
                f"virtual_pipeline {vp} is for pipelines: set pipeline_model_parallel above 1, or "
                "leave it out"
            )
        if self.pipeline_split not in ("auto", "even"):
            chunks = len(self.pipeline_split.split(","))
            if chunks != pp * vp:
                raise ValueError(
                    f"pipeline_split {self.pipeline_split} has {chunks} numbers; "
                    f"pipeline_model_parallel x virtual_pipeline = {pp * vp} are needed, or auto"
                )
        share = self.micro_batch_size * self.data_parallel * pp
        if vp > 1 and self.global_batch_size % share:
            raise ValueError(
                f"virtual_pipeline {vp} needs as many microbatches on each rank as a multiple of "
                f"pipeline_model_parallel {pp}: set global_batch_size {self.global_batch_size} to "
                f"a multiple of micro_batch_size x data parallel size x {pp} = {share}"
            )

    @model_validator(mode="before")
    @classmethod
    def _frozen_by_stage(cls, given: Any) -> Any:
        # Settled here, so that the same training has the same settings however it is asked for.
        if isinstance(given, dict) and given.get("freeze_lm") is None:
            return given | {"freeze_lm": given.get("stage", 1) == 1}
        return given

    @model_validator(mode="after")
    def _consistent(self) -> Stage:
        model = self.tensor_model_parallel * self.pipeline_model_parallel
        if self.world_size % model:
            raise ValueError(
                f"tensor_model_parallel x pipeline_model_parallel = {model} does not divide "
                f"gpus x nodes = {self.world_size}; change gpus, nodes or the parallel sizes"
            )
        share = self.micro_batch_size * self.data_parallel
        if self.global_batch_size % share:
            raise ValueError(
                f"global_batch_size {self.global_batch_size} is not a multiple of "
                f"micro_batch_size x data parallel size = {share}"
            )
        if self.compile == "layers" and (obstacle := self.not_compiled()):
            raise ValueError(f"compile layers needs {obstacle}; or set compile to auto or none")
        self._check_pipeline()
        if self.packing and self.micro_batch_size != 1:
            raise ValueError(
                f"packing fills each microbatch by itself: micro_batch_size is "
                f"{self.micro_batch_size}, set it to 1"
            )
        if self.packing and 0 < self.pack_length < self.seq_length:
            raise ValueError(
                f"pack_length {self.pack_length} is below seq_length {self.seq_length}: a sample "
                "may not fit; raise it"
            )
        if not self.packing and (self.pack_length or self.pad_to != "row"):
            raise ValueError("pack_length and pad_to are for packing; set packing or remove them")
        self._check_transformer_engine()
        if self.flash_attention == "fa4" and self.precision != "bf16":
            raise ValueError(
                f"flash_attention fa4 needs precision bf16, not {self.precision}; set it to auto, "
                "which has no flash attention there"
            )
        if not self.dist_optim:
            raise ValueError(
                "dist_optim is always on; with one data parallel rank it costs nothing"
            )
        if self.init and self.load_optim:
            raise ValueError("init starts anew and load_optim goes on: give one of them")
        ids = self.gpu_ids.split(",") if self.gpu_ids else []
        if ids and (not all(i.strip().isdigit() for i in ids) or len(set(ids)) < self.gpus):
            raise ValueError(
                f"gpu_ids {self.gpu_ids!r} must list at least gpus = {self.gpus} different numbers"
            )
        if self.sequence_parallel and self.tensor_model_parallel == 1:
            raise ValueError("sequence_parallel needs tensor_model_parallel > 1")
        if self.lr_schedule == "wsd" and not (
            0 < self.decay_steps <= self.train_steps - self.warmup_steps
        ):
            raise ValueError(
                f"lr_schedule wsd: decay_steps {self.decay_steps} must be 1 to train_steps - "
                f"warmup_steps = {self.train_steps - self.warmup_steps}"
            )
        if self.lr_schedule != "wsd" and self.decay_steps:
            raise ValueError(f"decay_steps is for lr_schedule wsd, not {self.lr_schedule}")
        if self.warmup_steps >= self.train_steps:
            raise ValueError(
                f"warmup_steps {self.warmup_steps} must be below train_steps {self.train_steps}"
            )
        for text in self.skip_train_iteration_range:
            first, _, last = text.partition("-")
            if int(first) > int(last):
                raise ValueError(f"skip_train_iteration_range {text} ends before it begins")
        if 0 < self.spike_factor <= 1:
            raise ValueError(f"spike_factor {self.spike_factor} must be above 1, or 0")
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr {self.min_lr} is above lr {self.lr}")
        for rate, frozen in (
            ("vision_lr", "freeze_vision"),
            ("projector_lr", "freeze_projector"),
            ("lm_lr", "freeze_lm"),
        ):
            if getattr(self, rate) is not None and getattr(self, frozen):
                raise ValueError(
                    f"{rate} {getattr(self, rate)} is for what {frozen} freezes: leave it out, or "
                    f"set {frozen} to false"
                )
        if self.lora_rank and self.freeze_lm:
            raise ValueError(
                f"lora_rank {self.lora_rank} trains the language model, freeze_lm keeps it: set "
                "freeze_lm to false (its own weights stay frozen under LoRA), or lora_rank to 0"
            )
        if not self.lora_targets or len(set(self.lora_targets)) < len(self.lora_targets):
            raise ValueError(
                f"lora_targets {self.lora_targets}: name each linear once, one at least"
            )
        if self.overlap_param_gather and not self.overlap_grad_reduce:
            raise ValueError("overlap_param_gather needs overlap_grad_reduce; set it as well")
        if self.bucket_size and not self.overlap_grad_reduce:
            raise ValueError("bucket_size is for overlap_grad_reduce; set that, or remove it")
        if self.freeze_vision and self.freeze_projector and self.freeze_lm:
            raise ValueError("everything is frozen: there is nothing to train")
        return self


class Audit(StepConfig):
    """What a stage's dataset looks like to training; checked before the stage is trained."""

    stage: Literal[1, 2] = value(1, "the stage that will read the dataset")
    tokenizer_load_dir: str = source("", "HF directory; in a run that of the stage")
    data_path: str = source("", "energon dataset or YAML of a blend; in a run that of the stage")
    seq_length: PositiveInt = value(2048, "longest sample in tokens; in a run that of the stage")
    too_long: Literal["refuse", "truncate"] = value(
        "refuse", "what is done with longer samples; in a run that of the stage"
    )
    split: Literal["train", "val", "test"] = value("train", "split to look at")
    samples: Count = value(1000, "samples to look at, spread over the datasets; 0: all")
    examples: Count = value(3, "samples to print with their supervised text marked")
    thumbnails: Count = value(12, "small copies of images kept for the report")


class HfExport(StepConfig):
    """Megatron checkpoint to HF safetensors."""

    megatron_dir: str = source("", "Megatron checkpoint directory", flag="--megatron-dir")
    tokenizer_dir: str = source("", "HF directory that gives config, tokenizer and processor")
    export_format: Literal["transformers-5", "transformers-4"] = value(
        "transformers-5",
        "versions of transformers that read the result: 5 (files laid out as in tokenizer_dir), or "
        "4.45 to 4.57 and 5",
    )
    tp: PositiveInt = value(1, "recorded for readers of old scripts; any layout can be read")
    pp: PositiveInt = value(1, "recorded for readers of old scripts; any layout can be read")


class Evaluation(StepConfig):
    """Exact-match accuracy and other scores of HF LLaVA directories on held-out data."""

    data: str = source(help="LLaVA JSON or JSONL file that training never saw")
    before: str = source("", "HF directory before training")
    after_stage1: str = source("", "HF directory after stage 1")
    after_stage2: str = source("", "HF directory after stage 2")
    max_new_tokens: PositiveInt = value(16, "tokens generated at most for an answer")
    metrics: list[Literal["vqa_accuracy", "rouge_l", "cider", "perplexity"]] = value(
        [],
        "scores beside exact match: vqa_accuracy, rouge_l, cider, perplexity (of the references)",
    )
    prompts: list[str] = value(
        [], "questions to ask each model about the first images of `data`; read, not scored"
    )
    prompt_images: PositiveInt = value(4, "images that `prompts` are asked about")
    prompt_tokens: PositiveInt = value(64, "tokens generated at most for an answer to `prompts`")
    batch_size: PositiveInt = quiet(64, "questions answered together")
    samples_shown: Count = value(8, "sample answers kept per question kind")

    @field_validator("prompts")
    @classmethod
    def _prompts_are_text(cls, prompts: list[str]) -> list[str]:
        for prompt in prompts:
            if not prompt.strip() or "<image>" in prompt:
                raise ValueError(
                    f"prompt {prompt!r}: give a text without <image>; the image stands before it"
                )
        return prompts


class LmmsEval(StepConfig):
    """Tasks of lmms-eval on the export, where it is installed. Left out of a run without tasks."""

    model: str = source("", "HF LLaVA directory")
    tasks: list[str] = value(
        [], "tasks of lmms-eval, as mme or pope, groups and tags too; empty: the step is left out"
    )
    task_files: str = source("", "folder with tasks of your own, for its --include_path")
    limit: Count = value(0, "questions of each task; 0: all")
    model_args: dict[str, str] = value({}, "more for its --model_args, as NAME=VALUE")
    python: str = quiet("", "Python of the environment that has lmms-eval; empty: this one")


class LlmJpEvalMm(StepConfig):
    """Tasks of llm-jp-eval-mm on the export, where it is installed. Left out of a run without
    tasks."""

    model: str = source("", "HF LLaVA directory")
    tasks: dict[str, str] = value(
        {},
        "tasks of llm-jp-eval-mm with their metrics, separated by commas, as "
        "ja-vg-vqa-500=rougel; empty: the step is left out",
    )
    limit: Count = value(0, "questions of each task; 0: all")
    max_new_tokens: PositiveInt = value(256, "tokens generated at most for an answer")
    judge_model: str = value("", "model that judges, for metrics that ask one")
    batch_size: PositiveInt = quiet(1, "questions answered together")
    python: str = quiet("", "Python of the environment that has eval_mm; empty: this one")


class Report(StepConfig):
    """One page about a run, from the results of its other steps."""

    title: str = value("", "title of the page; in a run its name")
    samples: PositiveInt = value(2, "sample answers shown per question kind")
    demo_assets: str = source("", "result of demo_assets")
    tar_shards: str = source("", "result of shard_tars")
    energon_dataset: str = source("", "result of prepare_energon")
    hf_model: str = source("", "result of build_hf")
    megatron_checkpoint: str = source("", "result of hf_to_megatron")
    stage1_audit: str = source("", "result of audit for stage 1")
    stage2_audit: str = source("", "result of audit for stage 2")
    stage1_checkpoint: str = source("", "result of train, stage 1")
    stage1_export: str = source("", "result of megatron_to_hf after stage 1")
    stage2_checkpoint: str = source("", "result of train, stage 2")
    hf_export: str = source("", "result of megatron_to_hf after stage 2")
    evaluation: str = source("", "result of evaluate")
    lmms_eval: str = source("", "result of lmms_eval")
    llm_jp_eval_mm: str = source("", "result of llm_jp_eval_mm")


RULES = (
    "demo_assets", "tar_shards", "energon_dataset", "hf_model", "megatron_checkpoint",
    "stage1_audit", "stage1_checkpoint", "stage1_export", "stage2_audit", "stage2_checkpoint",
    "hf_export", "evaluation", "lmms_eval", "llm_jp_eval_mm", "report",
)  # fmt: skip
"""Rules of the workflow, which are also what the keys of `cluster` may name."""

PerRule = dict[str, PositiveInt]


class Cluster(BaseModel):
    """What jobs ask Slurm for, as RULE: NUMBER. Rules that are not named get what the profile says;
    nodes and GPUs are those of the stages. Nothing here recomputes anything."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, defer_build=True)

    gres: str = Field(
        "",
        pattern=r"^[A-Za-z0-9_.:-]*$",
        description="Slurm's name of a node's GPUs without their number, as gpu or gpu:h100; "
        "empty: jobs ask for none",
    )
    runtime: PerRule = Field(
        {"stage1_checkpoint": 1440, "stage2_checkpoint": 1440},
        description="minutes; a training that needs more is submitted again and goes on",
    )
    mem_mb: PerRule = Field(
        {"stage1_checkpoint": 200_000, "stage2_checkpoint": 200_000},
        description="memory of a node, MB",
    )
    cpus: PerRule = Field({}, description="CPUs of a task; unless given what its processes need")
    jobs: PerRule = Field(
        {},
        description="jobs that share the work of tar_shards; without Slurm they run side by side",
    )

    @field_validator("jobs")
    @classmethod
    def _shared(cls, asked: PerRule) -> PerRule:
        if others := sorted({*asked} - {"tar_shards"}):
            raise ValueError(f"{others[0]} is one job: only the work of tar_shards can be shared")
        return asked

    @field_validator("runtime", "mem_mb", "cpus")
    @classmethod
    def _rules(cls, asked: PerRule, info: ValidationInfo) -> PerRule:
        for name in asked:
            if name not in RULES:
                raise ValueError(f"{name} is no rule; they are {', '.join(RULES)}")
        return {**cls.model_fields[str(info.field_name)].default, **asked}


class Config(BaseModel):
    """A whole run: config/config.yaml with its overlays."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, defer_build=True)

    run: str = Field(
        "demo",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="name of the run: results/<run>",
    )
    results: str = Field(
        "results",
        pattern=r"^[^{}\x00-\x1f]+$",
        description="directory of the runs' results; no braces, they are wildcards to Snakemake",
    )
    store: str = Field(
        "store", min_length=1, description="directory of the artefacts, shared by runs"
    )
    image: str = Field(
        "",
        # Snakemake puts it into its command lines as it is.
        pattern=r"^([A-Za-z0-9_./][A-Za-z0-9_./:@+=,~-]*)?$",
        description="container image for the steps: a file, without spaces in its path, or "
        "docker://...@sha256:...; empty: this environment",
    )
    cluster: Cluster = Field(default_factory=Cluster)
    demo_assets: DemoAssets | None = Field(None, description="makes the demo's data and models")
    tar_shards: TarShards
    energon_dataset: EnergonDataset = Field(default_factory=EnergonDataset)
    hf_model: HfModel
    megatron_checkpoint: MegatronCheckpoint = Field(default_factory=MegatronCheckpoint)
    audit: Audit = Field(default_factory=Audit)
    stage1: Stage
    stage2: Stage
    hf_export: HfExport = Field(default_factory=HfExport)
    evaluation: Evaluation
    lmms_eval: LmmsEval = Field(default_factory=LmmsEval)
    llm_jp_eval_mm: LlmJpEvalMm = Field(default_factory=LlmJpEvalMm)
    report: Report = Field(default_factory=Report)

    @field_validator("run", "results", "store")
    @classmethod
    def _can_be_made(cls, path: str) -> str:
        if any(len(name.encode()) > 255 for name in path.split("/")):
            raise ValueError("no file system takes a name of more than 255 bytes")
        return path

    @model_validator(mode="after")
    def _shared_in_one_way(self) -> Config:
        if self.cluster.jobs and (self.tar_shards.part or self.tar_shards.parts):
            raise ValueError(
                "cluster.jobs sets part and parts of tar_shards for each job: leave them out"
            )
        return self

    @field_validator("audit")
    @classmethod
    def _audits_are_of_stages(cls, audit: Audit) -> Audit:
        taken = {"stage", "tokenizer_load_dir", "data_path", "seq_length", "too_long"}
        if given := sorted(taken & audit.model_fields_set):
            raise ValueError(f"{given[0]} is that of each stage; set it in stage1 and stage2")
        return audit
