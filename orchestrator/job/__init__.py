"""From a job file to what the user wants: keys, paths, secrets, the files of the model.

job_file            start here: job.yaml -> JobSpec
aliases             other tools' names for our keys (Axolotl, LLaMA-Factory, ms-swift, Unsloth, NeMo AutoModel, tran
architecture_cache  what the library said of a model, kept in the user's cache
document            the YAML of a job file as plain values, each with its line
hub                 models of the Hugging Face hub
manifest            folders that are whole or not there
model_check         a model checked before anything starts, without a weight being read
model_files         where a model's files are
paths               the paths that a person names, checked once
schema              the job file explained from its own definition
secrets             secrets are named in a job file, never written out
spec                the job file's sections and keys
tokenizer_size      whether every token of a model's tokenizer has a row in its embedding, by their files alone
weights             the tensors that a model folder holds, by the headers of its files
"""
