"""Validation losses: those of the whole set as one batch, whatever the batches and the unreadable images."""

from __future__ import annotations

import pytest
import torch

from detr_fabric.config import LossConfig
from detr_fabric.data.batch import Target
from detr_fabric.evaluate.losses import ValidationLosses
from detr_fabric.loss.criterion import SetCriterion
from detr_fabric.model.detr import DETROutput

COUNTS = (2, 0, 3, 1, 4)


def case() -> tuple[DETROutput, list[Target]]:
    """Outputs of 2 layers and 6 queries for 5 images with so many objects."""
    generator = torch.Generator().manual_seed(3)
    outputs = DETROutput(
        torch.randn(2, 5, 6, 4, generator=generator), 0.2 + 0.5 * torch.rand(2, 5, 6, 4, generator=generator)
    )
    targets = [
        Target(
            torch.randint(0, 3, (count,), generator=generator),
            0.3 + 0.3 * torch.rand(count, 4, generator=generator),
            index,
            (64, 64),
            (64, 64),
        )
        for index, count in enumerate(COUNTS)
    ]
    return outputs, targets


@pytest.mark.parametrize("cuts", [[5], [1, 1, 1, 1, 1], [2, 3]])
@pytest.mark.parametrize("criterion", [SetCriterion(3), SetCriterion(4, LossConfig(kind="focal"))])
def test_any_batches_give_the_losses_of_the_whole_set(criterion: SetCriterion, cuts: list[int]) -> None:
    outputs, targets = case()
    num_boxes, class_weight_sum = criterion.normalizers(targets, 6)
    whole = criterion(outputs, targets, num_boxes, class_weight_sum)
    validation, start = ValidationLosses(criterion), 0
    for size in cuts:
        part = slice(start, start + size)
        validation.add(DETROutput(outputs.pred_logits[:, part], outputs.pred_boxes[:, part]), targets[part])
        start += size
    means = validation.means()
    assert means["loss"] == pytest.approx(whole.total.item(), rel=1e-5)
    for name, value in whole.losses.items():
        assert means[name] == pytest.approx(value.item(), rel=1e-5), name
    for name, value in whole.metrics.items():
        assert means[name] == pytest.approx(value.item(), rel=1e-5), name
    assert set(means) == {"loss", *whole.losses, *whole.metrics}


def test_unreadable_images_count_for_nothing() -> None:
    outputs, targets = case()
    criterion = SetCriterion(3)
    good, all_of_them = ValidationLosses(criterion), ValidationLosses(criterion)
    good.add(DETROutput(outputs.pred_logits[:, :3], outputs.pred_boxes[:, :3]), targets[:3])
    broken = [target._replace(read_error="can't be read") for target in targets[3:]]
    all_of_them.add(outputs, targets[:3] + broken)
    all_of_them.add(outputs, [target._replace(read_error="can't be read") for target in targets])
    assert all_of_them.means() == pytest.approx(good.means())
    assert ValidationLosses(criterion).means() == {}


def test_a_set_without_objects_has_losses_too() -> None:
    outputs, _ = case()
    for criterion in (SetCriterion(3), SetCriterion(4, LossConfig(kind="focal"))):
        validation = ValidationLosses(criterion)
        nothing = Target(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4), 1, (64, 64), (64, 64))
        validation.add(outputs, [nothing] * 5)
        assert 0 < validation.means()["loss"] < float("inf") and validation.means()["class_error"] == 100
