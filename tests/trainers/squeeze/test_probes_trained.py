"""Probes are the sequences that are trained: before any step they are worth what an evaluation of the rows says."""

import copy

import pytest
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from hf_iclr.trainers.squeeze.config import SqueezeDPOConfig
from hf_iclr.trainers.squeeze.probes import SqueezeProbeCallback, build_probe_set
from hf_iclr.trainers.squeeze.trainer import SqueezeDPOTrainer
from tests.trainers.squeeze.pairs_and_logs import pair_rows
from tests.trainers.tiny import QUICK, tiny_llama


pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*keep_end.*:FutureWarning"),  # until TRL 2 it is there
]


def probed_and_evaluated(folder, tokenizer, rows, trainer_class=SqueezeDPOTrainer, **settings):
    """Nats per token of both answers, by the first pass over probes made of the rows, and by an evaluation of them."""
    settings = {**QUICK, "learning_rate": 0.0, "max_steps": 1, "probe_budget": 1.0, **settings}
    trainer = trainer_class(
        tiny_llama(),
        tiny_llama(),
        SqueezeDPOConfig(str(folder), **settings),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=tokenizer,
        probe_dataset=build_probe_set(rows),
    )
    trainer.train()
    evaluated = trainer.evaluate()
    probed = next(entry for entry in trainer.state.log_history if "probe/chosen/logp" in entry)
    return [
        (probed[f"probe/{side}/logp"], evaluated[f"eval_squeeze/logp_tok_{side}"]) for side in ("chosen", "rejected")
    ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, word_tokenizer):
    return probed_and_evaluated(tmp_path_factory.mktemp("whole"), word_tokenizer, pair_rows())


@pytest.mark.parametrize("truncation_mode", ["keep_start", "keep_end"])
def test_what_is_cut_off(tmp_path, word_tokenizer, whole, truncation_mode):
    lengths = {"max_length": 7, "truncation_mode": truncation_mode}
    pairs = probed_and_evaluated(tmp_path, word_tokenizer, pair_rows(), **lengths)
    for (probed, evaluated), (all_of_it, _) in zip(pairs, whole, strict=True):
        assert probed == pytest.approx(evaluated, abs=1e-5)
        assert abs(probed - all_of_it) > 1e-3


def test_the_end_is_kept_in_other_trainers(tmp_path, word_tokenizer):
    """Four tokens are left of `w1 w2 w3 w4 w5 w6` and the end: the last four, and one of the answer begins them."""
    rows = Dataset.from_list([{"prompt": "w1 w2 w3 ", "chosen": "w4 w5 w6 "}])
    settings = {**QUICK, "max_steps": 1, "learning_rate": 0.0}
    worth = {}
    for mode, max_length in (("keep_end", 5), ("keep_start", 5), ("keep_start", None)):
        args = SFTConfig(str(tmp_path), max_length=max_length, truncation_mode=mode, **settings)
        train = rows.rename_column("chosen", "completion")
        trainer = SFTTrainer(tiny_llama(), args, train_dataset=train, processing_class=word_tokenizer)
        callback = SqueezeProbeCallback(rows, trainer=trainer, probe_budget=1.0, decode_every=0)
        trainer.add_callback(callback)
        trainer.train()
        worth[mode, max_length] = callback._sets[0].answers
    assert worth["keep_end", 5] == [([3], [4, 5, 6, 49])]
    assert worth["keep_start", 5] == [([1, 2, 3], [4, 5])]
    assert worth["keep_start", None] == [([1, 2, 3], [4, 5, 6, 49])]


TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}w1 {{ m.content }} {% else %}w2 {% if quiet %}w3 w4 {% endif %}"
    "{{ m.content }} w49 {% endif %}{% endfor %}{% if tools %}w7 w7 {% endif %}"
    "{% if add_generation_prompt %}w2 {% if quiet %}w3 w4 {% endif %}{% endif %}"
)


def test_arguments_of_the_template(tmp_path, word_tokenizer):
    tokenizer = copy.deepcopy(word_tokenizer)
    tokenizer.chat_template = TEMPLATE

    def chats(**more):
        names = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
        return Dataset.from_list(
            [
                {key: [{"role": role, "content": row[key].strip()}] for key, role in names.items()} | more
                for row in pair_rows(4)
            ]
        )

    plain = probed_and_evaluated(tmp_path, tokenizer, chats())
    quiet = probed_and_evaluated(tmp_path, tokenizer, chats(chat_template_kwargs={"quiet": True}))
    for pairs in (plain, quiet):
        for probed, evaluated in pairs:
            assert probed == pytest.approx(evaluated, abs=1e-5)
    assert abs(plain[0][0] - quiet[0][0]) > 1e-3


def test_a_trainers_own_preparation(tmp_path, word_tokenizer, whole):
    class Backwards(SqueezeDPOTrainer):
        def _prepare_dataset(self, dataset, *args):
            rows = super()._prepare_dataset(dataset, *args)
            return rows.map(lambda row: {"prompt_ids": row["prompt_ids"][::-1]})

    own = probed_and_evaluated(tmp_path, word_tokenizer, pair_rows(), Backwards)
    assert own[0][0] == pytest.approx(own[0][1], abs=1e-5)
    assert abs(own[0][0] - whole[0][0]) > 1e-3
