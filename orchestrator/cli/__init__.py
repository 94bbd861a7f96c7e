"""The verbs: parse, call, print.

app       start here: the verbs
bank      the verbs `bank ...` and `adapt`
cluster   the verbs of a cluster of one's own machines
options   what the verbs share
progress  who watches a run
remote    what the verbs do for runs that live on a cluster behind a dashboard, and the verb `fetch`
report    the verbs `bench`, `report` and `tco`
search    the verb `search`, and what `resume` and `sync` do for searches
"""
