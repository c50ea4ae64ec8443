"""See docs/trainers: nothing here yet."""
