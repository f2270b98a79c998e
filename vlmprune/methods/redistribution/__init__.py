"""One file per paper. Each line exports one method: `vlmprune.X`, recipes and the command line have it from here."""

from vlmprune.methods.redistribution.act import ACT as ACT
from vlmprune.methods.redistribution.pai import PAI as PAI
from vlmprune.methods.redistribution.paint import PAINT as PAINT
from vlmprune.methods.redistribution.var import VAR as VAR
from vlmprune.methods.redistribution.vhr import VHR as VHR
from vlmprune.methods.redistribution.zerotuning import ZeroTuning as ZeroTuning
