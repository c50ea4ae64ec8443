"""Second moments: what is summed, over what, and which directions are kept."""

import copy
import logging
import shutil

import pytest
import torch
from datasets import Dataset
from tokenizers.models import WordLevel

from hf_iclr.editors.alpha_edit.projections import choose_layers, find_down_projections
from hf_iclr.editors.alpha_edit.statistics import KeyStatistics
from tests.editors.tiny import text_rows, tiny_model, tiny_statistics
from tests.trainers.distributed import run_in_two


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


def keys_by_hand(model, tokenizer, layer, rows, skip=0):
    """Every row alone, no padding."""
    seen = []
    hook = model.model.layers[layer].mlp.down_proj.register_forward_hook(
        lambda _, inputs, __: seen.append(inputs[0][0])
    )
    with torch.no_grad():
        for row in rows:
            model(torch.tensor([tokenizer(row["text"])["input_ids"]]))
    hook.remove()
    return torch.cat([keys[skip:] for keys in seen]).double()


def assert_close_as_a_whole(got, expected):
    """Keys come from float32 forwards of other shapes: the sums differ by their rounding."""
    assert (got - expected).norm() < 1e-6 * expected.norm()


def test_sums_are_those_of_every_row_alone(model, word_tokenizer):
    rows = Dataset.from_list([{"text": "w1 w2 w3"}, {"text": "w4"}, {"text": "w5 w6 w7 w8"}, {"text": "w9 w9"}])
    made = KeyStatistics.from_dataset(model, word_tokenizer, rows, layers="all", batch_size=3, progress=False)
    assert made.layers == [0, 1, 2, 3] and made.tokens == 10 and made.rows == 4
    for layer in made.layers:
        keys = keys_by_hand(model, word_tokenizer, layer, rows)
        assert_close_as_a_whole(made.second_moment(layer), keys.T @ keys / len(keys))


def test_empty_texts_are_read_and_add_nothing(model, word_tokenizer):
    texts = ["w1 w2", "", "", "w3", "", "w4"]
    made, plain = (
        KeyStatistics.from_dataset(
            model, word_tokenizer, [{"text": text} for text in some], layers=[1], batch_size=2, progress=False
        )
        for some in (texts, [text for text in texts if text])
    )
    assert (made.rows, made.tokens) == (6, 4)
    assert_close_as_a_whole(made.sums[1], plain.sums[1])


def test_one_pass_for_all_layers_and_no_layer_above_the_last(model, word_tokenizer):
    calls = {1: 0, 2: 0, 3: 0}

    def count(layer):
        calls[layer] += 1

    hooks = [model.model.layers[layer].register_forward_hook(lambda *_, layer=layer: count(layer)) for layer in calls]
    KeyStatistics.from_dataset(model, word_tokenizer, text_rows(16), layers=[1, 2], batch_size=8, progress=False)
    for hook in hooks:
        hook.remove()
    assert calls == {1: 2, 2: 2, 3: 0}


def test_max_tokens_is_exact(model, word_tokenizer):
    made = KeyStatistics.from_dataset(model, word_tokenizer, text_rows(), max_tokens=50, progress=False)
    assert made.tokens == 50


def test_huge_first_keys_do_not_drown_the_others(word_tokenizer):
    """A key a million times the others': float32 sums would lose the small directions altogether."""
    model = tiny_model("llama")
    down = model.model.layers[0].mlp.down_proj
    huge = torch.zeros(32)
    huge[0] = 1e6

    def sink(_, inputs):
        keys = inputs[0].clone()
        keys[:, 0] = huge
        keys[:, 1:, 0] = 0
        return (keys,)

    hook = down.register_forward_pre_hook(sink)
    made = KeyStatistics.from_dataset(model, word_tokenizer, text_rows(), layers=[0], progress=False)
    hook.remove()
    values = torch.linalg.eigvalsh(made.second_moment(0))
    assert values[-1] > 1e10
    others = keys_by_hand(model, word_tokenizer, 0, text_rows(), skip=1)[:, 1:]
    torch.testing.assert_close(made.sums[0][1:, 1:], others.T @ others, rtol=1e-4, atol=1e-6)


def test_two_texts_add(model, word_tokenizer):
    whole = tiny_statistics(model, word_tokenizer)
    rows = text_rows()
    parts = [
        KeyStatistics.from_dataset(model, word_tokenizer, rows.select(part), progress=False)
        for part in (range(15), range(15, 40))
    ]
    both = parts[0] + parts[1]
    assert (both.tokens, both.rows, len(both.datasets)) == (whole.tokens, whole.rows, 2)
    assert_close_as_a_whole(both.second_moment(0), whole.second_moment(0))
    with pytest.raises(ValueError, match="statistics of the same model and layers"):
        whole + tiny_statistics(tiny_model("gpt2"), word_tokenizer)


def _statistics_of_a_rank(tokenizer):
    return tiny_statistics(tiny_model("llama"), tokenizer)


def test_two_processes_sum_to_one(model, word_tokenizer, tmp_path):
    whole = tiny_statistics(model, word_tokenizer)
    for made in run_in_two(_statistics_of_a_rank, tmp_path, word_tokenizer):
        assert (made.tokens, made.rows) == (whole.tokens, whole.rows)
        assert_close_as_a_whole(made.second_moment(0), whole.second_moment(0))


def test_an_interrupted_run_goes_on_where_it_was_kept(model, word_tokenizer, tmp_path, monkeypatch):
    rows = text_rows(130)
    settings = {"batch_size": 1, "max_tokens": 10**6, "checkpoint": tmp_path, "progress": False}
    whole = KeyStatistics.from_dataset(model, word_tokenizer, rows, **settings | {"checkpoint": None})
    added = []
    add = KeyStatistics._add

    def add_until_120(self, *args):
        if len(added) == 120:
            raise KeyboardInterrupt
        added.append(1)
        add(self, *args)

    monkeypatch.setattr(KeyStatistics, "_add", add_until_120)
    with pytest.raises(KeyboardInterrupt):
        KeyStatistics.from_dataset(model, word_tokenizer, rows, **settings)
    added.clear()
    resumed = KeyStatistics.from_dataset(model, word_tokenizer, rows, **settings)
    assert len(added) == 30  # of 130 rows 100 were kept
    assert (resumed.tokens, resumed.rows) == (whole.tokens, whole.rows)
    assert torch.equal(resumed.sums[0], whole.sums[0])
    with pytest.raises(ValueError, match="other text or settings"):
        KeyStatistics.from_dataset(model, word_tokenizer, rows, **settings | {"max_length": 5})


def test_rules_of_the_null_space(model, word_tokenizer):
    made = tiny_statistics(model, word_tokenizer)
    values = torch.linalg.eigvalsh(made.second_moment(0)).flip(0)
    # Between two eigenvalues: the solver that finds them rounds otherwise with eigenvectors than without.
    kept = made.preserved(0, threshold=values[4:6].mean().item())
    assert kept.shape == (32, 5) and kept.dtype == torch.float64
    torch.testing.assert_close(kept.T @ kept, torch.eye(5, dtype=torch.float64))
    moment = made.second_moment(0)
    torch.testing.assert_close(moment @ kept, kept * values[:5])
    share = (values[:6].sum() / values.sum()).item()
    assert made.preserved(0, energy=share - 1e-9).shape[1] == 6
    assert made.preserved(0, rank=7).shape[1] == 7
    assert made.preserved(0, rank=99).shape[1] == 32
    assert made.preserved(0, energy=0.0).shape[1] == 0
    for rules, sentence in (
        ({}, "exactly one"),
        ({"rank": 1, "energy": 0.5}, "exactly one"),
        ({"energy": 2}, "between 0 and 1"),
    ):
        with pytest.raises(ValueError, match=sentence):
            made.preserved(0, **rules)


def test_compressed_statistics_have_the_same_directions(model, word_tokenizer, tmp_path):
    whole = tiny_statistics(model, word_tokenizer, layers=[1, 2])
    small = whole.compress(rank=6)
    assert [value.shape for value in small.sums.values()] == [(32, 7)] * 2
    small.save_pretrained(tmp_path)
    loaded = KeyStatistics.from_pretrained(tmp_path)
    loaded.check_model(model)
    values = torch.linalg.eigvalsh(whole.second_moment(2)).flip(0)
    share = float(values[:5].sum() / values.sum()) - 1e-6
    for rule in ({"rank": 6}, {"rank": 3}, {"threshold": float(values[4:6].mean())}, {"energy": share}):
        basis, again = whole.preserved(2, **rule), loaded.preserved(2, **rule)
        assert basis.shape == again.shape
        torch.testing.assert_close(again @ again.T, basis @ basis.T, rtol=0, atol=1e-10)
        torch.testing.assert_close(again.T @ again, torch.eye(again.shape[1], dtype=torch.float64), rtol=0, atol=1e-10)
    assert loaded.compress(rank=3).sums[1].shape == (32, 4) and loaded.traces == whole.compress(energy=1.0).traces
    for rule in ({"rank": 7}, {"threshold": 0.0}, {"energy": 1.0}):
        with pytest.raises(ValueError, match="preserves fewer than 7 directions of layer 2"):
            loaded.preserved(2, **rule)
    with pytest.raises(ValueError, match="whole statistics of layer 1, got compressed"):
        loaded.second_moment(1)
    with pytest.raises(ValueError, match="Add them first"):
        loaded + whole
    assert whole.compress(rank=32).preserved(1, rank=32).shape == (32, 32)


def test_saved_loaded_and_pushed(model, word_tokenizer, tmp_path, hub):
    made = tiny_statistics(model, word_tokenizer)
    made.save_pretrained(tmp_path / "saved")
    loaded = KeyStatistics.from_pretrained(tmp_path / "saved")
    assert torch.equal(loaded.sums[0], made.sums[0])
    assert {**vars(loaded), "sums": 0} == {**vars(made), "sums": 0}
    printed = hub.run(f"""
        from hf_iclr import KeyStatistics
        KeyStatistics.from_pretrained({str(tmp_path / "saved")!r}).push_to_hub("user/keys")
        print(KeyStatistics.from_pretrained("user/keys").tokens)
    """)
    assert str(made.tokens) in printed
    shutil.rmtree(tmp_path / "saved")
    with pytest.raises(ValueError, match="key_statistics.safetensors"):
        (tmp_path / "saved").mkdir()
        KeyStatistics.from_pretrained(tmp_path / "saved")


def test_default_layers_are_an_eighth_up():
    deep = tiny_model("llama")
    projections = find_down_projections(deep)
    assert [p.index for p in choose_layers(projections * 8, "auto")] == [p.index for p in (projections * 8)[4:9]]
    with pytest.raises(ValueError, match=r"layers among \[0, 1, 2, 3\]"):
        choose_layers(projections, [4])


def test_bad_input_gets_a_sentence(model, word_tokenizer, caplog):
    with pytest.raises(ValueError, match="column 'text' with text, got \\['words'\\]"):
        KeyStatistics.from_dataset(model, word_tokenizer, Dataset.from_dict({"words": ["w1"]}), progress=False)
    with pytest.raises(ValueError, match="rows with text"):
        KeyStatistics.from_dataset(model, word_tokenizer, Dataset.from_dict({"text": []}), progress=False)
    for rows in ("w1 w2", {"train": text_rows()}, None):
        with pytest.raises(TypeError, match="Expected a tokenizer and rows with text"):
            KeyStatistics.from_dataset(model, word_tokenizer, rows, progress=False)
    for rows in (["w1 w2"], text_rows().to_pandas()):
        with pytest.raises(ValueError, match="column 'text' with text, got '"):
            KeyStatistics.from_dataset(model, word_tokenizer, rows, progress=False)
    for settings in ({"batch_size": 0}, {"max_length": -1}):
        with pytest.raises(ValueError, match="to be a whole number from 1"):
            KeyStatistics.from_dataset(model, word_tokenizer, text_rows(), progress=False, **settings)
    broken = tiny_model("llama")
    with torch.no_grad():
        broken.model.embed_tokens.weight[7] = float("nan")
    with caplog.at_level(logging.CRITICAL), pytest.raises(ValueError, match="finite keys"):
        tiny_statistics(broken, word_tokenizer)
    made = tiny_statistics(model, word_tokenizer)
    with pytest.raises(ValueError, match="statistics of layer 3, got those of \\[0\\]"):
        made.preserved(3, rank=1)
    made.sums[0][0, 0] = float("nan")
    with pytest.raises(ValueError, match="finite statistics"):
        made.preserved(0, rank=1)
    with pytest.raises(ValueError, match="whose weights differ"):
        made.check_model(tiny_model("gpt2"))


class _Interrupted(Exception):
    pass


def _kept_part(model, tokenizer, rows, folder, **settings):
    """A checkpoint of the first 50 rows."""

    def interrupted():
        yield from rows[:50]
        raise _Interrupted

    with pytest.raises(_Interrupted):
        KeyStatistics.from_dataset(
            model, tokenizer, interrupted(), batch_size=1, checkpoint=folder, progress=False, **settings
        )


def test_a_checkpoint_goes_on_with_its_own_text_only(word_tokenizer, tmp_path):
    """Lists and streams have no name of their own: what was read must be what would be read again."""
    model, rows = tiny_model("llama"), list(text_rows(60))
    _kept_part(model, word_tokenizer, rows, tmp_path)
    with pytest.raises(ValueError, match="other text or settings"):
        KeyStatistics.from_dataset(
            model, word_tokenizer, list(text_rows(60, seed=1)), checkpoint=tmp_path, progress=False
        )
    with pytest.raises(ValueError, match="other text or settings"):
        KeyStatistics.from_dataset(model, word_tokenizer, iter(rows[1:]), checkpoint=tmp_path, progress=False)
    other_words = copy.deepcopy(word_tokenizer)
    other_words.backend_tokenizer.model = WordLevel({f"w{i}": (i + 7) % 50 for i in range(50)}, unk_token="w0")
    with pytest.raises(ValueError, match="other text or settings"):
        KeyStatistics.from_dataset(model, other_words, rows, checkpoint=tmp_path, progress=False)
    whole = KeyStatistics.from_dataset(model, word_tokenizer, rows, progress=False)
    resumed = KeyStatistics.from_dataset(model, word_tokenizer, iter(rows), checkpoint=tmp_path, progress=False)
    assert (resumed.tokens, resumed.datasets) == (whole.tokens, whole.datasets)
    for layer in whole.layers:
        torch.testing.assert_close(resumed.sums[layer], whole.sums[layer], rtol=1e-4, atol=1e-3)
    other = KeyStatistics.from_dataset(model, word_tokenizer, text_rows(60, seed=1), progress=False)
    assert other.datasets != whole.datasets


def test_a_row_without_text_gets_a_sentence(word_tokenizer):
    rows = [*text_rows(2), {"text": None}]
    with pytest.raises(TypeError, match=r"Expected text in column 'text', got None. .*dataset.filter"):
        KeyStatistics.from_dataset(tiny_model("llama"), word_tokenizer, rows, progress=False)
