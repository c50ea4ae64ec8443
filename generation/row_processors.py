"""Logits processors for rows of different lengths."""

import copy
from collections.abc import Callable

import torch
from transformers.generation import LogitsProcessorList, logits_process


# These look at the scores alone: all rows and positions can go through them at once.
_SCORES_ONLY = (
    logits_process.TemperatureLogitsWarper,
    logits_process.TopKLogitsWarper,
    logits_process.TopPLogitsWarper,
    logits_process.MinPLogitsWarper,
    logits_process.TypicalLogitsWarper,
    logits_process.EpsilonLogitsWarper,
    logits_process.EtaLogitsWarper,
    logits_process.SuppressTokensLogitsProcessor,
    logits_process.InfNanRemoveLogitsProcessor,
    logits_process.LogitNormalization,
)
# These keep state from call to call, or of another stream, that can't follow rows which roll back.
STATEFUL_PROCESSORS = (
    logits_process.EncoderNoRepeatNGramLogitsProcessor,
    logits_process.SynthIDTextWatermarkLogitsProcessor,
    logits_process.UnbatchedClassifierFreeGuidanceLogitsProcessor,
)


class RowProcessors:
    """
    Runs logits processors so that each row sees what it would see alone: its own tokens, and its own share of what a
    processor holds for every row of the batch.
    """

    def __init__(self, processors: LogitsProcessorList, batch_size: int):
        self.processors = processors
        self.scores_only = all(type(processor) in _SCORES_ONLY for processor in processors)
        self.of_row = [_for_row(processors, row) for row in range(0 if self.scores_only else batch_size)]

    def __call__(
        self, logits: torch.Tensor, rows: torch.Tensor, context: Callable[[int, int], torch.Tensor]
    ) -> torch.Tensor:
        """
        Args:
            logits (`torch.Tensor` of shape `(len(rows), length, vocab_size)`):
                Raw logits.
            rows (`torch.LongTensor` of shape `(n,)`):
                Which rows of the batch they are.
            context (`Callable`):
                Token ids, of shape `(1, tokens)`, that stand before the logits of an index into `rows` and a position.

        Returns:
            `torch.Tensor` of the shape of `logits`; `logits` itself when there is no processor.
        """
        if len(self.processors) == 0:
            return logits
        if self.scores_only:
            return self.processors(None, logits.flatten(0, 1)).view(logits.shape)
        scores = torch.empty_like(logits)
        for index, row in enumerate(rows.tolist()):
            for step in range(logits.shape[1]):
                scores[index, step] = self.of_row[row](context(index, step), logits[index, step][None].clone())[0]
        return scores


def _for_row(processors: LogitsProcessorList, row: int) -> LogitsProcessorList:
    processors = LogitsProcessorList(copy.copy(processor) for processor in processors)
    for processor in processors:
        if isinstance(processor, logits_process.RepetitionPenaltyLogitsProcessor):
            if isinstance(processor.prompt_ignore_length, torch.Tensor):
                processor.prompt_ignore_length = processor.prompt_ignore_length[row : row + 1]
        elif isinstance(processor, logits_process.EncoderRepetitionPenaltyLogitsProcessor):
            processor.encoder_input_ids = processor.encoder_input_ids[row : row + 1]
        elif isinstance(processor, logits_process.PrefixConstrainedLogitsProcessor):
            allowed = processor._prefix_allowed_tokens_fn
            processor._prefix_allowed_tokens_fn = lambda _, ids, allowed=allowed: allowed(row, ids)
    return processors
