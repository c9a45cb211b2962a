"""A hub folder: the card's figures are those of the run, nothing is uploaded unasked, the hub's errors are said."""

import json
import sys
from pathlib import Path

import pytest
from folder_cases import REPOSITORY, SINGLE, link_copy, replace_bytes
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
def run(tiny_quantized: Path, tmp_path: Path) -> Path:
    """An evaluation of the quantized folder; its figures are made up, the hashes are those of the folders."""
    results = sample.results()
    results["provenance"]["inputs"]["model"] = folder_hashes(tiny_quantized)
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
    return folder


def test_card_and_dry_run(tiny_quantized: Path, tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str],
                          monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr(HfApi, "upload_folder", lambda *a, **k: pytest.fail("uploaded"))
    out = tmp_path / "hub"
    assert main(["publish", str(tiny_quantized), "--eval", str(run), "--repo", "me/it", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "nothing was uploaded" in said
    assert f"{(out / 'model.safetensors').stat().st_size:>15,}  model.safetensors" in said
    card = ModelCard.load(out / "README.md")
    assert card.data.license_name == "fish-audio-research-license"
    measured = {one.metric_name: one.metric_value for one in card.data.eval_results}
    metrics = {row["name"]: row["model"] for row in sample.metrics() if row["model"] is not None}
    assert {name: measured[name] for name in metrics} == metrics
    assert (
        "| WER (corpus) | fraction | whisper:0a1b2c3d4e5f | 0.0104 | 0.0114 | 0.0010 [-0.0021, 0.0040] |" in card.text
    )
    assert "Built with Fish Audio" in (out / "NOTICE").read_text("utf-8")
    before, after = folder_hashes(tiny_quantized), folder_hashes(out)
    assert {name for name in after if before.get(name) != after[name]} == {"README.md", "NOTICE"}
    hashes = json.loads((out / "manifest.json").read_text("utf-8"))["files_sha256"]
    assert hashes == {name: value for name, value in after.items() if name not in ("README.md", "NOTICE")}


def test_all_but_weights_and_codec_may_be_edited(tiny_quantized: Path, tmp_path: Path) -> None:
    out = tmp_path / "hub"
    prepare(tiny_quantized, out, None, None)
    files = [path.relative_to(out) for path in out.rglob("*") if path.is_file()]
    linked = {
        str(name) for name in files if (tiny_quantized / name).exists() and (out / name).samefile(tiny_quantized / name)
    }
    assert Path("s2quant/recipe.yaml") in files and Path("s2quant/calibration.safetensors") in files
    assert linked == {"model.safetensors", "codec.pth"}


def test_links_of_a_download_are_followed(tiny_folder: Path, tmp_path: Path) -> None:
    model = tmp_path / "snapshots" / "it"
    model.mkdir(parents=True)
    for path in link_copy(tiny_folder, tmp_path / "blobs").iterdir():
        (model / path.name).symlink_to(Path("..") / ".." / "blobs" / path.name)
    prepare(model, tmp_path / "hub", None, None)
    assert not [path for path in (tmp_path / "hub").iterdir() if path.is_symlink()]


def test_a_table_is_replaced_and_none_is_made_up() -> None:
    once = hub_card("", "it", sample.results())
    twice = hub_card(once, "it", sample.results())
    assert once == twice
    bare = hub_card(once, "it", None)
    assert bare.count(START) == 1
    assert "Speech was not measured." in bare and "model-index" not in bare and "0.0114" not in bare


def test_what_decides_is_in_the_table() -> None:
    results = sample.results()
    residual = sum(book["kl_mean"] for book in results["tokens"]["codebooks"][1:]) / 9
    results["tokens"]["codebooks"][0] |= {"n": 34210, "floor_kl_mean": 0.00012}
    arms = {"baseline": {"count": 3, "n": 600}, "model": {"count": 12, "n": 600}, "floor": {"count": 6, "n": 600}}
    results["failures"].append({"kind": "error", "arms": {arm: {"count": 0, "n": 600} for arm in arms}})
    results["failures"].append({"kind": "any", "arms": arms})
    card = hub_card("", "it", results)
    assert "| KL to the baseline, semantic codebook | nats |  | - | 0.0120 | - | 0.00012 | 34210 |" in card
    assert f"| KL to the baseline, mean of the residual codebooks | nats |  | - | {residual:.4f} | - | 0.0011 |" in card
    row = "| Failed clips | fraction |  | 0.0050 (3 of 600) | 0.0200 (12 of 600) | 0.0150 | 0.0050 | 600 |"
    assert row in card
    index = {one.metric_type: one.metric_value for one in ModelCard(card).data.eval_results}
    assert index["kl_semantic"] == 0.012 and index["failed_clips"] == 0.02
    assert index["kl_residual"] == pytest.approx(residual)

    del results["failures"][-1]
    assert "| Clips that could not be spoken | fraction |  | 0.0000 (0 of 600) |" in hub_card("", "it", results)
    bare = hub_card("", "it", results | {"tokens": None, "failures": []})
    assert "KL" not in bare and "lips" not in bare and "WER (corpus)" in bare


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


class Hub:
    """Stands for the hub: refuses as long as it is offline, and keeps what it is given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.is_offline = False
        self.cards: list[str] = []
        monkeypatch.setattr(HfApi, "create_repo", self.create)
        monkeypatch.setattr(HfApi, "upload_folder", self.upload)

    def create(self, repo: str, **more: object) -> None:
        if self.is_offline:
            raise OfflineModeIsEnabled("no network")

    def upload(self, *, folder_path: str, **more: object) -> str:
        self.cards.append((Path(folder_path) / "README.md").read_text("utf-8"))
        return "commit"


def test_a_dry_run_then_the_upload(tiny_quantized: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                   capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    hub = Hub(monkeypatch)
    model, out = link_copy(tiny_quantized, tmp_path / "q4"), tmp_path / "q4.hub"
    words = ["publish", str(model), "--eval", str(run)]
    assert main(words) == 0
    assert main(words) == 2
    assert "q4.hub exists already" in capsys.readouterr().err
    card = (out / "README.md").read_text("utf-8") + "\nMy own words.\n"
    (out / "README.md").write_text(card, "utf-8")
    hub.is_offline = True
    assert main([*words, "--repo", "me/it", "--push"]) == 2
    assert "give the same command again" in capsys.readouterr().err
    hub.is_offline = False
    assert main([*words, "--repo", "me/it", "--push"]) == 0
    said = capsys.readouterr().out
    assert f"prepared in {out} before, taken as they are; uploaded: commit" in said
    assert main(["publish", str(out), "--repo", "me/it", "--push"]) == 0
    assert hub.cards == [card, card]
    assert main(["publish", str(out)]) == 0
    assert "nothing was uploaded" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"q4", "q4.hub", "run"}


def test_a_failed_upload_is_tried_again(tiny_quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(monkeypatch)
    hub.is_offline = True
    words = ["publish", str(tiny_quantized), "--out", str(tmp_path / "hub"), "--repo", "me/it", "--push"]
    assert main(words) == 2
    hub.is_offline = False
    assert main(words) == 0
    assert len(hub.cards) == 1


def test_only_what_was_prepared_from_it_is_taken_up(tiny_quantized: Path, tiny_folder: Path, run: Path, tmp_path: Path,
                                                    monkeypatch: pytest.MonkeyPatch,
                                                    capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    hub = Hub(monkeypatch)
    out = tmp_path / "hub"
    push_words = ["--out", str(out), "--repo", "me/it", "--push"]
    out.mkdir()
    assert main(["publish", str(tiny_quantized), *push_words]) == 2
    assert "hub exists already, and nothing in it says" in capsys.readouterr().err
    out.rmdir()
    prepare(tiny_quantized, out, None, None)
    assert main(["publish", str(tiny_folder), *push_words]) == 2
    assert f"was not prepared from {tiny_folder}: config.json, model.safetensors" in capsys.readouterr().err
    assert main(["publish", str(tiny_quantized), "--eval", str(run), *push_words]) == 2
    assert "was not prepared with the figures of" in capsys.readouterr().err
    replace_bytes(out / "config.json", (out / "config.json").read_bytes() + b"\n")
    assert main(["publish", str(tiny_quantized), *push_words]) == 2
    assert "config.json is not the file that manifest.json has the hash of" in capsys.readouterr().err
    assert hub.cards == []


def test_a_folder_without_a_manifest_gets_one(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub(monkeypatch)
    model = link_copy(tiny_folder, tmp_path / "original")
    (model / "manifest.json").unlink()
    assert main(["publish", str(model)]) == 0
    record = json.loads((tmp_path / "original.hub" / "manifest.json").read_text("utf-8"))
    assert record["stage"] == "publish" and SINGLE in record["files_sha256"]
    assert main(["publish", str(model), "--repo", "me/it", "--push"]) == 0
    assert len(hub.cards) == 1


def test_refusals(tiny_quantized: Path, tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["publish", str(tiny_quantized), "--push", "--out", str(tmp_path / "hub")]) == 2
    assert "--push without --repo" in capsys.readouterr().err
    for name in ("a//b", "bad", "/bad", "bad/"):
        assert main(["publish", str(tiny_quantized), "--out", str(tmp_path / "hub"), "--repo", name]) == 2
        said = capsys.readouterr().err
        assert f"--repo {name}: " in said and "OWNER/NAME" in said
    with pytest.raises(UserError, match="lies in"):
        prepare(tiny_quantized, tiny_quantized / "within" / "it", None, None)
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
