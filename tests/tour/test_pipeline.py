"""The demo pipeline's words."""

from hf_iclr.tour.demo.pipeline import WORDS, build_demo_pipeline


def test_the_demo_tokenizer_knows_every_word_as_one_token():
    pipeline = build_demo_pipeline("transformer")
    for word in WORDS:
        assert len(pipeline.tokenizer(word).input_ids) == 3 and len(pipeline.tokenizer_2(word).input_ids) == 2
