"""GPUs by architecture: what the tables of tile sizes ask of one."""

from typing import NamedTuple


class Architecture(NamedTuple):
    """Of a GPU by its name, such as "sm_90" or "gfx942"."""

    name: str
    shared: int  # bytes of shared memory that a block may have, of AMD's LDS
    from_shared: bool  # matrix instructions read operands from shared memory: before Hopper, on small GPUs after it and on AMD's, registers
    lanes: int  # threads of a warp

    @property
    def amd(self) -> bool:
        return self.name.startswith("gfx")

    @property
    def small(self) -> bool:
        """Whether shared memory, or on AMD's data center GPUs what registers leave, has no room for two stages of rows of 512 bytes."""
        return self.shared < 128 << 10 or self.wide_warps

    @property
    def wide_warps(self) -> bool:
        """AMD's data center GPUs (CDNA): 64 threads a warp, and 512 registers a thread where a block has 256 of them, 256 where two blocks
        share a multiprocessor, as they should for one's loads to be hidden by the other's products."""
        return self.lanes == 64

    @property
    def crowded(self) -> bool:
        """AMD's other GPUs (RDNA): of 256 registers a thread no tile's sums leave enough for the operands that it reads itself."""
        return self.amd and not self.wide_warps

    @property
    def blackwell(self) -> bool:
        """Compute capability 10 and later, where what belongs to a tile's columns takes more registers."""
        return not self.amd and int(self.name[3:]) >= 100


def named(name: str) -> Architecture:
    """By compute capability ("sm_90") or AMD's name ("gfx942", with or without features after a colon)."""
    name = name.split(":")[0]
    if name.startswith("gfx"):
        return Architecture(name, (160 if name == "gfx950" else 64) << 10, False, 64 if name.startswith("gfx9") else 32)
    number = int(name.removeprefix("sm_"))
    small = number in (86, 89) or number >= 120  # those after Hopper among them have the matrix instructions of before it
    return Architecture(name, (99 if small else 163 if number < 90 else 227) << 10, number >= 90 and not small, 32)
