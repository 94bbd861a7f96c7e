"""Serves runs, adapters and models: the OpenAI API over engines, a chat page, a chat in the terminal.

server         start here: an address, its engines, and the end of both
address        where a server listens, and which requests come from elsewhere
catalog        what is served: runs, adapters and models by name; a bank is followed
engine_choice  which engine serves a base model, and why
router         models to engines, one engine for each base model
door           HTTP: the OpenAI API, the chat page, health and metrics
openai_api     requests checked field by field, answers and errors in the form of the OpenAI API
terminal       a chat in the terminal with such a server
metrics        what /metrics shows
bench          how fast servers of ours answer, measured as their clients see it
engines        what computes, in processes of its own
"""
