"""A stand-in for cosmos_guardrail, for tests only: the checker that Cosmos pipelines build for themselves."""

from typing import Any

import torch
from torch import nn


class CosmosSafetyChecker(nn.Module):
    """Finds nothing unsafe and changes nothing."""

    device = torch.device("cpu")  # a pipeline asks its first module where it runs
    dtype = torch.float32

    def check_text_safety(self, _prompt: str) -> bool:
        return True

    def check_video_safety(self, frames: Any) -> Any:
        return frames
