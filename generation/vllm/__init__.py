"""Deferral rules in vLLM's speculative decoding, as a plugin: begin with rejection_sampler.py."""

from hf_iclr.generation.vllm.rejection_sampler import register, rejection_sample


__all__ = ["register", "rejection_sample"]
