"""What the attention does: capture, measures against slow references, statistics under padding, the report."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric
from PIL import Image
from torch import Tensor, nn

from detr_fabric.analysis import __main__ as entry
from detr_fabric.analysis import measures
from detr_fabric.analysis.capture import SITES, attention_blocks, capture, observe, plain
from detr_fabric.analysis.heatmaps import color_table, heat
from detr_fabric.analysis.plots import COLORS, Line, panel, tick_step
from detr_fabric.analysis.report import subject_names
from detr_fabric.analysis.statistics import attention_statistics, sample
from detr_fabric.batch import ImageBatch, Target, normalize, pad_images
from detr_fabric.boxes import cxcywh_to_xyxy
from detr_fabric.checkpoint import save_checkpoint
from detr_fabric.config import AttnConfig, Config, DataConfig, Mapping, ModelConfig
from detr_fabric.data.loader import build_datasets
from detr_fabric.loss.matcher import match, pad_targets
from detr_fabric.model.detr import DETR, DETROutput, build_model

COSTS = (1.0, 5.0, 2.0)
CLASSES = 3


def small_detr(kind: Mapping = "softmax", **changes: object) -> DETR:
    """2 encoder and 3 decoder layers with random weights, enlarged in the attention so that it is far from even.

    Features are those of patches of 8×8 pixels, which nothing around them can change. (Convolutions at an image's edge
    see what earlier ones made of the padding beside it, in the original too: features themselves depend on padding.)
    """
    small = dict(hidden_dim=32, heads=4, enc_layers=2, dec_layers=3, dim_feedforward=64, num_queries=7, dropout=0.0)
    model = ModelConfig(
        **{"backbone": "resnet18", "last_stage": "layer2", "backbone_weights": "none", "norm": "frozen"},
        **{**small, **changes},
    )
    config = Config(model=model, attn=AttnConfig(kind=kind)).resolve()
    torch.manual_seed(0)
    detr = build_model(config.model, config.attn, CLASSES).eval()
    detr.backbone[0].body = nn.Sequential(OrderedDict(patches=nn.Conv2d(3, 128, 8, stride=8)))
    with torch.no_grad():
        for blocks in attention_blocks(detr).values():
            for block in blocks:
                block.in_proj_weight *= 2
    return detr


def scenes(*sizes: tuple[int, int]) -> list[tuple[Tensor, Target]]:
    """Images of noise, (height, width) each, with two objects and then one fewer or more."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for number, (height, width) in enumerate(sizes):
        image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)
        count = 2 + (-1) ** number
        boxes = 0.3 + 0.4 * torch.rand(count, 4, generator=generator)
        labels = torch.randint(0, CLASSES, (count,), generator=generator)
        made.append((image, Target(labels, boxes, number, (height, width), (height, width))))
    return made


def batches(made: list[tuple[Tensor, Target]], size: int) -> list[tuple[ImageBatch, list[Target]]]:
    groups = [made[k : k + size] for k in range(0, len(made), size)]
    return [(pad_images([image for image, _ in group]), [target for _, target in group]) for group in groups]


def sparse_map(heads: int = 3, queries: int = 5, keys: int = 12) -> Tensor:
    """Rows that sum to 1, some weights exactly 0, some tiny."""
    generator = torch.Generator().manual_seed(2)
    scores = torch.randn(heads, queries, keys, generator=generator)
    weights = scores.relu() + 1e-8 * (scores < -1.5)
    return weights / weights.sum(-1, keepdim=True)


# Capture


def test_capture_sees_every_block_with_weights_that_forbid_padding() -> None:
    detr = small_detr("sparsemax")
    batch = normalize(batches(scenes((64, 96), (96, 64)), 2)[0][0])
    with capture(detr) as seen, torch.no_grad():
        detr(*batch)
    assert {site: len(seen.weights[site]) for site in SITES} == dict(encoder_self=2, decoder_self=3, decoder_cross=3)
    tokens = 12 * 12
    assert seen.mask is not None and seen.mask.shape == (2, 12, 12)
    shapes = {site: seen.weights[site][1].shape for site in SITES}
    assert shapes == dict(
        encoder_self=(2, 4, tokens, tokens), decoder_self=(2, 4, 7, 7), decoder_cross=(2, 4, 7, tokens)
    )
    padded = seen.mask.flatten(1)
    for site in SITES:
        for weights in seen.weights[site].values():
            torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:3]))
            if site != "decoder_self":
                assert (weights.transpose(1, 3)[padded] == 0).all()


def test_observing_changes_no_output() -> None:
    detr = small_detr()
    batch = normalize(batches(scenes((64, 96), (96, 64)), 2)[0][0])
    with torch.no_grad():
        unseen = detr(*batch)
        with capture(detr):
            seen = detr(*batch)
    torch.testing.assert_close(seen, unseen)


def test_observers_and_hooks_are_taken_back_even_after_an_error() -> None:
    detr = small_detr()
    before = attention_blocks(detr)["decoder_cross"][1]
    before.observer = earlier = lambda weights: None
    with pytest.raises(RuntimeError, match="boom"), capture(detr):
        raise RuntimeError("boom")
    assert before.observer is earlier
    before.observer = None
    assert all(block.observer is None for blocks in attention_blocks(detr).values() for block in blocks)
    assert not detr.backbone[0]._forward_hooks


def test_observe_names_site_and_layer() -> None:
    detr = small_detr()
    calls = []
    batch = normalize(batches(scenes((64, 64)), 1)[0][0])
    with observe(detr, lambda site, layer, weights, mask: calls.append((site, layer))) as same, torch.no_grad():
        same(*batch)
    layers = [(site, layer) for layer in range(3) for site in ("decoder_self", "decoder_cross")]
    assert calls == [("encoder_self", 0), ("encoder_self", 1), *layers]


def test_the_plain_model_is_found_inside_what_wraps_it() -> None:
    detr = small_detr()
    fabric = Fabric(accelerator="cpu", devices=1)
    assert plain(fabric.setup_module(torch.compile(detr))) is detr
    assert plain(nn.DataParallel(detr)) is detr  # DDP too calls it `module`
    assert plain(detr) is detr


# Measures


def test_measures_equal_slow_references() -> None:
    weights = sparse_map()
    for head, rows in enumerate(weights.tolist()):
        flat = [w for row in rows for w in row]
        assert measures.zeros(weights)[head].item() == pytest.approx(sum(w == 0 for w in flat) / len(flat))
        assert measures.near_zeros(weights)[head].item() == pytest.approx(sum(w < 1e-6 for w in flat) / len(flat))
        support = [sum(w != 0 for w in row) for row in rows]
        assert measures.support(weights)[head].item() == pytest.approx(sum(support) / len(rows))
        entropy = [-sum(w * math.log(w) for w in row if w > 0) for row in rows]
        assert measures.entropy(weights)[head].item() == pytest.approx(sum(entropy) / len(rows), abs=1e-5)
        differences = sum(abs(a - b) for a in flat for b in flat)  # the definition as a mean absolute difference
        gini = differences / (2 * len(flat) * sum(flat))
        assert measures.gini(weights)[head].item() == pytest.approx(gini, abs=1e-6)
    assert (measures.near_zeros(weights) > measures.zeros(weights)).any()  # the map has both kinds


def test_measures_of_even_single_and_absent_weights() -> None:
    heads, queries, keys = 2, 3, 16
    even = torch.full((heads, queries, keys), 1 / keys)
    single = torch.zeros(heads, queries, keys).index_fill_(2, torch.tensor([5]), 1.0)
    nothing = torch.zeros(heads, queries, keys)
    expected = {
        measures.zeros: (0, 15 / 16, 1),
        measures.near_zeros: (0, 15 / 16, 1),
        measures.support: (16, 1, 0),
        measures.entropy: (math.log(16), 0, 0),
        measures.gini: (0, 1 - 1 / keys, 0),
    }
    for measure, values in expected.items():
        for weights, value in zip((even, single, nothing), values, strict=True):
            torch.testing.assert_close(measure(weights), torch.full((heads,), float(value)), rtol=0, atol=1e-6)


def test_gini_is_of_the_whole_map_so_rows_without_mass_count_as_sparse() -> None:
    weights = torch.zeros(1, 4, 8)
    weights[0, 0] = 1 / 8
    assert measures.gini(weights).item() == pytest.approx(3 / 4)


def test_entropy_of_rows_that_do_not_sum_to_one_is_that_of_their_shares() -> None:
    weights = sparse_map()
    torch.testing.assert_close(measures.entropy(7 * weights), measures.entropy(weights))


def test_cover_is_the_exact_area_of_each_cell_inside_the_box() -> None:
    h, w = 3, 5
    boxes = torch.tensor([[0.5, 0.5, 0.4, 0.4], [0.31, 0.62, 0.05, 0.07], [0.9, 0.1, 0.6, 0.5], [0.5, 0.5, 1.0, 1.0]])
    covered = measures.cover(boxes, h, w)
    for (cx, cy, bw, bh), cells in zip(boxes.tolist(), covered.view(-1, h, w).tolist(), strict=True):
        for y in range(h):
            for x in range(w):
                across = min((x + 1) / w, cx + bw / 2) - max(x / w, cx - bw / 2)
                down = min((y + 1) / h, cy + bh / 2) - max(y / h, cy - bh / 2)
                assert cells[y][x] == pytest.approx(max(across, 0) * max(down, 0) * h * w, abs=1e-5)
    assert covered[1].sum().item() == pytest.approx(0.05 * 0.07 * h * w, abs=1e-5)  # smaller than a cell, yet counted


def test_share_inside_is_the_mass_on_covered_cells() -> None:
    weights = sparse_map(heads=2, queries=3, keys=4 * 6)
    boxes = torch.tensor([[0.4, 0.5, 0.5, 0.6], [0.7, 0.3, 0.2, 0.1], [0.5, 0.5, 1.0, 1.0]])
    shares = measures.share_inside(weights, measures.cover(boxes, 4, 6))
    assert shares.shape == (2, 3)
    for head in range(2):
        for pair, (left, top, right, bottom) in enumerate(cxcywh_to_xyxy(boxes).tolist()):
            # Each cell as 60 × 60 points: these boxes' edges fall between points.
            inside = 0.0
            for cell, weight in enumerate(weights[head, pair].tolist()):
                y, x = divmod(cell, 6)
                down = sum(top <= (y + (k + 0.5) / 60) / 4 <= bottom for k in range(60)) / 60
                across = sum(left <= (x + (k + 0.5) / 60) / 6 <= right for k in range(60)) / 60
                inside += weight * down * across
            assert shares[head, pair].item() == pytest.approx(inside, abs=0.01)
    torch.testing.assert_close(shares[:, 2], torch.ones(2))
    even = torch.full((2, 3, 24), 0.5)  # rows that don't sum to 1 count by their shares
    torch.testing.assert_close(measures.share_inside(even, measures.cover(boxes, 4, 6))[0], boxes[:, 2:].prod(-1))


def test_crop_padding_keeps_exactly_the_pairs_of_real_tokens() -> None:
    mask = torch.ones(2, 3, 4, dtype=torch.bool)
    mask[0, :3, :2] = False
    mask[1, :1, :4] = False
    weights = torch.arange(2 * 2 * 12 * 12.0).view(2, 2, 12, 12)
    both = measures.crop_padding(weights, mask, queries_too=True)
    keys = measures.crop_padding(weights, mask, queries_too=False)
    for image in range(2):
        real = [token for token in range(12) if not mask[image].flatten()[token]]
        for head in range(2):
            expected = [[weights[image, head, q, k].item() for k in real] for q in range(12)]
            assert keys[image][head].tolist() == expected
            assert both[image][head].tolist() == [expected[q] for q in real]


# Statistics


@pytest.mark.parametrize("kind", ["softmax", "sparsemax"])
def test_batches_of_one_and_of_four_give_equal_statistics(kind: Mapping) -> None:
    """Sides are multiples of the patches', so features are equal; float32 sums over more keys are not, to the last bit,
    and sparsemax may then find a weight of 1e-7 where the other one has 0: hence the tolerance on parts and means."""
    detr = small_detr(kind)
    made = scenes((64, 64), (96, 64), (64, 128), (96, 96))
    alone, together = (attention_statistics(detr, batches(made, size), COSTS) for size in (1, 4))
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
    statistics = attention_statistics(detr, batches(made, 2), COSTS)
    gini, shares = [], []
    for image, target in made:
        with capture(detr) as seen, torch.no_grad():
            logits, boxes = detr(*normalize(pad_images([image])))
        h, w = target.size[0] // 8, target.size[1] // 8
        gini.append(measures.gini(seen.weights["encoder_self"][1][0]))
        pairs = match(DETROutput(logits[-1:], boxes[-1:]), pad_targets([target]), *COSTS)
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


def test_a_table_has_a_row_for_every_head_and_curves_for_every_site_and_layer() -> None:
    statistics = attention_statistics(small_detr("entmax-learned"), batches(scenes((64, 64)), 1), COSTS)
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
    statistics = attention_statistics(small_detr(), batches([(image, empty)], 1), COSTS)
    assert statistics.pairs == 0 and statistics.box_area is None
    assert not any("paibb" in name or "area" in name for name in statistics.curves())


def test_a_model_in_training_under_fabric_gives_the_plain_models_statistics() -> None:
    made = batches(scenes((64, 64), (64, 96)), 1)
    expected = attention_statistics(small_detr(dropout=0.3), made, COSTS)
    wrapped = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed").setup_module(small_detr(dropout=0.3))
    wrapped.train()
    assert attention_statistics(wrapped, made, COSTS) == expected
    assert not plain(wrapped).training


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Config:
    data = DataConfig(shapes_train=2, shapes_val=10, shapes_dir=str(tmp_path_factory.mktemp("shapes")), workers=0)
    return Config(data=data).resolve()


def test_a_sample_is_spread_over_the_data_and_always_the_same(shapes: Config) -> None:
    _, val = build_datasets(shapes.data, seed=0)
    ids = [target.image_id for _, (target,) in sample(val, 4)]
    assert ids == [val.image_ids[index] for index in (0, 2, 5, 7)]
    assert ids == [target.image_id for _, (target,) in sample(val, 4)]
    assert len(list(sample(val, 99))) == 10


# Pictures


def test_colours_grow_lighter_evenly() -> None:
    lightness = color_table().astype(float) @ [0.2126, 0.7152, 0.0722]
    assert color_table().shape == (256, 3) and (np.diff(lightness) >= -0.5).all()
    assert lightness[0] < 2 and lightness[-1] > 240


def test_a_tile_shows_the_image_where_weights_are_zero_and_the_lightest_colour_at_the_largest() -> None:
    weights = torch.zeros(2, 4)
    weights[1, 3] = 0.2
    tile = np.asarray(heat(Image.new("RGB", (80, 40), (100, 100, 100)), weights, []))
    height, width = tile.shape[0] // 2, tile.shape[1] // 4
    assert (tile[:height] == tile[0, 0]).all() and tile[0, 0].tolist() == [65, 65, 65]
    strongest = tile[height:, 3 * width :]
    assert (strongest == strongest[0, 0]).all() and strongest[0, 0].astype(int).sum() > 550


def test_a_line_lies_where_its_values_are() -> None:
    rows = []
    for value in (0.0, 0.5, 1.0):
        pixels = np.asarray(panel("", [Line(COLORS[1], [value, value], [])])).astype(int)
        rows.append(np.argwhere(np.abs(pixels - COLORS[1]).sum(-1) < 30)[:, 0].mean())
    assert rows[0] > rows[1] > rows[2]
    assert rows[0] - rows[1] == pytest.approx(rows[1] - rows[2], abs=2)


@pytest.mark.parametrize("largest, step", [(1.0, 0.2), (3.1, 1.0), (16.0, 5.0), (64.0, 20.0), (950.0, 200.0)])
def test_axes_have_round_ticks_and_five_steps_at_most(largest: float, step: float) -> None:
    assert tick_step(largest) == pytest.approx(step)


# The command


def write_checkpoint(path: Path, config: Config, changes: dict[str, object], attn: AttnConfig) -> Path:
    small = dict(hidden_dim=32, heads=4, enc_layers=1, dec_layers=2, dim_feedforward=64, num_queries=7, dropout=0.0)
    model = ModelConfig(**{"backbone": "resnet18", "last_stage": "layer2", **small, **changes})
    config = replace(config, model=model, attn=attn, train=replace(config.train, name="run")).resolve()
    train, _ = build_datasets(config.data, seed=0)
    torch.manual_seed(0)
    content = {
        "model": build_model(config.model, config.attn, train.categories.num_classes).state_dict(),
        "config": config.to_dict(),
        "categories": train.categories.to_dict(),
        "state": {"step": 12},
    }
    path.parent.mkdir()
    save_checkpoint(path, content)
    return path


@pytest.fixture(scope="module")
def checkpoints(shapes: Config, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two models of different depth and number of heads."""
    folder = tmp_path_factory.mktemp("runs")
    return [
        str(write_checkpoint(folder / "a" / "last.ckpt", shapes, {}, AttnConfig(kind="softmax"))),
        str(
            write_checkpoint(
                folder / "b" / "last.ckpt",
                shapes,
                {"dec_layers": 1, "heads": 2, "num_queries": 2},
                AttnConfig(kind="sparsemax", encoder_self="softmax"),
            )
        ),
    ]


def analyse(monkeypatch: pytest.MonkeyPatch, *args: str) -> None:
    monkeypatch.setattr(sys, "argv", ["detr_fabric.analysis", *args])
    entry.main()


def test_the_command_writes_numbers_and_pictures(
    checkpoints: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "out"
    analyse(monkeypatch, *checkpoints, "--out", str(out), "--images", "2", "--data.val-limit", "6", "--queries", "2")
    said = capsys.readouterr().out
    assert "run (a): 6 images, step 12" in said and "run (b): 6 images, step 12" in said
    first, second = json.loads((out / "statistics.json").read_text())["models"]
    assert (first["name"], first["step"], first["images"]) == ("run (a)", 12, 6)
    assert second["mapping"] == dict(encoder_self="softmax", decoder_self="sparsemax", decoder_cross="sparsemax")
    assert len(first["heads"]) == (1 + 2 + 2) * 4 and len(second["heads"]) == (1 + 1 + 1) * 2
    assert first["curves"]["attention/decoder_cross/layer0/zeros"] == 0
    assert second["curves"]["attention/decoder_cross/layer0/zeros"] > 0.1
    pictures = sorted(path.name for path in out.glob("*.png"))
    ids = sorted({name.removesuffix(".png").split("_")[0] for name in pictures} - {"overview"})
    assert len(ids) == 2
    assert pictures == sorted(["overview.png"] + [f"{i}{part}.png" for i in ids for part in ("", "_run_a", "_run_b")])
    widths = {part: Image.open(out / f"{ids[0]}_{part}.png").width for part in ("run_a", "run_b")}
    assert widths["run_a"] > 5 * 168 and widths["run_b"] > 3 * 168  # the mean and every head side by side


@pytest.mark.parametrize(
    "args, sentence",
    [
        (["--image-ids", "none"], "--image-ids none: the data has no such image"),
        (["--query-ids", "0", "5"], r"--query-ids 5: .*last.ckpt has queries 0 to 1"),
        (["--data.root", "nowhere"], "nowhere"),
        (["--out", "/dev/null/x"], "--out /dev/null/x: .*choose another folder"),
    ],
)
def test_mistakes_end_in_one_sentence(
    args: list[str],
    sentence: str,
    checkpoints: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        analyse(monkeypatch, *checkpoints, "--images", "1", *args)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert re.search(sentence, line), line


def test_a_checkpoint_that_is_missing_or_not_named_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for args, sentence in (((), "name a checkpoint"), (("no.ckpt",), "no.ckpt: no such file")):
        with pytest.raises(SystemExit) as ended:
            analyse(monkeypatch, *args)
        assert ended.value.code == 2
        assert sentence in capsys.readouterr().err


def test_help_comes_without_torch() -> None:
    code = (
        "import sys; sys.argv = ['analysis', '--help']\n"
        "from detr_fabric.analysis.__main__ import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    print('code', end.code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "--queries" in done.stdout and done.stdout.endswith("code 0 False\n"), done.stderr


def test_models_are_told_apart_by_name_then_folder_then_path() -> None:
    assert subject_names({"x/a/last.ckpt": "r18", "x/b/last.ckpt": "r50"}) == {
        "x/a/last.ckpt": "r18",
        "x/b/last.ckpt": "r50",
    }
    same = subject_names({"x/a/last.ckpt": "r18", "x/b/last.ckpt": "r18"})
    assert list(same.values()) == ["r18 (a)", "r18 (b)"]
    both = {"x/a/last.ckpt": "r18", "x/a/best.ckpt": "r18"}
    assert subject_names(both) == {file: file for file in both}
