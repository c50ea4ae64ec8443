"""What sees. Nothing is here yet."""
