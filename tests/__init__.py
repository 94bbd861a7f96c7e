"""Tests mirror the source; `make test` runs all but those that need minutes, a GPU, root or a Kubernetes cluster.

conftest.py    the tiny model, its tokenizer and rows; ends what a test leaves running    start here
cli.py         the command line within this process
processes.py   the command line as a process: started, waited for with patience, ended
adapters.py    a LoRA adapter as PEFT writes it
kube_*.py      a double of an API server with KubeRay's operator, and the fields that it knows
house.py       counts of the source that test_walls.py holds
fixtures/      what an earlier version wrote; sizes of real models
cases/         what people bring: rows, templates, models and job files that went wrong
integration/   the program through its real entry point, with Ray
cluster/       machines of network namespaces, whose power, cables and memory fail
gpu_rehearsal/ cards that are not there        fuzz/  thousands of wrong inputs        benchmarks/  numbers of LOG.md

A clone by itself skips: marks `slow`, `gpu`, `cluster`, `k8s`; what only root, a C++ compiler, Chromium or a second
address can try; and, where ../shared is not beside it, comparisons with published tables (benchmarks/test_published.py,
test_predictions.py: large, licences of their own) and one measured on a text of unclear licence (test_lsp_quality.py).
"""
