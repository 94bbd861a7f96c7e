"""Rows -> tokens with a loss mask -> micro-batches.

prepare      start here: the job's data section -> tokenised datasets on disk, made once and found again by content
batches      samples -> the tensors of a micro-batch
data_files   where model and tokenised samples of a run lie: the contents of data.json
counts       what happened to the rows, counted
dataset      tokenised samples in one memory-mapped Arrow file, made once and found again by content
order        which samples each step sees
packing      which samples share a micro-batch
prefixes     how much rows have in common at their beginnings
samples      rows -> samples
sizes        how long the rows are, without preparing them
survey       one pass over a job's rows that keeps nothing
survey_cache  what such a pass found, kept for the next one over the same rows
readers      files and hub data sets -> rows
rendering    examples -> texts by the chat template -> token ids and the mask of supervised tokens
rows         what a row is, whatever file it came from
"""
