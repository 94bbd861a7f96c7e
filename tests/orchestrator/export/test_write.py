"""The verb `export`: each form whole or not there, loadable by who it is for, over nobody's own files."""

import dataclasses
import importlib.util
import json
import os
import re
import shutil
import stat

import pytest
import torch
import yaml

from orchestrator.runs.run_folder import RunFolder
from tests.cli import called

FINISHED = "runs/finished"


def export(place, *arguments, check=0):
    return called("export", FINISHED, *arguments, cwd=place, check=check)


def written(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_merged_model_is_loaded_by_transformers_and_answers_as_the_run_did(finished, place, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    done = export(place, "--merged", "--out", tmp_path / "m", "--check", "--json")

    report = json.loads(done.stdout)
    assert (
        report["kind"] == "merged"
        and report["path"] == str(tmp_path / "m")
        and "gives the logits" in report["notes"][0]
    )
    assert report["check"]["engine"] == "transformers" and report["check"]["equal"] == report["check"]["compared"] == 2
    assert report["files"].keys() | {"export.json"} == set(written(tmp_path / "m"))
    base = AutoModelForCausalLM.from_pretrained(place / "model")
    tuned = PeftModel.from_pretrained(base, str(place / FINISHED / "adapter")).eval()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    with torch.no_grad():
        ids = torch.arange(40, 60)[None]
        torch.testing.assert_close(merged(ids).logits, tuned(ids).logits, rtol=1e-4, atol=1e-4)


def test_the_adapter_for_llama_cpp(finished, place, tmp_path):
    done = export(place, "--gguf", "--out", tmp_path / "g")

    assert written(tmp_path / "g") == ["README.md", "adapter.gguf", "export.json"]
    assert "14 linear maps of model are corrected" in done.stdout and f"wrote {tmp_path / 'g'}" in done.stdout
    assert "llama-cli -m BASE.gguf --lora adapter.gguf" in (tmp_path / "g" / "README.md").read_text()


def test_what_cannot_be_checked_is_said(finished, place, tmp_path):
    done = export(place, "--gguf", "--out", tmp_path / "g", "--check")

    is_installed = importlib.util.find_spec("xllamacpp") is not None
    reason = "the base as GGUF is not here" if is_installed else "pip install --no-deps xllamacpp brings it"
    assert f"not checked with llama.cpp: {reason}" in done.stdout


def test_a_folder_for_ollama_has_base_adapter_template_and_stop(finished, place, tmp_path):
    base = tmp_path / "base file.gguf"
    base.write_bytes(b"GGUF and more")

    export(place, "--ollama", "--base", base, "--out", tmp_path / "o")

    assert written(tmp_path / "o") == ["Modelfile", "README.md", "adapter.gguf", "base.gguf", "export.json"]
    lines = (tmp_path / "o" / "Modelfile").read_text().split("\n", 2)
    assert lines[:2] == ["FROM ./base.gguf", "ADAPTER ./adapter.gguf"]
    assert re.match(r'TEMPLATE """\{\{ range \.Messages.*?<\|im_start\|>assistant\n"""\n', lines[2], re.DOTALL)
    assert lines[2].endswith('PARAMETER stop "<|im_end|>"\n')
    assert "ollama create tiny -f Modelfile" in (tmp_path / "o" / "README.md").read_text()


def test_ollamas_own_name_of_the_base_is_taken_as_it_is(finished, place, tmp_path):
    export(place, "--ollama", "--base", "smollm2:135m", "--out", tmp_path / "o")

    assert (tmp_path / "o" / "Modelfile").read_text().startswith("FROM smollm2:135m\nADAPTER ./adapter.gguf\n")


def test_a_merged_model_for_ollama_needs_no_base(finished, place, tmp_path):
    done = export(place, "--ollama", "--merged", "--out", tmp_path / "o", "--check")

    assert (tmp_path / "o" / "Modelfile").read_text().startswith("FROM ./model\nTEMPLATE")
    assert "transformers loads it and gives 2 of 2 answers as the run did" in done.stdout


def test_a_folder_for_the_hub_has_a_card_that_the_hub_reads(finished, place, tmp_path):
    from huggingface_hub import ModelCard

    options = ("--licence", "Apache-2.0", "--language", "en", "--language", "ja")
    done = export(place, "--hub-folder", "--base", "some-org/a-model", *options, "--out", tmp_path / "h", "--check")

    assert "PEFT loads it and gives 2 of 2 answers as the run did" in done.stdout
    card = ModelCard.load(tmp_path / "h" / "README.md")
    after = RunFolder(place / FINISHED).result().after
    assert (card.data.license, card.data.language, card.data.base_model) == (
        "apache-2.0",
        ["en", "ja"],
        "some-org/a-model",
    )
    assert (card.data.library_name, card.data.pipeline_tag) == ("peft", "text-generation")
    assert {one.metric_type: one.metric_value for one in card.data.eval_results} == {
        key: round(value, 6) for key, value in after.scores.items()
    }
    head = yaml.safe_load(card.content.split("---")[1])
    assert head["base_model_relation"] == "adapter" and {"peft", "lora"} <= set(head["tags"])
    assert "PeftModel.from_pretrained(base, folder)" in card.text and "train.jsonl" in card.text
    assert "## Trained on" in card.text and "some-org/a-model', revision" not in card.text
    config = json.loads((tmp_path / "h" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("some-org/a-model", None)
    for file in (tmp_path / "h").iterdir():
        assert str(place).encode() not in file.read_bytes(), file.name


def test_a_base_that_nobody_can_get_is_not_published(finished, place, tmp_path):
    done = export(place, "--hub-folder", "--out", tmp_path / "h", check=2)

    assert "--base ORG/NAME" in done.stderr and not (tmp_path / "h").exists()
    export(place, "--hub-folder", "--merged", "--out", tmp_path / "h")
    assert "model.safetensors" in written(tmp_path / "h") and "adapter_config.json" not in written(tmp_path / "h")
    text = (tmp_path / "h" / "README.md").read_text()
    head = yaml.safe_load(text.split("---")[1])
    assert not head.keys() & {"base_model", "base_model_relation"}  # a folder's name may be another model's there
    assert "the merged model" in text.partition("- Checked: ")[2].partition("\n")[0]
    (found,) = head["model-index"]
    assert found["results"][0]["dataset"] == {"name": "eval.jsonl", "type": "eval"}


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--hub-folder", "--base", "not a name !!"), "is no name of the hub"),
        (("--hub-folder", "--base", "./models/tied"), "is no name of the hub"),
        (("--hub-folder", "--base", "a/b", "--language", "Japanese"), "is no code of a language"),
        (("--hub-folder", "--base", "a/b", "--licence", "My Licence: x"), "is no identifier of the hub"),
        (("--merged", "--licence", "mit"), "--licence belongs to --hub-folder"),
        (("--merged", "--base", "whatever"), "--base belongs to --ollama and --hub-folder"),
        (("--hub-folder", "--base", "a/b", "--converter", "README.md"), "--converter belongs to --gguf and --ollama"),
    ],
)
def test_what_the_hub_does_not_know_or_a_form_does_not_use_is_refused(finished, place, tmp_path, options, reason):
    (place / "README.md").touch()

    done = export(place, *options, "--out", tmp_path / "h", check=2)

    assert reason in done.stderr and not (tmp_path / "h").exists()


def test_the_address_of_a_page_and_a_revision_are_taken(finished, place, tmp_path):
    export(place, "--hub-folder", "--base", "https://huggingface.co/some-org/a-model@abc", "--out", tmp_path / "h")

    config = json.loads((tmp_path / "h" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("some-org/a-model", "abc")


CONVERTER = """#!/bin/sh
test -f "$1/config.json" && test "$2" = --outfile && printf 'GGUF of %s' "$(basename "$1")" > "$3"
"""


def test_a_model_as_gguf_is_made_by_the_converter_that_is_given(finished, place, tmp_path):
    script = tmp_path / "convert_hf_to_gguf.py"
    script.write_text(CONVERTER)
    script.chmod(0o755)

    done = export(place, "--gguf", "--merged", "--converter", script, "--out", tmp_path / "g")

    assert written(tmp_path / "g") == ["README.md", "export.json", "model.gguf"]
    assert (tmp_path / "g" / "model.gguf").read_text() == "GGUF of merged"
    assert "converting with convert_hf_to_gguf.py" in done.stderr


def test_without_a_converter_it_is_said_where_to_get_one(finished, place, tmp_path):
    done = export(place, "--gguf", "--merged", "--out", tmp_path / "g", check=2)

    assert "clone llama.cpp" in done.stderr and "--converter" in done.stderr
    assert written(tmp_path) == []


def test_a_converter_that_fails_leaves_nothing(finished, place, tmp_path):
    script = tmp_path / "convert_hf_to_gguf.py"
    script.write_text("import sys\nsys.exit('no such architecture')\n")

    done = export(place, "--gguf", "--merged", "--converter", script, "--out", tmp_path / "g", check=5)

    assert "convert_hf_to_gguf.py ended with 1: no such architecture" in done.stderr
    assert written(tmp_path) == ["convert_hf_to_gguf.py"]


def test_only_an_export_is_written_anew_and_only_when_forced(finished, place, tmp_path):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "thesis.txt").write_text("years")
    assert "exists already" in export(place, "--gguf", "--out", tmp_path / "own", "--force", check=2).stderr
    assert (tmp_path / "own" / "thesis.txt").read_text() == "years"

    export(place, "--gguf", "--out", tmp_path / "g")
    (tmp_path / "g" / "left over").touch()
    assert "--force writes an export anew" in export(place, "--gguf", "--out", tmp_path / "g", check=2).stderr
    assert (tmp_path / "g" / "left over").exists()
    export(place, "--gguf", "--out", tmp_path / "g", "--force")

    assert written(tmp_path / "g") == ["README.md", "adapter.gguf", "export.json"]
    assert written(tmp_path) == ["g", "own"]


@pytest.mark.parametrize("options", [(), ("--gguf", "--ollama"), ("--hub-folder", "--gguf")])
def test_one_form_is_written_at_a_time(finished, place, options):
    assert "export writes one form" in export(place, *options, check=2).stderr


def test_a_run_that_is_not_finished_is_not_exported(interrupted, place, tmp_path):
    done = called("export", "runs/interrupted", "--gguf", "--out", tmp_path / "g", cwd=place, check=2)

    assert "not finished" in done.stderr


def test_a_damaged_adapter_is_not_exported(finished, place, tmp_path, put_back):
    file = place / FINISHED / "adapter" / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)

    assert "has changed since it was handed back" in export(place, "--gguf", "--out", tmp_path / "g", check=2).stderr


@pytest.mark.skipif(os.getuid() == 0, reason="root writes everywhere")
def test_a_place_that_cannot_be_written_is_named(finished, place, tmp_path):
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        assert "cannot be written" in export(place, "--gguf", "--out", tmp_path / "g", check=2).stderr
    finally:
        tmp_path.chmod(0o755)


def test_a_password_in_what_would_be_published_stops_it(finished, place, tmp_path, put_back):
    from orchestrator.errors import RunFailed
    from orchestrator.export import hub_folder
    from orchestrator.runs.condition import require_finished

    found = require_finished(RunFolder(place / FINISHED))
    folder = shutil.copytree(found.exported, tmp_path / "folder")
    (folder / "notes.md").write_text("from https://user:a-password-7351@example.org/data\n")

    with pytest.raises(RunFailed, match=r"notes\.md would publish a password"):
        hub_folder.write(found, folder, hub_folder.Stated(base="some-org/a-model"), is_merged=True)


@pytest.mark.parametrize(("kind", "reason"), [("LORA", "use_dora"), ("SHIRA", "single entries of the weights")])
def test_what_gguf_cannot_hold_is_refused_with_the_way_out(finished, place, tmp_path, kind, reason):
    from orchestrator.errors import JobError
    from orchestrator.export.write import write_adapter
    from orchestrator.runs.condition import require_finished

    found = require_finished(RunFolder(place / FINISHED))
    folder = shutil.copytree(found.exported, tmp_path / "adapter")
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "peft_type": kind, "use_dora": True}))

    with pytest.raises(JobError, match=rf"{reason}.*`export --merged`"):
        write_adapter(dataclasses.replace(found, exported=folder), tmp_path / "adapter.gguf", "base")
