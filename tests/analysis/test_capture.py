"""Observers of attention blocks: what they see, and that they leave no trace."""

from __future__ import annotations

import pytest
import torch
from lightning_fabric import Fabric
from torch import nn

from detr_fabric.analysis.capture import SITES, attention_blocks, capture, observe, unwrap
from detr_fabric.data.batch import normalize
from tests.analysis.small import batches, scenes, small_detr


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
    assert unwrap(fabric.setup_module(torch.compile(detr))) is detr
    assert unwrap(nn.DataParallel(detr)) is detr  # DDP too calls it `module`
    assert unwrap(detr) is detr
