"""A model in stages while it runs: which node has which layers, who stands by for whom, which stage is slow.

spare        start here: nodes without a stage that read the one whose loss would cost most
slow         stages that compute slower than planned, and the machines as measured, to plan again with
node_layers  which layers a node has read: planned again, they stay where they are if they can
"""
