"""The attention kernels that can be configured, and the package that each needs.

Here, on the daemon's side, so that a kernel that is not installed stops the start and not the first task.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec

AUTO = "auto"


@dataclass(frozen=True)
class Kernel:
    """`backend` is diffusers' name for it; `package` what it imports, and `install` what pip calls that."""

    backend: str
    package: str = ""
    install: str = ""

    @property
    def installed(self) -> bool:
        """True if its package is there; whether the card can run it shows only when it is tried."""
        return not self.package or find_spec(self.package) is not None


KERNELS: Mapping[str, Kernel] = {
    "sdpa": Kernel("native"),
    "cudnn": Kernel("_native_cudnn"),
    "flash": Kernel("flash", "flash_attn", "flash-attn"),
    "flash3": Kernel("_flash_3", "flash_attn_interface", "flash-attn-3"),
    "sage": Kernel("sage", "sageattention", "sageattention"),
    "sage2": Kernel("_sage_qk_int8_pv_fp8_cuda", "sageattention", "sageattention>=2"),
    "xformers": Kernel("xformers", "xformers", "xformers"),
}


def fault(mode: str) -> str:
    """Why `mode` can't be used on this machine, with what to type; "" if it can."""
    if mode == AUTO or KERNELS[mode].installed:
        return ""
    return (
        f"attention_mode: '{mode}' needs a package that is not here; install it: pip install '{KERNELS[mode].install}'"
    )
