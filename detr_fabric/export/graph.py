"""A DETR as a graph that needs nothing of this package, from pixels to boxes: as ONNX or as a torch.export program.

Shapes: B batch, H×W image, Q queries.
"""

from __future__ import annotations

import copy
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import config as tracing

from detr_fabric.boxes import cxcywh_to_xyxy
from detr_fabric.config import ModelConfig
from detr_fabric.data.batch import IMAGENET_MEAN, IMAGENET_STD
from detr_fabric.model.backbone import Backbone
from detr_fabric.model.detr import DETR, class_scores
from detr_fabric.model.folded_norm import set_scales_and_shifts

Run = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]  # as Portable.forward

INPUTS, OUTPUTS = ("images", "mask"), ("scores", "labels", "boxes")
STRIDES = {"layer1": 4, "layer2": 8, "layer3": 16, "layer4": 32}
LARGEST_BATCH, LARGEST_SIDE = 1024, 8192
OPSET = 18  # of ONNX: nothing in a DETR needs a newer one


class Sides(NamedTuple):
    """The heights and widths that a graph takes, in pixels."""

    stride: int  # pixels a feature
    smallest: int
    largest: int


class Portable(nn.Module):
    """Pixels → scores, labels and boxes. It takes the model over: frozen norms are folded into the convolutions."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: DETR) -> None:
        super().__init__()
        self.model = fold(model)
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1))

    def forward(self, images: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """images (B, 3, H, W) uint8 RGB, mask (B, H, W) bool, True on padding, whose pixels don't matter.

        Returns scores (B, Q) and labels (B, Q) of the best class that is an object, and boxes (B, Q, 4) xyxy in
        fractions of the image without its padding.
        """
        pixels = (images.float() / 255 - self.mean) / self.std
        outputs = self.model(pixels.masked_fill(mask[:, None], 0.0), mask)
        scores, labels = class_scores(outputs.pred_logits[-1], self.model.focal).max(-1)
        return scores, labels, cxcywh_to_xyxy(outputs.pred_boxes[-1])


def fold(model: DETR) -> DETR:
    """Has every convolution keep the product with its frozen norm, in place; otherwise each pass computes it."""
    backbone = cast(Backbone, model.backbone[0])
    set_scales_and_shifts(backbone.folded, torch.float32)
    for conv in backbone.folded:
        plain = cast(nn.Conv2d, conv)
        plain.weight = nn.Parameter(conv.weight * conv.scale[:, None, None, None])
        plain.bias = nn.Parameter(conv.shift)
        plain.__class__ = nn.Conv2d
    backbone.folded = ()
    return model


def sides(model: ModelConfig) -> Sides:
    """From two features a side to what memory holds, or learned positions."""
    stride = 16 if model.dilation else STRIDES[model.last_stage]
    return Sides(stride, stride + 1, 50 * stride if model.position == "learned" else LARGEST_SIDE)


@contextmanager
def quick_tracing() -> Iterator[None]:
    """Without warnings, and without the stack trace of each node, which takes torch a tenth of the time to collect."""
    setting = "do_not_emit_stack_traces"  # which earlier versions do not have
    before = getattr(tracing, setting, False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        setattr(tracing, setting, True)
        try:
            yield
        finally:
            setattr(tracing, setting, before)


@torch.no_grad()
def to_program(model: DETR, limits: Sides) -> ExportedProgram:
    """The graph of a model in evaluation mode, for any batch and image inside the limits. The model stays as it is."""
    height, width = 5 * limits.stride, 7 * limits.stride  # an example; any other would do
    images = torch.zeros(2, 3, height, width, dtype=torch.uint8)
    mask = torch.zeros(2, height, width, dtype=torch.bool)
    batch = Dim("batch", min=1, max=LARGEST_BATCH)
    tall, wide = (Dim(name, min=limits.smallest, max=limits.largest) for name in ("height", "width"))
    shapes = ({0: batch, 2: tall, 3: wide}, {0: batch, 1: tall, 2: wide})
    portable = Portable(copy.deepcopy(model)).requires_grad_(False).eval()
    with quick_tracing():
        program = torch.export.export(portable, (images, mask), dynamic_shapes=shapes, strict=False)
    graphs = [module.graph for module in program.graph_module.modules() if isinstance(module, torch.fx.GraphModule)]
    for node in (node for graph in graphs for node in graph.nodes):
        node.meta.pop("stack_trace", None)  # where the code lies on this machine
    return program


def save_torch(program: ExportedProgram, path: Path) -> None:
    content = io.BytesIO()  # a path would have to end in .pt2, and a full disk would be a RuntimeError
    torch.export.save(program, content)
    path.write_bytes(content.getbuffer())


def open_torch(path: Path) -> Run:
    with open(path, "rb") as file:
        module = torch.export.load(file).module()

    def run(images: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():
            scores, labels, boxes = module(images, mask)
            return scores, labels, boxes

    return run


def save_onnx(program: ExportedProgram, path: Path) -> None:
    logging.getLogger("onnxscript").setLevel(logging.ERROR)  # it warns of constants that it does not fold
    with quick_tracing():
        exported = torch.onnx.export(
            program,
            (),
            dynamo=True,
            optimize=False,
            input_names=INPUTS,
            output_names=OUTPUTS,
            opset_version=OPSET,
            verbose=False,
        )
    assert exported is not None
    simplify(exported.model)
    proto = exported.model_proto
    tidy(proto)
    path.write_bytes(proto.SerializeToString())


def simplify(model: Any) -> None:
    """onnxscript's optimizer without its rules for patterns of nodes: they take nine tenths of its time, and a DETR
    answers no faster with them."""
    import onnx_ir.passes.common as passes
    from onnxscript.optimizer import fold_constants_ir, remove_unused_nodes

    passes.InlinePass()(model)
    fold_constants_ir(model, onnx_shape_inference=True)
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    passes.DeduplicateInitializersPass()(model)
    passes.CommonSubexpressionEliminationPass()(model)
    remove_unused_nodes(model)


def tidy(proto: Any) -> None:
    """Calls the sizes that vary batch, height and width, and drops the notes on where in the code a node came from."""
    varying = zip((0, 2, 3), ("batch", "height", "width"), strict=True)
    shape = proto.graph.input[0].type.tensor_type.shape.dim  # of images
    names = {shape[place].dim_param: name for place, name in varying}
    for value in (*proto.graph.input, *proto.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = names[dim.dim_param]
    del proto.graph.value_info[:]
    for part in (*proto.graph.node, *proto.graph.input, *proto.graph.output, *proto.graph.initializer, proto.graph):
        del part.metadata_props[:]


def open_onnx(path: Path) -> Run:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(images: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        answers = session.run(OUTPUTS, {"images": images.numpy(), "mask": mask.numpy()})
        scores, labels, boxes = (torch.from_numpy(answer) for answer in answers)
        return scores, labels, boxes

    return run
