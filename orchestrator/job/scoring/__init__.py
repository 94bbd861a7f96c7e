"""What a job's own metrics are: functions of its folder, and the part of a text that is the answer.

functions  start here: `module:function` as a metric: found, loaded, tried, called
answers    the answer inside a text, by a regular expression, and when two of them are equal
"""
