"""What the probe callback logs of one probe set: every kind of answer, their sums, repetition and own samples."""

import logging

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, Trainer

from hf_iclr.models import end_tokens

from .probe_scoring import COLUMNS, decode_answers, encode_answer, repetition_metrics, score_answers


logger = logging.getLogger(__name__)

# Kinds with a meaning of their own; every other kind is a bystander, an answer no loss speaks about.
CHOSEN, REJECTED, INITIAL_GREEDY = "chosen", "rejected", "initial_greedy"
LOGP, LOGP_ARGMAX = COLUMNS.index("logp_tok"), COLUMNS.index("logp_argmax")


class ProbeSet:
    """
    A probe set as token ids, and what its answers were worth at the start and last time.

    Args:
        name (`str`):
            In front of all keys, with an underscore, unless empty.
        dataset (`Dataset`):
            The column `prompt`, and one column per kind.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            See [`encode_answer`].
        max_length (`int`, *optional*):
            In tokens, prompt and answer together.
        max_new_tokens (`int`):
            Length of decoded answers.

    Raises:
        `ValueError`: when no row has all its answers within `max_length`.
    """

    def __init__(
        self,
        name: str,
        dataset: Dataset,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int | None,
        max_new_tokens: int,
    ) -> None:
        self.prefix = f"{name}_" if name else ""
        self.tokenizer, self.max_new_tokens = tokenizer, max_new_tokens
        self.kinds: list[str] = []
        self.answers: list[tuple[list[int], list[int]]] = []
        self.prompts: list[list[int]] = []
        self.greedy: list[list[int]] | None = None
        self.start, self.last = torch.empty(0), torch.empty(0)
        columns = [column for column in dataset.column_names if column != "prompt"]
        dropped = 0
        for row in dataset:
            encoded = {
                kind: encode_answer(tokenizer, row["prompt"], row[kind], max_length) for kind in columns if row[kind]
            }
            if len(encoded) < len(columns) or not all(answer for _, answer in encoded.values()):
                dropped += 1
                continue
            self.prompts.append(encoded[CHOSEN][0])
            self.kinds += encoded
            self.answers += encoded.values()
        if dropped:
            logger.warning(
                f"{dropped} of {len(dataset)} prompts are left out of the probes: an answer is empty, or the prompt "
                f"fills max_length={max_length} tokens."
            )
        if not self.prompts:
            raise ValueError(
                f"Every prompt of the probe set either lacks an answer or fills max_length={max_length} tokens. Raise "
                "`max_length`, or probe shorter prompts."
            )

    def set_greedy(self, greedy: list[list[int]]) -> None:
        """Add y*, the answers to watch from now on; a model may also have ended at once, without a token."""
        self.greedy = greedy
        self.kinds += [INITIAL_GREEDY] * len(greedy)
        self.answers += zip(self.prompts, greedy, strict=True)

    def measure(self, trainer: Trainer, batch_size: int, decode: bool, progress: bool) -> dict[str, float]:
        """
        Score every answer with the trainer's model as it is now.

        Args:
            trainer ([`~transformers.Trainer`]):
                See [`score_answers`].
            batch_size (`int`):
                Answers in one forward.
            decode (`bool`):
                Also decode; the first greedy answers become the kind `initial_greedy`.
            progress (`bool`):
                Show a progress bar.

        Returns:
            `dict[str, float]`: the keys of [`SqueezeProbeCallback`].

        Raises:
            `ValueError`: when a log-probability is not finite.
        """
        decoded = self._decode(trainer, batch_size) if decode else {}
        pulled = [kind in (CHOSEN, REJECTED) for kind in self.kinds]
        table = score_answers(trainer, self.answers, pulled, batch_size, progress)
        self._check_finite(table)
        if not len(self.last):
            self.last = table
        if not len(self.start):
            self.start = table[:, [LOGP, LOGP_ARGMAX]]
        logs = {**self._metrics(table), **decoded}
        if decode:  # after the check: nobody samples from weights that have diverged
            logs |= self._own_samples(trainer, batch_size)
        self.last = table
        return {f"{self.prefix}{key}": value for key, value in logs.items()}

    def _decode(self, trainer: Trainer, batch_size: int) -> dict[str, float]:
        greedy = decode_answers(trainer, self.tokenizer, self.prompts, self.max_new_tokens, batch_size)
        if self.greedy is None and INITIAL_GREEDY not in self.kinds:
            self.set_greedy(greedy)
        ends = end_tokens(trainer.accelerator.unwrap_model(trainer.model), self.tokenizer)
        return {f"repeat/{key}": value for key, value in repetition_metrics(greedy, ends).items()}

    def _own_samples(self, trainer: Trainer, batch_size: int) -> dict[str, float]:
        samples = decode_answers(trainer, self.tokenizer, self.prompts, self.max_new_tokens, batch_size, True)
        own = list(zip(self.prompts, samples, strict=True))
        table = score_answers(trainer, own, [False] * len(own), batch_size)
        return {f"onpolicy/{name}_own": _token_mean(table, name) for name in ("pressure", "valley_frac")}

    def _metrics(self, table: torch.Tensor) -> dict[str, float]:
        rows = {kind: torch.tensor([other == kind for other in self.kinds]) for kind in dict.fromkeys(self.kinds)}
        change, step = table[:, LOGP] - self.start[:, 0], table[:, LOGP] - self.last[:, LOGP]
        residual = _token_mean(self.last[rows[CHOSEN]], "G_norm")
        logs: dict[str, float] = {}
        for kind, these in rows.items():
            tokens = table[these, 0]
            speed = step[these] / tokens / (_token_mean(self.last[these], "A_norm") * residual)
            logs |= {
                f"probe/{kind}/logp": _token_mean(table[these], "logp_tok"),
                f"probe/{kind}/delta0": (change[these].sum() / tokens.sum()).item(),
                f"probe/{kind}/delta_step": (step[these].sum() / tokens.sum()).item(),
                f"probe/{kind}/LBK": speed.abs().mean().item(),
                f"probe/{kind}/signdelta": speed.mean().item(),
            }
            if kind in (CHOSEN, REJECTED):
                names = ("logp_argmax", "pressure", "valley_frac")
                logs |= {f"probe/{kind}/{name}": _token_mean(table[these], name) for name in names}
        logs["squeeze/displacement"] = -logs["probe/chosen/delta0"]
        bystanders = [kind for kind in rows if kind not in (CHOSEN, REJECTED, INITIAL_GREEDY)]
        if bystanders:
            chosen = rows[CHOSEN]
            rise = (table[chosen, LOGP_ARGMAX] - self.start[chosen, 1]).sum() / table[chosen, 0].sum()
            falls = torch.tensor([logs[f"probe/{kind}/delta0"] for kind in bystanders])
            down = torch.cat([change[rows[kind]] <= -0.5 for kind in bystanders])
            logs["squeeze/index"] = (rise - falls.mean()).item()
            logs["squeeze/frac_probes_down"] = down.double().mean().item()
        if {"other_train", "other_test"} <= set(rows):
            logs["crosstalk/other_train"] = logs["probe/other_train/delta0"] - logs["probe/other_test/delta0"]
        return logs

    def _check_finite(self, table: torch.Tensor) -> None:
        broken = {kind for kind, row in zip(self.kinds, table, strict=True) if not row.isfinite().all()}
        if broken:
            raise ValueError(
                f"The log-probabilities of the probes should be finite, those of {', '.join(sorted(broken))} are not. "
                "The weights have probably diverged: lower `learning_rate`, set `max_grad_norm`, or use `bf16`."
            )


def _token_mean(table: torch.Tensor, column: str) -> float:
    return (table[:, COLUMNS.index(column)].sum() / table[:, 0].sum()).item()
