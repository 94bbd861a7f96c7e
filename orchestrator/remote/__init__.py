"""Runs jobs on clusters that only HTTP reaches: a Ray dashboard, or a Kubernetes API server.

jobs          start here: submit, follow, stop, resume, fetch a job on a cluster that only HTTP reaches
backends      opens the job backend of a run and starts its attempts
kube_nodes    the nodes that an API server lists, as machines to plan for
kube_objects  a planned job as objects for Kubernetes
kube_submit   submits a job to Kubernetes
package       packs a job for a cluster and unpacks its result
record        where a job is sent and where a run that was sent lives
"""
