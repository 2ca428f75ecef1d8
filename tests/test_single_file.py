"""Checkpoints in a single file, through the daemon: the embedded model's denoiser as other programs would share it."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.catalog.models import PACKAGE, Catalog
from engine.catalog.weights import Weights
from engine.gpu.load import pipelines
from tests.daemon import Daemon
from tests.frames import read_video
from tests.tiny import MODELS as MAKERS

# The names of Wan's publishers for what diffusers renamed, in the order in which they have to be put back.
ORIGINAL_NAMES = {
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    ".to_out.0.": ".o.",
    ".to_q.": ".q.",
    ".to_k.": ".k.",
    ".to_v.": ".v.",
    "attn1": "self_attn",
    "attn2": "cross_attn",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
    "norm2": "norm3",
    "proj_out": "head.head",
}
ENTRY = """
[[models]]
id = "{id}"
base = "wan_demo"
name = "{id}"
description = "The embedded model's denoiser from a file."
single_file = {file}
"""
MODELS = {
    "as_published": '"as_published.safetensors"',
    "altered": '{ transformer = "altered.safetensors" }',
    "quantised": '"quantised.gguf"',
    "absent": '"absent.gguf"',
}
REQUEST = {"prompt": "a red circle moving right", "video_length": 5, "num_inference_steps": 2, "seed": 1}
LONG_S = 250  # for a worker to start, and torch in it


def original_denoiser() -> dict[str, torch.Tensor]:
    """The embedded model's denoiser under the names that its publishers would have used."""
    there = load_file(PACKAGE / "demo" / "transformer" / "diffusion_pytorch_model.safetensors")
    return {f"model.diffusion_model.{original_name(name)}": tensor for name, tensor in there.items()}


def original_name(name: str) -> str:
    if name == "scale_shift_table":
        return "head.modulation"
    name = name.replace("scale_shift_table", "modulation")
    for ours, theirs in ORIGINAL_NAMES.items():
        name = name.replace(ours, theirs)
    return name


def write_gguf(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Matrices in 8 bits, the rest as it is."""
    writer = gguf.GGUFWriter(path, "wan")
    for name, tensor in tensors.items():
        values = tensor.float().numpy()
        kind = gguf.GGMLQuantizationType.Q8_0 if values.ndim == 2 else None
        writer.add_tensor(name, values if kind is None else gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon whose user has three such files, and an entry for a fourth."""
    running = Daemon(tmp_path_factory.mktemp("single"))
    running.models.mkdir()
    tensors = original_denoiser()
    save_file(tensors, running.models / "as_published.safetensors")
    write_gguf(running.models / "quantised.gguf", tensors)
    last = "model.diffusion_model.head.head.weight"
    save_file({**tensors, last: -tensors[last]}, running.models / "altered.safetensors")
    entries = [ENTRY.format(id=model_id, file=file) for model_id, file in MODELS.items()]
    (running.models / "own.toml").write_text("".join(entries))
    with running:
        yield running


@pytest.fixture(scope="module")
def embedded(daemon: Daemon) -> np.ndarray:
    """What the embedded model makes of REQUEST."""
    return made(daemon, "wan_demo")


def made(daemon: Daemon, model_id: str) -> np.ndarray:
    task = daemon.submit(model_type=model_id, **REQUEST)
    return read_video(daemon.made(daemon.finish(task["task_id"], LONG_S)))


def difference(one: np.ndarray, other: np.ndarray) -> float:
    """The mean over all pixels, in levels of 255."""
    return float(np.abs(one.astype(int) - other.astype(int)).mean())


def test_a_denoiser_in_its_publishers_layout_makes_the_same_video(daemon: Daemon, embedded: np.ndarray) -> None:
    assert np.array_equal(made(daemon, "as_published"), embedded)


def test_the_weights_are_those_of_the_file(daemon: Daemon, embedded: np.ndarray) -> None:
    assert difference(made(daemon, "altered"), embedded) > 5


def test_a_quantised_denoiser_makes_nearly_the_same_video(daemon: Daemon, embedded: np.ndarray) -> None:
    assert 0 < difference(made(daemon, "quantised"), embedded) < 5


def test_an_entry_without_its_file_is_listed_and_refused(daemon: Daemon) -> None:
    listed = {entry["id"]: entry["installed"] for entry in daemon.get("/models").json()["data"]["models"]}
    assert {model_id: listed[model_id] for model_id in MODELS} == dict.fromkeys(MODELS, True) | {"absent": False}
    answer = daemon.post("/generate", {**REQUEST, "model_type": "absent"})
    assert answer.status_code == 400
    assert "its entry names the file absent.gguf, which is not in models_dir" in answer.json()["detail"]


def test_a_pickled_checkpoint_is_no_single_file(tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text(ENTRY.format(id="own", file='"weights.ckpt"'))
    with pytest.raises(ValueError, match=r"single_file 'weights.ckpt' must end in \.safetensors or \.gguf"):
        Catalog.load(tmp_path)


# ------------------------------------------------------------------------------------------------- a whole checkpoint

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.resnets.1": "middle_block.2",
}
VAE_PARTS = {
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "mid_block.attentions.0": "mid.attn_1",
    "conv_norm_out": "norm_out",
    "conv_shortcut": "nin_shortcut",
    "downsamplers.0": "downsample",
    "upsamplers.0": "upsample",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}


def published_unet(unet: Any) -> dict[str, torch.Tensor]:
    """Stable Diffusion's own names for the weights of a U-Net: one running number in place of block and layer."""
    layers, names = unet.config.layers_per_block, dict(UNET_ENDS)
    for block in range(len(unet.config.block_out_channels)):
        for layer in range(layers + 1):
            down, up = (layers + 1) * block + layer + 1, (layers + 1) * block + layer
            for kind, place in (("resnets", 0), ("attentions", 1)):
                names[f"down_blocks.{block}.{kind}.{layer}"] = f"input_blocks.{down}.{place}"
                names[f"up_blocks.{block}.{kind}.{layer}"] = f"output_blocks.{up}.{place}"
        names[f"down_blocks.{block}.downsamplers.0.conv"] = f"input_blocks.{(layers + 1) * (block + 1)}.0.op"
        place = 2 if hasattr(unet.up_blocks[block], "attentions") else 1
        names[f"up_blocks.{block}.upsamplers.0.conv"] = f"output_blocks.{(layers + 1) * block + layers}.{place}.conv"
    return {
        f"model.diffusion_model.{renamed(name, names, RESNET if 'resnets' in name else {})}": tensor
        for name, tensor in unet.state_dict().items()
    }


def published_vae(vae: Any) -> dict[str, torch.Tensor]:
    """Likewise of a VAE, whose attention is made of convolutions there."""
    count, names = len(vae.config.block_out_channels), dict(VAE_PARTS)
    for block in range(count):
        names |= {f"down_blocks.{block}.resnets": f"down.{block}.block", f"down_blocks.{block}": f"down.{block}"}
        up = count - 1 - block
        names |= {f"up_blocks.{block}.resnets": f"up.{up}.block", f"up_blocks.{block}": f"up.{up}"}
    tensors = {f"first_stage_model.{renamed(name, names, {})}": tensor for name, tensor in vae.state_dict().items()}
    return {
        name: tensor[:, :, None, None] if ".attn_1." in name and tensor.ndim == 2 else tensor
        for name, tensor in tensors.items()
    }


def renamed(name: str, *tables: dict[str, str]) -> str:
    """The name with each part replaced that a table has, longer ones first."""
    for ours, theirs in sorted((pair for table in tables for pair in table.items()), key=lambda pair: -len(pair[0])):
        name = re.sub(rf"(?<![a-z_0-9]){re.escape(ours)}(?![a-z_0-9])", theirs, name)
    return name


def test_a_whole_checkpoint_brings_all_its_weights(tmp_path: Path) -> None:
    torch.manual_seed(1)
    shared = MAKERS["sd15"]()
    encoder = {f"cond_stage_model.transformer.text_model.{k}": v for k, v in shared.text_encoder.state_dict().items()}
    whole = {**published_unet(shared.unet), **published_vae(shared.vae), **encoder}
    save_file({name: tensor.contiguous() for name, tensor in whole.items()}, tmp_path / "whole.safetensors")
    torch.manual_seed(2)
    MAKERS["sd15"]().save_pretrained(tmp_path / "base")
    model = Catalog.load().get("sd15")
    weights = Weights(tmp_path / "base", files={"": tmp_path / "whole.safetensors"})
    loaded = pipelines.load(model, model.pipelines["t2i"], weights, torch.device("cpu"))
    for part in ("unet", "vae", "text_encoder"):
        wanted, found = (getattr(pipe, part).state_dict() for pipe in (shared, loaded))
        assert wanted.keys() == found.keys()
        assert [name for name in wanted if not torch.equal(wanted[name], found[name])] == []
