"""Statistics of a model's attention: padding, batches, matched pairs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric

from detr_fabric.analysis import measures
from detr_fabric.analysis.capture import capture, unwrap
from detr_fabric.analysis.statistics import attention_statistics, sample
from detr_fabric.boxes import cxcywh_to_xyxy
from detr_fabric.config import Config, Mapping
from detr_fabric.data.batch import normalize, pad_images
from detr_fabric.data.build import build_datasets
from detr_fabric.loss.matcher import pad_targets
from detr_fabric.model.detr import DETROutput
from tests.analysis.small import MATCHER, batches, scenes, small_detr


@pytest.mark.parametrize("kind", ["softmax", "sparsemax"])
def test_batches_of_one_and_of_four_give_equal_statistics(kind: Mapping) -> None:
    """Sides are multiples of the patches', so features are equal; float32 sums over more keys are not, to the last bit,
    and sparsemax may then find a weight of 1e-7 where the other one has 0: hence the tolerance on parts and means."""
    detr = small_detr(kind)
    made = scenes((64, 64), (96, 64), (64, 128), (96, 96))
    alone, together = (attention_statistics(detr, batches(made, size), MATCHER) for size in (1, 4))
    assert (alone.images, alone.pairs) == (together.images, together.pairs) == (4, 8)
    assert alone.curves().keys() == together.curves().keys()
    for one, four in zip(alone.heads, together.heads, strict=True):
        assert one[:4] == four[:4]
        assert (one.paibb is None) == (four.paibb is None) == (one.site != "decoder_cross")
        numbers = [[value for value in head[4:] if value is not None] for head in (one, four)]
        assert numbers[0] == pytest.approx(numbers[1], rel=1e-3, abs=1e-4)
    # The padded maps themselves have other statistics, so it is the crop that makes these equal.
    with capture(detr) as seen, torch.no_grad():
        detr(*normalize(batches(made, 4)[0][0]))
    raw = torch.stack([measures.zeros(image) for image in seen.weights["decoder_cross"][0]]).mean()
    assert 1 - raw.item() < 0.75 * (1 - alone.curves()["attention/decoder_cross/layer0/zeros"])


def test_statistics_are_means_over_images_and_over_matched_pairs() -> None:
    detr = small_detr("entmax15")
    made = scenes((64, 96), (96, 64), (64, 64))
    statistics = attention_statistics(detr, batches(made, 2), MATCHER)
    gini, shares = [], []
    for image, target in made:
        with capture(detr) as seen, torch.no_grad():
            logits, boxes = detr(*normalize(pad_images([image])))
        h, w = target.size[0] // 8, target.size[1] // 8
        gini.append(measures.gini(seen.weights["encoder_self"][1][0]))
        pairs = MATCHER(DETROutput(logits[-1:], boxes[-1:]), pad_targets([target]))
        for query, number in zip(pairs.query.tolist(), pairs.target.tolist(), strict=True):
            weights = seen.weights["decoder_cross"][2][0, :, query].view(-1, h, w)
            left, top, right, bottom = (cxcywh_to_xyxy(target.boxes[number]) * torch.tensor([w, h, w, h])).tolist()
            inside = torch.zeros(len(weights))
            for y in range(h):
                for x in range(w):
                    across = max(0.0, min(right, x + 1) - max(left, x))
                    inside += weights[:, y, x] * across * max(0.0, min(bottom, y + 1) - max(top, y))
            shares.append(inside)
    assert statistics.pairs == len(shares) == 7
    encoder = [head.gini for head in statistics.heads if (head.site, head.layer) == ("encoder_self", 1)]
    assert encoder == pytest.approx(torch.stack(gini).mean(0).tolist(), abs=1e-4)
    cross = [head.paibb for head in statistics.heads if (head.site, head.layer) == ("decoder_cross", 2)]
    assert cross == pytest.approx(torch.stack(shares).mean(0).tolist(), abs=1e-4)
    curves = statistics.curves()
    assert curves["attention/decoder_cross/layer2/paibb"] == pytest.approx(torch.stack(shares).mean().item(), abs=1e-4)
    assert curves["attention/box_area"] == pytest.approx(
        np.mean([b.item() for _, t in made for b in measures.cover(t.boxes, 60, 60).mean(1)]), abs=1e-4
    )


def test_records_hold_each_image_and_each_pair_and_their_means_are_the_statistics() -> None:
    made = scenes((64, 96), (96, 64), (64, 64))
    detr = small_detr("sparsemax")
    statistics = attention_statistics(detr, batches(made, 2), MATCHER)
    assert len(statistics.image_records) == 3 * (2 + 3 + 3) and len(statistics.pair_records) == 7
    for measure in ("zeros", "near_zeros", "support", "entropy", "gini", "gini_rows"):
        found = [getattr(r, measure) for r in statistics.image_records if (r.site, r.layer) == ("decoder_cross", 1)]
        assert statistics.curves()[f"attention/decoder_cross/layer1/{measure}"] == pytest.approx(np.mean(found))
    ours = np.mean([pair.paibb for pair in statistics.pair_records])
    assert statistics.curves()["attention/decoder_cross/layer2/paibb"] == pytest.approx(ours)

    image, target = made[1]  # 96×64 pixels, 12×8 cells; in the batch beside a wider image, so padded
    with capture(detr) as seen, torch.no_grad():
        outputs = detr(*normalize(pad_images([image])))
    matches = MATCHER(DETROutput(*(o[-1:] for o in outputs)), pad_targets([target]))
    records = [pair for pair in statistics.pair_records if pair.image_id == target.image_id]
    assert [(pair.query, pair.object) for pair in records] == list(
        zip(matches.query.tolist(), matches.target.tolist(), strict=True)
    )
    for pair in records:
        box = target.boxes[pair.object]
        assert pair.area == pytest.approx(float(box[2] * 64 * box[3] * 96), rel=1e-5)
        mean = seen.weights["decoder_cross"][2][0, :, pair.query].mean(0).view(1, 1, 12, 8)
        enlarged = torch.nn.functional.interpolate(mean, (96, 64), mode="bilinear", align_corners=False)[0, 0]
        inside = (enlarged.flatten() * measures.cover(box[None], 96, 64)[0]).sum() / enlarged.sum()
        assert pair.paibb_enlarged == pytest.approx(inside.item(), abs=1e-4)


def test_a_table_has_a_row_for_every_head_and_curves_for_every_site_and_layer() -> None:
    statistics = attention_statistics(small_detr("entmax-learned"), batches(scenes((64, 64)), 1), MATCHER)
    columns, rows = statistics.table()
    assert columns[:4] == ["site", "layer", "head", "mapping"] and len(rows) == (2 + 3 + 3) * 4
    assert {row[columns.index("mapping")] for row in rows} == {"entmax-learned"}
    curves = statistics.curves()
    assert curves["alpha/encoder_self/layer1/head3"] == pytest.approx(1.5)
    assert sum(name.startswith("alpha/") for name in curves) == len(rows)
    assert sum(name.endswith("/paibb") for name in curves) == 3
    assert sum(name.endswith("/zeros") for name in curves) == 2 + 3 + 3


def test_images_without_objects_have_statistics_without_paibb() -> None:
    (image, target), *_ = scenes((64, 64))
    empty = target._replace(labels=target.labels[:0], boxes=target.boxes[:0])
    statistics = attention_statistics(small_detr(), batches([(image, empty)], 1), MATCHER)
    assert statistics.pairs == 0 and statistics.box_area is None
    assert not any("paibb" in name or "area" in name for name in statistics.curves())


def test_a_model_in_training_under_fabric_gives_the_plain_models_statistics() -> None:
    made = batches(scenes((64, 64), (64, 96)), 1)
    expected = attention_statistics(small_detr(dropout=0.3), made, MATCHER)
    wrapped = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed").setup_module(small_detr(dropout=0.3))
    wrapped.train()
    assert attention_statistics(wrapped, made, MATCHER) == expected
    assert not unwrap(wrapped).training


def test_a_sample_is_spread_over_the_data_and_always_the_same(shapes: Config) -> None:
    _, val = build_datasets(shapes.data, seed=0)
    ids = [target.image_id for _, (target,) in sample(val, 4)]
    assert ids == [val.image_ids[index] for index in (0, 2, 5, 7)]
    assert ids == [target.image_id for _, (target,) in sample(val, 4)]
    assert len(list(sample(val, 99))) == 10
