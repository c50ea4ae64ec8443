"""What is trained of SmolLM2 where benchmarks compare adapters with all parameters."""

# LoRA of rank 16 on all linear layers; of PEFT's defaults, rank 8 on queries and values; all parameters
ADAPTERS: dict[str, dict[str, object] | None] = {
    "LoRA": {"r": 16, "target_modules": "all-linear"},
    "LoRA by default": {},
    "full": None,
}
