"""Connect to Ray, keep nodes running, start and watch work there.

connect          start here: ways to reach a Ray cluster
gpu_reservation  GPUs reserved with Ray by UUID, so that the one that was planned is the one that trains and nobody
jobs             start work on a Ray cluster through its dashboard (Ray Jobs API)
node_daemon      a Ray node of one's own
nodes            which nodes of a connected Ray cluster are there now, and which of them answer
preload          what a process of a resident Ray loads while it waits
probe            the capability of a whole Ray cluster
serve_dashboard  applications of Ray Serve on a cluster, through its dashboard; nothing of Ray is loaded for it
resident         the Ray that a head keeps on this machine, as jobs of the same user find it
remote_objects   objects that live on another node of the cluster this process is connected to
spares           processes of a head that wait with the libraries loaded
"""
