"""Box formats and overlaps, against numbers worked out by hand and a slow account in whole numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from detr_fabric.boxes import area, cxcywh_to_xyxy, generalized_iou, iou_and_union, xyxy_to_cxcywh


def test_formats_are_each_others_inverse() -> None:
    assert cxcywh_to_xyxy(torch.tensor([[5.0, 4.0, 2.0, 6.0]])).tolist() == [[4.0, 1.0, 6.0, 7.0]]
    assert xyxy_to_cxcywh(torch.tensor([[4.0, 1.0, 6.0, 7.0]])).tolist() == [[5.0, 4.0, 2.0, 6.0]]
    assert area(torch.tensor([4.0, 1.0, 6.0, 7.0])) == 12
    layers = torch.rand(2, 3, 5, 4)  # (L, B, Q, 4)
    torch.testing.assert_close(xyxy_to_cxcywh(cxcywh_to_xyxy(layers)), layers)


@pytest.mark.parametrize(
    "a, b, iou, union, generalized",
    [
        ([0, 0, 2, 2], [0, 0, 2, 2], 1, 4, 1),  # the same box
        ([0, 0, 2, 2], [1, 0, 3, 2], 2 / 6, 6, 2 / 6),  # the hull is the union
        ([0, 0, 2, 2], [1, 1, 3, 3], 1 / 7, 7, 1 / 7 - 2 / 9),
        ([0, 0, 1, 1], [2, 0, 3, 1], 0, 2, -1 / 3),  # apart in x, alike in y
        ([0, 0, 1, 1], [2, 3, 4, 4], 0, 3, -13 / 16),  # apart in both: the two distances make no overlap
        ([0, 0, 4, 4], [1, 1, 2, 3], 2 / 16, 16, 2 / 16),  # one inside the other
    ],
)
def test_overlaps_of_two_boxes(a: list[int], b: list[int], iou: float, union: float, generalized: float) -> None:
    first, second = torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)
    for one, other in ((first, second), (second, first)):
        assert [x.item() for x in iou_and_union(one, other)] == pytest.approx([iou, union])
        assert generalized_iou(one, other).item() == pytest.approx(generalized)


def test_overlaps_broadcast_and_count_the_cells_that_boxes_cover() -> None:
    generator = torch.Generator().manual_seed(0)
    low = torch.randint(0, 8, (2, 6, 2), generator=generator)
    boxes = torch.cat([low, low + torch.randint(1, 6, low.shape, generator=generator)], -1)

    def cells(box: Tensor) -> set[tuple[int, int]]:
        left, top, right, bottom = box.tolist()
        return {(x, y) for x in range(left, right) for y in range(top, bottom)}

    iou, union = iou_and_union(boxes[0, :, None].double(), boxes[1].double())
    assert iou.shape == union.shape == (6, 6)
    for i in range(6):
        for j in range(6):
            a, b = cells(boxes[0, i]), cells(boxes[1, j])
            assert union[i, j] == len(a | b)
            assert iou[i, j].item() == pytest.approx(len(a & b) / len(a | b))


def test_the_host_waits_for_no_number_in_generalized_iou_and_its_gradient() -> None:
    torch.manual_seed(0)
    boxes = torch.rand(2, 50, 4)
    boxes[:, :10] = boxes[0, 10:20]  # boxes that are equal, and others that are apart
    a, b = (cxcywh_to_xyxy(x) for x in boxes)
    a.requires_grad_()
    with profile(activities=[ProfilerActivity.CPU]) as record:
        generalized_iou(a[:, None], b).sum().backward()
    names = {event.key for event in record.key_averages()}
    assert "aten::mul" in names and "aten::_local_scalar_dense" not in names
