"""Folders for Hugging Face's transformers: what it finds with them is what the model finds."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from detr_fabric import load
from detr_fabric.analysis.capture import unwrap
from detr_fabric.config import AttnConfig, LossConfig
from detr_fabric.data.formats.categories import Categories
from detr_fabric.export import hugging_face, trial, verified
from detr_fabric.export import transformers_attention as own_attention
from detr_fabric.export.hugging_face import open_folder
from detr_fabric.export.settings import Settings
from detr_fabric.model.detr import DETR
from detr_fabric.runtime.checkpoint import save_checkpoint
from detr_fabric.runtime.rebuild import rebuild
from tests.commands import REPOSITORY
from tests.export.small import CLOSE, assert_same, noise, reference, run, write_checkpoint
from tests.patching import Patch

pytest.importorskip("transformers")

CONDITIONAL = {"cross_attention": "conditional", "loss": LossConfig(kind="focal", cost_class=2, ce_coef=2)}
SPARSE = AttnConfig("entmax", alpha=1.3, decoder_self="topk", decoder_cross="sparsemax", topk=5)
MODELS: dict[str, dict[str, Any]] = {
    "layer2": {"backbone": "resnet50", "last_stage": "layer2", "enc_layers": 2, "dec_layers": 2},
    "learned positions": {"position": "learned", "last_stage": "layer1", "norm": "batch", "enc_layers": 0},
    "pre-norm": {"pre_norm": True, "last_stage": "layer2", "dec_layers": 2, "position": "learned"},
    "a mapping for each attention": {"attn": SPARSE, "last_stage": "layer3", "enc_layers": 2, "dec_layers": 2},
    "conditional": {**CONDITIONAL, "last_stage": "layer2", "enc_layers": 2, "dec_layers": 3},
    "conditional, learned positions": {**CONDITIONAL, "last_stage": "layer1", "position": "learned", "dec_layers": 2},
    "conditional, three mappings": {**CONDITIONAL, "attn": SPARSE, "last_stage": "layer2", "dec_layers": 2},
    "sigmoid": {"attn": AttnConfig("sigmoid", decoder_self="relu", decoder_cross="softmax1"), "last_stage": "layer3"},
}


def trained(path: Path, **settings: Any) -> str:
    """A checkpoint in which no norm is the identity, which a norm too many would not change, and queries matter."""
    file = write_checkpoint(path, **settings)
    content = torch.load(file, weights_only=True)
    torch.manual_seed(1)
    for name, value in content["model"].items():
        if "norm" in name or "query_scale" in name:
            value += 0.3 * torch.randn_like(value)
    content["model"]["query_embed.weight"] *= 10
    save_checkpoint(Path(file), content, keep_previous=False)
    return file


def weights(model: DETR) -> dict[str, Tensor]:
    """Without the counts of batch norm that is trained, which is frozen in a folder."""
    return {name: value for name, value in model.state_dict().items() if not name.endswith("num_batches_tracked")}


def export(monkeypatch: pytest.MonkeyPatch, file: str, *args: object) -> Path:
    assert run(monkeypatch, file, "--format", "transformers", *args) == 0
    return Path(file).with_name("best_transformers")


@pytest.mark.parametrize("name", MODELS)
def test_transformers_finds_what_the_model_finds_in_padded_batches_too(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = trained(tmp_path / "best.ckpt", **MODELS[name])
    folder = export(monkeypatch, file)
    model, find = unwrap(load(file, "cpu").model), open_folder(folder)
    for batch in (noise(1, 96, 130), noise(3, 120, 121)):
        assert_same(find(*batch), reference(model, batch))
    boxes = reference(model, noise(3, 120, 121))[1]
    assert boxes.std(0).max() > 10 * CLOSE and boxes.std(1).max() > 10 * CLOSE
    back = rebuild(folder)
    assert_same(find(*batch), reference(back.model.eval(), batch))
    own = rebuild(Path(file))
    assert (back.categories, back.config.attn.mappings) == (own.categories, own.config.attn.mappings)
    assert back.config.loss == own.config.loss
    torch.testing.assert_close(weights(back.model), weights(own.model), rtol=0, atol=0)
    for field in ("cross_attention", "pre_norm", "position", "last_stage", "num_queries"):
        assert getattr(back.config.model, field) == getattr(own.config.model, field)
    assert back.config.data.scales == (96,) and back.config.data.max_size == 160


@pytest.mark.parametrize(
    "settings",
    [{}, {"attn": AttnConfig("sparsemax")}, {**CONDITIONAL, "dec_layers": 2}],
    ids=["softmax", "sparsemax", "conditional"],
)
def test_ten_real_images_have_the_same_boxes_alone_and_in_padded_batches(
    settings: dict[str, Any], coco_mini: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = trained(tmp_path / "best.ckpt", **settings)
    folder = export(monkeypatch, file, "--images", coco_mini / "val2017")
    detector = load(file, "cpu")
    images, source = trial.trial_images(
        detector, Settings(file, images=(str(coco_mini / "val2017"),)), verified.sides(detector.config.model)
    )
    assert len(images) == 10 and "scenes" not in source
    batches = trial.trial_batches(images)
    assert any(batch.mask.any() for batch in batches)
    find = open_folder(folder)
    for batch in batches:
        assert_same(find(*batch), reference(unwrap(detector.model), batch))


@pytest.mark.parametrize("settings", [{}, {**CONDITIONAL, "dec_layers": 2}], ids=["original", "conditional"])
def test_pipelines_find_the_same_in_a_file_and_name_it(
    settings: dict[str, Any], coco_mini: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import pipeline

    file = trained(tmp_path / "best.ckpt", **settings)
    found: Any = pipeline("object-detection", model=str(export(monkeypatch, file)), device="cpu")
    image = sorted((coco_mini / "val2017").iterdir())[0]  # is made smaller, by which both resize alike
    theirs, ours = found(str(image), threshold=0.1), load(file, "cpu")(image, threshold=0.1)
    assert len(theirs) == len(ours.scores) > 0
    scores = torch.tensor(sorted((each["score"] for each in theirs), reverse=True))
    torch.testing.assert_close(scores, ours.scores, rtol=0, atol=CLOSE)
    assert sorted(each["label"] for each in theirs) == sorted(ours.names)


def test_a_sparse_model_loads_with_the_code_beside_it_and_never_as_softmax(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoImageProcessor, AutoModelForObjectDetection, dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(tmp_path / "cache"))
    file = trained(tmp_path / "best.ckpt", attn=AttnConfig("sparsemax"), last_stage="layer1")
    folder = tmp_path / "elsewhere"
    export(monkeypatch, file, "--out", folder)
    fields = json.loads((folder / "config.json").read_text())
    fields["model_type"] = "sparse-detr-2"  # which this process has not imported
    (folder / "config.json").write_text(json.dumps(fields))
    code = folder / own_attention.FILE
    code.write_text(code.read_text().replace('"sparse-detr"', '"sparse-detr-2"'))
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForObjectDetection.from_pretrained(folder, trust_remote_code=False)
    theirs: Any = AutoModelForObjectDetection.from_pretrained(folder, trust_remote_code=True)
    processor: Any = AutoImageProcessor.from_pretrained(folder)
    image = noise(1, 96, 130).images
    with torch.no_grad():
        outputs = theirs(**processor(images=list(image), do_resize=False, return_tensors="pt"))
    expected = reference(unwrap(load(file, "cpu").model), noise(1, 96, 130))
    torch.testing.assert_close(outputs.logits.softmax(-1)[..., :-1], expected[0], rtol=0, atol=CLOSE)


def test_a_folder_says_sizes_and_names_and_nothing_of_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    twice = Categories((7, 42, 43), ("cat", "großer Hund", "cat"))
    folder = export(monkeypatch, write_checkpoint(tmp_path / "best.ckpt", categories=twice, last_stage="layer1"))
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.ckpt", "best_transformers"]
    assert "from_pretrained" in (said := capsys.readouterr().out) and "largest difference" in said
    content = "".join((folder / name).read_text() for name in ("config.json", "preprocessor_config.json"))
    assert str(tmp_path) not in content and str(REPOSITORY) not in content
    fields = json.loads((folder / "config.json").read_text())
    assert fields["id2label"] == {"0": "cat (7)", "1": "großer Hund", "2": "cat (43)"}
    assert fields["label2id"] == {name: int(label) for label, name in fields["id2label"].items()}
    assert rebuild(folder).categories == twice
    processor = json.loads((folder / "preprocessor_config.json").read_text())
    assert processor["size"] == {"shortest_edge": 96, "longest_edge": 160}


@pytest.mark.parametrize(
    "settings, reason",
    [
        ({"cross_attention": "conditional"}, "Conditional DETR scores each class with a sigmoid"),
        ({**CONDITIONAL, "pre_norm": True}, "Conditional DETR has no --model.pre-norm"),
        ({**CONDITIONAL, "dec_layers": 1}, "weights for a second decoder layer"),
        ({"loss": LossConfig(kind="focal")}, "has a row for no-object in the class head, this one has none"),
        ({"attn": AttnConfig(decoder_cross="tvmax")}, "tvmax needs the grid"),
        ({"attn": AttnConfig("entmax-learned")}, "alphas that entmax-learned learns"),
        ({"attn": AttnConfig("sparsemax"), "pre_norm": True}, "Table Transformer, has softmax"),
    ],
)
def test_what_transformers_cannot_hold_is_refused_with_the_reason(
    settings: dict[str, Any],
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = write_checkpoint(tmp_path / "best.ckpt", last_stage="layer1", **settings)
    assert run(monkeypatch, file, "--format", "transformers") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(f"error: transformers can't hold this model: .*{reason}", line), line
    assert [path.name for path in tmp_path.iterdir()] == ["best.ckpt"]


def test_dilation_needs_timm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, patch: Patch, capsys: pytest.CaptureFixture[str]
) -> None:
    patch(hugging_face, "find_spec", lambda name: None)
    file = write_checkpoint(tmp_path / "best.ckpt", dilation=True)
    assert run(monkeypatch, file, "--format", "transformers") == 2
    assert "pip install timm" in capsys.readouterr().err


def test_dilated_models_are_found_alike_by_timms_backbone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("timm")
    file = trained(tmp_path / "best.ckpt", dilation=True)
    folder = export(monkeypatch, file)
    assert_same(open_folder(folder)(*noise(3, 120, 121)), reference(rebuild(folder).model.eval(), noise(3, 120, 121)))


def test_a_folder_that_finds_something_else_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, patch: Patch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = hugging_face.to_hugging_face

    def wrong(state: dict[str, Tensor], timm: bool) -> dict[str, Tensor]:
        theirs = right(state, timm)
        name = "model.decoder.layers.0.encoder_attn.{}_proj.weight".format
        return theirs | {name("k"): theirs[name("q")], name("q"): theirs[name("k")] * 2}

    patch(hugging_face, "to_hugging_face", wrong)
    file = trained(tmp_path / "best.ckpt", last_stage="layer1")
    earlier = tmp_path / "best_transformers"
    earlier.mkdir()
    (earlier / "config.json").write_text("earlier")
    assert run(monkeypatch, file, "--format", "transformers") == 2
    assert "is not written" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.ckpt", "best_transformers"]
    assert [path.read_text() for path in earlier.iterdir()] == ["earlier"]


def test_a_folder_is_not_written_over_the_one_that_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = export(monkeypatch, write_checkpoint(tmp_path / "best.ckpt", last_stage="layer1"))
    assert run(monkeypatch, folder, "--format", "transformers", "--out", folder) == 2
    assert "would overwrite" in capsys.readouterr().err
    export(monkeypatch, str(tmp_path / "best.ckpt"))  # a second time: the first one's files are replaced
