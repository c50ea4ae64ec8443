"""`pipeline("speculative-cascade")`."""

import numpy as np
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, TextGenerationPipeline
from transformers.utils.chat_template_utils import Chat

from .cascade_generation import enable_cascade
from .hub import PretrainedHubMixin, model_card, repository_name


class CascadeRecords(list):
    """The records of one prompt, one a returned sequence. `records["key"]` is short for `records[0]["key"]`."""

    def __getitem__(self, key):
        return super().__getitem__(0)[key] if isinstance(key, str) else super().__getitem__(key)


class SpeculativeCascadePipeline(PretrainedHubMixin, TextGenerationPipeline):
    """
    [`~transformers.TextGenerationPipeline`] whose model cascades. `model` and `assistant_model` are two models, or
    `model` alone is a composite one, or any: its drafts are then copied from its own text. Every record gets a key
    `"cascade"` with that prompt's statistics; prompts and chats may be mixed.

    Any argument of the cascading `generate` may be passed, such as `cascade_rule`, `cascade_alpha`,
    `num_assistant_tokens`.

    Raises:
        ValueError: if a rule but `spec` is named and there is no small model, or a prompt is empty.

    Example:

    ```python
    >>> import hf_iclr
    >>> from transformers import pipeline

    >>> pipe = pipeline("speculative-cascade", model="large", assistant_model="small")
    >>> out = pipe(["Explain rain.", messages], cascade_rule="token_v3", cascade_alpha=0.3, batch_size=2)
    >>> out[0]["generated_text"], out[0]["cascade"]["acceptance_rate"]
    ```
    """

    def __init__(self, model, *args, **kwargs):
        if not hasattr(model, "cascade_statistics"):  # by name: in code from the Hub the mixin is another object
            model = enable_cascade(model)
        small = kwargs.get("assistant_model")
        if isinstance(small, str):
            names = AutoConfig.from_pretrained(small).architectures or ()
            if not any(hasattr(transformers, name) for name in names):  # a draft of ours: the parent knows no other
                small = AutoModelForCausalLM.from_pretrained(small, dtype=model.dtype).to(model.device)
                kwargs["assistant_model"] = small
        super().__init__(model, *args, **kwargs)

    def _card(self, repo_id):
        composite = self.model.config.model_type == "speculative-cascade"
        large, half = self.model, self.assistant_model or self.model.cascade_pair[1]
        large, small = repository_name(large.name_or_path), half and repository_name(half.name_or_path)
        assistant = "" if composite or half is None else f'assistant_model="{small or "user/small-model"}", '
        usage = f"""from transformers import pipeline

pipe = pipeline("speculative-cascade", model="{repo_id}", {assistant}trust_remote_code=True)
out = pipe("Explain rain.", max_new_tokens=40)
print(out[0]["generated_text"], out[0]["cascade"]["acceptance_rate"])"""
        if composite:
            return self.model._card(repo_id, usage)
        drafts = """the small model, which is not in this repository, drafts, and a rule says for each token whether
its own stays or the large one's is written."""
        if half is None:
            drafts = "drafts are what followed the newest tokens earlier in the text, which stays the model's own."
        return model_card(
            f"{large or 'A local model'}, cascaded with {(small or 'a small model') if half else 'its own text'}",
            f"""The large half of a speculative cascade
([Faster Cascades via Speculative Decoding](https://huggingface.co/papers/2405.19261)) and the pipeline that cascades:
{drafts} Made with `hf_iclr`; {self.model.num_parameters():,} parameters.""",
            usage,
            [large],
            library_name="transformers",
            pipeline_tag="text-generation",
            tags=["speculative-cascade", "speculative-decoding"],
        )

    def check_model_type(self, supported_models):
        # A composite's class is in no list of transformers; what matters was checked above.
        pass

    def __call__(self, text_inputs, **kwargs):
        if isinstance(text_inputs, list | tuple) and not text_inputs:
            raise ValueError("Expected at least one prompt, got none.")
        return super().__call__(text_inputs, **kwargs)

    def preprocess(self, prompt_text, *args, **kwargs):
        chat = isinstance(prompt_text, list) and prompt_text and all(isinstance(turn, dict) for turn in prompt_text)
        if not chat and not isinstance(prompt_text, str | Chat):
            raise ValueError(
                f"Expected a prompt (a string, or a chat of messages), got {prompt_text!r:.80}. Several prompts are "
                "passed as a list."
            )
        if chat:  # among plain prompts; the parent takes lists of one kind only
            prompt_text = Chat(prompt_text)
        inputs = super().preprocess(prompt_text, *args, **kwargs)
        if inputs["input_ids"].shape[-1] == 0:
            raise ValueError("Expected a prompt of at least one token, got an empty one.")
        return inputs

    def _forward(self, model_inputs, **generate_kwargs):
        outputs = super()._forward(model_inputs, **generate_kwargs)
        prompts, sequences = outputs["generated_sequence"].shape[:2]
        # An object array is split by prompt as a tensor would be.
        outputs["cascade"] = np.empty((prompts, sequences), dtype=object)
        for row in range(prompts * sequences):
            outputs["cascade"].flat[row] = self.model.cascade_statistics.row(row)
        return outputs

    def postprocess(self, model_outputs, *args, **kwargs):
        statistics = model_outputs.pop("cascade")[0]
        records = CascadeRecords(super().postprocess(model_outputs, *args, **kwargs))
        for record, row in zip(records, statistics, strict=True):
            record["cascade"] = row
        return records
