"""`hf-iclr train-sam2`: SAM 2 trained as a file says."""

from dataclasses import dataclass, field

from hf_iclr.cli.trl_script import parse_flags
from hf_iclr.vision.formats.annotated_videos import read_videos
from hf_iclr.vision.training.config import Sam2TrainingConfig
from hf_iclr.vision.training.trainer import Sam2Trainer


@dataclass
class TrainingSources:
    """
    What is trained and on what.

    Args:
        model (`str`, *optional*, defaults to `"facebook/sam2.1-hiera-tiny"`): Repository or folder.
        data (`list[str]`): Folders as [`~hf_iclr.vision.formats.annotated_videos.read_videos`] takes them.
        eval_data (`list[str]`, *optional*): The same, to evaluate the loss on.
    """

    model: str = field(
        default="facebook/sam2.1-hiera-tiny", metadata={"help": "SAM 2 to start from: repository or folder."}
    )
    data: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Folders to train on: JPEGImages and Annotations as in DAVIS and MOSE, SA-V's JSON beside its "
            "videos, COCO's annotations and images, images and masks, or what `annotate` wrote."
        },
    )
    eval_data: list[str] | None = field(default=None, metadata={"help": "The same, to evaluate the loss on."})


def run_training(arguments: list[str]) -> str:
    """
    Trains as a file says, saves the model and returns its folder.

    Args:
        arguments (`list[str]`):
            A file, YAML or JSON, with fields of [`TrainingSources`] and of [`Sam2TrainingConfig`], and flags of the
            same names, which count more than the file.

    Raises:
        TypeError: if the model is no SAM 2.
        ValueError: if a name is no setting, a value is out of its range, or a folder holds no annotated video.
        OSError: if there is no such file or model.
    """
    if arguments and not arguments[0].startswith("-"):
        arguments = ["--config", *arguments]
    sources, args = parse_flags((TrainingSources, Sam2TrainingConfig), "train-sam2", arguments)
    train, evaluate = (
        [video for folder in _listed(folders) for video in read_videos(folder, split)]
        for folders, split in ((sources.data, "train"), (sources.eval_data, "val"))
    )
    if not train:
        raise ValueError("Nothing says what to train on. Write for instance `data: [MOSE/train]`, or pass --data.")
    trainer = Sam2Trainer(sources.model, args, train, evaluate or None)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    return args.output_dir


def _listed(folders: str | list[str] | None) -> list[str]:
    return [folders] if isinstance(folders, str) else folders or []
