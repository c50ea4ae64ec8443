"""The inner products of each row's gradient with a direction, layer by layer: begin with taps.py."""
