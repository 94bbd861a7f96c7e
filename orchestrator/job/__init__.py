"""From a job file to what the user wants: keys, paths, secrets, the files of the model.

job_file            start here: job.yaml -> JobSpec, with every mistake at once
spec                JobSpec: the sections of a job file together
scoring             metrics of the job's own, and which part of a text is the answer
sections            the sections, with each key's type, limits, default and sentence
schema              the job file explained from its own definition
document            the YAML of a job file as plain values, each with its line
aliases             key names of other fine-tuning tools, and what each is called here
importers           configurations of other tools as jobs: a table of keys a tool
paths               the paths that a user names, checked once
secrets             finds secrets in a job file and keeps them out of what is written
hub                 models of the Hugging Face hub
model_files         where a model's files are
model_check         checks a model before anything starts, without reading a weight
architecture_cache  keeps in the user's cache what the library reported about a model
weights             the tensors that a model folder holds, by the headers of its files
tokenizer_size      whether every token of a model's tokenizer has a row in its embedding, by their files alone
space               what a search may try: job-file keys with their values
manifest            folders that are whole or not there
"""
