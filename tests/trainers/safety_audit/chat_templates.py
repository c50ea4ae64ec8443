"""
Chat templates in the manner of well-known models, each written here in its shortest form: the marks, the places of the
system prompt and of thoughts, and what is refused are theirs.
"""

from typing import NamedTuple

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


class Template(NamedTuple):
    """A template, the marks that are tokens, and what is right for it when "Q" is asked."""

    text: str
    special: tuple[str, ...]
    prompt: str  # as it is asked
    lead: str = ""  # between the prompt and an answer that is given
    said: str = "A"  # by the model, which says the thoughts "T" and the answer "A" in its own way
    thoughts: str | None = None
    kwargs: dict | None = None  # of a model that is not to think
    prompt_without_thoughts: str = ""
    system: str | None = None  # how the prompt begins with the system prompt "S", None where it is refused
    plain: tuple[str, ...] = ()


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}BLOCK{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
)
NO_THINKING = "enable_thinking is defined and not enable_thinking"
TEMPLATES = {
    "qwen3": Template(
        CHATML.replace("BLOCK", "<think>\n\n</think>\n\n")
        + "{% if add_generation_prompt %}<|im_start|>assistant\n{% if "
        + NO_THINKING
        + " %}<think>\n\n</think>\n\n{% endif %}{% endif %}",
        ("<|im_start|>", "<|im_end|>"),
        "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n",
        "<think>\n\n</think>\n\n",
        "<think>\nT\n</think>\n\nA",
        "T",
        {"enable_thinking": False},
        "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
        "<|im_start|>system\nS<|im_end|>\n",
        ("<think>", "</think>"),
    ),
    "glm4_moe": Template(
        "[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>\n"
        "{% if m.role == 'assistant' %}<think></think>\n{% endif %}{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% if "
        + NO_THINKING
        + " %}{{ '\n<think></think>' }}{% endif %}{% endif %}",
        ("[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|system|>"),
        "[gMASK]<sop><|user|>\nQ<|assistant|>",
        "\n<think></think>\n",
        "\n<think>T</think>\nA",
        "T",
        {"enable_thinking": False},
        "[gMASK]<sop><|user|>\nQ<|assistant|>\n<think></think>",
        "[gMASK]<sop><|system|>\nS<|user|>",
        ("<think>", "</think>"),
    ),
    "gpt_oss": Template(
        "<|start|>system<|message|>Reasoning: {{ reasoning_effort | default('medium') }}<|end|>{% for m in messages %}"
        "{% if m.role == 'system' %}<|start|>developer<|message|>{{ m.content }}<|end|>"
        "{% elif m.role == 'user' %}<|start|>user<|message|>{{ m.content }}<|end|>"
        "{% else %}<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|return|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant{% endif %}",
        ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>"),
        "<|start|>system<|message|>Reasoning: medium<|end|><|start|>user<|message|>Q<|end|><|start|>assistant",
        "<|channel|>final<|message|>",
        "<|channel|>analysis<|message|>T<|end|><|start|>assistant<|channel|>final<|message|>A",
        "T",
        {"reasoning_effort": "low"},
        "<|start|>system<|message|>Reasoning: low<|end|><|start|>user<|message|>Q<|end|><|start|>assistant",
        "<|start|>system<|message|>Reasoning: medium<|end|><|start|>developer<|message|>S<|end|>",
    ),
    "nemotron_3": Template(
        CHATML.replace("BLOCK", "<think></think>")
        + "{% if add_generation_prompt %}<|im_start|>assistant\n{% if "
        + NO_THINKING
        + " %}<think></think>{% else %}<think>\n{% endif %}{% endif %}",
        ("<|im_start|>", "<|im_end|>"),
        "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n<think>\n",
        "\n</think>\n\n",
        "T\n</think>\nA",
        "T",
        {"enable_thinking": False},
        "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n<think></think>",
        "<|im_start|>system\nS<|im_end|>\n",
        ("<think>", "</think>"),
    ),
    "deepseek_r1": Template(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% elif m.role == 'user' %}"
        "<｜User｜>{{ m.content }}{% else %}<｜Assistant｜>{{ m.content.split('</think>')[-1] }}{{ eos_token }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}<｜Assistant｜><think>\n{% endif %}",
        ("<｜User｜>", "<｜Assistant｜>"),
        "<bos><｜User｜>Q<｜Assistant｜><think>\n",
        "\n</think>\n\n",
        "T\n</think>\n\nA",
        "T",
        system="<bos>S<｜User｜>",
        plain=("<think>", "</think>"),
    ),
    "magistral": Template(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}[SYSTEM_PROMPT]{{ m.content }}"
        "[/SYSTEM_PROMPT]{% elif m.role == 'user' %}[INST]{{ m.content }}[/INST]{% else %}{{ m.content }}"
        "{{ eos_token }}{% endif %}{% endfor %}",
        ("[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[THINK]", "[/THINK]"),
        "<bos>[INST]Q[/INST]",
        said="[THINK]T[/THINK]A",
        thoughts="T",
        system="<bos>[SYSTEM_PROMPT]S[/SYSTEM_PROMPT][INST]",
    ),
    "llama_2": Template(
        "{% if messages[0].role == 'system' %}{% set sys = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
        "{% set chat = messages[1:] %}{% else %}{% set sys = '' %}{% set chat = messages %}{% endif %}"
        "{% for m in chat %}{% if m.role == 'user' %}"
        "{{ bos_token }}[INST] {{ (sys if loop.first else '') + m.content }} [/INST]"
        "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}",
        (),
        "<bos>[INST] Q [/INST]",
        system="<bos>[INST] <<SYS>>\nS\n<</SYS>>\n\n",
    ),
    "llama_3": Template(
        "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
        "{{ m.content | trim }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<bos><|start_header_id|>user<|end_header_id|>\n\nQ<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        system="<bos><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|>",
    ),
    "mistral": Template(
        "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
        "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %}{{ m.content }}{{ eos_token }}{% endif %}"
        "{% endfor %}",
        (),
        "<bos>[INST] Q [/INST]",
    ),
    "gemma": Template(
        "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
        "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        ("<start_of_turn>", "<end_of_turn>"),
        "<bos><start_of_turn>user\nQ<end_of_turn>\n<start_of_turn>model\n",
    ),
    "phi": Template(
        "{% for m in messages %}{% if m.role != 'system' %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
        ("<|user|>", "<|assistant|>", "<|end|>"),
        "<|user|>\nQ<|end|>\n<|assistant|>\n",  # it drops a system prompt without a word
    ),
}


def template_tokenizer(text: str, special: tuple[str, ...] = (), plain: tuple[str, ...] = ()):
    """A token for each byte and for each mark."""
    alphabet = {character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(alphabet, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=text)
    tokenizer.add_special_tokens({"bos_token": "<bos>", "eos_token": "<eos>"})
    tokenizer.add_tokens([AddedToken(token, special=True) for token in special], special_tokens=True)
    tokenizer.add_tokens(list(plain))
    return tokenizer
