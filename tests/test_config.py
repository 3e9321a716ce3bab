"""Defaults that follow from other settings, and configs of earlier versions."""

from __future__ import annotations

from dataclasses import replace

import pytest

from detr_fabric.config import AttnConfig, Config, DataConfig, LossConfig, Mapping, ModelConfig


@pytest.mark.parametrize(
    ("attn", "expected"),
    [
        (AttnConfig(), 0.0),
        (AttnConfig("sparsemax"), 0.5),
        (AttnConfig("entmax-learned", softmax_first=0.0), 0.0),
        (AttnConfig(decoder_cross="entmax15"), 0.5),
        (AttnConfig("entmax15", encoder_self="softmax", decoder_self="softmax", decoder_cross="softmax"), 0.0),
        (AttnConfig("sigmoid"), 0.0),
        (AttnConfig("softmax", softmax_first=0.25), 0.25),
    ],
)
def test_entmax_of_every_kind_starts_with_softmax_from_scratch(attn: AttnConfig, expected: float) -> None:
    assert Config(attn=attn).resolve().attn.softmax_first == expected


def test_from_weights_of_a_detr_the_mapping_trains_from_the_start() -> None:
    config = Config(attn=AttnConfig("sparsemax"), model=ModelConfig(checkpoint="x.ckpt"))
    assert config.resolve().attn.softmax_first == 0.0


@pytest.mark.parametrize(
    ("section", "setting", "value"),
    [
        (LossConfig, "eos_coef", 1e308),
        (LossConfig, "cost_bbox", 1e7),
        (DataConfig, "pad_multiple", 1_000_000),
        (DataConfig, "scales", (10**9,)),
        (DataConfig, "max_size", 2**40),
        (DataConfig, "shapes_train", 10**9),
    ],
)
def test_values_that_nothing_can_compute_with_are_refused(section: type, setting: str, value: object) -> None:
    with pytest.raises(ValueError, match=setting.split("_train")[0]):
        section(**{setting: value})


@pytest.mark.parametrize("kind", ["softmax", "sparsemax"])
def test_a_config_from_before_softmax_first_still_trains_without_it(kind: Mapping) -> None:
    config = replace(Config(), attn=AttnConfig(kind)).resolve()
    stored = config.to_dict()
    del stored["attn"]["softmax_first"]
    assert Config.from_dict(stored).resolve().attn.softmax_first == 0.0


def test_unknown_settings_and_fractions_outside_0_to_1_are_refused() -> None:
    with pytest.raises(ValueError, match="a setting that this version does not know"):
        Config.from_dict({"attn": {"nothing": 1}})
    with pytest.raises(ValueError, match="attn.softmax_first is 1.0"):
        AttnConfig(softmax_first=1.0)
