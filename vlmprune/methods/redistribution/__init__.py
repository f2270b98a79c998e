"""One file per paper."""

from vlmprune.methods.redistribution.act import ACT
from vlmprune.methods.redistribution.pai import PAI
from vlmprune.methods.redistribution.paint import PAINT
from vlmprune.methods.redistribution.var import VAR
from vlmprune.methods.redistribution.vhr import VHR
from vlmprune.methods.redistribution.zerotuning import ZeroTuning

__all__ = ["ACT", "PAI", "PAINT", "VAR", "VHR", "ZeroTuning"]
