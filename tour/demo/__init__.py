"""The models, texts and toys that the tour, the examples and the tests run on."""
