"""A folder that `ollama create` takes: base and adapter, or a merged model, with template and stop words."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from orchestrator.errors import JobError
from orchestrator.export.chat_template import turn_texts
from orchestrator.job import model_files
from orchestrator.runs.condition import Finished
from orchestrator.runs.model_card import ends_of
from strategies.adapter_bank import gguf_adapter

_NAME = re.compile(r"[\w.:/-]{1,200}", re.ASCII)
BASE = "base.gguf"
TAKEN_AS_FOLDERS = ("llama", "mistral", "mixtral", "gemma", "gemma2", "phi3")  # Ollama's docs/import.md, safetensors


def place_base(finished: Finished, given: str | None, folder: Path) -> str:
    """What FROM says: a name in Ollama's library, or a GGUF file that is copied into the folder.  Raises JobError."""
    name = finished.job.spec.model.model_name_or_path
    file = Path(given).expanduser() if given else model_files.packaged_file(name)
    if file is not None and file.is_file():
        with file.open("rb") as stream:
            if stream.read(4) != b"GGUF":
                raise JobError(f"--base {file}: is no GGUF file")
        shutil.copyfile(file, folder / BASE)
        return f"./{BASE}"
    if given and _NAME.fullmatch(given) and not given.endswith(".gguf"):
        return given
    if given:
        raise JobError(f"--base {given}: is neither a GGUF file nor a name of Ollama's library")
    raise JobError(
        f"--ollama needs the base as Ollama takes it: --base FILE.gguf, or the name of {name} in Ollama's library, such"
        " as llama3.2:1b. It must be the model that was trained. `export --ollama --merged` needs none"
    )


def check_family(finished: Finished) -> None:
    """Raises JobError where Ollama does not import a folder of this family's safetensors."""
    kind = str(model_files.read_config(Path(finished.data.model)).get("model_type"))
    if kind not in TAKEN_AS_FOLDERS:
        raise JobError(
            f"--ollama --merged: Ollama imports folders of {', '.join(TAKEN_AS_FOLDERS)}, not of {kind}; as GGUF it"
            " takes all: give llama.cpp's convert_hf_to_gguf.py by --converter FILE"
        )


def write_modelfile(finished: Finished, folder: Path, origin: str, has_adapter: bool) -> list[str]:
    """Write Modelfile and README.md; sentences about what could not be said in them."""
    from orchestrator.training.model.loading import load_tokenizer

    tokenizer = load_tokenizer(str(finished.exported), finished.job)
    texts, notes = turn_texts(tokenizer), []
    lines = [f"FROM {origin}"] + ([f"ADAPTER ./{gguf_adapter.FILE}"] if has_adapter else [])
    template = texts.as_ollama() if texts else None
    if template is not None and '"""' not in template:
        lines.append(f'TEMPLATE """{template}"""')
    else:
        notes.append("the chat template is more than texts around turns: Ollama takes the one it finds in the base")
    system = finished.job.spec.data.system_prompt or (texts.default_system if texts else None)
    if system and '"""' not in system:
        lines.append(f'SYSTEM """{system}"""')
    elif system:
        notes.append('the system prompt holds """, which a Modelfile cannot: send it with each conversation')
    stops = [text for text in ends_of(finished.exported) if not text.startswith("token ")]
    lines += [f'PARAMETER stop "{text}"' for text in stops if '"' not in text]
    notes += [
        f"the end {text} holds a quote, which a Modelfile cannot: give it as a stop" for text in stops if '"' in text
    ]
    (folder / "Modelfile").write_text("\n".join(lines) + "\n", encoding="utf-8")
    name = re.sub(r"[^a-z0-9._-]+", "-", finished.job.spec.name.lower()).strip("-.") or "tuned"
    usage = [f"# {finished.job.spec.name}", "", "In this folder:", "", "```bash", f"ollama create {name} -f Modelfile"]
    usage += [f"ollama run {name}", "```", ""]
    (folder / "README.md").write_text("\n".join(usage), encoding="utf-8")
    return notes
