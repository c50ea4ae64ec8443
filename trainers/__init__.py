"""What trains. Nothing is here yet."""
