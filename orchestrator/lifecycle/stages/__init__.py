"""A model in stages while it runs: which node has which layers, who stands by for whom, which stage is slow.

held       which layers a node has read: planned again, they stay where they are if they can
spare      start here: nodes without a stage that read the one whose loss would hurt most
slow       stages that compute slower than planned: what machines are planned with then
"""
