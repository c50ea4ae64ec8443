from .annotated_images import read_coco_images, read_image_masks
from .annotated_video import AnnotatedVideo, to_annotated
from .annotated_videos import (
    read_png_videos,
    read_rows,
    read_sav_videos,
    read_videos,
)
from .annotation_json import read_coco, read_sav, read_ytvis, write_coco, write_sav, write_ytvis
from .mask_folders import (
    read_davis,
    read_object_folders,
    read_yolo,
    read_youtube_vos,
    write_davis,
    write_object_folders,
    write_yolo,
    write_youtube_vos,
)
from .overlay import draw_overlay, write_overlay
from .segment_files import given_segments

__all__ = [
    "AnnotatedVideo",
    "draw_overlay",
    "given_segments",
    "read_coco",
    "read_coco_images",
    "read_davis",
    "read_image_masks",
    "read_object_folders",
    "read_png_videos",
    "read_rows",
    "read_sav",
    "read_sav_videos",
    "read_videos",
    "read_yolo",
    "read_youtube_vos",
    "read_ytvis",
    "to_annotated",
    "write_coco",
    "write_davis",
    "write_object_folders",
    "write_overlay",
    "write_sav",
    "write_yolo",
    "write_youtube_vos",
    "write_ytvis",
]
