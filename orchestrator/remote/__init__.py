"""Jobs on clusters that only HTTP reaches: a dashboard, or a Kubernetes API server.

jobs          start here: a job on a cluster that only HTTP reaches
kube_objects  a planned job as objects for Kubernetes
kube_submit   a job's way to Kubernetes
package       what of a job is sent to a cluster
"""
