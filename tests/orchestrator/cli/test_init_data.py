"""`init --train FILE`: the file is looked at, its columns stated, its first row shown; or nothing is written."""

import pytest

from orchestrator.job.job_file import read_job
from tests.cli import called
from tests.conftest import SMALL_MODEL, write_jsonl


def init(folder, train, check=0):
    return called("init", "job.yaml", "--model", str(SMALL_MODEL), "--train", train, cwd=folder, check=check)


def test_a_file_of_excel_is_mapped_and_its_first_row_shown(tmp_path):
    text = "Nr;Frage;Antwort\r\n1;Wo ist die Küche?;Im zweiten Stock.\r\n2;Wer kocht?;Niemand, leider.\r\n"
    (tmp_path / "faq.csv").write_bytes(text.encode("cp1252"))

    shown = init(tmp_path, "faq.csv").stdout

    assert "data.columns: {prompt: Frage, completion: Antwort}" in shown and "a guess" in shown
    assert "read as WINDOWS-1252" in shown and "separated by semicolons" in shown
    assert "Wo ist die Küche?" in shown and "⟦Im zweiten Stock.<|im_end|>" in shown
    spec = read_job(tmp_path / "job.yaml").spec
    assert spec.data.columns.stated() == {"prompt": "Frage", "completion": "Antwort"}
    assert "job.yaml is valid" in called("validate", "job.yaml", cwd=tmp_path, check=0).stdout


def test_turns_with_keys_and_speakers_of_their_own_are_mapped(tmp_path):
    turns = [{"who": "customer", "said": "Where is my lamp?"}, {"who": "agent", "said": "On its way."}]
    write_jsonl(tmp_path / "calls.jsonl", [{"id": 1, "log": turns}])

    shown = init(tmp_path, "calls.jsonl").stdout

    assert "data.columns: {messages: log, role: who, content: said}" in shown
    assert "data.roles: {customer: user, agent: assistant}" in shown and "⟦On its way.<|im_end|>" in shown


@pytest.mark.parametrize(("row", "told"), [({"n": 1}, "its columns hold no text: 'n'"), (None, "it holds no row")])
def test_a_file_without_text_is_refused_and_nothing_is_written(tmp_path, row, told):
    write_jsonl(tmp_path / "rows.jsonl", [row] if row else [])

    shown = init(tmp_path, "rows.jsonl", check=2)

    assert told in " ".join(shown.stderr.split()) and not (tmp_path / "job.yaml").exists()


def test_what_is_not_here_is_written_and_said(tmp_path):
    shown = init(tmp_path, "org/name").stdout

    assert "its columns are not looked at" in shown
    assert read_job(tmp_path / "job.yaml").spec.data.train == "org/name"
