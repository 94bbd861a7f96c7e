"""What is served under which name, and a bank that is followed."""

import json
import shutil

import pytest

from orchestrator.errors import JobError
from orchestrator.serving.catalog import open_catalog
from tests.orchestrator.serving.conftest import add_to


def catalog(names, runs="runs", bank=None):
    said = []
    return open_catalog([str(name) for name in names], runs, bank, said.append), said


def test_a_finished_run_is_served_beside_its_base(finished, place):
    found, _ = catalog(["finished"], place / "runs")

    assert list(found.models) == ["base", "finished"]
    assert found.models["finished"].folder == str(place / "runs" / "finished" / "adapter")
    assert found.base_of(found.models["finished"]).run == str(place / "runs" / "finished")


def test_folders_of_one_base_share_it(adapters, model_folder):
    found, _ = catalog([adapters["plain"], adapters["dora"]])

    assert set(found.models) == {"base", "plain", "dora"}
    assert {model.base for model in found.models.values()} == {str(model_folder)}


def test_a_whole_model_is_served_alone(adapters):
    found, _ = catalog([adapters["whole"]])

    assert [(model.name, model.folder) for model in found.models.values()] == [("whole", None)]


def test_two_bases_have_a_name_each(adapters, model_folder, tmp_path):
    other = shutil.copytree(adapters["whole"], tmp_path / "other")
    folder = shutil.copytree(adapters["plain"], tmp_path / "moved")
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": str(other)}))

    found, _ = catalog([adapters["plain"], folder])

    assert list(found.models) == ["base", f"base:{other}", "plain", "moved"]
    assert found.models["moved"].base == str(other)


def test_whole_models_that_look_alike_are_served_each_from_its_own_folder(adapters, model_folder, tmp_path):
    """A digest looks at parts of the weights, and at no template: two tuned models may have the same one."""
    twin = shutil.copytree(adapters["whole"], tmp_path / "twin")
    (twin / "chat_template.jinja").write_text("{{ messages }}")

    found, _ = catalog([adapters["whole"], twin, model_folder, adapters["plain"]])

    folders = {name: model.base for name, model in found.models.items()}
    assert folders["whole"] == str(adapters["whole"]) and folders["twin"] == str(twin)
    assert folders["plain"] == str(model_folder) == folders[model_folder.name]  # the same folder is loaded once


def test_two_models_of_one_name_are_a_mistake(adapters, tmp_path):
    copy = shutil.copytree(adapters["dora"], tmp_path / "plain")

    with pytest.raises(JobError, match="two models are called plain"):
        catalog([adapters["plain"], copy])


def test_an_adapter_may_not_be_called_as_the_base(adapters, tmp_path):
    with pytest.raises(JobError, match="rename it"):
        catalog([shutil.copytree(adapters["plain"], tmp_path / "base")])


def test_what_comes_into_a_bank_and_goes_is_noticed(bank, adapters, model_folder):
    found, said = catalog([], bank=bank)
    assert list(found.models) == ["base", "first"]
    card = add_to(bank, model_folder, adapters["scaled"], "second")

    gone = found.refresh()
    both = list(found.models)
    bank.remove(card)
    left = found.refresh()

    assert (gone, both, [model.name for model in left]) == ([], ["base", "first", "second"], ["second"])
    assert list(found.models) == ["base", "first"] and not said


def test_an_unchanged_bank_is_not_read_again(bank, monkeypatch):
    found, _ = catalog([], bank=bank)
    monkeypatch.setattr(bank, "contents", lambda: pytest.fail("it was read"))

    assert found.refresh() == []


def test_a_damaged_adapter_is_reported_once_and_the_others_are_served(bank, adapters, model_folder):
    found, said = catalog([], bank=bank)
    card = add_to(bank, model_folder, adapters["scaled"], "second")
    (bank.folder(card.digest) / "card.json").write_text("{")

    found.refresh()
    (bank.folder(card.digest) / "note").touch()
    found.refresh()

    assert list(found.models) == ["base", "first"]
    assert len(said) == 1 and said[0].startswith("damaged: ")


def test_an_adapter_of_a_bank_is_found_by_its_name(bank):
    found, _ = catalog(["first"], bank=bank)

    assert list(found.models) == ["base", "first"]


@pytest.mark.parametrize("name", ["nothing", "./nothing", "\0"])
def test_what_is_not_there_is_said(name, tmp_path):
    with pytest.raises(JobError):
        catalog([name], tmp_path)


def test_models_may_have_japanese_names(bank, adapters, model_folder, tmp_path):
    add_to(bank, model_folder, adapters["scaled"], "猫アダプター")
    folder = shutil.copytree(adapters["plain"], tmp_path / "手元" / "犬")

    found, _ = catalog(["猫アダプター", folder], bank=bank)

    assert list(found.models) == ["base", "猫アダプター", "犬"]
