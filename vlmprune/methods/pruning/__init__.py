"""One file per paper. Each line exports one method: `vlmprune.X`, recipes and the command line have it from here."""

from vlmprune.methods.pruning.adaptinfer import AdaptInfer as AdaptInfer
from vlmprune.methods.pruning.cdpruner import CDPruner as CDPruner
from vlmprune.methods.pruning.cls import CLS as CLS
from vlmprune.methods.pruning.dart import DART as DART
from vlmprune.methods.pruning.divprune import DivPrune as DivPrune
from vlmprune.methods.pruning.evit import EViT as EViT
from vlmprune.methods.pruning.evs import EVS as EVS
from vlmprune.methods.pruning.fastv import FastV as FastV
from vlmprune.methods.pruning.fastvid import FastVID as FastVID
from vlmprune.methods.pruning.flowcut import FlowCut as FlowCut
from vlmprune.methods.pruning.holov import HoloV as HoloV
from vlmprune.methods.pruning.mustdrop import MustDrop as MustDrop
from vlmprune.methods.pruning.pdrop import PDrop as PDrop
from vlmprune.methods.pruning.pixelprune import PixelPrune as PixelPrune
from vlmprune.methods.pruning.random import Random as Random
from vlmprune.methods.pruning.sparsevlm import SparseVLM as SparseVLM
from vlmprune.methods.pruning.tome import ToMe as ToMe
from vlmprune.methods.pruning.uniform import Uniform as Uniform
from vlmprune.methods.pruning.vidcom2 import VidCom2 as VidCom2
from vlmprune.methods.pruning.visionzip import VisionZip as VisionZip
from vlmprune.methods.pruning.vscan import VScan as VScan
