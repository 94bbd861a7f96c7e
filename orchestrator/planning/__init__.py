"""Workload + machines + wishes -> plan.  Pure: no torch, no ray, no clock.

planner     start here: workload + ClusterCapability + the job's wishes -> Plan
candidates  every way to run a workload on given machines, with its price
evaluation  when held-out rows are measured, and with what
explain     why a plan is as it is
pareto      the Pareto front
plan        how a job will run
price       what a plan costs
remedies    the smallest changes that would make a job fit, each found by planning again with the change
space       what a search may try
workload    jobSpec + the model's config.json + counts of the data -> Workload
"""
