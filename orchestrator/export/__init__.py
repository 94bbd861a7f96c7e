"""Writes a finished run's result in the form that other programs take.

write          start here: a folder of one kind, whole or not at all
chat_template  a chat template as the texts around each turn, and as Ollama writes it
check          loads what was written and compares its answers with the run's
converter      a merged model as GGUF, by llama.cpp's own script
hub_folder     a folder for the hub: the model and a complete card
ollama         a folder that `ollama create` takes
"""
