"""What a Japanese user reads: help, mistakes, tables; and what stays English."""

import json
import re
import shutil

import pytest
import typer
from rich.cells import cell_len
from rich.text import Text

from orchestrator.cli import app as cli
from orchestrator.language.catalogue import translator
from orchestrator.language.choice import language_of
from orchestrator.language.help import print_in, wrap
from orchestrator.runs.comparison.gains import Gain
from orchestrator.runs.comparison.intervals import Interval
from orchestrator.views.screen import Screen, label, new_table
from tests.cli import called
from tests.conftest import FIXTURES

JAPANESE = re.compile(r"[\u3040-\u30ff\u4e00-\u9fff]")


@pytest.fixture
def in_japanese():
    print_in("ja")
    yield
    print_in("en")


@pytest.fixture
def folder(tmp_path):
    """The job and the runs of an earlier version, under Japanese names."""
    found = tmp_path / "作業 場所"
    shutil.copytree(FIXTURES / "earlier", found)
    (found / "results").rename(found / "結果")
    (found / "結果/finished").rename(found / "結果/日本語")
    (found / "train.jsonl").rename(found / "学習.jsonl")
    (found / "model").rename(found / "モデル")
    text = (found / "job.yaml").read_text().replace("train: train.jsonl", "train: 学習.jsonl")
    text = text.replace("name: tiny", "name: 日本語").replace("name_or_path: model", "name_or_path: モデル")
    (found / "ジョブ.yaml").write_text(text, encoding="utf-8")
    return found


def verbs():
    root = cli.app if not isinstance(cli.app, typer.Typer) else typer.main.get_command(cli.app)
    found = [[name] for name in root.commands]
    return [*found, *(["bank", name] for name in root.commands["bank"].commands)]


@pytest.mark.parametrize(
    ("arguments", "environment", "language"),
    [
        ([], {}, "en"),
        ([], {"LANG": "ja_JP.UTF-8"}, "ja"),
        ([], {"LANG": "ja_JP.UTF-8", "LC_ALL": "C"}, "en"),
        ([], {"LC_MESSAGES": "ja", "LANG": "de_DE"}, "ja"),
        ([], {"LANGUAGE": "en:ja", "LANG": "ja_JP"}, "en"),
        (["plan", "--lang", "ja"], {}, "ja"),
        (["--lang=en", "plan"], {"LANG": "ja_JP.UTF-8"}, "en"),
        (["plan", "--lang", "xx"], {"LANG": "ja_JP.UTF-8"}, "en"),
        (["plan", "--lang"], {"LANG": "ja_JP.UTF-8"}, "ja"),
        (["plan", "--json"], {"LANG": "ja_JP.UTF-8"}, "en"),
    ],
)
def test_the_language_is_that_of_the_option_or_of_the_environment(arguments, environment, language):
    assert language_of(arguments, environment) == language


def test_every_help_page_is_japanese_and_fits_a_window(tmp_path):
    assert len(verbs()) > 35

    for verb in verbs():
        page = called(*verb, "--help", "--lang", "ja", cwd=tmp_path, check=0).stdout
        head, _, options = page.partition("オプション:")
        assert page.startswith("使い方: orchestrator ") and JAPANESE.search(options), page
        texts = [line for line in head.splitlines() if line.strip() and not line.strip().startswith("orchestrator")]
        assert len(texts) > 1 and all(JAPANESE.search(line) for line in texts[1:] if len(line) > 30), page
        assert "--lang <en|ja>" in options
        long = [line for line in page.splitlines() if cell_len(line) > 80]
        assert all(line.strip().startswith("orchestrator") for line in long), long


def test_help_and_mistakes_are_english_without_a_wish(tmp_path):
    page = called("plan", "--help", cwd=tmp_path, check=0).output
    mistake = called("plan", "--nonsense", cwd=tmp_path, check=2).output

    assert "Usage: orchestrator plan" in page and not JAPANESE.search(page + mistake)


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["nonsense"], "エラー: コマンド 'nonsense' はありません。"),
        (["valdate"], "コマンド 'valdate' はありません。'validate'"),
        (["plan", "--nonsense"], "エラー: オプション --nonsense はありません"),
        (["plan"], "エラー: 引数 'job' がありません。"),
        (["plan", "なし.yaml"], "なし.yaml は存在しません。相対パスは"),
        (["schema", "--field", "data.trian"], "data.train"),
        (["bank", "show", "猫", "--bank", "銀行"], "にバンクはありません。`orchestrator bank add` で作られます"),
        (["report", "犬"], "そのような実行はありません。あるのは まだなし です"),
    ],
)
def test_mistakes_are_japanese_with_the_same_exit_code(arguments, shown, tmp_path):
    done = called(*arguments, cwd=tmp_path, LANG="ja_JP.UTF-8")

    assert done.returncode == 2
    assert shown in done.stderr


def test_a_starter_and_what_becomes_of_another_tools_keys_are_japanese(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    axolotl = FIXTURES / "other_tools/axolotl/qlora-1b.yml"

    called("init", "--full", "--train", "rows.jsonl", cwd=tmp_path, check=0, LANG="ja_JP.UTF-8")
    done = called("import", axolotl, "--output", "imported.yaml", cwd=tmp_path, check=0, LANG="ja_JP.UTF-8")

    comments = [line.partition("  # ")[2] for line in (tmp_path / "job.yaml").read_text(encoding="utf-8").splitlines()]
    english = [one for one in comments if one and not JAPANESE.search(one)]
    assert len([one for one in comments if one]) > 100
    assert len(english) <= 2, english  # names alone
    fates = re.findall(r"^  [\w.,\n ()]+: (.{25,})$", done.stdout, flags=re.MULTILINE)
    assert len(fates) >= 5
    assert all(JAPANESE.search(fate) for fate in fates if not fate.endswith(": auto")), fates


def test_gains_are_japanese():
    gain = Gain(80, Interval(0.95, 0.878, 0.986), Interval(0.04, -0.011, 0.09))

    assert translator("ja")(f"exact_match: {gain.text}") == (
        "exact_match: 87.8 %〜98.6 % (95 %、回答 80 件)。向上 -1.1〜+9.0 ポイント、偶然かもしれません"
    )


def test_json_is_english_whatever_the_language(tmp_path):
    done = called("plan", "なし.yaml", "--json", "--lang", "ja", cwd=tmp_path, check=2)

    assert "does not exist" in json.loads(done.stdout)["error"]


def test_runs_jobs_files_and_models_may_have_japanese_names(folder):
    def shown(*arguments):
        return called(*arguments, cwd=folder, check=0, LANG="ja_JP.UTF-8", HF_HUB_OFFLINE="1").stdout

    listed = shown("list", "--runs", "結果")
    status = shown("status", "日本", "--runs", "結果")
    shown("report", "日本語", "--runs", "結果", "--output", "報告.html")
    page = (folder / "報告.html").read_text(encoding="utf-8")

    assert re.search(r"日本語 +終了", listed) and re.search(r"実行 +状態 +ステップ", listed)
    assert "評価用データ" in status and "ステップ、330 トークン" in status
    assert (
        '<html lang="ja">' in page and "選ばれた設定とその理由" in page and "全重みを一つのカーネルで更新する" in page
    )
    assert "正しいジョブです (学習.jsonl は prompt_completion" in shown("validate", "ジョブ.yaml")


@pytest.mark.parametrize("width", [80, 118])
def test_columns_of_wide_characters_stand_below_each_other(width, in_japanese, capsys):
    table = new_table("node", "why", fold=True)
    table.add_row("日本語ノード", "一つの CPU で二つのプロセスがコアを取り合います。" * 4)
    table.add_row("a", "ok")
    screen = Screen()
    screen.width = width

    screen.print(table)

    head, *lines = capsys.readouterr().out.splitlines()
    column = cell_len(head[: head.index("理由")])
    assert all(cell_len(line) <= width for line in lines)
    assert cell_len(lines[0][: lines[0].index("一つ")]) == column == cell_len(lines[-1][: lines[-1].index("ok")])
    assert not any(line.strip().startswith(("。", "、")) for line in lines)
    assert cell_len(lines[0].rstrip()) > width - 4  # a sentence without spaces fills its line


def test_lines_break_between_characters_and_not_before_marks():
    assert wrap("猫が好きです。犬も", 10) == ["猫が好きで", "す。犬も"]
    assert wrap("a long word 長い", 8) == ["a long", "word 長", "い"]
    assert wrap("好きです。", 8) == ["好きで", "す。"]
    assert wrap("", 8) == []


def test_labels_take_the_same_cells(in_japanese):
    assert {cell_len(label(word)) for word in ("memory", "step", "in all", "")} == {10}


def test_a_word_longer_than_its_column_is_folded(in_japanese):
    lines = Text("日本語 " + "x" * 30).wrap(Screen(), 10, overflow="fold")

    assert all(cell_len(line.plain) <= 10 for line in lines)
