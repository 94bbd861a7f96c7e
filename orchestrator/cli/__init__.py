"""The verbs: parse, call, print.

app       start here: the verbs together, and every error as a message with an exit code
bank      the verbs `bank ...` and `adapt`
bench     the verbs `bench` and `verify`
export    the verb `export`
imports   the verbs that write a job file: init, import
jobs      the verbs of a job file: recipes, schema, validate, inspect, plan, submit
machines  the verbs of machines: doctor, probe, techniques, head, join, nodes
options   what the verbs share: arguments and options, loading a job, printing
program   how the program is typed where the user stands, its verbs in groups
progress  prints the progress of a run
remote    the verb `fetch`, and how the verbs of a run work on a cluster that only HTTP reaches
report    the verbs `report`, `dashboard` and `tco`
runs      the verbs of a run: list, status, logs, stop, resume, evaluate, merge, sync
serving   the verbs `serve` and `chat`
search    the verb `search`, and how `status` and `resume` show and continue a search
"""
