"""Who divides a training among workers: DeepSpeed, or by unequal memory.

shard           start here: hands a prepared training to those who divide it among the workers, as its techniques sa
deepspeed_zero  ZeRO 1 to 3 and the offload of optimizer and weights, by DeepSpeed, configured from the plan
uneven_zero     ZeRO-1 over unequal devices
"""
