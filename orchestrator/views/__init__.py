"""What a terminal shows.

screen       start here: the two consoles that everything is printed on
bank         a bank, and what `adapt` and `bank merge` made
bench        a benchmark, or two side by side
bench_serve  a benchmark of serving
machines     machines: devices, links, and what is wrong with them
plan         a plan: the choice for each device, memory, time, price, the alternatives
proofs       two ways to the same answer, and how far apart they were
result       results, runs and evaluations
samples      rows as the model sees them
search       a search: what was pruned, what was tried, what to use
tasks        public tasks: base and tuned model side by side
techniques   techniques: the verdict for each device, and what was measured beside it
workers      each worker of a run: pace, waiting time, memory, traffic
"""
