"""What machines consist of: GPUs, cores, memory, energy, network interfaces; declared or looked up.

gpus           start here: the GPUs of this machine as their drivers' tools describe them
datasheet      published peaks of accelerators that people own or rent, for planning without the machine
energy         energy a machine really took, where its hardware counts it
gpu_links      what GPUs of one machine exchange: measured, declared, by the board's own links, or a guess over PCIe
hardware_file  a YAML file that declares machines which are not here -> ClusterCapability
hardware_section  one mapping of that file, read value by value with every mistake noted
interfaces     network interfaces of this machine and their addresses
load           what other programs leave of this machine's cores
limits         how much of this machine a process may use
torch_build    which GPUs the installed PyTorch can use
waiting        wait for GPUs that others use
torch_gpus     the GPUs as PyTorch sees them, and which of them is which of the driver's tool
"""
