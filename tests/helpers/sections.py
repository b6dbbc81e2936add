"""The sections of a configuration with one dataset and two stages."""

from collections.abc import Iterator

from pydantic import BaseModel

from llava_steps.settings import explain
from llava_steps.settings.config import Config
from llava_steps.settings.forms import FIRST_STAGES
from llava_steps.settings.stage.stage import Stage


def sections() -> Iterator[tuple[str, type[BaseModel]]]:
    """(name, settings class), with stage1 and stage2 as sections."""
    for name, model in explain.sections():
        if name == "stages":
            yield from dict.fromkeys(FIRST_STAGES, Stage).items()
        elif name != "datasets":
            yield name, model


def section(config: Config, name: str) -> BaseModel:
    """The settings of a section."""
    found: BaseModel = config.stages.get(name) or getattr(config, name)
    return found
