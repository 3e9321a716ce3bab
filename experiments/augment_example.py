"""Augmentation of one's own: colours, zooming out, a crop and a flip, as SSD has them (Liu et al., 2016).

    python -m detr_fabric.train --preset quickstart --data.augment experiments/augment_example.py

The file defines `augment(image, target)`, which takes the place of the original's flip and crop. It gets a training
image as it was read, (3, H, W) uint8 RGB, and its objects: target["boxes"], (N, 4) xyxy in pixels, and
target["labels"], (N,) class ids from 0; N may be 0. It returns both, changed, with boxes and labels of the same number.
The image may get another size: it is resized to --data.scales afterwards, and normalised by the trainer. Boxes are cut
off at the image's edge, and objects left without area are dropped.

torch's, Python's and NumPy's generators are seeded by (seed, epoch, image) before each call, so a run can be repeated
and resumed. Keep no state from call to call. A resumed run refuses another content of this file, unless
--train.allow-config-change; files that it imports are not compared.
"""

from typing import Any

import torch
from torchvision import tv_tensors
from torchvision.transforms import v2

GREY = {tv_tensors.Image: (124, 116, 104), "others": 0}  # ImageNet's mean

colours = v2.RandomPhotometricDistort(p=0.5)
zoom_out = v2.RandomZoomOut(fill=GREY, side_range=(1.0, 2.0), p=0.5)
crop = v2.RandomIoUCrop(min_scale=0.5)
flip = v2.RandomHorizontalFlip(p=0.5)


def augment(image: tv_tensors.Image, target: dict[str, Any]) -> tuple[tv_tensors.Image, dict[str, Any]]:
    image, target = zoom_out(colours(image), target)
    if len(target["boxes"]) and torch.rand(()) < 0.5:  # the crop looks for a part that overlaps with a box
        image, target = v2.SanitizeBoundingBoxes()(*crop(image, target))
    return flip(image, target)
