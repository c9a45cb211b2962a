"""A hub folder: the card's figures are those of the run, nothing is uploaded unasked, the hub's errors are said."""

import json
import sys
from pathlib import Path

import pytest
from folder_cases import REPOSITORY
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import OfflineModeIsEnabled

sys.path.append(str(REPOSITORY / "tests" / "report"))
import sample

from s2quant.cli import main
from s2quant.errors import UserError
from s2quant.export.card import FISH, licence_of
from s2quant.export.publish import START, hub_card, prepare, push
from s2quant.records import folder_hashes


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps(sample.results()), encoding="utf-8")
    return folder


def test_card_and_dry_run(tiny_quantized: Path, tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str],
                          monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    results = sample.results()
    results["provenance"]["inputs"]["model"] = {}
    (run / "results.json").write_text(json.dumps(results), encoding="utf-8")
    monkeypatch.setattr(HfApi, "upload_folder", lambda *a, **k: pytest.fail("uploaded"))
    out = tmp_path / "hub"
    assert main(["publish", str(tiny_quantized), "--eval", str(run), "--repo", "me/it", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "nothing was uploaded" in said
    assert f"{(out / 'model.safetensors').stat().st_size:>15,}  model.safetensors" in said
    card = ModelCard.load(out / "README.md")
    assert card.data.license_name == "fish-audio-research-license"
    measured = {one.metric_name: one.metric_value for one in card.data.eval_results}
    assert measured == {row["name"]: row["model"] for row in sample.metrics() if row["model"] is not None}
    assert (
        "| WER (corpus) | fraction | whisper:0a1b2c3d4e5f | 0.0104 | 0.0114 | 0.0010 [-0.0021, 0.0040] |" in card.text
    )
    assert "Built with Fish Audio" in (out / "NOTICE").read_text("utf-8")
    assert (out / "s2quant" / "recipe.yaml").is_file() and (out / "manifest.json").is_file()
    before, after = folder_hashes(tiny_quantized), folder_hashes(out)
    assert {name for name in after if before.get(name) != after[name]} <= {"README.md", "NOTICE"}


def test_a_table_is_replaced_and_none_is_made_up() -> None:
    once = hub_card("", "it", sample.results())
    twice = hub_card(once, "it", sample.results())
    assert once == twice
    bare = hub_card(once, "it", None)
    assert bare.count(START) == 1
    assert "Speech was not measured." in bare and "model-index" not in bare and "0.0114" not in bare


def test_push(tiny_quantized: Path, tmp_path: Path) -> None:
    calls = []

    class Api:
        def create_repo(self, repo: str, **more: object) -> None:
            calls.append(("create", repo))

        def upload_folder(self, **more: object) -> str:
            calls.append(("upload", str(more["repo_id"]), str(more["folder_path"])))
            return "commit"

    class Offline(Api):
        def create_repo(self, repo: str, **more: object) -> None:
            raise OfflineModeIsEnabled("no network")

    upload = prepare(tiny_quantized, tmp_path / "hub", None, "me/it")
    assert push(upload, Api()) == "commit"  # type: ignore[arg-type]
    assert calls == [("create", "me/it"), ("upload", "me/it", str(tmp_path / "hub"))]
    with pytest.raises(UserError, match="no network"):
        push(upload, Offline())  # type: ignore[arg-type]


def test_refusals(tiny_quantized: Path, tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["publish", str(tiny_quantized), "--push", "--out", str(tmp_path / "hub")]) == 2
    assert "--push without --repo" in capsys.readouterr().err
    with pytest.raises(UserError, match="OWNER/NAME"):
        prepare(tiny_quantized, tmp_path / "hub", None, "a//b")
    with pytest.raises(UserError, match="measured other weights"):
        prepare(tiny_quantized, tmp_path / "hub", run, None)
    (run / "results.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match="version None"):
        prepare(tiny_quantized, tmp_path / "hub", run, None)
    assert not (tmp_path / "hub").exists()


def test_the_licence_is_that_of_the_checkpoint_it_was_made_from(tmp_path: Path) -> None:
    assert licence_of(tmp_path) == FISH
    (tmp_path / "README.md").write_text("# A card without a licence\n", encoding="utf-8")
    assert licence_of(tmp_path) == FISH
    (tmp_path / "README.md").write_text("---\nlicense: other\n---\n", encoding="utf-8")
    assert licence_of(tmp_path) == FISH
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\nbase_model: mine\n---\n", encoding="utf-8")
    found = licence_of(tmp_path)
    assert found.fields == {"base_model": "mine", "license": "apache-2.0"}
    card = hub_card("", "it", None, found)
    assert "license: apache-2.0" in card and "Fish" not in card and "mine" in card
