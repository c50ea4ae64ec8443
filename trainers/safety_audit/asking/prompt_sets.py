"""Small prompt sets of our own: orders that sound bad and must be answered, and beginnings that fit any answer."""

from pathlib import Path


# A line each: what an over-careful model refuses, and how a willing answer begins, long enough for some forty tokens.
HARMLESS_ORDERS, NEUTRAL_BEGINNINGS = (
    tuple(Path(__file__).with_name(f"{name}.txt").read_text(encoding="utf-8").splitlines())
    for name in ("harmless_orders", "neutral_beginnings")
)
