"""A stand-in for the pipeline that goes wrong in a known way: masks drift to the right until the next clicks."""

import numpy as np

from hf_iclr.vision.session.segments import FrameSegments


SIZE = (20, 40)


def truth(frames: int, start: int = 0) -> np.ndarray:
    """A rectangle 10 pixels wide, in sight from frame `start` on."""
    masks = np.zeros((frames, *SIZE), bool)
    masks[start:, 5:15, 10:20] = True
    return masks


def pixels(frames: int) -> np.ndarray:
    return np.zeros((frames, *SIZE, 3), np.uint8)


def iou(drift: int) -> float:
    return (10 - drift) / (10 + drift)


class DriftingPipe:
    """Its sessions are exact on a frame with a mask, a box or three clicks; then they lose a pixel a frame."""

    def __init__(self, start: int = 0):
        self.start = start
        self.sessions: list[DriftingSession] = []

    def session(self, video, **options):
        self.sessions.append(DriftingSession(video, options, self.start))
        return self.sessions[-1]


class DriftingSession:
    def __init__(self, video, options, start):
        self.video, self.options = video, options
        self.mask = truth(start + 1, start)[-1]
        self.clicks: dict[int, dict[int, list]] = {}  # by object, then frame
        self.passes = 0
        self.shown: list[int] = []
        self.latest = -1

    def add(self, frame, obj, points=None, labels=None, box=None, mask=None):
        given = list(zip(points or [], labels or [], strict=True))
        self.clicks.setdefault(obj, {})[frame] = given if given else [None] * 3
        return self.segments(frame)

    def correct(self, frame, obj, points, labels=None):
        self.clicks[obj].setdefault(frame, []).extend(zip(points, labels, strict=True))
        return self.segments(frame)

    def segments(self, frame):
        masks = {}
        for obj, clicks in self.clicks.items():
            before = [number for number in clicks if number <= frame]
            if before:
                last = max(before)
                drift = max(3 - len(clicks[last]), 0) if last == frame else min(frame - last, 20)
                masks[obj] = np.roll(self.mask, drift, axis=1)
        return FrameSegments(frame, SIZE, masks, dict.fromkeys(masks, 0.9), dict.fromkeys(masks, 5.0))

    def iterate(self, start=None):
        self.passes += 1
        begin = min(min(clicks) for clicks in self.clicks.values()) if start is None else start
        for frame in range(begin, self.video.num_frames):
            self.shown.append(frame)
            yield self.segments(frame)
