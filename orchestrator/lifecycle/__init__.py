"""A job from its file to its result: prepare, run, recover, finish; and the checks before it starts.

run               start here: the whole path of a job in one file
prepare           everything that can fail before a run starts: its model, data, machines and plan
hooks             what the caller of a run hands in: who watches it, and what it does with a bank
background        a call in a thread of its own, watched by the main thread
recovery          nodes that are lost, return or join: plan again with those that are there
recovery_policy   what to do about them: pure rules, no clock, no cluster
baseline_helper   evaluates the base model on an idle node while the others train
finish            the end of a run: model card, bank, MLflow
verify            what a run may rely on when it is resumed
machines          where a plan's machines come from: a probe, a Ray cluster, a hardware file
calibration       measured over predicted step times of finished runs -> better predictions
validate          a job checked without starting it
inspect_data      rows as the model will see them, and what packing makes of them
stages            a model in stages while it runs: which layers are where, who stands by, which stage is slow
together          several jobs at once: those that can share a base model train together
proofs            `verify`: two ways to the same answer, tried on a job's own model, rows and machines
trace_check       `plan --trace`: the predicted memory against the model code on fake tensors
technique_report  every technique judged on every device
"""
