"""Random recipes, and which values each needs by a model that knows nothing of the workflow."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

PARTS = (["projector"], ["projector", "language_model"], ["language_model"], "all")

Value = tuple[Any, ...]


@dataclass
class Recipe:
    """Datasets, stages and a sweep, as YAML and as values."""

    seed: int
    datasets: dict[str, dict[str, Any]] = field(default_factory=dict)
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    sweep: dict[str, list[Any]] = field(default_factory=dict)
    contents: dict[str, str] = field(default_factory=dict)
    """What each dataset holds."""

    def text(self) -> str:
        """The configuration."""
        return yaml.safe_dump(
            {
                "standalone": True,
                "run": "random",
                "datasets": self.datasets,
                "hf_model": {"vision_tower": "tower", "text_model": "text"},
                "stages": self.stages,
                "evaluation": {"data": "heldout.json"},
                **({"sweep": self.sweep} if self.sweep else {}),
            },
            sort_keys=False,
        )

    def write(self, root: Path) -> None:
        """The configuration and the files that it names."""
        (root / "recipe.yaml").write_text(self.text())
        (root / "heldout.json").write_text("[]")
        for name in ("tower", "text"):
            (root / name).mkdir(exist_ok=True)
            (root / name / "config.json").write_text("{}")
        for name, dataset in self.datasets.items():
            where = root / (dataset.get("source") or f"{dataset['path']}/data")
            where.parent.mkdir(exist_ok=True)
            where.write_text(self.contents[name])

    def values(self) -> Counter[str]:
        """How many values of each step a run of it needs."""
        return Counter(str(value[0]) for value in self.all_values())

    def all_values(self) -> set[Value]:
        """The values that a run of it needs."""
        needed: set[Value] = set()
        for stages, label in self._variants():
            needed |= self._of_variant(stages, label)
        if self.sweep:
            needed.add(("comparison", *sorted(self._shown(needed), key=repr)))
        return needed

    @staticmethod
    def _shown(needed: set[Value]) -> set[Value]:
        """What a comparison shows: evaluations and trainings."""
        return {v for v in needed if v[0] == "evaluation" or str(v[0]).endswith("_checkpoint")}

    def _variants(self) -> Iterator[tuple[dict[str, dict[str, Any]], str]]:
        if not self.sweep:
            yield self.stages, ""
            return
        ((key, choices),) = self.sweep.items()
        stage = key.split(".")[1]
        for choice in choices:
            yield self.stages | {stage: self.stages[stage] | {"lr": choice}}, str(choice)

    def _of_variant(self, stages: dict[str, dict[str, Any]], label: str) -> set[Value]:
        hf: Value = ("hf_model",)
        trained: dict[str, Value] = {"megatron_checkpoint": ("megatron_checkpoint", hf)}
        needed: set[Value] = set()
        models: list[tuple[str, Value]] = [("before", hf)]
        names = [*stages]
        for name, stage in stages.items():
            data = self._data(stage["data"])
            # A stage that trains no language model has the number 1.
            named = ["language_model"] if stage["train"] == "all" else stage["train"]
            number = 2 if "language_model" in named else 1
            start = trained[self._start(stages, name)]
            made = (f"stage{number}_checkpoint", str(stage["train"]), stage["lr"], start, hf, data)
            trained[name] = made
            audit: Value = (f"stage{number}_audit", hf, data)
            # Every stage is trained: for others, for its export, or for its own sake.
            needed |= {made} | ({audit} if stage.get("audit", True) else set())
            if name == names[-1] or stage.get("export", True):
                models.append((name, ("hf_export", made, hf)))
        needed.add(("evaluation", tuple(models)))
        shown = {inner for value in needed for inner in _all(value)}
        return shown | {("report", label, *sorted(shown, key=repr))}

    @staticmethod
    def _start(stages: dict[str, dict[str, Any]], name: str) -> str:
        if "from" in stages[name]:
            return str(stages[name]["from"])
        names = [*stages]
        position = names.index(name)
        return names[position - 1] if position else "megatron_checkpoint"

    def _data(self, given: Any) -> Value:
        if isinstance(given, str):
            return self._dataset(given)
        items = given.items() if isinstance(given, dict) else ((name, None) for name in given)
        members = [(name, weight, self._dataset(name)) for name, weight in items]
        if len(members) == 1:
            return members[0][2]
        return ("blend", tuple(members))

    def _dataset(self, name: str) -> Value:
        dataset = self.datasets[name]
        if "path" in dataset:
            return ("-", self.contents[name])
        shards = ("tar_shards", self.contents[name], dataset.get("samples_per_shard"))
        return ("energon_dataset", shards)


def _all(value: Value) -> Iterator[Value]:
    """A value of a step and every such value inside it."""
    if value and isinstance(value[0], str) and value[0] in STEPS:
        yield value
    for inner in value:
        if isinstance(inner, tuple):
            yield from _all(inner)


STEPS = {
    "tar_shards", "energon_dataset", "hf_model", "megatron_checkpoint", "blend", "stage1_audit",
    "stage2_audit", "stage1_checkpoint", "stage2_checkpoint", "hf_export", "evaluation",
}  # fmt: skip


def generate(seed: int) -> Recipe:
    """A recipe; equal seeds give equal ones."""
    draw = random.Random(seed)
    recipe = Recipe(seed)
    for number in range(draw.randint(1, 4)):
        name = f"data{number}"
        recipe.contents[name] = f"content {number}"
        if draw.random() < 0.3:
            recipe.datasets[name] = {"path": f"prepared{number}"}
        else:
            recipe.datasets[name] = {"source": f"raw/{number}.json"}
            if draw.random() < 0.5:
                recipe.datasets[name]["samples_per_shard"] = draw.randint(1, 99)
    for number in range(draw.randint(1, 4)):
        stage: dict[str, Any] = {"data": _draw_data(draw, [*recipe.datasets])}
        stage |= {"train": draw.choice(PARTS), "lr": draw.choice([1e-3, 2e-4])}
        if number and draw.random() < 0.4:
            stage["from"] = draw.choice(["megatron_checkpoint", *recipe.stages])
        for key in ("export", "audit"):
            if draw.random() < 0.3:
                stage[key] = False
        recipe.stages[f"part{number}"] = stage
    if draw.random() < 0.5:
        swept = draw.choice([*recipe.stages])
        recipe.sweep = {f"stages.{swept}.lr": [5e-4, 6e-4, 7e-4][: draw.randint(2, 3)]}
    return recipe


def _draw_data(draw: random.Random, names: list[str]) -> Any:
    some = draw.sample(names, draw.randint(1, len(names)))
    form = draw.choice(["name", "list", "weights"])
    if form == "name":
        return some[0]
    return some if form == "list" else {name: draw.randint(1, 5) for name in some}
