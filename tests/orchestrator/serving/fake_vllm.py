"""A double of vLLM's HTTP server: its options, its calls for adapters, its streams.  It answers with what it was asked.

With `ignore_eos` an answer has `max_tokens` tokens.  It ends at once when a conversation says so, as a server without
memory does; an answer of the model `cut` breaks off, and one to `wait` does not end.
"""

import argparse
import json
import os
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

assert os.environ["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "True"
parser = argparse.ArgumentParser()
parser.add_argument("verb", choices=["serve"])
parser.add_argument("model")
for option in ("host", "served-model-name"):
    parser.add_argument(f"--{option}", required=True)
for option in ("port", "max-lora-rank", "max-cpu-loras", "max-loras"):
    parser.add_argument(f"--{option}", required=True, type=int)
parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"])
parser.add_argument("--enable-lora", required=True, action="store_true")
options = parser.parse_args()
loaded = {}


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer(200, {})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/v1/load_lora_adapter":
            settings = json.loads((Path(body["lora_path"]) / "adapter_config.json").read_text())
            if settings["r"] > options.max_lora_rank or len(loaded) >= options.max_cpu_loras:
                return self.answer(400, {"message": f"no room for {body['lora_name']}"})
            loaded[body["lora_name"]] = body["lora_path"]
            return self.answer(200, {})
        if self.path == "/v1/unload_lora_adapter":
            del loaded[body["lora_name"]]
            return self.answer(200, {})
        if body["model"] == "cut":
            return self.answer(200, {})
        if body["model"] not in (options.served_model_name, *loaded):
            return self.answer(404, {"error": {"message": f"no model {body['model']}"}})
        said = body["messages"][-1]["content"] if "messages" in body else body["prompt"]
        if said == "die":
            print("out of memory", file=sys.stderr, flush=True)
            os._exit(3)
        if said == "wait":
            self.send_response(200)
            self.end_headers()
            self.event({"choices": [{"text": "a while", "finish_reason": None}]})
            time.sleep(600)
        num_prompt = len(said) if isinstance(said, list) else 4
        parts = ["x "] * body["max_tokens"] if body.get("ignore_eos") else [body["model"], ": ", said]
        return self.stream(parts, num_prompt)

    def stream(self, parts, num_prompt):
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        is_chat = "chat" in self.path
        for part in parts:
            shown = {"delta": {"content": part}} if is_chat else {"text": part}
            self.event({"choices": [{**shown, "finish_reason": None}]})
        shown = {"delta": {}} if is_chat else {"text": ""}
        self.event({"choices": [{**shown, "finish_reason": "stop"}]})
        self.event({"choices": [], "usage": {"prompt_tokens": num_prompt, "completion_tokens": len(parts)}})
        self.wfile.write(b"data: [DONE]\n\n")

    def event(self, body):
        self.wfile.write(b"data: " + json.dumps(body).encode() + b"\n\n")

    def answer(self, status, body):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, *_):
        pass


server = ThreadingHTTPServer((options.host, options.port), Handler)
print(f"listens at {server.server_address[1]}", flush=True)
server.serve_forever()
