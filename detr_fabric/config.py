"""Every setting of a run: frozen dataclasses with the original DETR recipe as defaults."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, TypeVar

from detr_fabric.errors import UserError

BackboneName = Literal["resnet18", "resnet34", "resnet50", "resnet101"]
Mapping = Literal["softmax", "sparsemax", "entmax15", "entmax", "entmax-learned", "sigmoid", "relu", "softmax1", "topk"]
CrossMapping = Literal[Mapping, "tvmax"]  # which needs keys on a grid
Part = Literal["stem", "layer1", "layer2", "layer3", "layer4", "backbone", "input-proj", "encoder", "decoder", "heads"]
WandbMode = Literal["online", "offline", "disabled"]
Precision = Literal["32-true", "bf16-mixed", "16-mixed"]
TF32 = Literal["never", "convolutions", "everywhere"]
Weights = Literal["raw", "ema"]

SPARSE = {"sparsemax", "entmax15", "entmax", "entmax-learned", "tvmax"}  # they need softmax first, from scratch
LARGEST = 10_000  # pixels: a larger side is of no use and would only fill the memory
ALPHAS = (0.2, 4.0)  # exponents that entmax is computed for
COCO_SCALES = (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)


T = TypeVar("T")


def free(default: T) -> T:
    """A setting that does not change what is learned, so that a resumed run may have another value of it."""
    return field(default=default, metadata={"free": True})


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def _at_least(least: float, section: str, settings: object, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        _require(
            value is None or (math.isfinite(value) and value >= least),
            f"{section}.{name} is {value}: it must be {least} or more",
        )


@dataclass(frozen=True)
class DataConfig:
    """Where images and annotations come from, and how they are augmented."""

    root: str | None = free(None)
    """Folder in COCO's layout: train2017/, val2017/ and annotations/instances_{train,val}2017.json; or in Pascal VOC's:
    JPEGImages/, Annotations/ and ImageSets/Main/{train,val}.txt; or YOLO's data.yaml. Unset, and no other path given:
    the built-in synthetic shapes."""
    train_images: str | None = free(None)
    """Folder of training images, instead of root's."""
    train_annotations: str | None = free(None)
    """Annotations of the training images, instead of root's: COCO JSON, a folder of Pascal VOC XML files, or a folder
    of YOLO text files with classes.txt."""
    val_images: str | None = free(None)
    """Folder of validation images, instead of root's."""
    val_annotations: str | None = free(None)
    """Annotations of the validation images, instead of root's; as those of the training images."""
    val_fraction: float | None = None
    """Fraction of the training images that is held out for validation, instead of validation files. They are always the
    same images, because a hash of the file name decides."""
    aliases: tuple[str, ...] = ()
    """Classes of the data that the model knows by another name, as NAME=MODEL'S (bike=bicycle): where classes are
    matched by name, which is in fine-tuning and on another data set than the training data."""
    label_space: Literal["contiguous", "coco91"] = "contiguous"
    """Class ids: 0..C-1 in the order of the category ids, or COCO's own ids (the original weights: 91 wide)."""
    scales: tuple[int, ...] | None = None
    """Shorter sides (pixels) drawn in training; evaluation uses the last. Unset: the data's own (COCO: 480..800)."""
    max_size: int | None = None
    """Longest side (pixels) after resizing; only very flat images exceed it. Unset: the data's own (COCO: 1333)."""
    augment: str = free("original")  # not its name: a checkpoint holds a digest of the file's content
    """How training images are changed before they are resized: original, by flip and crop, or FILE.py, by its function
    augment(image, target) instead of both; see experiments/augment_example.py."""
    flip: float = 0.5
    """Probability of a horizontal flip in training."""
    crop: bool | None = None
    """Resize, crop and resize half of the training images, as the original does. Unset: yes, unless synthetic."""
    train_limit: int | None = None
    """Train on only this many images: the first ones with objects."""
    val_limit: int | None = free(None)
    """Evaluate on only this many images: the first ones."""
    validate_on_train: bool = free(False)
    """Evaluate on the training images: a health check that shows whether the model can memorise them."""
    bad_images: Literal["stop", "skip"] = free("stop")
    """What to do with an image that can't be read or whose size differs from its entry: stop, or skip it. Training then
    takes the next image instead, evaluation counts one without detections, and each is named and counted."""
    workers: int = free(2)
    """Loader processes per rank."""
    pad_multiple: int = 1
    """Pad batches to a multiple of this many pixels."""
    group_by_shape: bool = False
    """Batch training images of similar shape (after augmentation) together, which leaves less padding. Steps of up to 8
    images then have one shape, larger ones mix several. The original mixes images regardless of shape."""
    max_batch_pixels: int | None = None
    """Most pixels of a padded training batch (images x height x width). A larger batch is split into several forward
    passes of the same step. Unset: no limit."""
    shapes_dir: str | None = free(None)
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
            self.scales is None or (len(self.scales) > 0 and all(16 <= s <= LARGEST for s in self.scales)),
            f"data.scales is {self.scales}: give at least one shorter side, each of 16 to {LARGEST} pixels",
        )
        sides = f"between 16 and {LARGEST} pixels"
        _require(self.max_size is None or 16 <= self.max_size <= LARGEST, f"data.max_size is {self.max_size}: {sides}")
        _require(self.pad_multiple <= LARGEST, f"data.pad_multiple is {self.pad_multiple}: at most {LARGEST}")
        scenes = max(self.shapes_train, self.shapes_val)
        _require(scenes <= 100_000, f"data.shapes: {scenes} synthetic scenes are too many: at most 100000")
        odd = [alias for alias in self.aliases if not all(alias.partition("="))]
        _require(not odd, f"data.aliases has {''.join(odd[:1])!r}: give NAME=MODEL'S, as bike=bicycle")
        _require(0 <= self.flip <= 1, f"data.flip is {self.flip}: a probability lies in [0, 1]")
        _at_least(0, "data", self, "workers")
        counts = ("pad_multiple", "train_limit", "val_limit", "shapes_train", "shapes_val", "max_batch_pixels")
        _at_least(1, "data", self, *counts)
        limit, multiple = self.max_batch_pixels, self.pad_multiple
        if limit is not None and self.scales is not None and self.max_size is not None:
            shorter, longer = max(self.scales), max(*self.scales, self.max_size)
            largest = math.prod(math.ceil(side / multiple) * multiple for side in (shorter, longer))
            _require(
                limit >= largest,
                f"data.max_batch_pixels is {limit}, but a single image can have {largest} (data.scales x data.max_size)"
                ": raise it, or lower the other two",
            )
        _require(32 <= self.shapes_size <= 512, f"data.shapes_size is {self.shapes_size}: between 32 and 512 pixels")

    @property
    def builtin(self) -> bool:
        """Whether this run uses the built-in synthetic shapes."""
        return self.root is None and self.train_images is None


@dataclass(frozen=True)
class ModelConfig:
    """Backbone and transformer, and what they start from."""

    backbone: BackboneName = "resnet50"
    """Convolutional backbone from torchvision."""
    backbone_weights: str | None = free(None)
    """Name of torchvision weights (IMAGENET1K_V1), a file of weights, or none. Unset: IMAGENET1K_V1 on real data;
    none on synthetic shapes and where a checkpoint is given."""
    norm: Literal["frozen", "batch"] | None = None
    """Batch norm of the backbone: frozen, or trained. Unset: frozen with pretrained weights, else trained."""
    dilation: bool = False
    """DC5: layer4 dilated instead of strided, twice the resolution."""
    last_stage: Literal["layer1", "layer2", "layer3", "layer4"] = "layer4"
    """Backbone stage whose features the transformer attends to."""
    freeze: tuple[Part, ...] | None = None
    """Parts that are not trained. Unset: stem and layer1 with pretrained weights, else nothing; () freezes nothing."""
    checkpoint: str | None = free(None)
    """File or URL of weights to start from: the original DETR's, ours, or a folder of Hugging Face's transformers.
    Classes of the same name keep their rows of the class head, others start from scratch."""
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
    cross_attention: Literal["original", "conditional"] = "original"
    """Cross-attention of the decoder: the original's, or conditional (Meng et al. 2021), which needs a sixth of the
    epochs: content and position are compared apart, and boxes are offsets from a reference point of each query."""
    num_queries: int = 100
    """Object queries: the most objects that can be found in an image."""
    pre_norm: bool = False
    """Layer norm before each block instead of after it."""
    gradient_checkpointing: bool = free(False)
    """Recompute transformer layers, and backbone stages with frozen norms, in the backward pass: the same gradients,
    with less memory and more time."""

    def __post_init__(self) -> None:
        _at_least(1, "model", self, "hidden_dim", "heads", "dec_layers", "dim_feedforward", "num_queries")
        _at_least(0, "model", self, "enc_layers")
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
        parts = set(self.freeze or ())
        stages = {"stem", *(f"layer{number}" for number in range(1, int(self.last_stage[-1]) + 1))}
        everything = {"input-proj", "encoder", "decoder", "heads"} <= parts and ("backbone" in parts or stages <= parts)
        _require(not everything, "model.freeze names every part: leave one to be trained")


@dataclass(frozen=True)
class AttnConfig:
    """How attention scores become attention weights."""

    kind: Mapping = "softmax"
    """Mapping of every attention block without a setting of its own."""
    encoder_self: Mapping | None = None
    """Mapping of the encoder's self-attention. Unset: as kind."""
    decoder_self: Mapping | None = None
    """Mapping of the decoder's self-attention. Unset: as kind."""
    decoder_cross: CrossMapping | None = None
    """Mapping of the decoder's cross-attention. Unset: as kind."""
    alpha: float = 1.5
    """Exponent of entmax, in [0.2, 4]: 1 is softmax, 2 is sparsemax. entmax-learned starts from it."""
    alpha_range: tuple[float, float] = (1.0, 2.0)
    """Bounds of the exponents that entmax-learned learns, in [0.2, 4]. With one beyond 2 it takes 4 times as long."""
    topk: int = 32
    """Number of keys that topk keeps."""
    tv: float = 0.1
    """How strongly tvmax draws the weights of neighbouring cells together; 0: sparsemax. A stronger one is slower."""
    softmax_first: float | None = None
    """Fraction of the planned steps that train with softmax before the mapping takes over; evaluation always uses the
    mapping. Unset: 0.5 for sparsemax, tvmax and every entmax when trained from scratch, which they need; else 0."""
    recompute: bool | None = free(None)
    """Keep no attention weights for the backward pass, which computes them again: sparse attention then needs no more
    memory than softmax, and takes 1.4 to 2 times as long (on a CPU). Unset: on a GPU."""
    fused: bool = free(True)
    """On a GPU compute sparsemax and entmax in one kernel, if it agrees with the plain computation at the start."""

    def __post_init__(self) -> None:
        least, most = ALPHAS
        _require(least <= self.alpha <= most, f"attn.alpha is {self.alpha}: it lies in [{least:g}, {most:g}]")
        low, high = self.alpha_range
        _require(
            least <= low < high <= most,
            f"attn.alpha_range is {low:g} {high:g}: a lower and a higher bound in [{least:g}, {most:g}]",
        )
        _require(
            "entmax-learned" not in (self.kind, *self.mappings) or low < self.alpha < high,
            f"attn.alpha is {self.alpha}: a learned alpha starts inside attn.alpha_range ({low:g}, {high:g})",
        )
        _at_least(1, "attn", self, "topk")
        _at_least(0, "attn", self, "tv")
        first = self.softmax_first
        _require(first is None or 0 <= first < 1, f"attn.softmax_first is {first}: it lies in [0, 1)")

    @property
    def mappings(self) -> tuple[CrossMapping, ...]:
        """Those of the encoder's self-attention, the decoder's self-attention and its cross-attention."""
        return tuple(own or self.kind for own in (self.encoder_self, self.decoder_self, self.decoder_cross))


@dataclass(frozen=True)
class LossConfig:
    """Hungarian matching and the set criterion."""

    kind: Literal["softmax", "focal"] = "softmax"
    """Classification loss: cross-entropy over the classes and "no object", or sigmoid focal loss (Lin et al. 2017) of
    each class, with its matching cost; then 2 is usual for cost_class and ce_coef, and eos_coef has no part."""
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
    """Losses after every decoder layer, not only after the last."""

    def __post_init__(self) -> None:
        weights = [f.name for f in fields(self) if f.name != "kind"]
        _at_least(0, "loss", self, *weights)
        largest = max(weights, key=lambda name: getattr(self, name))
        value = getattr(self, largest)
        _require(value <= 1e6, f"loss.{largest} is {value}: a weight above 1e6 leaves nothing of the others")
        _require(
            self.cost_class + self.cost_bbox + self.cost_giou > 0, "loss: at least one matching cost must not be 0"
        )

    @property
    def focal(self) -> bool:
        """Whether the class head has no "no object", and each class a sigmoid."""
        return self.kind == "focal"


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
    """Learning rate over time: multiplied by 0.1 after every lr_drop epochs, one cycle over the run, or constant."""
    lr_drop: int = 200
    """Epochs after which the step schedule multiplies the learning rate by 0.1."""
    warmup: float = 0.1
    """Fraction of a one-cycle run during which the learning rate rises."""
    warmup_steps: int = 0
    """Optimizer steps during which the learning rate rises under the step and constant schedules."""
    clip_max_norm: float = 0.1
    """Largest gradient norm, to which larger ones are scaled down; 0: no clipping."""
    alpha_lr_factor: float = 10.0
    """Learning rate of learned alphas, relative to lr."""
    alpha_weight_decay: float = 0.0
    """Weight decay of learned alphas."""
    alpha_lr_drop: bool = False
    """Whether the schedule also applies to learned alphas."""
    ema: float | None = None
    """Decay of a moving average of the weights, kept beside them: evaluation and all that uses a checkpoint take the
    average. 0.9997 is usual. Unset: none."""

    def __post_init__(self) -> None:
        names = ("lr", "lr_backbone", "weight_decay", "clip_max_norm", "alpha_lr_factor", "alpha_weight_decay")
        _at_least(0, "optim", self, *names, "warmup_steps")
        _at_least(1, "optim", self, "lr_drop")
        _require(0 < self.warmup < 1, f"optim.warmup is {self.warmup}: it lies in (0, 1)")
        _require(self.ema is None or 0 < self.ema < 1, f"optim.ema is {self.ema}: a decay lies in (0, 1)")


@dataclass(frozen=True)
class TrainConfig:
    """The training loop: how long, on what, and what is kept."""

    name: str | None = free(None)
    """Name of the run. Unset: the preset's, or backbone and attention."""
    run_dir: str | None = free(None)
    """Folder of the run. Unset: runs/<date>_<name>. A run's folder gives its settings too, unless a preset is named;
    flags change them."""
    epochs: int = 300
    """Passes over the training data."""
    max_steps: int | None = None
    """Train for this many optimizer steps, whatever the number of epochs."""
    batch_size: int = 2
    """Images per rank and forward pass."""
    accumulate: int = 1
    """Forward passes per optimizer step. The gradient is exactly that of one large batch (but trained batch norm takes
    its statistics from each forward pass)."""
    precision: Precision | None = None
    """Arithmetic. Unset: bf16-mixed on a GPU that has it, else 32-true."""
    tf32: TF32 = "convolutions"
    """Where a GPU may compute float32 with 10 instead of 23 bits of mantissa. In convolutions, as PyTorch does."""
    accelerator: Literal["auto", "cpu", "cuda"] = free("auto")
    """Device type."""
    devices: int | None = free(None)
    """Processes on this machine, one device each. Unset: 1; under torchrun or SLURM: as launched."""
    preflight: bool | None = free(None)
    """Before the first step, run the largest batch that can occur forward and backward, to see whether it fits into
    memory and which batch does. It changes nothing else. Unset: only on a GPU."""
    compile: bool = free(False)
    """torch.compile the model: minutes at the start, then faster steps. Varying image sizes are compiled once."""
    seed: int = 42
    """Seed of initial weights, data order, augmentation and dropout."""
    resume: str | None = free(None)
    """A checkpoint file from which a new run folder starts. A folder that has a checkpoint always goes on from its own;
    auto insists on that."""
    log_every: int = free(10)
    """Optimizer steps between two records in log.jsonl, W&B and the progress line."""
    checkpoint_every: int = free(1)
    """Epochs between two checkpoints."""
    checkpoint_minutes: float = free(10.0)
    """Minutes between two checkpoints inside an epoch; 0: after every step."""
    keep_every: int | None = free(None)
    """Epochs between two checkpoints that are kept for good. Unset: only the last two and the best are kept."""
    deterministic: bool = free(False)
    """The same losses bit for bit in every run on the same machine. Slower on a GPU; always so on a CPU."""
    on_nonfinite: Literal["stop", "skip"] = free("stop")
    """When a loss or a gradient is not finite: stop all ranks, or drop the step on all ranks and go on."""
    max_nonfinite: int = free(10)
    """With skip: stop after this many such steps in a row."""
    report: Literal["none", "curves", "attention"] = free("curves")
    """What report.html shows, which is written into the run's folder at the end; attention takes longer to collect."""
    requeue: bool = free(False)
    """Under SLURM: put the job back into the queue (scontrol requeue) when a signal stops the run."""
    allow_config_change: bool = free(False)
    """Resume even if settings or data that change the result differ from those of the checkpoint."""

    def __post_init__(self) -> None:
        _at_least(1, "train", self, "epochs", "max_steps", "batch_size", "accumulate", "devices", "log_every")
        _at_least(1, "train", self, "checkpoint_every", "keep_every", "max_nonfinite")
        _at_least(0, "train", self, "checkpoint_minutes")
        _require(self.run_dir != "", "train.run_dir is empty: name a folder, or leave it out")
        _require(0 <= self.seed < 2**32, f"train.seed is {self.seed}: between 0 and 2**32 - 1")
        _require(
            self.name is None or (self.name != "" and not set(self.name) & set("/\\")),
            f"train.name is {self.name!r}: a name without slashes",
        )


@dataclass(frozen=True)
class EvalConfig:
    """When and how the model is evaluated."""

    every: int = free(1)
    """Epochs between two evaluations; the last epoch is always evaluated."""
    batch_size: int = free(1)
    """Images per rank and forward pass, of similar shape. 1, without padding, is the reference."""
    backend: Literal["hotcoco", "pycocotools"] = free("hotcoco")
    """Library that scores. Both give the same numbers."""
    topk: int = free(100)
    """With focal loss: most detections of an image, the best of all queries and classes."""
    attention_images: int = free(16)
    """Validation images on which each evaluation measures every attention head; 0: none."""

    def __post_init__(self) -> None:
        _at_least(1, "eval", self, "every", "batch_size", "topk")
        _at_least(0, "eval", self, "attention_images")


@dataclass(frozen=True)
class WandbConfig:
    """Weights & Biases."""

    mode: WandbMode | None = free(None)
    """Unset: as WANDB_DISABLED or WANDB_MODE says, else online if an API key is configured, else offline. It never
    prompts."""
    project: str | None = free(None)
    """Project. Unset: as WANDB_PROJECT says, else detr_fabric."""
    name: str | None = free(None)
    """Name of the run in W&B. Unset: as WANDB_NAME says, else the run's name, with the seed unless that is 42."""
    entity: str | None = free(None)
    """Team or user. Unset: as WANDB_ENTITY says, else the key's default."""
    group: str | None = free(None)
    """Group of runs. Unset: as WANDB_RUN_GROUP says."""
    tags: tuple[str, ...] = free(())
    """Tags of the run. Unset: as WANDB_TAGS says."""
    panel_images: int = free(8)
    """Validation images shown at each evaluation with predicted and ground-truth boxes."""

    def __post_init__(self) -> None:
        _at_least(0, "wandb", self, "panel_images")


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
        first = self.attn.softmax_first
        if first is None:
            first = 0.5 if model.checkpoint is None and SPARSE & {*self.attn.mappings} else 0.0
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
            attn=replace(self.attn, softmax_first=first),
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
        """The config that to_dict wrote, in this or an earlier version. Raises UserError for what it doesn't know."""
        default = cls(attn=AttnConfig(softmax_first=0.0))  # earlier versions had no softmax first
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
            raise UserError(f"a stored config has a setting that this version does not know: {error}") from error


def changes_results(name: str, config: Config) -> bool:
    """Whether another value of a setting (section.field) makes a resumed run another run."""
    if name in ("train.epochs", "train.max_steps"):  # unless the schedule depends on the end
        return config.optim.schedule == "one-cycle" or bool(config.attn.softmax_first)
    if name in ("train.batch_size", "train.accumulate", "data.max_batch_pixels"):  # the images of a step stay the same
        return config.model.norm == "batch"  # whose statistics are of each micro-batch
    section, key = name.split(".")
    (setting,) = (f for f in fields(getattr(config, section)) if f.name == key)
    return not setting.metadata.get("free", False)
