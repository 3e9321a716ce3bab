"""Starting from a checkpoint: what is carried over by name, what stays fresh, what is refused."""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from detr_fabric.config import AttnConfig, Config, ModelConfig, Part
from detr_fabric.data.formats.categories import Categories
from detr_fabric.data.formats.coco_classes import COCO_CLASSES
from detr_fabric.errors import UserError
from detr_fabric.model.attention import Attention
from detr_fabric.model.build import build_model
from detr_fabric.model.detr import DETR
from detr_fabric.optimizer import build_optimizer
from detr_fabric.runtime.checkpoint import load_checkpoint, save_checkpoint
from detr_fabric.runtime.finetune import architecture, load_weights
from tests.coco_files import coco, image, thing, write_root
from tests.commands import Job, records
from tests.conftest import GOLDEN
from tests.model.test_detr import noise
from tests.model.test_detr import small_detr as whole_detr

COCO91 = Categories(tuple(COCO_CLASSES), tuple(COCO_CLASSES.values()), "coco91")


def small_detr(num_classes: int = 5, **changes: Any) -> DETR:
    """With a backbone of one stage, which is built faster."""
    return whole_detr(num_classes, **{"last_stage": "layer1", **changes})


def classes(*names: str) -> Categories:
    return Categories(tuple(range(1, len(names) + 1)), names)


def trained(model: DETR) -> DETR:
    """The model as if trained: no parameter as it was made, all classes with rows of their own."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            p += 0.1 * noise if "embed" not in name else noise
    return model.eval()


def official(path: Path, model: DETR) -> str:
    """A file as the original's training writes it, without the names of classes."""
    torch.save({"model": model.state_dict(), "args": Namespace(nheads=4, dilation=False)}, path)
    return str(path)


def ours(
    path: Path,
    model: DETR,
    categories: Categories,
    attn: AttnConfig | None = None,
    loss: dict[str, Any] | None = None,
    **settings: Any,
) -> str:
    """A checkpoint as our training writes it."""
    config = Config(model=ModelConfig(heads=4, hidden_dim=32), attn=attn or AttnConfig()).to_dict()
    config["model"] |= settings
    config["loss"] |= loss or {}
    save_checkpoint(path, {"model": model.state_dict(), "config": config, "categories": categories.to_dict()})
    return str(path)


def outputs(model: DETR) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        return tuple(model.eval()(*noise((64, 96))))


def test_known_classes_answer_as_before_and_new_ones_start_fresh(tmp_path: Path) -> None:
    old = trained(small_detr(num_classes=91))
    source = official(tmp_path / "detr.pth", old)
    categories = classes("dog", "Traffic_Light", "robot", "person")
    fresh, new = small_detr(num_classes=4), small_detr(num_classes=4)
    lines = load_weights(new, source, categories)
    assert (
        lines[1] == "head    3 of 4 classes and no-object carried over by name: dog, Traffic_Light, person; new: robot"
    )

    (old_logits, old_boxes), (logits, boxes) = outputs(old), outputs(new)
    assert torch.equal(boxes, old_boxes)
    torch.testing.assert_close(logits[..., [0, 1, 3, 4]], old_logits[..., [18, 10, 1, 91]], rtol=1e-5, atol=1e-5)
    assert torch.equal(new.class_embed.weight[2], fresh.class_embed.weight[2])
    assert torch.equal(new.class_embed.bias[2], fresh.class_embed.bias[2])
    for name, value in old.state_dict().items():
        assert "class_embed" in name or torch.equal(new.state_dict()[name], value), name


def test_same_classes_load_whole_officially_and_from_ours(tmp_path: Path) -> None:
    old = trained(small_detr(num_classes=91))
    file = official(tmp_path / "detr.pth", old)
    a_few = Categories((1, 18), ("person", "dog"), "coco91")  # data with COCO's ids that lacks most classes
    for source, categories in ((file, COCO91), (file, a_few), (ours(tmp_path / "a.ckpt", old, COCO91), COCO91)):
        new = small_detr(num_classes=91)
        load_weights(new, source, categories)
        assert all(torch.equal(value, new.state_dict()[name]) for name, value in old.state_dict().items())
    five = trained(small_detr(num_classes=5))
    for source in (
        official(tmp_path / "five.pth", five),  # nameless: what is as wide is taken as it is
        ours(tmp_path / "b.ckpt", five, classes(*"abcde")),
        ours(tmp_path / "c.ckpt", five, replace(classes(*"abcde"), ids=(7, 8, 9, 10, 11))),
        ours(tmp_path / "d.ckpt", five, classes(*"abcde"), num_queries=7),
    ):
        new = small_detr(num_classes=5)
        load_weights(new, source, classes(*"abcde"))
        assert all(torch.equal(value, new.state_dict()[name]) for name, value in five.state_dict().items())


def test_names_rule_where_numbers_disagree(tmp_path: Path) -> None:
    """Also under COCO's numbering: a data set may give its 1 to cats."""
    old = trained(small_detr(num_classes=91))
    source = official(tmp_path / "detr.pth", old)
    new, fresh = small_detr(num_classes=91), small_detr(num_classes=91)
    load_weights(new, source, Categories((1, 12), ("cat", "robot"), "coco91"))
    assert torch.equal(new.class_embed.weight[1], old.class_embed.weight[17])
    assert torch.equal(new.class_embed.weight[12], fresh.class_embed.weight[12])
    assert torch.equal(new.class_embed.weight[50], old.class_embed.weight[50])

    three = trained(small_detr(num_classes=3))
    source = ours(tmp_path / "best.ckpt", three, classes("cat", "dog", "cat"))
    for categories, rows in (
        (classes("dog", "cat", "cat"), [1, 0, 2]),  # names that come twice: by number first
        (Categories((1, 17), ("person", "cat"), "coco91"), [None] * 17 + [0] + [None] * 73),
    ):
        new, fresh = small_detr(num_classes=len(rows)), small_detr(num_classes=len(rows))
        load_weights(new, source, categories)
        for label, row in enumerate([*rows, 3]):
            expected = fresh.class_embed.weight[label] if row is None else three.class_embed.weight[row]
            assert torch.equal(new.class_embed.weight[label], expected), label


def test_a_class_is_carried_over_under_the_name_that_its_alias_gives_it(tmp_path: Path) -> None:
    old, new = trained(small_detr(num_classes=91)), small_detr(num_classes=3)
    source, categories = official(tmp_path / "detr.pth", old), classes("Bike", "table", "dog")
    lines = load_weights(new, source, categories, ("bike=bicycle", "table=dining table", "sofa=couch"))
    assert "3 of 3 classes" in lines[1]
    assert torch.equal(new.class_embed.weight[:3], old.class_embed.weight[[2, 67, 18]])


def test_classes_are_carried_over_between_softmax_and_focal_loss(tmp_path: Path) -> None:
    """As log-odds against nothing: that is what a row of either means."""
    old, focal = trained(small_detr(num_classes=3)), trained(small_detr(num_classes=3, focal=True))
    two = classes("dog", "robot", "cat")
    softmax_file = ours(tmp_path / "softmax.ckpt", old, classes("cat", "bird", "dog"))
    focal_file = ours(tmp_path / "focal.ckpt", focal, classes("cat", "bird", "dog"), loss=dict(kind="focal"))
    fresh = small_detr(num_classes=3, focal=True)
    for source, logits in ((softmax_file, outputs(old)[0]), (focal_file, outputs(focal)[0])):
        new = small_detr(num_classes=3, focal=True)
        lines = load_weights(new, source, two)
        assert lines[1] == "head    2 of 3 classes carried over by name: dog, cat; new: robot"
        against_nothing = logits[..., :3] - logits[..., 3:] if source == softmax_file else logits
        torch.testing.assert_close(outputs(new)[0][..., [0, 2]], against_nothing[..., [2, 0]], rtol=1e-4, atol=1e-4)
        assert torch.equal(new.class_embed.weight[1], fresh.class_embed.weight[1])
        assert new.class_embed.bias[1].sigmoid().item() == pytest.approx(0.01)
    new = small_detr(num_classes=3)
    assert "2 of 3 classes and no-object carried over" in load_weights(new, focal_file, two)[1]
    torch.testing.assert_close(
        (outputs(new)[0][..., :3] - outputs(new)[0][..., 3:])[..., [0, 2]], outputs(focal)[0][..., [2, 0]]
    )


def test_nothing_in_common_leaves_a_fresh_head_with_its_no_object(tmp_path: Path) -> None:
    old = trained(small_detr(num_classes=7))
    for source in (official(tmp_path / "a.pth", old), ours(tmp_path / "b.ckpt", old, classes(*"ABCDEFG"))):
        new, fresh = small_detr(num_classes=2), small_detr(num_classes=2)
        lines = load_weights(new, source, classes("robot", "drone"))
        assert lines[1].startswith("head    0 of 2 classes and no-object carried over")
        assert lines[1].endswith("; new: robot, drone")
        assert torch.equal(new.class_embed.weight[:2], fresh.class_embed.weight[:2])
        assert torch.equal(new.class_embed.weight[2], old.class_embed.weight[7])


@pytest.mark.parametrize("queries", [5, 12, 20])
def test_another_number_of_queries_keeps_the_first_ones(queries: int, tmp_path: Path) -> None:
    old = trained(small_detr())
    new, fresh = (small_detr(num_queries=queries) for _ in range(2))
    lines = load_weights(new, official(tmp_path / "a.pth", old), classes(*"abcde"))
    kept = min(queries, 12)
    assert lines[2] == f"queries {kept} of {queries} carried over"
    assert torch.equal(new.query_embed.weight[:kept], old.query_embed.weight[:kept])
    assert torch.equal(new.query_embed.weight[kept:], fresh.query_embed.weight[kept:])


def attending(attn: AttnConfig) -> DETR:
    torch.manual_seed(0)
    return build_model(Config(model=ModelConfig(**SETTINGS)).resolve().model, attn, 5)


SETTINGS: dict[str, Any] = dict(backbone="resnet18", backbone_weights="none", norm="frozen", num_queries=12, heads=4)
SETTINGS |= dict(last_stage="layer1", hidden_dim=32, enc_layers=2, dec_layers=3, dim_feedforward=64, dropout=0.0)


def test_weights_move_between_attention_with_and_without_learned_alpha(tmp_path: Path) -> None:
    softmax, learned = attending(AttnConfig()), attending(AttnConfig("entmax-learned", alpha=1.2))
    lines = load_weights(learned, official(tmp_path / "a.pth", trained(softmax)), classes(*"abcde"))
    assert lines[3] == "alpha   learned alphas of 8 attention blocks start fresh at --attn.alpha"
    alphas = [module.learned()["alpha"] for module in learned.modules() if hasattr(module, "alpha_logit")]
    torch.testing.assert_close(torch.stack(alphas), torch.full((8, 4), 1.2))
    assert torch.equal(learned.class_embed.weight, softmax.class_embed.weight)

    source = official(tmp_path / "b.pth", trained(learned))
    again = attending(AttnConfig("entmax-learned", decoder_self="softmax"))
    lines = load_weights(again, source, classes(*"abcde"))
    assert (
        lines[3]
        == "alpha   learned alphas of 5 attention blocks carried over; learned alphas of 3 attention blocks left out"
    )
    logit = "transformer.encoder.layers.1.self_attn.alpha_logit"
    assert torch.equal(again.state_dict()[logit], learned.state_dict()[logit])
    assert len(load_weights(attending(AttnConfig()), official(tmp_path / "c.pth", softmax), classes(*"abcde"))) == 3


def test_learned_alphas_of_another_range_start_fresh(tmp_path: Path) -> None:
    attn = AttnConfig("entmax-learned", alpha=1.2)
    source = ours(tmp_path / "a.ckpt", trained(attending(attn)), classes(*"abcde"), attn=attn)
    wide = attending(replace(attn, alpha_range=(1.0, 4.0)))
    lines = load_weights(wide, source, classes(*"abcde"))
    assert lines[3] == "alpha   learned alphas of 8 attention blocks start fresh at --attn.alpha"
    for module in wide.modules():
        if isinstance(module, Attention):
            torch.testing.assert_close(module.learned()["alpha"], torch.full((4,), 1.2))
    assert "carried over" in load_weights(attending(attn), source, classes(*"abcde"))[3]


def test_trained_and_frozen_batch_norm_take_each_others_weights(tmp_path: Path) -> None:
    for theirs, here in (("batch", "frozen"), ("frozen", "batch")):
        old, new = trained(small_detr(norm=theirs)), small_detr(norm=here)
        load_weights(new, official(tmp_path / "a.pth", old), classes(*"abcde"))
        for before, after in zip(outputs(old), outputs(new), strict=True):
            torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(hidden_dim=64), "model.hidden_dim is 64 there and 32 here"),
        (dict(backbone="resnet50"), "model.backbone is resnet50 there and resnet18 here"),
        (dict(backbone="resnet34"), "model.backbone is resnet34 there and resnet18 here"),
        (dict(enc_layers=1), "model.enc_layers is 1 there and 2 here"),
        (dict(dec_layers=1, dim_feedforward=32), "model.dec_layers is 1 .* model.dim_feedforward is 32"),
        (dict(last_stage="layer3"), "model.last_stage is layer3 there and layer1 here"),
        (dict(pre_norm=True), "model.pre_norm is True there and False here"),
        (dict(position="learned"), "model.position is learned there and sine here"),
        (dict(heads=2), "model.heads is 2 there and 4 here"),
        (dict(cross_attention="conditional"), "model.cross_attention is conditional there and original here"),
    ],
)
def test_another_model_is_refused_with_the_settings_that_differ(
    changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    source = ours(tmp_path / "best.ckpt", small_detr(**changes), classes(*"abcde"), **changes)
    with pytest.raises(UserError, match=words) as caught:
        load_weights(small_detr(), source, classes(*"abcde"))
    assert "\n" not in str(caught.value) and str(caught.value).count("there") == len(changes)


def test_what_weights_do_not_show_is_asked_of_the_file_and_of_its_name(tmp_path: Path) -> None:
    plain, dilated = (whole_detr(5, last_stage="layer4", dilation=dilation) for dilation in (False, True))
    state, settings = plain.state_dict(), dict(last_stage="layer4", dilation=True)
    torch.save(state, tmp_path / "bare.pth")
    torch.save(state, tmp_path / "detr-r18-dc5.pth")
    torch.save({"model": state}, tmp_path / "released.pth")
    torch.save({"model": state, "args": Namespace(nheads=4, dilation=True)}, tmp_path / "trained.pth")
    mine = ours(tmp_path / "best.ckpt", dilated, classes(*"abcde"), **settings)
    dc5 = "model.dilation is True there and False here"
    heads = "model.heads is 8 there and 4 here"
    for file, words in ((mine, dc5), ("detr-r18-dc5.pth", dc5), ("trained.pth", dc5), ("released.pth", heads)):
        with pytest.raises(UserError, match=words):
            load_weights(plain, str(tmp_path / file), classes(*"abcde"))
    load_weights(dilated, mine, classes(*"abcde"))
    load_weights(plain, str(tmp_path / "bare.pth"), classes(*"abcde"))


@pytest.mark.parametrize("name", ["detr-r50", "detr-r50-dc5", "detr-r101", "detr-r101-dc5", "detr-r18"])
def test_the_architecture_of_published_files_is_seen(name: str) -> None:
    shapes = json.loads((GOLDEN / "state_dict_names.json").read_text())[name]
    seen = architecture({key: torch.empty(shape, device="meta") for key, shape in shapes.items()})
    assert seen == dict(backbone=f"resnet{name.split('-')[1][1:]}", last_stage="layer4", position="sine") | dict(
        cross_attention="original", hidden_dim=256, enc_layers=6, dec_layers=6, dim_feedforward=2048, pre_norm=False
    )


def test_files_that_hold_no_detr_or_lack_a_layer_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    no_bias = {name: value for name, value in small_detr().state_dict().items() if name != "class_embed.bias"}
    for state in ({"fc.weight": torch.zeros(3)}, {}, no_bias, no_bias | {"class_embed.bias": torch.zeros(3)}):
        torch.save(state, path)
        with pytest.raises(UserError, match="holds no weights of a DETR"):
            load_weights(small_detr(), str(path), classes(*"abcde"))
    for missing, words in (("decoder.layers.2.", "dec_layers is 2 there"), ("layers.1.norm2", "4 tensors missing")):
        state = {name: value for name, value in small_detr().state_dict().items() if missing not in name}
        torch.save({"model": state, "args": Namespace(nheads=4)}, path)
        with pytest.raises(UserError, match=words):
            load_weights(small_detr(), str(path), classes(*"abcde"))


def test_what_stays_fresh_must_be_trained(tmp_path: Path) -> None:
    source = ours(tmp_path / "best.ckpt", small_detr(), classes(*"abcde"))
    load_weights(small_detr(freeze=("heads", "decoder")), source, classes(*"abcde"))
    with pytest.raises(UserError, match="--model.freeze heads would leave its new classes untrained"):
        load_weights(small_detr(freeze=("heads",)), source, classes(*"abcdf"))
    with pytest.raises(UserError, match="--model.freeze decoder would leave its new queries untrained"):
        load_weights(small_detr(freeze=("decoder",), num_queries=13), source, classes(*"abcde"))


def test_a_step_moves_no_frozen_part_and_all_others() -> None:
    prefixes = {"backbone": "backbone", "encoder": "transformer.encoder", "decoder": "transformer.decoder"}
    prefixes |= {"input-proj": "input_proj", "heads": "class_embed"}
    for freeze in (("backbone",), ("encoder",), ("decoder",), ("backbone", "encoder", "decoder", "input-proj")):
        model = trained(small_detr(freeze=freeze)).train()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        optimizer = build_optimizer(model, Config().optim)
        out = model(*noise((64, 64)))
        (out.pred_logits.square().sum() + out.pred_boxes.square().sum()).backward()
        optimizer.step()
        after = model.state_dict()
        for part, prefix in prefixes.items():
            moved = {not torch.equal(before[name], after[name]) for name in before if name.startswith(prefix)}
            assert moved == {False} if part in freeze else True in moved, (freeze, part)
    with pytest.raises(ValueError, match="names every part"):
        ModelConfig(freeze=("backbone", "input-proj", "encoder", "decoder", "heads"))
    stages: tuple[Part, ...] = ("stem", "layer1", "layer2")
    with pytest.raises(ValueError, match="names every part"):
        ModelConfig(last_stage="layer2", freeze=(*stages, "input-proj", "encoder", "decoder", "heads"))
    ModelConfig(last_stage="layer3", freeze=(*stages, "input-proj", "encoder", "decoder", "heads"))  # layer3 is trained


@pytest.mark.process
def test_fine_tuning_from_the_command_line(tmp_path: Path) -> None:
    """From a checkpoint of the built-in scenes to data of one's own; the result is evaluated and resumed as any run."""
    small = ("--preset", "debug", "--train.accelerator", "cpu")
    first = Job(*small, "--data.shapes-dir", "shapes", "--train.run-dir", "first", cwd=tmp_path)
    assert first.wait() == [0], first.text()
    names = [{"id": 3, "name": "robot"}, {"id": 5, "name": "Triangle"}]
    content = coco([image(1), image(2)], [thing(1, 1, category=3), thing(2, 2, category=5)], names)
    write_root(tmp_path / "own", content, content)
    own = (*small, "--data.root", "own", "--data.scales", "64", "--train.run-dir", "second")
    own += ("--model.checkpoint", "first/last.ckpt", "--train.batch-size", "1")
    second = Job(*own, cwd=tmp_path)
    assert second.wait() == [0], second.text()
    assert "head    1 of 2 classes and no-object carried over by name: Triangle; new: robot" in second.text()
    assert load_checkpoint(tmp_path / "second" / "last.ckpt")["categories"]["names"] == ["robot", "Triangle"]
    third = Job(*own, "--train.epochs", "3", cwd=tmp_path)  # a resumed run takes its own weights, not the first run's
    assert third.wait() == [0], third.text()
    assert "resumed at step 4" in third.text() and "head    " not in third.text()
    assert max(record["step"] for record in records(tmp_path / "second")) == 6
