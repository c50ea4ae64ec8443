"""Readers and writers of masks and annotations: begin with annotated_videos.py."""

import lazy_loader


__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
