"""The verbs `serve` and `chat`."""

from __future__ import annotations

import json
import shlex
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from orchestrator.cli.bank import DEFAULT_BANK, translate_errors
from orchestrator.cli.options import JsonOption, RunsOption, complete_run, print_json, say, show
from orchestrator.errors import JobError
from orchestrator.job.paths import read_text_file, resolve_path
from orchestrator.views.screen import out
from strategies.adapter_bank.store import Bank

verbs = typer.Typer()
_ENGINES = ("auto", "transformers", "llama.cpp", "vllm")
WhatArgument = Annotated[
    list[str] | None,
    typer.Argument(help="runs, folders of adapters or models; with --bank its adapters", autocompletion=complete_run),
]
FromBankOption = Annotated[bool, typer.Option("--bank", help="adapters of the bank by name; without a name all")]
BankFolderOption = Annotated[Path, typer.Option("--bank-folder", help="folder of the bank")]
MaxAdaptersOption = Annotated[
    int, typer.Option("--max-adapters", min=1, help="held in memory; the least recently used one makes room")
]
EngineOption = Annotated[
    str, typer.Option("--engine", help="auto, transformers, llama.cpp or vllm", autocompletion=lambda: list(_ENGINES))
]
GgufOption = Annotated[Path | None, typer.Option("--gguf", help="of llama.cpp: the base model as a GGUF file")]
DtypeOption = Annotated[
    str | None, typer.Option("--dtype", help="float32, bfloat16 or float16; default: as the run trained")
]
VllmPythonOption = Annotated[
    Path | None, typer.Option("--vllm-python", help="of the environment that holds vLLM; default: vllm on PATH")
]
ClusterOption = Annotated[
    str | None, typer.Option("--cluster", help="Ray Serve LLM on a cluster: http://HOST:8265 of its dashboard")
]
StoreOption = Annotated[
    str | None,
    typer.Option("--adapter-store", help="of a cluster: s3://BUCKET/FOLDER, from which its nodes load adapters"),
]
ReplicasOption = Annotated[int, typer.Option("--replicas", min=1, help="of a cluster: the most copies of a model")]
GpusOption = Annotated[int, typer.Option("--gpus-per-replica", min=1, help="of a cluster: GPUs that share a model")]
KeyFileOption = Annotated[Path | None, typer.Option("--api-key-file", help="a file that holds the API key")]
KeyOption = Annotated[
    str | None,
    typer.Option(
        "--api-key", envvar="ORCHESTRATOR_API_KEY", help="the API key; others see it in the list of processes"
    ),
]


@verbs.command()
@translate_errors()
def serve(
    what: WhatArgument = None,
    from_bank: FromBankOption = False,
    bank_folder: BankFolderOption = DEFAULT_BANK,
    host: Annotated[str, typer.Option("--host", help="another than this machine's own needs an API key")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0: any free one")] = 8000,
    api_key: KeyOption = None,
    api_key_file: KeyFileOption = None,
    engine: EngineOption = "auto",
    gguf: GgufOption = None,
    vllm_python: VllmPythonOption = None,
    cluster: ClusterOption = None,
    adapter_store: StoreOption = None,
    replicas: ReplicasOption = 1,
    gpus_per_replica: GpusOption = 1,
    max_adapters: MaxAdaptersOption = 8,
    dtype: DtypeOption = None,
    runs: RunsOption = Path("runs"),
    json_: JsonOption = False,
) -> None:
    """Serve finished runs, adapters and models: the OpenAI API and a chat page, until Ctrl-C.

    A model's name is its run, its folder or what the bank calls it; `base` is the model that was not tuned.  What comes
    into a bank that is served whole is there within two seconds.

    Examples: orchestrator serve latest
              orchestrator serve ./my-adapter --port 8080
              orchestrator serve --bank
              orchestrator serve --bank sst2 imdb --host 0.0.0.0 --api-key-file key.txt
              orchestrator serve --bank --cluster http://192.168.1.10:8265 --adapter-store s3://models/adapters
    """
    import asyncio

    from orchestrator.serving import server

    address = server.Address(host, port, _api_key(api_key, api_key_file))
    python = vllm_python and resolve_path(vllm_python, "--vllm-python", kind="file")
    on_cluster = {"cluster": cluster, "adapter_store": adapter_store, "replicas": replicas}
    on_cluster["gpus_per_replica"] = gpus_per_replica
    options = _options(engine, gguf, max_adapters, dtype, vllm_python=python, **on_cluster)
    with server.bind(address) as listening:
        catalog = _catalog(what, Bank(bank_folder) if from_bank else None, runs)
        url = f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}"

        def begun() -> None:
            models = list(catalog.models)
            if json_:
                print_json({"url": url, "models": models})
            else:
                show("\n".join(_invitation(url, models, address.api_key is not None)))
            sys.stdout.flush()

        try:
            asyncio.run(server.serve(catalog, _engines(catalog, options), listening, address.api_key, begun))
        except KeyboardInterrupt:
            say("the server has ended")


@verbs.command()
@translate_errors()
def chat(
    what: WhatArgument = None,
    from_bank: FromBankOption = False,
    bank_folder: BankFolderOption = DEFAULT_BANK,
    url: Annotated[
        str | None, typer.Option("--url", help="a running server instead, e.g. http://localhost:8000")
    ] = None,
    system: Annotated[str, typer.Option("--system", help="the system message")] = "",
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="of an answer")] = 512,
    api_key: KeyOption = None,
    api_key_file: KeyFileOption = None,
    engine: EngineOption = "auto",
    gguf: GgufOption = None,
    dtype: DtypeOption = None,
    message: Annotated[str | None, typer.Option("--message", help="print the answer to this one and end")] = None,
    runs: RunsOption = Path("runs"),
    json_: Annotated[
        bool, typer.Option("--json", help="a JSON object a line for each answer; messages are lines of standard input")
    ] = False,
) -> None:
    """Chat with a tuned model in the terminal; /base and /tuned switch, /help shows all commands.

    Examples: orchestrator chat latest
              orchestrator chat latest --message "Hello" --json
              orchestrator chat latest --json < messages.txt > answers.jsonl
              orchestrator chat --url http://gpu-box:8000 --api-key-file key.txt
    """
    from orchestrator.serving.server import serving
    from orchestrator.serving.terminal import ApiClient

    if message is not None and not message.strip():
        raise JobError("--message: it is empty; give the text of a message")
    talk = partial(_talk, system=system, most=max_tokens, message=message, as_json=json_)
    if url:
        if not url.startswith(("http://", "https://")):
            raise JobError(f"--url {url}: give an address such as http://localhost:8000")
        client = ApiClient(url.rstrip("/").removesuffix("/v1"), _api_key(api_key, api_key_file))
        talk(client, (what or [""])[0])
        return
    catalog = _catalog(what if what or from_bank else ["latest"], Bank(bank_folder) if from_bank else None, runs)
    say("loading ...")
    with serving(catalog, _engines(catalog, _options(engine, gguf, 8, dtype))) as address:
        talk(ApiClient(f"http://{address.host}:{address.port}", address.api_key), "")


def _talk(client: Any, model: str, system: str, most: int, message: str | None, as_json: bool) -> None:
    from orchestrator.serving.terminal import ChatSession, answer_messages, run_chat

    models = client.models()
    tuned = model or next((one for one in models if not one.startswith("base")), models[0])
    if tuned not in models:
        raise JobError(f"{tuned} is not served there; there are {', '.join(models)}")

    def show_part(text: str) -> None:
        if as_json:
            say(text.rstrip())  # of commands: standard output holds answers alone
        else:
            out.print(text, end="", soft_wrap=True)

    print_line = partial(print_json, indent=None)
    session = ChatSession(client, models, tuned, tuned, show_part, system, most)
    if message is not None:
        reply = session.reply(message)
        print_line(reply) if as_json else out.print(reply["answer"], soft_wrap=True)
    elif as_json:
        if failed := answer_messages(session, print_line):
            say(f"not answered: {failed} of the messages; their lines have an error")
            raise typer.Exit(JobError.exit_code)
    else:
        say(f"{tuned} answers; /base and /tuned switch, /help shows more, Ctrl-D ends")
        run_chat(session)


def _catalog(what: list[str] | None, bank: Bank | None, runs: Path) -> Any:
    from orchestrator.serving.catalog import open_catalog

    if not what and bank is None:
        raise JobError("name a run, an adapter's folder or a model, e.g. `orchestrator serve latest`, or give --bank")
    return open_catalog(what or [], runs, bank, say)


def _engines(catalog: Any, options: Any) -> Any:
    from orchestrator.serving.engine_choice import engine_of

    return lambda base: engine_of(
        base, [model for model in catalog.models.values() if model.base == base.folder], options, say
    )


def _options(engine: str, gguf: Path | None, most: int, dtype: str | None, **more: Any) -> Any:
    from orchestrator.serving.engine_choice import EngineOptions

    return EngineOptions(engine, gguf and resolve_path(gguf, "--gguf", kind="file"), most, dtype, **more)


def _api_key(key: str | None, file: Path | None) -> str | None:
    """The key that an option, a file or the environment gives.  Raises JobError for an empty one."""
    if file is not None:
        key = read_text_file(file, "--api-key-file").strip()
    if key is not None and not key.strip():
        raise JobError("the API key is empty")
    return key


def _invitation(url: str, models: list[str], has_key: bool) -> list[str]:
    """What a user types next."""
    key = '-H "Authorization: Bearer $ORCHESTRATOR_API_KEY" ' if has_key else ""
    tuned = next((name for name in models if not name.startswith("base")), models[0])
    body = shlex.quote(json.dumps({"model": tuned, "messages": [{"role": "user", "content": "Hello"}]}))
    return [
        f"models: {', '.join(models[:8])}{f' and {len(models) - 8} more' if len(models) > 8 else ''}",
        f"chat page: {url}/    OpenAI API: {url}/v1",
        f"try: curl {url}/v1/chat/completions {key}-H 'Content-Type: application/json' -d {body}",
    ]
