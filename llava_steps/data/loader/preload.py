"""What a loader worker needs, imported once by the fork server that the workers come from."""

# ruff: noqa: F401
import megatron.energon.flavors.webdataset.itar_reader
import tokenizers
import transformers.models.auto.processing_auto
import transformers.models.llava.processing_llava

import llava_steps.data.loader.loader
