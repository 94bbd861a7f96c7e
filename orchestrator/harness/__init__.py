"""Public tasks by EleutherAI's lm-evaluation-harness, over the base and the tuned model of a run.

evaluate  start here: a finished run and tasks -> their scores, by an idle machine where there is one
measure   both models on the tasks, in the process that computes
wish      which tasks are to be measured, and how
"""
