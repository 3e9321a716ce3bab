"""Every setting of a run: frozen dataclasses with the original DETR recipe as defaults. Standard library only."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

BackboneName = Literal["resnet18", "resnet34", "resnet50", "resnet101"]
Mapping = Literal["softmax", "sparsemax", "entmax15", "entmax", "entmax-learned", "sigmoid", "relu", "softmax1", "topk"]
Part = Literal["stem", "layer1", "layer2", "layer3", "layer4", "backbone", "input-proj", "encoder", "decoder", "heads"]
Precision = Literal["32-true", "bf16-mixed", "16-mixed"]

COCO_SCALES = (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True)
class DataConfig:
    """Where images and annotations come from, and how they are augmented."""

    root: str | None = None
    """Folder in COCO's layout: train2017/, val2017/ and annotations/instances_{train,val}2017.json; or in Pascal VOC's:
    JPEGImages/, Annotations/ and ImageSets/Main/{train,val}.txt; or YOLO's data.yaml. Unset, and no other path given:
    the built-in synthetic shapes."""
    train_images: str | None = None
    """Folder of training images, instead of root's."""
    train_annotations: str | None = None
    """Annotations of the training images, instead of root's: COCO JSON, a folder of Pascal VOC XML files, or a folder
    of YOLO text files with classes.txt."""
    val_images: str | None = None
    """Folder of validation images, instead of root's."""
    val_annotations: str | None = None
    """Annotations of the validation images, instead of root's; as those of the training images."""
    val_fraction: float | None = None
    """Part of the training images that is kept for validation, instead of validation files: always the same ones, for a
    hash of its file name decides about an image."""
    label_space: Literal["contiguous", "coco91"] = "contiguous"
    """Class ids: 0..C-1 in the order of the category ids, or COCO's own ids (the 91-wide head of official weights)."""
    scales: tuple[int, ...] | None = None
    """Shorter sides (pixels) drawn from in training; the last is evaluation's. Unset: the data's own, COCO 480..800."""
    max_size: int | None = None
    """Longest side (pixels) after resizing. Unset: the data's own (COCO: 1333)."""
    flip: float = 0.5
    """Probability of a horizontal flip in training."""
    crop: bool | None = None
    """Resize, crop and resize again half of the training images, as the original does. Unset: on real data, yes."""
    train_limit: int | None = None
    """Train on this many images only, the first ones with objects."""
    val_limit: int | None = None
    """Evaluate on the first this many images only."""
    validate_on_train: bool = False
    """Evaluate on the training images: the health check that asks whether the model can memorise."""
    bad_images: Literal["stop", "skip"] = "stop"
    """At an image that can't be read or has another size than its entry: stop, or skip it: training takes the next one
    in its place, evaluation counts it as an image without detections, and all are named and counted."""
    workers: int = 2
    """Loader processes per rank."""
    pad_multiple: int = 1
    """Pad batches to a multiple of this many pixels."""
    group_by_shape: bool = False
    """Let training images share a batch that are alike in shape after augmentation: less padding. A step of 8 images or
    fewer then has one shape, a larger one mixes several; which images share a step differs from the original's."""
    max_batch_pixels: int | None = None
    """Most pixels of a padded training batch (images x height x width): a larger one goes through the model in several
    passes of the same step, which may hold less padding. Unset: no limit."""
    shapes_dir: str | None = None
    """Folder of the built-in synthetic scenes. Unset: in the user's cache folder."""
    shapes_train: int = 8000
    """Number of synthetic training scenes."""
    shapes_val: int = 500
    """Number of synthetic validation scenes."""
    shapes_size: int = 64
    """Width and height (pixels) of the synthetic scenes."""

    def __post_init__(self) -> None:
        train, val = (self.train_images, self.train_annotations), (self.val_images, self.val_annotations)
        if self.val_fraction is None:
            _require(
                self.root is not None or all(train + val) or not any(train + val),
                "data: without --data.root all four of --data.train-images, --data.train-annotations, "
                "--data.val-images and --data.val-annotations are needed, or --data.val-fraction for the last two",
            )
        else:
            fraction = self.val_fraction
            _require(0 < fraction < 1, f"data.val_fraction is {fraction}: it lies between 0 and 1, 0.2 is usual")
            _require(
                not any(val) and not self.validate_on_train,
                "data.val_fraction takes validation images from the training ones: give it without --data.val-images, "
                "--data.val-annotations and --data.validate-on-train, or --data.val-fraction None",
            )
            _require(
                self.root is not None or all(train),
                "data.val_fraction divides your own data: give --data.train-images and --data.train-annotations",
            )
        _require(
            self.scales is None or (len(self.scales) > 0 and all(s >= 16 for s in self.scales)),
            f"data.scales is {self.scales}: give at least one shorter side, each of 16 pixels or more",
        )
        _require(self.max_size is None or self.max_size >= 16, f"data.max_size is {self.max_size}: at least 16 pixels")
        _require(0 <= self.flip <= 1, f"data.flip is {self.flip}: a probability lies in [0, 1]")
        _require(self.workers >= 0, f"data.workers is {self.workers}: it must be 0 or more")
        _require(self.pad_multiple >= 1, f"data.pad_multiple is {self.pad_multiple}: it must be 1 or more")
        limit, multiple = self.max_batch_pixels, self.pad_multiple
        if limit is not None and self.scales is not None and self.max_size is not None:
            shorter, longer = max(self.scales), max(*self.scales, self.max_size)
            largest = math.prod(math.ceil(side / multiple) * multiple for side in (shorter, longer))
            _require(
                limit >= largest,
                f"data.max_batch_pixels is {limit}, but a single image can have {largest} (data.scales x data.max_size)"
                ": raise it, or lower the other two",
            )
        for name in ("train_limit", "val_limit", "shapes_train", "shapes_val", "max_batch_pixels"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"data.{name} is {value}: it must be 1 or more")
        _require(32 <= self.shapes_size <= 512, f"data.shapes_size is {self.shapes_size}: between 32 and 512 pixels")

    @property
    def builtin(self) -> bool:
        """Whether this run uses the built-in synthetic shapes."""
        return self.root is None and self.train_images is None


@dataclass(frozen=True)
class ModelConfig:
    """Backbone, transformer and what they start from."""

    backbone: BackboneName = "resnet50"
    """Convolutional backbone, from torchvision."""
    backbone_weights: str | None = None
    """Name of torchvision weights (IMAGENET1K_V1), a file of weights, or none. Unset: IMAGENET1K_V1 on real data, none
    on the built-in shapes or from a checkpoint."""
    norm: Literal["frozen", "batch"] | None = None
    """Batch norm of the backbone: frozen, or trained. Unset: frozen with pretrained weights, else trained."""
    dilation: bool = False
    """DC5: layer4 dilated instead of strided, twice the resolution."""
    last_stage: Literal["layer1", "layer2", "layer3", "layer4"] = "layer4"
    """Backbone stage whose features the transformer reads."""
    freeze: tuple[Part, ...] | None = None
    """Parts that are not trained. Unset: stem and layer1 with pretrained weights, else nothing. Give none as ()."""
    checkpoint: str | None = None
    """File or URL of weights to start from: an official DETR file or one of ours. Classes of the same name keep their
    rows of the class head, others start fresh."""
    position: Literal["sine", "learned"] = "sine"
    """Position encoding of the image features."""
    hidden_dim: int = 256
    """Width of the transformer."""
    heads: int = 8
    """Attention heads."""
    enc_layers: int = 6
    """Encoder layers."""
    dec_layers: int = 6
    """Decoder layers."""
    dim_feedforward: int = 2048
    """Width of the feed-forward blocks."""
    dropout: float = 0.1
    """Dropout in the transformer."""
    num_queries: int = 100
    """Object queries: the most objects that an image can get."""
    pre_norm: bool = False
    """Layer norm before instead of after each block."""
    gradient_checkpointing: bool = False
    """Recompute backbone stages and transformer layers in the backward pass: less memory, more time, same gradients."""

    def __post_init__(self) -> None:
        for name in ("hidden_dim", "heads", "dec_layers", "dim_feedforward", "num_queries"):
            _require(getattr(self, name) >= 1, f"model.{name} is {getattr(self, name)}: it must be 1 or more")
        _require(self.enc_layers >= 0, f"model.enc_layers is {self.enc_layers}: it must be 0 or more")
        _require(
            self.hidden_dim % self.heads == 0 and self.hidden_dim % 4 == 0,
            f"model.hidden_dim is {self.hidden_dim}: it must be a multiple of 4 and of model.heads ({self.heads})",
        )
        _require(0 <= self.dropout < 1, f"model.dropout is {self.dropout}: it lies in [0, 1)")
        _require(
            not self.dilation or self.last_stage == "layer4",
            f"model.dilation dilates layer4, but model.last_stage is {self.last_stage}: choose one of them",
        )
        absent = [part for part in self.freeze or () if part.startswith("layer") and part > self.last_stage]
        _require(not absent, f"model.freeze names {absent}, but the backbone ends with {self.last_stage}")
        everything = {"backbone", "input-proj", "encoder", "decoder", "heads"}
        _require(not everything <= set(self.freeze or ()), "model.freeze names every part: leave one to be trained")


@dataclass(frozen=True)
class AttnConfig:
    """How attention scores become attention weights."""

    kind: Mapping = "softmax"
    """Mapping of every attention block that does not name its own."""
    encoder_self: Mapping | None = None
    """Mapping of the encoder's self-attention. Unset: as kind."""
    decoder_self: Mapping | None = None
    """Mapping of the decoder's self-attention. Unset: as kind."""
    decoder_cross: Mapping | None = None
    """Mapping of the decoder's cross-attention. Unset: as kind."""
    alpha: float = 1.5
    """Exponent of entmax, in [1, 2]: 1 is softmax, 2 is sparsemax; entmax-learned starts from it, inside (1, 2)."""
    topk: int = 32
    """Number of keys that topk keeps."""

    def __post_init__(self) -> None:
        _require(1 <= self.alpha <= 2, f"attn.alpha is {self.alpha}: it lies in [1, 2]")
        learned = "entmax-learned" in (self.kind, self.encoder_self, self.decoder_self, self.decoder_cross)
        _require(not learned or 1 < self.alpha < 2, f"attn.alpha is {self.alpha}: a learned alpha starts inside (1, 2)")
        _require(self.topk >= 1, f"attn.topk is {self.topk}: it must be 1 or more")


@dataclass(frozen=True)
class LossConfig:
    """Hungarian matching and the set criterion."""

    cost_class: float = 1.0
    """Weight of the class probability in the matching cost."""
    cost_bbox: float = 5.0
    """Weight of the L1 box distance in the matching cost."""
    cost_giou: float = 2.0
    """Weight of the generalised IoU in the matching cost."""
    ce_coef: float = 1.0
    """Weight of the classification loss."""
    bbox_coef: float = 5.0
    """Weight of the L1 box loss."""
    giou_coef: float = 2.0
    """Weight of the generalised IoU loss."""
    eos_coef: float = 0.1
    """Relative classification weight of the no-object class."""
    aux_loss: bool = True
    """Losses after every decoder layer, not only the last."""

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            _require(math.isfinite(value) and value >= 0, f"loss.{f.name} is {value}: it must be 0 or more")
        _require(
            self.cost_class + self.cost_bbox + self.cost_giou > 0, "loss: at least one matching cost must not be 0"
        )


@dataclass(frozen=True)
class OptimConfig:
    """AdamW, its parameter groups and its schedule."""

    lr: float = 1e-4
    """Learning rate."""
    lr_backbone: float = 1e-5
    """Learning rate of the backbone."""
    weight_decay: float = 1e-4
    """Weight decay of every parameter but alpha."""
    schedule: Literal["step", "one-cycle", "constant"] = "step"
    """Learning rate over time: times 0.1 after lr_drop epochs, one cycle over the whole run, or constant."""
    lr_drop: int = 200
    """Epochs after which the step schedule multiplies the learning rate by 0.1."""
    warmup: float = 0.1
    """Part of a one-cycle run in which the learning rate rises."""
    clip_max_norm: float = 0.1
    """Gradients are scaled down to this norm; 0: never."""
    alpha_lr_factor: float = 10.0
    """Learning rate of learned alphas, relative to lr."""
    alpha_weight_decay: float = 0.0
    """Weight decay of learned alphas."""
    alpha_lr_drop: bool = False
    """Whether the schedule also applies to learned alphas."""

    def __post_init__(self) -> None:
        names = ("lr", "lr_backbone", "weight_decay", "clip_max_norm", "alpha_lr_factor", "alpha_weight_decay")
        for name in names:
            value = getattr(self, name)
            _require(math.isfinite(value) and value >= 0, f"optim.{name} is {value}: it must be 0 or more")
        _require(self.lr_drop >= 1, f"optim.lr_drop is {self.lr_drop}: it must be 1 or more")
        _require(0 < self.warmup < 1, f"optim.warmup is {self.warmup}: it lies in (0, 1)")


@dataclass(frozen=True)
class TrainConfig:
    """The loop: how long, how large, where, and what is kept."""

    name: str | None = None
    """Name of the run. Unset: the preset's, or backbone and attention."""
    run_dir: str | None = None
    """Folder of the run. Unset: runs/<date>_<name>."""
    epochs: int = 300
    """Passes over the training data."""
    max_steps: int | None = None
    """Stop after this many optimizer steps, even inside an epoch."""
    batch_size: int = 2
    """Images per rank and forward pass."""
    accumulate: int = 1
    """Forward passes per optimizer step; the gradient is exactly that of one large batch."""
    precision: Precision | None = None
    """Arithmetic. Unset: bf16-mixed on a GPU that has it, else 32-true."""
    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    """Device type."""
    devices: int | None = None
    """Processes on this machine, one device each. Unset: 1; under torchrun or SLURM: as launched."""
    preflight: bool | None = None
    """Before the first step, take the largest batch that can come forward and backward, to see whether it fits into
    memory, and which one does. Nothing else changes. Unset: on a GPU, yes."""
    compile: bool = False
    """torch.compile the model: minutes at the start, faster steps. Sizes of images that vary are compiled once."""
    seed: int = 42
    """Seed of initial weights, data order, augmentation and dropout."""
    resume: str | None = None
    """auto: from the run folder's last checkpoint; or a checkpoint file. Unset: auto where the run folder has one."""
    log_every: int = 10
    """Optimizer steps between two records in log.jsonl, W&B and the progress line."""
    checkpoint_every: int = 1
    """Epochs between two checkpoints."""
    checkpoint_minutes: float = 10.0
    """Minutes between two checkpoints inside an epoch; 0: after every step."""
    keep_every: int | None = None
    """Epochs between two checkpoints that are kept for good. Unset: only the last two and the best are kept."""
    deterministic: bool = False
    """The same losses bit for bit in every run on the same machine: takes time on a GPU, is so anyway on a CPU."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """When a loss or a gradient is not finite: stop all ranks, or leave the step out on all ranks and go on."""
    max_nonfinite: int = 10
    """With skip: stop all the same after this many such steps in a row."""
    requeue: bool = False
    """Under SLURM: put the job back into the queue (scontrol requeue) when a signal stops the run."""
    allow_config_change: bool = False
    """Resume even where settings or data that change the result differ from those of the checkpoint."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accumulate", "log_every", "checkpoint_every", "max_nonfinite"):
            _require(getattr(self, name) >= 1, f"train.{name} is {getattr(self, name)}: it must be 1 or more")
        for name in ("max_steps", "devices", "keep_every"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"train.{name} is {value}: it must be 1 or more")
        minutes = self.checkpoint_minutes
        _require(minutes >= 0, f"train.checkpoint_minutes is {minutes}: it must be 0 or more")
        _require(0 <= self.seed < 2**32, f"train.seed is {self.seed}: between 0 and 2**32 - 1")
        _require(
            self.name is None or (self.name != "" and not set(self.name) & set("/\\")),
            f"train.name is {self.name!r}: a name without slashes",
        )


@dataclass(frozen=True)
class EvalConfig:
    """When and how the model is evaluated."""

    every: int = 1
    """Epochs between two evaluations; the last epoch is always evaluated."""
    batch_size: int = 1
    """Images per rank and forward pass, of like shape; 1, without padding, is the reference."""
    backend: Literal["hotcoco", "pycocotools"] = "hotcoco"
    """Library that scores; both give the same numbers."""
    attention_images: int = 16
    """Validation images over which each evaluation measures what every attention head does; 0: none."""

    def __post_init__(self) -> None:
        for name in ("every", "batch_size"):
            _require(getattr(self, name) >= 1, f"eval.{name} is {getattr(self, name)}: it must be 1 or more")
        count = self.attention_images
        _require(count >= 0, f"eval.attention_images is {count}: it must be 0 or more")


@dataclass(frozen=True)
class WandbConfig:
    """Weights & Biases."""

    mode: Literal["online", "offline", "disabled"] | None = None
    """Unset: online when an API key is configured, else offline; never a prompt."""
    project: str = "detr_fabric"
    """Project."""
    entity: str | None = None
    """Team or user. Unset: the key's default."""
    group: str | None = None
    """Group of runs."""
    tags: tuple[str, ...] = ()
    """Tags of the run."""
    panel_images: int = 8
    """Validation images shown with predicted and true boxes at each evaluation."""

    def __post_init__(self) -> None:
        _require(self.panel_images >= 0, f"wandb.panel_images is {self.panel_images}: it must be 0 or more")


@dataclass(frozen=True)
class Config:
    """A whole run."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    attn: AttnConfig = field(default_factory=AttnConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)

    def resolve(self) -> Config:
        """This config with every default that depends on another setting filled in; what a run stores."""
        data, model = self.data, self.model
        weights = model.backbone_weights or ("none" if data.builtin or model.checkpoint else "IMAGENET1K_V1")
        pretrained = weights != "none" or model.checkpoint is not None
        scales = data.scales or ((data.shapes_size,) if data.builtin else COCO_SCALES)
        largest = 2 * data.shapes_size if data.builtin else 1333
        return replace(
            self,
            data=replace(
                data,
                scales=scales,
                max_size=data.max_size or largest,
                crop=(not data.builtin) if data.crop is None else data.crop,
            ),
            model=replace(
                model,
                backbone_weights=weights,
                norm=model.norm or ("frozen" if pretrained else "batch"),
                freeze=(("stem", "layer1") if pretrained else ()) if model.freeze is None else model.freeze,
            ),
            train=replace(
                self.train, name=self.train.name or f"{model.backbone.replace('resnet', 'r')}_{self.attn.kind}"
            ),
        )

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Plain sections of strings, numbers and lists, for JSON, checkpoints and W&B."""
        sections = asdict(self)
        return {
            name: {key: list(value) if isinstance(value, tuple) else value for key, value in section.items()}
            for name, section in sections.items()
        }

    @classmethod
    def from_dict(cls, sections: dict[str, dict[str, Any]]) -> Config:
        """The config that to_dict wrote. Raises ValueError for sections or fields that don't exist."""
        default = cls()
        try:
            return replace(
                default,
                **{
                    name: replace(
                        getattr(default, name),
                        **{key: tuple(value) if isinstance(value, list) else value for key, value in section.items()},
                    )
                    for name, section in sections.items()
                },
            )
        except (TypeError, AttributeError) as error:
            raise ValueError(f"a stored config has a setting that this version does not know: {error}") from error
