"""What a model is made of, known without its weights.

architecture  start here: what a model is made of, known without its weights
targets       which modules an adapter's target names mean, by PEFT's rules, and what is wrong with names that mean
tensor_file   the header of a safetensors file (https://huggingface.co/docs/safetensors), checked whole and read wit
"""
