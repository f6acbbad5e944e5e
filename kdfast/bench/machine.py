"""The rate of fused multiply-adds, measured on the spot: the limit of code that uses vector registers.

Matrix units (AMX) go beyond it in bf16, and in fp32 where PyTorch may round to bf16: read the bare mm beside it.
"""

import torch

from kdfast._core import extension

SECONDS = 0.02
_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


class Probe:
    """Call it among the timed calls: each call samples the FMA rate of `dtype`, summed over `threads` threads.

    `rates` holds FLOP a second of processor time, so other work on the machine lowers none of them. `missing` is the
    reason there is no probe.
    """

    def __init__(self, dtype: torch.dtype, threads: int):
        self.threads, self.rates = threads, []
        self.name = _NAMES.get(dtype)
        self._module, self.missing = extension.load("_C")
        if self.name is None:
            self.missing = f"the FMA probe has no {dtype}"

    def __call__(self) -> None:
        self.rates.append(1e9 * self._module.fma_rate(self.name, SECONDS, self.threads))
