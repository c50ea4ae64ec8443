"""Readers and writers of masks and annotations: begin with annotated_videos.py."""
