"""The sections of a job file, with each key's type, limits, default and sentence.  Pydantic stays here, at the edge.

section     start here: what every section is, and the types that several of them use
training    model, data, train, checkpoint, eval: what is trained, how, and how it is measured
machines    strategy, goal, cost, cluster, kubernetes: where and how the work is laid out
methods     method: one section for each registered method, made from its dataclass
objectives  objective: likewise, one for each registered objective
search      search, bank, tracking: what is tried, what is kept of it, where results are mirrored
"""
