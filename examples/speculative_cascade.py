"""
Text from a speculative cascade, its statistics, and the same pair as one composite model.

    python examples/speculative_cascade.py                        # SmolLM2 and a draft made of its first layers
    python examples/speculative_cascade.py large-repo small-repo  # any pair that shares a tokenizer
"""

import sys
import tempfile

from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer, pipeline

from hf_iclr import SpeculativeCascadeForCausalLM
from hf_iclr.tour.demo.draft import load_demo_draft
from hf_iclr.tour.demo.language_model import fastest_dtype, load_demo_model


if len(sys.argv) == 3:
    tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
    large, small = (AutoModelForCausalLM.from_pretrained(name, dtype="auto") for name in sys.argv[1:])
else:
    large, tokenizer = load_demo_model(fastest_dtype())
    small = load_demo_draft("quick", large.dtype)

pipe = pipeline("speculative-cascade", model=large, assistant_model=small, tokenizer=tokenizer)
chat = [{"role": "user", "content": "Explain rain."}]
for rule, alpha in (("spec", 0.0), ("token_v3", 0.3), ("token_v3", 0.9)):
    print(f"\n--- {rule}, alpha {alpha}")
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    out = pipe(chat, cascade_rule=rule, cascade_alpha=alpha, max_new_tokens=64, streamer=streamer)
    statistics = out[0]["cascade"]
    print(
        f"[{statistics['new_tokens']} tokens, {statistics['tokens_per_large_forward']:.2f} per large forward, "
        f"{statistics['accepted']} of {statistics['drafted']} drafts accepted]"
    )

# One repository for both: plain `generate` of the reloaded model cascades. `push_to_hub` works as for any model.
with tempfile.TemporaryDirectory() as folder:
    composite = SpeculativeCascadeForCausalLM.from_cascade_pretrained(
        large, small, cascade_rule="opt", cascade_alpha=0.2
    )
    composite.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    reloaded = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    text = tokenizer.decode(reloaded.generate(**inputs, max_new_tokens=32)[0], skip_special_tokens=True)
    print(f"\n--- reloaded composite, rule {reloaded.config.cascade_rule}\n{text}")
