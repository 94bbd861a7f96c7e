"""What is installed on this machine, what each missing piece would bring, and the line to type for it.

checks  start here: every check together, as findings
system  GPUs against the installed torch, ports, disks, memory, the clock
"""
