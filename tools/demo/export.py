"""A run folder to a diffusers folder: the shape in which the daemon and everybody else load it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from diffusers import WanPipeline
from torch import nn

from .flow import Student, load_average
from .latents import Scale
from .models import build_scheduler
from .vae import load_vae


def export(run: Path, destination: Path, scale: Scale) -> None:
    """Write the pipeline in half precision, whole or not at all; a README.md that is already there stays."""
    partial = destination.with_name(destination.name + ".part")
    shutil.rmtree(partial, ignore_errors=True)
    _pipeline(load_average(run), run, scale).save_pretrained(partial)
    _settle_tokenizer(partial)
    _settle_text_encoder(partial)
    card = destination / "README.md"
    if card.exists():
        shutil.copy(card, partial)
    shutil.rmtree(destination, ignore_errors=True)
    partial.rename(destination)


def _halved(network: nn.Module) -> nn.Module:
    """Half precision for all weights: `.to()` would warn about those that diffusers widens again when it loads them."""
    for param in network.parameters():
        param.data = param.data.half()
    return network


def _pipeline(student: Student, run: Path, scale: Scale) -> WanPipeline:
    return WanPipeline(
        tokenizer=student.tokenizer,
        text_encoder=_halved(student.text_encoder),
        transformer=_halved(student.transformer),
        vae=_halved(load_vae(run, scale)),
        scheduler=build_scheduler(),
        expand_timesteps=True,
    )


def _edit(path: Path, key: str, value: object) -> None:
    content = json.loads(path.read_text())
    content[key] = value
    path.write_text(json.dumps(content, indent=2) + "\n")


def _settle_tokenizer(folder: Path) -> None:
    """transformers 5 writes the name of its own backend class; the public name loads everywhere."""
    _edit(folder / "model_index.json", "tokenizer", ["transformers", "PreTrainedTokenizerFast"])
    _edit(folder / "tokenizer" / "tokenizer_config.json", "tokenizer_class", "PreTrainedTokenizerFast")


def _settle_text_encoder(folder: Path) -> None:
    """transformers, unlike diffusers, loads in the precision that the config names: half of it is for the file only."""
    _edit(folder / "text_encoder" / "config.json", "dtype", "float32")
