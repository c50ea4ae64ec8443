"""See docs/editors: nothing here yet."""
