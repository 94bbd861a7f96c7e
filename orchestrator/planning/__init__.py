"""Workload + machines + wishes -> plan.  Pure: no torch, no ray, no clock.

planner      start here: workload + ClusterCapability + the job's wishes -> Plan
candidates   one way to run a workload on given devices, with its price: slots, shares, the network's part
enumeration  all candidates that fit, and why the other combinations do not
groups       which slots could train together: groups worth a full estimate
pipelines    candidates whose devices have layers of their own and pass micro-batches on
settings     the settings that one slot could train with, and which of them fit
memory_fit   whether plans fit into the memory of their devices and nodes
refusals     settings of a job that no device could train with
stated       what a job states and its plan has no use for: an error, or a notice
goal         the best candidate by the job's goal and its limits, and the Pareto front
evaluation   when held-out rows are measured, and with what
explain      why a plan is as it is, and what is missing where nothing fits
remedies     the smallest changes that would make a job fit, each found by planning again with the change
price        what a plan costs: machines and electricity
plan         the Plan: what the planner decided, written to plan.json and read again
workload     JobSpec + the model's config.json + counts of the data -> Workload
"""
