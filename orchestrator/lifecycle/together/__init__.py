"""Several jobs at once: those that can share a base model train together.

submit        start here: several jobs from their files to their results
share         which jobs share a base, how many at a time, and why the others train alone
side_by_side  how many workers have a part of one CPU each, and which jobs each of them takes
"""
