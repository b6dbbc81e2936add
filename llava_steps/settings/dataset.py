"""Settings of the way from raw data to a dataset: `shard_tars`, `prepare_energon` and `audit`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator
from pydantic import NonNegativeInt as Count

from llava_steps.settings.fields import Fraction, StepConfig, quiet, source, value

Ratio3 = Annotated[list[Count], Field(min_length=3, max_length=3)]


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
