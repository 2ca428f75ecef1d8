"""Compiled blocks as the daemon sees them: what they need on this machine, and where what was compiled is kept."""

import os
import shutil
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path


def fault(device: str) -> str:
    """Why blocks can't be compiled for `device` on this machine, with what to type; "" if they can."""
    compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")  # as torch looks for it
    if shutil.which(compiler) is None:
        return (
            f"compile: true needs a C++ compiler, and '{compiler}' is not here; install it, as with: apt install g++,"
            " or set compile = false"
        )
    if device.startswith("cuda") and find_spec("triton") is None:
        return f"compile: true needs triton on device '{device}'; install it: pip install triton"
    return ""


def folder(state_path: Path) -> Path:
    """Where what was compiled is kept. It can be deleted at any time: it is then compiled again."""
    return state_path / "compiled"


def environment(state_path: Path) -> Mapping[str, str]:
    """The variables that make torch and triton keep there what they compile; they are read when torch is imported."""
    cache = folder(state_path)
    return {"TORCHINDUCTOR_CACHE_DIR": str(cache), "TRITON_CACHE_DIR": str(cache / "triton")}
