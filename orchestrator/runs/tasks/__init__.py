"""Scores of public tasks, before and after training, as a run's record holds them.

task_score  start here: one metric of one task, of base and tuned model, and how sure the difference is
"""
