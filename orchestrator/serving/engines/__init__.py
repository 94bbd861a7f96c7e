"""Engines that answer for a server: what computes, in a process of its own.

protocol             start here: what the server asks of an engine, and what comes back
process              an engine of ours as a process: spoken to in JSON lines, started again when it dies
host                 that process: reads queries, runs its engine step by step, writes pieces
transformers_engine  the engine for all that this program trains: rows join and leave the batch at every token
llama_cpp            the engine for quantised models without a GPU
vllm                 vLLM as a foreign process, by its HTTP API
ray_serve            Ray Serve LLM on a cluster with GPUs, by its dashboard and its HTTP API
openai_client        queries as requests of the OpenAI API, and its streams as pieces: what the last two share
adapters             adapters on the base's weights, the least recently used ones evicted
weights              loads models as the run that trained them did
kinds                how an adapter is computed beside others
batch                rows that are computed together, with one cache of keys and values
prompts              what a query asks, as tokens
sampling             the next token of a row
text                 tokens as text while they come, up to a stop
"""
