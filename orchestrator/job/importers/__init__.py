"""Configurations of other fine-tuning tools as job files; one table a tool says what each of its keys is here.

convert      start here: a configuration -> settings of a job, each with where it came from, and what has none
objectives   what a file trains for: copied answers, or preferred ones
draft        the job that is being made, and what has no counterpart
tables       the tables (NAME.yaml in this folder), and which tool a file is of
conversions  values that need more than another name
datasets     the data sources of each tool
sources      one of them: its keys by the tool's table, its columns and roles
written      the job file that is written, with where each value came from

axolotl, llama_factory, trl, ms_swift, unsloth, torchtune: a table each; transformers: keys that several of them share.
"""
