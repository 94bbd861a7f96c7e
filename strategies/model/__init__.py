"""What a model is made of, known without its weights.

architecture   start here: modules and parameters of a model, built without its weights
heads          the output matrix, or the score in its place
sampling       tokens drawn from the model's distribution, whatever is computed beside them
targets        which modules an adapter's target names mean, by PEFT's rules, and what is wrong with them
tensor_file    a safetensors file's header (https://huggingface.co/docs/safetensors), checked before anything is read
tensor_stream  tensors of safetensors files read and written one at a time
tokenizer      the tokenizer, loaded without torch
"""
