"""What an evaluation says and leaves behind: classes, scores as JSON, pictures."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from detr_fabric.config import Config, DataConfig
from detr_fabric.data.batch import Target
from detr_fabric.data.build import build_datasets
from detr_fabric.data.loader import EvalLoader
from detr_fabric.errors import UserError
from detr_fabric.evaluate.detect import Evaluation, evaluate
from detr_fabric.evaluate.outputs import picture_panel, save_evaluation
from detr_fabric.model.detr import DETROutput
from tests.coco_files import coco, thing, write_root

CAT, DOG = 0, 1
CENTRE, CORNER = (10, 7.5, 20, 15), (0, 0, 10, 6)  # xywh in images of 40 x 30 pixels


class Sees(nn.Module):
    """A dog in the middle of every image, with a probability of 0.75, and a cat to the right of it, with 0.25."""

    def __init__(self, focal: bool = False) -> None:
        super().__init__()
        self.focal = focal

    def forward(self, images: Tensor, mask: Tensor) -> DETROutput:
        logits = torch.tensor([[0.125, 0.75, 0.125], [0.25, 0.125, 0.625]]).log()
        boxes = torch.tensor([[0.5, 0.5, 0.5, 0.5], [0.9, 0.5, 0.2, 0.5]])
        return DETROutput(logits.expand(1, len(images), 2, 3), boxes.expand(1, len(images), 2, 4))


@pytest.fixture
def loader(tmp_path: Path) -> EvalLoader:
    """Two images with a dog in the middle, the second also with a cat in a corner, resized to twice their size."""
    content = coco(annotations=[thing(1, 1, CENTRE, 2), thing(2, 2, CENTRE, 2), thing(3, 2, CORNER, 1)])
    root = write_root(tmp_path / "data", content, content)
    data = (
        Config(data=DataConfig(root=str(root), scales=(60,), max_size=100, workers=0, bad_images="skip")).resolve().data
    )
    return EvalLoader(build_datasets(data, 0)[1], batch_size=1, data=data)


def evaluated(loader: EvalLoader, model: nn.Module | None = None, topk: int = 100) -> Evaluation:
    fabric = Fabric(accelerator="cpu", devices=1)
    evaluation = evaluate(fabric, model or Sees(), loader, "pycocotools", topk=topk)
    assert evaluation is not None
    return evaluation


def test_classes_come_best_first_and_seconds_are_those_that_passed(loader: EvalLoader) -> None:
    started = time.perf_counter()
    evaluation = evaluated(loader)
    passed = time.perf_counter() - started
    assert [*evaluation.per_class.items()] == [("dog", pytest.approx(1)), ("cat", 0)]
    assert 0 < evaluation.seconds_scoring < evaluation.seconds < passed


def test_a_watcher_sees_every_batch(loader: EvalLoader) -> None:
    seen: list[int | str] = []

    def watch(outputs: DETROutput, targets: list[Target]) -> None:
        seen.extend(target.image_id for target in targets)

    evaluate(Fabric(accelerator="cpu", devices=1), Sees(), loader, "hotcoco", watch)
    assert seen == [1, 2]


def test_only_the_best_of_a_model_with_focal_loss_are_kept(loader: EvalLoader) -> None:
    assert [len(found.scores) for found in evaluated(loader, Sees(focal=True), topk=1).detections] == [1, 1]


def test_where_no_image_can_be_read_the_first_reason_and_the_folder_are_said(loader: EvalLoader) -> None:
    for file in Path(loader.dataset.folder).glob("*.png"):
        file.write_bytes(b"none")
    with pytest.raises(UserError, match=r"1\.png.*\(nor can any other image be read: check the folder .*val2017\)"):
        evaluated(loader)


@pytest.mark.parametrize(("threshold", "labels"), [(0.75, [DOG]), (0.76, []), (0.2, [DOG, CAT])])
def test_pictures_have_objects_and_good_detections_in_their_own_pixels(
    loader: EvalLoader, threshold: float, labels: list[int]
) -> None:
    (picture,) = picture_panel(loader.dataset, evaluated(loader).detections, [1], threshold)
    assert picture.image.shape == (3, 60, 80) and picture.caption == "2"
    predicted, there = picture.predicted, picture.ground_truth
    assert predicted is not None and predicted.scores is not None and there is not None
    assert predicted.labels.tolist() == labels and there.labels.tolist() == [DOG, CAT] and there.scores is None
    boxes = {DOG: [20, 15, 60, 45], CAT: [64, 15, 80, 45]}
    expected = torch.tensor([boxes[label] for label in labels]).float().view(-1, 4)
    torch.testing.assert_close(predicted.boxes, expected)
    torch.testing.assert_close(predicted.scores, torch.tensor([{DOG: 0.75, CAT: 0.25}[label] for label in labels]))
    torch.testing.assert_close(there.boxes, torch.tensor([[20.0, 15, 60, 45], [0, 0, 20, 12]]))


def test_scores_are_saved_as_json_with_the_step(loader: EvalLoader, tmp_path: Path) -> None:
    evaluation = evaluated(loader)
    save_evaluation(tmp_path / "evaluation.json", evaluation, 7, {"weights": "raw"})
    content = json.loads((tmp_path / "evaluation.json").read_text())
    rest = {"step": 7, "AP_class": evaluation.per_class, "seconds": evaluation.seconds, "weights": "raw"}
    assert content == evaluation.stats | rest
