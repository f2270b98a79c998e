"""Lets `import torchvision` work beside a torch for CPUs, in the environment of the tests for open_clip.

The wheel of torchvision on PyPI is built for CUDA. Its compiled operators do not load beside a torch for CPUs, and its Python
code then fails where it describes two of them. This module declares these two, without a kernel, just before. Detection
(`torchvision.ops.nms`) stays unusable; transforms, which are all that open_clip uses, work.

The Makefile copies this file into the environment, with a `.pth` file that imports it at every start of Python.
"""

import sys


class _Declares:
    def find_spec(self, name, path=None, target=None):
        """Answers for no module: it only notices which one comes next."""
        if name == "torchvision._meta_registrations":
            import torch

            if not hasattr(torch.ops.torchvision, "nms"):
                takes = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                for operator in ("nms", "qnms"):
                    torch.library.define(f"torchvision::{operator}", takes)
        return None


sys.meta_path.insert(0, _Declares())
