"""What a job states and its plan has no use for: an error, or a notice.

unused  start here: stated keys that nothing of the job, or of the plan made for it, looks at
"""
