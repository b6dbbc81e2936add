"""Settings of the steps from raw data to a dataset: `shard_tars`, `prepare_energon` and `audit`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator
from pydantic import NonNegativeInt as Count

from llava_steps.settings.fields import Fraction, StepConfig, quiet, source, value

Ratio3 = Annotated[list[Count], Field(min_length=3, max_length=3)]


class TarShards(StepConfig):
    """Raw images and conversations to tar shards in the webdataset layout."""

    source: str = source(
        "",
        "LLaVA JSON or JSONL beside its images; parquet with embedded images; CSV, TSV or "
        "JSONL beside its images; webdataset tars; a file, a folder, or a dataset's hub id as "
        "org/name, org/name@revision or org/name@revision/path",
        is_data=True,
        hub="dataset",
    )
    source_format: Literal["auto", "llava", "parquet", "table", "webdataset"] = value(
        "auto", "form of the source; auto: detected from the names of the files"
    )
    columns: dict[str, str] = value(
        {},
        "columns of table, parquet or JSON with other names, as FIELD=COLUMN; fields: id, "
        "image, conversations, question, answer",
    )
    question: str = value("", "question for texts that have none, such as captions")
    other_images: Literal["refuse", "jpeg"] = value(
        "refuse",
        "images that are not JPEG, PNG or WebP, such as GIF: quarantine them, or convert to JPEG, "
        "and to PNG where they are transparent; JPEG, PNG and WebP files are not changed",
    )
    decode_images: bool = value(
        False,
        "decode every image in full; otherwise only the structure of plain JPEG files is checked",
    )
    samples_per_shard: PositiveInt = value(
        1000, "samples in each tar; shard k holds [k*N, (k+1)*N)"
    )
    max_pixels: PositiveInt = value(25_000_000, "larger images are quarantined before decoding")
    quarantine_limit: Fraction = value(
        0.01, "share of refused samples above which the step fails", of_whole=True
    )
    part: str = value(
        "",
        "I/N: do only share I of N of the work, in a separate job; then join all with `parts`",
        pattern=r"^([1-9]\d*/[1-9]\d*)?$",
        selects_share=True,
    )
    parts: str = quiet("", "directory with the results of all jobs with `part`, to join them")
    remove_parts: bool = quiet(
        False, "remove the results in `parts`, also from the store, once they are joined"
    )
    workers: PositiveInt = quiet(2, "processes that read and check images")

    @model_validator(mode="after")
    def _share(self) -> TarShards:
        number, _, count = self.part.partition("/")
        if self.part and int(number) > int(count):
            raise ValueError(f"part {self.part} is out of range: give 1/{count} to {count}/{count}")
        if self.part and self.parts:
            raise ValueError("part makes one share, parts joins all of them: give only one")
        if self.remove_parts and not self.parts:
            raise ValueError(
                "remove_parts needs parts; give the directory of the parts, or leave it out"
            )
        return self


class EnergonDataset(StepConfig):
    """Tar shards to a megatron-energon dataset, without prompts."""

    tar_dir: str = source("", "directory of tar shards")
    split: Ratio3 = value([9, 1, 0], "parts of train, val and test, by shard; train is never empty")
    sample_type: Literal["VQAWebdataset"] = value("VQAWebdataset", "energon class of dataset.yaml")
    field_map: dict[str, str] = value(
        {"image": "jpg,jpeg,png,webp", "context": "json[question]", "answers": "txt"},
        "energon field map, as NAME=WHERE; dataset.yaml names those image parts that occur",
    )
    workers: PositiveInt = quiet(2, "processes that index tars")


class Audit(StepConfig):
    """Check of a stage's dataset as training will see it, before the stage is trained."""

    stage: Literal[1, 2] = value(1, "the stage that will read the dataset")
    tokenizer_load_dir: str = source("", "HF directory; in a run the stage's", of_stage=True)
    data_path: str = source(
        "",
        "energon dataset or YAML of a blend; in a run the stage's",
        is_blend=True,
        of_stage=True,
    )
    seq_length: PositiveInt = value(
        2048, "longest sample in tokens; in a run the stage's", of_stage=True
    )
    too_long: Literal["refuse", "truncate"] = value(
        "refuse", "longer samples: refuse or truncate them; in a run as the stage", of_stage=True
    )
    split: Literal["train", "val", "test"] = value("train", "split to check")
    samples: Count = value(1000, "samples to check, spread over the datasets; 0: all")
    examples: Count = value(3, "samples to print with their supervised text marked")
    thumbnails: Count = value(12, "small copies of images for the report")
