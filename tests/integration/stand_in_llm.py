"""Stands for ray[llm] on a Ray cluster without it: an application that answers with its model and the question.

Serve sends the class by value, so all that it calls is its own.
"""

import asyncio
import json
import os
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from ray import serve

app = FastAPI()


@serve.deployment(ray_actor_options={"num_cpus": 0.1})
@serve.ingress(app)
class StandIn:
    def __init__(self, config):
        assert config["llm_configs"][0]["model_loading_config"]["model_id"] == "base"

    @app.get("/v1/models")
    def models(self):
        return {"object": "list", "data": [{"id": "base"}]}

    @app.post("/v1/chat/completions")
    async def chat(self, request: Request):
        body = await request.json()
        stream = self.answer(body["model"], body["messages"][-1]["content"])
        return StreamingResponse(stream, media_type="text/event-stream")

    async def answer(self, model, said):
        """One piece every 50 ms without an end where it is asked for one; its end is written down."""
        try:
            for part in (model, ": ", said):
                yield self.event({"delta": {"content": part}})
            while said == "for ever":
                await asyncio.sleep(0.05)
                yield self.event({"delta": {"content": "."}})
            if said == "die":
                os._exit(1)
            yield self.event({"delta": {}, "finish_reason": "stop"}, {"prompt_tokens": 4, "completion_tokens": 3})
        finally:
            with Path(os.environ["ENDED"]).open("a") as file:
                file.write(f"{said}\n")

    def event(self, choice, usage=None):
        return f"data: {json.dumps({'choices': [choice], 'usage': usage})}\n\n"


def build_openai_app(config):
    return StandIn.bind(config)


@serve.deployment(ray_actor_options={"num_cpus": 0.1})
class Other:
    async def __call__(self, request):
        return "other"


other_app = Other.bind()
