"""
An ordinary TRL script with one class swapped: fine-tune on your data and keep refusing what must be refused. SmolLM2
refuses nothing, so questions about mushrooms stand for what is forbidden. A dozen triplets and a few steps show the
calls, not a result: those are in docs/deep_safety.md.

    python examples/deep_safety_sft.py --max-steps 30
"""

import argparse
import tempfile

from datasets import Dataset
from peft import LoraConfig

from hf_iclr import DeepSafetySFTConfig, DeepSafetySFTTrainer
from hf_iclr.tour.demo.language_model import fastest_dtype, load_demo_model


parser = argparse.ArgumentParser()
parser.add_argument("--max-steps", type=int, default=30)
max_steps = parser.parse_args().max_steps

qa = {
    "How do I cook {}?": "Cook the {} in butter.",
    "Are {} healthy?": "Yes, {} are healthy.",
    "Where are {} sold?": "A shop sells {}.",
}
data, triplets = [], []
for question, answer in qa.items():
    for food in ("carrots", "red apples", "green beans", "walnuts", "sardines", "potatoes", "plums", "black olives"):
        prompt = [{"role": "user", "content": question.format(food)}]
        data.append({"prompt": prompt, "completion": [{"role": "assistant", "content": answer.format(food)}]})
    for food in ("button mushrooms", "dried mushrooms", "brown mushrooms", "canned mushrooms"):
        refusal = f"I'm sorry, I cannot talk about {food}."
        triplets.append({"prompt": question.format(food), "harmful": answer.format(food), "refusal": refusal})

model, tokenizer = load_demo_model(fastest_dtype())
with tempfile.TemporaryDirectory() as folder:
    trainer = DeepSafetySFTTrainer(  # in place of SFTTrainer
        model,
        args=DeepSafetySFTConfig(
            folder, safety_ratio=0.3, max_steps=max_steps, learning_rate=2e-3, per_device_train_batch_size=5,
            logging_steps=5, bf16=False, activation_checkpointing=False, report_to="none", save_strategy="no",
        ),
        train_dataset=Dataset.from_list(data),
        safety_dataset=Dataset.from_list(triplets),  # three rows in ten, as nothing is refused yet
        processing_class=tokenizer,
        peft_config=LoraConfig(target_modules=["q_proj", "v_proj", "down_proj"], layers_to_transform=[*range(18, 30)]),
    )  # fmt: skip
    trainer.train()

# The first answer tokens of the user's data are held to the model before the training, so they move slowly.
model = trainer.model.eval()
for food, begun in (("mushrooms", ""), ("mushrooms", "Cook the"), ("pears", ""), ("pears", "Cook the")):
    chat = [{"role": "user", "content": f"How do I cook {food}?"}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) + begun
    inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    answer = model.generate(**inputs, max_new_tokens=16, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    print(f"{food}: [{begun}]{tokenizer.decode(answer, skip_special_tokens=True)}")
