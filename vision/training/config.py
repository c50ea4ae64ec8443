"""Settings of [`Sam2Trainer`]."""

from dataclasses import dataclass, field

from transformers import TrainingArguments

from hf_iclr.untrusted import check_field_types
from hf_iclr.upstream import checkpointing_argument


PARTS = ("vision_encoder", "prompt_encoder", "mask_decoder", "memory_attention", "memory_encoder")


@dataclass
class Sam2TrainingConfig(TrainingArguments):
    """
    [`~transformers.TrainingArguments`] plus the settings of training in https://huggingface.co/papers/2408.00714.
    Defaults are those of the reference's fine-tuning, also where they differ from transformers': 40 epochs, batches of
    1, a learning rate of 5e-6 on a cosine down to a tenth of it, weight decay of 0.1 and gradients clipped at 0.1. The
    reference trains in bf16: `bf16=True`.

    Parameters:
        num_frames (`int`, *optional*, defaults to `8`):
            Frames of a clip at most; images and shorter videos may be among them.
        max_objects (`int`, *optional*, defaults to `3`):
            Objects of a clip at most.
        mask_share (`float`, *optional*, defaults to `0.5`):
            Share of clips whose objects are shown by a mask. Images never are.
        box_share (`float`, *optional*, defaults to `0.25`):
            Share shown by a box; a click shows the rest.
        max_prompted_frames (`int`, *optional*, defaults to `2`):
            Frames with a first prompt at most, frame 0 always among them.
        max_corrected_frames (`int`, *optional*, defaults to `2`):
            Frames with corrective clicks at most, unless a mask was the prompt. They become conditioning frames.
        corrective_clicks (`int`, *optional*, defaults to `7`):
            Clicks on each of these, each drawn from the error of the mask before it; 10 % from the true mask.
        augment (`bool`, *optional*, defaults to `True`):
            Whether clips to train on are flipped, turned, sheared and changed in colour, as the reference's are; clips
            to evaluate on never are.
        focal_weight (`float`, *optional*, defaults to `20.0`):
            Weight of the focal loss.
        dice_weight (`float`, *optional*, defaults to `1.0`):
            Weight of the dice loss.
        iou_weight (`float`, *optional*, defaults to `1.0`):
            Weight of the distance of expected and actual IoU.
        object_weight (`float`, *optional*, defaults to `1.0`):
            Weight of the object score's cross-entropy.
        vision_learning_rate (`float`, *optional*, defaults to `3e-6`):
            Learning rate of the vision encoder.
        layer_decay (`float`, *optional*, defaults to `0.9`):
            Factor by which it falls from each block of the encoder to the one before.
        freeze (`list[str]`, *optional*):
            Parts that stay as they are: "vision_encoder", "prompt_encoder", "mask_decoder", "memory_attention",
            "memory_encoder".
        frame_checkpointing (`bool`, *optional*, defaults to `False`):
            Gradient checkpointing: each frame is encoded and tracked again for the gradient, which saves most of the
            memory of long clips. Stands for `activation_checkpointing`, which transformers' SAM 2 does not support.

    Raises:
        ValueError: if a number is out of its range, or a part has another name.
    """

    learning_rate: float = field(default=5e-6, metadata={"help": "Initial learning rate; the reference's 5e-6."})
    weight_decay: float = field(default=0.1, metadata={"help": "Weight decay; the reference's 0.1."})
    max_grad_norm: float = field(default=0.1, metadata={"help": "Most norm of the gradient; the reference's 0.1."})
    lr_scheduler_type: str = field(
        default="cosine_with_min_lr", metadata={"help": "The scheduler; the reference's cosine down to a tenth."}
    )
    num_train_epochs: float = field(default=40, metadata={"help": "Passes over the videos; the reference's 40."})
    per_device_train_batch_size: int = field(default=1, metadata={"help": "Clips a step; the reference's 1."})
    per_device_eval_batch_size: int = field(default=1, metadata={"help": "Clips at once in evaluation."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Clips have no columns to remove."})
    num_frames: int = field(default=8, metadata={"help": "Frames of a clip at most."})
    max_objects: int = field(default=3, metadata={"help": "Objects of a clip at most."})
    mask_share: float = field(default=0.5, metadata={"help": "Share of clips shown by a mask."})
    box_share: float = field(default=0.25, metadata={"help": "Share of clips shown by a box; clicks show the rest."})
    max_prompted_frames: int = field(default=2, metadata={"help": "Frames with a first prompt at most."})
    max_corrected_frames: int = field(default=2, metadata={"help": "Frames with corrective clicks at most."})
    corrective_clicks: int = field(default=7, metadata={"help": "Corrective clicks on each of these."})
    augment: bool = field(default=True, metadata={"help": "Flip, turn, shear and recolour clips to train on."})
    focal_weight: float = field(default=20.0, metadata={"help": "Weight of the focal loss."})
    dice_weight: float = field(default=1.0, metadata={"help": "Weight of the dice loss."})
    iou_weight: float = field(default=1.0, metadata={"help": "Weight of the expected IoU's distance."})
    object_weight: float = field(default=1.0, metadata={"help": "Weight of the object score's cross-entropy."})
    vision_learning_rate: float = field(default=3e-6, metadata={"help": "Learning rate of the vision encoder."})
    layer_decay: float = field(default=0.9, metadata={"help": "Its factor from each block to the one before."})
    freeze: list[str] | None = field(default=None, metadata={"help": f"Parts to freeze, of {', '.join(PARTS)}."})
    frame_checkpointing: bool = field(default=False, metadata={"help": "Gradient checkpointing, frame by frame."})

    def __post_init__(self):
        check_field_types(self, Sam2TrainingConfig)
        for name, least in (
            *dict.fromkeys(("num_frames", "max_objects", "max_prompted_frames"), 1).items(),
            *dict.fromkeys(("max_corrected_frames", "corrective_clicks", "mask_share", "box_share"), 0).items(),
            *dict.fromkeys(("focal_weight", "dice_weight", "iou_weight", "object_weight"), 0).items(),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"Expected {name} of at least {least}, got {getattr(self, name)}.")
        if self.mask_share + self.box_share > 1 or self.mask_share == 1:
            raise ValueError(
                "Expected mask_share below 1, for images can't be shown by a mask, and at most 1 together with "
                f"box_share, got {self.mask_share} and {self.box_share}."
            )
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"Expected layer_decay above 0 and at most 1, got {self.layer_decay}.")
        for part in self.freeze or []:
            if part not in PARTS:
                raise ValueError(f"Expected parts to freeze among {', '.join(PARTS)}, got {part!r}.")
        if getattr(self, checkpointing_argument()):
            raise ValueError(f"SAM 2 has no {checkpointing_argument()}. Pass frame_checkpointing=True instead.")
        if self.lr_scheduler_type == "cosine_with_min_lr" and not self.lr_scheduler_kwargs:
            self.lr_scheduler_kwargs = {"min_lr_rate": 0.1}
        if self.accelerator_config is None:  # each process reads a stream itself: plans are no tensors to send
            self.accelerator_config = {"dispatch_batches": False}
        super().__post_init__()
