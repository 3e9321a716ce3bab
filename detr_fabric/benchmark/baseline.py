"""transformers' DETR with our weights: what tests and benchmarks compare ours with."""

from __future__ import annotations

from typing import Any

from detr_fabric.config import ModelConfig
from detr_fabric.model.detr import DETR
from detr_fabric.runtime.hugging_face_names import architecture_fields, to_hugging_face


def transformers_detr(model: DETR, config: ModelConfig, num_classes: int) -> Any:
    """A DetrForObjectDetection, or its ConditionalDetrForObjectDetection, of the same architecture (post-norm, softmax)
    and the same weights.

    Its conditional decoder is made without auxiliary outputs: with them it feeds each layer the normed output of the
    one before, which the authors' code does not.
    """
    import transformers

    # transformers builds its configs' signatures at run time, so their types are unknown here
    conditional = config.cross_attention == "conditional"
    detr_config: Any = transformers.ConditionalDetrConfig if conditional else transformers.DetrConfig
    detr: Any = transformers.ConditionalDetrForObjectDetection if conditional else transformers.DetrForObjectDetection
    labels = len(model.class_embed.bias) if conditional else num_classes
    fields = {**architecture_fields(config), "num_labels": labels, "auxiliary_loss": not conditional}
    state = to_hugging_face(model.state_dict())
    baseline, report = detr.from_pretrained(
        None, config=detr_config(**fields), state_dict=state, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"], report
    return baseline
