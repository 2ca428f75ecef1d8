"""Make the embedded model: `python -m tools.train_demo --run DIR --out engine/demo`.

Four parts, each of which goes on from where the run folder says it is: the VAE's decoder and encoder, the transformer
with its text encoder, and the export. Without `--parts` they run one after the other; decoder, encoder and flow do not
need each other, so they may also run side by side. See tools/README.md for the run that made the shipped weights.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch

from tools.demo import flow, latents, ranks, vae
from tools.demo.export import export

QUICK_PHASES = (vae.Phase(steps=2, lr=1e-3, crops=((5, 32, 32),)),)


def train_vae_half(half: str, options: argparse.Namespace, scale: latents.Scale) -> None:
    """One half of the VAE, in this process."""
    phases = QUICK_PHASES if options.quick else vae.HALVES[half][2]
    vae.train_half(half, options.run, scale, seed=options.seed, phases=phases, device=options.device)


def train_flow(options: argparse.Namespace, scale: latents.Scale) -> None:
    """The transformer and the text encoder, in `--ranks` processes."""
    stages = flow.QUICK_STAGES if options.quick else flow.STAGES
    ranks.launch(options.ranks, flow.train, options.run, scale, stages, options.seed, options.device)


PARTS: dict[str, Callable[[argparse.Namespace, latents.Scale], None]] = {
    "decoder": lambda options, scale: train_vae_half("decoder", options, scale),
    "encoder": lambda options, scale: train_vae_half("encoder", options, scale),
    "flow": train_flow,
    "export": lambda options, scale: export(options.run, options.out, scale),
}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train the embedded model.")
    parser.add_argument("--run", type=Path, required=True, help="folder of the checkpoints; an interrupted run goes on")
    parser.add_argument("--out", type=Path, required=True, help="diffusers folder to write at the end")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to do, in this order")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--ranks", type=int, default=1, choices=(1, ranks.SHARDS), help="processes for flow, CPU only")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a few steps of everything: a smoke test, not a model")
    return parser.parse_args(arguments)


def main() -> None:
    """Run the parts that were asked for."""
    options = parse()
    if options.device == "cpu":
        torch.set_num_threads(1)
    scale = latents.measure_scale()
    for part in options.parts:
        print(f"== {part}", flush=True)
        PARTS[part](options, scale)


if __name__ == "__main__":
    main()
