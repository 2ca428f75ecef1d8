"""The LoRAs of a job on the loaded model. Once loaded they stay, and are enabled and disabled from task to task."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engine.job import Job, Lora

EXPERTS = ("transformer", "transformer_2")


def load_file(pipe: Any, path: Path, name: str, target: str) -> None:
    """Load a LoRA file as the adapter `name` of the denoiser `target`."""
    second = {"load_into_transformer_2": True} if target == EXPERTS[1] else {}
    pipe.load_lora_weights(
        path.parent,
        weight_name=path.name,
        adapter_name=name,
        use_safetensors=True,
        local_files_only=True,
        **second,
    )


class Adapters:
    """The LoRAs that are loaded on one pipeline's denoisers."""

    def __init__(self) -> None:
        self._names: dict[Path, str] = {}

    @contextmanager
    def applied(self, pipe: Any, job: Job) -> Iterator[Callable[[int], None]]:
        """Within the block the job's LoRAs are enabled, with the strengths of the first step.

        Yields what to call after each step with the number of steps that are done.
        """
        for lora in job.loras:
            self._load(pipe, lora.path)
        if not job.loras:
            yield lambda _: None
            return
        pipe.enable_lora()
        strengths = _Strengths(pipe, job, [self._names[lora.path] for lora in job.loras])
        try:
            strengths.set(0)
            yield strengths.set
        finally:
            pipe.disable_lora()

    def _load(self, pipe: Any, path: Path) -> None:
        if path in self._names:
            return
        name = f"lora_{len(self._names)}"
        experts = [expert for expert in EXPERTS if getattr(pipe, expert, None) is not None]
        for expert in experts or EXPERTS[:1]:
            load_file(pipe, path, name, expert)
        self._names[path] = name


class _Strengths:
    """The strength of each LoRA at each step; set again only where it changes."""

    def __init__(self, pipe: Any, job: Job, names: list[str]) -> None:
        self._pipe, self._job, self._names = pipe, job, names
        self._now: list[dict[str, float]] = []

    def set(self, step: int) -> None:
        """Set the strengths for `step`, from 0; after the last step nothing happens."""
        if step == self._job.steps:
            return
        wanted = [strength(lora, step, self._job.steps) for lora in self._job.loras]
        if wanted != self._now:
            self._now = wanted
            two = getattr(self._pipe, EXPERTS[1], None) is not None
            self._pipe.set_adapters(self._names, wanted if two else [each[EXPERTS[0]] for each in wanted])


def strength(lora: Lora, step: int, steps: int) -> dict[str, float]:
    """The strength at a step for each expert: the first phase is for the first, the last one for the second.

    Several values are spread evenly over the steps.
    """
    first, last = lora.phases[0], lora.phases[-1]
    return {expert: phase[step * len(phase) // steps] for expert, phase in zip(EXPERTS, (first, last), strict=True)}
