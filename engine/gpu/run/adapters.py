"""The LoRAs of a job on the loaded model. Once loaded they stay, and are enabled and disabled from task to task."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engine.job import Job, Lora

EXPERTS = ("transformer", "transformer_2")


def load_file(pipe: Any, path: Path, name: str, target: str) -> None:
    """Load a LoRA file as the adapter `name` of the denoiser `target`."""
    options = {"use_safetensors": True, "local_files_only": True}
    if target == EXPERTS[1]:
        options["load_into_transformer_2"] = True
    pipe.load_lora_weights(path.parent, weight_name=path.name, adapter_name=name, **options)


class Adapters:
    """The LoRAs that are loaded on one pipeline's denoisers."""

    def __init__(self) -> None:
        self._names: dict[Path, str] = {}

    @contextmanager
    def applied(self, pipe: Any, job: Job) -> Iterator[Callable[[int], None]]:
        """Within the block the job's LoRAs are enabled; yields what to call after each step, with how many are done."""
        if not job.loras:
            yield lambda _: None
            return
        experts = [expert for expert in EXPERTS if getattr(pipe, expert, None) is not None] or EXPERTS[:1]
        for path in (lora.path for lora in job.loras if lora.path not in self._names):
            name = f"lora_{len(self._names)}"
            for expert in experts:
                load_file(pipe, path, name, expert)
            self._names[path] = name
        names = [self._names[lora.path] for lora in job.loras]
        current: list[dict[str, float]] = []

        def set_strengths(step: int) -> None:
            nonlocal current
            if step == job.steps:  # the last is done
                return
            wanted = [strength(lora, step, job.steps) for lora in job.loras]
            if wanted != current:
                current = wanted
                pipe.set_adapters(names, wanted if EXPERTS[1] in experts else [each[EXPERTS[0]] for each in wanted])

        pipe.enable_lora()
        try:
            set_strengths(0)
            yield set_strengths
        finally:
            pipe.disable_lora()


def strength(lora: Lora, step: int, steps: int) -> dict[str, float]:
    """The strength at a step for each expert: of the first and the last phase, whose values spread over the steps."""
    phases = zip(EXPERTS, (lora.phases[0], lora.phases[-1]), strict=True)
    return {expert: phase[step * len(phase) // steps] for expert, phase in phases}
