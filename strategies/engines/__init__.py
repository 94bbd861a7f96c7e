"""Dividing a training among workers: by DeepSpeed, or by unequal memory.

shard           start here: divides a prepared training as its techniques say
deepspeed_zero  ZeRO 1 to 3 and the offload of optimizer and weights, by DeepSpeed, configured from the plan
even_passes     as many passes on every worker, as DeepSpeed needs them
uneven_zero     ZeRO-1 over unequal devices
"""
