"""What a job decides of a loaded pipeline and its call does not take: the scheduler's shift, guidance, a size."""

from typing import Any

from engine.catalog.models import Model
from engine.job import Job


def reschedule(pipe: Any, **changes: Any) -> None:
    """Give `pipe` a scheduler of the same class with some settings changed."""
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **changes)


def adjust(pipe: Any, model: Model, job: Job) -> None:
    """Set the shift, the guidance scale and the side of the picture for `job`, where the class takes them so."""
    pipeline, shift = model.pipelines[job.task], model.scheduler.get("shift_param")
    if shift and job.flow_shift is not None and pipe.scheduler.config[shift] != job.flow_shift:
        reschedule(pipe, **{shift: job.flow_shift})  # else it stays: it starts over when its timesteps are set
    if pipeline.guider and job.guidance_scale is not None:
        for name in ("guider", "ocr_guider"):  # some classes have a second one, for prompts that ask for written text
            if (guider := getattr(pipe, name, None)) is not None:
                setattr(pipe, name, guider.new(guidance_scale=job.guidance_scale))
    if pipeline.side_attribute:
        side = (job.width * job.height) ** 0.5 / pipe.vae_scale_factor  # in latent pixels, of a square of this area
        setattr(pipe, pipeline.side_attribute, side * (1 + 1e-9))  # a touch longer, as sizes are rounded down
