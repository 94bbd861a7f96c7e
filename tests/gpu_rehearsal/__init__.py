"""GPU code rehearsed without a GPU: what is stood in for is the hardware and its drivers' tools, never our own code."""
