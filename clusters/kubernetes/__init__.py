"""Kubernetes with KubeRay: its API, its messages, its RayJob.

client    start here: a Kubernetes cluster with KubeRay, through its API server alone
connect   the connection to an API server: the official client, its configuration, commands in a pod
messages  what an API server, the operator and pods say, as what to do about it
rayjob    a job as KubeRay's RayJob
"""
