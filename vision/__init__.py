"""See docs/vision: nothing here yet."""
